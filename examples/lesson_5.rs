//! Positions. The page: docs/guide/5-positions.md.

mod guide;
#[path = "guide/real.rs"]
mod real;

use std::fmt::Write;

use guide::Result;
use guide::draw::{Curves, Heatmap, picture};
use image::RgbImage;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use real::WIDTH;
use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::{self, Buckets};
use wgpu_attention::position::{
    Pairing, PositionTable, Rotary, RotaryConfig, RotaryScaling, TokenPositions, alibi, sinusoidal,
};
use wgpu_attention::{Align, Attended, Attention, Device, ScoreStage, Tensor, Weights};

fn main() -> std::process::ExitCode {
    guide::main(lesson)
}

pub fn lesson(device: &Device, out: &mut String) -> Result<RgbImage> {
    shuffle(device, out)?;
    writeln!(out)?;
    sinusoids(out)?;
    writeln!(out)?;
    rotations(device, out)?;
    writeln!(out)?;
    let fitted = Fitted::new()?;
    longer(device, &fitted, out)?;
    writeln!(out)?;
    beyond_the_table(device, out)?;
    draw(device, &fitted)
}

/// Attention does not see the order of its input: shuffled tokens give the shuffled output.
fn shuffle(device: &Device, out: &mut String) -> Result<()> {
    let (layer, sentence) = (real::layer(device)?, real::sentence(0)?);
    let len = sentence.tokens.len();
    let mut order: Vec<usize> = (0..len).collect();
    order.shuffle(&mut Pcg64::seed_from_u64(5));
    let shuffled =
        |rows: &[f32]| -> Vec<f32> { order.iter().flat_map(|&i| &rows[i * WIDTH..][..WIDTH]).copied().collect() };
    let upload = |rows: &[f32]| Tensor::from_slice(device, &[len, WIDTH], rows);
    let (x, queries, mixed) = (upload(&sentence.x)?, upload(&sentence.x)?, upload(&shuffled(&sentence.x))?);
    let run = |q: &Tensor, k: &Tensor, attention: &Attention| layer.forward(q, k, k, attention)?.output.download();

    let plain = Attention::new();
    let (in_order, out_of_order) = (run(&queries, &x, &plain)?, run(&mixed, &x, &plain)?);
    let same = shuffled(&in_order).iter().zip(&out_of_order).all(|(a, b)| a.to_bits() == b.to_bits());
    writeln!(out, "queries shuffled: the same bits, shuffled: {}", if same { "yes" } else { "no" })?;
    for (name, attention) in [("no mask", Attention::new()), ("causal", Attention::new().causal(Align::TopLeft))] {
        let off = guide::difference(&shuffled(&run(&x, &x, &attention)?), &run(&mixed, &mixed, &attention)?);
        let off = if off < 1e-3 { format!("{off:.0e}") } else { format!("{off:.2}") };
        writeln!(out, "all tokens shuffled, {name}: largest difference {off}")?;
    }
    Ok(())
}

/// The dot product of two sinusoidal encodings depends only on their distance.
fn sinusoids(out: &mut String) -> Result<()> {
    let (dim, distances) = (64, [0, 1, 2, 4, 8, 16, 32, 64]);
    writeln!(out, "distance    {}", distances.map(|distance| format!("{distance:7}")).concat())?;
    for start in [0, 100] {
        let table = sinusoidal(start, 65, dim)?;
        let row = |p: usize| &table.data()[p * dim..][..dim];
        writeln!(out, "from {start:<7}{}", distances.map(|d| format!("{:7.2}", guide::dot(row(0), row(d)))).concat())?;
    }
    Ok(())
}

/// A step of a given number of positions is a rotation, whatever the position.
fn rotations(device: &Device, out: &mut String) -> Result<()> {
    let dim = 64;
    let rotary = Rotary::new(device, &RotaryConfig::new(dim).pairing(Pairing::Interleaved), 256)?;
    let table = sinusoidal(0, 10, dim)?;
    let row = |p: usize| &table.data()[p * dim..][..dim];
    let ninth = Tensor::from_slice(device, &[1, 1, 1, dim], row(9))?;
    let rotated = rotary.rotate(&ninth, &TokenPositions::From(4))?.download()?;
    writeln!(
        out,
        "sinusoid 9 rotated by 4, and sinusoid 5: largest difference {:.0e}",
        guide::difference(&rotated, row(5))
    )?;

    let mut rng = Pcg64::seed_from_u64(55);
    let [q, k] = [(); 2].map(|()| Tensor::from_slice(device, &[1, 1, 1, dim], &guide::signs(&mut rng, dim)));
    let (q, k) = (q?, k?);
    for (i, j) in [(3, 1), (103, 101), (203, 201), (3, 2)] {
        let (q, k) = (rotary.rotate(&q, &i.into())?, rotary.rotate(&k, &j.into())?);
        let score = guide::dot(&q.download()?, &k.download()?);
        writeln!(out, "rotary: query at {i:3}, key at {j:3}: score {score:.2}")?;
    }
    Ok(())
}

/// The methods are fitted on sequences up to this length.
const TRAINED: usize = 64;
const LENGTHS: [usize; 4] = [64, 128, 256, 512];
const SYMBOLS: usize = 8;
/// The score added to a key that holds the requested symbol.
const MATCH: f32 = 10.0;
/// The columns of a head that hold its position; the remaining ones hold the symbol.
const POSITION: usize = 32;
const SINES: usize = 16;
const HEAD: usize = POSITION + SYMBOLS;
const BATCH: usize = 128;
const CLIP: usize = 16;

/// The target that every method is fitted to: nearer keys score higher.
fn target(distance: usize) -> f64 {
    -2.0 * (distance as f64).ln()
}

#[derive(Clone, Copy, PartialEq)]
enum Method {
    Nothing,
    Target,
    Sinusoidal,
    Rotary,
    Interpolated,
    Alibi,
    T5,
    Shaw,
}

const METHODS: [(&str, Method); 8] = [
    ("the target itself", Method::Target),
    ("ALiBi, slope 1/8", Method::Alibi),
    ("T5", Method::T5),
    ("Shaw, clipped at 16", Method::Shaw),
    ("rotary", Method::Rotary),
    ("rotary, interpolated", Method::Interpolated),
    ("sinusoidal", Method::Sinusoidal),
    ("no positions", Method::Nothing),
];

/// The learned parameters of each method, fitted by least squares on the distances of short sequences.
struct Fitted {
    /// `[SINES, SINES]`: the score of sinusoids p and p' is `PE(p)·M·PE(p')`.
    sinusoidal: Vec<f32>,
    /// The query before its rotation: `POSITION / 2` first elements of pairs, then the second ones. The key's pairs are
    /// (1, 0).
    rotary: Vec<f32>,
    /// A number per bucket.
    t5: Vec<f32>,
    /// A number per distance up to the clip.
    shaw: Vec<f32>,
}

fn buckets() -> Buckets {
    Buckets { bidirectional: false, num_buckets: 32, max_distance: TRAINED }
}

fn sines(position: usize) -> Result<Vec<f32>> {
    Ok(sinusoidal(position, 1, SINES)?.data().to_vec())
}

impl Fitted {
    fn new() -> Result<Fitted> {
        let targets: Vec<f64> = (1..TRAINED).map(target).collect();
        let narrow = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|x| x as f32).collect() };

        // A pair (a, b), rotated relative to (1, 0): a·cos(distance · frequency) − b·sin(distance · frequency).
        let frequencies = RotaryConfig::new(POSITION).frequencies(TRAINED)?;
        let rotated = |d: usize| {
            let angles = frequencies.iter().map(move |frequency| d as f64 * frequency);
            angles.clone().map(f64::cos).chain(angles.map(|angle| -angle.sin()))
        };
        let features: Vec<f64> = (1..TRAINED).flat_map(rotated).collect();
        let rotary = guide::least_squares(&features, &targets, POSITION, 1, 1.0);

        let (mut features, mut answers) = (Vec::new(), Vec::new());
        for i in 0..TRAINED {
            let query = sines(i)?;
            for j in 0..i {
                let key = sines(j)?;
                features.extend(query.iter().flat_map(|&a| key.iter().map(move |&b| f64::from(a) * f64::from(b))));
                answers.push(target(i - j));
            }
        }
        let sinusoidal = guide::least_squares(&features, &answers, SINES * SINES, 1, 1.0);

        // The least-squares solution is the mean over the distances that share a parameter.
        let means = |count: usize, which: &dyn Fn(usize) -> Result<usize>| -> Result<Vec<f32>> {
            let mut sums = vec![(0.0, 0); count];
            for d in 1..TRAINED {
                let (sum, n) = &mut sums[which(d)?];
                *sum += target(d);
                *n += 1;
            }
            Ok(sums.into_iter().map(|(sum, n)| (sum / f64::from(n.max(1))) as f32).collect())
        };
        Ok(Fitted {
            sinusoidal: narrow(sinusoidal),
            rotary: narrow(rotary),
            t5: means(buckets().num_buckets, &|d| Ok(buckets().bucket(-(d as i64))?))?,
            shaw: means(CLIP + 1, &|d| Ok(CLIP - d.min(CLIP)))?,
        })
    }

    /// The last of `len` tokens asks for a symbol among those before it. `symbols` is `[batch, len]`; the last of each
    /// row is the requested one.
    fn attend(&self, device: &Device, method: Method, len: usize, symbols: &[usize], gain: f32) -> Result<Attended> {
        let (batch, keys) = (symbols.len() / len, len - 1);
        let mut query_position = [0.0; POSITION];
        let mut key_positions = vec![0.0; keys * POSITION];
        match method {
            Method::Sinusoidal => {
                let last = sines(keys)?;
                for (n, at) in query_position[..SINES].iter_mut().enumerate() {
                    *at = (0..SINES).map(|m| last[m] * self.sinusoidal[m * SINES + n]).sum();
                }
                for (j, row) in key_positions.chunks_exact_mut(POSITION).enumerate() {
                    row[..SINES].copy_from_slice(&sines(j)?);
                }
            }
            Method::Rotary | Method::Interpolated => {
                query_position.copy_from_slice(&self.rotary);
                key_positions.chunks_exact_mut(POSITION).for_each(|row| row[..POSITION / 2].fill(1.0));
            }
            Method::Shaw => query_position[0] = 1.0,
            _ => {}
        }
        let symbol = |which: usize, gain: f32| (0..SYMBOLS).map(move |n| if n == which { gain } else { 0.0 });
        let (mut q, mut k) = (Vec::new(), Vec::new());
        for row in symbols.chunks_exact(len) {
            q.extend(query_position.iter().copied().chain(symbol(row[keys], gain)));
            for (&which, position) in row.iter().zip(key_positions.chunks_exact(POSITION)) {
                k.extend(position.iter().copied().chain(symbol(which, 1.0)));
            }
        }
        let mut q = Tensor::from_slice(device, &[batch, 1, 1, HEAD], &q)?;
        let mut k = Tensor::from_slice(device, &[batch, 1, keys, HEAD], &k)?;

        let attention = Attention::new().scale(1.0).weights(Weights::PerHead).scores(Some(ScoreStage::Masked));
        let attention = match method {
            Method::Rotary | Method::Interpolated => {
                let mut config = RotaryConfig::new(POSITION);
                if method == Method::Interpolated {
                    config = config.scaling(RotaryScaling::Linear { factor: (len as f64 / TRAINED as f64).max(1.0) });
                }
                let rotary = Rotary::new(device, &config, len)?;
                q = rotary.rotate(&q, &keys.into())?;
                k = rotary.rotate(&k, &0.into())?;
                attention
            }
            // Head 2 of 8 has the slope 1/8.
            Method::Alibi => attention.bias(alibi::bias(device, 8, 1, keys, keys as i64)?.narrow(0, 2, 1)?),
            Method::T5 => {
                let table = Tensor::from_slice(device, &[self.t5.len(), 1], &self.t5)?;
                attention.bias(t5::bias(&table, &buckets(), 1, keys, keys as i64)?)
            }
            Method::Shaw => {
                let rows: Vec<f32> =
                    self.shaw.iter().flat_map(|&s| (0..HEAD).map(move |n| if n == 0 { s } else { 0.0 })).collect();
                let table = RelativeKeys::new(&Tensor::from_slice(device, &[CLIP + 1, HEAD], &rows)?, CLIP, 0)?;
                attention.bias(table.bias(&q, keys, keys as i64, Some(1.0))?)
            }
            Method::Target => {
                let bias: Vec<f32> = (0..keys).map(|j| target(keys - j) as f32).collect();
                attention.bias(Tensor::from_slice(device, &[keys], &bias)?)
            }
            Method::Sinusoidal | Method::Nothing => attention,
        };
        Ok(attention.forward(&q, &k, &k)?)
    }
}

/// "Where did this symbol occur last?" in sequences up to eight times longer than in the fit.
fn longer(device: &Device, fitted: &Fitted, out: &mut String) -> Result<()> {
    let mut rng = Pcg64::seed_from_u64(555);
    let sequences = LENGTHS.map(|len| (0..BATCH * len).map(|_| rng.random_range(0..SYMBOLS)).collect::<Vec<_>>());
    writeln!(out, "weight on the last match; fitted on {TRAINED} tokens")?;
    writeln!(out, "{:20}{}", "tokens", LENGTHS.map(|len| format!("{len:7}")).concat())?;
    for (name, method) in METHODS {
        write!(out, "{name:20}")?;
        for (len, symbols) in LENGTHS.into_iter().zip(&sequences) {
            let weights = fitted.attend(device, method, len, symbols, MATCH)?.weights.expect("asked for").download()?;
            let rows = weights.chunks_exact(len - 1).zip(symbols.chunks_exact(len));
            let right = rows.filter_map(|(row, symbols)| {
                symbols[..len - 1].iter().rposition(|&symbol| symbol == symbols[len - 1]).map(|at| row[at])
            });
            let right: Vec<f32> = right.collect();
            write!(out, "{:7.2}", right.iter().sum::<f32>() / right.len() as f32)?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// A learned table has no rows beyond the trained length.
fn beyond_the_table(device: &Device, out: &mut String) -> Result<()> {
    let table = PositionTable::learned(&Tensor::from_slice(device, &[TRAINED, 4], &[0.1; TRAINED * 4])?)?;
    let x = Tensor::from_slice(device, &[2 * TRAINED, 4], &[0.0; 2 * TRAINED * 4])?;
    let Err(error) = table.add(&x, &TokenPositions::From(0)) else { return Err("the table has grown".into()) };
    writeln!(out, "learned: {error}")?;
    Ok(())
}

/// Draws the sinusoids on the left, and on the right each method's scores at distances that it was not fitted on.
fn draw(device: &Device, fitted: &Fitted) -> Result<RgbImage> {
    const SHOWN: usize = 256;
    let table = sinusoidal(0, 64, 64)?;
    let map = Heatmap {
        title: "sinusoidal encodings",
        values: table.data(),
        columns: 64,
        row_labels: &[],
        column_labels: &[],
        row_axis: "position, 0 to 63",
        column_axis: "dimension, 0 to 63",
        range: (-1.0, 1.0),
        cell: 8,
    };
    let mut lines = Vec::new();
    for (name, method) in METHODS {
        if matches!(method, Method::Nothing | Method::Interpolated) {
            continue;
        }
        let scores = fitted.attend(device, method, SHOWN, &[0; SHOWN], 0.0)?.scores.expect("asked for").download()?;
        let points = scores.iter().rev().enumerate().map(|(n, &score)| ((n + 1) as f64, f64::from(score)));
        let name = if method == Method::Sinusoidal { "sinusoidal, query at 255" } else { name };
        lines.push((name, points.collect::<Vec<_>>()));
    }
    let (left, _) = map.size();
    picture(left + 740, 620, |area| {
        let (first, second) = area.split_horizontally(left);
        map.draw(&first)?;
        Curves {
            title: "score of a key by its distance",
            x_axis: "distance (fitted up to 63)",
            y_axis: "score",
            x_ticks: &[0.0, 63.0, 127.0, 191.0, 255.0],
            y_ticks: &[-16.0, -12.0, -8.0, -4.0, 0.0, 4.0],
            logarithmic: false,
            marks: false,
            lines: &lines,
        }
        .draw(&second)
    })
}
