//! Random calls that need few kernels: a form fixes what a kernel is specialised for, and a seed determines the rest.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::Align;
use wgpu_attention::problem::{MaskMeaning, Positions};

use crate::call::{Call, Order};

/// The properties that a kernel is specialised for.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub name: &'static str,
    /// The widths of Q and K, and of V.
    pub dims: [usize; 2],
    pub order: Order,
    pub softcap: bool,
    pub masks: usize,
    pub bias: bool,
    /// Causal, with the same offset for all batch entries.
    pub causal: bool,
    /// Causal, windows, offsets and lengths; one set for each batch entry.
    pub bands: bool,
    pub sink: bool,
}

const PLAIN: Form = Form {
    name: "plain",
    dims: [16, 16],
    order: Order::Bhsd,
    softcap: false,
    masks: 0,
    bias: false,
    causal: false,
    bands: false,
    sink: false,
};

/// Forms that cover all rules and memory layouts with few kernels.
pub const FORMS: [Form; 8] = [
    PLAIN,
    Form { name: "causal", causal: true, ..PLAIN },
    Form { name: "wide", dims: [64, 64], ..PLAIN },
    Form { name: "bands", dims: [20, 8], order: Order::Bshd, bands: true, sink: true, ..PLAIN },
    Form { name: "capped", dims: [5, 7], order: Order::Bhds, softcap: true, masks: 1, sink: true, ..PLAIN },
    Form { name: "biased", dims: [12, 12], order: Order::Packed, bias: true, ..PLAIN },
    Form { name: "ruled", dims: [3, 4], masks: 1, bias: true, bands: true, ..PLAIN },
    Form {
        name: "all",
        dims: [8, 24],
        order: Order::Bshd,
        softcap: true,
        masks: 3,
        bias: true,
        bands: true,
        sink: true,
        ..PLAIN
    },
];

/// The call for a form and a seed.
pub fn draw(form: &Form, seed: u64) -> Call {
    let mut rng = Pcg64::seed_from_u64(seed);
    let pick = |rng: &mut Pcg64, from: &[usize]| from[rng.random_range(0..from.len())];
    // The batch is two or more: with a batch of one the band is in the parameters, which needs another kernel.
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
    } else if form.causal {
        positions.causal = true;
        positions.align = Align::Offset(rng.random_range(0..=len_k as i64));
    }
    let broadcast = |rng: &mut Pcg64| -> Vec<usize> {
        let full = [batch, heads_q, len_q, len_k];
        let rank = rng.random_range(1..=4usize);
        full[4 - rank..].iter().map(|&n| if rng.random_bool(0.4) { 1 } else { n }).collect()
    };
    let meanings = [MaskMeaning::Keep, MaskMeaning::Hide];
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
