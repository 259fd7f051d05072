//! The backward of attention on an adapter. Scores are recomputed for a slice of the queries at a time, so memory grows
//! linearly with the length.

use std::ops::Range;

use super::gpu::scored;
use crate::call::{BackwardCall, DistanceGradient, Gradients, Mask, Operands, Relative};
use crate::error::Result;
use crate::gpu::Steps;
use crate::kernels::plan::{self, AttentionOperands, RowDots, ScoreGradients};
use crate::kernels::{Method, Operand, Plan, Slot};
use crate::problem::{Dtype, Layout, Problem, ScoreStage, WantedGradients};
use crate::tensor::Tensor;

/// Most bytes of a slice of the scores. There are up to four arrays of this size.
const MOST_SCORES: u64 = 64 << 20;

/// Queries of a slice are a multiple of this, so that sums over queries have one order. Fewer only where a slice of so many
/// does not fit.
const QUERIES: usize = plan::SUMMED_QUERIES;

/// A part of a call: batch entries, key/value heads, queries.
#[derive(Clone)]
struct Slice {
    batch: Range<usize>,
    heads_kv: Range<usize>,
    queries: Range<usize>,
    group: usize,
}

impl Slice {
    /// The part of a tensor `[b, hq, i, ..]`.
    fn of_queries(&self, x: &Tensor) -> Result<Tensor> {
        let (first, heads) = (self.heads_kv.start * self.group, self.heads_kv.len() * self.group);
        let x = x.narrow(0, self.batch.start, self.batch.len())?.narrow(1, first, heads)?;
        x.narrow(2, self.queries.start, self.queries.len())
    }

    /// The part of a tensor `[b, hkv, j, ..]`.
    fn of_keys(&self, x: &Tensor) -> Result<Tensor> {
        x.narrow(0, self.batch.start, self.batch.len())?.narrow(1, self.heads_kv.start, self.heads_kv.len())
    }

    /// The part of a gradient whose axes of length 1 are sums over the whole axis.
    fn of_sums(&self, x: &Tensor) -> Result<Tensor> {
        let (first, heads) = (self.heads_kv.start * self.group, self.heads_kv.len() * self.group);
        let mut x = x.clone();
        for (axis, range) in [self.batch.clone(), first..first + heads, self.queries.clone()].into_iter().enumerate() {
            if x.shape()[axis] > 1 {
                x = x.narrow(axis, range.start, range.len())?;
            }
        }
        Ok(x)
    }

    fn operands(&self, operands: &Operands) -> Result<Operands> {
        let relative = operands
            .relative
            .as_ref()
            .map(|relative| Ok(Relative { table: self.of_queries(&relative.table)?, ..relative.clone() }));
        Ok(Operands {
            q: self.of_queries(&operands.q)?,
            k: self.of_keys(&operands.k)?,
            v: self.of_keys(&operands.v)?,
            masks: operands.masks.iter().map(|mask| mask.map(|x| self.of_queries(x))).collect::<Result<Vec<Mask>>>()?,
            biases: operands.biases.iter().map(|bias| self.of_queries(bias)).collect::<Result<_>>()?,
            relative: relative.transpose()?,
            ..operands.clone()
        })
    }
}

/// Arrays of the size of the largest slice, `[b, hq, i, j]` with rows padded to fours.
struct Working {
    /// Scores, then weights.
    p: Tensor,
    /// The gradients of the weights, then of the products.
    ds: Tensor,
    /// Scores after the softcap.
    capped: Option<Tensor>,
    /// The gradients of the scores after everything.
    dx: Option<Tensor>,
    /// The gradients of biases by distance, `[b, hq, i, column]`.
    by_distance: Option<Tensor>,
}

impl Steps {
    pub(super) fn backward(&mut self, problem: &Problem, call: &BackwardCall) -> Result<Gradients> {
        let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = *problem;
        let wanted = call.wanted;
        let operands = call.operands.rotated(|x, rotation, rows| self.rotate(x, rotation, rows))?;
        let operands = self.readable(&operands)?;
        let lse = self.widened(&call.lse)?;
        let d_lse = call.d_lse.as_ref().map(|x| self.widened(x)).transpose()?;
        let d_weights = match &call.d_weights {
            Some((x, factor)) => Some((self.widened(x)?, *factor)),
            None => None,
        };
        let call = &BackwardCall { lse, d_lse, d_weights, ..call.clone() };

        let of = |x: &Tensor| x.dtype();
        let [q, k, v] = [&operands.q, &operands.k, &operands.v];
        let needs_q = wanted.q || wanted.scale;
        let mut gradients = Gradients {
            q: self.blank("the gradient of the queries", needs_q, &[batch, heads_q, len_q, dim_k], of(q))?,
            k: self.blank("the gradient of the keys", wanted.k, &[batch, heads_kv, len_k, dim_k], of(k))?,
            v: self.blank("the gradient of the values", wanted.v, &[batch, heads_kv, len_k, dim_v], of(v))?,
            ..Gradients::default()
        };
        if wanted.biases {
            for shape in &call.bias_shapes {
                gradients.biases.extend(self.blank("the gradient of a bias", true, shape, Dtype::F32)?);
            }
        }
        // Relative keys are multiplied with the queries, so their gradients need each other.
        let needs_distance = |one: &DistanceGradient| wanted.distance || one.keys.is_some() && needs_q;
        let distance = call.distance.as_ref().filter(|one| needs_distance(one));
        let mut dq_of_distance = None;
        if let Some(DistanceGradient { columns, keys }) = distance {
            let what = "the gradient of the biases by distance";
            let shape = match keys {
                Some(_) => [1, 1, columns.count, dim_k],
                None => [1, heads_q, 1, columns.count],
            };
            gradients.distance = self.blank(what, wanted.distance, &shape, Dtype::F32)?;
            let needed = keys.is_some() && needs_q;
            dq_of_distance =
                self.blank("the gradient of the queries", needed, &[batch, heads_q, len_q, dim_k], of(q))?;
        }
        let delta = self.row_sums(problem, call)?;
        if problem.is_empty() || len_k == 0 {
            let all = [&gradients.q, &gradients.k, &gradients.v, &gradients.distance, &dq_of_distance];
            for x in all.into_iter().flatten().chain(&gradients.biases) {
                self.clear(x)?;
            }
        } else {
            self.backward_slices(problem, call, &operands, &delta, &gradients, dq_of_distance.as_ref())?;
        }
        if wanted.sink
            && let Some(sink) = &operands.sink
        {
            gradients.sink = Some(self.sink_gradient(problem, call, &delta, sink)?);
        }
        self.finish(problem, call, &operands, gradients, dq_of_distance)
    }

    /// A new tensor for a gradient, if it is wanted.
    fn blank(&self, what: &str, wanted: bool, shape: &[usize], dtype: Dtype) -> Result<Option<Tensor>> {
        wanted.then(|| self.output(what, Layout::contiguous(shape)?, dtype)).transpose()
    }

    fn clear(&mut self, x: &Tensor) -> Result<()> {
        if x.layout().is_empty() {
            return Ok(());
        }
        let plan = self.accepted(0.0, |capabilities| plan::zeros(x.layout().end(), capabilities))?;
        self.bind(plan, &[(Slot::Output, x)])
    }

    /// `dO·O − dLSE` of every row: `[b, hq, i]`. What the gradients of returned weights add comes later.
    fn row_sums(&mut self, problem: &Problem, call: &BackwardCall) -> Result<Tensor> {
        let shape = [problem.batch, problem.heads_q, problem.len_q];
        let delta = self.output("the row sums", Layout::contiguous(&shape)?, Dtype::F32)?;
        if problem.is_empty() {
            return Ok(delta);
        }
        match (&call.d_output, &call.d_lse) {
            (Some(d_output), d_lse) if problem.dim_v > 0 => {
                self.row_dots([&call.output, d_output], d_lse.as_ref(), &delta, 1.0, false)?;
            }
            (_, Some(d_lse)) => self.sum_axis(&d_lse.unsqueeze(3)?, None, &delta.unsqueeze(3)?, -1.0, false)?,
            (_, None) => self.clear(&delta)?,
        }
        Ok(delta)
    }

    /// `d = factor · Σ a·b − dLSE` over the last axis of `a` and `b`.
    fn row_dots(
        &mut self,
        [a, b]: [&Tensor; 2],
        d_lse: Option<&Tensor>,
        d: &Tensor,
        factor: f32,
        accumulate: bool,
    ) -> Result<()> {
        let operands = RowDots {
            a: a.operand(),
            b: b.operand(),
            d_lse: d_lse.map(Tensor::layout),
            d: d.layout(),
            factor,
            accumulate,
        };
        let plan = self.accepted(0.0, |capabilities| plan::row_dots(&operands, capabilities))?;
        let mut tensors = vec![(Slot::Q, a), (Slot::K, b), (Slot::Output, d)];
        tensors.extend(d_lse.map(|d_lse| (Slot::Lse, d_lse)));
        self.bind(plan, &tensors)
    }

    fn sum_axis(&mut self, x: &Tensor, axis: Option<usize>, y: &Tensor, factor: f32, accumulate: bool) -> Result<()> {
        let plan = self.accepted(0.0, |capabilities| {
            plan::sum_axis(x.layout(), axis, y.layout(), factor, accumulate, capabilities)
        })?;
        self.bind(plan, &[(Slot::Q, x), (Slot::Output, y)])
    }

    /// `y = factor · Σ x` over the axes along which `y` has length 1; both have four axes.
    fn sum_to(&mut self, x: &Tensor, y: &Tensor, factor: f32, accumulate: bool) -> Result<()> {
        let axes: Vec<usize> = (0..4).filter(|&axis| x.shape()[axis] > 1 && y.shape()[axis] == 1).collect();
        let Some((&last, others)) = axes.split_last() else {
            return self.sum_axis(x, None, y, factor, accumulate);
        };
        let mut x = x.clone();
        for &axis in others {
            let mut shape = x.shape().to_vec();
            shape[axis] = 1;
            let sum = self.output("a sum", Layout::contiguous(&shape)?, Dtype::F32)?;
            self.sum_axis(&x, Some(axis), &sum, 1.0, false)?;
            x = sum;
        }
        self.sum_axis(&x, Some(last), y, factor, accumulate)
    }

    fn sink_gradient(
        &mut self,
        problem: &Problem,
        call: &BackwardCall,
        delta: &Tensor,
        sink: &Tensor,
    ) -> Result<Tensor> {
        let heads = problem.heads_q;
        let gradient = self.output("the gradient of the sink", Layout::contiguous(&[1, heads, 1, 1])?, Dtype::F32)?;
        if problem.is_empty() {
            self.clear(&gradient)?;
            return gradient.reshape(&[heads]);
        }
        let each = self.output("the gradient of the sink", Layout::contiguous(delta.shape())?, Dtype::F32)?;
        let sink = &self.widened(sink)?;
        let plan = self.accepted(0.0, |capabilities| {
            plan::sink_gradients(call.lse.layout(), delta.layout(), sink.layout(), capabilities)
        })?;
        self.bind(plan, &[(Slot::Lse, &call.lse), (Slot::Q, delta), (Slot::Output, &each), (Slot::Sink, sink)])?;
        self.sum_to(&each.unsqueeze(3)?, &gradient, 1.0, false)?;
        gradient.reshape(&[heads])
    }

    /// The sizes of a slice: batch entries, key/value heads, queries.
    fn slice_sizes(&self, problem: &Problem) -> [usize; 3] {
        let capabilities = self.gpu.capabilities();
        let most = MOST_SCORES.min(capabilities.max_binding);
        let row = problem.len_k.next_multiple_of(4) as u64 * 4;
        let bytes = |[batch, heads, rows]: [usize; 3]| {
            (batch * heads * problem.group()) as u64 * (rows as u64).saturating_mul(row)
        };
        let longest = plan::most_transposed(problem.group(), capabilities);
        let mut sizes = [problem.batch, problem.heads_kv, problem.len_q];
        sizes[2] = sizes[2].min((longest / QUERIES).max(1) * QUERIES);
        for (axis, least) in [(0, 1), (1, 1), (2, QUERIES), (2, 1)] {
            while bytes(sizes) > most && sizes[axis] > least {
                sizes[axis] = sizes[axis].div_ceil(2).next_multiple_of(least);
            }
        }
        sizes
    }

    fn backward_slices(
        &mut self,
        problem: &Problem,
        call: &BackwardCall,
        operands: &Operands,
        delta: &Tensor,
        gradients: &Gradients,
        dq_of_distance: Option<&Tensor>,
    ) -> Result<()> {
        let Problem { batch, heads_kv, len_q, len_k, .. } = *problem;
        let sizes = self.slice_sizes(problem);
        let shape = [sizes[0], sizes[1] * problem.group(), sizes[2]];
        let array = |steps: &Steps, what: &str, wanted: bool, width: usize| -> Result<Option<Tensor>> {
            let layout = plan::padded(&[shape[0], shape[1], shape[2], width])?;
            wanted.then(|| steps.output(what, layout, Dtype::F32)).transpose()
        };
        let wanted = call.wanted;
        let is_by_distance = gradients.distance.is_some() || dq_of_distance.is_some();
        let keeps_dx = is_by_distance || !gradients.biases.is_empty();
        let needs_ds = wanted.q || wanted.k || wanted.scale || keeps_dx;
        let columns = call.distance.as_ref().map_or(0, |distance| distance.columns.count);
        let everything = |one: Option<Tensor>| one.expect("it is wanted");
        let working = Working {
            p: everything(array(self, "the weights", true, len_k)?),
            ds: everything(array(self, "the gradients of the scores", true, len_k)?),
            capped: array(self, "the scores", needs_ds && problem.softcap.is_some(), len_k)?,
            dx: array(self, "the gradients of the scores", keeps_dx, len_k)?,
            by_distance: array(self, "the gradients of the biases by distance", is_by_distance, columns)?,
        };
        let parts = |total: usize, size: usize| {
            (0..total).step_by(size.max(1)).map(move |start| start..total.min(start + size))
        };
        for batch in parts(batch, sizes[0]) {
            for heads_kv in parts(heads_kv, sizes[1]) {
                for queries in parts(len_q, sizes[2]) {
                    let group = problem.group();
                    let slice = Slice { batch: batch.clone(), heads_kv: heads_kv.clone(), queries, group };
                    self.backward_slice(problem, call, operands, delta, gradients, dq_of_distance, &working, &slice)?;
                }
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn backward_slice(
        &mut self,
        whole: &Problem,
        call: &BackwardCall,
        operands: &Operands,
        delta: &Tensor,
        gradients: &Gradients,
        dq_of_distance: Option<&Tensor>,
        working: &Working,
        slice: &Slice,
    ) -> Result<()> {
        let wanted = call.wanted;
        let problem = &whole.part(slice.batch.clone(), slice.heads_kv.clone(), slice.queries.clone());
        let operands = &slice.operands(operands)?;
        let shape = [problem.batch, problem.heads_q, problem.len_q, problem.len_k];
        let padded = plan::padded(&shape)?;
        let p = &working.p.with_layout(padded.clone());
        let ds = &working.ds.with_layout(padded.clone());
        let capped = working.capped.as_ref().map(|x| x.with_layout(padded.clone()));
        let dx = working.dx.as_ref().map(|x| x.with_layout(padded.clone()));
        let lse = &slice.of_queries(&call.lse)?;
        let delta = &slice.of_queries(delta)?;
        let d_output = call.d_output.as_ref().map(|x| slice.of_queries(x)).transpose()?;
        let d_weights = match &call.d_weights {
            Some((x, factor)) => Some((slice.of_queries(x)?, *factor)),
            None => None,
        };

        self.scores_into(problem, operands, ScoreStage::Masked, p)?;
        if let Some(capped) = &capped {
            self.scores_into(problem, operands, ScoreStage::Capped, capped)?;
        }
        let needs_ds = wanted.q || wanted.k || wanted.scale || dx.is_some();
        if needs_ds {
            match &d_output {
                Some(d_output) if problem.dim_v > 0 => {
                    // Scores of dO and V, skipped where positions hide the keys.
                    let products = Problem { dim_k: problem.dim_v, scale: 1.0, softcap: None, ..problem.clone() };
                    let operands = Operands::new(d_output.clone(), operands.v.clone(), operands.v.clone());
                    self.scores_into(&products, &operands, ScoreStage::Masked, ds)?;
                }
                _ => self.clear(&ds.with_layout(Layout::contiguous(&[padded.end().next_multiple_of(4)])?))?,
            }
        }
        // The scale may be 0, but the gradient of the scale needs what is multiplied by it.
        let scale = if problem.scale == 0.0 { 1.0 } else { problem.scale };
        let what = ScoreGradients {
            shape,
            lse: lse.layout(),
            d: delta.layout(),
            d_weights: d_weights.as_ref().map(|(x, factor)| (x.layout(), *factor)),
            softcap: problem.softcap,
            scale,
            from_scores: true,
            gradients: needs_ds,
            keeps_dx: dx.is_some(),
        };
        let mut tensors = vec![(Slot::Weights, p), (Slot::Output, ds), (Slot::Lse, lse), (Slot::Q, delta)];
        tensors.extend(capped.iter().map(|x| (Slot::Stage, x)));
        tensors.extend(dx.iter().map(|x| (Slot::V, x)));
        tensors.extend(d_weights.iter().map(|(x, _)| (Slot::K, x)));
        if let Some((of_weights, factor)) = &d_weights {
            let only_weights = ScoreGradients { gradients: false, ..what.clone() };
            self.score_gradients(&only_weights, &tensors)?;
            self.row_dots([p, of_weights], None, delta, *factor, true)?;
            if needs_ds {
                self.score_gradients(&ScoreGradients { from_scores: false, ..what }, &tensors)?;
            }
        } else {
            self.score_gradients(&what, &tensors)?;
        }

        let is_first = slice.queries.start == 0;
        if let Some(dv) = &gradients.v {
            let dv = &slice.of_keys(dv)?;
            match &d_output {
                Some(d_output) if problem.dim_v > 0 => self.transposed_sum(p, d_output, dv, !is_first)?,
                _ if is_first => self.clear_part(dv)?,
                _ => {}
            }
        }
        if let Some(dq) = &gradients.q
            && problem.dim_k > 0
        {
            self.weighted_sum_into(problem, operands, ds, &operands.k, &slice.of_queries(dq)?)?;
        }
        if let Some(dk) = &gradients.k
            && problem.dim_k > 0
        {
            self.transposed_sum(ds, &operands.q, &slice.of_keys(dk)?, !is_first)?;
        }
        let Some(dx) = dx else { return Ok(()) };
        let dx = dx.narrow(3, 0, problem.maskable_keys())?;
        for gradient in &gradients.biases {
            self.add_sums(&dx, gradient, slice)?;
        }
        if let (Some(distance), Some(by_distance)) = (&call.distance, &working.by_distance) {
            let layout = plan::padded(&[shape[0], shape[1], shape[2], distance.columns.count])?;
            let by_distance = by_distance.with_layout(layout);
            // The queries as they were before their rotation.
            let queries = slice.of_queries(&call.operands.q)?;
            self.distance_slice(problem, distance, &dx, &by_distance, &queries, gradients, dq_of_distance, slice)?;
        }
        Ok(())
    }

    /// Adds the gradients of biases by distance of a slice.
    #[allow(clippy::too_many_arguments)]
    fn distance_slice(
        &mut self,
        problem: &Problem,
        distance: &DistanceGradient,
        dx: &Tensor,
        by_distance: &Tensor,
        queries: &Tensor,
        gradients: &Gradients,
        dq_of_distance: Option<&Tensor>,
        slice: &Slice,
    ) -> Result<()> {
        // The padding of rows is read as weights.
        let whole = Layout::contiguous(&[by_distance.layout().end().next_multiple_of(4)])?;
        self.clear(&by_distance.with_layout(whole))?;
        let offsets: Vec<i32> = problem.bands.iter().map(|band| band.offset).collect();
        let scale = if problem.scale == 0.0 { 1.0 } else { problem.scale };
        let factor = if distance.keys.is_some() { scale } else { 1.0 };
        let columns = &distance.columns;
        let plan = self.accepted(0.0, |capabilities| {
            plan::distance_sums(dx.layout(), by_distance.layout(), columns, &offsets, factor, capabilities)
        })?;
        self.bind(plan, &[(Slot::Q, dx), (Slot::Output, by_distance)])?;
        let Some(keys) = &distance.keys else {
            return match &gradients.distance {
                Some(gradient) => self.add_sums(by_distance, gradient, slice),
                None => Ok(()),
            };
        };
        let Problem { batch, heads_q, heads_kv, dim_k, .. } = *problem;
        if let Some(dq) = dq_of_distance {
            // Every head reads the same relative keys.
            let len_k = columns.count;
            let all = Problem { len_k, extra_keys: len_k, softcap: None, ..problem.clone() };
            let layout = keys.unsqueeze(0)?.unsqueeze(0)?.layout().broadcast_to(&[batch, heads_kv, len_k, dim_k])?;
            let keys = keys.with_layout(layout);
            let operands = Operands::new(queries.clone(), keys.clone(), keys.clone());
            self.weighted_sum_into(&all, &operands, by_distance, &keys, &slice.of_queries(dq)?)?;
        }
        if let Some(gradient) = &gradients.distance {
            let of_heads = Layout::contiguous(&[batch, heads_kv, columns.count, dim_k])?;
            let of_heads = self.output("the gradient of the relative keys", of_heads, Dtype::F32)?;
            debug_assert!(heads_q.is_multiple_of(heads_kv));
            self.transposed_sum(by_distance, queries, &of_heads, false)?;
            let is_first = [slice.batch.start, slice.heads_kv.start, slice.queries.start] == [0; 3];
            self.sum_to(&of_heads, gradient, 1.0, !is_first)?;
        }
        Ok(())
    }

    /// Adds what a slice contributes to a gradient that is summed over the axes where it has length 1.
    fn add_sums(&mut self, x: &Tensor, gradient: &Tensor, slice: &Slice) -> Result<()> {
        let starts = [slice.batch.start, slice.heads_kv.start, slice.queries.start];
        let is_first = (0..3).all(|axis| gradient.shape()[axis] > 1 || starts[axis] == 0);
        let to = slice.of_sums(gradient)?;
        self.sum_to(x, &to, 1.0, !is_first)
    }

    fn scores_into(&mut self, problem: &Problem, operands: &Operands, stage: ScoreStage, to: &Tensor) -> Result<()> {
        let planned = planned(operands, operands.q.operand(), operands.q.operand(), Some(stage));
        let operations = problem.operations() / 2.0;
        let plan = self.accepted(operations, |capabilities| plan::scores(problem, &planned, capabilities))?;
        let mut tensors = scored(operands);
        tensors.push((Slot::Stage, to));
        self.bind(plan, &tensors)
    }

    /// `to = P·V` for `v` in the place of the values.
    fn weighted_sum_into(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        p: &Tensor,
        v: &Tensor,
        to: &Tensor,
    ) -> Result<()> {
        let problem = &Problem { dim_v: v.shape()[3], ..problem.clone() };
        let operands = &Operands { relative: None, ..operands.clone() };
        let planned = planned(operands, v.operand(), to.operand(), None);
        let operations = problem.operations() / 2.0;
        let plan = self.accepted(operations, |capabilities| plan::weighted_sum(problem, &planned, capabilities))?;
        let mut tensors = scored(operands);
        tensors.extend([(Slot::V, v), (Slot::Weights, p), (Slot::Output, to)]);
        self.bind(plan, &tensors)
    }

    fn transposed_sum(&mut self, p: &Tensor, x: &Tensor, to: &Tensor, accumulate: bool) -> Result<()> {
        let plan = self
            .accepted(0.0, |capabilities| plan::transposed_sum(x.operand(), to.layout(), accumulate, capabilities))?;
        self.bind(plan, &[(Slot::Weights, p), (Slot::Q, x), (Slot::Output, to)])
    }

    fn score_gradients(&mut self, what: &ScoreGradients<'_>, tensors: &[(Slot, &Tensor)]) -> Result<()> {
        let plan: Plan = self.accepted(0.0, |capabilities| plan::score_gradients(what, capabilities))?;
        self.bind(plan, tensors)
    }

    /// Sets a part of a tensor to 0.
    fn clear_part(&mut self, x: &Tensor) -> Result<()> {
        if x.layout().is_empty() {
            return Ok(());
        }
        let zero = self.number(0.0, Layout::strided(x.shape(), &[0; 4], 0, 1)?);
        self.sum_axis(&zero, None, x, 1.0, false)
    }

    /// The gradients after all slices: the scale's, and the queries' and keys' as they were before their rotation.
    fn finish(
        &mut self,
        problem: &Problem,
        call: &BackwardCall,
        rotated: &Operands,
        mut gradients: Gradients,
        dq_of_distance: Option<Tensor>,
    ) -> Result<Gradients> {
        let WantedGradients { q: wants_q, scale: wants_scale, .. } = call.wanted;
        if wants_scale && let Some(dq) = &gradients.q {
            let shape = [problem.batch, problem.heads_q, problem.len_q];
            let each = self.output("the gradient of the scale", Layout::contiguous(&shape)?, Dtype::F32)?;
            let one = self.output("the gradient of the scale", Layout::contiguous(&[1; 4])?, Dtype::F32)?;
            if problem.is_empty() || problem.dim_k == 0 {
                self.clear(&one)?;
            } else {
                // dS·K is scale · dS·K so far.
                let factor = if problem.scale == 0.0 { 1.0 } else { 1.0 / problem.scale };
                self.row_dots([dq, &rotated.q], None, &each, factor, false)?;
                if let Some(dq) = &dq_of_distance {
                    self.row_dots([dq, &call.operands.q], None, &each, factor, true)?;
                }
                self.sum_to(&each.unsqueeze(3)?, &one, 1.0, false)?;
            }
            gradients.scale = Some(one.reshape(&[1])?);
        }
        if let Some((rotation, [rows_q, rows_k])) = &call.operands.rotary {
            let back = rotation.back();
            for (x, rows) in [(&mut gradients.q, rows_q), (&mut gradients.k, rows_k)] {
                if let Some(dx) = x {
                    *x = Some(self.rotate(dx, &back, rows)?);
                }
            }
        }
        if let (Some(dq), Some(more)) = (&gradients.q, &dq_of_distance) {
            self.sum_axis(more, None, dq, 1.0, true)?;
        }
        if problem.scale == 0.0 {
            let of_keys = call.distance.as_ref().is_some_and(|distance| distance.keys.is_some());
            let relative = if of_keys { &mut gradients.distance } else { &mut None };
            for dx in [&mut gradients.q, &mut gradients.k, relative].into_iter().flatten() {
                let unscaled = dx.clone();
                *dx = self.output("a gradient", Layout::contiguous(unscaled.shape())?, unscaled.dtype())?;
                self.sum_axis(&unscaled, None, dx, 0.0, false)?;
            }
        }
        gradients.q = gradients.q.filter(|_| wants_q);
        Ok(gradients)
    }
}

/// The operands of a step of the backward.
fn planned<'a>(
    operands: &'a Operands,
    v: Operand<'a>,
    output: Operand<'a>,
    stage: Option<ScoreStage>,
) -> AttentionOperands<'a> {
    AttentionOperands {
        q: operands.q.operand(),
        k: operands.k.operand(),
        v,
        output,
        masks: operands.masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
        biases: operands.biases.iter().map(Tensor::layout).collect(),
        relative: operands.relative.as_ref().map(Relative::operand),
        rotary: None,
        sink: None,
        lse: false,
        weights: false,
        averaged: false,
        stage,
        method: Method::ThreePasses,
        tuned: None,
    }
}
