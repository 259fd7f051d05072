use super::View;
use super::scores::{distance_of, pairs, row_major};
use crate::problem::Problem;

/// What the distance `δ = j − (i + offset)` between a key and a query adds to their score, after the softcap.
#[derive(Clone, Copy, Debug)]
pub enum Distance<'a> {
    /// `−slope_h · |δ|` (Press et al. 2022, section 3).
    Alibi {
        /// `[hq]`
        slopes: View<'a>,
    },
    /// `table[bucket(δ), h]` (Raffel et al. 2020, section 2.1).
    T5 {
        /// `[bucket, hq]`
        table: View<'a>,
        /// The distance that the first of `buckets` is for.
        first: i64,
        /// The bucket of each distance; those before and after have the first and the last.
        buckets: &'a [usize],
    },
    /// `scale · Q_i · A[clip(δ, −left, right) + left]`, with queries that are not rotated (Shaw et al. 2018, section 3.2).
    Shaw {
        /// A `[left + right + 1, d]`
        keys: View<'a>,
        /// The number of relative keys before that of distance 0.
        left: usize,
    },
}

impl<'a> Distance<'a> {
    /// The tensor that is learned: slopes, table or relative keys.
    pub fn table(&self) -> View<'a> {
        match *self {
            Distance::Alibi { slopes } => slopes,
            Distance::T5 { table, .. } => table,
            Distance::Shaw { keys, .. } => keys,
        }
    }

    /// What it adds to the scores of queries Q `[b, hq, i, d]`: `[b, hq, i, j]`, without the extra keys, row-major.
    pub fn biases(&self, problem: &Problem, q: View<'_>, scale: f64) -> Vec<f64> {
        let (queries, dim) = (row_major(q), problem.dim_k);
        let maskable = pairs(problem).filter(|&[.., j]| j < problem.maskable_keys());
        maskable
            .map(|pair @ [b, h, i, _]| {
                let row = (b * problem.heads_q + h) * problem.len_q + i;
                self.bias(h, distance_of(problem, pair), &queries[row * dim..][..dim], scale)
            })
            .collect()
    }

    /// What it adds to the score of a query `q` `[d]` of head `h`.
    fn bias(&self, h: usize, distance: i64, q: &[f64], scale: f64) -> f64 {
        match self {
            Distance::Alibi { slopes } => -slopes.at(&[h]) * distance.abs() as f64,
            Distance::T5 { table, .. } => table.at(&[self.row(distance), h]),
            Distance::Shaw { keys, .. } => {
                let row = self.row(distance);
                scale * q.iter().enumerate().map(|(d, q)| q * keys.at(&[row, d])).sum::<f64>()
            }
        }
    }

    /// Adds the gradients of one pair, whose score has the gradient `dx`:
    ///
    /// ```text
    /// ALiBi:  dslope_h −= |δ| dX        T5:  dtable[bucket(δ), h] += dX
    /// Shaw:   dA[row] += scale dX Q_i   dQ_i += scale dX A[row]   dscale += dX (Q_i · A[row])
    /// ```
    pub(super) fn add_gradients(
        &self,
        h: usize,
        distance: i64,
        (q, scale): (&[f64], f64),
        dx: f64,
        into: &mut DistanceGradients<'_>,
    ) {
        match self {
            Distance::Alibi { .. } => into.table[h] -= distance.abs() as f64 * dx,
            Distance::T5 { table, .. } => into.table[self.row(distance) * table.layout.shape()[1] + h] += dx,
            Distance::Shaw { keys, .. } => {
                let row = self.row(distance);
                for (d, &q) in q.iter().enumerate() {
                    let key = keys.at(&[row, d]);
                    into.table[row * keys.layout.shape()[1] + d] += scale * dx * q;
                    into.q[d] += scale * dx * key;
                    *into.scale += dx * q * key;
                }
            }
        }
    }

    /// The row of the table for a distance.
    fn row(&self, distance: i64) -> usize {
        match self {
            Distance::Alibi { .. } => panic!("slopes have no rows"),
            Distance::T5 { first, buckets, .. } => {
                buckets[(distance - first).clamp(0, buckets.len() as i64 - 1) as usize]
            }
            Distance::Shaw { keys, left } => {
                let last = keys.layout.shape()[0] as i64 - 1;
                (distance + *left as i64).clamp(0, last) as usize
            }
        }
    }
}

/// What [`Distance::add_gradients`] adds to.
pub(super) struct DistanceGradients<'a> {
    /// Of the table, row-major.
    pub table: &'a mut [f64],
    /// Of the pair's query, before its rotation.
    pub q: &'a mut [f64],
    pub scale: &'a mut f64,
}
