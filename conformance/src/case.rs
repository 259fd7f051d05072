//! Named cases: an operation over a drawn call. The name reproduces the case in any run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::str::FromStr;

use wgpu_attention::problem::Positions;
use wgpu_attention::{Align, Dtype, Method};

use crate::call::{Call, Order};
use crate::draw::{FORMS, draw};

/// The operation to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Output and LSE.
    Attention,
    /// Weights per head and averaged, and the scores of a stage, in addition to output and LSE.
    Weights,
    /// Weights, column sums and entropies of some heads and queries, from the LSE.
    Inspect,
    /// Attention with ALiBi's slopes.
    Alibi,
    /// Attention with T5's biases.
    T5,
    /// Attention with rotary positions.
    Rotary,
    /// Packed sequences of different lengths.
    Packed,
    /// A key/value cache filled step by step.
    Cache,
    /// Two halves of the keys, joined by their LSE.
    Merge,
    /// Softmax over one axis.
    Softmax,
    /// A linear projection.
    Projection,
    /// Rows of 16,384 to 1,048,576 keys: random scores, equal scores, or one key that takes all the weight.
    LongRows,
    /// How many iterations the loops of an invocation run: planning relies on this number.
    Loops,
}

impl Op {
    pub const ALL: [Op; 13] = [
        Op::Attention,
        Op::Weights,
        Op::Inspect,
        Op::Alibi,
        Op::T5,
        Op::Rotary,
        Op::Packed,
        Op::Cache,
        Op::Merge,
        Op::Softmax,
        Op::Projection,
        Op::LongRows,
        Op::Loops,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Op::Attention => "attention",
            Op::Weights => "weights",
            Op::Inspect => "inspect",
            Op::Alibi => "alibi",
            Op::T5 => "t5",
            Op::Rotary => "rotary",
            Op::Packed => "packed",
            Op::Cache => "cache",
            Op::Merge => "merge",
            Op::Softmax => "softmax",
            Op::Projection => "projection",
            Op::LongRows => "long-rows",
            Op::Loops => "loops",
        }
    }

    /// Whether the operation can be computed by `method`.
    pub fn takes(self, method: Method) -> bool {
        match self {
            Op::Attention | Op::Alibi | Op::T5 | Op::Rotary => true,
            // Packed sequences run only fused.
            Op::Packed => method != Method::ThreePasses,
            _ => method == Method::Auto,
        }
    }

    /// Whether it is a single forward call, which can be exported as a plan.
    pub fn is_one_call(self) -> bool {
        matches!(self, Op::Attention | Op::Alibi | Op::T5 | Op::Rotary)
    }

    /// The forms that it is drawn in, with the number of calls per storage type and the number of quick f32 calls.
    fn amount(self) -> (&'static [&'static str], u64, u64) {
        match self {
            Op::Attention => (&["plain", "causal", "wide", "bands", "capped", "biased", "ruled", "all"], 180, 12),
            Op::Weights => (&["plain", "bands", "capped", "all"], 16, 3),
            Op::Inspect => (&["plain", "bands", "all"], 16, 3),
            Op::Alibi | Op::T5 | Op::Rotary => (&["causal"], 40, 4),
            Op::Packed => (&["plain", "causal"], 20, 3),
            Op::Cache => (&["causal"], 16, 2),
            Op::Merge => (&["plain"], 16, 2),
            Op::Softmax | Op::Projection => (&["plain"], 32, 4),
            Op::LongRows => (&["plain"], LONG_ROWS.len() as u64, 1),
            Op::Loops => (&["plain"], 1, 1),
        }
    }
}

/// Queries, keys and width of the long rows, by the seed's last digits; whether scores are random.
const LONG_ROWS: [(usize, usize, usize, bool); 9] = [
    (3, 1 << 14, 16, false),
    (3, 1 << 14, 16, true),
    (3, 1 << 16, 16, false),
    (3, 1 << 16, 16, true),
    (3, 1 << 18, 16, false),
    (3, 1 << 18, 16, true),
    (3, 1 << 20, 16, false),
    (1, 1 << 20, 16, true),
    (4096, 1 << 16, 64, false),
];

/// A size of a call that a case may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    LenK,
    LenQ,
    Batch,
    HeadsKv,
    /// Query heads of a key head.
    Group,
    DimV,
    DimK,
}

impl Size {
    const ALL: [(Size, &'static str); 7] = [
        (Size::LenK, "len_k"),
        (Size::LenQ, "len_q"),
        (Size::Batch, "batch"),
        (Size::HeadsKv, "heads_kv"),
        (Size::Group, "group"),
        (Size::DimV, "dim_v"),
        (Size::DimK, "dim_k"),
    ];
}

/// A rule of a call that a case may omit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Masks,
    Biases,
    Bands,
    Softcap,
    Scale,
    Sink,
    Strides,
}

impl Rule {
    const ALL: [(Rule, &'static str); 7] = [
        (Rule::Masks, "masks"),
        (Rule::Biases, "biases"),
        (Rule::Bands, "bands"),
        (Rule::Softcap, "softcap"),
        (Rule::Scale, "scale"),
        (Rule::Sink, "sink"),
        (Rule::Strides, "strides"),
    ];
}

/// A named call, such as `attention/bands/f16/17`; with changes, `attention/bands/f16/17,len_k=9,no-masks`.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub op: Op,
    /// Index into [`FORMS`].
    pub form: usize,
    /// The memory layout of Q, K and V.
    pub storage: Dtype,
    pub seed: u64,
    pub sizes: BTreeMap<Size, usize>,
    pub without: BTreeSet<Rule>,
}

impl Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}/{}", self.op.name(), FORMS[self.form].name, self.storage, self.seed)?;
        for (size, n) in &self.sizes {
            let name = Size::ALL.iter().find(|(known, _)| known == size).map_or("", |(_, name)| name);
            write!(f, ",{name}={n}")?;
        }
        for rule in &self.without {
            let name = Rule::ALL.iter().find(|(known, _)| known == rule).map_or("", |(_, name)| name);
            write!(f, ",no-{name}")?;
        }
        Ok(())
    }
}

/// The largest size in a name, because people may type anything.
const MOST: usize = 1 << 20;
/// The most elements of Q, K, V and the scores together.
const MOST_ELEMENTS: u128 = 1 << 26;

impl FromStr for Case {
    type Err = String;
    fn from_str(text: &str) -> Result<Case, String> {
        let known = |names: Vec<&str>| names.join(", ");
        let mut parts = text.split(',');
        let head = parts.next().unwrap_or_default();
        let [op, form, storage, seed] = head.split('/').collect::<Vec<_>>()[..] else {
            return Err(format!(
                "\"{text}\" is not a case: expected op/form/storage/seed, such as attention/plain/f32/7"
            ));
        };
        let ops = Op::ALL.map(Op::name);
        let op = Op::ALL
            .into_iter()
            .find(|known| known.name() == op)
            .ok_or_else(|| format!("\"{op}\" is not an op of a case; there are {}", known(ops.to_vec())))?;
        let form = FORMS.iter().position(|known| known.name == form).ok_or_else(|| {
            format!(
                "\"{form}\" is not a form of a case; there are {}",
                known(FORMS.iter().map(|form| form.name).collect())
            )
        })?;
        let forms = op.amount().0;
        if !forms.contains(&FORMS[form].name) {
            return Err(format!(
                "{} has no cases of the form {}; it has {}",
                op.name(),
                FORMS[form].name,
                forms.join(", ")
            ));
        }
        let storage = [Dtype::F32, Dtype::F16, Dtype::BF16]
            .into_iter()
            .find(|known| known.to_string() == storage)
            .ok_or_else(|| format!("\"{storage}\" is not a storage type of a case; there are f32, f16, bf16"))?;
        let seed = seed.parse().map_err(|_| format!("\"{seed}\" is not a seed: expected a whole number"))?;
        let mut case = Case { op, form, storage, seed, sizes: BTreeMap::new(), without: BTreeSet::new() };
        for change in parts {
            if let Some(rule) = change.strip_prefix("no-") {
                let (rule, _) = Rule::ALL.into_iter().find(|(_, name)| *name == rule).ok_or_else(|| {
                    format!("\"{rule}\" is not a rule; there are {}", known(Rule::ALL.map(|(_, name)| name).to_vec()))
                })?;
                case.without.insert(rule);
                continue;
            }
            let size = change.split_once('=').and_then(|(name, n)| {
                let (size, _) = Size::ALL.into_iter().find(|(_, known)| *known == name)?;
                Some((size, n.parse().ok().filter(|n| (1..=MOST).contains(n))?))
            });
            let (size, n) = size.ok_or_else(|| {
                format!(
                    "\"{change}\" is not a change: expected a size from 1 to {MOST}, such as len_k=9 (there are {}), \
                     or no-RULE",
                    known(Size::ALL.map(|(_, name)| name).to_vec())
                )
            })?;
            case.sizes.insert(size, n);
        }
        let Call { q, k, v, .. } = case.call();
        let product = |axes: &[usize]| axes.iter().map(|&n| n as u128).product::<u128>();
        let elements = product(&q) + product(&k) + product(&v) + product(&q[..3]) * k[2] as u128;
        if elements > MOST_ELEMENTS && (op != Op::LongRows || !case.sizes.is_empty()) {
            return Err(format!(
                "Q {q:?}, K {k:?} and V {v:?} exceed the limit of a case: 2^26 elements, scores included"
            ));
        }
        Ok(case)
    }
}

impl Case {
    /// The call that the name describes.
    pub fn call(&self) -> Call {
        let mut call = draw(&FORMS[self.form], self.seed);
        if self.op == Op::LongRows {
            let (len_q, len_k, dim, _) = self.long_row();
            call = Call { seed: self.seed, ..Call::plain([1, 1, len_q, dim], [1, 1, len_k, dim], [1, 1, len_k, dim]) };
        }
        let full = |call: &Call| [call.q[0], call.q[1], call.q[2], call.k[2]];
        let before = full(&call);
        let size = |size, drawn| self.sizes.get(&size).copied().unwrap_or(drawn);
        let (heads_kv, group) = (size(Size::HeadsKv, call.k[1]), size(Size::Group, call.q[1] / call.k[1]));
        let (batch, len_q, len_k) =
            (size(Size::Batch, call.q[0]), size(Size::LenQ, call.q[2]), size(Size::LenK, call.k[2]));
        let (dim_k, dim_v) = (size(Size::DimK, call.q[3]), size(Size::DimV, call.v[3]));
        call.q = [batch, heads_kv * group, len_q, dim_k];
        call.k = [batch, heads_kv, len_k, dim_k];
        call.v = [batch, heads_kv, len_k, dim_v];
        let after = full(&call);
        let shapes = call.masks.iter_mut().map(|(shape, _)| shape).chain(&mut call.biases);
        for shape in shapes {
            let first = 4 - shape.len();
            for (axis, n) in shape.iter_mut().enumerate() {
                // A mask or bias axis follows the size of the call, or stays broadcast.
                if *n == before[first + axis] {
                    *n = after[first + axis];
                } else {
                    *n = 1;
                }
            }
        }
        if let Align::PerBatch(offsets) = &mut call.positions.align {
            let drawn = offsets.clone();
            *offsets = (0..batch).map(|b| drawn[b % drawn.len()]).collect();
        }
        if let Some(lengths) = &mut call.positions.key_lengths {
            let drawn = lengths.clone();
            *lengths = (0..batch).map(|b| drawn[b % drawn.len()].min(len_k)).collect();
        }
        for rule in &self.without {
            match rule {
                Rule::Masks => call.masks.clear(),
                Rule::Biases => call.biases.clear(),
                Rule::Bands => call.positions = Positions::default(),
                Rule::Softcap => call.softcap = None,
                Rule::Scale => call.scale = None,
                Rule::Sink => call.sink = false,
                Rule::Strides => call.order = Order::Bhsd,
            }
        }
        call
    }

    /// Queries, keys, width and kind of long rows.
    pub(crate) fn long_row(&self) -> (usize, usize, usize, bool) {
        LONG_ROWS[(self.seed % LONG_ROWS.len() as u64) as usize]
    }

    /// Cases that are each smaller in one respect, largest steps first.
    pub fn smaller(&self) -> Vec<Case> {
        if self.op == Op::Loops {
            return Vec::new();
        }
        let call = self.call();
        let mut all = Vec::new();
        let mut without = |rule, has: bool| {
            if has {
                let mut case = self.clone();
                case.without.insert(rule);
                all.push(case);
            }
        };
        without(Rule::Masks, !call.masks.is_empty());
        without(Rule::Biases, !call.biases.is_empty());
        without(Rule::Bands, call.positions != Positions::default());
        without(Rule::Softcap, call.softcap.is_some());
        without(Rule::Scale, call.scale.is_some());
        without(Rule::Sink, call.sink);
        without(Rule::Strides, call.order != Order::Bhsd);
        for (size, n) in [
            (Size::LenK, call.k[2]),
            (Size::LenQ, call.q[2]),
            (Size::Batch, call.q[0]),
            (Size::HeadsKv, call.k[1]),
            (Size::Group, call.q[1] / call.k[1]),
            (Size::DimV, call.v[3]),
            (Size::DimK, call.q[3]),
        ] {
            let mut seen = BTreeSet::from([n]);
            for less in [1, n / 4, n / 2, n - n / 4, n.saturating_sub(1)] {
                if less >= 1 && less < n && seen.insert(less) {
                    let mut case = self.clone();
                    case.sizes.insert(size, less);
                    all.push(case);
                }
            }
        }
        all
    }
}

/// All cases of the sweep in order, each with its method: the cases of an op are distributed over `methods`, which must
/// not be empty. If there is only one method, `methods` holds only [`Method::Auto`].
pub fn cases(methods: &[Method], seed: u64, quick: bool) -> Vec<(Case, Method)> {
    let mut all = Vec::new();
    for op in Op::ALL {
        let (forms, in_full, in_quick) = op.amount();
        let mut ways: Vec<Method> = methods.iter().copied().filter(|&method| op.takes(method)).collect();
        if ways.is_empty() {
            ways.push(Method::Auto);
        }
        for (n, form) in forms.iter().enumerate() {
            let name = *form;
            let form = FORMS.iter().position(|known| known.name == name).expect("a form by its name");
            for storage in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                if matches!(op, Op::LongRows | Op::Loops) && storage != Dtype::F32 {
                    continue;
                }
                // Use few kernels, because each costs time even if cached: every method in half of the forms, and for
                // narrow storage, which adds only reading and rounding, just enough to test that.
                let every_method = matches!(name, "plain" | "causal" | "bands" | "all");
                let count = match (quick, storage) {
                    (false, _) => in_full,
                    (true, Dtype::F32) if every_method => in_quick,
                    (true, Dtype::F32) => in_quick.div_ceil(3),
                    (true, _) if name == "plain" || name == "all" => in_quick.div_ceil(6),
                    (true, _) => u64::from(forms.len() == 1),
                };
                for at in 0..count {
                    let seed = match op {
                        // All of them, whatever the seed.
                        Op::LongRows => seed.wrapping_mul(9_000_000).wrapping_add(at),
                        _ => seed.wrapping_mul(1_000_000).wrapping_add(at),
                    };
                    let case = Case { op, form, storage, seed, sizes: BTreeMap::new(), without: BTreeSet::new() };
                    // Each row begins with another method, so that few calls cover all methods.
                    let way = ways[(at as usize + n * 5 + storage as usize * 3) % ways.len()];
                    all.push((case, way));
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_case() {
        for (case, _) in cases(&[Method::Auto], 1, true) {
            assert_eq!(case.to_string().parse(), Ok(case.clone()));
            for less in case.smaller().into_iter().step_by(5) {
                assert_eq!(less.to_string().parse(), Ok(less.clone()), "{less}");
                assert_ne!(less.call().q.iter().chain(&less.call().v).product::<usize>(), 0);
            }
        }
        for (text, say) in [
            ("", "op/form/storage/seed"),
            ("attention/plain/f32", "op/form/storage/seed"),
            ("addition/plain/f32/1", "not an op"),
            ("attention/plane/f32/1", "not a form"),
            ("attention/plain/f64/1", "not a storage type"),
            ("attention/plain/f32/-1", "not a seed"),
            ("attention/plain/f32/1,len_k=0", "from 1 to 1048576"),
            ("attention/plain/f32/1,len_k", "from 1 to 1048576"),
            ("attention/plain/f32/1,length=3", "from 1 to 1048576"),
            ("attention/plain/f32/1,no-mask", "not a rule"),
            ("rotary/bands/f32/1", "it has causal"),
            ("attention/plain/f32/1,batch=4096,heads_kv=4096", "exceed the limit of a case"),
        ] {
            assert!(text.parse::<Case>().unwrap_err().contains(say), "{text}");
        }
    }

    #[test]
    fn more_than_5100_and_no_two_alike() {
        let all = cases(&[Method::ThreePasses, Method::Fused], 1, false);
        let names: BTreeSet<String> = all.iter().map(|(case, _)| case.to_string()).collect();
        assert_eq!(names.len(), all.len());
        assert!(all.len() >= 5_100, "{}", all.len());
        // The computations must differ too, not only the names.
        let calls: BTreeSet<String> = (all.iter())
            .map(|(case, _)| format!("{:?} {:?} {} {:?}", case.op, case.storage, FORMS[case.form].name, case.call()))
            .collect();
        assert_eq!(calls.len(), all.len());
    }

    #[test]
    fn every_form_meets_every_method() {
        let methods = [Method::ThreePasses, Method::Fused, Method::Auto];
        for quick in [false, true] {
            let all = cases(&methods, 1, quick);
            for (at, form) in FORMS.iter().enumerate() {
                if quick && !["plain", "causal", "bands", "all"].contains(&form.name) {
                    continue;
                }
                for method in methods {
                    let meets = |(case, way): &(Case, Method)| {
                        case.op == Op::Attention && case.form == at && *way == method && case.storage == Dtype::F32
                    };
                    assert!(all.iter().any(meets), "{} by {method}", form.name);
                }
            }
        }
    }

    #[test]
    fn shrinking_ends_at_the_smallest() {
        let mut case: Case = "attention/all/f32/3".parse().unwrap();
        let mut steps = 0;
        while let Some(less) = case.smaller().into_iter().next() {
            (case, steps) = (less, steps + 1);
        }
        let call = case.call();
        assert!(steps < 50);
        assert_eq!((call.q, call.k, call.v), ([1; 4], [1; 4], [1; 4]));
        assert!(call.masks.is_empty() && call.biases.is_empty() && !call.sink && call.softcap.is_none());
    }
}
