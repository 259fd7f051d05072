//! Rotary positions of attention, layers and caches, on every device, against the papers' formulas in f64.

use crate::kit::{Call, Truth, assert_close, assert_close_to, devices, methods_in_turn, noise, wide};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::position::{LongRope, Pairing, Rotary, RotaryConfig, RotaryScaling, TokenPositions, Yarn};
use wgpu_attention::problem::Positions;
use wgpu_attention::{
    Align, Attention, Device, Dtype, Inspect, KvCache, KvCacheConfig, Method, MultiHeadAttention, MultiHeadConfig,
    Tensor, Weights,
};

const TOLERANCE: f64 = 3e-6;

fn random(device: &Device, shape: &[usize], seed: u64) -> Tensor {
    let values = noise(&mut Pcg64::seed_from_u64(seed), shape.iter().product());
    Tensor::from_slice(device, shape, &values).unwrap()
}

fn assert_same(what: &str, actual: &Tensor, expected: &Tensor) {
    assert_eq!(actual.shape(), expected.shape(), "{what}");
    assert_close(what, actual, &wide(&expected.download().unwrap()), TOLERANCE);
}

/// The rotation angle of each pair per position in a sequence of `len`, and the factor on sines and cosines: from the
/// papers, independent of the library's arithmetic.
pub fn written_out(config: &RotaryConfig, len: usize) -> (Vec<f64>, f64) {
    let dim = config.dim as f64;
    // Su et al. 2021, equation 15: the angles of a base.
    let of = |base: f64, i: usize| (-2.0 * i as f64 / dim * base.ln()).exp();
    let theta = |i: usize| of(config.base, i);
    let wavelength = |i: usize| std::f64::consts::TAU / theta(i);
    let pairs = 0..config.dim / 2;
    match &config.scaling {
        RotaryScaling::None => (pairs.map(theta).collect(), 1.0),
        // Chen et al. 2023, equation 4: positions are divided.
        RotaryScaling::Linear { factor } => (pairs.map(|i| theta(i) / factor).collect(), 1.0),
        // "Dynamically scaled RoPE": beyond the trained length, the base grows with the sequence.
        RotaryScaling::DynamicNtk { factor, original_len } => {
            let times = if len > *original_len { len as f64 / *original_len as f64 } else { 1.0 };
            let base = config.base * (1.0 + factor * (times - 1.0)).powf(dim / (dim - 2.0));
            (pairs.map(|i| of(base, i)).collect(), 1.0)
        }
        // Peng et al. 2023, sections 3.2 to 3.4, with the ramp over pairs as in their code. The number of full
        // rotations of a pair within the trained length decreases with its index, so bisection finds where the ramp
        // begins and ends.
        RotaryScaling::Yarn(yarn) => {
            let rotations =
                |i: f64| yarn.original_len as f64 / std::f64::consts::TAU * (-2.0 * i / dim * config.base.ln()).exp();
            let pair_with_rotations = |times: f64| {
                let (mut before, mut behind) = (-1e3, 1e3);
                for _ in 0..200 {
                    let middle = (before + behind) / 2.0;
                    if rotations(middle) > times { before = middle } else { behind = middle }
                }
                before
            };
            let (mut first, mut last) = (pair_with_rotations(yarn.beta_fast), pair_with_rotations(yarn.beta_slow));
            if yarn.truncate {
                (first, last) = (first.floor(), last.ceil());
            }
            (first, last) = (first.max(0.0), last.min(dim - 1.0));
            let mix = |i: usize| {
                let divided = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
                theta(i) * (1.0 - divided) + theta(i) / yarn.factor * divided
            };
            let hotter = |by: f64| if yarn.factor > 1.0 { 1.0 + 0.1 * by * yarn.factor.ln() } else { 1.0 };
            let factor = match (yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim) {
                (Some(given), ..) => given,
                (_, Some(one), Some(all)) => hotter(one) / hotter(all),
                _ => hotter(1.0),
            };
            (pairs.map(mix).collect(), factor)
        }
        // Llama 3.1's model code: frequencies of long waves are divided, those of short waves kept, and those in
        // between interpolated.
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
            let waves = |i: usize| *original_len as f64 / wavelength(i);
            let kept = |i: usize| ((waves(i) - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            (pairs.map(|i| theta(i) * kept(i) + theta(i) / factor * (1.0 - kept(i))).collect(), 1.0)
        }
        // Ding et al. 2024, equation 3, with the attention factor of their released models.
        RotaryScaling::LongRope(long) => {
            let factors = if len > long.original_len { &long.long_factor } else { &long.short_factor };
            let hotter = || (1.0 + long.factor.ln().max(0.0) / (long.original_len as f64).ln()).sqrt();
            (pairs.map(|i| theta(i) / factors[i]).collect(), long.attention_factor.unwrap_or_else(hotter))
        }
        other => panic!("no formula for {other:?}"),
    }
}

/// X `[b, h, i, d]` rotated in f64 as complex numbers. Query `i` of batch entry `b` is at position `starts[b] + i` of a
/// sequence of `len` tokens.
pub fn rotated(config: &RotaryConfig, len: usize, shape: [usize; 4], x: &[f32], starts: &[usize]) -> Vec<f64> {
    let (frequencies, factor) = written_out(config, len);
    let [_, heads, rows, dim] = shape;
    let mut y = wide(x);
    for (n, row) in y.chunks_mut(dim).enumerate() {
        let position = (starts[n / rows / heads] + n % rows) as f64;
        for (pair, frequency) in frequencies.iter().enumerate() {
            let (real, imaginary) = match config.pairing {
                Pairing::HalfSplit => (pair, pair + config.dim / 2),
                Pairing::Interleaved => (2 * pair, 2 * pair + 1),
            };
            let (length, angle) = (row[real].hypot(row[imaginary]), row[imaginary].atan2(row[real]));
            let angle = angle + position * frequency;
            (row[real], row[imaginary]) = (factor * length * angle.cos(), factor * length * angle.sin());
        }
    }
    y
}

/// Every kind of scaling for a rotary dimension, trained for fewer positions than are used.
fn scalings(dim: usize) -> Vec<RotaryScaling> {
    let yarn = Yarn::new(4.0, 64);
    let factors = |by: f64| (0..dim / 2).map(|i| 1.0 + by * i as f64).collect();
    let long = LongRope {
        short_factor: factors(0.05),
        long_factor: factors(0.5),
        original_len: 64,
        factor: 4.0,
        attention_factor: None,
    };
    vec![
        RotaryScaling::None,
        RotaryScaling::Linear { factor: 4.0 },
        RotaryScaling::DynamicNtk { factor: 2.0, original_len: 64 },
        RotaryScaling::DynamicNtk { factor: 2.0, original_len: 4096 },
        RotaryScaling::Yarn(yarn.clone()),
        RotaryScaling::Yarn(Yarn { beta_fast: 4.0, beta_slow: 0.5, truncate: false, ..yarn.clone() }),
        RotaryScaling::Yarn(Yarn { mscale: Some(0.7), mscale_all_dim: Some(1.4), ..yarn.clone() }),
        RotaryScaling::Yarn(Yarn { attention_factor: Some(0.75), ..yarn }),
        RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len: 64 },
        RotaryScaling::LongRope(long.clone()),
        RotaryScaling::LongRope(LongRope { original_len: 4096, attention_factor: Some(1.2), ..long }),
    ]
}

/// The number of positions in the tables.
const LEN: usize = 200;

/// Every pairing, for whole heads of 16 and for parts: multiples of four pairs and other numbers.
fn configs() -> Vec<RotaryConfig> {
    [Pairing::HalfSplit, Pairing::Interleaved]
        .into_iter()
        .flat_map(|pairing| [16, 8, 6].map(|dim| RotaryConfig::new(dim).pairing(pairing)))
        .collect()
}

#[test]
fn tables_are_the_papers_formulas() {
    for config in configs().into_iter().chain([RotaryConfig::new(128).base(5e5)]) {
        for scaling in scalings(config.dim) {
            for exact in [true, false] {
                let config = config.clone().scaling(scaling.clone()).f32_frequencies(!exact);
                for len in [20, LEN] {
                    let (frequencies, factor) = written_out(&config, len);
                    let [cos, sin] = config.tables(len).unwrap();
                    assert_eq!(cos.shape(), [len, config.dim / 2]);
                    for (at, (&cos, &sin)) in cos.data().iter().zip(sin.data()).enumerate() {
                        let angle = (at / frequencies.len()) as f64 * frequencies[at % frequencies.len()];
                        // An f32 is off by half a place, and a frequency in f32 by a few places of itself.
                        let allowed = factor * (6e-8 + if exact { 1e-12 } else { 8.0 * 6e-8 * angle });
                        for (got, want) in [(cos, factor * angle.cos()), (sin, factor * angle.sin())] {
                            let off = (f64::from(got) - want).abs();
                            assert!(off <= allowed, "{config:?}, {len} positions, [{at}]: {got} instead of {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_scaling_rotates_rows_and_attention_by_its_formula() {
    let shape = [2, 4, 9, 16];
    let starts = [31, 7];
    let align = Align::PerBatch(starts.map(|start| start as i64).to_vec());
    let positions = Positions { causal: true, align, ..Positions::default() };
    let call = Call { positions, ..Call::plain(shape, [2, 2, 40, 16], [2, 2, 40, 16]) };
    let data = call.data();
    for config in configs() {
        for (n, scaling) in scalings(config.dim).into_iter().enumerate() {
            let config = config.clone().scaling(scaling);
            let rotate = |shape, x: &[f32], starts: &[usize]| rotated(&config, LEN, shape, x, starts);
            let (q, k) = (rotate(call.q, &data.q, &starts), rotate(call.k, &data.k, &[0; 2]));
            let truth = call.with_operands(&data, [q.clone(), k, wide(&data.v)], Truth::new);
            for (name, device) in devices() {
                let what = format!("{config:?} on {name}");
                let rotary = Rotary::new(&device, &config, LEN).unwrap();
                let x = Tensor::from_slice(&device, &call.q, &data.q).unwrap();
                let y = rotary.rotate(&x, &TokenPositions::FromEach(starts.to_vec())).unwrap();
                assert_close(&what, &y, &q, 3e-7);
                // Rotated while rows are read, and beforehand in three passes; the other fused methods alternate.
                for method in methods_in_turn(&device, n, usize::from(n < 2)) {
                    let attention = call.attention().lse(true).rotary(rotary.clone()).method(method);
                    let attended = call.run(&device, &data, attention).unwrap();
                    truth.hold(&format!("{what} by {method}"), &attended, TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn attention_rotates_its_operands() {
    let base = Call::plain([2, 4, 9, 16], [2, 2, 40, 16], [2, 2, 40, 16]);
    let data = base.data();
    let rules = [
        (Positions::default(), [0, 0]),
        (Positions { causal: true, align: Align::BottomRight, ..Positions::default() }, [31, 31]),
        (Positions { causal: true, align: Align::PerBatch(vec![5, 30]), ..Positions::default() }, [5, 30]),
        (
            Positions { align: Align::Offset(7), window_left: Some(9), window_right: Some(3), ..Positions::default() },
            [7, 7],
        ),
    ];
    for (n, config) in configs().into_iter().enumerate() {
        let rotate = |shape, x: &[f32], starts: &[usize]| rotated(&config, LEN, shape, x, starts);
        for (positions, starts) in &rules {
            let call = Call { positions: positions.clone(), ..base.clone() };
            let (q, k) = (rotate(call.q, &data.q, starts), rotate(call.k, &data.k, &[0; 2]));
            let truth = call.with_operands(&data, [q, k, wide(&data.v)], Truth::new);
            for (name, device) in devices() {
                let what = format!("{config:?} on {name}, from {starts:?}");
                let rotating = call.attention().lse(true).rotary(Rotary::new(&device, &config, LEN).unwrap());
                let [q, k, v] = call.operands(&device, &data, Dtype::F32).unwrap();
                let all = rotating.clone().weights(Weights::PerHead).forward(&q, &k, &v).unwrap();
                truth.hold(&what, &all, TOLERANCE);
                if let Device::Gpu(gpu) = &device
                    && *starts == [5, 30]
                {
                    // Rotated while rows are read, by every tile, and beforehand in three passes; the methods
                    // alternate.
                    for method in Method::every(gpu.capabilities()).into_iter().skip(n % 2).step_by(2) {
                        let what = format!("{what}, {method}");
                        let (attended, profile) = rotating.clone().method(method).forward_profiled(&q, &k, &v).unwrap();
                        truth.hold(&what, &attended, TOLERANCE);
                        let is_read = profile.kernels.iter().any(|kernel| kernel.contains("/rotary"));
                        // Three adjacent pairs are not a multiple of a vec4.
                        assert_eq!(is_read, method != Method::ThreePasses && config.dim != 6, "{what}: {profile:?}");
                    }
                }
                let seen = rotating.inspect(&q, &k, &all.lse.unwrap(), &Inspect::new().weights()).unwrap();
                assert_close(&what, &seen.weights.unwrap(), &truth.weights, 1e-5);
            }
        }
        // Positions given by the caller.
        let every_third = |x: &[f32]| -> Vec<f64> {
            // Every third key of three times as many.
            let [batch, heads, keys, dim] = base.k;
            let mut spread = vec![0.0; batch * heads * keys * 3 * dim];
            for (row, x) in x.chunks(dim).enumerate() {
                spread[row * 3 * dim..][..dim].copy_from_slice(x);
            }
            let y = rotate([batch, heads, keys * 3, dim], &spread, &[0; 2]);
            y.chunks(3 * dim).flat_map(|rows| rows[..dim].to_vec()).collect()
        };
        let (q, k) = (rotate(base.q, &data.q, &[100; 2]), every_third(&data.k));
        let truth = base.with_operands(&data, [q, k, wide(&data.v)], Truth::new);
        for (name, device) in devices() {
            let (queries, keys) = (TokenPositions::From(100), TokenPositions::Given((0..40).map(|j| 3 * j).collect()));
            let rotary = Rotary::new(&device, &config, LEN).unwrap();
            let attended = base.run(&device, &data, Attention::new().rotary_at(rotary, queries, keys)).unwrap();
            truth.hold(&format!("{config:?} on {name}, given positions"), &attended, TOLERANCE);
        }
    }
}

#[test]
fn packed_sequences_begin_at_position_0_each() {
    for (name, device) in devices() {
        let rotary = &Rotary::new(&device, &RotaryConfig::new(16), LEN).unwrap();
        let (q, k) = (random(&device, &[21, 4, 16], 1), random(&device, &[30, 2, 16], 2));
        let (starts_q, starts_k) = ([0, 5, 5, 21], [0, 10, 12, 30]);
        let attention = Attention::new().causal(Align::BottomRight).rotary(rotary.clone());
        let packed = attention.forward_packed(&q, &k, &k, &starts_q, &starts_k).unwrap().output;
        for n in [0, 2] {
            let part = |x: &Tensor, starts: &[usize]| {
                let one = x.narrow(0, starts[n], starts[n + 1] - starts[n]).unwrap();
                one.permute(&[1, 0, 2]).unwrap().unsqueeze(0).unwrap()
            };
            let (one_q, one_k) = (part(&q, &starts_q), part(&k, &starts_k));
            let alone = attention.forward(&one_q, &one_k, &one_k).unwrap().output;
            assert_same(&format!("{name}, sequence {n}"), &part(&packed, &starts_q), &alone);
        }
    }
}

#[test]
fn a_cache_continues_at_its_position() {
    const TOKENS: usize = 60;
    let config = RotaryConfig::new(16);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for window in [None, Some(11)] {
            let positions = Positions { causal: true, window_left: window, ..Positions::default() };
            let call = Call { positions, ..Call::plain([2, 4, TOKENS, 16], [2, 2, TOKENS, 16], [2, 2, TOKENS, 16]) };
            let data = call.data().rounded(dtype, Dtype::F32);
            for (name, device) in devices() {
                let rotary = Rotary::new(&device, &config, TOKENS).unwrap();
                let [q, k, v] = call.operands(&device, &data, dtype).unwrap();
                // Rotated keys are rounded to the type of the cache.
                let rotated_k = rotary.rotate(&k, &TokenPositions::From(0)).unwrap();
                let exact = rotated(&config, TOKENS, call.k, &data.k, &[0; 2]);
                assert_close(&name, &rotated_k, &exact, 3e-7);
                let rotated_q = rotated(&config, TOKENS, call.q, &data.q, &[0; 2]);
                let operands = [rotated_q, wide(&rotated_k.download().unwrap()), wide(&data.v)];
                let truth = call.with_operands(&data, operands, Truth::new);
                let capacity = if window.is_some() { 24 } else { TOKENS };
                let held = KvCacheConfig::new(2, 2, capacity, 16).window(window).dtype(dtype);
                let mut cache = KvCache::new(&device, held).unwrap().with_rotary(rotary).unwrap();
                let mut rng = Pcg64::seed_from_u64(8);
                let mut at = 0;
                while at < TOKENS {
                    let count = rng.random_range(1..=3).min(TOKENS - at);
                    let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, at, count).unwrap());
                    let got = cache.step(&Attention::new(), &q, &k, &v).unwrap().output;
                    let rows: Vec<usize> =
                        (0..8).flat_map(|head| (at..at + count).map(move |i| head * TOKENS + i)).collect();
                    let expected: Vec<f64> =
                        rows.iter().flat_map(|row| truth.output[row * 16..][..16].to_vec()).collect();
                    let what = format!("{name}, {dtype}, window {window:?}, from token {at} on");
                    assert_close_to(&what, &got, &expected, |n, _| truth.values[rows[n]], TOLERANCE);
                    at += count;
                    if rng.random_bool(0.2) && at > 12 {
                        cache.rollback(1).unwrap();
                        at -= 1;
                    }
                }
                assert_eq!(cache.positions(), [TOKENS; 2]);
            }
        }
    }
}

#[test]
fn lengths_of_their_own_and_full_tables() {
    for (name, device) in devices() {
        let rotary = Rotary::new(&device, &RotaryConfig::new(8), 4).unwrap();
        let new =
            || KvCache::new(&device, KvCacheConfig::new(2, 1, 8, 8)).unwrap().with_rotary(rotary.clone()).unwrap();
        let x = random(&device, &[2, 1, 3, 8], 3);
        let mut cache = new();
        // Tokens beyond the lengths need no position.
        cache.append_lengths(&x, &x, &[3, 1]).unwrap();
        cache.step_lengths(&Attention::new(), &x, &x, &x, &[1, 0]).unwrap();
        assert_eq!(cache.positions(), [4, 1]);
        let before = cache.positions();
        let error = cache.step_lengths(&Attention::new(), &x, &x, &x, &[1, 1]).unwrap_err().to_string();
        assert!(error.contains("position 4 is beyond the table"), "{name}: {error}");
        assert_eq!(cache.positions(), before, "{name}: a step that fails changes nothing");

        let one = x.narrow(2, 0, 1).unwrap();
        let error = cache.attend(&Attention::new().rotary(rotary.clone()), &one).unwrap_err().to_string();
        assert!(error.contains("KvCache::with_rotary"), "{name}: {error}");
        let error = cache.with_rotary(rotary.clone()).unwrap_err().to_string();
        assert!(error.contains("empty cache"), "{name}: {error}");
        let wide = Rotary::new(&device, &RotaryConfig::new(10), 4).unwrap();
        let error = new().with_rotary(wide.clone()).unwrap_err().to_string();
        assert!(error.contains("rotary dimension 10 is more than dim_k = 8"), "{name}: {error}");

        for (attention, say) in [
            (Attention::new().rotary(wide), "more than the width"),
            (Attention::new().causal(Align::Offset(-1)).rotary(rotary.clone()), "is at position -1"),
            (Attention::new().causal(Align::Offset(2)).rotary(rotary.clone()), "position 4 is beyond the table"),
        ] {
            let error = attention.forward(&x, &x, &x).unwrap_err().to_string();
            assert!(error.contains(say), "{name}: {error}");
        }
        let mut config = MultiHeadConfig::new(16, 2).unwrap();
        config.add_zero_attn = true;
        let layer = MultiHeadAttention::new(&device, config, 1).unwrap();
        let x = random(&device, &[1, 3, 16], 3);
        let error = layer.forward(&x, &x, &x, &Attention::new().rotary(rotary)).unwrap_err().to_string();
        assert!(error.contains("add_zero_attn"), "{name}: {error}");
    }
}
