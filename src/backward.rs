//! Gradients of attention.

use crate::attention::{Attention, EmptyRows};
use crate::call::{Attended, BackwardCall, Cotangents, Gradients};
use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::gpu::{EncodeSlices, Gpu, Profile};
use crate::lower::Recording;
use crate::problem::{Problem, WantedGradients};
use crate::tensor::{Tensor, common_device};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

impl Attention {
    /// The gradients of a loss by what [`Attention::forward`] read: Q, K, V and the call's biases, sink, positional tables
    /// and scale. `attended` is what the same call returned, with its LSE ([`Attention::lse`]); `cotangents` are the
    /// gradients of the loss by the results.
    ///
    /// ```text
    /// P    = exp(X − LSE)                        X: the score after everything
    /// D    = Σ dO·O + Σ P·dW − dLSE              per query
    /// dX   = P ∘ (dO·Vᵀ + dW − D)                the Jacobian of the softmax; a bias gets the sum of dX over the axes
    /// dV   = Pᵀ·dO                               that it was broadcast along
    /// dS   = dX ∘ (1 − (capped / cap)²)          the derivative of the softcap
    /// dQ   = scale · dS·K    dK = scale · dSᵀ·Q
    /// ```
    ///
    /// (Dao et al. 2022, "FlashAttention", appendix B.2.) Scores are recomputed for a part of the queries at a time, so
    /// memory grows linearly with the length. Sums have one order: the same call gives the same bits every time on an
    /// adapter. A query that may attend to no key has gradients of 0, and what hidden keys, and the gradients of such a
    /// query's output hold, NaN included, changes no bit.
    ///
    /// ```
    /// use wgpu_attention::{Attention, Cotangents, Device, Tensor, WantedGradients};
    ///
    /// # fn main() -> wgpu_attention::Result<()> {
    /// let device = Device::new()?;
    /// let x = Tensor::from_slice(&device, &[1, 1, 2, 2], &[1.0f32, 0.0, 0.0, 1.0])?;
    /// let attention = Attention::new().lse(true);
    /// let attended = attention.forward(&x, &x, &x)?;
    /// // The loss is the sum of the output: every value counts with the sum of its weights.
    /// let ones = Tensor::from_slice(&device, &[1, 1, 2, 2], &[1.0f32; 4])?;
    /// let gradients =
    ///     attention.backward(&x, &x, &x, &attended, &Cotangents::of_output(ones), WantedGradients::QKV)?;
    /// let dv = gradients.v.expect("it was asked for").download()?;
    /// assert!(dv.iter().all(|x| (x - 1.0).abs() < 1e-6));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Shape`](crate::Error::Shape): an operand or a cotangent has the wrong shape.
    /// - [`Value`](crate::Error::Value): `attended` has no LSE, there is no cotangent, a gradient is asked for of what the
    ///   call does not have, or the call uses [`EmptyRows::MeanOfValues`].
    /// - [`Device`](crate::Error::Device): tensors on different devices.
    /// - [`TooLarge`](crate::Error::TooLarge): a gradient or the working memory does not fit.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<Gradients> {
        wait_for(self.run_backward([q, k, v], attended, cotangents, wanted))
    }

    /// Like [`Attention::backward`], without blocking.
    pub async fn backward_async(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<Gradients> {
        let (attention, operands) = (self.clone(), [q, k, v].map(Tensor::clone));
        let (attended, cotangents) = (attended.clone(), cotangents.clone());
        let run = async move { attention.run_backward(operands.each_ref(), &attended, &cotangents, wanted).await };
        apart(run).await
    }

    async fn run_backward(
        &self,
        operands: [&Tensor; 3],
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<Gradients> {
        let device = self.backward_device(operands, attended, cotangents)?;
        Recording::new(&device).submit(|to| self.record_backward(to, operands, attended, cotangents, wanted)).await
    }

    /// Like [`Attention::backward`], but waits until the work is done and reports which kernels ran, as
    /// [`Attention::forward_profiled`] does.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn backward_profiled(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<(Gradients, Profile)> {
        let operands = [q, k, v];
        let recording = Recording::new(&self.backward_device(operands, attended, cotangents)?);
        wait_for(recording.submit_profiled(|to| self.record_backward(to, operands, attended, cotangents, wanted)))
    }

    /// Records [`Attention::backward`] into the caller's encoder, under the same conditions as [`Attention::encode`].
    #[allow(clippy::too_many_arguments)]
    pub fn encode_backward(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<Gradients> {
        let operands = [q, k, v];
        let device = self.backward_device(operands, attended, cotangents)?;
        let recording = Recording::for_encoder(gpu, encoder, &device)?;
        recording.encode(encoder, |to| self.record_backward(to, operands, attended, cotangents, wanted))
    }

    /// Like [`Attention::encode_backward`], in slices for encoders of their own; see [`Attention::encode_slices`].
    #[allow(clippy::too_many_arguments)]
    pub fn encode_backward_slices(
        &self,
        gpu: &Gpu,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<(Gradients, EncodeSlices)> {
        let operands = [q, k, v];
        let device = self.backward_device(operands, attended, cotangents)?;
        Recording::for_encoders(gpu, &device)?
            .slices(|to| self.record_backward(to, operands, attended, cotangents, wanted))
    }

    fn backward_device(&self, [q, k, v]: [&Tensor; 3], attended: &Attended, cotangents: &Cotangents) -> Result<Device> {
        let device = self.device(q, k, v)?;
        let results = [("the output", Some(&attended.output)), ("the LSE", attended.lse.as_ref())];
        let results = results.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)));
        let all: Vec<(&str, &Tensor)> = results.chain(cotangents.named()).collect();
        common_device(q, all)?;
        Ok(device)
    }

    /// Adds the backward of this call to a recording on the tensors' device.
    fn record_backward(
        &self,
        recording: &mut Recording,
        [q, k, v]: [&Tensor; 3],
        attended: &Attended,
        cotangents: &Cotangents,
        wanted: WantedGradients,
    ) -> Result<Gradients> {
        let (problem, operands) = self.operands_to_rotate(recording, q, k, v)?;
        self.expect_gradients(wanted)?;
        if self.empty_rows == EmptyRows::MeanOfValues {
            return Err(value_error!(
                "the backward of EmptyRows::MeanOfValues is not computed; the gradients of such queries are 0 without it"
            ));
        }
        let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = problem;
        let Some(lse) = &attended.lse else {
            return Err(value_error!("the backward needs the LSE of the forward: call it with Attention::lse(true)"));
        };
        let rows = [batch, heads_q, len_q];
        let lead = &q.shape()[..q.shape().len() - 1];
        let with_axes = |what: &str, x: &Tensor, four: &[usize], own: &[usize]| -> Result<Tensor> {
            x.expect_float(what)?;
            let layout = match x.shape() {
                shape if shape == own => x.layout().clone(),
                shape if shape == four => return Ok(x.clone()),
                shape => {
                    return Err(shape_error!("{what} of shape {shape:?} must be {own:?}, the shape of what it is of"));
                }
            };
            // The leading axes that Q lacks.
            let mut layout = layout;
            while layout.rank() < four.len() {
                layout = layout.unsqueeze(0)?;
            }
            Ok(x.with_layout(layout))
        };
        let own = |last: &[usize]| [lead, last].concat();
        let of_rows = |what: &str, x: &Tensor| with_axes(what, x, &rows, lead);
        let of_output = |what: &str, x: &Tensor| with_axes(what, x, &[batch, heads_q, len_q, dim_v], &own(&[dim_v]));
        let square = [batch, heads_q, len_q, len_k];
        let d_weights = match &cotangents.weights {
            None => None,
            Some(x) if x.shape() == own(&[len_k]) || x.shape() == square => {
                Some((with_axes("dW", x, &square, &own(&[len_k]))?, 1.0))
            }
            Some(x) => {
                x.expect_float("dW")?;
                let averaged = match *x.shape() {
                    [b, i, j] if [b, i, j] == [batch, len_q, len_k] => x.unsqueeze(1)?,
                    _ => {
                        return Err(shape_error!(
                            "dW of shape {:?} must be {:?}, or [batch, len_q, len_k] = {:?} for averaged weights",
                            x.shape(),
                            own(&[len_k]),
                            [batch, len_q, len_k]
                        ));
                    }
                };
                let layout = averaged.layout().broadcast_to(&square)?;
                Some((averaged.with_layout(layout), 1.0 / heads_q as f32))
            }
        };
        let distance = self.distance.as_ref().map(|distance| distance.gradient()).transpose()?;
        let biases = self.biases.iter().chain(&self.key_padding_biases);
        let call = BackwardCall {
            bias_shapes: biases.clone().enumerate().map(|(n, bias)| self.bias_shape(n, bias, &problem)).collect(),
            output: of_output("the output", &attended.output)?,
            lse: of_rows("the LSE", lse)?,
            d_output: cotangents.output.as_ref().map(|x| of_output("dO", x)).transpose()?,
            d_lse: cotangents.lse.as_ref().map(|x| of_rows("dLSE", x)).transpose()?,
            d_weights,
            wanted,
            distance,
            operands,
        };
        if call.d_output.is_none() && call.d_lse.is_none() && call.d_weights.is_none() {
            return Err(value_error!("the backward needs at least one cotangent: dO, dLSE or dW"));
        }
        let gradients = recording.backward(&problem, &call)?;
        let shaped = |x: Option<Tensor>, like: &Tensor| x.map(|x| x.reshape(like.shape())).transpose();
        Ok(Gradients {
            q: shaped(gradients.q, q)?,
            k: shaped(gradients.k, k)?,
            v: shaped(gradients.v, v)?,
            biases: (gradients.biases.iter().zip(biases))
                .map(|(x, bias)| x.reshape(bias.shape()))
                .collect::<Result<_>>()?,
            distance: match (&self.distance, gradients.distance) {
                (Some(distance), Some(x)) => Some(distance.gradient_of_tensor(&x)?),
                _ => None,
            },
            ..gradients
        })
    }

    /// The shape of the n-th bias, with four axes.
    fn bias_shape(&self, n: usize, bias: &Tensor, problem: &Problem) -> [usize; 4] {
        let mut shape = [1; 4];
        if n >= self.biases.len() {
            // Key padding: [batch, len_k] or [len_k].
            shape[3] = problem.maskable_keys();
            if let [entries, _] = *bias.shape() {
                shape[0] = entries;
            }
            return shape;
        }
        let rank = bias.shape().len();
        shape[4 - rank..].copy_from_slice(bias.shape());
        shape
    }

    /// An error if a gradient is asked for of what the call does not have.
    fn expect_gradients(&self, wanted: WantedGradients) -> Result<()> {
        let has_bias = !self.biases.is_empty() || !self.key_padding_biases.is_empty();
        for (what, wanted, given) in [
            ("a bias", wanted.biases, has_bias),
            ("the sink", wanted.sink, self.sink.is_some()),
            ("a bias by distance (ALiBi, T5, relative keys)", wanted.distance, self.distance.is_some()),
        ] {
            if wanted && !given {
                return Err(value_error!(
                    "the gradient of {what} is asked for, but the call has none; Attention::gradients lists what it has"
                ));
            }
        }
        Ok(())
    }

    /// Every gradient that this call can have: of Q, K, V and the scale, and of the biases, the sink and the positional
    /// table that it has.
    pub fn gradients(&self) -> WantedGradients {
        WantedGradients {
            biases: !self.biases.is_empty() || !self.key_padding_biases.is_empty(),
            sink: self.sink.is_some(),
            distance: self.distance.is_some(),
            ..WantedGradients::ALL
        }
    }
}
