use super::{
    Cotangents, Gradients, Inputs, NormGradients, Outputs, ProjectGradients, Rules, View, attention, backward, gate,
    gate_backward, normalise, normalise_backward, project, project_backward,
};
use crate::problem::{Layout, Positions, Problem, WantedGradients};

/// Multi-head attention with its projections (Vaswani et al. 2017, section 3.2.2), as the library's layer computes it:
///
/// ```text
/// q, k, v = norm(query·W_qᵀ + b_q), norm(key·W_kᵀ + b_k), value·W_vᵀ + b_v      split into heads
/// k, v    = the rows of k, v, then bias_k, bias_v, then a row of zeros          those that the layer has
/// output  = (attention(q, k, v) · σ(query·W_gᵀ + b_g))·W_oᵀ + b_o               heads side by side
/// ```
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// Query heads, and key/value heads.
    pub heads: [usize; 2],
    /// Of queries, keys and values.
    pub projections: [Projection<'a>; 3],
    /// Of the output.
    pub out: Projection<'a>,
    /// Of the gate on the heads' results.
    pub gate: Option<Projection<'a>>,
    /// Of queries and keys.
    pub norms: Option<[Norm<'a>; 2]>,
    /// The learned extra key and value, each as wide as its projection.
    pub bias_kv: Option<[View<'a>; 2]>,
    /// Whether a key and value of zeros is appended.
    pub zero_attn: bool,
}

/// `x·Wᵀ + b`
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[out, in]`
    pub weight: View<'a>,
    /// `[out]`
    pub bias: Option<View<'a>>,
}

/// A norm of each head (if as wide as one), or of all heads of a token together; see [`normalise()`].
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// As wide as what is normalised together.
    pub weight: View<'a>,
    /// As wide as the weight.
    pub bias: Option<View<'a>>,
    /// LayerNorm, not RMSNorm.
    pub centred: bool,
    /// Added under the root.
    pub epsilon: f64,
}

/// What a layer attends with: inputs `[b, len, dim]`, and the rules of its attention, as in [`Inputs`].
#[derive(Clone, Debug)]
pub struct LayerInputs<'a> {
    /// `[b, len_q, embed_dim]`
    pub query: View<'a>,
    /// `[b, len_k, kdim]`
    pub key: View<'a>,
    /// `[b, len_k, vdim]`
    pub value: View<'a>,
    /// Causal rule, window and key lengths.
    pub positions: &'a Positions,
    /// Everything else. Masks and biases have the shape [`Layer::mask_shape`].
    pub rules: Rules<'a>,
}

/// The results of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOutputs {
    /// `[b, len_q, output_dim]`
    pub output: Vec<f64>,
    /// Of its attention: the heads' results, LSE and weights, extra keys included.
    pub attended: Outputs,
    /// The shape of the weights.
    pub weights_shape: [usize; 4],
}

/// The gradients of a layer, row-major. For an input that is passed more than once, they are to be added.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients {
    /// `[b, len_q, embed_dim]`
    pub query: Vec<f64>,
    /// `[b, len_k, kdim]`
    pub key: Vec<f64>,
    /// `[b, len_k, vdim]`
    pub value: Vec<f64>,
    /// Of weights and biases for queries, keys and values (`x` is the same as above, without the gate's part).
    pub projections: [ProjectGradients; 3],
    /// Of weight and bias of the output; `x` is that of the heads' results side by side.
    pub out: ProjectGradients,
    /// Of weight and bias of the gate.
    pub gate: Option<ProjectGradients>,
    /// Of weights and biases of the norms.
    pub norms: Option<[NormGradients; 2]>,
    /// Of the extra key and value.
    pub bias_kv: Option<[Vec<f64>; 2]>,
    /// Of the attention's own operands: heads, biases, sink, table by distance, scale.
    pub attention: Gradients,
}

/// A tensor that an inner step computes.
struct Computed {
    data: Vec<f64>,
    layout: Layout,
}

impl Computed {
    fn new(shape: &[usize], data: Vec<f64>) -> Computed {
        Computed { data, layout: Layout::contiguous(shape).expect("as large as its data") }
    }

    fn view(&self) -> View<'_> {
        View { data: &self.data, layout: &self.layout }
    }

    /// With the second and third of four axes exchanged, row-major: from tokens first to heads first, and back.
    fn exchanged(&self) -> Computed {
        let layout = self.layout.permute(&[0, 2, 1, 3]).expect("four axes");
        Computed::new(layout.shape(), layout.positions().map(|at| self.data[at]).collect())
    }

    fn reshaped(self, shape: &[usize]) -> Computed {
        Computed::new(shape, self.data)
    }
}

/// Everything that a layer computes on the way.
struct Steps {
    problem: Problem,
    /// The projections of queries, keys and values, `[b, len, width]`.
    projected: [Computed; 3],
    /// Normalised, with the extra rows, by head: `[b, heads, len, dim]`.
    heads: [Computed; 3],
    attended: Outputs,
    /// The heads' results side by side, `[b, len_q, heads · dim]`.
    joined: Computed,
    gate: Option<Computed>,
    /// `joined` after the gate.
    gated: Computed,
    output: Computed,
}

impl Layer<'_> {
    /// What masks and biases of a call are broadcast to: `[b, heads, len_q, len_k]`, without the extra keys.
    pub fn mask_shape(&self, inputs: &LayerInputs<'_>) -> [usize; 4] {
        let [batch, len_q] = [0, 1].map(|axis| inputs.query.layout.shape()[axis]);
        [batch, self.heads[0], len_q, inputs.key.layout.shape()[1]]
    }

    /// The number of appended keys.
    fn extra_keys(&self) -> usize {
        usize::from(self.bias_kv.is_some()) + usize::from(self.zero_attn)
    }

    /// The heads of queries, keys or values.
    fn heads_of(&self, n: usize) -> usize {
        self.heads[usize::from(n > 0)]
    }

    /// The norm of queries or keys.
    fn norm(&self, n: usize) -> Option<Norm<'_>> {
        self.norms.as_ref()?.get(n).copied()
    }

    /// A projection `[b, len, width]` as rows of what is normalised together.
    fn rows_of(norm: &Norm<'_>, projected: &Computed) -> [usize; 4] {
        let &[batch, len, width] = projected.layout.shape() else { panic!("three axes") };
        let dim = norm.weight.layout.len();
        [batch, len, width / dim, dim]
    }

    fn steps(&self, inputs: &LayerInputs<'_>) -> Steps {
        let sources = [inputs.query, inputs.key, inputs.value];
        let projected = [0, 1, 2].map(|n| {
            let Projection { weight, bias } = self.projections[n];
            let &[batch, len, _] = sources[n].layout.shape() else { panic!("inputs have three axes") };
            Computed::new(&[batch, len, weight.layout.shape()[0]], project(sources[n], weight, bias))
        });
        let heads = [0, 1, 2].map(|n| {
            let rows = match self.norm(n) {
                None => projected[n].data.clone(),
                Some(norm) => {
                    let layout = Layout::contiguous(&Self::rows_of(&norm, &projected[n])).expect("as many elements");
                    let x = View { data: &projected[n].data, layout: &layout };
                    normalise(x, norm.weight, norm.bias, norm.centred, norm.epsilon)
                }
            };
            let &[batch, len, width] = projected[n].layout.shape() else { panic!("three axes") };
            let mut extended = Vec::new();
            for b in 0..batch {
                extended.extend_from_slice(&rows[b * len * width..(b + 1) * len * width]);
                if n > 0 {
                    if let Some(bias_kv) = self.bias_kv {
                        extended.extend((0..width).map(|d| bias_kv[n - 1].at(&[d])));
                    }
                    if self.zero_attn {
                        extended.extend(vec![0.0; width]);
                    }
                }
            }
            let len = len + if n > 0 { self.extra_keys() } else { 0 };
            Computed::new(&[batch, len, self.heads_of(n), width / self.heads_of(n)], extended).exchanged()
        });
        let [q, k, v] = [0, 1, 2].map(|n| heads[n].layout.shape());
        let problem =
            Problem::new(q, k, v, None, None, inputs.positions, self.extra_keys()).expect("consistent shapes");
        let attended = self.with_attention(&heads, inputs, |inputs| attention(&problem, inputs));
        let Problem { batch, heads_q, len_q, dim_v, .. } = problem;
        let joined = Computed::new(&[batch, heads_q, len_q, dim_v], attended.output.clone()).exchanged().reshaped(&[
            batch,
            len_q,
            heads_q * dim_v,
        ]);
        let gate_of = |Projection { weight, bias }: Projection<'_>| {
            Computed::new(joined.layout.shape(), project(inputs.query, weight, bias))
        };
        let gate_values = self.gate.map(gate_of);
        let gated = match &gate_values {
            None => joined.data.clone(),
            Some(values) => gate(joined.view(), values.view()),
        };
        let gated = Computed::new(joined.layout.shape(), gated);
        let output = project(gated.view(), self.out.weight, self.out.bias);
        let output = Computed::new(&[batch, len_q, self.out.weight.layout.shape()[0]], output);
        Steps { problem, projected, heads, attended, joined, gate: gate_values, gated, output }
    }

    fn with_attention<T>(
        &self,
        [q, k, v]: &[Computed; 3],
        inputs: &LayerInputs<'_>,
        compute: impl FnOnce(&Inputs<'_>) -> T,
    ) -> T {
        compute(&Inputs { q: q.view(), k: k.view(), v: v.view(), rules: inputs.rules.clone() })
    }
}

/// The output of a layer.
pub fn layer(layer: &Layer<'_>, inputs: &LayerInputs<'_>) -> LayerOutputs {
    let Steps { problem, attended, output, .. } = layer.steps(inputs);
    let Problem { batch, heads_q, len_q, len_k, .. } = problem;
    LayerOutputs { output: output.data, attended, weights_shape: [batch, heads_q, len_q, len_k] }
}

/// The backward of [`layer`]: the steps of the forward in reverse. `cotangents.output` is that of the layer's output,
/// `[b, len_q, output_dim]`; LSE and weights are those of its attention.
pub fn layer_backward(layer: &Layer<'_>, inputs: &LayerInputs<'_>, cotangents: &Cotangents<'_>) -> LayerGradients {
    let Steps { problem, projected, heads, attended, joined, gate, gated, output } = layer.steps(inputs);
    let Problem { batch, heads_q, len_q, dim_v, .. } = problem;
    let zeros = vec![0.0; output.data.len()];
    let d_output = cotangents.output.unwrap_or(View { data: &zeros, layout: &output.layout });
    let out = project_backward(gated.view(), layer.out.weight, d_output);
    let d_gated = View { data: &out.x, layout: &joined.layout };
    let (d_joined, gate) = match (&gate, layer.gate) {
        (Some(values), Some(projection)) => {
            let [d_joined, d_values] = gate_backward(joined.view(), values.view(), d_gated);
            let d_values = View { data: &d_values, layout: &values.layout };
            (d_joined, Some(project_backward(inputs.query, projection.weight, d_values)))
        }
        _ => (out.x.clone(), None),
    };
    let d_heads = Computed::new(&[batch, len_q, heads_q, dim_v], d_joined).exchanged();
    let cotangents = Cotangents { output: Some(d_heads.view()), ..*cotangents };
    let attention = layer.with_attention(&heads, inputs, |inputs| {
        backward(&problem, inputs, &attended, &cotangents, WantedGradients::ALL)
    });

    let sources = [inputs.query, inputs.key, inputs.value];
    let mut bias_kv = layer.bias_kv.map(|bias_kv| bias_kv.map(|bias| vec![0.0; bias.layout.len()]));
    let mut norms = Vec::new();
    let projections = [0, 1, 2].map(|n| {
        let gradient = [&attention.q, &attention.k, &attention.v][n].clone().expect("all are wanted");
        // By token, extra keys included.
        let tokens = Computed::new(heads[n].layout.shape(), gradient).exchanged();
        let &[batch, len, width] = projected[n].layout.shape() else { panic!("three axes") };
        let all_rows = tokens.layout.shape()[1];
        let mut rows = Vec::with_capacity(batch * len * width);
        for entry in tokens.data.chunks(all_rows * width) {
            rows.extend_from_slice(&entry[..len * width]);
            if let Some(bias_kv) = bias_kv.as_mut().filter(|_| n > 0) {
                let row = &entry[len * width..][..width];
                bias_kv[n - 1].iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
        if let Some(norm) = layer.norm(n) {
            let layout = Layout::contiguous(&Layer::rows_of(&norm, &projected[n])).expect("as many elements");
            let of = |data| View { data, layout: &layout };
            let back = normalise_backward(of(&projected[n].data), norm.weight, norm.centred, norm.epsilon, of(&rows));
            rows = back.x.clone();
            norms.push(back);
        }
        let rows = View { data: &rows, layout: &projected[n].layout };
        project_backward(sources[n], layer.projections[n].weight, rows)
    });
    let [mut query, key, value] = [0, 1, 2].map(|n| projections[n].x.clone());
    if let Some(gate) = &gate {
        query.iter_mut().zip(&gate.x).for_each(|(sum, x)| *sum += x);
    }
    let norms = norms.try_into().ok();
    LayerGradients { query, key, value, projections, out, gate, norms, bias_kv, attention }
}
