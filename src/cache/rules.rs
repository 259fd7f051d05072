//! The rules of an attention, applied to a cache.

use super::Sequence;
use crate::attention::Attention;
use crate::error::{Result, value_error};
use crate::problem::{Align, Positions, expect_per_batch};

/// The contents of a cache while queries attend to it: one entry per sequence.
pub(super) struct Held<'a> {
    pub sequences: &'a [Sequence],
    /// Number of queries; they are the last positions.
    pub counts: &'a [usize],
    /// Number of keys before its own that a query sees.
    pub window: Option<usize>,
    /// Whether the cache rotates queries by their positions.
    pub rotates: bool,
}

impl Attention {
    /// The same rules for `counts[b]` queries at the end of what each sequence of a cache holds.
    pub(super) fn behind(&self, held: &Held<'_>) -> Result<Attention> {
        let mut attention = self.clone();
        attention.positions = Positions {
            align: Align::PerBatch(self.cache_offsets(held)?),
            causal: self.causal_in_cache(held.counts)?,
            window_left: self.positions.window_left.into_iter().chain(held.window).min(),
            window_right: self.positions.window_right,
            key_lengths: Some(self.cache_lengths(held)?),
        };
        Ok(attention)
    }
    /// Whether queries over a cache are causal: yes, unless the caller says what they see.
    fn causal_in_cache(&self, counts: &[usize]) -> Result<bool> {
        if self.says_causal || self.says_align || !self.masks.is_empty() {
            return Ok(self.positions.causal);
        }
        if self.positions.window_right.is_some() {
            return Ok(false);
        }
        // A single query at the end of its sequence sees all keys either way.
        match counts.iter().enumerate().find(|&(_, &count)| count > 1) {
            Some((b, count)) if !self.biases.is_empty() => Err(value_error!(
                "{count} queries of batch entry {b} come with a bias, which may be a mask (-inf hides) or not, so it is \
                 unclear whether the cache should hide later keys: call causal(Align::BottomRight) if it should, or \
                 not_causal() if the bias hides what must be hidden"
            )),
            _ => Ok(true),
        }
    }
    /// The position of each sequence's first query among the keys held.
    fn cache_offsets(&self, held: &Held<'_>) -> Result<Vec<i64>> {
        let end = |(at, &count): (&Sequence, &usize)| at.len as i64 - count as i64;
        let ends: Vec<i64> = held.sequences.iter().zip(held.counts).map(end).collect();
        let given = match &self.positions.align {
            _ if !self.says_align => return Ok(ends),
            Align::BottomRight => return Ok(ends),
            Align::TopLeft => vec![0; ends.len()],
            Align::Offset(offset) => vec![*offset; ends.len()],
            Align::PerBatch(offsets) => {
                expect_per_batch("the list of offsets", offsets.len(), ends.len())?;
                offsets.clone()
            }
        };
        for (b, (offset, end)) in given.iter().zip(&ends).enumerate().filter(|(_, (offset, end))| offset != end) {
            let why = match held.sequences[b].first {
                _ if held.rotates => "by which the cache's rotary rotates it".to_string(),
                0 => continue,
                first => format!("counted from position {first}, because the window dropped the keys before"),
            };
            return Err(value_error!(
                "query 0 of batch entry {b} is at key {end} of the cache, {why}, but the attention's align says \
                 {offset}; leave it to the cache: Align::BottomRight"
            ));
        }
        Ok(given)
    }
    /// Number of valid keys of each sequence: those held, or the caller's key lengths.
    fn cache_lengths(&self, held: &Held<'_>) -> Result<Vec<usize>> {
        let Some(given) = &self.positions.key_lengths else {
            return Ok(held.sequences.iter().map(|sequence| sequence.len).collect());
        };
        expect_per_batch("key_lengths", given.len(), held.sequences.len())?;
        for (b, (&given, &Sequence { first, len })) in given.iter().zip(held.sequences).enumerate() {
            if given > len {
                return Err(value_error!(
                    "key_lengths[{b}] = {given} is more than the {len} keys that batch entry {b} of the cache holds; the \
                     cache counts them itself: leave key_lengths out"
                ));
            }
            if given < len && first > 0 {
                return Err(value_error!(
                    "key_lengths[{b}] = {given} counts from the first key of a sequence, but the window dropped {first} \
                     keys of batch entry {b}; leave key_lengths out"
                ));
            }
        }
        Ok(given.clone())
    }
    /// Whether any rule other than a rotary depends on the positions of queries among the keys held, and whether the
    /// caller gives those positions.
    pub(super) fn needs_places(&self, counts: &[usize], window: Option<usize>) -> Result<(bool, bool)> {
        let Positions { window_left, window_right, .. } = self.positions;
        let needs = window_left.or(window_right).or(window).is_some()
            || self.distance.is_some()
            || self.causal_in_cache(counts)?;
        Ok((needs, self.says_align && self.positions.align != Align::BottomRight))
    }
}
