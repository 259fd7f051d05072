//! A random call and its truth.

use std::ops::Range;

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::problem::{Layout, MaskMeaning, Positions, Problem};
use wgpu_attention::reference::{self, Inputs, Inspected, Rules, View};
use wgpu_attention::{Align, Attended, Attention, Device, Dtype, Element, Mask, Method, Result, Tensor, Weights};

use crate::compare::assert_close;
use crate::truth::Truth;

/// Uniform over −2 to 2.
pub fn noise(rng: &mut Pcg64, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random::<f32>() * 4.0 - 2.0).collect()
}

/// As f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// Rounded to a storage type.
pub fn narrow<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

/// The memory layout of an operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    Bhsd,
    Bshd,
    /// The innermost axis is not contiguous.
    Bhds,
    /// One of the three operands in a packed `[b, s, 3, h, d]`.
    Packed,
}

/// A random call: everything needed to run it anywhere.
#[derive(Clone, Debug)]
pub struct Call {
    pub q: [usize; 4],
    pub k: [usize; 4],
    pub v: [usize; 4],
    pub order: Order,
    pub positions: Positions,
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    /// Shapes of masks, with their meaning, and of biases.
    pub masks: Vec<(Vec<usize>, MaskMeaning)>,
    pub biases: Vec<Vec<usize>>,
    /// A sink per head; some are −∞.
    pub sink: bool,
    pub seed: u64,
}

fn pick<T: Copy>(rng: &mut Pcg64, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

impl Call {
    /// A call without any rules.
    pub fn plain(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Call {
        Call {
            q,
            k,
            v,
            order: Order::Bhsd,
            positions: Positions::default(),
            scale: None,
            softcap: None,
            masks: vec![],
            biases: vec![],
            sink: false,
            seed: 7,
        }
    }

    /// A random call of modest size, in which every option may occur.
    pub fn random(seed: u64) -> Call {
        let mut rng = Pcg64::seed_from_u64(seed);
        let rng = &mut rng;
        let batch = pick(rng, &[1, 1, 2, 3]);
        let heads_kv = pick(rng, &[1, 2, 3]);
        let heads_q = heads_kv * pick(rng, &[1, 1, 2, 4]);
        let len_q = pick(rng, &[1, 2, 3, 7, 8, 9, 16, 31, 33, 40, 70]);
        let len_k = pick(rng, &[0, 1, 2, 3, 5, 8, 16, 17, 31, 64, 65, 100]);
        let dim_k = pick(rng, &[1, 2, 3, 4, 5, 8, 12, 16, 20, 33, 64, 65, 72, 128, 130, 200]);
        let dim_v = if rng.random_bool(0.5) { dim_k } else { pick(rng, &[1, 3, 4, 8, 24, 65, 80, 129]) };
        let offset = |rng: &mut Pcg64| rng.random_range(-5..=len_k as i64 + 3);
        let align = match rng.random_range(0..4) {
            0 => Align::TopLeft,
            1 => Align::BottomRight,
            2 => Align::Offset(offset(rng)),
            _ => Align::PerBatch((0..batch).map(|_| offset(rng)).collect()),
        };
        let bound = |rng: &mut Pcg64| rng.random_bool(0.5).then(|| rng.random_range(0..12usize));
        let window = rng.random_bool(0.3);
        let positions = Positions {
            align,
            causal: rng.random_bool(0.4),
            window_left: bound(rng).filter(|_| window),
            window_right: bound(rng).filter(|_| window),
            key_lengths: rng.random_bool(0.3).then(|| (0..batch).map(|_| rng.random_range(0..=len_k)).collect()),
        };
        let broadcast = |rng: &mut Pcg64| -> Vec<usize> {
            let full = [batch, heads_q, len_q, len_k];
            let rank = rng.random_range(1..=4usize);
            full[4 - rank..].iter().map(|&n| if rng.random_bool(0.4) { 1 } else { n }).collect()
        };
        let meaning = |rng: &mut Pcg64| pick(rng, &[MaskMeaning::Keep, MaskMeaning::Hide]);
        let mask_count = pick(rng, &[0, 0, 1, 1, 2, 3]);
        let bias_count = pick(rng, &[0, 0, 1, 2]);
        Call {
            q: [batch, heads_q, len_q, dim_k],
            k: [batch, heads_kv, len_k, dim_k],
            v: [batch, heads_kv, len_k, dim_v],
            order: pick(rng, &[Order::Bhsd, Order::Bshd, Order::Bhds, Order::Packed]),
            positions,
            scale: rng.random_bool(0.3).then(|| rng.random_range(-0.5..0.5f32)),
            softcap: rng.random_bool(0.25).then(|| rng.random_range(0.5..30.0f32)),
            masks: (0..mask_count).map(|_| (broadcast(rng), meaning(rng))).collect(),
            biases: (0..bias_count).map(|_| broadcast(rng)).collect(),
            sink: rng.random_bool(0.3),
            seed,
        }
    }

    pub fn problem(&self) -> Problem {
        Problem::new(&self.q, &self.k, &self.v, self.scale, self.softcap, &self.positions, 0).expect("a valid call")
    }

    pub fn data(&self) -> Data {
        let mut rng = Pcg64::seed_from_u64(self.seed ^ 0x5eed);
        let mut floats = |shape: &[usize]| noise(&mut rng, shape.iter().product());
        let (q, k, v) = (floats(&self.q), floats(&self.k), floats(&self.v));
        let mut rng = Pcg64::seed_from_u64(self.seed ^ 0x3a5c);
        // Every third call also hides and shows whole runs of keys.
        let runs = self.seed.is_multiple_of(3);
        let masks = (self.masks.iter())
            .map(|(shape, meaning)| {
                let width = shape.last().copied().unwrap_or(1).max(1);
                let kinds: Vec<u32> =
                    (0..width.div_ceil(32)).map(|_| if runs { rng.random_range(0..3) } else { 2 }).collect();
                let mut passes = |at: usize| [false, true, rng.random_bool(0.75)][kinds[at % width / 32] as usize];
                let keep = *meaning == MaskMeaning::Keep;
                (0..shape.iter().product::<usize>()).map(|at| passes(at) == keep).collect()
            })
            .collect();
        let biases = (self.biases.iter())
            .map(|shape| {
                let value = |rng: &mut Pcg64| {
                    if rng.random_bool(0.1) { f32::NEG_INFINITY } else { rng.random::<f32>() * 2.0 - 1.0 }
                };
                (0..shape.iter().product::<usize>()).map(|_| value(&mut rng)).collect()
            })
            .collect();
        let sink = self.sink.then(|| {
            let mut rng = Pcg64::seed_from_u64(self.seed ^ 0x51c);
            let value = |rng: &mut Pcg64| {
                if rng.random_bool(0.2) { f32::NEG_INFINITY } else { rng.random::<f32>() * 8.0 - 4.0 }
            };
            (0..self.q[1]).map(|_| value(&mut rng)).collect()
        });
        Data { q, k, v, masks, biases, sink }
    }

    pub fn attention(&self) -> Attention {
        let mut attention = Attention::new().window(self.positions.window_left, self.positions.window_right);
        attention = if self.positions.causal {
            attention.causal(self.positions.align.clone())
        } else {
            attention.align(self.positions.align.clone())
        };
        if let Some(scale) = self.scale {
            attention = attention.scale(scale);
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(lengths) = &self.positions.key_lengths {
            attention = attention.key_lengths(lengths.clone());
        }
        attention
    }

    /// The call with its masks, biases and sink on a device.
    pub fn ruled(&self, device: &Device, data: &Data, attention: Attention) -> Result<Attention> {
        self.ruled_as(device, data, attention, Dtype::F32)
    }

    /// The same with biases and sink stored as `stored`.
    pub fn ruled_as(&self, device: &Device, data: &Data, mut attention: Attention, stored: Dtype) -> Result<Attention> {
        for ((shape, meaning), mask) in self.masks.iter().zip(&data.masks) {
            attention = attention.mask(Mask::new(Tensor::from_bools(device, shape, mask)?, *meaning)?);
        }
        for (shape, bias) in self.biases.iter().zip(&data.biases) {
            attention = attention.bias(upload(device, shape, bias, stored)?);
        }
        if let Some(sink) = &data.sink {
            attention = attention.sink(upload(device, &[sink.len()], sink, stored)?);
        }
        Ok(attention)
    }

    /// Q, K and V on a device, stored as `stored`.
    pub fn operands(&self, device: &Device, data: &Data, stored: Dtype) -> Result<[Tensor; 3]> {
        let place = |shape, data: &Vec<f32>, part| match stored {
            Dtype::F16 => place(device, shape, &narrow::<f16>(data), self.order, part),
            Dtype::BF16 => place(device, shape, &narrow::<bf16>(data), self.order, part),
            _ => place(device, shape, data, self.order, part),
        };
        Ok([place(self.q, &data.q, 0)?, place(self.k, &data.k, 1)?, place(self.v, &data.v, 2)?])
    }

    /// Runs on a device.
    pub fn run(&self, device: &Device, data: &Data, attention: Attention) -> Result<Attended> {
        let [q, k, v] = self.operands(device, data, Dtype::F32)?;
        self.ruled(device, data, attention)?.forward(&q, &k, &v)
    }

    /// The truth.
    pub fn truth(&self, data: &Data) -> (Truth, [Vec<f64>; 3]) {
        use wgpu_attention::ScoreStage::{Capped, Masked, Scaled};
        self.with_inputs(data, |problem, inputs| {
            let stages = [Scaled, Capped, Masked].map(|stage| reference::scores(problem, inputs, stage));
            (Truth::new(problem, inputs), stages)
        })
    }

    /// The truth for some heads and queries.
    pub fn inspected(&self, data: &Data, heads: &[usize], queries: Range<usize>) -> Inspected {
        self.with_inputs(data, |problem, inputs| reference::inspect(problem, inputs, heads, queries))
    }

    /// Passes the operands to a function of the reference implementation.
    pub fn with_inputs<T>(&self, data: &Data, compute: impl FnOnce(&Problem, &Inputs<'_>) -> T) -> T {
        self.with_operands(data, [&data.q, &data.k, &data.v].map(|values| wide(values)), compute)
    }

    /// The same with given Q, K and V in f64.
    pub fn with_operands<T>(
        &self,
        data: &Data,
        [q, k, v]: [Vec<f64>; 3],
        compute: impl FnOnce(&Problem, &Inputs<'_>) -> T,
    ) -> T {
        let problem = self.problem();
        let biases: Vec<Vec<f64>> = data.biases.iter().map(|bias| wide(bias)).collect();
        let [ql, kl, vl] = [self.q, self.k, self.v].map(|shape| Layout::contiguous(&shape).unwrap());
        let sink = data.sink.as_ref().map(|sink| wide(sink));
        let sink_layout = Layout::contiguous(&[self.q[1]]).unwrap();
        let spread = |shape: &[usize]| Layout::contiguous(shape).unwrap().broadcast_to(&problem.mask_shape()).unwrap();
        let mask_layouts: Vec<Layout> = self.masks.iter().map(|(shape, _)| spread(shape)).collect();
        let bias_layouts: Vec<Layout> = self.biases.iter().map(|shape| spread(shape)).collect();
        let inputs = Inputs {
            q: View { data: &q, layout: &ql },
            k: View { data: &k, layout: &kl },
            v: View { data: &v, layout: &vl },
            rules: Rules {
                masks: (self.masks.iter().zip(&data.masks).zip(&mask_layouts))
                    .map(|(((_, meaning), data), layout)| (View { data, layout }, *meaning))
                    .collect(),
                biases: biases.iter().zip(&bias_layouts).map(|(data, layout)| View { data, layout }).collect(),
                sink: sink.as_ref().map(|data| View { data, layout: &sink_layout }),
                ..Rules::default()
            },
        };
        compute(&problem, &inputs)
    }

    /// Compares output and LSE with the truth.
    pub fn check_output(&self, name: &str, device: &Device, method: Method, tolerance: f64) {
        let data = self.data();
        let (truth, _) = self.truth(&data);
        let what = format!("call {} by {method:?} on {name}: {self:?}", self.seed);
        let attention = self.attention().lse(true).method(method);
        let out = self.run(device, &data, attention).unwrap_or_else(|error| panic!("{what}: {error}"));
        truth.hold(&what, &out, tolerance);
    }

    /// Runs the call with all results requested, and compares them with the truth.
    pub fn check(&self, name: &str, device: &Device, tolerance: f64) {
        use wgpu_attention::ScoreStage::{Capped, Masked, Scaled};
        let data = self.data();
        let (truth, stages) = self.truth(&data);
        let what = |part: &str| format!("{part} of call {} on {name}: {self:?}", self.seed);
        let stage = [Scaled, Capped, Masked][self.seed as usize % 3];
        let attention = self.attention().lse(true).weights(Weights::PerHead).scores(Some(stage));
        let full = self.run(device, &data, attention).unwrap_or_else(|error| panic!("{}: {error}", what("run")));
        let output = full.output.download().unwrap();
        truth.hold(&what("a call"), &full, tolerance);
        let scores = full.scores.as_ref().unwrap();
        truth.hold_scores(&what("scores"), scores, &stages[self.seed as usize % 3], tolerance);

        // Requesting fewer results does not change a bit of the output.
        let bare = self.run(device, &data, self.attention()).unwrap();
        assert_eq!(bits(&bare.output.download().unwrap()), bits(&output), "{}", what("output without weights"));

        // The three passes give the same within tolerance.
        if device.gpu().is_some() {
            let passes = self.attention().lse(true).method(Method::ThreePasses);
            let passes = self.run(device, &data, passes).unwrap();
            truth.hold(&what("three passes"), &passes, tolerance);
        }

        let averaged = self.run(device, &data, self.attention().weights(Weights::Averaged)).unwrap();
        let [batch, heads, len_q, _] = self.q;
        let mean = truth.averaged([batch, heads], len_q * self.k[2]);
        assert_close(&what("averaged weights"), &averaged.weights.unwrap(), &mean, tolerance);
    }
}

/// The bits of floats, which distinguish −0 from 0 and one NaN from another.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The values of a call: row-major operands `[b, h, s, d]`, and masks and biases in their own shapes.
#[derive(Clone, Debug)]
pub struct Data {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub masks: Vec<Vec<bool>>,
    pub biases: Vec<Vec<f32>>,
    pub sink: Option<Vec<f32>>,
}

impl Data {
    /// Rounds operands, biases and sink to the storage types.
    pub fn rounded(mut self, operands: Dtype, rules: Dtype) -> Data {
        let round = |values: &mut Vec<f32>, dtype: Dtype| values.iter_mut().for_each(|x| *x = dtype.round(*x));
        [&mut self.q, &mut self.k, &mut self.v].into_iter().for_each(|values| round(values, operands));
        self.biases.iter_mut().chain(&mut self.sink).for_each(|values| round(values, rules));
        self
    }
}

/// Values on a device, stored as `stored`.
pub fn upload(device: &Device, shape: &[usize], values: &[f32], stored: Dtype) -> Result<Tensor> {
    match stored {
        Dtype::F16 => Tensor::from_slice(device, shape, &narrow::<f16>(values)),
        Dtype::BF16 => Tensor::from_slice(device, shape, &narrow::<bf16>(values)),
        _ => Tensor::from_slice(device, shape, values),
    }
}

/// Uploads row-major `[b, h, s, d]` data with the memory layout `order`.
pub fn place<T: Element>(device: &Device, shape: [usize; 4], data: &[T], order: Order, part: usize) -> Result<Tensor> {
    let layout = Layout::contiguous(&shape)?;
    let [b, h, s, d] = shape;
    let (axes, back): ([usize; 4], [usize; 4]) = match order {
        Order::Bhsd => ([0, 1, 2, 3], [0, 1, 2, 3]),
        Order::Bshd | Order::Packed => ([0, 2, 1, 3], [0, 2, 1, 3]),
        Order::Bhds => ([0, 1, 3, 2], [0, 1, 3, 2]),
    };
    let placed = layout.permute(&axes)?;
    let values: Vec<T> = placed.positions().map(|at| data[at]).collect();
    if order == Order::Packed {
        // The gaps hold NaN, which must never reach a result.
        let mut packed = vec![T::from_f32(f32::NAN); b * s * 3 * h * d];
        for (at, &value) in values.iter().enumerate() {
            let (row, within) = (at / (h * d), at % (h * d));
            packed[(row * 3 + part) * h * d + within] = value;
        }
        return Tensor::from_slice(device, &[b, s, 3, h, d], &packed)?.select(2, part)?.permute(&[0, 2, 1, 3]);
    }
    Tensor::from_slice(device, placed.shape(), &values)?.permute(&back)
}
