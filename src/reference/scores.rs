use super::{Inputs, visible, weigh};
use crate::problem::{Problem, ScoreStage};

/// `S = scale · Q·Kᵀ` → softcap → `+ bias` → mask, up to `stage`: `[b, hq, i, j]`, row-major.
pub fn scores(problem: &Problem, inputs: &Inputs<'_>, stage: ScoreStage) -> Vec<f64> {
    let mut s = Vec::with_capacity(problem.batch * problem.heads_q * problem.len_q * problem.len_k);
    for b in 0..problem.batch {
        for h in 0..problem.heads_q {
            for i in 0..problem.len_q {
                for j in 0..problem.len_k {
                    s.push(score(problem, inputs, stage, [b, h, i, j]));
                }
            }
        }
    }
    match stage {
        ScoreStage::Weights => weigh(problem, inputs, &s).0,
        _ => s,
    }
}

fn score(problem: &Problem, inputs: &Inputs<'_>, stage: ScoreStage, [b, h, i, j]: [usize; 4]) -> f64 {
    let is_final = matches!(stage, ScoreStage::Masked | ScoreStage::Weights);
    if is_final && !visible(problem, inputs, b, h, i, j) {
        return f64::NEG_INFINITY;
    }
    let head_kv = h / problem.group();
    let mut x = 0.0;
    for d in 0..problem.dim_k {
        x += inputs.q.at(&[b, h, i, d]) * inputs.k.at(&[b, head_kv, j, d]);
    }
    x *= f64::from(problem.scale);
    if stage == ScoreStage::Scaled {
        return x;
    }
    if let Some(cap) = problem.softcap {
        let cap = f64::from(cap);
        x = cap * (x / cap).tanh();
    }
    if is_final && j < problem.maskable_keys() {
        for bias in &inputs.biases {
            x += bias.at(&[b, h, i, j]);
        }
    }
    x
}
