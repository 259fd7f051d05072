use super::distance::DistanceGradients;
use super::scores::{Positioned, distance_of, row_major, rows};
use super::{Inputs, Outputs, View, rotate_backward};
use crate::problem::{Layout, Problem, ScoreStage, WantedGradients};

/// The gradients of a loss by the results of a call. A result without one does not enter the loss.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cotangents<'a> {
    /// dO `[b, hq, i, d]`
    pub output: Option<View<'a>>,
    /// dLSE `[b, hq, i]`
    pub lse: Option<View<'a>>,
    /// dW of the returned weights: `[b, hq, i, j]`, or `[b, i, j]` if they are averaged over heads.
    pub weights: Option<View<'a>>,
}

impl Cotangents<'_> {
    fn of_lse(&self, row: [usize; 3]) -> f64 {
        self.lse.map_or(0.0, |lse| lse.at(&row))
    }

    /// dW of one head's weight. Averaged weights are the sum over heads, divided by their number.
    fn of_weight(&self, pair @ [b, _, i, j]: [usize; 4], heads: usize) -> f64 {
        match self.weights {
            None => 0.0,
            Some(weights) if weights.layout.rank() == 3 => weights.at(&[b, i, j]) / heads as f64,
            Some(weights) => weights.at(&pair),
        }
    }
}

/// The gradients of a loss by what a call reads: those that are wanted, of operands that the call has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// `[b, hq, i, d]`, row-major
    pub q: Option<Vec<f64>>,
    /// `[b, hkv, j, d]`, row-major
    pub k: Option<Vec<f64>>,
    /// `[b, hkv, j, d]`, row-major
    pub v: Option<Vec<f64>>,
    /// Of each bias, at the positions of its own buffer: summed over the axes that it was broadcast along.
    pub biases: Option<Vec<Vec<f64>>>,
    /// `[hq]`
    pub sink: Option<Vec<f64>>,
    /// Of ALiBi's slopes, T5's table or the relative keys, row-major.
    pub distance: Option<Vec<f64>>,
    /// Of the scale.
    pub scale: Option<f64>,
}

/// The backward of [`attention`](super::attention), whose results are `outputs`.
///
/// ```text
/// P_ij     = exp(X_ij − LSE_i)                          X: the score after everything
/// delta_i  = dO_i·O_i + Σ_j P_ij dW_ij − dLSE_i
/// dX_ij    = P_ij (D_ij dO_i·V_j + dW_ij − delta_i)     D: what dropout multiplies the weight by, 1 without
/// dV_j     = Σ_i D_ij P_ij dO_i
/// dS_ij    = dX_ij (1 − (capped_ij / cap)²)             the derivative of the softcap
/// dQ_i     = scale Σ_j dS_ij K_j                        of rotated queries and keys, then rotated back
/// dK_j     = scale Σ_i dS_ij Q_i                        summed over the query heads of a group
/// dscale   = Σ_ij dS_ij (Q_i·K_j)                       and what Shaw's relative keys add
/// dbias    = Σ dX                                       over the axes it was broadcast along
/// dsink_h  = −Σ_i exp(sink_h − LSE_i) delta_i
/// ```
///
/// The sums over j and i are over visible pairs; hidden pairs touch nothing. A query that may attend to nothing gives
/// gradients of 0, whatever its dO and dW hold, with two exceptions. Its LSE is the sink if there is one, so dLSE reaches
/// the sink. If its output is the mean of all values, dO reaches the values.
///
/// P as a Jacobian of the softmax, and the row sum: Dao et al. 2022, "FlashAttention", appendix B.2.
pub fn backward(
    problem: &Problem,
    inputs: &Inputs<'_>,
    outputs: &Outputs,
    cotangents: &Cotangents<'_>,
    wanted: WantedGradients,
) -> Gradients {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = *problem;
    let call = Positioned::new(problem, inputs);
    let rules = &inputs.rules;
    let (scale, softcap) = (rules.scale(problem), rules.softcap(problem));
    let queries = row_major(inputs.q);
    // Of rotated queries and keys.
    let mut dq = vec![0.0; batch * heads_q * len_q * dim_k];
    let mut dk = vec![0.0; batch * heads_kv * len_k * dim_k];
    let mut dv = vec![0.0; batch * heads_kv * len_k * dim_v];
    // Of queries as they were before their rotation, from relative keys.
    let mut dq_relative = vec![0.0; dq.len()];
    let mut dbiases: Vec<Vec<f64>> = rules.biases.iter().map(|bias| vec![0.0; bias.data.len()]).collect();
    let mut dsink = vec![0.0; heads_q];
    let mut dtable = vec![0.0; rules.distance.map_or(0, |distance| distance.table().layout.len())];
    let mut dscale = 0.0;

    for (row, [b, h, i]) in rows([batch, heads_q, len_q]).enumerate() {
        let lse = outputs.lse[row];
        let head_kv = b * heads_kv + h / problem.group();
        let of_output = |d: usize| cotangents.output.map_or(0.0, |output| output.at(&[b, h, i, d]));
        let visible: Vec<usize> = (0..len_k).filter(|&j| call.visible([b, h, i, j])).collect();

        let mut delta = -cotangents.of_lse([b, h, i]);
        if !visible.is_empty() {
            delta += (0..dim_v).map(|d| of_output(d) * outputs.output[row * dim_v + d]).sum::<f64>();
        }
        let weight = |x: f64| if x == f64::NEG_INFINITY { 0.0 } else { (x - lse).exp() };
        let p: Vec<f64> = visible.iter().map(|&j| weight(call.score(ScoreStage::Masked, [b, h, i, j]))).collect();
        for (&j, p) in visible.iter().zip(&p) {
            delta += p * cotangents.of_weight([b, h, i, j], heads_q);
        }
        let sink = inputs.sink_of(h);
        if sink != f64::NEG_INFINITY {
            dsink[h] -= (sink - lse).exp() * delta;
        }
        if rules.mean_where_empty && visible.is_empty() {
            for j in 0..len_k {
                (0..dim_v).for_each(|d| dv[(head_kv * len_k + j) * dim_v + d] += of_output(d) / len_k as f64);
            }
        }

        for (&j, &p) in visible.iter().zip(&p) {
            let pair = [b, h, i, j];
            let key = head_kv * len_k + j;
            let kept = rules.dropout_factor(pair);
            let mut dp = cotangents.of_weight(pair, heads_q);
            if kept != 0.0 {
                for d in 0..dim_v {
                    dp += kept * of_output(d) * inputs.v.at(&[b, h / problem.group(), j, d]);
                    dv[key * dim_v + d] += kept * p * of_output(d);
                }
            }
            let dx = p * (dp - delta);
            if j < problem.maskable_keys() {
                for (bias, dbias) in rules.biases.iter().zip(&mut dbiases) {
                    dbias[bias.layout.at(&pair)] += dx;
                }
                if let Some(distance) = rules.distance {
                    let q = &queries[row * dim_k..][..dim_k];
                    let into = &mut DistanceGradients {
                        table: &mut dtable,
                        q: &mut dq_relative[row * dim_k..][..dim_k],
                        scale: &mut dscale,
                    };
                    distance.add_gradients(h, distance_of(problem, pair), (q, scale), dx, into);
                }
            }
            let ds = match softcap {
                Some(cap) => dx * (1.0 - (call.capped(pair) / cap).powi(2)),
                None => dx,
            };
            for (d, (q, k)) in call.q([b, h, i]).iter().zip(call.k([b, h, j])).enumerate() {
                dq[row * dim_k + d] += scale * ds * k;
                dk[key * dim_k + d] += scale * ds * q;
            }
            dscale += ds * call.product(pair);
        }
    }

    if let Some(rotary) = &rules.rotary {
        for (n, (dx, heads, len)) in [(&mut dq, heads_q, len_q), (&mut dk, heads_kv, len_k)].into_iter().enumerate() {
            let layout = Layout::contiguous(&[batch, heads, len, dim_k]).expect("as large as the operand");
            let rotated = View { data: dx, layout: &layout };
            *dx = rotate_backward(rotated, rotary.cos, rotary.sin, rotary.interleaved, &rotary.rows[n]);
        }
    }
    dq.iter_mut().zip(dq_relative).for_each(|(dq, relative)| *dq += relative);

    Gradients {
        q: wanted.q.then_some(dq),
        k: wanted.k.then_some(dk),
        v: wanted.v.then_some(dv),
        biases: wanted.biases.then_some(dbiases),
        sink: (wanted.sink && rules.sink.is_some()).then_some(dsink),
        distance: (wanted.distance && rules.distance.is_some()).then_some(dtable),
        scale: wanted.scale.then_some(dscale),
    }
}
