//! Weights, column sums and entropies recomputed from the LSE, on every device, against the f64 truth.

use std::ops::Range;

use crate::distance::Distance;
use crate::kit::{self, Call, Data, assert_close, assert_logs_close, bits, devices, gpus, place};
use crate::plans::check as check_plan;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::kernels::plan::{self, InspectOperands};
use wgpu_attention::kernels::{AdapterClass, Capabilities, Slot};
use wgpu_attention::position::t5::Buckets;
use wgpu_attention::problem::{Layout, MaskMeaning, Positions, Problem};
use wgpu_attention::reference;
use wgpu_attention::{Align, Attention, Device, Dtype, Inspect, Inspected, Mask, Method, ScoreStage, Tensor, Weights};

/// Relative to the largest value of a result: the LSE is rounded once more than in a forward call.
const TOLERANCE: f64 = 6e-6;

/// Q, K, LSE and the options of a call on a device.
struct Forwarded {
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    attention: Attention,
}

impl Forwarded {
    fn new(call: &Call, data: &Data, device: &Device) -> Forwarded {
        let mut attention = call.attention();
        for ((shape, meaning), mask) in call.masks.iter().zip(&data.masks) {
            let mask = Tensor::from_bools(device, shape, mask).unwrap();
            attention = attention.mask(Mask::new(mask, *meaning).unwrap());
        }
        for (shape, bias) in call.biases.iter().zip(&data.biases) {
            attention = attention.bias(Tensor::from_slice(device, shape, bias).unwrap());
        }
        if let Some(sink) = &data.sink {
            attention = attention.sink(Tensor::from_slice(device, &[sink.len()], sink).unwrap());
        }
        let [q, k, v] = [(call.q, &data.q, 0), (call.k, &data.k, 1), (call.v, &data.v, 2)]
            .map(|(shape, data, part)| place(device, shape, data, call.order, part).unwrap());
        let lse = attention.clone().lse(true).forward(&q, &k, &v).unwrap().lse.unwrap();
        Forwarded { q, k, lse, attention }
    }

    fn inspect(&self, inspect: &Inspect) -> [Vec<f32>; 3] {
        download(self.attention.inspect(&self.q, &self.k, &self.lse, inspect).unwrap())
    }
}

fn download(inspected: Inspected) -> [Vec<f32>; 3] {
    [inspected.weights, inspected.column_sums, inspected.entropy].map(|tensor| tensor.unwrap().download().unwrap())
}

fn all() -> Inspect {
    Inspect::new().weights().column_sums().entropy()
}

fn plain(q: [usize; 4], k: [usize; 4]) -> Call {
    Call::plain(q, k, [k[0], k[1], k[2], 4])
}

/// The entries of `[rows, row]` values selected by `heads` and `queries`; rows are `[b, h, i]`.
fn chosen(call: &Call, values: &[f32], row: usize, heads: &[usize], queries: &Range<usize>) -> Vec<f32> {
    let [batch, heads_q, len_q, _] = call.q;
    let mut out = Vec::new();
    for b in 0..batch {
        for &h in heads {
            let first = (b * heads_q + h) * len_q;
            out.extend(&values[(first + queries.start) * row..(first + queries.end) * row]);
        }
    }
    out
}

/// Weights, column sums and entropies against the truth.
fn compare(what: impl Fn(&str) -> String, actual: &[Vec<f32>; 3], truth: reference::Inspected, len_k: usize) {
    assert_close(&what("weights"), &(&actual[0], len_k), &truth.weights, TOLERANCE);
    assert_close(&what("column sums"), &(&actual[1], len_k), &truth.column_sums, TOLERANCE);
    // An error of the LSE is an error in nats.
    assert_logs_close(&what("entropies"), &(&actual[2], 1), &truth.entropy, TOLERANCE);
}

/// Inspects everything and a random selection, and compares both with the truth and with each other.
fn check(call: &Call, name: &str, device: &Device) {
    let data = call.data();
    let run = Forwarded::new(call, &data, device);
    let [_, heads_q, len_q, _] = call.q;
    let len_k = call.k[2];
    let what = |part: &str| format!("{part} of call {} on {name}: {call:?}", call.seed);
    let hold = |part: &str, actual: &[Vec<f32>; 3], heads: &[usize], queries: Range<usize>| {
        let truth = call.inspected(&data, heads, queries);
        compare(|which| what(&format!("{part} {which}")), actual, truth, len_k);
    };
    let whole = run.inspect(&all());
    let every: Vec<usize> = (0..heads_q).collect();
    hold("all", &whole, &every, 0..len_q);
    for (again, whole) in run.inspect(&all()).iter().zip(&whole) {
        assert_eq!(bits(again), bits(whole), "{}", what("a second run"));
    }

    let mut rng = Pcg64::seed_from_u64(call.seed ^ 0x1a5);
    let heads: Vec<usize> = (0..rng.random_range(1..=3)).map(|_| rng.random_range(0..heads_q)).collect();
    let start = rng.random_range(0..=len_q);
    let queries = start..rng.random_range(start..=len_q);
    let some = run.inspect(&all().heads(&heads).queries(queries.clone()));
    hold(&format!("heads {heads:?}, queries {queries:?}"), &some, &heads, queries.clone());
    // A row's bits do not depend on the selection; a key's do not depend on the selected heads.
    for (n, row) in [(0, len_k), (2, 1)] {
        let same = chosen(call, &whole[n], row, &heads, &queries);
        assert_eq!(bits(&some[n]), bits(&same), "{}", what(&format!("part {n} of {heads:?}, {queries:?}")));
    }
    let sums = run.inspect(&all().heads(&heads));
    let same: Vec<f32> = (0..call.q[0])
        .flat_map(|b| heads.iter().map(move |&h| b * heads_q + h))
        .flat_map(|bh| whole[1][bh * len_k..][..len_k].iter().copied())
        .collect();
    assert_eq!(bits(&sums[1]), bits(&same), "{}", what("column sums of chosen heads"));
}

#[test]
fn random_calls_match_the_truth() {
    for (name, device) in devices() {
        // Each call compiles its own kernels on an adapter.
        let seeds: Vec<u64> = if matches!(device, Device::Cpu) { (0..300).collect() } else { vec![2, 9, 17] };
        for seed in seeds {
            check(&Call::random(seed), &name, &device);
        }
    }
}

#[test]
fn same_bits_in_every_batch() {
    let call = plain([3, 4, 37, 24], [3, 2, 530, 24]);
    let data = call.data();
    for (name, device) in devices() {
        let whole = Forwarded::new(&call, &data, &device);
        let expected = whole.inspect(&all());
        for b in 0..3 {
            let alone = |tensor: &Tensor| tensor.narrow(0, b, 1).unwrap();
            let (q, k, lse) = (alone(&whole.q), alone(&whole.k), alone(&whole.lse));
            let actual = download(whole.attention.inspect(&q, &k, &lse, &all()).unwrap());
            for (actual, expected) in actual.iter().zip(&expected) {
                let part = &expected[b * actual.len()..][..actual.len()];
                assert_eq!(bits(actual), bits(part), "{name}, batch entry {b}");
            }
        }
    }
}

#[test]
fn wide_heads_and_long_sums() {
    for (name, device) in devices() {
        // Wider than registers hold, and more rows than one split.
        check(&plain([1, 1, 9, 600], [1, 1, 17, 600]), &name, &device);
        let banded = Positions { causal: true, window_left: Some(700), ..Default::default() };
        check(&Call { positions: banded, ..plain([1, 2, 1100, 8], [1, 1, 1100, 8]) }, &name, &device);
    }
}

#[test]
fn empty_axes_are_valid() {
    for (name, device) in devices() {
        for (q, k) in [([0, 2, 3, 4], [0, 2, 5, 4]), ([2, 2, 0, 4], [2, 2, 5, 4]), ([2, 2, 3, 4], [2, 2, 0, 4])] {
            check(&plain(q, k), &name, &device);
        }
        let none =
            Forwarded::new(&plain([1, 2, 3, 4], [1, 2, 5, 4]), &plain([1, 2, 3, 4], [1, 2, 5, 4]).data(), &device);
        assert_eq!(none.inspect(&all().heads(&[])), [const { Vec::<f32>::new() }; 3], "{name}");
        assert_eq!(none.inspect(&all().queries(1..1)), [vec![], vec![0.0; 10], vec![]], "{name}");
    }
}

#[test]
fn masked_rows_and_keys_never_enter() {
    // Query 0 sees nothing: a causal offset of −1. Key 3 is dropped for all.
    let call = Call {
        positions: Positions { causal: true, align: Align::Offset(-1), ..Default::default() },
        masks: vec![(vec![6], MaskMeaning::Keep)],
        ..plain([1, 2, 6, 8], [1, 2, 6, 8])
    };
    let mut data = call.data();
    data.masks[0] = vec![true, true, true, false, true, true];
    for (name, device) in devices() {
        let clean = Forwarded::new(&call, &data, &device);
        let expected = clean.inspect(&all());
        for h in 0..2 {
            assert_eq!(expected[0][h * 36..][..6], [0.0; 6], "{name}: a row that sees nothing");
            assert_eq!(expected[2][h * 6], 0.0, "{name}");
            assert_eq!([expected[1][h * 6 + 3], expected[1][h * 6 + 5]], [0.0; 2], "{name}: keys that nobody sees");
        }
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
            let mut data = data.clone();
            for h in 0..2 {
                data.k[(h * 6 + 3) * 8..][..8].fill(poison);
                data.k[(h * 6 + 5) * 8..][..8].fill(poison);
                data.q[h * 6 * 8..][..8].fill(poison);
            }
            let poisoned = Forwarded::new(&call, &data, &device);
            for (actual, expected) in poisoned.inspect(&all()).iter().zip(&expected) {
                assert_eq!(bits(actual), bits(expected), "{name}: {poison}");
            }
        }
    }
}

#[test]
fn nan_reaches_exactly_what_depends_on_it() {
    let call =
        Call { positions: Positions { causal: true, ..Default::default() }, ..plain([1, 1, 12, 8], [1, 1, 12, 8]) };
    for (name, device) in devices() {
        for (key, poison) in [(false, f32::NAN), (true, f32::NAN), (true, f32::INFINITY)] {
            let mut data = call.data();
            // Positive where it is multiplied by the poison value: ∞ makes scores of +∞.
            data.q.chunks_mut(8).for_each(|row| row[2] = row[2].abs() + 0.1);
            (if key { &mut data.k } else { &mut data.q })[5 * 8 + 2] = poison;
            let truth = call.inspected(&data, &[0], 0..12);
            let actual = Forwarded::new(&call, &data, &device).inspect(&all());
            let what = format!("{name}: {poison} in {}", if key { "K" } else { "Q" });
            assert!(truth.entropy.iter().any(|x| x.is_finite()), "{what}");
            for truth in [&truth.weights, &truth.column_sums, &truth.entropy] {
                assert!(truth.iter().any(|x| x.is_nan()), "{what}");
            }
            compare(|part| format!("{part} on {what}"), &actual, truth, 12);
        }
    }
}

#[test]
fn fewer_axes_and_half_precision() {
    let data: Vec<half::f16> = (0..2 * 5 * 8).map(|n| half::f16::from_f32((n as f32 * 0.7).sin())).collect();
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[2, 5, 8], &data).unwrap();
        let attention = Attention::new().lse(true);
        let lse = attention.forward(&x, &x, &x).unwrap().lse.unwrap();
        let seen = attention.inspect(&x, &x, &lse, &all().heads(&[1]).queries(1..4)).unwrap();
        let weights = seen.weights.unwrap();
        assert_eq!((weights.shape(), weights.dtype()), (&[1, 3, 5][..], wgpu_attention::Dtype::F16), "{name}");
        let sums = seen.column_sums.unwrap();
        assert_eq!((sums.shape(), sums.dtype()), (&[1, 5][..], wgpu_attention::Dtype::F32), "{name}");
        assert_eq!(seen.entropy.unwrap().shape(), [1, 3], "{name}");

        // One head without an axis for it, and two leading axes, give the same numbers.
        let flat = x.select(0, 1).unwrap();
        let one = attention.inspect(&flat, &flat, &lse.select(0, 1).unwrap(), &all().queries(1..4)).unwrap();
        assert_eq!(one.weights.as_ref().unwrap().shape(), [3, 5], "{name}");
        assert_eq!(one.weights.unwrap().download().unwrap(), weights.download().unwrap(), "{name}");
        let five = x.reshape(&[1, 1, 2, 5, 8]).unwrap();
        let deep = attention.inspect(&five, &five, &lse.reshape(&[1, 1, 2, 5]).unwrap(), &all().heads(&[1])).unwrap();
        assert_eq!(deep.entropy.unwrap().shape(), [1, 1, 1, 5], "{name}");
        assert_eq!(deep.weights.unwrap().shape(), [1, 1, 1, 5, 5], "{name}");
    }
}

#[test]
fn recorded_into_a_callers_encoder_after_the_forward_call() {
    let call = plain([1, 2, 19, 16], [1, 2, 23, 16]);
    let data = call.data();
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        let Forwarded { q, k, lse, attention } = Forwarded::new(&call, &data, &device);
        let expected = download(attention.inspect(&q, &k, &lse, &all()).unwrap());
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let forward = attention.clone().lse(true).encode(&gpu, &mut encoder, &q, &k, &k, None).unwrap();
        let lse = forward.lse.unwrap();
        let seen = attention.encode_inspect(&gpu, &mut encoder, &q, &k, &lse, &all()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        for (actual, expected) in download(seen).iter().zip(&expected) {
            assert_eq!(bits(actual), bits(expected), "{name}");
        }
    }
}

#[test]
fn memory_stays_below_the_size_of_the_weights() {
    const LEN: usize = 8192;
    let x: Vec<f32> = (0..LEN * 4).map(|n| (n as f32 * 0.37).sin()).collect();
    for (name, gpu) in gpus() {
        let x = Tensor::from_slice(&gpu, &[1, 1, LEN, 4], &x).unwrap();
        let attention = Attention::new().causal(Align::TopLeft).lse(true);
        let lse = attention.forward(&x, &x, &x).unwrap().lse.unwrap();
        let before = gpu.allocation_counts().bytes;
        let inspect = Inspect::new().column_sums().entropy();
        let seen = attention.inspect(&x, &x, &lse, &inspect).unwrap();
        // The weights would take 256 MiB; results and partial sums take 18 floats per row.
        let made = gpu.allocation_counts().bytes - before;
        assert!(made <= 20 * 4 * LEN as u64, "{name}: {made} bytes");
        // The weights of every query sum to 1.
        let given: f64 = seen.column_sums.unwrap().download().unwrap().iter().map(|&x| f64::from(x)).sum();
        assert!((given - LEN as f64).abs() < 1e-4 * LEN as f64, "{name}: {given}");
        let entropy = seen.entropy.unwrap().download().unwrap();
        assert!(entropy.iter().enumerate().all(|(i, &x)| x <= ((i + 1) as f32).ln() + 1e-3), "{name}");

        let again = gpu.allocation_counts();
        drop(attention.inspect(&x, &x, &lse, &inspect).unwrap());
        drop(attention.inspect(&x, &x, &lse, &inspect).unwrap());
        assert!(gpu.allocation_counts().bytes - again.bytes <= made, "{name}: results go back to the pool");
    }
}

#[test]
fn plans_fit_small_adapters_and_lose_nothing() {
    let call = Call {
        q: [2, 4, 65, 20],
        k: [2, 2, 200, 20],
        v: [2, 2, 200, 12],
        positions: Positions {
            causal: true,
            align: Align::PerBatch(vec![9, -3]),
            key_lengths: Some(vec![170, 200]),
            ..Default::default()
        },
        masks: vec![(vec![2, 1, 65, 200], MaskMeaning::Hide)],
        biases: vec![vec![4, 1, 200]],
        ..plain([0; 4], [0; 4])
    };
    // By batch, heads, rows and keys, with rules read in place and folded.
    for (bindings, buffers) in [(16 << 10, 8), (12 << 10, 8), (6 << 10, 5)] {
        let few = |limits: &mut wgpu_attention::wgpu::Limits| {
            limits.max_storage_buffer_binding_size = bindings;
            limits.max_storage_buffers_per_shader_stage = buffers;
            limits.max_compute_workgroups_per_dimension = 40;
        };
        for (name, gpu) in kit::limited(few) {
            let name = format!("{name} with bindings of {bindings}");
            let data = call.data();
            let whole = Forwarded::new(&call, &data, &Device::Cpu);
            let q = Tensor::from_slice(&gpu, &call.q, &data.q).unwrap();
            let k = Tensor::from_slice(&gpu, &call.k, &data.k).unwrap();
            let lse = Tensor::from_slice(&gpu, &call.q[..3], &whole.lse.download().unwrap()).unwrap();
            let mask = Tensor::from_bools(&gpu, &call.masks[0].0, &data.masks[0]).unwrap();
            let bias = Tensor::from_slice(&gpu, &call.biases[0], &data.biases[0]).unwrap();
            let attention = call.attention().mask(Mask::hide_where(mask).unwrap()).bias(bias);
            let seen = attention.inspect(&q, &k, &lse, &all().heads(&[3, 0, 1]).queries(3..60)).unwrap();
            let truth = call.inspected(&data, &[3, 0, 1], 3..60);
            compare(|part| format!("{part} on {name}"), &download(seen), truth, call.k[2]);
        }
    }
}

#[test]
fn too_few_buffers_for_the_rules_are_an_error() {
    let adapter = Capabilities { max_storage_buffers: 4, ..Capabilities::webgpu_minimum() };
    let shape = [1, 1, 4, 4];
    let problem = Problem::new(&shape, &shape, &shape, None, None, &Positions::default(), 0).unwrap();
    let layout = |shape: &[usize]| Layout::contiguous(shape).unwrap();
    let (x, lse) = (layout(&shape), layout(&shape[..3]));
    let operands = InspectOperands {
        q: (&x).into(),
        k: (&x).into(),
        lse: &lse,
        masks: vec![],
        biases: vec![],
        relative: None,
        heads: &[0],
        queries: 0..4,
        weights: true,
        column_sums: true,
        entropy: true,
    };
    assert!(plan::inspect(&problem, &operands, &adapter).is_ok());
    let masked = InspectOperands { masks: vec![(&x, MaskMeaning::Keep)], ..operands };
    let message = plan::inspect(&problem, &masked, &adapter).unwrap_err().to_string();
    assert!(message.contains("5 storage buffers, 4 are offered"), "{message}");
}

#[test]
fn long_calls_are_cut_to_every_limit() {
    let floor = Capabilities::webgpu_minimum();
    let adapters = [
        floor.clone(),
        Capabilities { max_storage_buffers: 5, ..floor.clone() },
        Capabilities { max_binding: 256 << 10, ..floor.clone() },
        Capabilities { max_workgroups: 300, ..floor.clone() },
        Capabilities { max_invocations: 64, ..floor.clone() },
        Capabilities { class: AdapterClass::Cpu, subgroup_min: Some(8), ..floor.clone() },
        Capabilities { subgroup_min: Some(4), ..floor },
    ];
    for adapter in &adapters {
        for (q, k, masks) in [
            ([1, 8, 4096, 64], [1, 2, 4096, 64], 0),
            ([2, 4, 100, 33], [2, 2, 1000, 33], 3),
            ([1, 2, 1, 1], [1, 2, 20_000, 1], 1),
            ([1, 1, 40, 700], [1, 1, 40, 700], 2),
        ] {
            let problem = Problem::new(&q, &k, &k, None, None, &Positions::default(), 0).unwrap();
            let layout = |shape: &[usize]| Layout::contiguous(shape).unwrap();
            let (q_layout, k_layout, lse, full) =
                (layout(&q), layout(&k), layout(&q[..3]), layout(&problem.mask_shape()));
            let heads: Vec<usize> = (0..q[1]).collect();
            let operands = InspectOperands {
                q: (&q_layout).into(),
                k: (&k_layout).into(),
                lse: &lse,
                masks: vec![(&full, MaskMeaning::Keep); masks],
                biases: vec![],
                relative: None,
                heads: &heads,
                queries: 0..q[2],
                weights: masks > 0,
                column_sums: true,
                entropy: true,
            };
            let plan = plan::inspect(&problem, &operands, adapter).unwrap();
            let mut pairs = 0;
            check_plan(&plan, adapter);
            for step in &plan.steps {
                if step.variant.name.starts_with("inspect/entropy") {
                    let params: &wgpu_attention::kernels::params::Inspect = bytemuck::from_bytes(&step.params);
                    pairs +=
                        u64::from(params.slice.heads) * u64::from(params.slice.len_q) * u64::from(params.slice.len_k);
                }
            }
            // If the batch is not cut, every query of every head meets every key once.
            if q[0] == 1 {
                assert_eq!(pairs, (q[1] * q[2] * k[2]) as u64);
            }
            let partial = 16 * 4 * (q[0] * q[1] * q[2].max(k[2]).next_multiple_of(4)) as u64;
            assert!(plan.scratch[0] <= partial, "{} bytes of partial sums", plan.scratch[0]);
            assert!(plan.steps.iter().any(|step| step.bindings.iter().any(|b| b.slot == Slot::ColumnSums)));
        }
    }
}

#[test]
fn wrong_calls_are_errors_with_the_numbers() {
    for (name, device) in devices() {
        let zeros =
            |shape: &[usize]| Tensor::from_slice(&device, shape, &vec![0.0f32; shape.iter().product()]).unwrap();
        let (q, k, lse) = (zeros(&[2, 4, 3, 8]), zeros(&[2, 2, 5, 8]), zeros(&[2, 4, 3]));
        let expect = |lse: &Tensor, inspect: Inspect, say: &str| {
            let message = Attention::new().inspect(&q, &k, lse, &inspect).expect_err(say).to_string();
            assert!(message.contains(say), "{name}: {message}");
        };
        expect(&lse, Inspect::new(), "nothing to inspect");
        expect(&lse, all().heads(&[1, 4]), "head 4 of [1, 4] is out of range: Q [2, 4, 3, 8] has heads 0..4");
        expect(&lse, all().queries(1..4), "queries 1..4 are out of range: Q [2, 4, 3, 8] has queries 0..3");
        #[allow(clippy::reversed_empty_ranges, reason = "what a caller may compute")]
        expect(&lse, all().queries(2..1), "queries 2..1 are out of range");
        expect(&zeros(&[2, 4, 5]), all(), "an LSE of shape [2, 4, 5] does not fit Q [2, 4, 3, 8]");
        expect(&zeros(&[2, 4, 3, 1]), all(), "[2, 4, 3]");
        let bools = Tensor::from_bools(&device, &[2, 4, 3], &[true; 24]).unwrap();
        expect(&bools, all(), "LSE is a bool tensor");
        let message = Attention::new().inspect(&q, &zeros(&[2, 3, 5, 8]), &lse, &all()).unwrap_err().to_string();
        assert!(message.contains("heads_q = 4 is not a multiple of heads_kv = 3"), "{name}: {message}");
        let flat = zeros(&[3, 8]);
        let message = Attention::new().inspect(&flat, &flat, &zeros(&[3]), &all().heads(&[])).unwrap_err().to_string();
        assert!(message.contains("no heads axis"), "{name}: {message}");
        if device.gpu().is_some() {
            let other = Tensor::from_slice(Device::Cpu, &[2, 4, 3], &[0.0f32; 24]).unwrap();
            expect(&other, all(), "LSE lives on cpu");
        }
    }
}

/// A call with a mask, an additive bias, a softcap and a bias by distance. Products are exact in f32, and the bias
/// cancels the distance up to 3000 and small numbers. If its power of two differs from that of the distance, adding it
/// first rounds scores to other multiples: by a thousandth and more.
fn of_order(distance: &Distance, biases: usize) -> (Call, Data) {
    let (q, k) = ([2, 4, 9, 8], [2, 2, 40, 8]);
    let call = Call {
        masks: vec![(vec![9, 40], MaskMeaning::Keep)],
        biases: vec![vec![2, 4, 9, 40]; biases],
        softcap: Some(5.0),
        scale: Some(0.25),
        positions: Positions { causal: true, align: Align::BottomRight, ..Default::default() },
        ..Call::plain(q, k, k)
    };
    let mut data = call.data();
    // Multiples of 1/4.
    data.q.iter_mut().chain(&mut data.k).for_each(|x| *x = (*x * 4.0).round() / 4.0);
    let added = added_by(distance, &call, &data);
    let noise = data.biases.clone();
    data.biases[0].iter_mut().zip(&added).for_each(|(bias, added)| *bias += 3000.0 - added);
    // Several biases cancel it together.
    for (bias, noise) in data.biases.iter_mut().skip(1).zip(&noise[1..]) {
        bias.copy_from_slice(noise);
    }
    (call, data)
}

/// The bias of the distance, which is exact in f32.
fn added_by(distance: &Distance, call: &Call, data: &Data) -> Vec<f32> {
    call.with_inputs(data, |problem, inputs| {
        let scale = f64::from(problem.scale);
        let added =
            distance.in_f64(problem.heads_q, problem.dim_k, |distance| distance.biases(problem, inputs.q, scale));
        assert!(added.iter().all(|&x| f64::from(x as f32) == x));
        assert!(added.iter().any(|x| x.abs() > 500.0));
        added.into_iter().map(|x| x as f32).collect()
    })
}

/// One of each kind, with few digits.
fn few_digits() -> [(&'static str, Distance); 3] {
    let digits = |seed: u64, len: usize, by: f32| -> Vec<f32> {
        kit::noise(&mut Pcg64::seed_from_u64(seed), len).into_iter().map(|x| (x * 4.0).round() / 4.0 * by).collect()
    };
    let buckets = Buckets { bidirectional: true, num_buckets: 8, max_distance: 20 };
    [
        ("ALiBi", Distance::Alibi(vec![1000.125, 500.25, -250.5, 64.0])),
        ("T5", Distance::T5(digits(1, 8 * 4, 4096.0), buckets)),
        ("Shaw", Distance::Shaw(digits(2, 9 * 8, 2048.0), [5, 3])),
    ]
}

#[test]
fn every_path_computes_the_same_scores_to_the_bit() {
    for (rule, distance) in few_digits() {
        for biases in [1, 2] {
            let (call, data) = of_order(&distance, biases);
            let added = added_by(&distance, &call, &data);
            for (name, device) in devices() {
                let what = format!("{rule}, {biases} biases, on {name}");
                let attention = distance.asked(call.attention(), &device, 4, 8);
                let attention = call.ruled(&device, &data, attention).unwrap().lse(true);
                let [q, k, v] = call.operands(&device, &data, Dtype::F32).unwrap();
                let all = |method, stage| {
                    let asked = attention.clone().method(method).weights(Weights::PerHead).scores(Some(stage));
                    let out = asked.forward(&q, &k, &v).unwrap();
                    [out.scores, out.weights].map(|tensor| tensor.unwrap().download().unwrap())
                };
                // Of a fused call, and of a call that stores its scores.
                let [beside, weights] = all(Method::Auto, ScoreStage::Masked);
                if device.gpu().is_some() {
                    let [unfused, unfused_weights] = all(Method::ThreePasses, ScoreStage::Masked);
                    assert_eq!(bits(&beside), bits(&unfused), "scores, {what}");
                    assert_eq!(bits(&weights), bits(&unfused_weights), "weights, {what}");
                }
                // The distance first, then biases in the order given, then masks.
                let [capped, _] = all(Method::Auto, ScoreStage::Capped);
                if biases == 1 {
                    for (at, (&score, &capped)) in beside.iter().zip(&capped).enumerate() {
                        let wanted = (capped + added[at]) + data.biases[0][at];
                        assert!(score == f32::NEG_INFINITY || score == wanted, "[{at}] {score} {wanted}, {what}");
                    }
                    let other = (0..capped.len()).filter(|&at| {
                        let other = (capped[at] + data.biases[0][at]) + added[at];
                        beside[at] != f32::NEG_INFINITY && (other - beside[at]).abs() > 1e-4
                    });
                    assert!(other.count() > 100, "the order is seen in few scores, {what}");
                }
            }
        }
    }
}

#[test]
fn inspected_weights_are_those_of_the_same_scores() {
    for (rule, distance) in few_digits() {
        for biases in [1, 2] {
            let (call, data) = of_order(&distance, biases);
            for (name, device) in devices() {
                let what = format!("{rule}, {biases} biases, on {name}");
                let attention = distance.asked(call.attention(), &device, 4, 8);
                let attention = call.ruled(&device, &data, attention).unwrap().lse(true);
                let [q, k, v] = call.operands(&device, &data, Dtype::F32).unwrap();
                let asked = attention.clone().scores(Some(ScoreStage::Masked));
                let out = asked.forward(&q, &k, &v).unwrap();
                let (scores, lse) = (out.scores.unwrap().download().unwrap(), out.lse.unwrap());
                let logs = lse.download().unwrap();
                let inspect = |inspect: &Inspect| {
                    let seen = attention.inspect(&q, &k, &lse, &inspect.clone().weights()).unwrap();
                    seen.weights.unwrap().download().unwrap()
                };
                let weights = inspect(&Inspect::new());
                for (at, &weight) in weights.iter().enumerate() {
                    let log = f64::from(scores[at]) - f64::from(logs[at / 40]);
                    // The difference is rounded once, and the exponential to a few places.
                    let allowed = (8.0 + log.abs()) * 2f64.powi(-24) * log.exp();
                    let off = (f64::from(weight) - log.exp()).abs();
                    // Below the smallest normal f32 number nothing is guaranteed.
                    let holds = if log == f64::NEG_INFINITY { weight == 0.0 } else { off <= allowed + 1.2e-38 };
                    assert!(holds, "[{at}] {weight} instead of {} from a score of {}, {what}", log.exp(), scores[at]);
                }
                // The same bits whatever else is chosen.
                for (heads, queries) in [(vec![3, 0], 0..9), (vec![2], 4..7), (vec![0, 1, 2, 3], 8..9)] {
                    let some = inspect(&Inspect::new().heads(&heads).queries(queries.clone()));
                    let same = chosen(&call, &weights, 40, &heads, &queries);
                    assert_eq!(bits(&some), bits(&same), "heads {heads:?}, queries {queries:?}, {what}");
                }
            }
        }
    }
}
