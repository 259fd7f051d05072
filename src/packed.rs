//! Packed sequences of different lengths.

use crate::attention::{Attention, EmptyRows};
use crate::call::{Attended, Operands};
use crate::error::{Error, Result, shape_error, value_error};
use crate::kernels::Method;
use crate::lower::Recording;
use crate::position::{TokenPositions, first_position};
use crate::problem::{Positions, Problem, Wanted, Weights};
use crate::tensor::Tensor;
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

impl Attention {
    /// Attention over packed sequences of different lengths ("varlen"), in one dispatch: Q `[total_q, heads_q, dim_k]`,
    /// K `[total_k, heads_kv, dim_k]`, V `[total_k, heads_kv, dim_v]`, any strides. Sequence `n` is rows
    /// `cu_seqlens_q[n]..cu_seqlens_q[n + 1]` of Q and rows `cu_seqlens_k[n]..cu_seqlens_k[n + 1]` of K and V, as in
    /// FlashAttention's `flash_attn_varlen_func`. Both lists start at 0, never decrease, and end with the number of
    /// rows. Output `[total_q, heads_q, dim_v]`, LSE `[heads_q, total_q]`.
    ///
    /// Causal masks, windows, offsets (one for all or one per sequence), rotary positions, scale, softcap and sinks
    /// work as in [`Attention::forward`], counted within each sequence. Each result is bit-identical to a call over
    /// that sequence alone with the same [`Method::Tile`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward`], and:
    ///
    /// - [`Value`](Error::Value): a mask, a bias, key or query lengths, [`EmptyRows::MeanOfValues`], or returned
    ///   weights or scores are requested; or a list decreases.
    /// - [`Shape`](Error::Shape): an operand does not have three axes, or the lists do not fit the rows.
    /// - [`Method`](Error::Method): the method is [`Method::ThreePasses`], or the tile cannot compute this call.
    /// - [`Unsupported`](Error::Unsupported): the adapter cannot run the fused kernel for these shapes.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward_packed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        wait_for(self.run_packed([q, k, v], cu_seqlens_q, cu_seqlens_k))
    }

    /// Like [`Attention::forward_packed`], without blocking.
    pub async fn forward_packed_async(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        let (attention, operands) = (self.clone(), [q, k, v].map(Tensor::clone));
        let lengths = [cu_seqlens_q, cu_seqlens_k].map(<[usize]>::to_vec);
        apart(async move { attention.run_packed(operands.each_ref(), &lengths[0], &lengths[1]).await }).await
    }

    async fn run_packed(
        &self,
        operands: [&Tensor; 3],
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        let [q, k, v] = operands;
        let record = |to: &mut Recording| self.record_packed(to, operands, cu_seqlens_q, cu_seqlens_k);
        Recording::new(&self.device(q, k, v)?).submit(record).await
    }

    fn record_packed(
        &self,
        recording: &mut Recording,
        operands: [&Tensor; 3],
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        for (what, given) in [
            ("a mask", !self.masks.is_empty()),
            ("a key padding mask", !self.key_padding.is_empty() || !self.key_padding_biases.is_empty()),
            ("a bias", !self.biases.is_empty()),
            ("query_lengths", self.query_lengths.is_some()),
            ("a bias by distance", self.distance.is_some()),
            ("returned weights", self.weights != Weights::None),
            ("returned scores", self.scores.is_some()),
            ("EmptyRows::MeanOfValues", self.empty_rows != EmptyRows::Zero),
        ] {
            if given {
                return Err(value_error!(
                    "packed sequences cannot be combined with {what}; run the sequences separately"
                ));
            }
        }
        if self.method == Method::ThreePasses {
            let reason = "packed sequences run fused only".into();
            return Err(Error::Method { method: self.method.to_string(), reason });
        }
        let mut four = Vec::with_capacity(3);
        for (name, tensor) in ["Q", "K", "V"].into_iter().zip(operands) {
            tensor.expect_float(name)?;
            if tensor.layout().rank() != 3 {
                return Err(shape_error!("packed {name} {:?} must be [total, heads, dim]", tensor.shape()));
            }
            four.push(tensor.permute(&[1, 0, 2])?.unsqueeze(0)?);
        }
        let [q, k, v]: [Tensor; 3] = four.try_into().expect("three operands");
        let plain = Positions::default();
        let problem = Problem::new(q.shape(), k.shape(), v.shape(), self.scale, self.softcap, &plain, 0)?;
        let sink = self.checked_sink(&problem)?;
        let sequences = self.positions.sequences(cu_seqlens_q, cu_seqlens_k, problem.len_q, problem.len_k)?;
        let [q, k] = match &self.rotary {
            None => [q, k],
            Some((rotary, given)) => {
                let [queries, keys] = match given {
                    Some(given) => given.clone(),
                    None => {
                        let (mut queries, mut keys) = (Vec::new(), Vec::new());
                        for (n, one) in sequences.iter().enumerate().filter(|(_, one)| one.len_q > 0) {
                            let start = first_position(n, one.band.offset)?;
                            queries.extend(start..start + one.len_q);
                        }
                        sequences.iter().for_each(|one| keys.extend(0..one.len_k));
                        [TokenPositions::Given(queries), TokenPositions::Given(keys)]
                    }
                };
                [rotary.record(recording, &q, &queries)?, rotary.record(recording, &k, &keys)?]
            }
        };
        let operands = Operands { sink, sequences: Some(sequences), ..Operands::new(q, k, v) };
        let wanted = Wanted { lse: self.lse, ..Wanted::default() };
        let attended = recording.attention(&problem, &operands, wanted, self.method, None)?;
        Ok(Attended {
            output: attended.output.select(0, 0)?.permute(&[1, 0, 2])?,
            lse: attended.lse.map(|lse| lse.select(0, 0)).transpose()?,
            ..attended
        })
    }
}
