//! Biases by distance inside the kernels, against the same biases stored, on every device.

use crate::kit::{Call, assert_close, assert_logs_close, bits, devices, methods_in_turn, noise, wide};
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::position::alibi;
use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::{self, Buckets};
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{
    Align, Attention, Device, Inspect, KvCache, KvCacheConfig, MultiHeadAttention, MultiHeadConfig, ScoreStage, Tensor,
    Weights,
};

const TOLERANCE: f64 = 3e-6;

/// The rules inside the kernels and the stored bias that they stand for, `[heads or batch.., len_q, len_k]`.
fn pairs(device: &Device, call: &Call, offset: i64) -> Vec<(&'static str, Attention, Tensor)> {
    let ([_, heads, len_q, dim], len_k) = (call.q, call.k[2]);
    let mut rng = Pcg64::seed_from_u64(3);
    let slopes = Tensor::from_slice(device, &[heads], &alibi::slopes(heads).unwrap()).unwrap();
    let mut all =
        vec![("ALiBi", call.attention().alibi(slopes), alibi::bias(device, heads, len_q, len_k, offset).unwrap())];
    for bidirectional in [false, true] {
        let buckets = Buckets { bidirectional, num_buckets: 8, max_distance: 20 };
        let table = Tensor::from_slice(device, &[8, heads], &noise(&mut rng, 8 * heads)).unwrap();
        let stored = t5::bias(&table, &buckets, len_q, len_k, offset).unwrap();
        all.push(("T5", call.attention().t5_bias(table, buckets), stored));
    }
    let table = Tensor::from_slice(device, &[9, dim], &noise(&mut rng, 9 * dim)).unwrap();
    let keys = RelativeKeys::new(&table, 5, 3).unwrap();
    let data = call.data();
    let q = Tensor::from_slice(device, &call.q, &data.q).unwrap();
    let stored = keys.bias(&q, len_k, offset, call.scale).unwrap();
    all.push(("Shaw", call.attention().relative_keys(keys), stored));
    all
}

#[test]
fn in_the_kernels_as_stored() {
    let causal = Positions { causal: true, align: Align::BottomRight, ..Positions::default() };
    let window =
        Positions { window_left: Some(9), window_right: Some(4), align: Align::Offset(7), ..Positions::default() };
    let masks = vec![(vec![40, 70], MaskMeaning::Keep)];
    let calls = [
        (Call::plain([2, 4, 40, 12], [2, 2, 70, 12], [2, 2, 70, 12]), 0),
        (Call { positions: causal.clone(), masks, ..Call::plain([2, 4, 40, 12], [2, 2, 70, 12], [2, 2, 70, 12]) }, 30),
        (Call { positions: window, softcap: Some(3.0), ..Call::plain([1, 3, 33, 5], [1, 3, 40, 5], [1, 3, 40, 9]) }, 7),
        // One query over many keys: keys are split.
        (
            Call {
                positions: causal,
                scale: Some(0.3),
                ..Call::plain([1, 4, 1, 16], [1, 2, 700, 16], [1, 2, 700, 16])
            },
            699,
        ),
    ];
    for (name, device) in devices() {
        for (c, (call, offset)) in calls.iter().enumerate() {
            let data = call.data();
            for (r, (rule, inside, stored)) in pairs(&device, call, *offset).into_iter().enumerate() {
                let mut with_bias = call.clone();
                let shape = stored.shape().to_vec();
                with_bias.biases = vec![shape];
                let mut known = data.clone();
                known.biases = vec![stored.download().unwrap()];
                let (truth, stages) = with_bias.truth(&known);
                // Each compiles kernels of its own: one beside what planning chooses.
                for method in methods_in_turn(&device, 3 * c + r, 1) {
                    let what = format!("{rule} by {method} on {name}: {call:?}");
                    let out = call.run(&device, &data, inside.clone().lse(true).method(method)).unwrap();
                    truth.hold_output(&what, &out.output, TOLERANCE);
                    assert_logs_close(&what, &out.lse.unwrap(), &truth.lse, TOLERANCE);
                }
                let what = format!("{rule} on {name}: {call:?}");
                let asked = inside.clone().weights(Weights::PerHead).scores(Some(ScoreStage::Masked)).lse(true);
                let out = call.run(&device, &data, asked).unwrap();
                assert_close(&what, &out.weights.unwrap(), &truth.weights, TOLERANCE);
                truth.hold_scores(&what, &out.scores.unwrap(), &stages[2], TOLERANCE);
                // Sums and entropies beside the fused path.
                let [q, k] = [(call.q, &data.q), (call.k, &data.k)]
                    .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
                let mut attention = inside.clone();
                for ((shape, meaning), mask) in call.masks.iter().zip(&data.masks) {
                    let mask = Tensor::from_bools(&device, shape, mask).unwrap();
                    attention = attention.mask(wgpu_attention::Mask::new(mask, *meaning).unwrap());
                }
                let seen =
                    attention.inspect(&q, &k, &out.lse.unwrap(), &Inspect::new().column_sums().entropy()).unwrap();
                let heads: Vec<usize> = (0..call.q[1]).collect();
                let expected = with_bias.inspected(&known, &heads, 0..call.q[2]);
                assert_close(&what, &seen.column_sums.unwrap(), &expected.column_sums, 3e-5);
                assert_logs_close(&what, &seen.entropy.unwrap(), &expected.entropy, 3e-5);
            }
        }
    }
}

#[test]
fn offsets_of_each_batch_entry() {
    let offsets = vec![30i64, 11];
    for (name, device) in devices() {
        let positions = Positions { causal: true, align: Align::PerBatch(offsets.clone()), ..Positions::default() };
        let call = Call { positions, ..Call::plain([2, 4, 9, 12], [2, 2, 40, 12], [2, 2, 40, 12]) };
        let data = call.data();
        let slopes = Tensor::from_slice(&device, &[4], &alibi::slopes(4).unwrap()).unwrap();
        let mut with_bias = call.clone();
        with_bias.biases = vec![vec![2, 4, 9, 40]];
        let mut known = data.clone();
        let each = |offset: &i64| alibi::bias(&device, 4, 9, 40, *offset).unwrap().download().unwrap();
        known.biases = vec![offsets.iter().flat_map(each).collect()];
        let (truth, _) = with_bias.truth(&known);
        for method in methods_in_turn(&device, 1, 4) {
            let out = call.run(&device, &data, call.attention().alibi(slopes.clone()).method(method)).unwrap();
            truth.hold_output(&format!("{name}, {method}"), &out.output, TOLERANCE);
        }
    }
}

#[test]
fn a_cache_and_a_layer_take_them() {
    const LEN: usize = 40;
    for (name, device) in devices() {
        let random = |shape: &[usize], seed: u64| {
            let values = noise(&mut Pcg64::seed_from_u64(seed), shape.iter().product());
            Tensor::from_slice(&device, shape, &values).unwrap()
        };
        let (q, kv) = (random(&[2, 4, LEN, 16], 1), random(&[2, 2, LEN, 16], 2));
        let rules = [
            Attention::new().alibi(Tensor::from_slice(&device, &[4], &alibi::slopes(4).unwrap()).unwrap()),
            Attention::new().t5_bias(random(&[32, 4], 3), Buckets::new(false)),
            Attention::new().relative_keys(RelativeKeys::new(&random(&[8, 16], 4), 6, 1).unwrap()),
        ];
        for (n, rule) in rules.into_iter().enumerate() {
            for window in [None, Some(9)] {
                let whole = rule.clone().causal(Align::TopLeft).window(window, None);
                let expected = whole.forward(&q, &kv, &kv).unwrap().output;
                let capacity = if window.is_some() { 20 } else { LEN };
                let config = KvCacheConfig::new(2, 2, capacity, 16).window(window);
                let mut cache = KvCache::new(&device, config).unwrap();
                for at in (0..LEN).step_by(2) {
                    let part = |x: &Tensor| x.narrow(2, at, 2).unwrap();
                    let got = cache.step(&rule, &part(&q), &part(&kv), &part(&kv)).unwrap().output;
                    let want = wide(&part(&expected).download().unwrap());
                    let what = format!("{name}, rule {n}, window {window:?}, token {at}");
                    assert_close(&what, &got, &want, 2e-5);
                }
            }
            // In a layer: the bias tells shuffled tokens apart, which plain attention cannot.
            let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(64, 4).unwrap(), 5).unwrap();
            let x = random(&[1, 7, 64], 6);
            let plain = layer.forward(&x, &x, &x, &Attention::new()).unwrap().output.download().unwrap();
            let told = layer.forward(&x, &x, &x, &rule).unwrap().output.download().unwrap();
            assert_ne!(bits(&plain), bits(&told), "{name}, rule {n}");
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
