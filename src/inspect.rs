//! Attention weights for the fused path, recomputed from the LSE.

use std::ops::Range;

use crate::attention::Attention;
use crate::call::Inspected;
use crate::error::{Result, shape_error, value_error};
use crate::gpu::Gpu;
use crate::lower::Recording;
use crate::problem::{Chosen, Problem};
use crate::tensor::{Tensor, common_device};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// What [`Attention::inspect`] returns, and for which heads and queries; all by default.
///
/// ```
/// # use wgpu_attention::Inspect;
/// let inspect = Inspect::new().heads(&[1, 3]).queries(100..164).weights().column_sums().entropy();
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Inspect {
    heads: Option<Vec<usize>>,
    queries: Option<Range<usize>>,
    weights: bool,
    column_sums: bool,
    entropy: bool,
}

impl Inspect {
    /// Nothing yet; request at least one result.
    pub fn new() -> Inspect {
        Inspect::default()
    }
    /// Only these query heads, in this order.
    pub fn heads(mut self, heads: &[usize]) -> Self {
        self.heads = Some(heads.to_vec());
        self
    }
    /// Only these queries.
    pub fn queries(mut self, queries: Range<usize>) -> Self {
        self.queries = Some(queries);
        self
    }
    /// Returns the weights `P`.
    pub fn weights(mut self) -> Self {
        self.weights = true;
        self
    }
    /// Returns the sum of each key's weights over the chosen queries.
    pub fn column_sums(mut self) -> Self {
        self.column_sums = true;
        self
    }
    /// Returns the entropy of each query's weights.
    pub fn entropy(mut self) -> Self {
        self.entropy = true;
        self
    }

    fn choose(&self, problem: &Problem, q: &[usize]) -> Result<Chosen> {
        let Problem { heads_q, len_q, .. } = *problem;
        if !(self.weights || self.column_sums || self.entropy) {
            return Err(value_error!("nothing to inspect: ask for weights, column_sums or entropy"));
        }
        let heads = self.heads.clone().unwrap_or_else(|| (0..heads_q).collect());
        if let Some(head) = heads.iter().find(|&&head| head >= heads_q) {
            return Err(value_error!("head {head} of {heads:?} is out of range: Q {q:?} has heads 0..{heads_q}"));
        }
        if q.len() == 2 && heads.len() != 1 {
            return Err(value_error!("heads {heads:?} of Q {q:?}, which has no heads axis: only [0] can be chosen"));
        }
        let queries = self.queries.clone().unwrap_or(0..len_q);
        if queries.start > queries.end || queries.end > len_q {
            return Err(value_error!("queries {queries:?} are out of range: Q {q:?} has queries 0..{len_q}"));
        }
        let Inspect { weights, column_sums, entropy, .. } = *self;
        Ok(Chosen { heads, queries, weights, column_sums, entropy })
    }
}

impl Attention {
    /// Attention weights of chosen heads and queries, their sums per key and their entropies. They are recomputed from
    /// Q, K and the LSE that [`Attention::forward`] returned for them with [`Attention::lse`], and are exact whichever
    /// kernels computed the output. This takes no more memory than the results need.
    ///
    /// Q `[batch, heads_q, len_q, dim_k]`, K `[batch, heads_kv, len_k, dim_k]` and LSE
    /// `[batch, heads_q, len_q]` with any strides. Scale, softcap, masks, biases and positions must be those
    /// of the forward call; which results that call requested does not matter.
    ///
    /// `P = exp(S − LSE)` for a key that the query may see, and exactly 0 for a masked key. A query that sees no key
    /// (LSE −∞ or the sink) has weights and entropy 0. The LSE includes the sink, so weights sum to less than 1, and
    /// the entropy omits the sink's own share. The LSE, an f32 near the largest score, limits the accuracy: the
    /// relative error of `P` is up to `|LSE| · 2⁻²⁴` larger than that of the scores.
    ///
    /// The bits of a row depend neither on the batch nor on which heads and queries are chosen.
    ///
    /// With masks, biases or positions per batch entry, the adapter must offer five storage buffers per kernel.
    ///
    /// `P` is recomputed as in the backward pass of FlashAttention-2 (Dao 2023, algorithm 2).
    ///
    /// # Errors
    ///
    /// - [`Shape`](crate::Error::Shape): the operands, masks or biases do not fit together, or the LSE does not have
    ///   one entry per query.
    /// - [`Value`](crate::Error::Value): `inspect` requests nothing or a head or query that does not exist, or an
    ///   option of the attention is out of range.
    /// - [`Device`](crate::Error::Device): the tensors are on different devices.
    /// - [`Unsupported`](crate::Error::Unsupported): the adapter has too few storage buffers per kernel.
    /// - [`TooLarge`](crate::Error::TooLarge), [`Overflow`](crate::Error::Overflow): a result does not fit; choose
    ///   fewer heads or queries.
    /// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
    ///   [`Gpu`](crate::Error::Gpu): the driver failed.
    ///
    /// ```
    /// use wgpu_attention::{Attention, Device, Inspect, Tensor};
    ///
    /// # fn main() -> wgpu_attention::Result<()> {
    /// let device = Device::new()?;
    /// let x = Tensor::from_slice(&device, &[2, 3], &[1.0f32, 0.0, 0.0, 0.0, 1.0, 0.0])?;
    /// let attention = Attention::new().scale(0.0).lse(true); // scale 0: every key weighs the same
    /// let lse = attention.forward(&x, &x, &x)?.lse.expect("asked for");
    ///
    /// let seen = attention.inspect(&x, &x, &lse, &Inspect::new().queries(0..1).column_sums().entropy())?;
    ///
    /// assert_eq!(seen.column_sums.expect("asked for").download()?, [0.5, 0.5]);
    /// assert!((seen.entropy.expect("asked for").download()?[0] - 2f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(not(target_arch = "wasm32"))]
    pub fn inspect(&self, q: &Tensor, k: &Tensor, lse: &Tensor, inspect: &Inspect) -> Result<Inspected> {
        wait_for(self.run_inspect(q, k, lse, inspect))
    }

    /// Like [`Attention::inspect`], without blocking.
    pub async fn inspect_async(&self, q: &Tensor, k: &Tensor, lse: &Tensor, inspect: &Inspect) -> Result<Inspected> {
        let (attention, q, k, lse, inspect) = (self.clone(), q.clone(), k.clone(), lse.clone(), inspect.clone());
        apart(async move { attention.run_inspect(&q, &k, &lse, &inspect).await }).await
    }

    async fn run_inspect(&self, q: &Tensor, k: &Tensor, lse: &Tensor, inspect: &Inspect) -> Result<Inspected> {
        common_device(q, [("LSE", lse)])?;
        Recording::new(&self.device(q, k, k)?).submit(|to| self.record_inspect(to, q, k, lse, inspect)).await
    }

    /// Records [`Attention::inspect`] into the caller's encoder, under the same conditions as [`Attention::encode`].
    /// The LSE may come from a call that was recorded into the same encoder before.
    pub fn encode_inspect(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        q: &Tensor,
        k: &Tensor,
        lse: &Tensor,
        inspect: &Inspect,
    ) -> Result<Inspected> {
        common_device(q, [("LSE", lse)])?;
        let recording = Recording::for_encoder(gpu, encoder, &self.device(q, k, k)?)?;
        recording.encode(encoder, |to| self.record_inspect(to, q, k, lse, inspect))
    }

    fn record_inspect(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        k: &Tensor,
        lse: &Tensor,
        inspect: &Inspect,
    ) -> Result<Inspected> {
        // K takes the place of V, which is not read.
        let (problem, operands) = self.operands(recording, q, k, k)?;
        let chosen = inspect.choose(&problem, q.shape())?;
        lse.expect_float("LSE")?;
        let (rows, lead) = (&q.shape()[..q.shape().len() - 1], &q.shape()[..q.shape().len() - 2]);
        if lse.shape() != rows {
            return Err(shape_error!(
                "an LSE of shape {:?} does not fit Q {:?}: one entry per query is needed, {rows:?}",
                lse.shape(),
                q.shape()
            ));
        }
        let lse = match rows.len() {
            1 => lse.unsqueeze(0)?.unsqueeze(0)?,
            2 => lse.unsqueeze(0)?,
            _ => lse.reshape(&[problem.batch, problem.heads_q, problem.len_q])?,
        };
        let inspected = recording.inspect(&problem, &operands, &lse, &chosen)?;
        if q.shape().len() == 4 {
            return Ok(inspected);
        }
        // Restores the query's leading axes.
        let restore = |tensor: Option<Tensor>| -> Result<Option<Tensor>> {
            let Some(tensor) = tensor else { return Ok(None) };
            let mut shape = lead.to_vec();
            if let Some(heads) = shape.last_mut() {
                *heads = chosen.heads.len();
            }
            shape.extend(&tensor.shape()[2..]);
            tensor.reshape(&shape).map(Some)
        };
        Ok(Inspected {
            weights: restore(inspected.weights)?,
            column_sums: restore(inspected.column_sums)?,
            entropy: restore(inspected.entropy)?,
        })
    }
}
