//! Why attention. The page: docs/guide/1-why-attention.md.

mod guide;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use guide::Result;
use guide::draw::{Curves, picture};
use image::RgbImage;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::{Attention, Device, Tensor, Weights};

fn main() -> std::process::ExitCode {
    guide::main(lesson)
}

pub fn lesson(device: &Device, out: &mut String) -> Result<RgbImage> {
    let picture = recall(device, out)?;
    writeln!(out)?;
    translate(device, out)?;
    Ok(picture)
}

const LETTERS: usize = 26;
/// Numbers in the state of the smaller and the larger RNN.
const STATES: [usize; 2] = [64, 256];
/// Numbers in a key and in a value of attention.
const DIM: usize = 64;
const LENGTHS: [usize; 8] = [2, 4, 8, 16, 32, 64, 128, 256];

/// Which letter came first? Answered from a state of fixed size, and by looking back.
fn recall(device: &Device, out: &mut String) -> Result<RgbImage> {
    let mut rng = Pcg64::seed_from_u64(1);
    let mut lines = [const { Vec::new() }; 4];
    writeln!(out, "          right answers                        attention's weight")?;
    writeln!(out, "letters   RNN of 64   RNN of 256   attention   on the first letter")?;
    for len in LENGTHS {
        let train: Vec<usize> = (0..800 * len).map(|_| rng.random_range(0..LETTERS)).collect();
        let test: Vec<usize> = (0..200 * len).map(|_| rng.random_range(0..LETTERS)).collect();
        let [small, large] = STATES.map(|state| rnn_recall(&mut rng, state, len, &train, &test));
        let (attention, weight) = attention_recall(device, &mut rng, len, &test)?;
        let percent = [small, large, attention].map(|share| 100.0 * share);
        writeln!(out, "{len:7}   {:8.0}%   {:9.0}%   {:8.0}%   {weight:19.2}", percent[0], percent[1], percent[2])?;
        for (line, value) in lines.iter_mut().zip(percent.into_iter().chain([100.0 * f64::from(weight)])) {
            line.push((len as f64, value));
        }
    }
    let [small, large, attention, weight] = lines;
    picture(760, 590, |area| {
        Curves {
            title: "Which letter came first?",
            x_axis: "letters in the sequence",
            y_axis: "percent",
            x_ticks: &LENGTHS.map(|len| len as f64),
            y_ticks: &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0],
            logarithmic: true,
            marks: true,
            lines: &[
                ("RNN with a state of 64 numbers: right answers", small),
                ("RNN with a state of 256 numbers: right answers", large),
                ("attention: right answers", attention),
                ("attention: its weight on the first letter", weight),
            ],
        }
        .draw(area)
    })
}

/// The state of a recurrent network after the letters: each step rotates the state by one element, adds the letter and
/// squashes, `h ← tanh(0.98 · rotate(h) + letter / 4)`.
fn rnn_state(vectors: &[f32], size: usize, sequence: &[usize]) -> Vec<f64> {
    let mut state = vec![0.0; size];
    for &letter in sequence {
        state.rotate_right(1);
        for (h, x) in state.iter_mut().zip(&vectors[letter * size..][..size]) {
            *h = (0.98 * *h + f64::from(*x) / 4.0).tanh();
        }
    }
    state
}

/// How often the first letter can be read from the state. The readout is fitted by least squares on `train`.
fn rnn_recall(rng: &mut Pcg64, size: usize, len: usize, train: &[usize], test: &[usize]) -> f64 {
    let vectors = guide::signs(rng, LETTERS * size);
    let (mut states, mut answers) = (Vec::new(), Vec::new());
    for sequence in train.chunks_exact(len) {
        states.extend(rnn_state(&vectors, size, sequence));
        answers.extend((0..LETTERS).map(|letter| if letter == sequence[0] { 1.0 } else { 0.0 }));
    }
    let readout = guide::least_squares(&states, &answers, size, LETTERS, 1.0);
    let right = test.chunks_exact(len).filter(|sequence| {
        let state = rnn_state(&vectors, size, sequence);
        most(|letter| (0..size).map(|i| state[i] * readout[i * LETTERS + letter]).sum()) == sequence[0]
    });
    right.count() as f64 / (test.len() / len) as f64
}

/// The letter with the highest score.
fn most(score: impl Fn(usize) -> f64) -> usize {
    (0..LETTERS).max_by(|&a, &b| score(a).total_cmp(&score(b))).expect("there are letters")
}

/// How often attention finds the first letter, and its mean weight on it. Every position has a random key, the query is
/// the key of the first position, and the values are the letters.
fn attention_recall(device: &Device, rng: &mut Pcg64, len: usize, test: &[usize]) -> Result<(f64, f32)> {
    let sequences = test.len() / len;
    let vectors = guide::signs(rng, LETTERS * DIM);
    let vector = |letter: usize| &vectors[letter * DIM..][..DIM];
    let keys = guide::signs(rng, sequences * len * DIM);
    let values: Vec<f32> = test.iter().flat_map(|&letter| vector(letter)).copied().collect();
    // [batch, heads, len, dim]: each sequence is an entry of the batch.
    let k = Tensor::from_slice(device, &[sequences, 1, len, DIM], &keys)?;
    let v = Tensor::from_slice(device, &[sequences, 1, len, DIM], &values)?;
    let q = k.narrow(2, 0, 1)?;
    let seen = Attention::new().weights(Weights::PerHead).forward(&q, &k, &v)?;
    let weights = seen.weights.expect("asked for").download()?;
    let output = seen.output.download()?;
    let right = output
        .chunks_exact(DIM)
        .zip(test.chunks_exact(len))
        .filter(|(output, sequence)| most(|letter| f64::from(guide::dot(output, vector(letter)))) == sequence[0]);
    let on_first: f32 = weights.iter().step_by(len).sum();
    Ok((right.count() as f64 / sequences as f64, on_first / sequences as f32))
}

/// The sentence pairs that the alignment is learned from.
const CORPUS: [(&str, &str); 12] = [
    ("the cat sleeps", "le chat dort"),
    ("the dog sleeps", "le chien dort"),
    ("the black dog eats", "le chien noir mange"),
    ("the white cat eats", "le chat blanc mange"),
    ("a cat eats", "un chat mange"),
    ("a white dog sleeps", "un chien blanc dort"),
    ("the house", "la maison"),
    ("the white house", "la maison blanche"),
    ("a house", "une maison"),
    ("a black cat", "un chat noir"),
    ("the dog sees a cat", "le chien voit un chat"),
    ("a cat sees the house", "un chat voit la maison"),
];

/// Word alignment as attention: a French word's query holds the log probabilities that each English word translates to
/// it, and an English word's key is 1 at its own index.
fn translate(device: &Device, out: &mut String) -> Result<()> {
    let english: BTreeSet<&str> = CORPUS.iter().flat_map(|(english, _)| english.split(' ')).collect();
    let english: Vec<&str> = english.into_iter().collect();
    let likely = word_translations();
    let (source, target) = ("the black cat sees a white dog", "le chat noir voit un chien blanc");
    let source: Vec<&str> = source.split(' ').collect();
    let target: Vec<&str> = target.split(' ').collect();

    let width = english.len();
    let (mut queries, mut keys) = (Vec::new(), Vec::new());
    for &french in &target {
        // e⁻²⁰ for words that never occurred together: practically nothing.
        queries.extend(
            english.iter().map(|&word| likely.get(&(word, french)).map_or(-20.0, |p| p.ln().max(-20.0) as f32)),
        );
    }
    for &word in &source {
        keys.extend(english.iter().map(|&other| if word == other { 1.0f32 } else { 0.0 }));
    }
    let q = Tensor::from_slice(device, &[target.len(), width], &queries)?;
    let k = Tensor::from_slice(device, &[source.len(), width], &keys)?;
    let seen = Attention::new().scale(1.0).weights(Weights::PerHead).forward(&q, &k, &k)?;
    let weights = seen.weights.expect("asked for").download()?;

    writeln!(out, "{:7}{}", "", source.iter().map(|word| format!("{word:>7}")).collect::<String>())?;
    for (french, row) in target.iter().zip(weights.chunks_exact(source.len())) {
        let cells: String = row.iter().map(|&weight| format!("{:7.2}", guide::tidy(weight))).collect();
        writeln!(out, "{french:7}{cells}")?;
    }
    Ok(())
}

/// The probability that an English word translates to a French one: IBM's model 1 (Brown et al. 1993), 20 iterations of
/// expectation maximisation, using only which words occur in which pair of sentences.
fn word_translations() -> BTreeMap<(&'static str, &'static str), f64> {
    let mut likely: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    for _ in 0..20 {
        let mut counts = BTreeMap::new();
        let mut totals: BTreeMap<&str, f64> = BTreeMap::new();
        for (english, french) in CORPUS {
            for f in french.split(' ') {
                let share = |e| likely.get(&(e, f)).copied().unwrap_or(1.0);
                let sum: f64 = english.split(' ').map(share).sum();
                for e in english.split(' ') {
                    *counts.entry((e, f)).or_insert(0.0) += share(e) / sum;
                    *totals.entry(e).or_insert(0.0) += share(e) / sum;
                }
            }
        }
        likely = counts.into_iter().map(|((e, f), count)| ((e, f), count / totals[e])).collect();
    }
    likely
}
