//! Turns a call's tensors and rules into operands that fit the checked problem.

use super::{Attention, EmptyRows};
use crate::call::{Attended, Mask, Operands};
use crate::error::{Result, shape_error, value_error};
use crate::kernels::Method;
use crate::lower::Recording;
use crate::problem::{Positions, Problem, Wanted, Weights, expect_per_batch};
use crate::tensor::Tensor;

impl Attention {
    /// Adds this call to a recording on the tensors' device.
    pub(crate) fn record(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let (problem, operands) = self.operands(recording, q, k, v)?;
        let output = output.map(|output| output.as_four_axes("output")).transpose()?;
        let wanted = Wanted { lse: self.lse, weights: self.weights, scores: self.scores };
        if self.empty_rows == EmptyRows::MeanOfValues {
            self.expect_mean_alone(output.as_ref())?;
            let wanted = Wanted { lse: true, ..wanted };
            let attended = recording.attention(&problem, &operands, wanted, self.method, None)?;
            let attended = mean_where_empty(recording, &problem, &operands.v, attended)?;
            return Attended { lse: attended.lse.filter(|_| self.lse), ..attended }.with_axes_of(q.shape());
        }
        recording.attention(&problem, &operands, wanted, self.method, output.as_ref())?.with_axes_of(q.shape())
    }

    /// An error if an option excludes [`EmptyRows::MeanOfValues`].
    fn expect_mean_alone(&self, output: Option<&Tensor>) -> Result<()> {
        for (what, given) in [
            ("returned weights", self.weights != Weights::None),
            ("returned scores", self.scores.is_some()),
            ("a sink, which every query sees", self.sink.is_some()),
            ("query_lengths, after which queries see nothing on purpose", self.query_lengths.is_some()),
            ("an output tensor of the caller's", output.is_some()),
        ] {
            if given {
                return Err(value_error!("EmptyRows::MeanOfValues cannot be combined with {what}"));
            }
        }
        Ok(())
    }

    /// The checked problem, and the operands as backends need them.
    pub(crate) fn operands(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Problem, Operands)> {
        let (problem, operands) = self.operands_to_rotate(recording, q, k, v)?;
        // The attention kernels compute positions themselves; explicit positions need the separate rotate kernel.
        let operands = match &self.rotary {
            Some((_, Some(_))) => operands.rotated(|x, rotation, rows| recording.rotate(x, rotation, rows))?,
            _ => operands,
        };
        Ok((problem, operands))
    }

    /// The checked problem, and the operands before any rotation.
    pub(crate) fn operands_to_rotate(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Problem, Operands)> {
        for (name, tensor) in [("Q", q), ("K", k), ("V", v)] {
            tensor.expect_float(name)?;
        }
        let (q4, k4, v4) = (q.as_four_axes("Q")?, k.as_four_axes("K")?, v.as_four_axes("V")?);
        let problem = Problem::new(
            q4.shape(),
            k4.shape(),
            v4.shape(),
            self.scale,
            self.softcap,
            &self.positions,
            self.extra_keys,
        )?;
        let broadcast = |what: &str, tensor: &Tensor| -> Result<Tensor> {
            let layout = tensor.layout().broadcast_to(&problem.mask_shape()).map_err(|_| {
                shape_error!(
                    "{what} of shape {:?} does not broadcast to [batch, heads_q, len_q, len_k] = {:?}: \
                     from the right, each axis must be equal or 1{}",
                    tensor.shape(),
                    problem.mask_shape(),
                    missing_axes(tensor.shape(), problem.mask_shape())
                )
            })?;
            Ok(tensor.with_layout(layout))
        };
        let queries = self.query_mask(recording, &problem)?;
        let padding = |mask: &Mask| mask.map(|tensor| over_keys("a key padding mask", tensor, &problem));
        let masks = (self.masks.iter().cloned().map(Ok))
            .chain(self.key_padding.iter().map(padding))
            .chain(queries.map(Ok))
            .map(|mask| mask?.map(|tensor| broadcast("a mask", tensor)))
            .collect::<Result<Vec<_>>>()?;
        let biases = (self.biases.iter().cloned().map(Ok))
            .chain(self.key_padding_biases.iter().map(|bias| over_keys("a key padding bias", bias, &problem)))
            .map(|bias| {
                let bias = bias?;
                bias.expect_float("a bias")?;
                broadcast("a bias", &bias)
            })
            .collect::<Result<Vec<_>>>()?;
        let sink = self.checked_sink(&problem)?;
        let relative = self.distance.as_ref().map(|distance| distance.record(recording, &problem, &q4)).transpose()?;
        let operands = Operands { masks, biases, relative, sink, ..Operands::new(q4, k4, v4) };
        let Some((rotary, given)) = &self.rotary else { return Ok((problem, operands)) };
        let rows = rotary.rows(given.as_ref(), &problem)?;
        rotary.check_width("Q", q.shape(), problem.dim_k)?;
        Ok((problem, Operands { rotary: Some((rotary.rotation().clone(), rows)), ..operands }))
    }

    /// The mask for [`Attention::query_lengths`]: `[batch, 1, len_q, 1]`.
    fn query_mask(&self, recording: &Recording, problem: &Problem) -> Result<Option<Mask>> {
        let Some(lengths) = &self.query_lengths else { return Ok(None) };
        let Problem { batch, len_q, extra_keys, .. } = *problem;
        expect_per_batch("query_lengths", lengths.len(), batch)?;
        if let Some((b, len)) = lengths.iter().enumerate().find(|&(_, &len)| len > len_q) {
            return Err(shape_error!("query_lengths[{b}] = {len} is more than len_q = {len_q}"));
        }
        if extra_keys > 0 {
            return Err(value_error!(
                "query_lengths cannot be combined with add_bias_kv or add_zero_attn: every query sees those \
                 {extra_keys} keys; leave it out and skip the outputs after each length"
            ));
        }
        if lengths.iter().all(|&len| len == len_q) {
            return Ok(None);
        }
        let valid: Vec<bool> = lengths.iter().flat_map(|&len| (0..len_q).map(move |i| i < len)).collect();
        Mask::keep_where(recording.bools(&[batch, 1, len_q, 1], &valid)?).map(Some)
    }

    pub(crate) fn checked_sink(&self, problem: &Problem) -> Result<Option<Tensor>> {
        let Some(sink) = &self.sink else { return Ok(None) };
        sink.expect_float("the sink")?;
        if sink.shape() != [problem.heads_q] {
            return Err(shape_error!(
                "a sink of shape {:?} must be [heads_q] = [{}]: one score per query head",
                sink.shape(),
                problem.heads_q
            ));
        }
        Ok(Some(sink.clone()))
    }
}

/// The end of a message about a mask or bias that does not broadcast: the axes that it lacks, if its shape looks like a
/// common mask shape.
fn missing_axes(shape: &[usize], [batch, heads, len_q, len_k]: [usize; 4]) -> String {
    match *shape {
        [b, k] if [b, k] == [batch, len_k] => format!(
            "; [batch, len_k] must be [{batch}, 1, 1, {len_k}], in Python x[:, None, None, :], or be given as key padding"
        ),
        [b, q, k] if [b, q, k] == [batch, len_q, len_k] => {
            format!("; [batch, len_q, len_k] must be [{batch}, 1, {len_q}, {len_k}], in Python x[:, None]")
        }
        [h, k] if [h, k] == [heads, len_k] => {
            format!("; [heads, len_k] must be [{heads}, 1, {len_k}], in Python x[:, None]")
        }
        [both, q, k] if both == batch.saturating_mul(heads) && [q, k] == [len_q, len_k] => {
            format!("; [batch · heads, len_q, len_k] must be [{batch}, {heads}, {len_q}, {len_k}], by a reshape")
        }
        _ => String::new(),
    }
}

/// A tensor over keys only, `[batch, len_k]` or `[len_k]`, with axes for heads and queries added.
fn over_keys(what: &str, tensor: &Tensor, problem: &Problem) -> Result<Tensor> {
    let [batch, .., len_k] = problem.mask_shape();
    match *tensor.shape() {
        [len] if len == len_k => Ok(tensor.clone()),
        [entries, len] if len == len_k && (entries == batch || entries == 1) => tensor.unsqueeze(1)?.unsqueeze(1),
        _ => Err(shape_error!(
            "{what} of shape {:?} must be [batch, len_k] = [{batch}, {len_k}], or [{len_k}] for all; if it differs by \
             query or head, it is a mask or a bias, not key padding",
            tensor.shape()
        )),
    }
}

/// Replaces the output by the mean of all values if the LSE is −∞: merges it with a result over the same values at
/// equal scores. The LSE of that result is the least finite number, so it weighs nothing next to any other.
fn mean_where_empty(recording: &mut Recording, problem: &Problem, v: &Tensor, attended: Attended) -> Result<Attended> {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_v, .. } = *problem;
    let Some(lse) = attended.lse else { unreachable!("asked for") };
    if problem.is_empty() || len_k == 0 || dim_v == 0 {
        return Ok(Attended { lse: Some(lse), ..attended });
    }
    let [one_query, keys] = [[batch, heads_q, 1, 4], [batch, heads_kv, len_k, 4]];
    let alike = Problem::new(&one_query, &keys, v.shape(), None, None, &Positions::default(), 0)?;
    let operands = Operands::new(recording.number(0.0, &one_query)?, recording.number(0.0, &keys)?, v.clone());
    let mean = recording.attention(&alike, &operands, Wanted::default(), Method::Auto, None)?.output;
    let mean = mean.with_layout(mean.layout().broadcast_to(&[batch, heads_q, len_q, dim_v])?);
    let least = recording.number(f32::MIN, &[batch, heads_q, len_q])?;
    let [output, _] = recording.merge([&attended.output, &mean], [&lse, &least])?;
    Ok(Attended { output, lse: Some(lse), ..attended })
}
