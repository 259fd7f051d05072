//! Which weights dropout drops: a function of the call's seed and offset and of the pair's indices alone, so that every
//! path, tile and adapter drops the same pairs, forward and backward.

use crate::error::{Result, value_error};

/// Philox 4×32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3): four random words
/// from a counter and a key.
///
/// ```text
/// ten times:   [c₀, c₁, c₂, c₃] ← [hi(M₁·c₂) ^ c₁ ^ k₀, lo(M₁·c₂), hi(M₀·c₀) ^ c₃ ^ k₁, lo(M₀·c₀)]
/// in between:  [k₀, k₁] ← [k₀ + W₀, k₁ + W₁]
/// ```
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    // The golden ratio and √3 − 1, in 32 bits.
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let halves = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    let (mut c, mut k) = (counter, key);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let (high0, low0) = halves(MULTIPLIERS[0], c[0]);
        let (high1, low1) = halves(MULTIPLIERS[1], c[2]);
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0];
    }
    c
}

/// Dropout on the weights: each is kept with probability `1 − p` and then divided by `1 − p`.
///
/// ```text
/// key of the call      = the first two words of philox([offset, offset >> 32, 0, 0], [seed, seed >> 32])
/// words of four pairs  = philox([j / 4, i, h, b], key of the call)
/// pair (b, h, i, j) is kept if words[j % 4] ≥ p · 2³²
/// ```
///
/// `b` counts batch entries (of packed sequences: sequences), `h` query heads, `i` queries and `j` keys, extra keys
/// included. The softmax and the LSE are those without dropout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability of dropping a weight.
    pub p: f32,
    /// Words below this are dropped: `p · 2³²`.
    pub threshold: u32,
    /// The key of the call.
    pub key: [u32; 2],
}

impl Dropout {
    /// `p` must be at least 0 and less than 1. Calls with the same seed need different offsets to drop different pairs.
    pub fn new(p: f32, seed: u64, offset: u64) -> Result<Dropout> {
        if !(0.0..1.0).contains(&p) {
            return Err(value_error!("dropout p = {p} must be at least 0 and less than 1"));
        }
        let words = |x: u64| [x as u32, (x >> 32) as u32];
        let [low, high] = words(offset);
        let [k0, k1, ..] = philox([low, high, 0, 0], words(seed));
        // Exact: the largest f32 below 1 has 24 bits.
        Ok(Dropout { p, threshold: (f64::from(p) * 2f64.powi(32)) as u32, key: [k0, k1] })
    }

    /// Whether the weight of a pair `[b, h, i, j]` is kept.
    pub fn keeps(&self, [b, h, i, j]: [usize; 4]) -> bool {
        philox([j / 4, i, h, b].map(|n| n as u32), self.key)[j % 4] >= self.threshold
    }

    /// The factor on weights that are kept.
    pub fn factor(&self) -> f64 {
        1.0 / (1.0 - f64::from(self.p))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_words() {
        // `kat_vectors` of Random123, the authors' own implementation.
        for (counter, key, words) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), words);
        }
    }

    fn kept(dropout: Dropout) -> Vec<bool> {
        let pairs = (0..2 * 3 * 16 * 64).map(|at| [at / 3072, at / 1024 % 3, at / 64 % 16, at % 64]);
        pairs.map(|pair| dropout.keeps(pair)).collect()
    }

    #[test]
    fn a_share_of_p_is_dropped() {
        for p in [0.0, 0.1, 0.5, 0.9] {
            let kept = kept(Dropout::new(p, 7, 0).unwrap());
            let dropped = kept.iter().filter(|kept| !**kept).count() as f64;
            // Five standard deviations of the binomial distribution.
            let (n, p) = (kept.len() as f64, f64::from(p));
            assert!((dropped - n * p).abs() <= 5.0 * (n * p * (1.0 - p)).sqrt(), "{dropped} of {n} for p = {p}");
        }
        assert_eq!(Dropout::new(0.5, 7, 0).unwrap().factor(), 2.0);
        let almost = Dropout::new(1.0 - f32::EPSILON / 2.0, 7, 0).unwrap();
        assert_eq!(almost.threshold, u32::MAX - 255);
    }

    #[test]
    fn seeds_and_offsets_drop_other_pairs() {
        let of = |seed, offset| kept(Dropout::new(0.5, seed, offset).unwrap());
        let all = [of(7, 0), of(8, 0), of(7 + (1 << 32), 0), of(7, 1), of(7, 1 << 32)];
        for (n, a) in all.iter().enumerate() {
            for b in &all[n + 1..] {
                let same = a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
                assert!((same - 0.5).abs() < 0.05, "{same}");
            }
        }
        assert_eq!(of(7, 1), all[3]);
    }

    #[test]
    fn p_is_a_probability_below_one() {
        for p in [1.0, -0.1, f32::NAN, f32::INFINITY] {
            assert!(Dropout::new(p, 0, 0).unwrap_err().to_string().contains("less than 1"), "{p}");
        }
    }
}
