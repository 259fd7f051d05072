//! Biases that kernels read from a small table, by the distance between key and query.

use super::shaw::RelativeKeys;
use super::t5::{self, Buckets};
use crate::call::{DistanceGradient, Relative};
use crate::error::{Result, shape_error};
use crate::kernels::catalogue::RelativeKind;
use crate::kernels::plan::DistanceColumns;
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

    /// How the gradient of its tensor is computed.
    pub fn gradient(&self) -> Result<DistanceGradient> {
        let by_columns =
            |[low, high]: [i32; 2], columns: Vec<u32>, count| DistanceColumns { low, high, columns, count };
        Ok(match self {
            Distance::Alibi(_) => DistanceGradient { columns: by_columns([0, 0], Vec::new(), 1), keys: None },
            Distance::T5(_, buckets) => {
                let [low, high] = buckets.range()?;
                let columns = (low..=high).map(|distance| Ok(buckets.bucket(distance.into())? as u32));
                let columns = columns.collect::<Result<_>>()?;
                DistanceGradient { columns: by_columns([low, high], columns, buckets.num_buckets), keys: None }
            }
            Distance::Shaw(keys) => {
                let [low, high] = keys.range();
                let count = (high - low + 1) as usize;
                let columns = by_columns([low, high], (0..count as u32).collect(), count);
                DistanceGradient { columns, keys: Some(keys.table().clone()) }
            }
        })
    }

    /// The gradient of its tensor, from what the backward computes.
    pub fn gradient_of_tensor(&self, computed: &Tensor) -> Result<Tensor> {
        let shape = computed.four_axes();
        match self {
            Distance::Alibi(_) => computed.reshape(&[shape[1]]),
            Distance::T5(..) => computed.reshape(&[shape[1], shape[3]])?.permute(&[1, 0]),
            Distance::Shaw(_) => computed.reshape(&[shape[2], shape[3]]),
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
