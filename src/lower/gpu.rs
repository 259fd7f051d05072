//! Calls on an adapter: plans them and binds tensors to the steps of the plan.

use crate::call::{Attended, Inspected, Operands, Relative, Rotation};
use crate::error::{Result, value_error};
use crate::gpu::{GpuBuffer, Steps};
use crate::kernels::access::is_wide;
use crate::kernels::plan::{self, AttentionOperands, InspectOperands};
use crate::kernels::{Method, Operand, Plan, Slot};
use crate::problem::{Chosen, Dtype, Layout, Problem, Rows, ScoreStage, Sequence, Wanted, Weights, in_order_of};
use crate::tensor::{Storage, Tensor};

pub(super) fn buffer_of(tensor: &Tensor) -> &GpuBuffer {
    match tensor.storage() {
        Storage::Gpu(buffer) => buffer,
        #[cfg(feature = "cpu")]
        _ => unreachable!("devices are checked before"),
    }
}

/// The tensors that scores are computed from, by slot.
pub(super) fn scored(operands: &Operands) -> Vec<(Slot, &Tensor)> {
    let Operands { q, k, masks, biases, relative, .. } = operands;
    let mut tensors = vec![(Slot::Q, q), (Slot::K, k)];
    tensors.extend(masks.iter().enumerate().map(|(n, mask)| (Slot::Mask(n), mask.tensor())));
    tensors.extend(biases.iter().enumerate().map(|(n, bias)| (Slot::Bias(n), bias)));
    tensors.extend(relative.iter().map(|relative| (Slot::Relative, &relative.table)));
    tensors
}

impl Steps {
    /// A new f32 tensor that is rounded to `dtype` on download.
    pub(super) fn output(&self, what: &str, layout: Layout, dtype: Dtype) -> Result<Tensor> {
        self.output_stored(what, layout, dtype, Dtype::F32)
    }

    /// A new tensor, if the plan has a layout for it.
    fn planned(&self, what: &str, layout: &Option<Layout>, dtype: Dtype) -> Result<Option<Tensor>> {
        layout.as_ref().map(|layout| self.output(what, layout.clone(), dtype)).transpose()
    }

    /// A new tensor stored as `stored`.
    fn output_stored(&self, what: &str, layout: Layout, dtype: Dtype, stored: Dtype) -> Result<Tensor> {
        let buffer = self.allocate(what, plan::padded_bytes(&layout, stored))?;
        Ok(Tensor::from_gpu(buffer, layout, dtype, stored))
    }

    /// Adds a plan, with these tensors in its slots.
    pub(super) fn bind(&mut self, plan: Plan, tensors: &[(Slot, &Tensor)]) -> Result<()> {
        let buffers: Vec<_> = tensors.iter().map(|&(slot, tensor)| (slot, buffer_of(tensor))).collect();
        self.add(plan, &buffers)
    }

    /// Adds a plan with one result, and allocates the result.
    pub(super) fn made(
        &mut self,
        what: &str,
        layout: Layout,
        dtype: Dtype,
        plan: Plan,
        tensors: &[(Slot, &Tensor)],
    ) -> Result<Tensor> {
        let output = self.output(what, layout, dtype)?;
        self.bind(plan, &[tensors, &[(Slot::Output, &output)]].concat())?;
        Ok(output)
    }

    /// One number in a tensor of `layout`, in an immutable buffer.
    pub(super) fn number(&self, value: f32, layout: Layout) -> Tensor {
        let buffer = self.gpu.constant(bytemuck::bytes_of(&[value; 4]));
        Tensor::from_gpu(buffer, layout, Dtype::F32, Dtype::F32)
    }

    /// The same values in an f32 buffer, for kernels that read only f32.
    pub(super) fn widened(&mut self, x: &Tensor) -> Result<Tensor> {
        if matches!(x.stored(), Dtype::F32 | Dtype::Bool) {
            return Ok(x.clone());
        }
        // An axis that repeats its values is widened once.
        let mut once = x.layout().clone();
        for axis in 0..once.rank() {
            if once.strides()[axis] == 0 && once.shape()[axis] > 1 {
                once = once.narrow(axis, 0, 1)?;
            }
        }
        let wide = self.row_major(&x.with_layout(once))?;
        Ok(wide.with_layout(wide.layout().broadcast_to(x.shape())?))
    }

    /// The operands with f32 biases.
    pub(super) fn readable(&mut self, operands: &Operands) -> Result<Operands> {
        let biases = operands.biases.iter().map(|bias| self.widened(bias)).collect::<Result<_>>()?;
        Ok(Operands { biases, ..operands.clone() })
    }

    /// X (at most four axes) in a row-major f32 buffer.
    pub(super) fn row_major(&mut self, x: &Tensor) -> Result<Tensor> {
        let mut four = x.layout().clone();
        while four.rank() < 4 {
            four = four.unsqueeze(0)?;
        }
        let plan = plan::widen(Operand { layout: &four, stored: x.stored() }, self.gpu.capabilities())?;
        self.made("a row-major copy", Layout::contiguous(x.shape())?, x.dtype(), plan, &[(Slot::Q, x)])
    }

    pub(super) fn attention(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        wanted: Wanted,
        method: Method,
        output: Option<&Tensor>,
        layout: Layout,
    ) -> Result<Attended> {
        if let Some(output) = output {
            output.expect_writable(operands.named())?;
        }
        let sink = operands.sink.as_ref().map(|sink| self.widened(sink)).transpose()?;
        let operands = Operands { sink, ..self.readable(operands)? };
        let Operands { q, k, v, masks, biases, relative, rotary, sink, sequences } = &operands;
        let dtype = q.dtype();
        let layout = output.map_or(layout, |output| output.layout().clone());
        let stored = match output {
            Some(output) => output.stored(),
            None if is_wide(&layout) => dtype,
            None => Dtype::F32,
        };
        if stored != Dtype::F32 && !is_wide(&layout) {
            return Err(value_error!(
                "an output of {stored} must have rows, strides and an offset of whole fours: shape {:?}, strides {:?}, \
                 offset {}",
                layout.shape(),
                layout.strides(),
                layout.offset()
            ));
        }
        let tuned = match sequences {
            // Three passes accumulate their output in f32.
            None => (self.gpu.tuned(&operands.tuning_key(problem)))
                .filter(|found| *found != Method::ThreePasses || output.is_none() || stored == Dtype::F32),
            Some(_) => None,
        };
        let planned = AttentionOperands {
            q: q.operand(),
            k: k.operand(),
            v: v.operand(),
            output: Operand { layout: &layout, stored },
            masks: masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
            biases: biases.iter().map(Tensor::layout).collect(),
            relative: relative.as_ref().map(Relative::operand),
            rotary: rotary.as_ref().map(|(rotation, rows)| rotation.operand(rows)),
            sink: sink.as_ref().map(Tensor::layout),
            lse: wanted.lse,
            weights: wanted.weights == Weights::PerHead,
            averaged: wanted.weights == Weights::Averaged,
            stage: wanted.scores,
            method,
            tuned,
        };
        let operations = match sequences {
            None => problem.operations(),
            Some(sequences) => {
                let of = |&Sequence { len_q, len_k, .. }: &Sequence| {
                    Problem { len_q, len_k, ..problem.clone() }.operations()
                };
                sequences.iter().map(of).sum()
            }
        };
        let plan = self.accepted(operations, |capabilities| match sequences {
            None => plan::attention(problem, &planned, capabilities),
            Some(sequences) => plan::packed(problem, &planned, sequences, capabilities),
        })?;
        let weights = self.planned("weights", &plan.weights, dtype)?;
        let averaged = self.planned("averaged weights", &plan.averaged, dtype)?;
        let stage = self.planned("scores", &plan.stage, dtype)?;
        let of_lse = Layout::contiguous(&[problem.batch, problem.heads_q, problem.len_q])?;
        let lse = self.planned("lse", &wanted.lse.then_some(of_lse), Dtype::F32)?;
        let output = match output {
            Some(output) if plan.output == stored => output.clone(),
            Some(_) => {
                return Err(value_error!(
                    "three passes accumulate their output in f32; an output buffer of {stored} needs the fused method"
                ));
            }
            None => self.output_stored("output", layout.clone(), dtype, plan.output)?,
        };
        let mut tensors = scored(&operands);
        tensors.extend([(Slot::V, v), (Slot::Output, &output)]);
        if let Some((rotation, _)) = rotary {
            tensors.extend([(Slot::Angles, &rotation.fused), (Slot::Rotations, &rotation.table)]);
        }
        let optional = [
            (Slot::Sink, sink),
            (Slot::Lse, &lse),
            (Slot::Weights, &weights),
            (Slot::Averaged, &averaged),
            (Slot::Stage, &stage),
        ];
        tensors.extend(optional.into_iter().filter_map(|(slot, tensor)| Some((slot, tensor.as_ref()?))));
        self.bind(plan, &tensors)?;
        let scores = match wanted.scores {
            Some(ScoreStage::Weights) => weights.clone(),
            _ => stage,
        };
        let weights = match wanted.weights {
            Weights::None => None,
            Weights::PerHead => weights,
            Weights::Averaged => averaged,
        };
        Ok(Attended { output, lse, weights, scores })
    }

    pub(super) fn inspect(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        lse: &Tensor,
        chosen: &Chosen,
    ) -> Result<Inspected> {
        let operands = self.readable(operands)?;
        let Operands { q, k, masks, biases, relative, .. } = &operands;
        let lse = &self.widened(lse)?;
        let plan = plan::inspect(
            problem,
            &InspectOperands {
                q: q.operand(),
                k: k.operand(),
                lse: lse.layout(),
                masks: masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
                biases: biases.iter().map(Tensor::layout).collect(),
                relative: relative.as_ref().map(Relative::operand),
                heads: &chosen.heads,
                queries: chosen.queries.clone(),
                weights: chosen.weights,
                column_sums: chosen.column_sums,
                entropy: chosen.entropy,
            },
            &*self.capabilities_for(problem.operations())?,
        )?;
        let weights = self.planned("weights", &plan.weights, q.dtype())?;
        let column_sums = self.planned("column sums", &plan.column_sums, Dtype::F32)?;
        let entropy = self.planned("entropies", &plan.entropy, Dtype::F32)?;
        let results = [(Slot::Weights, &weights), (Slot::ColumnSums, &column_sums), (Slot::Entropy, &entropy)];
        let mut tensors = scored(&operands);
        tensors.push((Slot::Lse, lse));
        tensors.extend(results.into_iter().filter_map(|(slot, tensor)| Some((slot, tensor.as_ref()?))));
        self.bind(plan, &tensors)?;
        Ok(Inspected { weights, column_sums, entropy })
    }

    pub(super) fn softmax(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        let rank = x.layout().rank();
        // Move the axis to the end; the others become three axes.
        let mut order: Vec<usize> = (0..rank).filter(|&a| a != axis).collect();
        order.push(axis);
        let mut layout = x.layout().permute(&order)?;
        while layout.rank() < 4 {
            layout = layout.unsqueeze(0)?;
        }
        if layout.rank() > 4 {
            return Err(value_error!("softmax of a tensor with {rank} axes: at most 4 are supported on an adapter"));
        }
        let plan = plan::softmax(Operand { layout: &layout, stored: x.stored() }, self.gpu.capabilities())?;
        let padded = plan.weights.clone().expect("a softmax has a result");
        let out = self.made("softmax", padded, x.dtype(), plan, &[(Slot::Q, x)])?;
        // Back to the caller's axes.
        let mut layout = out.layout().clone();
        while layout.rank() > rank {
            layout = layout.select(0, 0)?;
        }
        let mut back = vec![0; rank];
        for (at, &a) in order.iter().enumerate() {
            back[a] = at;
        }
        Ok(out.with_layout(layout.permute(&back)?))
    }

    /// X `[b, h, i, d]` rotated by the angles of its rows, in X's memory order.
    pub(super) fn rotate(&mut self, x: &Tensor, rotation: &Rotation, rows: &Rows) -> Result<Tensor> {
        let layout = in_order_of(x.layout(), x.four_axes())?;
        let Rotation { table, pairs, .. } = rotation;
        let plan = plan::rotate(x.operand(), &layout, table.layout(), *pairs, rows, self.gpu.capabilities())?;
        self.made("rotated rows", layout, x.dtype(), plan, &[(Slot::Q, x), (Slot::K, table)])
    }
}
