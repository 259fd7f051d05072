//! Shapes to time: named ones, or the user's own.

use wgpu_attention::Align;
use wgpu_attention::problem::{Positions, Problem, checked_len};

/// From this many queries on, arithmetic outweighs reading keys and values.
const FEW_QUERIES: usize = 16;
/// The most calls in one encoder.
const MOST_CALLS: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Attention over Q, K and V.
    Attention,
    /// A self-attention layer with its four projections, as wide as all heads together.
    Layer,
    /// One projection of every query's token, from the width of all heads together to the same.
    Projection,
}

/// What a call adds to Q, K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// Rotary positions, half-split or interleaved.
    Rotary { interleaved: bool },
    /// Slopes per head.
    Alibi,
    /// 32 buckets up to a distance of 128.
    T5,
    /// Relative keys up to a distance of 16.
    Shaw,
    /// A boolean mask `[sq, skv]` that hides the keys after each query.
    Mask,
}

/// Which passes of a call are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// The gradients of Q, K and V, after a forward that is not timed.
    Backward,
    /// Forward and backward: a step of training.
    Both,
}

const EXTRAS: [(&str, Extra); 6] = [
    ("rotary", Extra::Rotary { interleaved: false }),
    ("rotary-interleaved", Extra::Rotary { interleaved: true }),
    ("alibi", Extra::Alibi),
    ("t5", Extra::T5),
    ("shaw", Extra::Shaw),
    ("mask", Extra::Mask),
];

/// A shape to time. Only [`Shape::parse`] and [`Shape::square`] make one, and both check it.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// As the user wrote it.
    pub name: String,
    pub work: Work,
    pub problem: Problem,
    pub causal: bool,
    pub pass: Pass,
    /// Calls in one encoder.
    pub calls: usize,
    pub extra: Option<Extra>,
    /// Whether the extra is stored before the call: rotated rows, or a bias of the size of the scores.
    pub stored: bool,
}

/// Name, work, [batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v], causal, calls.
type Named = (&'static str, Work, [usize; 7], bool, usize);

const NAMED: [Named; 12] = [
    ("P1", Work::Attention, [1, 12, 12, 512, 512, 64, 64], false, 1),
    ("P2", Work::Attention, [1, 12, 12, 1024, 1024, 64, 64], true, 1),
    ("P3", Work::Attention, [1, 32, 8, 512, 512, 128, 128], true, 1),
    ("P4", Work::Attention, [1, 32, 8, 1, 4096, 128, 128], false, 1),
    ("P5", Work::Attention, [1, 4, 4, 4096, 4096, 64, 64], true, 1),
    ("P6", Work::Layer, [8, 8, 8, 128, 128, 64, 64], false, 1),
    ("P7", Work::Attention, [4, 8, 8, 128, 512, 64, 64], false, 1),
    ("P8", Work::Projection, [1, 32, 32, 1, 1, 128, 128], false, 1),
    ("P9", Work::Attention, [1, 8, 8, 64, 64, 64, 64], false, 1),
    ("P9:x100", Work::Attention, [1, 8, 8, 64, 64, 64, 64], false, 100),
    ("P10", Work::Attention, [1, 16, 1, 1, 4096, 576, 512], false, 1),
    ("P11", Work::Attention, [1, 1, 1, 2048, 2048, 513, 513], false, 1),
];

impl Shape {
    /// All named shapes.
    pub fn named() -> Vec<Shape> {
        NAMED.iter().map(|&(name, ..)| Shape::parse(name).expect("a shape of the table")).collect()
    }

    /// Parses `NAME` or `b,hq,hkv,sq,skv,d`, with `,dv` if values have another width, followed by any of `:causal`,
    /// `:xN`, an extra and `:stored`.
    pub fn parse(text: &str) -> Result<Shape, String> {
        let mut parts = text.split(':');
        let head = parts.next().unwrap_or_default();
        let (work, sizes, mut causal) = match NAMED.iter().find(|(name, ..)| name.eq_ignore_ascii_case(head)) {
            Some(&(_, work, sizes, causal, _)) => (work, sizes, causal),
            None => (Work::Attention, sizes(head)?, false),
        };
        let (mut calls, mut extra, mut stored, mut pass) = (1, None, false, Pass::Forward);
        for part in parts {
            if let Some(&(_, found)) = EXTRAS.iter().find(|(name, _)| *name == part) {
                if extra.replace(found).is_some() {
                    return Err(format!("\"{part}\" is a second one of {}; a shape can have one", extras()));
                }
                continue;
            }
            match part.strip_prefix('x') {
                _ if part == "causal" => causal = true,
                _ if part == "stored" => stored = true,
                _ if part == "backward" => pass = Pass::Backward,
                _ if part == "train" => pass = Pass::Both,
                Some(number) => {
                    calls = number.parse().ok().filter(|calls| (1..=MOST_CALLS).contains(calls)).ok_or_else(|| {
                        format!("\"{part}\" must say how many calls share an encoder: x1 to x{MOST_CALLS}")
                    })?;
                }
                None => {
                    return Err(format!(
                        "\"{part}\" is neither causal, backward, train, xN (N calls in one encoder), stored nor one of {}",
                        extras()
                    ));
                }
            }
        }
        if stored && matches!(extra, None | Some(Extra::Mask)) {
            return Err("stored needs rotary, rotary-interleaved, alibi, t5 or shaw".into());
        }
        if pass != Pass::Forward && (work != Work::Attention || calls > 1) {
            return Err(format!("backward and train are for one call of attention, not for {text}"));
        }
        if work == Work::Projection && (calls > 1 || causal || extra.is_some()) {
            return Err(format!("{head} is a projection, which supports no suffixes"));
        }
        Ok(Shape { extra, stored, pass, ..Shape::new(text, work, sizes, causal, calls)? })
    }

    /// Self-attention of one length.
    pub fn square(batch: usize, heads: [usize; 2], len: usize, dim: usize, causal: bool) -> Result<Shape, String> {
        let [heads_q, heads_kv] = heads;
        let name = format!("{batch},{heads_q},{heads_kv},{len},{len},{dim}{}", if causal { ":causal" } else { "" });
        Shape::new(&name, Work::Attention, [batch, heads_q, heads_kv, len, len, dim, dim], causal, 1)
    }

    fn new(name: &str, work: Work, sizes: [usize; 7], causal: bool, calls: usize) -> Result<Shape, String> {
        let [batch, heads_q, heads_kv, len_q, len_k, dim, dim_v] = sizes;
        if sizes.contains(&0) {
            return Err(format!(
                "b = {batch}, hq = {heads_q}, hkv = {heads_kv}, sq = {len_q}, skv = {len_k}, d = {dim}, dv = {dim_v}: \
                 all must be at least 1"
            ));
        }
        // If there are more keys than queries, the queries are the last tokens, as when decoding with a cache.
        let positions = Positions { causal, align: Align::BottomRight, ..Positions::default() };
        let keys = [batch, heads_kv, len_k, dim];
        let values = [batch, heads_kv, len_k, dim_v];
        let problem = Problem::new(&[batch, heads_q, len_q, dim], &keys, &values, None, None, &positions, 0)
            .and_then(|problem| checked_len(&[batch, heads_q, len_q, len_k]).map(|_| problem))
            .map_err(|error| error.to_string())?;
        Ok(Shape { name: name.into(), work, problem, causal, calls, extra: None, stored: false, pass: Pass::Forward })
    }

    /// Width of the layer.
    pub fn width(&self) -> usize {
        self.problem.heads_q * self.problem.dim_k
    }

    /// Floating-point operations of all calls: two per multiply-add of a matrix product, over visible keys only. The
    /// softmax is not counted.
    pub fn operations(&self) -> f64 {
        let Problem { batch, heads_q, len_q, len_k, dim_k, dim_v, .. } = self.problem;
        let band = self.problem.band(0);
        let visible: f64 = match self.causal {
            true => (0..len_q).map(|i| band.range(i, len_k).len() as f64).sum(),
            false => len_q as f64 * len_k as f64,
        };
        // The forward computes Q·Kᵀ and P·V; the backward Q·Kᵀ again, dO·Vᵀ, Pᵀ·dO, dS·K and dSᵀ·Q.
        let widths = match self.pass {
            Pass::Forward => dim_k + dim_v,
            Pass::Backward => 3 * dim_k + 2 * dim_v,
            Pass::Both => 4 * dim_k + 3 * dim_v,
        };
        let attention = 2.0 * (batch * heads_q) as f64 * visible * widths as f64;
        let projection = 2.0 * (batch * len_q) as f64 * (self.width() as f64).powi(2);
        let all = match self.work {
            Work::Attention => attention,
            Work::Layer => attention + 4.0 * projection,
            Work::Projection => projection,
        };
        self.calls as f64 * all
    }

    /// The least number of bytes that all calls must move: each operand read once, the result written once.
    pub fn bytes(&self) -> f64 {
        let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = self.problem;
        let elements = match self.work {
            Work::Attention => {
                (batch * heads_q * len_q) as f64 * (dim_k + dim_v) as f64
                    + (batch * heads_kv * len_k) as f64 * (dim_k + dim_v) as f64
            }
            Work::Layer => {
                let width = self.width() as f64;
                2.0 * (batch * len_q) as f64 * width + 4.0 * (width * width + width)
            }
            Work::Projection => {
                let width = self.width() as f64;
                2.0 * (batch * len_q) as f64 * width + width * width
            }
        };
        4.0 * self.calls as f64 * elements
    }

    /// Approximate peak bytes: the operands, and the results of calls that share an encoder.
    pub fn held(&self, weights: bool) -> f64 {
        let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = self.problem;
        let rows = (batch * heads_q * len_q) as f64;
        let result = 4.0 * rows * (dim_v as f64 + if weights { len_k as f64 } else { 0.0 });
        self.bytes() / self.calls as f64 + self.calls as f64 * result
    }

    /// Whether memory, not arithmetic, is the bottleneck.
    pub fn is_decode(&self) -> bool {
        self.work != Work::Layer && self.problem.len_q < FEW_QUERIES
    }
}

fn extras() -> String {
    EXTRAS.map(|(name, _)| name).join(", ")
}

fn sizes(text: &str) -> Result<[usize; 7], String> {
    let unknown = || {
        let names: Vec<&str> = NAMED.iter().map(|&(name, ..)| name).filter(|name| !name.contains(':')).collect();
        format!(
            "a shape is b,hq,hkv,sq,skv,d (six whole numbers, then dv if values have another width) or one of {}",
            names.join(", ")
        )
    };
    if !text.contains(',') {
        return Err(unknown());
    }
    let mut numbers: Vec<usize> = text
        .split(',')
        .map(|number| number.trim().parse().map_err(|error| format!("\"{number}\": {error}; {}", unknown())))
        .collect::<Result<_, String>>()?;
    if let [.., dim] = numbers[..]
        && numbers.len() == 6
    {
        numbers.push(dim);
    }
    numbers.try_into().map_err(|numbers: Vec<usize>| format!("{} numbers; {}", numbers.len(), unknown()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_and_bytes_are_those_of_the_formula() {
        let shape = |text: &str| Shape::parse(text).unwrap();
        assert_eq!(shape("P1").operations(), 4.0 * 12.0 * 512.0 * 512.0 * 64.0);
        assert_eq!(shape("P1:backward").operations(), 2.5 * shape("P1").operations());
        assert_eq!(shape("P1:train").operations(), 3.5 * shape("P1").operations());
        assert_eq!(shape("p2").operations(), 4.0 * 12.0 * (1024.0 * 1025.0 / 2.0) * 64.0);
        let layer = 8.0 * 1024.0 * 512.0 * 512.0 + 4.0 * 64.0 * 128.0 * 128.0 * 64.0;
        assert_eq!(shape("P6").operations(), layer);
        assert_eq!(shape("P9:x100").operations(), 100.0 * shape("P9").operations());
        assert_eq!(shape("P8").operations(), 2.0 * 4096.0 * 4096.0);
        assert_eq!(shape("P8").bytes(), 4.0 * (2.0 * 4096.0 + 4096.0 * 4096.0));
        assert_eq!(shape("1,2,1,3,5,4,6").operations(), 2.0 * 2.0 * 15.0 * 10.0);
        assert_eq!(shape("P4").bytes(), 4.0 * 2.0 * 128.0 * (32.0 + 8.0 * 4096.0));
        // Of five keys the two queries see four and five; of two queries before one key the last sees it.
        assert_eq!(shape("1,1,1,2,5,1:causal").operations(), 4.0 * 9.0);
        assert_eq!(shape("1,1,1,2,1,1:causal:x3").operations(), 3.0 * 4.0);
    }

    #[test]
    fn what_is_not_a_shape_is_refused_with_the_rule() {
        for (text, part) in [
            ("P99", "one of P1, P2"),
            ("", "six whole numbers"),
            ("1,2,3", "3 numbers"),
            ("1,2,2,4,4,8,9,9", "8 numbers"),
            ("1,2,2,4,x,8", "\"x\""),
            ("1,2,2,4,-4,8", "\"-4\""),
            ("1,2,2,0,4,8", "at least 1"),
            ("1,6,4,8,8,8", "heads_q = 6 is not a multiple of heads_kv = 4"),
            ("1,1,1,1,600000000,1", "lengths must be below"),
            ("99999999999,99999999999,1,1,1,1", "does not fit in 64 bits"),
            ("1,1,1,1,99999999999999999999999,1", "too large"),
            ("P1:upside-down", "neither causal, backward"),
            ("P6:backward", "one call of attention"),
            ("P1:train:x2", "one call of attention"),
            ("P1:t5:alibi", "a shape can have one"),
            ("P1:mask:stored", "stored needs rotary"),
            ("P1:x0", "x1 to x10000"),
            ("P1:xx", "x1 to x10000"),
            ("P8:x2", "supports no suffixes"),
        ] {
            let message = Shape::parse(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
