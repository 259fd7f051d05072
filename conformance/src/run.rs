//! Runs cases on a device, and computes their truth.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::position::alibi;
use wgpu_attention::position::t5::Buckets;
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig};
use wgpu_attention::problem::{Layout, Rows};
use wgpu_attention::reference::{self, Distance, View};
use wgpu_attention::{
    Align, Attended, Attention, Device, Dtype, ExportedCall, Gpu, Inspect, KvCache, KvCacheConfig, Method, Result,
    ScoreStage, Tensor, Weights, merge, project, softmax,
};

use crate::call::{Call, Data, Order, noise, upload, wide};
use crate::case::{Case, Op};
use crate::compare::{half_ulp, largest, rounding};
use crate::loops;
use crate::stored::Wide;
use crate::truth::Truth;

/// A result from a device, in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Got {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    /// The type that values are rounded to.
    pub dtype: Dtype,
}

/// The expected result, in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
    /// The magnitude of the numbers that each row is summed from; a row has `values.len() / scales.len()` values.
    pub scales: Vec<f64>,
    /// The error allowed for f32 arithmetic, relative to the scale.
    pub tolerance: f64,
    /// How often values are rounded to their type, including the final rounding.
    pub roundings: u32,
}

const TOLERANCE: f64 = 3e-6;
/// The tolerance of sums over many recomputed weights.
const SUMS: f64 = 3e-5;

const STAGES: [ScoreStage; 3] = [ScoreStage::Scaled, ScoreStage::Capped, ScoreStage::Masked];

/// An expected result whose rows (the last axis) have their largest value as scale.
fn expected(name: &'static str, shape: &[usize], values: Vec<f64>) -> Expected {
    let scales = values.chunks(shape.last().copied().unwrap_or(1).max(1)).map(largest).collect();
    Expected { name, shape: shape.to_vec(), values, scales, tolerance: TOLERANCE, roundings: 1 }
}

/// Expected logarithms, each with its own scale of at least 1, because one near 0 is no more precise than one near 1.
fn logs(name: &'static str, shape: &[usize], values: Vec<f64>) -> Expected {
    let scales = values.iter().map(|&x| largest(&[x]).max(1.0)).collect();
    Expected { scales, ..expected(name, shape, values) }
}

impl Expected {
    /// The error allowed for each value if results are rounded to `dtype`.
    pub fn allowed(&self, dtype: Dtype) -> Vec<f64> {
        let each = (self.values.len() / self.scales.len().max(1)).max(1);
        let before = f64::from(self.roundings - 1) * rounding(dtype);
        let allowed = |(at, &x): (usize, &f64)| {
            let limit = (self.tolerance + before) * self.scales[at / each];
            // A value that is slightly larger before rounding may have a larger rounding error.
            limit + if x.is_finite() { half_ulp(x.abs() + limit, dtype) } else { 0.0 }
        };
        self.values.iter().enumerate().map(allowed).collect()
    }
}

fn got(name: &'static str, tensor: &Tensor) -> Result<Got> {
    Ok(Got { name, shape: tensor.shape().to_vec(), values: tensor.download()?, dtype: tensor.dtype() })
}

/// Output and LSE.
fn pair(attended: &Attended) -> Result<Vec<Got>> {
    let mut all = vec![got("output", &attended.output)?];
    if let Some(lse) = &attended.lse {
        all.push(got("lse", lse)?);
    }
    Ok(all)
}

/// An independent stream of random values.
fn more(seed: u64, len: usize) -> Vec<f32> {
    noise(&mut Pcg64::seed_from_u64(seed ^ 0xf00d), len)
}

fn rounded(values: Vec<f32>, dtype: Dtype) -> Vec<f32> {
    values.into_iter().map(|x| dtype.round(x)).collect()
}

/// The heads and queries that an inspection covers.
fn looked_at(call: &Call) -> (Vec<usize>, std::ops::Range<usize>) {
    let heads = (0..call.q[1]).rev().step_by(2).collect();
    (heads, call.q[2] / 3..call.q[2])
}

/// Lengths of queries and keys of each packed sequence.
fn ragged(call: &Call) -> Vec<[usize; 2]> {
    let mut rng = Pcg64::seed_from_u64(call.seed ^ 0xab);
    let mut part = |len: usize| rng.random_range(len.div_ceil(2)..=len);
    (0..call.q[0]).map(|_| [part(call.q[2]), part(call.k[2])]).collect()
}

/// The softmax axis.
fn axis(call: &Call) -> usize {
    (call.seed % 4) as usize
}

fn rotary(call: &Call) -> RotaryConfig {
    let pairing = if call.seed.is_multiple_of(2) { Pairing::HalfSplit } else { Pairing::Interleaved };
    // Multiples of four pairs are rotated while they are read, other widths beforehand. A shrunk head may have no
    // pairs.
    let dim = if call.seed % 3 == 2 { call.q[3] / 2 } else { call.q[3] };
    RotaryConfig::new(dim / 2 * 2).pairing(pairing)
}

const BUCKETS: Buckets = Buckets { bidirectional: true, num_buckets: 8, max_distance: 20 };

fn offset(call: &Call) -> i64 {
    match call.positions.align {
        Align::Offset(offset) => offset,
        _ => 0,
    }
}

/// The number of queries whose weights are checked too.
const FEW_ROWS: usize = 8;
/// The score of the key that takes all the weight.
const HOT: f32 = 200.0;

/// The loop iterations that planning relies on, for an adapter or without a limit.
fn promised(gpu: Option<&Gpu>) -> u32 {
    let known = gpu.and_then(|gpu| gpu.capabilities().max_loop_turns);
    known.unwrap_or(loops::ASKED).min(loops::ASKED)
}

/// Outputs, LSEs and the weights of a few rows as [`Case::arrange`] makes them: the output is the mean of all values,
/// the first or the last.
fn closed_form(call: &Call, data: &Data) -> Vec<Expected> {
    let ([_, _, len_q, dim], len_k) = (call.q, call.k[2]);
    let column = |d: usize| (0..len_k).map(move |j| f64::from(data.v[j * dim + d])).sum::<f64>() / len_k as f64;
    let mean: Vec<f64> = (0..dim).map(column).collect();
    let hot = |i: usize| [None, Some(0), Some(len_k - 1)][i % 3];
    let value = |at: usize| match hot(at / dim) {
        None => mean[at % dim],
        Some(j) => f64::from(data.v[j * dim + at % dim]),
    };
    let lse = |i: usize| hot(i).map_or((len_k as f64).ln(), |_| f64::from(HOT));
    let mut all = vec![
        expected("output", &call.q, (0..len_q * dim).map(value).collect()),
        logs("lse", &call.q[..3], (0..len_q).map(lse).collect()),
    ];
    if len_q <= FEW_ROWS {
        let weight = |at: usize| match hot(at / len_k) {
            None => 1.0 / len_k as f64,
            Some(j) => f64::from(u8::from(j == at % len_k)),
        };
        all.push(expected("weights", &[1, 1, len_q, len_k], (0..len_q * len_k).map(weight).collect()));
    }
    all
}

impl Case {
    /// Makes values positive, because sums around 0 lose digits in any implementation. If scores are not random, a
    /// query weighs all keys equally, or only the first or only the last.
    fn arrange(&self, call: &Call, data: &mut Data) {
        data.v.iter_mut().for_each(|x| *x += 3.0);
        if self.long_row().3 {
            return;
        }
        let (dim, last) = (call.q[3], call.k[2] - 1);
        data.q.iter_mut().enumerate().for_each(|(at, x)| {
            let (i, d) = (at / dim, at % dim);
            *x = if i % 3 > 0 && d == (i % 3 - 1) % dim { 1.0 } else { 0.0 };
        });
        data.k.fill(0.0);
        // The scale is 1/4.
        data.k[0] = 4.0 * HOT;
        data.k[last * dim + 1 % dim] = 4.0 * HOT;
    }

    /// The call with the op's own rules.
    pub fn meant(&self) -> Call {
        let mut call = self.call();
        match self.op {
            // The queries are the last tokens in the cache.
            Op::LongRows => call.scale = Some(1.0 / 4.0),
            Op::Cache => {
                call.q[2] = call.q[2].min(call.k[2]);
                call.positions.causal = true;
                call.positions.align = Align::BottomRight;
                call.order = Order::Bhsd;
            }
            Op::Rotary if call.q[3] < 2 => {
                (call.q[3], call.k[3]) = (2, 2);
            }
            _ => {}
        }
        call
    }

    /// The operands, rounded to the storage type.
    fn data(&self, call: &Call) -> Data {
        let mut data = call.data();
        if self.op == Op::LongRows {
            self.arrange(call, &mut data);
        }
        data.rounded(self.storage, Dtype::F32)
    }

    /// All expected results, in the order of [`Case::run`].
    pub fn truth(&self) -> Vec<Expected> {
        let call = self.meant();
        let data = self.data(&call);
        let [batch, heads, len_q, _] = call.q;
        let ([_, _, len_k, _], dim_v) = (call.k, call.v[3]);
        let (rows, out) = ([batch, heads, len_q], [batch, heads, len_q, dim_v]);
        let both = |truth: Truth| {
            let output = Expected { scales: truth.values, ..expected("output", &out, truth.outputs.output) };
            vec![output, logs("lse", &rows, truth.outputs.lse)]
        };
        match self.op {
            Op::Attention | Op::Cache => both(call.truth(&data).0),
            Op::LongRows if self.long_row().3 => {
                let outputs = call.truth(&data).0;
                let weights = expected("weights", &[1, 1, len_q, len_k], outputs.weights.clone());
                both(outputs).into_iter().chain([weights]).collect()
            }
            Op::LongRows => closed_form(&call, &data),
            Op::Loops => vec![expected("turns", &[1], vec![f64::from(promised(None))])],
            // The halves are rounded, and so is the merged result.
            Op::Merge => both(call.truth(&data).0).into_iter().map(|one| Expected { roundings: 2, ..one }).collect(),
            Op::Weights => {
                let (outputs, stages) = call.truth(&data);
                let square = [batch, heads, len_q, len_k];
                let mean = outputs.averaged([batch, heads], len_q * len_k);
                let stage = stages[call.seed as usize % 3].clone();
                let mut all = vec![
                    expected("weights", &square, outputs.weights.clone()),
                    Expected { scales: outputs.scores.clone(), ..expected("scores", &square, stage) },
                    expected("averaged", &[batch, len_q, len_k], mean),
                ];
                all.splice(0..0, both(outputs));
                all
            }
            Op::Inspect => {
                let (chosen, queries) = looked_at(&call);
                let truth = call.inspected(&data, &chosen, queries.clone());
                let (n, queries) = (chosen.len(), queries.len());
                let sums =
                    |name, shape: &[usize], values| Expected { tolerance: SUMS, ..expected(name, shape, values) };
                vec![
                    sums("weights", &[batch, n, queries, len_k], truth.weights),
                    sums("column sums", &[batch, n, len_k], truth.column_sums),
                    Expected { tolerance: SUMS, ..logs("entropy", &[batch, n, queries], truth.entropy) },
                ]
            }
            Op::Alibi => {
                let slopes = Wide::new(&[heads], wide(&alibi::slopes(heads).expect("heads are few")));
                both(positioned(&call, &data, Some(Distance::Alibi { slopes: slopes.view() }), None))
            }
            Op::T5 => {
                let shape = [BUCKETS.num_buckets, heads];
                let table = Wide::new(&shape, wide(&more(call.seed, shape[0] * shape[1])));
                // Distances beyond have the same buckets as the last ones.
                let far = BUCKETS.max_distance as i64;
                let bucket = |distance| BUCKETS.bucket(distance).expect("buckets of good sizes");
                let buckets: Vec<usize> = (-far..=far).map(bucket).collect();
                let distance = Distance::T5 { table: table.view(), first: -far, buckets: &buckets };
                both(positioned(&call, &data, Some(distance), None))
            }
            Op::Rotary => {
                let config = rotary(&call);
                let first = offset(&call) as usize;
                let tables = config.tables(len_q + first + len_k).expect("a small table");
                let [cos, sin] = tables.map(|table| Wide::new(table.shape(), wide(table.data())));
                let rotary = reference::Rotary {
                    cos: cos.view(),
                    sin: sin.view(),
                    interleaved: config.pairing == Pairing::Interleaved,
                    rows: [Rows::From(first), Rows::From(0)],
                };
                both(positioned(&call, &data, None, Some(rotary)))
            }
            Op::Packed => {
                let lens = ragged(&call);
                let (mut output, mut scales, mut lse) = (Vec::new(), Vec::new(), vec![Vec::new(); heads]);
                for (n, one) in self.sequences(&call).iter().enumerate() {
                    let (truth, _) = one.truth(&self.data(one));
                    // Output rows have all heads side by side; the LSE has the heads first.
                    for i in 0..lens[n][0] {
                        for h in 0..heads {
                            let row = h * lens[n][0] + i;
                            output.extend_from_slice(&truth.output[row * dim_v..][..dim_v]);
                            scales.push(truth.values[row]);
                        }
                    }
                    for (h, lse) in lse.iter_mut().enumerate() {
                        lse.extend_from_slice(&truth.lse[h * lens[n][0]..][..lens[n][0]]);
                    }
                }
                let total = lens.iter().map(|lens| lens[0]).sum();
                let output = Expected { scales, ..expected("output", &[total, heads, dim_v], output) };
                vec![output, logs("lse", &[heads, total], lse.concat())]
            }
            Op::Softmax => {
                let shape = [batch, heads, len_q, len_k];
                let x = wide(&self.scores(shape));
                let layout = Layout::contiguous(&shape).unwrap();
                let mut order: Vec<usize> = (0..4).filter(|&a| a != axis(&call)).collect();
                order.push(axis(&call));
                let moved = layout.permute(&order).unwrap();
                let at: Vec<usize> = moved.positions().collect();
                let rows: Vec<f64> = at.iter().map(|&at| x[at]).collect();
                let (weights, _) = reference::softmax(&rows, rows.len() / shape[axis(&call)], |_| f64::NEG_INFINITY);
                let mut back = vec![0.0; x.len()];
                at.iter().zip(weights).for_each(|(&at, weight)| back[at] = weight);
                vec![expected("softmax", &shape, back)]
            }
            Op::Projection => {
                let ([x, w, b], [xs, ws, bs]) = self.projected(&call);
                let [x, w, b] = [x, w, b].map(|values| wide(&values));
                let [xl, wl, bl] = [&xs, &ws, &bs].map(|shape| Layout::contiguous(shape).unwrap());
                let y = reference::project(
                    View { data: &x, layout: &xl },
                    View { data: &w, layout: &wl },
                    Some(View { data: &b, layout: &bl }),
                );
                vec![expected("projection", &[batch, len_q, ws[0]], y)]
            }
        }
    }

    /// The case as a single forward call, if it is one.
    fn one_call(&self, device: &Device, method: Method) -> Result<Option<(Attention, [Tensor; 3])>> {
        let call = self.meant();
        let data = self.data(&call);
        let mut attention = call.attention().method(method).lse(true);
        attention = match self.op {
            Op::Attention => attention,
            Op::Alibi => {
                let slopes = alibi::slopes(call.q[1])?;
                attention.alibi(Tensor::from_slice(device, &[slopes.len()], &slopes)?)
            }
            Op::T5 => {
                let shape = [BUCKETS.num_buckets, call.q[1]];
                let table = Tensor::from_slice(device, &shape, &more(call.seed, shape[0] * shape[1]))?;
                attention.t5_bias(table, BUCKETS)
            }
            Op::Rotary => {
                let len = call.q[2] + offset(&call) as usize + call.k[2];
                attention.rotary(Rotary::new(device, &rotary(&call), len)?)
            }
            _ => return Ok(None),
        };
        let operands = call.operands(device, &data, self.storage)?;
        Ok(Some((call.ruled(device, &data, attention)?, operands)))
    }

    /// The case as a plan for another WebGPU implementation; `None` if it is not a single forward call.
    pub fn export(&self, device: &Device, method: Method) -> Result<Option<ExportedCall>> {
        match self.one_call(device, method)? {
            Some((attention, [q, k, v])) => attention.export(&q, &k, &v).map(Some),
            None => Ok(None),
        }
    }

    /// Computes the case on a device. An op without methods accepts only [`Method::Auto`].
    pub fn run(&self, device: &Device, method: Method) -> Result<Vec<Got>> {
        if let Some((attention, [q, k, v])) = self.one_call(device, method)? {
            return pair(&attention.forward(&q, &k, &v)?);
        }
        let call = self.meant();
        let data = self.data(&call);
        let attention = || call.attention().method(method);
        let forward = |attention: Attention| {
            let [q, k, v] = call.operands(device, &data, self.storage)?;
            call.ruled(device, &data, attention)?.forward(&q, &k, &v)
        };
        match self.op {
            Op::Attention | Op::Alibi | Op::T5 | Op::Rotary => unreachable!("one forward call"),
            Op::LongRows => {
                let weighs = call.q[2] <= FEW_ROWS;
                let weights = if weighs { Weights::PerHead } else { Weights::None };
                let all = forward(attention().lse(true).weights(weights))?;
                let weights = all.weights.as_ref().map(|weights| got("weights", weights)).transpose()?;
                Ok(pair(&all)?.into_iter().chain(weights).collect())
            }
            Op::Loops => {
                // More iterations than planning relies on are fine.
                let turns = match device.gpu() {
                    Some(gpu) => loops::turns(gpu)?.min(promised(Some(gpu))),
                    None => loops::ASKED,
                };
                let missing = promised(device.gpu()) - turns;
                let values = vec![(loops::ASKED - missing) as f32];
                Ok(vec![Got { name: "turns", shape: vec![1], values, dtype: Dtype::F32 }])
            }
            Op::Weights => {
                let stage = STAGES[call.seed as usize % 3];
                let all = forward(attention().lse(true).weights(Weights::PerHead).scores(Some(stage)))?;
                let averaged = forward(attention().weights(Weights::Averaged))?;
                let mut results = pair(&all)?;
                for (name, tensor) in
                    [("weights", &all.weights), ("scores", &all.scores), ("averaged", &averaged.weights)]
                {
                    results.push(got(name, tensor.as_ref().expect("asked for"))?);
                }
                Ok(results)
            }
            Op::Inspect => {
                let [q, k, v] = call.operands(device, &data, self.storage)?;
                let attention = call.ruled(device, &data, attention())?;
                let lse = attention.clone().lse(true).forward(&q, &k, &v)?.lse.expect("asked for");
                let (heads, queries) = looked_at(&call);
                let wanted = Inspect::new().heads(&heads).queries(queries).weights().column_sums().entropy();
                let seen = attention.inspect(&q, &k, &lse, &wanted)?;
                let results = [("weights", seen.weights), ("column sums", seen.column_sums), ("entropy", seen.entropy)];
                results.into_iter().map(|(name, tensor)| got(name, &tensor.expect("asked for"))).collect()
            }
            Op::Packed => self.run_packed(&call, device, attention()),
            Op::Cache => {
                let [b, h, len_k, dim] = call.k;
                let config = KvCacheConfig::new(b, h, len_k, dim).dim_v(call.v[3]).dtype(self.storage);
                let mut cache = KvCache::new(device, config)?;
                let [q, k, v] = call.operands(device, &data, self.storage)?;
                let attention = call.ruled(device, &data, call.attention().lse(true))?;
                // All tokens at once, then the last token by itself; the queries of both are concatenated.
                let len_q = call.q[2];
                let (first, rest) = (len_k - len_q, len_q - 1);
                cache.append(&k.narrow(2, 0, first)?, &v.narrow(2, 0, first)?)?;
                let mut results: Vec<Vec<Got>> = Vec::new();
                for (at, n) in [(0, rest), (rest, 1)] {
                    if n == 0 {
                        continue;
                    }
                    let [q, k, v] =
                        [(&q, at), (&k, first + at), (&v, first + at)].map(|(x, start)| x.narrow(2, start, n));
                    results.push(pair(&cache.step(&attention, &q?, &k?, &v?)?)?);
                }
                Ok(side_by_side(results))
            }
            Op::Merge => {
                let [q, k, v] = call.operands(device, &data, self.storage)?;
                let attention = call.ruled(device, &data, attention().lse(true))?;
                let half = call.k[2] / 2;
                let part = |start: usize, n: usize| {
                    let out = attention.forward(&q, &k.narrow(2, start, n)?, &v.narrow(2, start, n)?)?;
                    Ok::<_, wgpu_attention::Error>((out.output, out.lse.expect("asked for")))
                };
                let (a, b) = (part(0, half)?, part(half, call.k[2] - half)?);
                pair(&merge(&a.0, &a.1, &b.0, &b.1)?)
            }
            Op::Softmax => {
                let shape = [call.q[0], call.q[1], call.q[2], call.k[2]];
                let x = upload(device, &shape, &self.scores(shape), self.storage)?;
                Ok(vec![got("softmax", &softmax(&x, axis(&call) as isize)?)?])
            }
            Op::Projection => {
                let ([x, w, b], [xs, ws, bs]) = self.projected(&call);
                let x = upload(device, &xs, &x, self.storage)?;
                let (w, b) = (upload(device, &ws, &w, self.storage)?, Tensor::from_slice(device, &bs, &b)?);
                Ok(vec![got("projection", &project(&x, &w, Some(&b))?)?])
            }
        }
    }

    /// Scores that are spread uniformly and widely.
    fn scores(&self, shape: [usize; 4]) -> Vec<f32> {
        let values = more(self.seed, shape.iter().product());
        rounded(values.into_iter().map(|x| 4.0 * x).collect(), self.storage)
    }

    /// X, W and b of a projection, with their shapes.
    fn projected(&self, call: &Call) -> ([Vec<f32>; 3], [Vec<usize>; 3]) {
        let [batch, heads, len_q, _] = call.q;
        let (dim_in, dim_out) = (call.k[2], heads * call.v[3]);
        let shapes = [vec![batch, len_q, dim_in], vec![dim_out, dim_in], vec![dim_out]];
        let values = [0, 1, 2].map(|n| more(self.seed + (n << 32), shapes[n as usize].iter().product()));
        let [x, w, b] = values;
        ([rounded(x, self.storage), rounded(w, self.storage), b], shapes)
    }

    /// The packed sequences as separate calls.
    fn sequences(&self, call: &Call) -> Vec<Call> {
        let one = |(n, [len_q, len_k]): (usize, [usize; 2])| Call {
            q: [1, call.q[1], len_q, call.q[3]],
            k: [1, call.k[1], len_k, call.k[3]],
            v: [1, call.v[1], len_k, call.v[3]],
            order: Order::Bhsd,
            seed: call.seed + ((n as u64) << 32),
            ..call.clone()
        };
        ragged(call).into_iter().enumerate().map(one).collect()
    }

    fn run_packed(&self, call: &Call, device: &Device, attention: Attention) -> Result<Vec<Got>> {
        let (lens, sequences) = (ragged(call), self.sequences(call));
        let data: Vec<Data> = sequences.iter().map(|one| self.data(one)).collect();
        // Permute [h, len, d] to rows [len, h, d] and concatenate the sequences.
        let pack = |which: fn(&Data) -> &Vec<f32>, heads: usize, dim: usize| {
            let mut rows = Vec::new();
            for data in &data {
                let x = which(data);
                let len = x.len() / (heads * dim);
                for i in 0..len {
                    (0..heads).for_each(|h| rows.extend_from_slice(&x[(h * len + i) * dim..][..dim]));
                }
            }
            upload(device, &[rows.len() / (heads * dim), heads, dim], &rows, self.storage)
        };
        let starts = |which: usize| -> Vec<usize> {
            let sum = |sum: &mut usize, lens: &[usize; 2]| {
                *sum += lens[which];
                Some(*sum)
            };
            std::iter::once(0).chain(lens.iter().scan(0, sum)).collect()
        };
        let q = pack(|data| &data.q, call.q[1], call.q[3])?;
        let k = pack(|data| &data.k, call.k[1], call.k[3])?;
        let v = pack(|data| &data.v, call.v[1], call.v[3])?;
        pair(&attention.lse(true).forward_packed(&q, &k, &v, &starts(0), &starts(1))?)
    }
}

/// The truth of a call with positions.
fn positioned(
    call: &Call,
    data: &Data,
    distance: Option<Distance<'_>>,
    rotary: Option<reference::Rotary<'_>>,
) -> Truth {
    call.with_inputs(data, |problem, inputs| {
        let mut inputs = inputs.clone();
        (inputs.rules.distance, inputs.rules.rotary) = (distance, rotary);
        Truth::new(problem, &inputs)
    })
}

/// Concatenates results `[b, h, i, …]` along the queries.
fn side_by_side(mut parts: Vec<Vec<Got>>) -> Vec<Got> {
    let mut all = parts.remove(0);
    for part in parts {
        for (one, next) in all.iter_mut().zip(part) {
            let lead: usize = one.shape[..2].iter().product();
            let (wide, narrow) = (one.values.len() / lead.max(1), next.values.len() / lead.max(1));
            one.values = (0..lead)
                .flat_map(|n| one.values[n * wide..][..wide].iter().chain(&next.values[n * narrow..][..narrow]))
                .copied()
                .collect();
            one.shape[2] += next.shape[2];
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::cases;

    #[test]
    fn the_cpu_backend_meets_the_truth() {
        for (case, method) in cases(&[Method::Auto], 7, true) {
            let (got, truth) = (case.run(&Device::Cpu, method).unwrap(), case.truth());
            assert_eq!(got.len(), truth.len(), "{case}");
            for (got, truth) in got.iter().zip(&truth) {
                assert_eq!((got.name, &got.shape), (truth.name, &truth.shape), "{case}");
                let allowed = truth.allowed(got.dtype);
                for (at, (&x, &e)) in got.values.iter().zip(&truth.values).enumerate() {
                    let off = crate::difference(x.into(), e);
                    assert!(off <= allowed[at], "{case}, {}: [{at}] is {x} instead of {e}", got.name);
                }
            }
        }
    }
}
