use super::scores::rows;
use super::{Cotangents, Gradients, Inputs, Outputs, View, attention, backward};
use crate::problem::{Layout, Problem, Rows, Sequence, WantedGradients};

/// Packed sequences: each attends as a call of its own. Q `[1, hq, total, d]` holds the queries of all sequences one
/// behind another, K and V their keys. `problem` is for all rows; each sequence has its own band. Output
/// `[1, hq, total, d]` and LSE `[1, hq, total]`; no weights, because each sequence has its own shape of them.
///
/// Rotary rows are listed for all rows of Q and of K. Masks and biases are not supported.
pub fn attention_packed(problem: &Problem, inputs: &Inputs<'_>, sequences: &[Sequence]) -> Outputs {
    let Problem { heads_q, len_q: total, dim_v, .. } = *problem;
    let mut all =
        Outputs { output: vec![0.0; heads_q * total * dim_v], lse: vec![0.0; heads_q * total], weights: vec![] };
    for (n, sequence) in sequences.iter().enumerate() {
        let one = One::new(problem, inputs, sequence, n);
        let outputs = one.with_inputs(inputs, attention);
        one.place_queries(&outputs.output, &mut all.output, heads_q, dim_v);
        one.place_queries(&outputs.lse, &mut all.lse, heads_q, 1);
    }
    all
}

/// The backward of [`attention_packed`]: gradients of Q, K and V as they are packed, those of the other operands summed
/// over sequences. Weights have no cotangent.
pub fn backward_packed(
    problem: &Problem,
    inputs: &Inputs<'_>,
    sequences: &[Sequence],
    cotangents: &Cotangents<'_>,
    wanted: WantedGradients,
) -> Gradients {
    let Problem { heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = *problem;
    let zeros = |wanted: bool, len: usize| wanted.then(|| vec![0.0; len]);
    let mut all = Gradients {
        q: zeros(wanted.q, heads_q * len_q * dim_k),
        k: zeros(wanted.k, heads_kv * len_k * dim_k),
        v: zeros(wanted.v, heads_kv * len_k * dim_v),
        ..Gradients::default()
    };
    for (n, sequence) in sequences.iter().enumerate() {
        let one = One::new(problem, inputs, sequence, n);
        let narrow = |x: View<'_>| x.layout.narrow(2, one.first_query, one.problem.len_q).expect("a part of the rows");
        let layouts = [cotangents.output.map(narrow), cotangents.lse.map(narrow)];
        let [output, lse] = [(cotangents.output, &layouts[0]), (cotangents.lse, &layouts[1])]
            .map(|(x, layout)| Some(View { data: x?.data, layout: layout.as_ref()? }));
        let cotangents = Cotangents { output, lse, weights: None };
        let gradients = one.with_inputs(inputs, |problem, inputs| {
            backward(problem, inputs, &attention(problem, inputs), &cotangents, wanted)
        });
        if let (Some(from), Some(into)) = (&gradients.q, &mut all.q) {
            one.place_queries(from, into, heads_q, dim_k);
        }
        for (from, into, dim) in [(&gradients.k, &mut all.k, dim_k), (&gradients.v, &mut all.v, dim_v)] {
            if let (Some(from), Some(into)) = (from, into) {
                place(from, into, [heads_kv, one.problem.len_k, dim], one.first_key);
            }
        }
        for (from, into) in [(gradients.sink, &mut all.sink), (gradients.distance, &mut all.distance)] {
            if let Some(from) = from {
                let into = into.get_or_insert_with(|| vec![0.0; from.len()]);
                into.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
            }
        }
        if let Some(scale) = gradients.scale {
            *all.scale.get_or_insert(0.0) += scale;
        }
    }
    all
}

/// One sequence as a call.
struct One {
    problem: Problem,
    /// The layouts of Q, K and V.
    layouts: [Layout; 3],
    first_query: usize,
    first_key: usize,
    index: usize,
}

impl One {
    fn new(problem: &Problem, inputs: &Inputs<'_>, sequence: &Sequence, index: usize) -> One {
        assert!(inputs.rules.masks.is_empty() && inputs.rules.biases.is_empty(), "packed sequences have no masks");
        let Sequence { first_query, len_q, first_key, len_k, band } = *sequence;
        let part = |x: View<'_>, first: usize, len: usize| x.layout.narrow(2, first, len).expect("a part of the rows");
        let [q, k, v] = [inputs.q, inputs.k, inputs.v];
        One {
            layouts: [part(q, first_query, len_q), part(k, first_key, len_k), part(v, first_key, len_k)],
            problem: Problem { batch: 1, len_q, len_k, bands: vec![band], ..problem.clone() },
            first_query,
            first_key,
            index,
        }
    }

    fn with_inputs<T>(&self, inputs: &Inputs<'_>, compute: impl FnOnce(&Problem, &Inputs<'_>) -> T) -> T {
        let [q, k, v] =
            [(inputs.q, 0), (inputs.k, 1), (inputs.v, 2)].map(|(x, n)| View { data: x.data, layout: &self.layouts[n] });
        let mut rules = inputs.rules.clone();
        rules.first_batch = self.index;
        if let Some(rotary) = &mut rules.rotary {
            let [queries, keys] = &mut rotary.rows;
            narrow_rows(queries, self.first_query, self.problem.len_q);
            narrow_rows(keys, self.first_key, self.problem.len_k);
        }
        compute(&self.problem, &Inputs { q, k, v, rules })
    }

    /// Copies rows `[h, len_q, dim]` of this sequence's queries to their place among all.
    fn place_queries(&self, from: &[f64], into: &mut [f64], heads: usize, dim: usize) {
        place(from, into, [heads, self.problem.len_q, dim], self.first_query);
    }
}

fn narrow_rows(all: &mut Rows, first: usize, len: usize) {
    *all = match all {
        Rows::From(start) => Rows::From(*start + first),
        Rows::Each { rows, .. } => Rows::Each { rows: rows[first..first + len].to_vec(), per_batch: false },
    };
}

/// Copies `[h, len, dim]` to the rows from `first` of `[h, total, dim]`.
fn place(from: &[f64], into: &mut [f64], [heads, len, dim]: [usize; 3], first: usize) {
    let total = into.len() / (heads * dim).max(1);
    for [h, i, d] in rows([heads, len, dim]) {
        into[(h * total + first + i) * dim + d] = from[(h * len + i) * dim + d];
    }
}
