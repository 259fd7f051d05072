use super::{Inputs, View, rotate, weigh};
use crate::problem::{MaskMeaning, Problem, ScoreStage};

/// `S = scale · Q·Kᵀ` → softcap → `+ bias` → mask, up to `stage`: `[b, hq, i, j]`, row-major.
pub fn scores(problem: &Problem, inputs: &Inputs<'_>, stage: ScoreStage) -> Vec<f64> {
    let s = Positioned::new(problem, inputs).scores(stage);
    match stage {
        ScoreStage::Weights => weigh(problem, inputs, &s).0,
        _ => s,
    }
}

/// A call whose positions are applied: what scores are computed from.
pub(super) struct Positioned<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs<'a>,
    /// Rotated, `[b, hq, i, d]`, row-major.
    q: Vec<f64>,
    /// Rotated, `[b, hkv, j, d]`, row-major.
    k: Vec<f64>,
    /// What distances add, `[b, hq, i, j]` without the extra keys, row-major.
    distance: Option<Vec<f64>>,
}

/// The pairs `[b, h, i, j]` of a call, in row-major order.
pub(super) fn pairs(problem: &Problem) -> impl Iterator<Item = [usize; 4]> {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    rows([batch, heads_q, len_q]).flat_map(move |[b, h, i]| (0..len_k).map(move |j| [b, h, i, j]))
}

/// The indices of three axes, in row-major order.
pub(super) fn rows([a_len, b_len, c_len]: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..a_len).flat_map(move |a| (0..b_len).flat_map(move |b| (0..c_len).map(move |c| [a, b, c])))
}

/// The elements of a view, row-major.
pub(super) fn row_major(x: View<'_>) -> Vec<f64> {
    x.layout.positions().map(|at| x.data[at]).collect()
}

/// The distance `j − (i + offset)` of a pair.
pub(super) fn distance_of(problem: &Problem, [b, _, i, j]: [usize; 4]) -> i64 {
    j as i64 - i as i64 - i64::from(problem.band(b).offset)
}

impl<'a> Positioned<'a> {
    pub fn new(problem: &'a Problem, inputs: &'a Inputs<'a>) -> Positioned<'a> {
        let rotated = |x: View<'_>, n: usize| match &inputs.rules.rotary {
            Some(rotary) => rotate(x, rotary.cos, rotary.sin, rotary.interleaved, &rotary.rows[n]),
            None => row_major(x),
        };
        let (q, k) = (rotated(inputs.q, 0), rotated(inputs.k, 1));
        let scale = inputs.rules.scale(problem);
        let distance = inputs.rules.distance.map(|distance| distance.biases(problem, inputs.q, scale));
        Positioned { problem, inputs, q, k, distance }
    }

    /// A rotated query.
    pub fn q(&self, [b, h, i]: [usize; 3]) -> &[f64] {
        let Problem { heads_q, len_q, dim_k, .. } = *self.problem;
        &self.q[((b * heads_q + h) * len_q + i) * dim_k..][..dim_k]
    }

    /// A rotated key of the query head `h`.
    pub fn k(&self, [b, h, j]: [usize; 3]) -> &[f64] {
        let Problem { heads_kv, len_k, dim_k, .. } = *self.problem;
        &self.k[((b * heads_kv + h / self.problem.group()) * len_k + j) * dim_k..][..dim_k]
    }

    fn distance(&self, [b, h, i, j]: [usize; 4]) -> Option<f64> {
        let [_, heads, len_q, keys] = self.problem.mask_shape();
        self.distance.as_ref().map(|distance| distance[((b * heads + h) * len_q + i) * keys + j])
    }

    /// Whether a query may see a key.
    pub fn visible(&self, pair @ [b, _, i, j]: [usize; 4]) -> bool {
        if j >= self.problem.maskable_keys() {
            return true;
        }
        let rules = &self.inputs.rules;
        let band = self.problem.band(b);
        let (row, key) = (i as i64, j as i64);
        let in_band = key < i64::from(band.keys) && key >= row + i64::from(band.lo) && key <= row + i64::from(band.hi);
        in_band
            && rules.masks.iter().all(|(mask, meaning)| mask.at(&pair) == (*meaning == MaskMeaning::Keep))
            && rules.biases.iter().all(|bias| bias.at(&pair) != f64::NEG_INFINITY)
            && self.distance(pair) != Some(f64::NEG_INFINITY)
    }

    /// `Q_i · K_j`.
    pub fn product(&self, [b, h, i, j]: [usize; 4]) -> f64 {
        self.q([b, h, i]).iter().zip(self.k([b, h, j])).map(|(q, k)| q * k).sum()
    }

    /// `scale · Q_i·K_j` after the softcap.
    pub fn capped(&self, pair: [usize; 4]) -> f64 {
        let x = self.inputs.rules.scale(self.problem) * self.product(pair);
        match self.inputs.rules.softcap(self.problem) {
            Some(cap) => cap * (x / cap).tanh(),
            None => x,
        }
    }

    pub fn score(&self, stage: ScoreStage, pair: [usize; 4]) -> f64 {
        match stage {
            ScoreStage::Scaled => return self.inputs.rules.scale(self.problem) * self.product(pair),
            ScoreStage::Capped => return self.capped(pair),
            ScoreStage::Masked | ScoreStage::Weights => {}
        }
        if !self.visible(pair) {
            return f64::NEG_INFINITY;
        }
        let mut x = self.capped(pair);
        if pair[3] < self.problem.maskable_keys() {
            x += self.distance(pair).unwrap_or(0.0);
            for bias in &self.inputs.rules.biases {
                x += bias.at(&pair);
            }
        }
        x
    }

    pub fn scores(&self, stage: ScoreStage) -> Vec<f64> {
        pairs(self.problem).map(|pair| self.score(stage, pair)).collect()
    }
}
