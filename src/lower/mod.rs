//! Lowers operations on tensors to steps on one device. The CPU backend executes each operation at once; on an adapter
//! they are planned and collected, then run in one compute pass.

mod backward;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(all(feature = "export", not(target_arch = "wasm32")))]
mod export;
mod gpu;

use crate::call::{Attended, BackwardCall, Gradients, Inspected, Operands, Rotation, output_layout};
#[cfg(feature = "cpu")]
use crate::cpu as backend;
use crate::device::Device;
use crate::error::{Result, value_error};
use crate::gpu::{EncodeSlices, Gpu, Profile, Steps};
use crate::kernels::{Method, Slot, plan};
use crate::problem::{Chosen, Dtype, Layout, Place, Problem, Rows, Wanted, in_order_of};
use crate::tensor::Tensor;
use crate::wait::apart;
#[cfg(feature = "cpu")]
use cpu::view;

pub(crate) enum Recording {
    Gpu(Steps),
    #[cfg(feature = "cpu")]
    Cpu,
}

impl Recording {
    pub fn new(device: &Device) -> Recording {
        Recording::with(device, Steps::new)
    }

    /// For a decoding step, whose parameters change every time.
    pub fn for_step(device: &Device) -> Recording {
        Recording::with(device, Steps::for_step)
    }

    fn with(device: &Device, steps: fn(&Gpu) -> Steps) -> Recording {
        match device {
            Device::Gpu(gpu) => Recording::Gpu(steps(gpu)),
            #[cfg(feature = "cpu")]
            Device::Cpu => Recording::Cpu,
        }
    }

    /// For work on tensors of `device` that is encoded, not submitted.
    pub fn for_encoders(gpu: &Gpu, device: &Device) -> Result<Recording> {
        Device::from(gpu).expect_same(device)?;
        Ok(Recording::Gpu(Steps::for_encoders(gpu, None)))
    }

    /// Like [`Recording::for_encoders`], for one known encoder.
    pub fn for_encoder(gpu: &Gpu, encoder: &wgpu::CommandEncoder, device: &Device) -> Result<Recording> {
        Device::from(gpu).expect_same(device)?;
        Ok(Recording::Gpu(Steps::for_encoders(gpu, Some(encoder))))
    }

    /// Creates a boolean tensor for this call.
    pub fn bools(&self, shape: &[usize], data: &[bool]) -> Result<Tensor> {
        match self {
            Recording::Gpu(steps) => Tensor::from_bools(&steps.gpu, shape, data),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Tensor::from_bools(Device::Cpu, shape, data),
        }
    }

    /// One number, repeated.
    pub fn number(&self, value: f32, shape: &[usize]) -> Result<Tensor> {
        let layout = Layout::strided(shape, &vec![0; shape.len()], 0, 1)?;
        Ok(match self {
            Recording::Gpu(steps) => steps.number(value, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Tensor::from_cpu(vec![value], layout, Dtype::F32),
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
        let layout = Layout::contiguous(&[x.shape()[0], x.shape()[1] + extra.len(), w.shape()[0]])?;
        match self {
            Recording::Gpu(steps) => {
                // Bias 0 is the bias; the following ones are the extra rows.
                let mut widen = |row: &Option<&Tensor>| row.map(|row| steps.widened(row)).transpose();
                let rows = [bias].iter().chain(extra).map(&mut widen).collect::<Result<Vec<_>>>()?;
                let layouts: Vec<_> = rows.iter().map(|row| row.as_ref().map(Tensor::layout)).collect();
                let operations = 2.0 * x.layout().len() as f64 * w.shape()[0] as f64;
                let plan = steps.accepted(operations, |capabilities| {
                    plan::project(x.operand(), w.operand(), layouts[0], &layouts[1..], capabilities)
                })?;
                let mut tensors = vec![(Slot::Q, x), (Slot::K, w)];
                tensors.extend(rows.iter().enumerate().filter_map(|(n, row)| Some((Slot::Bias(n), row.as_ref()?))));
                steps.made("projection", layout, x.dtype(), plan, &tensors)
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => cpu::made("a projection", layout, x.dtype(), |_| {
                let extra: Vec<_> = extra.iter().map(|row| row.map(view)).collect();
                backend::project(view(x), cpu::buffer(w), bias.map(view), &extra)
            }),
        }
    }

    /// Attention over operands that fit `problem`. `output`, if given, is written in place. Operands of packed
    /// sequences are `[1, h, total, d]`.
    pub fn attention(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        wanted: Wanted,
        method: Method,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let layout = output_layout(problem, operands.q.layout())?;
        if let Some(output) = output
            && output.shape() != layout.shape()
        {
            return Err(value_error!("the output tensor is {:?}, but must be {:?}", output.shape(), layout.shape()));
        }
        match self {
            Recording::Gpu(steps) => steps.attention(problem, operands, wanted, method, output, layout),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                debug_assert!(output.is_none(), "only an encoder's call has one");
                cpu::attention(problem, &self.rotated(operands)?, wanted, layout)
            }
        }
    }

    /// The gradients of a call; those of biases and of a bias by distance with four axes.
    pub fn backward(&mut self, problem: &Problem, call: &BackwardCall) -> Result<Gradients> {
        match self {
            Recording::Gpu(steps) => steps.backward(problem, call),
            #[cfg(feature = "cpu")]
            Recording::Cpu => cpu::backward(problem, call, &self.rotated(&call.operands)?, |x, rotation, rows| {
                self.rotate(x, rotation, rows)
            }),
        }
    }

    /// Weights of chosen heads and queries, from their LSE `[b, hq, i]`. `operands.v` is not read.
    pub fn inspect(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        lse: &Tensor,
        chosen: &Chosen,
    ) -> Result<Inspected> {
        let operands = &self.rotated(operands)?;
        match self {
            Recording::Gpu(steps) => steps.inspect(problem, operands, lse, chosen),
            #[cfg(feature = "cpu")]
            Recording::Cpu => cpu::inspect(problem, operands, lse, chosen),
        }
    }

    /// Copies rows of X `[b, h, i, d]` into a cache Y `[b, h, rows, d]`, whose rows are padded to whole vec4s. `places`
    /// has one entry per batch entry.
    pub fn scatter(&mut self, x: &Tensor, y: &mut Tensor, places: &[Place]) -> Result<()> {
        match self {
            Recording::Gpu(steps) => {
                if x.shares_buffer(y) {
                    return Err(value_error!(
                        "rows cannot be copied within one buffer: the source is a view of the cache itself"
                    ));
                }
                let plan = plan::scatter(x.operand(), y.operand(), places, steps.gpu.capabilities())?;
                steps.bind(plan, &[(Slot::Q, x), (Slot::Output, y)])
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let (layout, dtype) = (y.layout().clone(), y.dtype());
                backend::scatter(view(x), y.cpu_mut(), &layout, places, |x| dtype.round(x));
                Ok(())
            }
        }
    }

    /// The operands with queries and keys rotated, if there is a rotary.
    fn rotated(&mut self, operands: &Operands) -> Result<Operands> {
        operands.rotated(|x, rotation, rows| self.rotate(x, rotation, rows))
    }

    /// X `[b, h, i, d]` rotated by the angles of its rows, in X's memory order.
    pub fn rotate(&mut self, x: &Tensor, rotation: &Rotation, rows: &Rows) -> Result<Tensor> {
        match self {
            Recording::Gpu(steps) => steps.rotate(x, rotation, rows),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                let layout = in_order_of(x.layout(), x.four_axes())?;
                let Rotation { table, pairs, .. } = rotation;
                cpu::made("rotated rows", layout, x.dtype(), |layout| {
                    backend::rotate(view(x), view(table), *pairs, rows, layout)
                })
            }
        }
    }

    /// X `[b, i, d]` plus the rows of a table `[row, d]`, row-major.
    pub fn add_positions(&mut self, x: &Tensor, table: &Tensor, rows: &Rows) -> Result<Tensor> {
        let layout = Layout::contiguous(x.shape())?;
        match self {
            Recording::Gpu(steps) => {
                let plan = plan::add_positions(x.operand(), table.operand(), rows, steps.gpu.capabilities())?;
                steps.made("embeddings", layout, x.dtype(), plan, &[(Slot::Q, x), (Slot::K, table)])
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                cpu::made("embeddings", layout, x.dtype(), |_| backend::add_positions(view(x), view(table), rows))
            }
        }
    }

    /// `factor · X[b, h, i, columns[j − i + len_q − 1]]` for X that broadcasts to `[b, h, i, column]`; the result
    /// has `shape` and is row-major.
    pub fn relative(&mut self, x: &Tensor, columns: &[u32], shape: [usize; 4], factor: f32) -> Result<Tensor> {
        let [b, h, i, len_k] = shape;
        let x = x.with_layout(x.layout().broadcast_to(&[b, h, i, x.shape()[3]])?);
        let layout = Layout::contiguous(&shape)?;
        match self {
            Recording::Gpu(steps) => {
                let x = steps.widened(&x)?;
                let plan = plan::relative(x.layout(), columns, len_k, factor, steps.gpu.capabilities())?;
                steps.made("a bias", layout, x.dtype(), plan, &[(Slot::Q, &x)])
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                cpu::made("a bias", layout, x.dtype(), |_| backend::relative(view(&x), columns, len_k, factor))
            }
        }
    }

    /// X (at most four axes) copied into row-major order.
    pub fn row_major(&mut self, x: &Tensor) -> Result<Tensor> {
        match self {
            Recording::Gpu(steps) => steps.row_major(x),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                cpu::made("a row-major copy", Layout::contiguous(x.shape())?, x.dtype(), |_| view(x).values())
            }
        }
    }

    /// X in a form for kernels that read only f32.
    pub fn widened(&mut self, x: Tensor) -> Result<Tensor> {
        match self {
            Recording::Gpu(steps) => steps.widened(&x),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Ok(x),
        }
    }

    /// RMSNorm, or LayerNorm if `centred`, over the last axis of X (four axes), row-major; `weight` and `bias` are
    /// `[d]`.
    pub fn normalise(
        &mut self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        centred: bool,
        epsilon: f32,
    ) -> Result<Tensor> {
        let layout = Layout::contiguous(x.shape())?;
        match self {
            Recording::Gpu(steps) => {
                let weight = steps.widened(weight)?;
                let bias = bias.map(|bias| steps.widened(bias)).transpose()?;
                let of_bias = bias.as_ref().map(Tensor::layout);
                let capabilities = steps.gpu.capabilities();
                let plan = plan::normalise(x.operand(), weight.layout(), of_bias, centred, epsilon, capabilities)?;
                let mut tensors = vec![(Slot::Q, x), (Slot::K, &weight)];
                tensors.extend(bias.as_ref().map(|bias| (Slot::Bias(0), bias)));
                steps.made("normalised rows", layout, x.dtype(), plan, &tensors)
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => cpu::made("normalised rows", layout, x.dtype(), |_| {
                backend::normalise(view(x), view(weight), bias.map(view), centred, epsilon)
            }),
        }
    }

    /// `X · σ(G)` of two tensors `[b, i, d]`, row-major.
    pub fn gate(&mut self, x: &Tensor, g: &Tensor) -> Result<Tensor> {
        let layout = Layout::contiguous(x.shape())?;
        match self {
            Recording::Gpu(steps) => {
                let plan = plan::gate(x.operand(), g.operand(), steps.gpu.capabilities())?;
                steps.made("gated rows", layout, x.dtype(), plan, &[(Slot::Q, x), (Slot::K, g)])
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => cpu::made("gated rows", layout, x.dtype(), |_| backend::gate(view(x), view(g))),
        }
    }

    /// Merges two results `[b, h, i, d]` over disjoint keys, using their LSEs `[b, h, i]`; in the memory order of the
    /// first.
    pub fn merge(&mut self, outputs: [&Tensor; 2], lses: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        let layout = in_order_of(outputs[0].layout(), outputs[0].four_axes())?;
        match self {
            Recording::Gpu(steps) => {
                let dtype = outputs[0].dtype();
                let [a, b] = [steps.widened(outputs[0])?, steps.widened(outputs[1])?];
                let [lse_a, lse_b] = [steps.widened(lses[0])?, steps.widened(lses[1])?];
                let of_lses = [lse_a.layout(), lse_b.layout()];
                let plan = plan::merge([a.layout(), b.layout()], of_lses, &layout, steps.gpu.capabilities())?;
                let lse = steps.output("lse", Layout::contiguous(&layout.shape()[..3])?, Dtype::F32)?;
                let tensors =
                    [(Slot::Q, &a), (Slot::K, &b), (Slot::Bias(0), &lse_a), (Slot::Bias(1), &lse_b), (Slot::Lse, &lse)];
                Ok([steps.made("output", layout, dtype, plan, &tensors)?, lse])
            }
            #[cfg(feature = "cpu")]
            Recording::Cpu => cpu::merge(outputs, lses, layout),
        }
    }

    /// Softmax over one axis; the result is row-major.
    pub fn softmax(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        match self {
            Recording::Gpu(steps) => steps.softmax(x, axis),
            #[cfg(feature = "cpu")]
            Recording::Cpu => {
                cpu::made("softmax", Layout::contiguous(x.shape())?, x.dtype(), |_| backend::softmax(view(x), axis))
            }
        }
    }

    /// Submits what `record` records, and reports driver errors.
    pub async fn submit<T>(mut self, record: impl FnOnce(&mut Recording) -> Result<T>) -> Result<T> {
        let recorded = record(&mut self)?;
        match self {
            Recording::Gpu(steps) => apart(steps.submit()).await?,
            #[cfg(feature = "cpu")]
            Recording::Cpu => {}
        }
        Ok(recorded)
    }

    /// Like [`Recording::submit`], but waits for the end and reports what ran.
    pub async fn submit_profiled<T>(
        mut self,
        record: impl FnOnce(&mut Recording) -> Result<T>,
    ) -> Result<(T, Profile)> {
        #[cfg(all(feature = "cpu", not(target_arch = "wasm32")))]
        if matches!(self, Recording::Cpu) {
            let (recorded, computed) = backend::measured(|| record(&mut self));
            return Ok((recorded?, Profile { cpu_time: Some(computed), ..Profile::default() }));
        }
        let recorded = record(&mut self)?;
        match self {
            Recording::Gpu(steps) => Ok((recorded, apart(steps.submit_profiled()).await?)),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Ok((recorded, Profile::default())),
        }
    }

    /// Compiles what `record` would run, but runs nothing. The CPU backend has nothing to compile.
    pub async fn warm_up<T>(mut self, record: impl FnOnce(&mut Recording) -> Result<T>) -> Result<()> {
        #[cfg(feature = "cpu")]
        if matches!(self, Recording::Cpu) {
            return Ok(());
        }
        record(&mut self)?;
        let steps = self.steps("")?;
        apart(async move { steps.compile().await }).await
    }

    /// Writes what `record` records into the caller's encoder.
    pub fn encode<T>(
        mut self,
        encoder: &mut wgpu::CommandEncoder,
        record: impl FnOnce(&mut Recording) -> Result<T>,
    ) -> Result<T> {
        let recorded = record(&mut self)?;
        self.steps("encoding needs an adapter; the CPU backend has none")?.encode(encoder)?;
        Ok(recorded)
    }

    /// What `record` records, in slices for the caller's encoders.
    pub fn slices<T>(mut self, record: impl FnOnce(&mut Recording) -> Result<T>) -> Result<(T, EncodeSlices)> {
        let recorded = record(&mut self)?;
        Ok((recorded, self.steps("encoding needs an adapter; the CPU backend has none")?.slices()?))
    }

    /// The steps on an adapter; on the CPU backend an error with `reason`.
    #[cfg_attr(not(feature = "cpu"), allow(unused_variables))]
    fn steps(self, reason: &str) -> Result<Steps> {
        match self {
            Recording::Gpu(steps) => Ok(steps),
            #[cfg(feature = "cpu")]
            Recording::Cpu => Err(value_error!("{reason}")),
        }
    }
}
