//! Biases that kernels read from a small table, by the distance between key and query.

use super::shaw::RelativeKeys;
use super::t5::{self, Buckets};
use crate::call::Relative;
use crate::error::{Result, shape_error};
use crate::kernels::catalogue::RelativeKind;
use crate::lower::Recording;
use crate::problem::Problem;
use crate::tensor::Tensor;

/// What the distance between key and query adds to a score.
#[derive(Clone, Debug)]
pub(crate) enum Distance {
    Alibi(Tensor),
    T5(Tensor, Buckets),
    Shaw(RelativeKeys),
}

impl Distance {
    /// Its tensor, and the tensor's name in messages.
    pub fn named_tensor(&self) -> (&str, &Tensor) {
        match self {
            Distance::Alibi(slopes) => ("the slopes", slopes),
            Distance::T5(table, _) => ("the table of biases", table),
            Distance::Shaw(keys) => ("the relative keys", keys.table()),
        }
    }

    /// The table for a call with queries Q `[batch, heads, len_q, dim]`.
    pub fn record(&self, recording: &mut Recording, problem: &Problem, q: &Tensor) -> Result<Relative> {
        let heads = problem.heads_q;
        let (table, kind, low, high, factor) = match self {
            Distance::Alibi(slopes) => {
                slopes.expect_float("the slopes")?;
                if slopes.shape() != [heads] {
                    return Err(shape_error!(
                        "the slopes {:?} must be [heads_q] = [{heads}]: one per query head",
                        slopes.shape()
                    ));
                }
                (slopes.unsqueeze(1)?.unsqueeze(2)?.unsqueeze(0)?, RelativeKind::Slope, 0, 0, 1.0)
            }
            Distance::T5(table, buckets) => {
                let [low, high] = buckets.range()?;
                (t5::by_distance(recording, table, buckets, heads)?, RelativeKind::Fours, low, high, 1.0)
            }
            Distance::Shaw(keys) => {
                let [low, high] = keys.range();
                (keys.products(recording, q)?, RelativeKind::Table, low, high, problem.scale)
            }
        };
        let table = recording.widened(table)?;
        let shape = [problem.batch, heads, problem.len_q, table.shape()[3]];
        let layout = table.layout().broadcast_to(&shape)?;
        Ok(Relative { table: table.with_layout(layout), kind, low, high, factor })
    }
}
