//! Decides which calls share a tuning result.

use super::catalogue::RelativeKind;
use crate::error::{Error, Result, value_error};
use crate::problem::{Dtype, NO_BOUND, Problem};

/// Calls with the same key share a tuning result. It contains everything that distinguishes the kernels that a call may
/// run. The batch and the key lengths of its entries are not part of it, because the same row gives the same bits in
/// every batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TuningKey {
    /// Number of query rows per key/value head, all grouped heads together, rounded up to a power of two.
    pub rows: usize,
    /// Number of keys, rounded up to a power of two.
    pub keys: usize,
    /// Width of a query and a key.
    pub dim_k: usize,
    /// Width of a value.
    pub dim_v: usize,
    /// The types in the buffers of Q, K and V.
    pub stored: [Dtype; 3],
    /// What is read in addition to them.
    pub rules: KeyRules,
}

/// What a call reads in addition to Q, K and V.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct KeyRules {
    /// A causal rule or a window.
    pub banded: bool,
    /// Boolean masks.
    pub masks: bool,
    /// Additive biases.
    pub biases: bool,
    /// A bias by distance.
    pub relative: Option<RelativeKind>,
    /// Rotary positions, and whether their pairs are adjacent columns.
    pub rotary: Option<bool>,
    /// A sink per head.
    pub sink: bool,
}

impl KeyRules {
    /// The words for the rules in use, in order.
    fn words(&self) -> impl Iterator<Item = &'static str> {
        let relative = self.relative.map(|kind| match kind {
            RelativeKind::Slope => "slopes",
            RelativeKind::Table => "relative-keys",
            RelativeKind::Fours => "buckets",
        });
        let rotary = self.rotary.map(|interleaved| if interleaved { "rotary-interleaved" } else { "rotary" });
        let flags = [(self.banded, "banded"), (self.masks, "masks"), (self.biases, "biases"), (self.sink, "sink")];
        flags.into_iter().filter(|(is_there, _)| *is_there).map(|(_, word)| word).chain(relative).chain(rotary)
    }

    /// Every possible combination, for parsing.
    fn all() -> impl Iterator<Item = KeyRules> {
        let relatives = [None, Some(RelativeKind::Slope), Some(RelativeKind::Table), Some(RelativeKind::Fours)];
        let rotaries = [None, Some(false), Some(true)];
        (0..16u32).flat_map(move |bits| {
            let is = move |n: u32| bits >> n & 1 == 1;
            relatives.into_iter().flat_map(move |relative| {
                rotaries.into_iter().map(move |rotary| KeyRules {
                    banded: is(0),
                    masks: is(1),
                    biases: is(2),
                    sink: is(3),
                    relative,
                    rotary,
                })
            })
        })
    }
}

impl TuningKey {
    /// The key of a call. `problem` determines whether it is banded.
    pub fn of(problem: &Problem, stored: [Dtype; 3], rules: KeyRules) -> TuningKey {
        let bucket = |n: usize| n.max(1).checked_next_power_of_two().unwrap_or(usize::MAX);
        let banded = problem.bands.iter().any(|band| band.lo > -NO_BOUND || band.hi < NO_BOUND);
        TuningKey {
            rows: bucket(problem.group().saturating_mul(problem.len_q)),
            keys: bucket(problem.len_k),
            dim_k: problem.dim_k,
            dim_v: problem.dim_v,
            stored,
            rules: KeyRules { banded, ..rules },
        }
    }
}

/// `rows256 keys1024 dim64x64 f32,f32,f32 banded masks rotary`
impl std::fmt::Display for TuningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let TuningKey { rows, keys, dim_k, dim_v, stored: [q, k, v], rules } = self;
        write!(f, "rows{rows} keys{keys} dim{dim_k}x{dim_v} {q},{k},{v}")?;
        rules.words().try_for_each(|word| write!(f, " {word}"))
    }
}

impl std::str::FromStr for TuningKey {
    type Err = Error;
    fn from_str(text: &str) -> Result<TuningKey> {
        let parse = || {
            let mut words = text.split(' ');
            let rows = words.next()?.strip_prefix("rows")?.parse().ok()?;
            let keys = words.next()?.strip_prefix("keys")?.parse().ok()?;
            let (dim_k, dim_v) = words.next()?.strip_prefix("dim")?.split_once('x')?;
            let stored = words
                .next()?
                .split(',')
                .map(|word| [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|dtype| dtype.to_string() == word));
            let stored = stored.collect::<Option<Vec<_>>>()?.try_into().ok()?;
            let words: Vec<&str> = words.collect();
            let rules = KeyRules::all().find(|rules| rules.words().eq(words.iter().copied()))?;
            let dims = [dim_k, dim_v].map(|dim| dim.parse().ok());
            Some(TuningKey { rows, keys, dim_k: dims[0]?, dim_v: dims[1]?, stored, rules })
        };
        parse().ok_or_else(|| {
            value_error!(
                "{text:?} is not a tuning key; an example is rows256 keys1024 dim64x64 f32,f32,f32 banded masks"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Align, Positions};

    fn key(q: [usize; 4], k: [usize; 4], positions: &Positions) -> TuningKey {
        let problem = Problem::new(&q, &k, &k, None, None, positions, 0).unwrap();
        TuningKey::of(&problem, [Dtype::F32; 3], KeyRules::default())
    }

    #[test]
    fn neither_the_batch_nor_its_lengths_enter() {
        for causal in [false, true] {
            let with = |key_lengths| Positions { causal, key_lengths, ..Default::default() };
            let one = key([1, 8, 33, 64], [1, 2, 65, 64], &with(None));
            assert_eq!((one.rows, one.keys, one.rules.banded), (256, 128, causal));
            assert_eq!(key([7, 8, 33, 64], [7, 2, 65, 64], &with(None)), one);
            assert_eq!(key([2, 8, 33, 64], [2, 2, 65, 64], &with(Some(vec![65, 3]))), one);
            let offsets = Positions { align: Align::PerBatch(vec![32, 1]), ..with(Some(vec![65, 3])) };
            assert_eq!(key([2, 8, 33, 64], [2, 2, 65, 64], &offsets), one);
        }
    }

    #[test]
    fn what_matters_enters() {
        let plain = Positions::default();
        let one = key([1, 8, 32, 64], [1, 8, 64, 64], &plain);
        assert_eq!(key([1, 8, 17, 64], [1, 8, 33, 64], &plain), one);
        for (q, k) in [
            ([1, 8, 33, 64], [1, 8, 64, 64]),
            ([1, 8, 32, 64], [1, 4, 64, 64]),
            ([1, 8, 32, 64], [1, 8, 65, 64]),
            ([1, 8, 32, 60], [1, 8, 64, 60]),
        ] {
            assert_ne!(key(q, k, &plain), one);
        }
        let window = Positions { window_left: Some(3), ..Default::default() };
        assert_ne!(key([1, 8, 32, 64], [1, 8, 64, 64], &window), one);
    }

    #[test]
    fn texts_are_read_as_written() {
        let key = key([1, 8, 32, 64], [1, 8, 64, 64], &Positions::default());
        let mut texts = std::collections::BTreeSet::new();
        for (n, rules) in KeyRules::all().enumerate() {
            let stored = [Dtype::F32, Dtype::F16, Dtype::BF16][n % 3];
            let key = TuningKey { rules, stored: [Dtype::F32, stored, stored], ..key };
            assert_eq!(key.to_string().parse::<TuningKey>().unwrap(), key);
            texts.insert(rules.words().collect::<Vec<_>>());
        }
        // No two are equal.
        assert_eq!(texts.len(), 16 * 4 * 3);
        for bad in [
            "",
            "rows1",
            "rows1 keys1 dim1x1 f32,f32",
            "rows1 keys1 dim1x1 f32,f32,bool",
            "rows1 keys1 dim1x1 f32,f32,f32 x",
            "rows1 keys1 dim1x1 f32,f32,f32 masks banded",
        ] {
            assert!(bad.parse::<TuningKey>().is_err(), "{bad}");
        }
    }
}
