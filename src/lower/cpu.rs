//! Calls on the CPU backend: passes tensors as slices and layouts, and returns results as tensors.

use crate::call::{Attended, BackwardCall, DistanceGradient, Gradients, Inspected, Mask, Operands, Rotation};
use crate::cpu::{self, Buffer, Inputs, MaskView, Outputs, View};
use crate::error::{INSTEAD_OF_AVERAGED, INSTEAD_OF_INSPECTED, Result};
use crate::memory::check_floats;
use crate::problem::{Chosen, Dtype, Layout, Problem, Rows, Sequence, Wanted, Weights};
use crate::tensor::{Storage, Tensor};

pub(super) fn view(tensor: &Tensor) -> View<'_> {
    match tensor.storage() {
        Storage::Cpu(data) => View { data, layout: tensor.layout() },
        _ => unreachable!("devices and types are checked before"),
    }
}

/// The buffer of a tensor, and its layout there.
pub(super) fn buffer(tensor: &Tensor) -> (&Buffer, &Layout) {
    match tensor.storage() {
        Storage::Cpu(data) => (data, tensor.layout()),
        _ => unreachable!("devices and types are checked before"),
    }
}

fn mask_view(mask: &Mask) -> MaskView<'_> {
    match mask.tensor().storage() {
        Storage::CpuBool(data) => MaskView { data, layout: mask.tensor().layout(), meaning: mask.meaning() },
        _ => unreachable!("devices and types are checked before"),
    }
}

fn inputs(operands: &Operands) -> Inputs<'_> {
    Inputs {
        q: view(&operands.q),
        k: view(&operands.k),
        v: view(&operands.v),
        masks: operands.masks.iter().map(mask_view).collect(),
        biases: operands.biases.iter().map(view).collect(),
        relative: operands.relative.as_ref().map(|relative| (view(&relative.table), relative.operand())),
        sink: operands.sink.as_ref().map(view),
    }
}

/// The result of `compute` in this layout; an error if it does not fit in memory.
pub(super) fn made<B: Into<Buffer>>(
    what: &str,
    layout: Layout,
    dtype: Dtype,
    compute: impl FnOnce(&Layout) -> B,
) -> Result<Tensor> {
    check_floats(what, layout.shape())?;
    let data = compute(&layout);
    Ok(Tensor::from_cpu(data, layout, dtype))
}

pub(super) fn attention(problem: &Problem, operands: &Operands, wanted: Wanted, layout: Layout) -> Result<Attended> {
    let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = *problem;
    let square = [batch, heads_q, len_q, len_k];
    check_floats("the output", &[batch, heads_q, len_q, dim_v.max(1)])?;
    if wanted.weights != Weights::None || wanted.scores.is_some() {
        // The mean over heads is computed from the weights of all heads.
        check_floats("the weights", &square).map_err(|error| error.or_rather(INSTEAD_OF_AVERAGED))?;
    }
    let answer = match &operands.sequences {
        None => cpu::attention(problem, &inputs(operands), wanted, &layout),
        Some(sequences) => packed(problem, operands, sequences, wanted, &layout)?,
    };
    let dtype = operands.q.dtype();
    let tensor = |data: Option<Buffer>, shape: &[usize], dtype: Dtype| -> Result<Option<Tensor>> {
        data.map(|data| Ok(Tensor::from_cpu(data, Layout::contiguous(shape)?, dtype))).transpose()
    };
    let averaged = [batch, len_q, len_k];
    let of_weights = if wanted.weights == Weights::Averaged { &averaged[..] } else { &square };
    Ok(Attended {
        output: Tensor::from_cpu(answer.output, layout, dtype),
        lse: tensor(answer.lse, &[batch, heads_q, len_q], Dtype::F32)?,
        weights: tensor(answer.weights, of_weights, dtype)?,
        scores: tensor(answer.scores, &square, dtype)?,
    })
}

/// The gradients of a call whose operands are rotated in `operands`.
pub(super) fn backward(
    problem: &Problem,
    call: &BackwardCall,
    operands: &Operands,
    mut rotate: impl FnMut(&Tensor, &Rotation, &Rows) -> Result<Tensor>,
) -> Result<Gradients> {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = *problem;
    let (of_q, of_k) = ([batch, heads_q, len_q, dim_k], [batch, heads_kv, len_k, dim_k]);
    let of_v = [batch, heads_kv, len_k, dim_v];
    for (what, shape) in [("the gradient of Q", of_q), ("the gradient of K", of_k), ("the gradient of V", of_v)] {
        check_floats(what, &shape)?;
    }
    let none = (Vec::new(), 0);
    let (columns, column_count) = match &call.distance {
        Some(distance) => (distance.columns.columns.clone(), distance.columns.count),
        None => none,
    };
    let inputs = inputs(operands);
    let read = cpu::BackwardInputs {
        inputs: &inputs,
        output: view(&call.output),
        lse: view(&call.lse),
        d_output: call.d_output.as_ref().map(view),
        d_lse: call.d_lse.as_ref().map(view),
        d_weights: call.d_weights.as_ref().map(|(x, factor)| (view(x), *factor)),
        bias_shapes: &call.bias_shapes,
        columns: &columns,
        column_count,
    };
    let computed = cpu::backward(problem, &read, call.wanted);
    let tensor = |data: Option<Buffer>, shape: &[usize], dtype: Dtype| -> Result<Option<Tensor>> {
        data.map(|data| Ok(Tensor::from_cpu(data, Layout::contiguous(shape)?, dtype))).transpose()
    };
    let mut gradients = Gradients {
        q: tensor(computed.q, &of_q, operands.q.dtype())?,
        k: tensor(computed.k, &of_k, operands.k.dtype())?,
        v: tensor(computed.v, &of_v, operands.v.dtype())?,
        sink: tensor(computed.sink, &[heads_q], Dtype::F32)?,
        scale: tensor(computed.scale.map(|x| Buffer::from(vec![x as f32])), &[1], Dtype::F32)?,
        ..Gradients::default()
    };
    for (data, shape) in computed.biases.into_iter().zip(&call.bias_shapes) {
        gradients.biases.extend(tensor(Some(data), shape, Dtype::F32)?);
    }
    if let Some((rotation, [rows_q, rows_k])) = &call.operands.rotary {
        let back = rotation.back();
        for (x, rows) in [(&mut gradients.q, rows_q), (&mut gradients.k, rows_k)] {
            if let Some(dx) = x {
                *x = Some(rotate(dx, &back, rows)?);
            }
        }
    }
    if let (Some(sums), Some(distance)) = (computed.distance, &call.distance) {
        distance_gradient(problem, call, distance, &sums, &mut gradients)?;
    }
    Ok(gradients)
}

/// The gradient of a bias by distance, from the sums `[b, hq, i, column]`; and what relative keys add to others.
fn distance_gradient(
    problem: &Problem,
    call: &BackwardCall,
    distance: &DistanceGradient,
    sums: &[f64],
    gradients: &mut Gradients,
) -> Result<()> {
    let Problem { heads_q, len_q, dim_k, .. } = *problem;
    let count = distance.columns.count;
    let rows = || sums.chunks_exact(count.max(1)).enumerate();
    let index = |row: usize| [row / len_q / heads_q, row / len_q % heads_q, row % len_q];
    let tensor = |data: Vec<f64>, shape: &[usize]| -> Result<Tensor> {
        let data: Buffer = data.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_cpu(data, Layout::contiguous(shape)?, Dtype::F32))
    };
    let Some(keys) = &distance.keys else {
        let mut totals = vec![0.0; heads_q * count];
        for (row, sums) in rows() {
            let to = &mut totals[index(row)[1] * count..][..count];
            to.iter_mut().zip(sums).for_each(|(to, x)| *to += x);
        }
        gradients.distance = call.wanted.distance.then(|| tensor(totals, &[1, heads_q, 1, count])).transpose()?;
        return Ok(());
    };
    // The queries as they were before their rotation.
    let (keys, queries, scale) = (view(keys), view(&call.operands.q), f64::from(problem.scale));
    let mut of_keys = vec![0.0; count * dim_k];
    let mut of_scale = 0.0;
    let mut dq = gradients.q.take();
    for (row, sums) in rows() {
        let [b, h, i] = index(row);
        for d in 0..dim_k {
            let q = f64::from(queries.data[queries.layout.at(&[b, h, i, d])]);
            let mut of_query = 0.0;
            for (column, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum != 0.0) {
                of_query += sum * f64::from(keys.data[keys.layout.at(&[column, d])]);
                of_keys[column * dim_k + d] += scale * sum * q;
            }
            if of_query != 0.0 {
                of_scale += of_query * q;
                if let Some(dq) = &mut dq {
                    let at = dq.layout().at(&[b, h, i, d]);
                    dq.cpu_mut()[at] += (scale * of_query) as f32;
                }
            }
        }
    }
    gradients.q = dq;
    if let Some(total) = &mut gradients.scale {
        total.cpu_mut()[0] += of_scale as f32;
    }
    gradients.distance = call.wanted.distance.then(|| tensor(of_keys, &[1, 1, count, dim_k])).transpose()?;
    Ok(())
}

/// Computes packed sequences one after another.
fn packed(
    problem: &Problem,
    operands: &Operands,
    sequences: &[Sequence],
    wanted: Wanted,
    layout: &Layout,
) -> Result<Outputs> {
    let Problem { heads_q, len_q, dim_v, .. } = *problem;
    let mut output = Buffer::filled(layout.end(), 0.0);
    let mut lse = Buffer::filled(heads_q * len_q, f32::NEG_INFINITY);
    for one in sequences {
        let cut = |x: &Tensor, first, len| x.narrow(2, first, len);
        let operands = Operands {
            q: cut(&operands.q, one.first_query, one.len_q)?,
            k: cut(&operands.k, one.first_key, one.len_k)?,
            v: cut(&operands.v, one.first_key, one.len_k)?,
            ..operands.clone()
        };
        let shape = Problem { len_q: one.len_q, len_k: one.len_k, bands: vec![one.band], ..problem.clone() };
        let rows = Layout::contiguous(&[1, heads_q, one.len_q, dim_v])?;
        let answer = cpu::attention(&shape, &inputs(&operands), wanted, &rows);
        for h in 0..heads_q {
            for i in 0..one.len_q {
                let to = layout.at(&[0, h, one.first_query + i, 0]);
                output[to..][..dim_v].copy_from_slice(&answer.output[(h * one.len_q + i) * dim_v..][..dim_v]);
            }
            if let Some(rows) = &answer.lse {
                lse[h * len_q + one.first_query..][..one.len_q].copy_from_slice(&rows[h * one.len_q..][..one.len_q]);
            }
        }
    }
    Ok(Outputs { output, lse: wanted.lse.then_some(lse), weights: None, scores: None })
}

pub(super) fn inspect(problem: &Problem, operands: &Operands, lse: &Tensor, chosen: &Chosen) -> Result<Inspected> {
    let [weights, column_sums, entropy] = chosen.layouts(problem)?;
    for (what, layout) in [("the weights", &weights), ("the column sums", &column_sums), ("the entropies", &entropy)] {
        let fits = layout.as_ref().map_or(Ok(()), |layout| check_floats(what, layout.shape()));
        fits.map_err(|error| error.or_rather(INSTEAD_OF_INSPECTED))?;
    }
    let answer = cpu::inspect(problem, &inputs(operands), view(lse), chosen);
    let tensor =
        |data: Buffer, layout: Option<Layout>, dtype| layout.map(|layout| Tensor::from_cpu(data, layout, dtype));
    Ok(Inspected {
        weights: tensor(answer.weights, weights, operands.q.dtype()),
        column_sums: tensor(answer.column_sums, column_sums, Dtype::F32),
        entropy: tensor(answer.entropy, entropy, Dtype::F32),
    })
}

pub(super) fn merge(outputs: [&Tensor; 2], lses: [&Tensor; 2], layout: Layout) -> Result<[Tensor; 2]> {
    check_floats("the merged output", layout.shape())?;
    let [output, lse] = cpu::merge(outputs.map(view), lses.map(view), &layout);
    let of_lse = Layout::contiguous(&layout.shape()[..3])?;
    Ok([Tensor::from_cpu(output, layout, outputs[0].dtype()), Tensor::from_cpu(lse, of_lse, Dtype::F32)])
}
