//! Rotary positions of attention, layers and caches, against turning by hand, on every device.

use crate::kit::{bits, devices, noise, worst};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig, TokenPositions};
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
    let expected: Vec<f64> = expected.download().unwrap().into_iter().map(f64::from).collect();
    let (off, at) = worst(&actual.download().unwrap(), &expected);
    assert!(off <= TOLERANCE, "{what}: off by {off:.1e} at {at}");
}

/// Half-split and interleaved, whole and partial.
fn rotaries(device: &Device, dim: usize) -> Vec<Rotary> {
    let config = |dim, pairing| RotaryConfig::new(dim).pairing(pairing);
    [(dim, Pairing::HalfSplit), (dim, Pairing::Interleaved), (dim / 2, Pairing::HalfSplit), (6, Pairing::Interleaved)]
        .map(|(dim, pairing)| Rotary::new(device, &config(dim, pairing), 200).unwrap())
        .into()
}

#[test]
fn attention_turns_what_it_is_given() {
    for (name, device) in devices() {
        let (q, k, v) = (
            random(&device, &[2, 4, 9, 16], 1),
            random(&device, &[2, 2, 40, 16], 2),
            random(&device, &[2, 2, 40, 16], 3),
        );
        for (n, rotary) in rotaries(&device, 16).into_iter().enumerate() {
            let turn = |x: &Tensor, positions: TokenPositions| rotary.rotate(x, &positions).unwrap();
            let turned_k = turn(&k, TokenPositions::From(0));
            for (attention, starts) in [
                (Attention::new(), vec![0, 0]),
                (Attention::new().causal(Align::BottomRight), vec![31, 31]),
                (Attention::new().causal(Align::PerBatch(vec![5, 30])), vec![5, 30]),
                (Attention::new().align(Align::Offset(7)).window(Some(9), Some(3)), vec![7, 7]),
            ] {
                let what = format!("{name}, rotary {n}, from {starts:?}");
                let attention = attention.lse(true);
                let turned_q = turn(&q, TokenPositions::FromEach(starts.clone()));
                let expected = attention.forward(&turned_q, &turned_k, &v).unwrap();
                let turning = attention.clone().rotary(rotary.clone());
                let got = turning.forward(&q, &k, &v).unwrap();
                assert_same(&what, &got.output, &expected.output);
                let lse = got.lse.unwrap();
                assert_same(&what, &lse, &expected.lse.unwrap());
                if let Device::Gpu(gpu) = &device
                    && starts == [5, 30]
                {
                    // While they are read, by every cut, and before in three passes; every other one in turn.
                    for method in Method::every(gpu.capabilities()).into_iter().skip(n % 2).step_by(2) {
                        let what = format!("{what}, {method}");
                        let (attended, profile) = turning.clone().method(method).forward_profiled(&q, &k, &v).unwrap();
                        assert_same(&what, &attended.output, &expected.output);
                        let is_read = profile.kernels.iter().any(|kernel| kernel.contains("/rotary"));
                        // Three pairs side by side are no whole vec4s.
                        assert_eq!(is_read, method != Method::ThreePasses && rotary.dim() != 6, "{what}: {profile:?}");
                    }
                }
                let weights = turning.clone().weights(Weights::PerHead).forward(&q, &k, &v).unwrap().weights.unwrap();
                let all = Inspect::new().weights();
                let seen = turning.inspect(&q, &k, &lse, &all).unwrap().weights.unwrap();
                let (off, at) = worst(
                    &seen.download().unwrap(),
                    &weights.download().unwrap().into_iter().map(f64::from).collect::<Vec<_>>(),
                );
                assert!(off <= 1e-5, "{what}: inspected weights off by {off:.1e} at {at}");
            }
            // Positions of the caller's own.
            let (queries, keys) = (TokenPositions::From(100), TokenPositions::Given((0..40).map(|j| 3 * j).collect()));
            let expected =
                Attention::new().forward(&turn(&q, queries.clone()), &turn(&k, keys.clone()), &v).unwrap().output;
            let got = Attention::new().rotary_at(rotary.clone(), queries, keys).forward(&q, &k, &v).unwrap().output;
            assert_same(&name, &got, &expected);
        }
    }
}

#[test]
fn packed_sequences_begin_at_position_0_each() {
    for (name, device) in devices() {
        let rotary = &rotaries(&device, 16)[0];
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
fn a_layer_turns_its_heads() {
    for (name, device) in devices() {
        let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(32, 2).unwrap(), 5).unwrap();
        let x = random(&device, &[2, 7, 32], 4);
        let rotary = Rotary::new(&device, &RotaryConfig::new(16), 64).unwrap();
        let causal = Attention::new().causal(Align::TopLeft);
        let got = layer.forward(&x, &x, &x, &causal.clone().rotary(rotary.clone())).unwrap().output;
        // Every position moved by as much changes nothing: products depend on distances alone.
        let moved = causal.clone().rotary_at(rotary, TokenPositions::From(50), TokenPositions::From(50));
        let moved = layer.forward(&x, &x, &x, &moved).unwrap().output;
        let expected: Vec<f64> = moved.download().unwrap().into_iter().map(f64::from).collect();
        assert!(worst(&got.download().unwrap(), &expected).0 < 3e-5, "{name}");
        let plain = layer.forward(&x, &x, &x, &causal).unwrap().output;
        assert_ne!(bits(&got.download().unwrap()), bits(&plain.download().unwrap()), "{name}");
    }
}

#[test]
fn a_cache_goes_on_where_it_stood() {
    const LEN: usize = 60;
    for (name, device) in devices() {
        for dtype in [Dtype::F32, Dtype::F16] {
            for window in [None, Some(11)] {
                let rotary = Rotary::new(&device, &RotaryConfig::new(16), LEN).unwrap();
                let (q, kv) = (random(&device, &[2, 4, LEN, 16], 1), random(&device, &[2, 2, LEN, 16], 2));
                let kv = if dtype == Dtype::F16 { rounded(&device, &kv) } else { kv };
                let whole = Attention::new().causal(Align::TopLeft).window(window, None).rotary(rotary.clone());
                let expected = whole.forward(&q, &kv, &kv).unwrap().output;
                let capacity = if window.is_some() { 24 } else { LEN };
                let config = KvCacheConfig::new(2, 2, capacity, 16).window(window).dtype(dtype);
                let mut cache = KvCache::new(&device, config).unwrap().with_rotary(rotary).unwrap();
                let mut rng = Pcg64::seed_from_u64(8);
                let mut at = 0;
                while at < LEN {
                    let count = rng.random_range(1..=3).min(LEN - at);
                    let part = |x: &Tensor| x.narrow(2, at, count).unwrap();
                    let got = cache.step(&Attention::new(), &part(&q), &part(&kv), &part(&kv)).unwrap().output;
                    let want: Vec<f64> = part(&expected).download().unwrap().into_iter().map(f64::from).collect();
                    let (off, _) = worst(&got.download().unwrap(), &want);
                    // Turned keys are rounded to what the cache holds.
                    let allowed = if dtype == Dtype::F16 { 2e-3 } else { 2e-5 };
                    assert!(off <= allowed, "{name}, {dtype}, window {window:?}: off by {off:.1e} from token {at} on");
                    at += count;
                    if rng.random_bool(0.2) && at > 12 {
                        cache.rollback(1).unwrap();
                        at -= 1;
                    }
                }
                assert_eq!(cache.positions(), [LEN; 2]);
            }
        }
    }
}

fn rounded(device: &Device, x: &Tensor) -> Tensor {
    let values: Vec<half::f16> = x.download().unwrap().into_iter().map(half::f16::from_f32).collect();
    Tensor::from_slice(device, x.shape(), &values).unwrap()
}

#[test]
fn lengths_of_their_own_and_full_tables() {
    for (name, device) in devices() {
        let rotary = Rotary::new(&device, &RotaryConfig::new(8), 4).unwrap();
        let new =
            || KvCache::new(&device, KvCacheConfig::new(2, 1, 8, 8)).unwrap().with_rotary(rotary.clone()).unwrap();
        let x = random(&device, &[2, 1, 3, 8], 3);
        let mut cache = new();
        // Tokens that do not count need no position.
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
            (Attention::new().causal(Align::Offset(-1)).rotary(rotary.clone()), "stands at position -1"),
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
