//! The description of a call in checked arithmetic, independent of any GPU.
//!
//! `S = scale · Q·Kᵀ` → softcap → `+ bias` → mask → softmax over keys → `· V`, per batch and head.

mod dropout;
mod dtype;
mod layout;
mod wanted;

pub use dropout::{Dropout, philox};
pub use dtype::{Dtype, Element};
pub(crate) use layout::in_order_of;
pub use layout::{Layout, checked_len};
pub(crate) use wanted::{Chosen, Wanted};
pub use wanted::{WantedGradients, Weights};

use std::ops::Range;

use crate::error::{Result, shape_error, value_error};

/// Upper limit on the length of a query or key axis. Keeps every position, offset and bound within 32-bit integers.
pub const MAX_LEN: usize = 1 << 29;

/// The position of query `i` among the keys: that of key `i + offset`.
///
/// ```text
/// len_q = 2, len_k = 4        TopLeft (offset 0)    BottomRight (offset 2)
///                              ■ · · ·               ■ ■ ■ ·
///                              ■ ■ · ·               ■ ■ ■ ■
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Align {
    /// Offset 0: query `i` is at key `i` (PyTorch's `is_causal`, JAX, Keras).
    #[default]
    TopLeft,
    /// Offset `len_k − len_q`: the last query is at the last key (FlashAttention, MLX).
    BottomRight,
    /// Any offset, including negative ones (ONNX: the length of the past).
    Offset(i64),
    /// One offset per batch entry.
    PerBatch(Vec<i64>),
}

/// Whether a true entry of a boolean mask keeps or hides the key. There is no default, because PyTorch's
/// `scaled_dot_product_attention`, JAX, Keras and ONNX keep it, and PyTorch's `MultiheadAttention` hides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskMeaning {
    /// True: the query may attend to the key.
    Keep,
    /// True: the query may not attend to the key.
    Hide,
}

/// Which scores to return in addition to the output: ONNX's `qk_matmul_output_mode` 0 to 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoreStage {
    /// `scale · Q·Kᵀ` (mode 0).
    Scaled,
    /// After the softcap (mode 1).
    Capped,
    /// After bias and masks; masked scores are −∞ (mode 2).
    Masked,
    /// After the softmax: the weights (mode 3).
    Weights,
}

/// The keys that query `i` may see by position: `j < keys` and `i + lo ≤ j ≤ i + hi`.
///
/// Causal masks, windows and key lengths all reduce to one band per batch entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// Number of valid keys.
    pub keys: i32,
    /// Lowest visible key, relative to the query's index.
    pub lo: i32,
    /// Highest visible key, relative to the query's index.
    pub hi: i32,
    /// The key that query 0 is at.
    pub offset: i32,
}

/// A bound that no position reaches.
pub const NO_BOUND: i32 = 1 << 30;

impl Band {
    /// Whether the band hides any of `keys` keys from any query.
    pub fn hides_any_of(&self, keys: usize) -> bool {
        (self.keys as usize) < keys || self.lo > -NO_BOUND || self.hi < NO_BOUND
    }

    /// The range of keys, out of `len_k`, that query `i` may see.
    pub fn range(&self, i: usize, len_k: usize) -> std::ops::Range<usize> {
        let start = (i as i64 + i64::from(self.lo)).max(0);
        let end = (i as i64 + i64::from(self.hi) + 1).min(i64::from(self.keys)).min(len_k as i64);
        let start = start.min(len_k as i64) as usize;
        start..(end.max(0) as usize).max(start)
    }
}

/// The table rows that the tokens `[batch, len]` of a call read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Token `i` reads row `start + i`.
    From(usize),
    /// Listed, for `[len]` tokens that all batch entries share, or for `[batch, len]`.
    Each {
        /// Row-major.
        rows: Vec<u32>,
        /// Whether each batch entry has its own.
        per_batch: bool,
    },
}

impl Rows {
    /// The row of token `i` of `len` in batch entry `b`.
    pub fn of(&self, b: usize, i: usize, len: usize) -> usize {
        match self {
            Rows::From(start) => start + i,
            Rows::Each { rows, per_batch } => rows[if *per_batch { b * len + i } else { i }] as usize,
        }
    }
    /// The first row that is read, and one past the last.
    pub fn range(&self, len: usize) -> std::ops::Range<usize> {
        match self {
            Rows::From(start) => *start..start + len,
            Rows::Each { rows, .. } => match (rows.iter().min(), rows.iter().max()) {
                (Some(&first), Some(&last)) => first as usize..last as usize + 1,
                _ => 0..0,
            },
        }
    }
}

/// Rows of one batch entry to copy: `count` rows starting at `from` go to rows starting at `to`, wrapping around from
/// the last row to the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// First row read.
    pub from: usize,
    /// First row written.
    pub to: usize,
    /// Number of rows.
    pub count: usize,
}

/// One of several packed sequences (a ragged batch, "varlen").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its first row of Q.
    pub first_query: usize,
    /// Number of rows of Q.
    pub len_q: usize,
    /// Its first row of K and V.
    pub first_key: usize,
    /// Number of rows of K and V.
    pub len_k: usize,
    /// The keys that its queries may see, counted within the sequence.
    pub band: Band,
}

/// The positional rules of one call, before the shapes are known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Positions {
    /// The positions of queries relative to keys.
    pub align: Align,
    /// Key `j` is visible to query `i` only if `j ≤ i + offset`.
    pub causal: bool,
    /// Number of visible keys to the left of the query's own position.
    pub window_left: Option<usize>,
    /// Number of visible keys to the right of the query's own position.
    pub window_right: Option<usize>,
    /// Number of valid keys per batch entry.
    pub key_lengths: Option<Vec<usize>>,
}

/// One attention call with consistent shapes: plain data that every backend works from.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Independent sequences.
    pub batch: usize,
    /// Query heads; a multiple of `heads_kv`.
    pub heads_q: usize,
    /// Key/value heads; query head `h` reads head `h / (heads_q / heads_kv)`.
    pub heads_kv: usize,
    /// Queries per sequence.
    pub len_q: usize,
    /// Keys per sequence.
    pub len_k: usize,
    /// Width of a query and a key.
    pub dim_k: usize,
    /// Width of a value.
    pub dim_v: usize,
    /// Factor on `Q·Kᵀ`.
    pub scale: f32,
    /// The cap of `cap · tanh(S / cap)`, if any.
    pub softcap: Option<f32>,
    /// One band, or one per batch entry.
    pub bands: Vec<Band>,
    /// Number of keys at the end that bands, masks and biases do not apply to (`add_bias_kv`, `add_zero_attn`).
    pub extra_keys: usize,
}

impl Problem {
    /// Checks Q `[b, hq, lq, dk]`, K `[b, hkv, lk, dk]`, V `[b, hkv, lk, dv]` and the options.
    pub fn new(
        q: &[usize],
        k: &[usize],
        v: &[usize],
        scale: Option<f32>,
        softcap: Option<f32>,
        positions: &Positions,
        extra_keys: usize,
    ) -> Result<Problem> {
        let (&[batch, heads_q, len_q, dim_k], &[batch_k, heads_kv, len_k, dim_of_k], &[batch_v, heads_v, len_v, dim_v]) =
            (q, k, v)
        else {
            return Err(shape_error!(
                "Q {q:?}, K {k:?} and V {v:?} must each have four axes: [batch, heads, len, dim]"
            ));
        };
        let rule = |what: &str, rule: &str| shape_error!("{what}: Q {q:?}, K {k:?}, V {v:?}; {rule}");
        if batch != batch_k || batch != batch_v {
            return Err(rule("batch sizes differ", "axis 0 must be the same"));
        }
        if heads_kv != heads_v {
            return Err(rule("K and V have different heads", "axis 1 of K and V must be the same"));
        }
        if len_k != len_v {
            return Err(rule("K and V have different lengths", "axis 2 of K and V must be the same"));
        }
        if dim_k != dim_of_k {
            return Err(rule("Q and K have different widths", "axis 3 of Q and K must be the same"));
        }
        if heads_kv == 0 && heads_q != 0 || heads_kv != 0 && !heads_q.is_multiple_of(heads_kv) {
            return Err(shape_error!(
                "heads_q = {heads_q} is not a multiple of heads_kv = {heads_kv} (Q {q:?}, K {k:?})"
            ));
        }
        if len_q >= MAX_LEN || len_k >= MAX_LEN {
            return Err(rule("a sequence is too long", &format!("lengths must be below {MAX_LEN}")));
        }
        if extra_keys > len_k {
            return Err(shape_error!("extra_keys = {extra_keys} is more than len_k = {len_k}"));
        }
        for shape in [q, k, v] {
            checked_len(shape)?;
        }
        checked_len(&[batch, heads_q, len_q, dim_v])?;
        let scale = scale.unwrap_or(1.0 / (dim_k.max(1) as f64).sqrt() as f32);
        if !scale.is_finite() {
            return Err(value_error!("scale = {scale} must be finite"));
        }
        if let Some(cap) = softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(value_error!("softcap = {cap} must be finite and above 0"));
        }
        Ok(Problem {
            batch,
            heads_q,
            heads_kv,
            len_q,
            len_k,
            dim_k,
            dim_v,
            scale,
            softcap,
            bands: positions.bands(batch, len_q, len_k - extra_keys)?,
            extra_keys,
        })
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.heads_q / self.heads_kv.max(1)
    }

    /// Number of keys that bands, masks and biases apply to; those after them are always visible.
    pub fn maskable_keys(&self) -> usize {
        self.len_k - self.extra_keys
    }

    /// The band of batch entry `b`.
    pub fn band(&self, b: usize) -> Band {
        self.bands[if self.bands.len() == 1 { 0 } else { b }]
    }

    /// The call on some batch entries, key/value heads and queries, with whole groups of heads.
    pub(crate) fn part(&self, batch: Range<usize>, heads_kv: Range<usize>, queries: Range<usize>) -> Problem {
        let (first, group) = (queries.start as i32, self.group());
        let bands = match self.bands.len() {
            1 => &self.bands[..],
            _ => &self.bands[batch.clone()],
        };
        let moved = |bound: i32| if bound.abs() >= NO_BOUND { bound } else { bound + first };
        let bands = bands.iter().map(|band| Band {
            lo: moved(band.lo),
            hi: moved(band.hi),
            offset: band.offset + first,
            ..*band
        });
        Problem {
            batch: batch.len(),
            heads_q: heads_kv.len() * group,
            heads_kv: heads_kv.len(),
            len_q: queries.len(),
            bands: bands.collect(),
            ..self.clone()
        }
    }

    /// True if no position rule hides any key.
    pub fn is_unbanded(&self) -> bool {
        !self.bands.iter().any(|band| band.hides_any_of(self.maskable_keys()))
    }

    /// The shape that masks and biases broadcast to: `[batch, heads_q, len_q, keys]`.
    pub fn mask_shape(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.len_q, self.maskable_keys()]
    }

    /// Floating-point operations of both products over all pairs of query and key; a multiply-add counts as two.
    pub fn operations(&self) -> f64 {
        let pairs = (self.batch * self.heads_q) as f64 * self.len_q as f64 * self.len_k as f64;
        pairs * 2.0 * (self.dim_k + self.dim_v) as f64
    }

    /// True if there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.batch == 0 || self.heads_q == 0 || self.len_q == 0
    }
}

impl Positions {
    /// The sequences delimited by `starts_q` and `starts_k`: `[0, end₀, end₁, …]`, in rows of Q and of K.
    pub fn sequences(
        &self,
        starts_q: &[usize],
        starts_k: &[usize],
        total_q: usize,
        total_k: usize,
    ) -> Result<Vec<Sequence>> {
        if starts_q.len() != starts_k.len() {
            return Err(shape_error!(
                "cu_seqlens_q has {} entries and cu_seqlens_k {}; both need one more than there are sequences",
                starts_q.len(),
                starts_k.len()
            ));
        }
        for (name, starts, total) in [("cu_seqlens_q", starts_q, total_q), ("cu_seqlens_k", starts_k, total_k)] {
            if let Some(at) = starts.windows(2).position(|pair| pair[1] < pair[0]) {
                return Err(value_error!(
                    "{name}[{}] = {} is less than {name}[{at}] = {}; it must not decrease",
                    at + 1,
                    starts[at + 1],
                    starts[at]
                ));
            }
            if starts.first() != Some(&0) || starts.last() != Some(&total) {
                return Err(shape_error!(
                    "{name} goes from {:?} to {:?}; it must go from 0 to the {total} rows there are",
                    starts.first(),
                    starts.last()
                ));
            }
        }
        if self.key_lengths.is_some() {
            return Err(value_error!(
                "packed sequences take their key lengths from cu_seqlens_k, not from key_lengths"
            ));
        }
        let batch = starts_q.len() - 1;
        let mut one = Positions { align: Align::TopLeft, ..self.clone() };
        (0..batch)
            .map(|n| {
                one.align = match &self.align {
                    Align::PerBatch(offsets) if offsets.len() == batch => Align::Offset(offsets[n]),
                    Align::PerBatch(offsets) => {
                        return Err(shape_error!(
                            "the list of offsets has {} entries for {batch} sequences; one per sequence is needed",
                            offsets.len()
                        ));
                    }
                    other => other.clone(),
                };
                let (len_q, len_k) = (starts_q[n + 1] - starts_q[n], starts_k[n + 1] - starts_k[n]);
                let band = one.bands(1, len_q, len_k)?[0];
                Ok(Sequence { first_query: starts_q[n], len_q, first_key: starts_k[n], len_k, band })
            })
            .collect()
    }

    fn bands(&self, batch: usize, len_q: usize, keys: usize) -> Result<Vec<Band>> {
        // There is always a band, even for an empty batch.
        let offsets = match &self.align {
            Align::TopLeft => vec![0],
            Align::BottomRight => vec![keys as i64 - len_q as i64],
            Align::Offset(offset) => vec![*offset],
            Align::PerBatch(offsets) => {
                expect_per_batch("the list of offsets", offsets.len(), batch)?;
                if batch == 0 { vec![0] } else { offsets.clone() }
            }
        };
        let lengths = match &self.key_lengths {
            None => vec![keys],
            Some(lengths) => {
                expect_per_batch("key_lengths", lengths.len(), batch)?;
                if let Some((b, len)) = lengths.iter().enumerate().find(|&(_, &len)| len > keys) {
                    return Err(shape_error!("key_lengths[{b}] = {len} is more than len_k = {keys}"));
                }
                if batch == 0 { vec![keys] } else { lengths.clone() }
            }
        };
        // Computed in 128 bits and then clamped: beyond ±2^30 a bound hides everything or nothing anyway.
        let clamp = |x: i128| x.clamp(-i128::from(NO_BOUND), i128::from(NO_BOUND)) as i32;
        let count = offsets.len().max(lengths.len());
        Ok((0..count)
            .map(|b| {
                let offset = i128::from(offsets[b.min(offsets.len() - 1)]);
                let lo = self.window_left.map_or(-NO_BOUND, |left| clamp(offset - left as i128));
                let right = self.window_right.map_or(NO_BOUND, |right| clamp(offset + right as i128));
                let hi = if self.causal { right.min(clamp(offset)) } else { right };
                Band { keys: lengths[b.min(lengths.len() - 1)] as i32, lo, hi, offset: clamp(offset) }
            })
            .collect())
    }
}

/// An error unless a list has one entry per batch entry.
pub(crate) fn expect_per_batch(what: &str, len: usize, batch: usize) -> Result<()> {
    if len != batch {
        return Err(shape_error!("{what} has {len} entries for a batch of {batch}; one per batch entry is needed"));
    }
    Ok(())
}

/// `layout` as `[batch, heads, len, dim]`: a missing head or batch axis becomes 1, axes before the
/// heads are merged into the batch.
pub fn as_four_axes(name: &str, layout: &Layout) -> Result<Layout> {
    match layout.rank() {
        0 | 1 => Err(shape_error!(
            "{name} {:?} needs at least two axes: [len, dim], [heads, len, dim] or [batch, heads, len, dim]",
            layout.shape()
        )),
        2 => layout.unsqueeze(0)?.unsqueeze(0),
        3 => layout.unsqueeze(0),
        4 => Ok(layout.clone()),
        rank => {
            let lead = checked_len(&layout.shape()[..rank - 3])?;
            let shape: Vec<usize> = std::iter::once(lead).chain(layout.shape()[rank - 3..].iter().copied()).collect();
            layout.reshape(&shape)?.ok_or_else(|| {
                shape_error!(
                    "the leading axes of {name} {:?} (strides {:?}) do not merge into one batch axis; make it contiguous",
                    layout.shape(),
                    layout.strides()
                )
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Result<Problem> {
        Problem::new(&q, &k, &v, None, None, &Positions::default(), 0)
    }

    #[test]
    fn each_rule_is_an_error_with_the_numbers() {
        for (q, k, v, say) in [
            ([2, 6, 3, 8], [2, 4, 5, 8], [2, 4, 5, 8], "heads_q = 6 is not a multiple of heads_kv = 4"),
            ([2, 4, 3, 8], [2, 4, 5, 8], [2, 4, 6, 8], "different lengths"),
            ([2, 4, 3, 8], [2, 4, 5, 9], [2, 4, 5, 8], "different widths"),
            ([2, 4, 3, 8], [1, 4, 5, 8], [2, 4, 5, 8], "batch sizes differ"),
            ([2, 4, 3, 8], [2, 4, 5, 8], [2, 2, 5, 8], "different heads"),
            ([2, 4, 3, 8], [2, 0, 5, 8], [2, 0, 5, 8], "not a multiple of heads_kv = 0"),
            ([1, 1, MAX_LEN, 8], [1, 1, 5, 8], [1, 1, 5, 8], "too long"),
        ] {
            let message = problem(q, k, v).unwrap_err().to_string();
            assert!(message.contains(say), "{message}");
        }
        for (scale, cap) in [(Some(f32::NAN), None), (Some(f32::INFINITY), None), (None, Some(0.0)), (None, Some(-1.0))]
        {
            let shape = [1, 1, 2, 4];
            assert!(Problem::new(&shape, &shape, &shape, scale, cap, &Positions::default(), 0).is_err());
        }
    }

    #[test]
    fn bands_say_what_causal_window_and_lengths_say() {
        // Every offset, bound and length, against the rule written out.
        for (len_q, len_k) in [(1, 1), (3, 5), (5, 3)] {
            for offset in [i64::MIN, -7, -1, 0, 2, 9, i64::MAX] {
                for (left, right) in [
                    (None, None),
                    (Some(0), Some(0)),
                    (Some(2), None),
                    (None, Some(1)),
                    (Some(usize::MAX), Some(usize::MAX)),
                ] {
                    for causal in [false, true] {
                        let positions = Positions {
                            align: Align::Offset(offset),
                            causal,
                            window_left: left,
                            window_right: right,
                            key_lengths: Some(vec![len_k - 1]),
                        };
                        let band = positions.bands(1, len_q, len_k).unwrap()[0];
                        for i in 0..len_q {
                            let range = band.range(i, len_k);
                            for j in 0..len_k {
                                let at = i as i128 + i128::from(offset);
                                let j128 = j as i128;
                                let want = j < len_k - 1
                                    && (!causal || j128 <= at)
                                    && left.is_none_or(|l| j128 >= at - l as i128)
                                    && right.is_none_or(|r| j128 <= at + r as i128);
                                assert_eq!(
                                    range.contains(&j),
                                    want,
                                    "offset {offset} {left:?} {right:?} {causal} i {i} j {j}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn per_batch_lists_must_have_one_entry_each() {
        let bad = Positions { align: Align::PerBatch(vec![0]), ..Default::default() };
        assert!(bad.bands(2, 3, 3).is_err());
        let bad = Positions { key_lengths: Some(vec![3, 4]), ..Default::default() };
        assert!(bad.bands(2, 3, 3).unwrap_err().to_string().contains("key_lengths[1] = 4"));
    }
}
