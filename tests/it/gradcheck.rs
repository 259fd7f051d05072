//! The backward of the f64 reference against finite differences of its forward: every rule, every gradient, every
//! cotangent.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::problem::{Dropout, Layout, MaskMeaning, Positions, Problem, Rows, Sequence, WantedGradients};
use wgpu_attention::reference::{
    self, Cotangents, Distance, Gradients, Inputs, Layer, LayerInputs, Norm, Outputs, Projection, Rotary, Rules, View,
};
use wgpu_attention::{Align, Layout as AnyLayout};

/// How far a gradient may be from the finite difference, relative to the largest of its row.
const BAR: f64 = 1e-6;

/// Numbers that a function reads and that have gradients. Not all of them need to be used.
#[derive(Clone, Debug)]
struct Numbers {
    name: String,
    values: Vec<f64>,
    /// The order in which gradients are listed, and how many form a row.
    layout: Layout,
}

impl Numbers {
    fn new(name: impl Into<String>, shape: &[usize], values: Vec<f64>) -> Numbers {
        Numbers { name: name.into(), values, layout: Layout::contiguous(shape).unwrap() }
    }

    fn view(&self) -> View<'_> {
        View { data: &self.values, layout: &self.layout }
    }

    fn width(&self) -> usize {
        self.layout.shape().last().copied().unwrap_or(1).max(1)
    }
}

fn find<'a>(numbers: &'a [Numbers], name: &str) -> Option<&'a Numbers> {
    numbers.iter().find(|numbers| numbers.name == name)
}

fn uniform(rng: &mut Pcg64, len: usize, most: f64) -> Vec<f64> {
    (0..len).map(|_| (rng.random::<f64>() * 2.0 - 1.0) * most).collect()
}

/// The gradients of `Σ cotangent · results` by finite differences of the fourth order. The error of the method is
/// `h⁴/30` of the fifth derivative, and rounding adds a few ulp of a result, divided by h: about 1e-13 of either for
/// numbers around 1. Results are subtracted before they are summed, so that those which do not change cost no digits.
fn differences(numbers: &[Numbers], cotangent: &[f64], results: impl Fn(&[Numbers]) -> Vec<f64>) -> Vec<Vec<f64>> {
    const STEP: f64 = 1e-3;
    let mut moved = numbers.to_vec();
    let mut all = Vec::new();
    for (n, one) in numbers.iter().enumerate() {
        let mut gradients = Vec::new();
        for at in one.layout.positions() {
            let here = one.values[at];
            // An entry of −∞ is no number that can change.
            if !here.is_finite() {
                gradients.push(0.0);
                continue;
            }
            let mut at_steps = |steps: f64| {
                moved[n].values[at] = here + steps * STEP;
                let results = results(&moved);
                moved[n].values[at] = here;
                results
            };
            let ([less, more], [least, most]) = ([-1.0, 1.0].map(&mut at_steps), [-2.0, 2.0].map(&mut at_steps));
            let change = |a: f64, b: f64| if a == b { 0.0 } else { b - a };
            let terms = cotangent.iter().enumerate().map(|(r, cotangent)| {
                cotangent * (8.0 * change(less[r], more[r]) - change(least[r], most[r])) / (12.0 * STEP)
            });
            gradients.push(terms.sum());
        }
        all.push(gradients);
    }
    all
}

/// The largest difference relative to the largest gradient of its row; or what is too far off. Gradients below 1e-4 are
/// not judged relative to their own size: some are 0 by cancellation, and both sides round.
fn judge(numbers: &[Numbers], gradients: &[Vec<f64>], expected: &[Vec<f64>]) -> Result<f64, String> {
    assert_eq!(numbers.len(), gradients.len());
    let mut worst = 0.0f64;
    for ((numbers, got), expected) in numbers.iter().zip(gradients).zip(expected) {
        assert_eq!(got.len(), expected.len(), "{}", numbers.name);
        let width = numbers.width();
        for (n, (got, expected)) in got.chunks(width).zip(expected.chunks(width)).enumerate() {
            let largest = expected.iter().fold(1e-4f64, |most, x| most.max(x.abs()));
            for (d, (got, expected)) in got.iter().zip(expected).enumerate() {
                let off = (got - expected).abs() / largest;
                // False for NaN.
                let is_close = off <= BAR;
                if !is_close {
                    let at = (&numbers.name, n, d);
                    return Err(format!("the gradient of {at:?} is {got} instead of {expected}: off by {off:.1e}"));
                }
                worst = worst.max(off);
            }
        }
    }
    Ok(worst)
}

/// Which results enter the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Loss {
    output: bool,
    lse: bool,
    weights: bool,
    averaged: bool,
}

const LOSSES: [Loss; 6] = [
    Loss { output: true, lse: false, weights: false, averaged: false },
    Loss { output: false, lse: true, weights: false, averaged: false },
    Loss { output: false, lse: false, weights: true, averaged: false },
    Loss { output: false, lse: false, weights: true, averaged: true },
    Loss { output: true, lse: true, weights: true, averaged: false },
    Loss { output: true, lse: true, weights: true, averaged: true },
];

/// The cotangents of a loss, with their shapes.
struct Drawn {
    output: Option<Numbers>,
    lse: Option<Numbers>,
    weights: Option<Numbers>,
}

impl Drawn {
    fn new(rng: &mut Pcg64, loss: Loss, output: &[usize], [b, h, i, j]: [usize; 4]) -> Drawn {
        let mut draw = |wanted: bool, name: &str, shape: &[usize]| {
            wanted.then(|| Numbers::new(name, shape, uniform(rng, shape.iter().product(), 1.0)))
        };
        let weights: &[usize] = if loss.averaged { &[b, i, j] } else { &[b, h, i, j] };
        Drawn {
            output: draw(loss.output, "output", output),
            lse: draw(loss.lse, "lse", &[b, h, i]),
            weights: draw(loss.weights, "weights", weights),
        }
    }

    fn cotangents(&self) -> Cotangents<'_> {
        let [output, lse, weights] = [&self.output, &self.lse, &self.weights].map(|x| x.as_ref().map(Numbers::view));
        Cotangents { output, lse, weights }
    }

    /// What [`results`] of a call enter the loss with.
    fn of_results(&self, output: &[f64], outputs: &Outputs, [b, h, i, j]: [usize; 4]) -> Vec<f64> {
        let or_zeros = |x: &Option<Numbers>, len| x.as_ref().map_or(vec![0.0; len], |x| x.values.clone());
        let weights = match &self.weights {
            // Averaging is written out here: each head's weight counts with its share.
            Some(weights) if weights.layout.rank() == 3 => {
                let of = |at: usize| weights.values[at / (h * i * j) * i * j + at % (i * j)] / h as f64;
                (0..b * h * i * j).map(of).collect()
            }
            weights => or_zeros(weights, outputs.weights.len()),
        };
        [or_zeros(&self.output, output.len()), or_zeros(&self.lse, outputs.lse.len()), weights].concat()
    }
}

/// All results one after the other.
fn results(output: &[f64], outputs: &Outputs) -> Vec<f64> {
    [output, &outputs.lse, &outputs.weights].concat()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Alibi,
    T5,
    Shaw,
}

/// The rules that a call has.
#[derive(Clone, Copy, Debug, Default)]
struct Form {
    name: &'static str,
    scale: bool,
    softcap: bool,
    masks: bool,
    biases: bool,
    lengths: bool,
    causal: bool,
    window: bool,
    sink: bool,
    /// Whether adjacent columns form a pair.
    rotary: Option<bool>,
    distance: Option<Kind>,
    dropout: bool,
    extra_keys: bool,
    mean_where_empty: bool,
    /// Heads inside the sequence.
    strided: bool,
}

fn forms() -> Vec<Form> {
    let plain = Form { name: "plain", ..Form::default() };
    let all = Form {
        name: "everything",
        scale: true,
        softcap: true,
        masks: true,
        biases: true,
        lengths: true,
        causal: true,
        window: true,
        sink: true,
        rotary: Some(false),
        distance: Some(Kind::Shaw),
        dropout: true,
        extra_keys: true,
        strided: true,
        ..plain
    };
    vec![
        plain,
        Form { name: "scale", scale: true, ..plain },
        Form { name: "softcap", softcap: true, ..plain },
        Form { name: "masks", masks: true, ..plain },
        Form { name: "biases", biases: true, ..plain },
        Form { name: "lengths", lengths: true, ..plain },
        Form { name: "causal", causal: true, ..plain },
        Form { name: "window", window: true, ..plain },
        Form { name: "sink", sink: true, ..plain },
        Form { name: "sink of queries that see nothing", sink: true, causal: true, lengths: true, ..plain },
        Form { name: "rotary, halves", rotary: Some(false), ..plain },
        Form { name: "rotary, adjacent", rotary: Some(true), causal: true, ..plain },
        Form { name: "ALiBi", distance: Some(Kind::Alibi), causal: true, ..plain },
        Form { name: "T5", distance: Some(Kind::T5), softcap: true, ..plain },
        Form { name: "Shaw", distance: Some(Kind::Shaw), scale: true, ..plain },
        Form { name: "Shaw and rotary", distance: Some(Kind::Shaw), rotary: Some(true), softcap: true, ..plain },
        Form { name: "dropout", dropout: true, ..plain },
        Form { name: "extra keys", extra_keys: true, biases: true, distance: Some(Kind::Alibi), ..plain },
        Form { name: "mean of values", mean_where_empty: true, causal: true, lengths: true, masks: true, ..plain },
        Form { name: "strides", strided: true, ..plain },
        all,
        Form { name: "everything, T5", distance: Some(Kind::T5), rotary: Some(true), ..all },
        Form { name: "everything, ALiBi", distance: Some(Kind::Alibi), sink: false, ..all },
    ]
}

/// A drawn call: its numbers with gradients, and everything else.
struct Call {
    form: Form,
    problem: Problem,
    numbers: Vec<Numbers>,
    softcap: Option<f64>,
    masks: Vec<(Vec<bool>, AnyLayout, MaskMeaning)>,
    bias_layouts: Vec<Layout>,
    /// Cosines and sines, which have no gradient.
    rotary: Option<[Numbers; 2]>,
    buckets: Vec<usize>,
    dropout: Option<Dropout>,
}

/// The sizes of a call, without extra keys.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: [usize; 2],
    lens: [usize; 2],
    dims: [usize; 2],
}

impl Call {
    fn new(form: Form, seed: u64) -> Call {
        let mut rng = Pcg64::seed_from_u64(seed ^ 0x512e);
        let mut pick = |from: &[usize]| from[rng.random_range(0..from.len())];
        let (batch, heads_kv, group) = (pick(&[1, 2]), pick(&[1, 2]), pick(&[1, 2, 3]));
        let (lens, dims) = ([pick(&[1, 2, 3]), pick(&[2, 3, 5])], [pick(&[2, 4, 5]), pick(&[1, 3, 4])]);
        Call::sized(form, Sizes { batch, heads: [heads_kv * group, heads_kv], lens, dims }, seed)
    }

    fn sized(form: Form, sizes: Sizes, seed: u64) -> Call {
        let Sizes { batch, heads: [heads_q, heads_kv], lens: [len_q, len_k], dims: [dim_k, dim_v] } = sizes;
        let mut rng = Pcg64::seed_from_u64(seed);
        let rng = &mut rng;
        let extra_keys = if form.extra_keys { 2 } else { 0 };
        let keys = len_k;
        let len_k = len_k + extra_keys;
        let bound = |rng: &mut Pcg64, is: bool| is.then(|| rng.random_range(0..3usize));
        let positions = Positions {
            align: Align::PerBatch((0..batch).map(|_| rng.random_range(-2..=keys as i64)).collect()),
            causal: form.causal,
            window_left: bound(rng, form.window),
            window_right: bound(rng, form.window),
            key_lengths: form.lengths.then(|| (0..batch).map(|_| rng.random_range(0..=keys)).collect()),
        };
        let [q, k, v] =
            [[batch, heads_q, len_q, dim_k], [batch, heads_kv, len_k, dim_k], [batch, heads_kv, len_k, dim_v]];
        let problem = Problem::new(&q, &k, &v, None, None, &positions, extra_keys).unwrap();
        let mut numbers = Vec::new();
        for (name, [b, h, s, d]) in [("q", q), ("k", k), ("v", v)] {
            let layout = match form.strided {
                true => Layout::contiguous(&[b, s, h, d]).unwrap().permute(&[0, 2, 1, 3]).unwrap(),
                false => Layout::contiguous(&[b, h, s, d]).unwrap(),
            };
            let values = uniform(rng, layout.len(), 1.5);
            numbers.push(Numbers { name: name.into(), values, layout });
        }
        let full = [batch, heads_q, len_q, keys];
        let broadcast = |rng: &mut Pcg64| -> Vec<usize> {
            let rank = rng.random_range(1..=4usize);
            full[4 - rank..].iter().map(|&n| if rng.random_bool(0.4) { 1 } else { n }).collect()
        };
        let spread = |shape: &[usize]| Layout::contiguous(shape).unwrap().broadcast_to(&problem.mask_shape()).unwrap();
        let mut bias_layouts = Vec::new();
        for n in 0..if form.biases { 3 } else { 0 } {
            let shape = if n == 0 { full.to_vec() } else { broadcast(rng) };
            let mut values = uniform(rng, shape.iter().product(), 1.0);
            if n == 0 {
                values.iter_mut().for_each(|x| *x = if rng.random_bool(0.15) { f64::NEG_INFINITY } else { *x });
            }
            bias_layouts.push(spread(&shape));
            numbers.push(Numbers::new(format!("bias {n}"), &shape, values));
        }
        let masks = [MaskMeaning::Keep, MaskMeaning::Hide].into_iter().take(if form.masks { 2 } else { 0 });
        let masks = masks
            .map(|meaning| {
                let shape = broadcast(rng);
                let mask = (0..shape.iter().product()).map(|_| rng.random_bool(0.7) == (meaning == MaskMeaning::Keep));
                (mask.collect(), spread(&shape), meaning)
            })
            .collect();
        if form.sink {
            let mut sink = uniform(rng, heads_q, 2.0);
            if heads_q > 2 {
                sink[1] = f64::NEG_INFINITY;
            }
            numbers.push(Numbers::new("sink", &[heads_q], sink));
        }
        let far = (len_q + len_k + 4) as i64;
        let buckets = (-far..=far).map(|distance| (distance + far) as usize * 6 / (2 * far as usize + 1)).collect();
        if let Some(kind) = form.distance {
            let shape = match kind {
                Kind::Alibi => vec![heads_q],
                Kind::T5 => vec![6, heads_q],
                Kind::Shaw => vec![4, dim_k],
            };
            let mut table = uniform(rng, shape.iter().product(), 1.0);
            if kind == Kind::T5 {
                // A bucket that hides its keys.
                table[3 * heads_q] = f64::NEG_INFINITY;
            }
            numbers.push(Numbers::new("distance", &shape, table));
        }
        let scale = if form.scale { rng.random_range(-1.5..1.5) } else { 1.0 / (dim_k as f64).sqrt() };
        numbers.push(Numbers::new("scale", &[1], vec![scale]));
        let pairs = if seed.is_multiple_of(2) { dim_k / 2 } else { 1 };
        let rotary = form.rotary.map(|_| {
            // Tables may hold any numbers; these hold a factor on cosines and sines, too.
            let angles = uniform(rng, (len_q + len_k) * pairs, 3.0);
            let of = |f: fn(f64) -> f64| angles.iter().map(|&angle| 1.2 * f(angle)).collect();
            [of(f64::cos), of(f64::sin)].map(|table| Numbers::new("table", &[len_q + len_k, pairs], table))
        });
        let dropout = form.dropout.then(|| Dropout::new(0.4, seed, 3).unwrap());
        let softcap = form.softcap.then(|| rng.random_range(0.7..2.0));
        Call { form, problem, numbers, softcap, masks, bias_layouts, rotary, buckets, dropout }
    }

    fn rules<'a>(&'a self, numbers: &'a [Numbers]) -> Rules<'a> {
        let biases = numbers.iter().filter(|numbers| numbers.name.starts_with("bias"));
        let far = self.buckets.len() as i64 / 2;
        Rules {
            masks: self.masks.iter().map(|(data, layout, meaning)| (View { data, layout }, *meaning)).collect(),
            biases: biases.zip(&self.bias_layouts).map(|(bias, layout)| View { data: &bias.values, layout }).collect(),
            sink: find(numbers, "sink").map(Numbers::view),
            scale: find(numbers, "scale").map(|scale| scale.values[0]),
            softcap: self.softcap,
            rotary: self.rotary.as_ref().map(|[cos, sin]| Rotary {
                cos: cos.view(),
                sin: sin.view(),
                interleaved: self.form.rotary == Some(true),
                rows: [Rows::From(0), Rows::From(self.problem.len_q)],
            }),
            distance: self.form.distance.map(|kind| {
                let table = find(numbers, "distance").unwrap().view();
                match kind {
                    Kind::Alibi => Distance::Alibi { slopes: table },
                    Kind::T5 => Distance::T5 { table, first: -far, buckets: &self.buckets },
                    Kind::Shaw => Distance::Shaw { keys: table, left: 1 },
                }
            }),
            dropout: self.dropout,
            first_batch: 0,
            mean_where_empty: self.form.mean_where_empty,
        }
    }

    fn with<T>(&self, numbers: &[Numbers], compute: impl FnOnce(&Problem, &Inputs<'_>) -> T) -> T {
        let [q, k, v] = [0, 1, 2].map(|n| numbers[n].view());
        compute(&self.problem, &Inputs { q, k, v, rules: self.rules(numbers) })
    }

    fn shapes(&self) -> ([usize; 4], [usize; 4]) {
        let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = self.problem;
        ([batch, heads_q, len_q, dim_v], [batch, heads_q, len_q, len_k])
    }

    fn gradients(&self, cotangents: &Cotangents<'_>) -> Vec<Vec<f64>> {
        self.with(&self.numbers, |problem, inputs| {
            let outputs = reference::attention(problem, inputs);
            listed(reference::backward(problem, inputs, &outputs, cotangents, WantedGradients::ALL))
        })
    }

    fn differences(&self, drawn: &Drawn) -> Vec<Vec<f64>> {
        let (_, square) = self.shapes();
        let outputs = self.with(&self.numbers, reference::attention);
        let cotangent = drawn.of_results(&outputs.output, &outputs, square);
        differences(&self.numbers, &cotangent, |numbers| {
            let outputs = self.with(numbers, reference::attention);
            results(&outputs.output, &outputs)
        })
    }
}

/// Gradients in the order of the numbers.
fn listed(gradients: Gradients) -> Vec<Vec<f64>> {
    let Gradients { q, k, v, biases, sink, distance, scale } = gradients;
    let of_operands = [q, k, v].map(|gradient| gradient.unwrap());
    let scale = scale.map(|scale| vec![scale]);
    of_operands.into_iter().chain(biases.unwrap()).chain(sink).chain(distance).chain(scale).collect()
}

#[test]
fn every_rule_has_the_gradients_of_finite_differences() {
    let mut worst = (0.0, String::new());
    let mut queries_without_keys = 0;
    for (f, form) in forms().into_iter().enumerate() {
        for (l, loss) in LOSSES.into_iter().enumerate() {
            for turn in 0..3 {
                let seed = (f * 100 + l * 10 + turn) as u64;
                let call = Call::new(form, seed);
                let (output, square) = call.shapes();
                // A mean of values comes without weights.
                let drawn = Drawn::new(&mut Pcg64::seed_from_u64(seed + 1), loss, &output, square);
                let outputs = call.with(&call.numbers, reference::attention);
                queries_without_keys += outputs.lse.iter().filter(|&&lse| lse == f64::NEG_INFINITY).count();
                let gradients = call.gradients(&drawn.cotangents());
                let off = judge(&call.numbers, &gradients, &call.differences(&drawn));
                let off = off.unwrap_or_else(|error| panic!("{form:?}, {loss:?}, seed {seed}: {error}"));
                if off > worst.0 {
                    worst = (off, format!("{}, {loss:?}, seed {seed}", form.name));
                }
            }
        }
    }
    println!("the largest difference is {:.1e} of a row: {}", worst.0, worst.1);
    assert!(queries_without_keys > 50, "{queries_without_keys} queries that see nothing");
}

/// What a wrong backward could forget.
type Fault = (&'static str, fn(&mut Rules<'_>, &mut Cotangents<'_>));

const FAULTS: [Fault; 10] = [
    ("dO", |_, cotangents| cotangents.output = None),
    ("dLSE", |_, cotangents| cotangents.lse = None),
    ("dW", |_, cotangents| cotangents.weights = None),
    ("the softcap", |rules, _| rules.softcap = Some(1e9)),
    ("dropout", |rules, _| rules.dropout = None),
    ("which batch entry it is", |rules, _| rules.first_batch = 1),
    ("a mask", |rules, _| rules.masks.truncate(1)),
    ("a bias", |rules, _| rules.biases[0] = rules.biases[1]),
    ("how columns are paired", |rules, _| rules.rotary.as_mut().unwrap().interleaved = true),
    ("the sink", |rules, _| rules.sink = None),
];

#[test]
fn a_wrong_gradient_is_refused() {
    let everything = forms().into_iter().find(|form| form.name == "everything").unwrap();
    let sizes = Sizes { batch: 2, heads: [4, 2], lens: [3, 5], dims: [4, 3] };
    let mut refused = [0; FAULTS.len()];
    for seed in [2, 4, 6] {
        let call = Call::sized(everything, sizes, seed);
        let (output, square) = call.shapes();
        let drawn = Drawn::new(&mut Pcg64::seed_from_u64(seed + 1), LOSSES[4], &output, square);
        let (gradients, expected) = (call.gradients(&drawn.cotangents()), call.differences(&drawn));
        judge(&call.numbers, &gradients, &expected).unwrap();
        // One number of each gradient, slightly off.
        for (n, numbers) in call.numbers.iter().enumerate() {
            let mut wrong = gradients.clone();
            let largest = (0..wrong[n].len()).max_by(|&a, &b| wrong[n][a].abs().total_cmp(&wrong[n][b].abs())).unwrap();
            assert!(wrong[n][largest].abs() > 1e-3, "{}: a gradient to change", numbers.name);
            wrong[n][largest] *= 1.0 + 1e-5;
            assert!(judge(&call.numbers, &wrong, &expected).unwrap_err().contains(&numbers.name));
            wrong[n][largest] = f64::NAN;
            assert!(judge(&call.numbers, &wrong, &expected).is_err());
        }
        let outputs = call.with(&call.numbers, reference::attention);
        for ((_, forget), refused) in FAULTS.into_iter().zip(&mut refused) {
            let mut cotangents = drawn.cotangents();
            let gradients = call.with(&call.numbers, |problem, inputs| {
                let mut inputs = inputs.clone();
                forget(&mut inputs.rules, &mut cotangents);
                let all = reference::backward(problem, &inputs, &outputs, &cotangents, WantedGradients::ALL);
                // Without a sink there is no gradient of it.
                listed(Gradients { sink: all.sink.or(Some(vec![0.0; problem.heads_q])), ..all })
            });
            *refused += usize::from(judge(&call.numbers, &gradients, &expected).is_err());
        }
    }
    // A mask may hide only what is hidden anyway; nothing else may be missed.
    for ((fault, _), refused) in FAULTS.into_iter().zip(refused) {
        assert!(
            refused == 3 || fault == "a mask" && refused > 0,
            "a backward without {fault} is refused {refused} times"
        );
    }
}

#[test]
fn only_what_is_wanted_is_returned() {
    let everything = forms().into_iter().find(|form| form.name == "everything").unwrap();
    let call = Call::new(everything, 4);
    let (output, square) = call.shapes();
    let drawn = Drawn::new(&mut Pcg64::seed_from_u64(5), LOSSES[4], &output, square);
    let of = |wanted| {
        call.with(&call.numbers, |problem, inputs| {
            let outputs = reference::attention(problem, inputs);
            reference::backward(problem, inputs, &outputs, &drawn.cotangents(), wanted)
        })
    };
    let all = of(WantedGradients::ALL);
    assert_eq!(of(WantedGradients::NONE), Gradients::default());
    let some = of(WantedGradients { k: true, sink: true, ..WantedGradients::NONE });
    assert_eq!(some, Gradients { k: all.k, sink: all.sink, ..Gradients::default() });
    // Gradients of operands that the call does not have.
    let plain = Call::new(forms()[0], 4);
    let all = plain.with(&plain.numbers, |problem, inputs| {
        let outputs = reference::attention(problem, inputs);
        reference::backward(problem, inputs, &outputs, &Cotangents::default(), WantedGradients::ALL)
    });
    assert!(all.sink.is_none() && all.distance.is_none() && all.biases == Some(vec![]));
}

fn same_bits(a: &[Vec<f64>], b: &[Vec<f64>]) -> bool {
    let bits = |all: &[Vec<f64>]| -> Vec<Vec<u64>> {
        all.iter().map(|one| one.iter().map(|x| x.to_bits()).collect()).collect()
    };
    bits(a) == bits(b)
}

#[test]
fn what_is_hidden_changes_no_bit() {
    let mut met = [0; 3];
    for (f, form) in forms().into_iter().enumerate().filter(|(_, form)| !form.mean_where_empty) {
        for turn in 0..4 {
            let seed = (1000 + f * 10 + turn) as u64;
            let mut call = Call::new(form, seed);
            let (output, square) = call.shapes();
            let [batch, heads, len_q, len_k] = square;
            let mut drawn = Drawn::new(&mut Pcg64::seed_from_u64(seed + 1), LOSSES[4], &output, square);
            let before = call.gradients(&drawn.cotangents());
            let outputs = call.with(&call.numbers, reference::attention);
            let weight = |[b, h, i, j]: [usize; 4]| outputs.weights[((b * heads + h) * len_q + i) * len_k + j];
            // Keys that no query sees, values likewise; weights of hidden pairs; queries that see nothing.
            let group = call.problem.group();
            for b in 0..batch {
                for h in 0..heads {
                    for i in 0..len_q {
                        if (0..len_k).all(|j| weight([b, h, i, j]) == 0.0) {
                            met[0] += 1;
                            for x in [drawn.output.as_mut().unwrap(), &mut call.numbers[0]] {
                                for d in 0..x.width() {
                                    let at = x.layout.at(&[b, h, i, d]);
                                    x.values[at] = f64::NAN;
                                }
                            }
                        }
                        for j in (0..len_k).filter(|&j| weight([b, h, i, j]) == 0.0) {
                            met[1] += 1;
                            let weights = drawn.weights.as_mut().unwrap();
                            let at = weights.layout.at(&[b, h, i, j]);
                            weights.values[at] = f64::INFINITY;
                        }
                    }
                }
                for head_kv in 0..heads / group {
                    let sees = |j: usize| {
                        let of_group = head_kv * group..(head_kv + 1) * group;
                        of_group.flat_map(|h| (0..len_q).map(move |i| (h, i))).any(|(h, i)| weight([b, h, i, j]) != 0.0)
                    };
                    for j in (0..len_k).filter(|&j| !sees(j)) {
                        met[2] += 1;
                        for x in &mut call.numbers[1..3] {
                            for d in 0..x.width() {
                                let at = x.layout.at(&[b, head_kv, j, d]);
                                x.values[at] = [f64::NAN, f64::INFINITY][d % 2];
                            }
                        }
                    }
                }
            }
            let after = call.gradients(&drawn.cotangents());
            assert!(same_bits(&before, &after), "{form:?}, seed {seed}: {before:?} became {after:?}");
            assert!(after.iter().flatten().all(|x| x.is_finite()));
        }
    }
    assert!(met.iter().all(|&n| n > 30), "{met:?}");
}

#[test]
fn nan_reaches_what_depends_on_it() {
    // Query i sees keys 0 to i.
    let (len, dim) = (4, 2);
    let shape = [1, 1, len, dim];
    let positions = Positions { causal: true, ..Positions::default() };
    let problem = Problem::new(&shape, &shape, &shape, None, None, &positions, 0).unwrap();
    let mut rng = Pcg64::seed_from_u64(3);
    let plain: Vec<Numbers> =
        ["q", "k", "v", "dO"].iter().map(|name| Numbers::new(*name, &shape, uniform(&mut rng, 8, 1.0))).collect();
    let rows_with_nan = |broken: usize, row: usize| {
        let mut all = plain.clone();
        all[broken].values[row * dim] = f64::NAN;
        let [q, k, v, output] = [0, 1, 2, 3].map(|n| all[n].view());
        let inputs = Inputs::new(q, k, v);
        let outputs = reference::attention(&problem, &inputs);
        let cotangents = Cotangents { output: Some(output), ..Cotangents::default() };
        let Gradients { q, k, v, .. } =
            reference::backward(&problem, &inputs, &outputs, &cotangents, WantedGradients::ALL);
        [q, k, v].map(|gradient| {
            let gradient = gradient.unwrap();
            (0..len).filter(|i| gradient[i * dim..][..dim].iter().any(|x| x.is_nan())).collect::<Vec<_>>()
        })
    };
    // A query: its own gradient, and all keys and values that it sees.
    assert_eq!(rows_with_nan(0, 2), [vec![2], vec![0, 1, 2], vec![0, 1, 2]]);
    // A key: all queries that see it, and what these see.
    assert_eq!(rows_with_nan(1, 2), [vec![2, 3], vec![0, 1, 2, 3], vec![0, 1, 2, 3]]);
    // A value does not reach the gradients of values.
    assert_eq!(rows_with_nan(2, 3), [vec![3], vec![0, 1, 2, 3], vec![]]);
    assert_eq!(rows_with_nan(3, 1), [vec![1], vec![0, 1], vec![0, 1]]);
}

#[test]
fn packed_sequences_have_the_gradients_of_finite_differences() {
    let mut rng = Pcg64::seed_from_u64(21);
    let (heads_q, heads_kv, dim_k, dim_v) = (4, 2, 4, 3);
    let (starts_q, starts_k) = ([0, 2, 2, 5], [0, 3, 4, 8]);
    let positions = Positions { causal: true, align: Align::PerBatch(vec![1, 0, -1]), ..Positions::default() };
    let sequences: Vec<Sequence> = positions.sequences(&starts_q, &starts_k, 5, 8).unwrap();
    // Packed rows have their heads side by side.
    let mut numbers: Vec<Numbers> = [("q", heads_q, 5, dim_k), ("k", heads_kv, 8, dim_k), ("v", heads_kv, 8, dim_v)]
        .into_iter()
        .map(|(name, heads, total, dim)| {
            let layout = Layout::contiguous(&[1, total, heads, dim]).unwrap().permute(&[0, 2, 1, 3]).unwrap();
            Numbers { name: name.into(), values: uniform(&mut rng, layout.len(), 1.0), layout }
        })
        .collect();
    let shapes = [0, 1, 2].map(|n| numbers[n].layout.shape().to_vec());
    let problem = Problem::new(&shapes[0], &shapes[1], &shapes[2], None, None, &Positions::default(), 0).unwrap();
    numbers.push(Numbers::new("sink", &[heads_q], uniform(&mut rng, heads_q, 1.0)));
    numbers.push(Numbers::new("distance", &[heads_q], uniform(&mut rng, heads_q, 1.0)));
    numbers.push(Numbers::new("scale", &[1], vec![0.7]));
    let angles = uniform(&mut rng, 9 * 2, 3.0);
    let [cos, sin] =
        [f64::cos, f64::sin].map(|f| Numbers::new("table", &[9, 2], angles.iter().map(|&angle| f(angle)).collect()));
    let rows = |starts: &[usize]| Rows::Each {
        rows: starts.windows(2).flat_map(|part| 0..(part[1] - part[0]) as u32).collect(),
        per_batch: false,
    };
    let with = |numbers: &[Numbers], compute: &mut dyn FnMut(&Inputs<'_>)| {
        let rules = Rules {
            sink: Some(numbers[3].view()),
            distance: Some(Distance::Alibi { slopes: numbers[4].view() }),
            scale: Some(numbers[5].values[0]),
            rotary: Some(Rotary {
                cos: cos.view(),
                sin: sin.view(),
                interleaved: false,
                rows: [rows(&starts_q), rows(&starts_k)],
            }),
            dropout: Some(Dropout::new(0.3, 1, 0).unwrap()),
            ..Rules::default()
        };
        compute(&Inputs { q: numbers[0].view(), k: numbers[1].view(), v: numbers[2].view(), rules });
    };
    let forward = |numbers: &[Numbers]| {
        let mut all = Vec::new();
        with(numbers, &mut |inputs| {
            let outputs = reference::attention_packed(&problem, inputs, &sequences);
            all = [outputs.output, outputs.lse].concat();
        });
        all
    };
    let output = Numbers::new("dO", &[1, heads_q, 5, dim_v], uniform(&mut rng, heads_q * 5 * dim_v, 1.0));
    let lse = Numbers::new("dLSE", &[1, heads_q, 5], uniform(&mut rng, heads_q * 5, 1.0));
    let cotangents = Cotangents { output: Some(output.view()), lse: Some(lse.view()), weights: None };
    let mut gradients = Vec::new();
    with(&numbers, &mut |inputs| {
        let all = reference::backward_packed(&problem, inputs, &sequences, &cotangents, WantedGradients::ALL);
        gradients = listed(Gradients { biases: Some(vec![]), ..all });
    });
    let expected = differences(&numbers, &[output.values.clone(), lse.values.clone()].concat(), forward);
    let off = judge(&numbers, &gradients, &expected).unwrap();
    println!("the largest difference of packed sequences is {off:.1e} of a row");
    // A sequence's dropout depends on its place.
    assert!(forward(&numbers)[..2 * dim_v] != forward(&numbers)[2 * dim_v..][..2 * dim_v]);
}

#[test]
fn learned_positions_have_the_gradients_of_finite_differences() {
    let mut rng = Pcg64::seed_from_u64(31);
    let (batch, len, dim) = (2, 3, 4);
    for rows in [
        Rows::From(1),
        Rows::Each { rows: vec![4, 0, 4], per_batch: false },
        Rows::Each { rows: vec![4, 0, 4, 1, 1, 1], per_batch: true },
    ] {
        let numbers = vec![
            Numbers::new("x", &[batch, len, dim], uniform(&mut rng, 24, 1.0)),
            Numbers::new("table", &[5, dim], uniform(&mut rng, 20, 1.0)),
        ];
        let dy = Numbers::new("dY", &[batch, len, dim], uniform(&mut rng, 24, 1.0));
        let forward = |numbers: &[Numbers]| reference::add_positions(numbers[0].view(), numbers[1].view(), &rows);
        let d_table = reference::add_positions_backward(dy.view(), numbers[1].view(), &rows);
        let expected = differences(&numbers, &dy.values, forward);
        judge(&numbers, &[dy.values.clone(), d_table], &expected).unwrap();
    }
}

/// What a drawn layer has.
#[derive(Clone, Copy, Debug, Default)]
struct LayerForm {
    name: &'static str,
    /// Query heads and key/value heads, widths of queries and of values of a head.
    heads: [usize; 2],
    dims: [usize; 2],
    no_biases: bool,
    gate: bool,
    /// The width of the norm: of a head if 1, of all heads if 2. LayerNorm with a bias, not RMSNorm.
    norm: Option<(usize, bool)>,
    bias_kv: bool,
    zero_attn: bool,
    rules: Form,
}

#[test]
fn layers_have_the_gradients_of_finite_differences() {
    let none = Form::default();
    let plain = LayerForm { name: "plain", heads: [2, 2], dims: [2, 2], ..LayerForm::default() };
    let forms = [
        plain,
        LayerForm { name: "no biases", no_biases: true, ..plain },
        LayerForm { name: "grouped, other widths", heads: [4, 2], dims: [2, 3], ..plain },
        LayerForm { name: "gate", gate: true, dims: [2, 3], ..plain },
        LayerForm { name: "RMSNorm of a head", norm: Some((1, false)), dims: [4, 2], heads: [2, 1], ..plain },
        LayerForm { name: "LayerNorm of a head", norm: Some((1, true)), dims: [4, 2], ..plain },
        LayerForm { name: "RMSNorm of all heads", norm: Some((2, false)), heads: [4, 2], ..plain },
        LayerForm { name: "LayerNorm of all heads", norm: Some((2, true)), ..plain },
        LayerForm { name: "extra keys", bias_kv: true, zero_attn: true, rules: Form { masks: true, ..none }, ..plain },
        LayerForm { name: "learned extra key", bias_kv: true, heads: [2, 1], dims: [3, 2], ..plain },
        LayerForm { name: "masks, sink", rules: Form { masks: true, sink: true, causal: true, ..none }, ..plain },
        LayerForm {
            name: "rotary after a norm",
            norm: Some((1, false)),
            dims: [4, 2],
            rules: Form { rotary: Some(false), causal: true, ..none },
            ..plain
        },
        LayerForm {
            name: "Shaw, biases, softcap",
            rules: Form { distance: Some(Kind::Shaw), biases: true, softcap: true, ..none },
            ..plain
        },
        LayerForm {
            name: "T5, dropout, gate",
            gate: true,
            rules: Form { distance: Some(Kind::T5), dropout: true, ..none },
            ..plain
        },
    ];
    let mut worst = (0.0, String::new());
    for (f, form) in forms.into_iter().enumerate() {
        for (l, loss) in LOSSES.into_iter().enumerate().filter(|(_, loss)| loss.output || loss.lse) {
            let seed = (5000 + f * 10 + l) as u64;
            let off = check_layer(form, loss, seed).unwrap_or_else(|error| panic!("{form:?}, {loss:?}: {error}"));
            if off > worst.0 {
                worst = (off, format!("{}, {loss:?}", form.name));
            }
        }
    }
    println!("the largest difference of a layer is {:.1e} of a row: {}", worst.0, worst.1);
}

fn check_layer(form: LayerForm, loss: Loss, seed: u64) -> Result<f64, String> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let (batch, len_q, len_k) = (2, 2, 3);
    let [embed, kdim, vdim, output_dim] = [3, 4, 2, 3];
    let ([heads_q, heads_kv], [dim_k, dim_v]) = (form.heads, form.dims);
    // The call gives masks, biases and tables for its rules.
    let sizes = Sizes { batch, heads: form.heads, lens: [len_q, len_k], dims: form.dims };
    let call = Call::sized(form.rules, sizes, seed);
    let mut numbers: Vec<Numbers> = Vec::new();
    let mut add = |name: &str, shape: &[usize]| {
        let values = uniform(&mut rng, shape.iter().product(), 1.0);
        numbers.push(Numbers::new(name, shape, values));
    };
    add("query", &[batch, len_q, embed]);
    add("key", &[batch, len_k, kdim]);
    add("value", &[batch, len_k, vdim]);
    let widths = [heads_q * dim_k, heads_kv * dim_k, heads_kv * dim_v];
    let joined = heads_q * dim_v;
    let projections = [("q", widths[0], embed), ("k", widths[1], kdim), ("v", widths[2], vdim)];
    let gate = form.gate.then_some(("gate", joined, embed));
    for (name, rows, columns) in projections.into_iter().chain([("out", output_dim, joined)]).chain(gate) {
        add(&format!("{name} weight"), &[rows, columns]);
        if !form.no_biases {
            add(&format!("{name} bias"), &[rows]);
        }
    }
    if let Some((span, centred)) = form.norm {
        for (n, name) in ["q", "k"].into_iter().enumerate() {
            let width = if span == 1 { dim_k } else { widths[n] };
            add(&format!("{name} norm weight"), &[width]);
            if centred {
                add(&format!("{name} norm bias"), &[width]);
            }
        }
    }
    if form.bias_kv {
        add("bias_k", &[widths[1]]);
        add("bias_v", &[widths[2]]);
    }
    // Without the operands of the drawn call.
    let of_rules = numbers.len();
    numbers.extend_from_slice(&call.numbers[3..]);

    let positions = Positions { causal: form.rules.causal, ..Positions::default() };
    let with = |numbers: &[Numbers], compute: &mut dyn FnMut(&Layer<'_>, &LayerInputs<'_>)| {
        let view = |name: &str| find(numbers, name).map(Numbers::view);
        let projection = |name: &str| {
            let weight = view(&format!("{name} weight"))?;
            Some(Projection { weight, bias: view(&format!("{name} bias")) })
        };
        let norm = |name: &str| {
            let (_, centred) = form.norm?;
            let weight = view(&format!("{name} norm weight"))?;
            Some(Norm { weight, bias: view(&format!("{name} norm bias")), centred, epsilon: 0.01 })
        };
        let layer = Layer {
            heads: form.heads,
            projections: ["q", "k", "v"].map(|name| projection(name).unwrap()),
            out: projection("out").unwrap(),
            gate: projection("gate"),
            norms: norm("q").zip(norm("k")).map(|(q, k)| [q, k]),
            bias_kv: view("bias_k").zip(view("bias_v")).map(|(key, value)| [key, value]),
            zero_attn: form.zero_attn,
        };
        let [query, key, value] = [0, 1, 2].map(|n| numbers[n].view());
        let rules = call.rules(&numbers[of_rules..]);
        compute(&layer, &LayerInputs { query, key, value, positions: &positions, rules });
    };
    let mut outputs = None;
    with(&numbers, &mut |layer, inputs| outputs = Some(reference::layer(layer, inputs)));
    let outputs = outputs.unwrap();
    let square = outputs.weights_shape;
    let drawn = Drawn::new(&mut rng, loss, &[batch, len_q, output_dim], square);
    let expected = differences(&numbers, &drawn.of_results(&outputs.output, &outputs.attended, square), |numbers| {
        let mut all = Vec::new();
        with(numbers, &mut |layer, inputs| {
            let outputs = reference::layer(layer, inputs);
            all = results(&outputs.output, &outputs.attended);
        });
        all
    });
    let mut gradients = Vec::new();
    with(&numbers, &mut |layer, inputs| {
        let all = reference::layer_backward(layer, inputs, &drawn.cotangents());
        gradients.extend([all.query, all.key, all.value]);
        for part in all.projections.into_iter().chain([all.out]).chain(all.gate) {
            gradients.push(part.weight);
            if !form.no_biases {
                gradients.push(part.bias);
            }
        }
        for part in all.norms.into_iter().flatten() {
            gradients.push(part.weight);
            if form.norm.is_some_and(|(_, centred)| centred) {
                gradients.push(part.bias);
            }
        }
        gradients.extend(all.bias_kv.into_iter().flatten());
        gradients.extend(listed(all.attention).split_off(3));
    });
    judge(&numbers, &gradients, &expected)
}
