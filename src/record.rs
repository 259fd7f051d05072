//! A list of operations on one device. On the CPU each is carried out at once; on an adapter they
//! are planned and collected, then run in one compute pass.

#[cfg(feature = "cpu")]
use crate::attention::Weights;
use crate::attention::{Attended, Operands, Wanted, in_order_of, output_layout};
#[cfg(feature = "cpu")]
use crate::cpu;
use crate::device::Device;
#[cfg(feature = "cpu")]
use crate::error::{INSTEAD_OF_AVERAGED, INSTEAD_OF_INSPECTED};
use crate::error::{Result, value_error};
use crate::gpu;
use crate::inspect::{Chosen, Inspected};
#[cfg(feature = "cpu")]
use crate::memory::check_floats;
use crate::position::Rotation;
#[cfg(feature = "cpu")]
use crate::problem::Dtype;
use crate::problem::{Layout, Place, Problem, Rows, Sequence};
use crate::tensor::Tensor;

pub(crate) enum Recording {
    Gpu(gpu::Recording),
    #[cfg(feature = "cpu")]
    Cpu,
}

impl Recording {
    pub fn new(device: &Device) -> Recording {
        match device {
            Device::Gpu(gpu) => Recording::Gpu(gpu::Recording::new(gpu)),
            #[cfg(feature = "cpu")]
            Device::Cpu => Recording::Cpu,
        }
    }

    /// For a step of a sequence, whose parameters are new every time.
    pub fn for_step(device: &Device) -> Recording {
        match device {
            Device::Gpu(gpu) => Recording::Gpu(gpu::Recording::for_step(gpu)),
            #[cfg(feature = "cpu")]
            Device::Cpu => Recording::Cpu,
        }
    }

    /// For work that is encoded, not submitted.
    pub fn for_encoder(gpu: &gpu::Gpu) -> Recording {
        Recording::Gpu(gpu::Recording::for_encoder(gpu))
    }

    pub fn device(&self) -> &Device {
        match self {
            Recording::Gpu(recording) => recording.device(),
            #[cfg(feature = "cpu")]
            Recording::Cpu => &Device::Cpu,
        }
    }

    /// A boolean tensor of this call's own.
    pub fn bools(&self, shape: &[usize], data: &[bool]) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.bools(shape, data),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Tensor::from_bools(Device::Cpu, shape, data),
        }
    }

    /// One number, repeated.
    pub fn number(&self, value: f32, shape: &[usize]) -> Result<Tensor> {
        let layout = Layout::strided(shape, &vec![0; shape.len()], 0, 1)?;
        Ok(match self {
            Recording::Gpu(recording) => recording.number(value, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Tensor::from_cpu(vec![value], layout, crate::Dtype::F32),
        })
    }

    /// `X·Wᵀ + b` for X `[batch, len, in]`, W `[out, in]`, b `[out]`, followed in every batch entry by
    /// one row per entry of `extra` (`None`: zeros): `[batch, len + extra, out]`.
    pub fn project(
        &mut self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        extra: &[Option<&Tensor>],
    ) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.project(x, w, bias, extra),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let shape = [x.shape()[0], x.shape()[1] + extra.len(), w.shape()[0]];
                check_floats("a projection", &shape)?;
                let views: Vec<_> = extra.iter().map(|row| row.map(cpu::View::of)).collect();
                let layout = Layout::contiguous(&shape)?;
                let out = cpu::project(cpu::View::of(x), cpu::View::of(w), bias.map(cpu::View::of), &views);
                Ok(Tensor::from_cpu(out, layout, x.dtype()))
            }
        }
    }

    /// Attention over operands that fit `problem`; `output`, if given, is written in place.
    pub fn attention(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        wanted: Wanted,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let layout = output_layout(problem, operands.q.layout())?;
        if let Some(output) = output
            && output.shape() != layout.shape()
        {
            return Err(value_error!("the output tensor is {:?}, but must be {:?}", output.shape(), layout.shape()));
        }
        match self {
            Recording::Gpu(recording) => recording.attention(problem, operands, wanted, output, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                if output.is_some() {
                    return Err(value_error!(
                        "encoding into a given output needs an adapter; the CPU backend has none"
                    ));
                }
                let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = *problem;
                let square = [batch, heads_q, len_q, len_k];
                check_floats("the output", &[batch, heads_q, len_q, dim_v.max(1)])?;
                if wanted.weights != Weights::None || wanted.scores.is_some() {
                    // The mean over heads is taken of all of them.
                    check_floats("the weights", &square).map_err(|error| error.or_rather(INSTEAD_OF_AVERAGED))?;
                }
                let answer = cpu::attention(problem, &inputs(operands), wanted, &layout);
                let dtype = operands.q.dtype();
                let tensor = |data: Vec<f32>, shape: &[usize]| -> Result<Tensor> {
                    Ok(Tensor::from_cpu(data, Layout::contiguous(shape)?, dtype))
                };
                Ok(Attended {
                    output: Tensor::from_cpu(answer.output, layout, dtype),
                    lse: answer
                        .lse
                        .map(|lse| tensor(lse, &[batch, heads_q, len_q])?.with_dtype(crate::Dtype::F32))
                        .transpose()?,
                    weights: answer
                        .weights
                        .map(|weights| match wanted.weights {
                            Weights::Averaged => tensor(weights, &[batch, len_q, len_k]),
                            _ => tensor(weights, &square),
                        })
                        .transpose()?,
                    scores: answer.scores.map(|scores| tensor(scores, &square)).transpose()?,
                })
            }
        }
    }

    /// Copies rows of X `[b, h, i, d]` into a cache Y `[b, h, rows, d]`: one place per batch entry.
    pub fn scatter(&mut self, x: &Tensor, y: &mut Tensor, places: &[Place]) -> Result<()> {
        match self {
            Recording::Gpu(recording) => recording.scatter(x, y, places),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let layout = y.layout().clone();
                let dtype = y.dtype();
                cpu::scatter(cpu::View::of(x), y.cpu_mut(), &layout, places, |x| dtype.round(x));
                Ok(())
            }
        }
    }

    /// X `[b, h, i, d]` turned by the angles of its rows, in X's memory order.
    pub fn rotate(&mut self, x: &Tensor, rotation: Rotation<'_>, rows: &Rows) -> Result<Tensor> {
        let &[b, h, i, d] = x.shape() else { unreachable!("four axes") };
        let layout = in_order_of(x.layout(), [b, h, i, d])?;
        match self {
            Recording::Gpu(recording) => recording.rotate(x, rotation, rows, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("rotated rows", layout.shape())?;
                let Rotation { table, pairs, interleaved, .. } = rotation;
                let y = cpu::rotate(cpu::View::of(x), cpu::View::of(table), pairs, interleaved, rows, &layout);
                Ok(Tensor::from_cpu(y, layout, x.dtype()))
            }
        }
    }

    /// X `[b, i, d]` plus the rows of a table `[row, d]`, row-major.
    pub fn add_positions(&mut self, x: &Tensor, table: &Tensor, rows: &Rows) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.add_positions(x, table, rows),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("embeddings", x.shape())?;
                let y = cpu::add_positions(cpu::View::of(x), cpu::View::of(table), rows);
                Ok(Tensor::from_cpu(y, Layout::contiguous(x.shape())?, x.dtype()))
            }
        }
    }

    /// `factor · X[b, h, i, columns[j − i + len_q − 1]]` for X that broadcasts to `[b, h, i, column]`; the result
    /// has `shape` and is row-major.
    pub fn relative(&mut self, x: &Tensor, columns: &[u32], shape: [usize; 4], factor: f32) -> Result<Tensor> {
        let [b, h, i, len_k] = shape;
        let x = x.with_layout(x.layout().broadcast_to(&[b, h, i, x.shape()[3]])?);
        match self {
            Recording::Gpu(recording) => recording.relative(&x, columns, len_k, factor),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("a bias", &shape)?;
                let bias = cpu::relative(cpu::View::of(&x), columns, len_k, factor);
                Ok(Tensor::from_cpu(bias, Layout::contiguous(&shape)?, x.dtype()))
            }
        }
    }

    /// X (at most four axes) copied into row-major order.
    pub fn row_major(&mut self, x: &Tensor) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.row_major(x),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("a row-major copy", x.shape())?;
                let view = cpu::View::of(x);
                let copied = view.layout.positions().map(|at| view.data[at]).collect();
                Ok(Tensor::from_cpu(copied, Layout::contiguous(x.shape())?, x.dtype()))
            }
        }
    }

    /// RMSNorm, or where `centred` LayerNorm, over the last axis of X (four axes), row-major; `weight` and `bias`
    /// `[d]`.
    pub fn normalise(
        &mut self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        centred: bool,
        epsilon: f32,
    ) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.normalise(x, weight, bias, centred, epsilon),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("normalised rows", x.shape())?;
                let views = (cpu::View::of(x), cpu::View::of(weight), bias.map(cpu::View::of));
                let y = cpu::normalise(views.0, views.1, views.2, centred, epsilon);
                Ok(Tensor::from_cpu(y, Layout::contiguous(x.shape())?, x.dtype()))
            }
        }
    }

    /// `X · σ(G)` of two tensors `[b, i, d]`, row-major.
    pub fn gate(&mut self, x: &Tensor, g: &Tensor) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.gate(x, g),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("gated rows", x.shape())?;
                let y = cpu::gate(cpu::View::of(x), cpu::View::of(g));
                Ok(Tensor::from_cpu(y, Layout::contiguous(x.shape())?, x.dtype()))
            }
        }
    }

    /// Joins two results `[b, h, i, d]` over disjoint keys with their LSEs `[b, h, i]`; `layout` is the
    /// output's.
    pub fn merge(&mut self, outputs: [&Tensor; 2], lses: [&Tensor; 2], layout: Layout) -> Result<[Tensor; 2]> {
        match self {
            Recording::Gpu(recording) => recording.merge(outputs, lses, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                check_floats("the merged output", layout.shape())?;
                let [output, lse] = cpu::merge(outputs.map(cpu::View::of), lses.map(cpu::View::of), &layout);
                let lse_layout = Layout::contiguous(&layout.shape()[..3])?;
                Ok([
                    Tensor::from_cpu(output, layout, outputs[0].dtype()),
                    Tensor::from_cpu(lse, lse_layout, crate::Dtype::F32),
                ])
            }
        }
    }

    /// Weights of chosen heads and queries from their LSE `[b, hq, i]`; `operands.v` is not read.
    pub fn inspect(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        lse: &Tensor,
        chosen: &Chosen,
    ) -> Result<Inspected> {
        match self {
            Recording::Gpu(recording) => recording.inspect(problem, operands, lse, chosen),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let [weights, column_sums, entropy] = chosen.layouts(problem)?;
                for (what, layout) in
                    [("the weights", &weights), ("the column sums", &column_sums), ("the entropies", &entropy)]
                {
                    layout
                        .as_ref()
                        .map_or(Ok(()), |layout| check_floats(what, layout.shape()))
                        .map_err(|error| error.or_rather(INSTEAD_OF_INSPECTED))?;
                }
                let answer = cpu::inspect(problem, &inputs(operands), cpu::View::of(lse), chosen);
                let tensor = |data: Vec<f32>, layout: Option<Layout>, dtype: Dtype| {
                    layout.map(|layout| Tensor::from_cpu(data, layout, dtype))
                };
                Ok(Inspected {
                    weights: tensor(answer.weights, weights, operands.q.dtype()),
                    column_sums: tensor(answer.column_sums, column_sums, Dtype::F32),
                    entropy: tensor(answer.entropy, entropy, Dtype::F32),
                })
            }
        }
    }

    /// Sequences one behind another, operands `[1, h, total, d]`: output `[1, hq, total, d]` in the memory
    /// order of the query, LSE `[1, hq, total]`.
    pub fn packed(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        sequences: &[Sequence],
        wanted: Wanted,
    ) -> Result<Attended> {
        let layout = output_layout(problem, operands.q.layout())?;
        match self {
            Recording::Gpu(recording) => recording.packed(problem, operands, sequences, wanted, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let Problem { heads_q, len_q, dim_v, .. } = *problem;
                check_floats("the output", &[heads_q, len_q, dim_v.max(1)])?;
                let mut output = vec![0.0; layout.end()];
                let mut lse = vec![f32::NEG_INFINITY; heads_q * len_q];
                for one in sequences {
                    let cut = |x: &Tensor, first, len| x.narrow(2, first, len);
                    let operands = Operands {
                        q: cut(&operands.q, one.first_query, one.len_q)?,
                        k: cut(&operands.k, one.first_key, one.len_k)?,
                        v: cut(&operands.v, one.first_key, one.len_k)?,
                        ..operands.clone()
                    };
                    let shape =
                        Problem { len_q: one.len_q, len_k: one.len_k, bands: vec![one.band], ..problem.clone() };
                    let rows = Layout::contiguous(&[1, heads_q, one.len_q, dim_v])?;
                    let answer = cpu::attention(&shape, &inputs(&operands), Wanted { lse: true, ..wanted }, &rows);
                    for h in 0..heads_q {
                        for i in 0..one.len_q {
                            let to = layout.at(&[0, h, one.first_query + i, 0]);
                            output[to..][..dim_v]
                                .copy_from_slice(&answer.output[(h * one.len_q + i) * dim_v..][..dim_v]);
                        }
                        if let Some(rows) = &answer.lse {
                            lse[h * len_q + one.first_query..][..one.len_q]
                                .copy_from_slice(&rows[h * one.len_q..][..one.len_q]);
                        }
                    }
                }
                let dtype = operands.q.dtype();
                let lse_layout = Layout::contiguous(&[1, heads_q, len_q])?;
                Ok(Attended {
                    output: Tensor::from_cpu(output, layout, dtype),
                    lse: wanted.lse.then(|| Tensor::from_cpu(lse, lse_layout, Dtype::F32)),
                    weights: None,
                    scores: None,
                })
            }
        }
    }

    /// Softmax over one axis; the result is row-major.
    pub fn softmax(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        match self {
            Recording::Gpu(recording) => recording.softmax(x, axis),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let out = cpu::softmax(cpu::View::of(x), axis);
                Ok(Tensor::from_cpu(out, Layout::contiguous(x.shape())?, x.dtype()))
            }
        }
    }

    /// Submits what was recorded, and reports what the driver had to say.
    pub async fn submit(self) -> Result<()> {
        match self {
            Recording::Gpu(recording) => recording.submit().await,
            #[cfg(feature = "cpu")]
            Recording::Cpu => Ok(()),
        }
    }

    /// As [`Recording::submit`]; waits for the end and tells what ran.
    pub async fn submit_profiled(self) -> Result<gpu::Profile> {
        match self {
            Recording::Gpu(recording) => recording.submit_profiled().await,
            #[cfg(feature = "cpu")]
            Recording::Cpu => Ok(gpu::Profile::default()),
        }
    }

    /// What was recorded, as data; a recording for a step.
    #[cfg(all(feature = "export", not(target_arch = "wasm32")))]
    pub async fn export(self, attended: &Attended) -> Result<gpu::ExportedCall> {
        match self {
            Recording::Gpu(recording) => recording.export(attended).await,
            #[cfg(feature = "cpu")]
            Recording::Cpu => Err(value_error!("a call is exported from an adapter; the CPU backend has no kernels")),
        }
    }

    /// Writes what was recorded into the caller's encoder.
    pub fn encode(self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        match self {
            Recording::Gpu(recording) => recording.encode(encoder),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Err(value_error!("encoding needs an adapter; the CPU backend has none")),
        }
    }

    /// What was recorded, for the caller's encoders.
    pub fn slices(self) -> Result<gpu::EncodeSlices> {
        match self {
            Recording::Gpu(recording) => recording.slices(),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Err(value_error!("encoding needs an adapter; the CPU backend has none")),
        }
    }
}

#[cfg(feature = "cpu")]
fn inputs(operands: &Operands) -> cpu::Inputs<'_> {
    cpu::Inputs {
        q: cpu::View::of(&operands.q),
        k: cpu::View::of(&operands.k),
        v: cpu::View::of(&operands.v),
        masks: operands.masks.iter().map(cpu::MaskView::of).collect(),
        biases: operands.biases.iter().map(cpu::View::of).collect(),
        relative: operands.relative.as_ref().map(|relative| (cpu::View::of(&relative.table), relative.operand())),
        sink: operands.sink.as_ref().map(cpu::View::of),
    }
}
