//! A seeded sweep: thousands of calls drawn for few kernels, each through every cut of the fused kernel and
//! through the three passes, against the f64 truth.

mod kit;

use std::time::Instant;

use kit::{Call, Order, devices};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{Align, Device, Method};

const TOLERANCE: f64 = 3e-6;

/// What a kernel is made for; all else is drawn.
struct Form {
    dims: [usize; 2],
    order: Order,
    softcap: bool,
    masks: usize,
    bias: bool,
    /// Causal, windows, offsets and lengths; one set for each batch entry.
    bands: bool,
    sink: bool,
}

const FORMS: [Form; 6] = [
    Form { dims: [16, 16], order: Order::Bhsd, softcap: false, masks: 0, bias: false, bands: false, sink: false },
    Form { dims: [20, 8], order: Order::Bshd, softcap: false, masks: 0, bias: false, bands: true, sink: true },
    Form { dims: [5, 7], order: Order::Bhds, softcap: true, masks: 1, bias: false, bands: false, sink: true },
    Form { dims: [12, 12], order: Order::Packed, softcap: false, masks: 0, bias: true, bands: false, sink: false },
    Form { dims: [3, 4], order: Order::Bhsd, softcap: false, masks: 1, bias: true, bands: true, sink: false },
    Form { dims: [8, 24], order: Order::Bshd, softcap: true, masks: 3, bias: true, bands: true, sink: true },
];

fn draw(form: &Form, seed: u64) -> Call {
    let mut rng = Pcg64::seed_from_u64(seed);
    let pick = |rng: &mut Pcg64, from: &[usize]| from[rng.random_range(0..from.len())];
    // Batches of two and more: a batch of one has its band in the parameters, which is another kernel.
    let batch = if form.bands { rng.random_range(2..=3) } else { rng.random_range(1..=3) };
    let heads_kv = pick(&mut rng, &[1, 2, 3]);
    let heads_q = heads_kv * pick(&mut rng, &[1, 1, 2, 4]);
    let len_q = pick(&mut rng, &[1, 2, 3, 7, 8, 9, 16, 31, 33, 40, 70]);
    let len_k = pick(&mut rng, &[1, 2, 3, 5, 8, 16, 17, 31, 64, 65, 100, 130]);
    let offset = |rng: &mut Pcg64| rng.random_range(-5..=len_k as i64 + 3);
    let mut positions = Positions::default();
    if form.bands {
        positions.align = Align::PerBatch((0..batch).map(|_| offset(&mut rng)).collect());
        positions.causal = rng.random_bool(0.5);
        let bound = |rng: &mut Pcg64| rng.random_bool(0.4).then(|| rng.random_range(0..12usize));
        (positions.window_left, positions.window_right) = (bound(&mut rng), bound(&mut rng));
        positions.key_lengths = rng.random_bool(0.5).then(|| (0..batch).map(|_| rng.random_range(0..=len_k)).collect());
    }
    let broadcast = |rng: &mut Pcg64| -> Vec<usize> {
        let full = [batch, heads_q, len_q, len_k];
        let rank = rng.random_range(1..=4usize);
        full[4 - rank..].iter().map(|&n| if rng.random_bool(0.4) { 1 } else { n }).collect()
    };
    let meanings = [MaskMeaning::Keep, MaskMeaning::Drop];
    Call {
        q: [batch, heads_q, len_q, form.dims[0]],
        k: [batch, heads_kv, len_k, form.dims[0]],
        v: [batch, heads_kv, len_k, form.dims[1]],
        order: form.order,
        positions,
        scale: rng.random_bool(0.3).then(|| rng.random_range(-0.5..0.5f32)),
        softcap: form.softcap.then(|| rng.random_range(0.5..30.0f32)),
        masks: (0..form.masks).map(|_| (broadcast(&mut rng), meanings[rng.random_range(0..2)])).collect(),
        biases: (0..usize::from(form.bias)).map(|_| broadcast(&mut rng)).collect(),
        sink: form.sink,
        seed,
    }
}

/// The ways to run a call on a device that are worth telling apart.
fn methods(device: &Device) -> Vec<(String, Method)> {
    let Some(gpu) = device.gpu() else { return vec![("cpu".into(), Method::Auto)] };
    Method::every(gpu.capabilities()).into_iter().map(|method| (method.to_string(), method)).collect()
}

#[test]
fn thousands_of_calls_through_every_way() {
    /// Calls per form and way on an adapter; the passes compile several kernels for each.
    const CALLS: u64 = 24;
    let mut total = 0;
    for (name, device) in devices() {
        for (at, (way, method)) in methods(&device).into_iter().enumerate() {
            let (start, mut worst, mut cases) = (Instant::now(), 0.0f64, 0);
            for (n, form) in FORMS.iter().enumerate() {
                for seed in 0..CALLS {
                    let call = draw(form, 10_000 * n as u64 + 100 * at as u64 + seed);
                    worst = worst.max(call.check_output(&format!("{name}, {way}"), &device, method, TOLERANCE));
                    cases += 1;
                }
            }
            println!("{name:<50} {way:<26} {cases:>5} calls, at most {worst:.1e} off, {:.1?}", start.elapsed());
            total += cases;
        }
    }
    println!("{total} calls in all");
    assert!(total >= 2000, "{total} calls");
}
