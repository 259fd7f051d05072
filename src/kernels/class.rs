//! Which calls share what tuning found.

use super::plan::Method;
use crate::error::{Error, Result, value_error};
use crate::problem::{Dtype, NO_BOUND, Problem};

/// Bytes of scores per batch entry up to which three passes compete with the fused kernel: tuning may not
/// turn a call that holds no scores into one that fills the memory.
const MOST_SCORES: usize = 64 << 20;

/// What calls must have in common to share what tuning found. Neither the batch nor the key lengths of its
/// entries belong to it: the same row gives the same bits in every batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ShapeClass {
    /// Query rows per key/value head, the grouped heads' together, rounded up to a power of two.
    pub rows: usize,
    /// Keys, rounded up likewise.
    pub keys: usize,
    /// Width of a query and a key.
    pub dim_k: usize,
    /// Width of a value.
    pub dim_v: usize,
    /// What the buffers of Q, K and V hold.
    pub stored: [Dtype; 3],
    /// Causal, or with a window.
    pub banded: bool,
    /// With masks or biases.
    pub masked: bool,
}

impl ShapeClass {
    /// The class of a call.
    pub fn of(problem: &Problem, stored: [Dtype; 3], masked: bool) -> ShapeClass {
        let bucket = |n: usize| n.max(1).checked_next_power_of_two().unwrap_or(usize::MAX);
        ShapeClass {
            rows: bucket(problem.group().saturating_mul(problem.len_q)),
            keys: bucket(problem.len_k),
            dim_k: problem.dim_k,
            dim_v: problem.dim_v,
            stored,
            banded: problem.bands.iter().any(|band| band.lo > -NO_BOUND || band.hi < NO_BOUND),
            masked,
        }
    }
}

/// `rows256 keys1024 dim64x64 f32,f32,f32 banded masked`
impl std::fmt::Display for ShapeClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ShapeClass { rows, keys, dim_k, dim_v, stored: [q, k, v], banded, masked } = self;
        write!(f, "rows{rows} keys{keys} dim{dim_k}x{dim_v} {q},{k},{v}")?;
        f.write_str(if *banded { " banded" } else { "" })?;
        f.write_str(if *masked { " masked" } else { "" })
    }
}

impl std::str::FromStr for ShapeClass {
    type Err = Error;
    fn from_str(text: &str) -> Result<ShapeClass> {
        let parse = || {
            let mut words = text.split(' ').peekable();
            let rows = words.next()?.strip_prefix("rows")?.parse().ok()?;
            let keys = words.next()?.strip_prefix("keys")?.parse().ok()?;
            let (dim_k, dim_v) = words.next()?.strip_prefix("dim")?.split_once('x')?;
            let stored = words
                .next()?
                .split(',')
                .map(|word| [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|dtype| dtype.to_string() == word));
            let stored = stored.collect::<Option<Vec<_>>>()?.try_into().ok()?;
            let banded = words.next_if_eq(&"banded").is_some();
            let masked = words.next_if_eq(&"masked").is_some();
            let dims = [dim_k, dim_v].map(|dim| dim.parse().ok());
            let class = ShapeClass { rows, keys, dim_k: dims[0]?, dim_v: dims[1]?, stored, banded, masked };
            words.next().is_none().then_some(class)
        };
        parse().ok_or_else(|| {
            value_error!("{text:?} is no shape class; rows256 keys1024 dim64x64 f32,f32,f32 banded masked is")
        })
    }
}

/// `auto`, `three passes`, `fused` or a [`Cut`](super::plan::Cut).
impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Method::Auto => f.write_str("auto"),
            Method::ThreePasses => f.write_str("three passes"),
            Method::Fused => f.write_str("fused"),
            Method::Cut(cut) => cut.fmt(f),
        }
    }
}

impl std::str::FromStr for Method {
    type Err = Error;
    fn from_str(text: &str) -> Result<Method> {
        Ok(match text {
            "auto" => Method::Auto,
            "three passes" | "three-passes" => Method::ThreePasses,
            "fused" => Method::Fused,
            cut => Method::Cut(cut.parse().map_err(|_| {
                value_error!(
                    "{text:?} is no method: auto, three-passes, fused and cuts of the fused kernel, such as \
                     rows8x8/keys8/subgroup8 and rows4x64/keys4, are"
                )
            })?),
        })
    }
}

/// Whether three passes may stand in for the fused kernel. The batch has no say.
pub(crate) fn three_passes_compete(problem: &Problem) -> bool {
    let bytes = [problem.heads_q, problem.len_q, problem.len_k, 4].into_iter().try_fold(1, usize::checked_mul);
    bytes.is_some_and(|bytes| bytes <= MOST_SCORES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Align, Positions};

    fn class(q: [usize; 4], k: [usize; 4], positions: &Positions) -> ShapeClass {
        let problem = Problem::new(&q, &k, &k, None, None, positions, 0).unwrap();
        ShapeClass::of(&problem, [Dtype::F32; 3], false)
    }

    #[test]
    fn neither_the_batch_nor_its_lengths_enter() {
        for causal in [false, true] {
            let with = |key_lengths| Positions { causal, key_lengths, ..Default::default() };
            let one = class([1, 8, 33, 64], [1, 2, 65, 64], &with(None));
            assert_eq!((one.rows, one.keys, one.banded), (256, 128, causal));
            assert_eq!(class([7, 8, 33, 64], [7, 2, 65, 64], &with(None)), one);
            assert_eq!(class([2, 8, 33, 64], [2, 2, 65, 64], &with(Some(vec![65, 3]))), one);
            let offsets = Positions { align: Align::PerBatch(vec![32, 1]), ..with(Some(vec![65, 3])) };
            assert_eq!(class([2, 8, 33, 64], [2, 2, 65, 64], &offsets), one);
        }
    }

    #[test]
    fn what_matters_enters() {
        let plain = Positions::default();
        let one = class([1, 8, 32, 64], [1, 8, 64, 64], &plain);
        assert_eq!(class([1, 8, 17, 64], [1, 8, 33, 64], &plain), one);
        for (q, k) in [
            ([1, 8, 33, 64], [1, 8, 64, 64]),
            ([1, 8, 32, 64], [1, 4, 64, 64]),
            ([1, 8, 32, 64], [1, 8, 65, 64]),
            ([1, 8, 32, 60], [1, 8, 64, 60]),
        ] {
            assert_ne!(class(q, k, &plain), one);
        }
        let window = Positions { window_left: Some(3), ..Default::default() };
        assert_ne!(class([1, 8, 32, 64], [1, 8, 64, 64], &window), one);
    }

    #[test]
    fn texts_are_read_as_written() {
        let mut class = class([1, 8, 32, 64], [1, 8, 64, 64], &Positions::default());
        for (banded, masked, stored) in [
            (false, false, Dtype::F32),
            (true, false, Dtype::F16),
            (false, true, Dtype::BF16),
            (true, true, Dtype::F32),
        ] {
            class = ShapeClass { banded, masked, stored: [Dtype::F32, stored, stored], ..class };
            assert_eq!(class.to_string().parse::<ShapeClass>().unwrap(), class);
        }
        for bad in [
            "",
            "rows1",
            "rows1 keys1 dim1x1 f32,f32",
            "rows1 keys1 dim1x1 f32,f32,bool",
            "rows1 keys1 dim1x1 f32,f32,f32 x",
        ] {
            assert!(bad.parse::<ShapeClass>().is_err(), "{bad}");
        }
        for method in ["auto", "three passes", "fused", "rows8x8/keys8/subgroup8", "rows4x64/keys4"] {
            assert_eq!(method.parse::<Method>().unwrap().to_string(), method);
        }
        assert_eq!("three-passes".parse::<Method>().unwrap(), Method::ThreePasses);
        let message = "fast".parse::<Method>().unwrap_err().to_string();
        assert!(message.contains("\"fast\"") && message.contains("three-passes"), "{message}");
    }

    #[test]
    fn three_passes_compete_where_scores_are_few() {
        let of = |batch, len| {
            let shape = [batch, 8, len, 64];
            Problem::new(&shape, &shape, &shape, None, None, &Positions::default(), 0).unwrap()
        };
        assert!(three_passes_compete(&of(1, 1024)) && three_passes_compete(&of(1000, 1024)));
        assert!(!three_passes_compete(&of(1, 2048)));
    }
}
