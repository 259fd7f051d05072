//! Biases by distance inside the kernels, against the formulas in f64, on every device.

use crate::kit::{
    Call, Data, Truth, assert_close, assert_close_to, assert_logs_close, devices, methods_in_turn, noise, wide,
};
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::position::alibi;
use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::Buckets;
use wgpu_attention::problem::{Layout, MaskMeaning, Positions, Problem};
use wgpu_attention::reference::{self, Inputs, View};
use wgpu_attention::{Align, Attention, Device, Inspect, KvCache, KvCacheConfig, ScoreStage, Tensor, Weights};

const TOLERANCE: f64 = 3e-6;

/// A bias that depends on the distance between query and key.
pub enum Distance {
    /// A slope per head.
    Alibi(Vec<f32>),
    /// `[num_buckets, heads]`
    T5(Vec<f32>, Buckets),
    /// `[left + right + 1, dim]`, and how far left and right.
    Shaw(Vec<f32>, [usize; 2]),
}

impl Distance {
    /// Passes the bias in f64 to `compute`.
    pub fn in_f64<T>(&self, heads: usize, dim: usize, compute: impl FnOnce(reference::Distance<'_>) -> T) -> T {
        let layout = |shape: &[usize]| Layout::contiguous(shape).unwrap();
        match self {
            Distance::Alibi(slopes) => {
                compute(reference::Distance::Alibi { slopes: View { data: &wide(slopes), layout: &layout(&[heads]) } })
            }
            Distance::T5(table, buckets) => {
                // Distances beyond have the same buckets as the last ones.
                let far = buckets.max_distance as i64;
                let all: Vec<usize> = (-far..=far).map(|distance| buckets.bucket(distance).unwrap()).collect();
                let layout = layout(&[buckets.num_buckets, heads]);
                let table = View { data: &wide(table), layout: &layout };
                compute(reference::Distance::T5 { table, first: -far, buckets: &all })
            }
            Distance::Shaw(table, [left, right]) => {
                let keys = View { data: &wide(table), layout: &layout(&[left + right + 1, dim]) };
                compute(reference::Distance::Shaw { keys, left: *left })
            }
        }
    }

    /// Adds it to an attention call.
    pub fn asked(&self, attention: Attention, device: &Device, heads: usize, dim: usize) -> Attention {
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        match self {
            Distance::Alibi(slopes) => attention.alibi(tensor(&[heads], slopes)),
            Distance::T5(table, buckets) => attention.t5_bias(tensor(&[buckets.num_buckets, heads], table), *buckets),
            Distance::Shaw(table, [left, right]) => {
                let table = tensor(&[left + right + 1, dim], table);
                attention.relative_keys(RelativeKeys::new(&table, *left, *right).unwrap())
            }
        }
    }

    /// Passes the operands of a call, including this bias, to a function of the reference implementation.
    pub fn with_inputs<T>(&self, call: &Call, data: &Data, compute: impl FnOnce(&Problem, &Inputs<'_>) -> T) -> T {
        call.with_inputs(data, |problem, inputs| {
            self.in_f64(problem.heads_q, problem.dim_k, |distance| {
                let mut inputs = inputs.clone();
                inputs.rules.distance = Some(distance);
                compute(problem, &inputs)
            })
        })
    }
}

/// One of each kind.
pub fn distances(heads: usize, dim: usize) -> Vec<(&'static str, Distance)> {
    let mut rng = Pcg64::seed_from_u64(3);
    let mut t5 = |bidirectional| {
        Distance::T5(noise(&mut rng, 8 * heads), Buckets { bidirectional, num_buckets: 8, max_distance: 20 })
    };
    vec![
        ("ALiBi", Distance::Alibi(alibi::slopes(heads).unwrap())),
        ("T5 of a decoder", t5(false)),
        ("T5 of an encoder", t5(true)),
        ("Shaw", Distance::Shaw(noise(&mut Pcg64::seed_from_u64(4), 9 * dim), [5, 3])),
    ]
}

#[test]
fn every_method_adds_the_formula() {
    let causal = Positions { causal: true, align: Align::BottomRight, ..Positions::default() };
    let window =
        Positions { window_left: Some(9), window_right: Some(4), align: Align::Offset(7), ..Positions::default() };
    let masks = vec![(vec![40, 70], MaskMeaning::Keep)];
    let plain = Call::plain([2, 4, 40, 12], [2, 2, 70, 12], [2, 2, 70, 12]);
    let calls = [
        plain.clone(),
        Call { positions: causal.clone(), masks, ..plain.clone() },
        Call { positions: window, softcap: Some(3.0), ..Call::plain([1, 3, 33, 5], [1, 3, 40, 5], [1, 3, 40, 9]) },
        // One query over many keys: keys are split.
        Call { positions: causal, scale: Some(0.3), ..Call::plain([1, 4, 1, 16], [1, 2, 700, 16], [1, 2, 700, 16]) },
        // One offset per batch entry.
        Call {
            positions: Positions { causal: true, align: Align::PerBatch(vec![30, 11]), ..Positions::default() },
            ..Call::plain([2, 4, 9, 12], [2, 2, 40, 12], [2, 2, 40, 12])
        },
    ];
    for (name, device) in devices() {
        for (c, call) in calls.iter().enumerate() {
            let data = call.data();
            for (r, (rule, distance)) in distances(call.q[1], call.q[3]).into_iter().enumerate() {
                let asked = distance.asked(call.attention(), &device, call.q[1], call.q[3]);
                let heads: Vec<usize> = (0..call.q[1]).collect();
                let (truth, scores, inspected) = distance.with_inputs(call, &data, |problem, inputs| {
                    (
                        Truth::new(problem, inputs),
                        reference::scores(problem, inputs, ScoreStage::Masked),
                        reference::inspect(problem, inputs, &heads, 0..call.q[2]),
                    )
                });
                // Each method compiles its own kernels, so only one is tested in addition to planning's choice.
                for method in methods_in_turn(&device, 3 * c + r, 1) {
                    let what = format!("{rule} by {method} on {name}: {call:?}");
                    let out = call.run(&device, &data, asked.clone().lse(true).method(method)).unwrap();
                    truth.hold(&what, &out, TOLERANCE);
                }
                let what = format!("{rule} on {name}: {call:?}");
                let all = asked.clone().weights(Weights::PerHead).scores(Some(ScoreStage::Masked)).lse(true);
                let out = call.run(&device, &data, all).unwrap();
                truth.hold(&what, &out, TOLERANCE);
                truth.hold_scores(&what, out.scores.as_ref().unwrap(), &scores, TOLERANCE);
                // Sums and entropies with the fused path.
                let [q, k, _] = call.operands(&device, &data, wgpu_attention::Dtype::F32).unwrap();
                let attention = call.ruled(&device, &data, asked).unwrap();
                let seen =
                    attention.inspect(&q, &k, &out.lse.unwrap(), &Inspect::new().column_sums().entropy()).unwrap();
                assert_close(&what, &seen.column_sums.unwrap(), &inspected.column_sums, 3e-5);
                assert_logs_close(&what, &seen.entropy.unwrap(), &inspected.entropy, 3e-5);
            }
        }
    }
}

#[test]
fn a_cache_supports_them() {
    const LEN: usize = 40;
    for window in [None, Some(9)] {
        let positions = Positions { causal: true, window_left: window, ..Positions::default() };
        let call = Call { positions, ..Call::plain([2, 4, LEN, 16], [2, 2, LEN, 16], [2, 2, LEN, 16]) };
        let data = call.data();
        for (rule, distance) in distances(4, 16) {
            let truth = distance.with_inputs(&call, &data, Truth::new);
            for (name, device) in devices() {
                let attention = distance.asked(Attention::new(), &device, 4, 16);
                let operands = call.operands(&device, &data, wgpu_attention::Dtype::F32).unwrap();
                let capacity = if window.is_some() { 20 } else { LEN };
                let config = KvCacheConfig::new(2, 2, capacity, 16).window(window);
                let mut cache = KvCache::new(&device, config).unwrap();
                for at in (0..LEN).step_by(2) {
                    let [q, k, v] = [0, 1, 2].map(|n| operands[n].narrow(2, at, 2).unwrap());
                    let got = cache.step(&attention, &q, &k, &v).unwrap().output;
                    let rows: Vec<usize> = (0..8).flat_map(|head| [head * LEN + at, head * LEN + at + 1]).collect();
                    let expected: Vec<f64> =
                        rows.iter().flat_map(|row| truth.output[row * 16..][..16].to_vec()).collect();
                    let what = format!("{rule} on {name}, window {window:?}, token {at}");
                    assert_close_to(&what, &got, &expected, |n, _| truth.values[rows[n]], TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn wrong_tables_are_errors_with_the_numbers() {
    for (name, device) in devices() {
        let floats =
            |shape: &[usize]| Tensor::from_slice(&device, shape, &vec![0.5f32; shape.iter().product()]).unwrap();
        let x = floats(&[1, 4, 3, 8]);
        let attention = Attention::new();
        for (wrong, say) in [
            (attention.clone().alibi(floats(&[3])), "must be [heads_q] = [4]"),
            (attention.clone().alibi(floats(&[1, 4])), "must be [heads_q] = [4]"),
            (attention.clone().t5_bias(floats(&[32, 5]), Buckets::new(true)), "for 5 heads; there are 4"),
            (attention.clone().t5_bias(floats(&[31, 4]), Buckets::new(true)), "num_buckets = 32"),
            (
                attention.clone().t5_bias(floats(&[32, 4]), Buckets { max_distance: usize::MAX, ..Buckets::new(true) }),
                "must be less than",
            ),
            (attention.clone().relative_keys(RelativeKeys::new(&floats(&[3, 7]), 1, 1).unwrap()), "as wide as Q"),
        ] {
            let message = wrong.forward(&x, &x, &x).unwrap_err().to_string();
            assert!(message.contains(say), "{name}: {message}");
        }
        let packed = floats(&[3, 4, 8]);
        let message = attention.alibi(floats(&[4])).forward_packed(&packed, &packed, &packed, &[0, 3], &[0, 3]);
        assert!(message.unwrap_err().to_string().contains("distance"), "{name}");
    }
}
