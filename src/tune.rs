//! Finds the fastest kernels for a kind of call on this adapter.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::self_test::Case;
use crate::attention::Attention;
use crate::call::Operands;
use crate::error::{Error, Result, value_error};
use crate::gpu::Gpu;
use crate::kernels::{Method, Tile, TuningKey, three_passes_compete};
use crate::lower::Recording;
use crate::problem::{Problem, Weights};
use crate::tensor::Tensor;

mod self_test;

/// Number of tiles that compete; three passes are one more candidate.
const MOST_TILES: usize = 5;
/// The default stays unless another candidate takes less than this fraction of its time.
const CLEARLY_FASTER: f64 = 0.97;
/// A candidate that takes this many times as long as the best drops out after the first round.
const HOPELESS: f64 = 2.0;
/// Time limit for all rounds.
const BUDGET: Duration = Duration::from_secs(1);
const LEAST_ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 20;

/// One way to compute a call, and its time.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Candidate {
    /// [`Method::Tile`] or [`Method::ThreePasses`].
    pub method: Method,
    /// The best time, or why there is none: its self-test failed, or the adapter cannot run it.
    pub time: Result<Duration, String>,
}

/// What [`Attention::tune`] found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Tuned {
    /// The calls that the result applies to.
    pub key: TuningKey,
    /// At most six, the default first; empty if the key was already known.
    pub candidates: Vec<Candidate>,
    /// The fastest method, which [`Method::Auto`] now chooses for the key. [`Method::Auto`] means the default: nothing
    /// else was clearly faster.
    pub winner: Method,
    /// The file that holds the result; `None` if only this [`Gpu`] knows it.
    pub file: Option<PathBuf>,
}

impl Attention {
    /// Finds the fastest kernels for calls like this one on the tensors' adapter, and makes [`Method::Auto`] choose
    /// them from now on: in this [`Gpu`] and its clones, and in every `Gpu` with the same adapter, driver and library
    /// version that is created later ([`Gpu::tuning_file`]). Nothing is tuned unless you call this.
    ///
    /// At most five tiles of the fused kernel compete with the three passes, on the given tensors, timed by the
    /// adapter's clock if it has one: two calls each, and more for about a second. Each candidate must first agree with
    /// the [f64 reference](crate::reference) on a small random call with the same widths, types and kinds of rules,
    /// including positions; one that does not is reported and never chosen. The default stays unless another is 3 %
    /// faster. A known key is not timed again ([`Gpu::clear_tuning`] deletes known keys).
    ///
    /// Other kernels sum in another order, so the last bits of results may change. The three passes store the scores in
    /// memory; they compete only if the scores of a batch entry take at most 64 MiB.
    ///
    /// The method of `self` and its requested weights and scores are ignored.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward`], and:
    ///
    /// - [`Error::Device`]: the tensors are on the CPU backend, which has nothing to tune.
    /// - [`Error::Value`]: the call has no work, or no candidate runs on this adapter.
    pub fn tune(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tuned> {
        let trial = Trial::new(self, q, k, v)?;
        if let Some(winner) = trial.gpu.tuned(&trial.key) {
            let file = trial.gpu.tuning_file();
            return Ok(Tuned { key: trial.key, candidates: Vec::new(), winner, file });
        }
        let mut tuned = trial.run()?;
        tuned.file = trial.gpu.keep_tuned(tuned.key, tuned.winner);
        Ok(tuned)
    }

    /// Like [`Attention::tune`], but times known keys too, and stores nothing.
    pub fn time_candidates(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tuned> {
        Trial::new(self, q, k, v)?.run()
    }
}

/// The candidates of one call.
struct Trial<'a> {
    gpu: Gpu,
    attention: Attention,
    tensors: [&'a Tensor; 3],
    problem: Problem,
    operands: Operands,
    key: TuningKey,
}

impl<'a> Trial<'a> {
    fn new(attention: &Attention, q: &'a Tensor, k: &'a Tensor, v: &'a Tensor) -> Result<Trial<'a>> {
        let device = attention.device(q, k, v)?;
        let Some(gpu) = device.gpu().cloned() else {
            return Err(Error::Device {
                what: "a tensor to tune with".into(),
                there: device.name(),
                here: "an adapter (tuning chooses among its kernels)".into(),
            });
        };
        let (problem, operands) = attention.operands(&mut Recording::new(&device), q, k, v)?;
        if problem.is_empty() || problem.len_k == 0 {
            return Err(value_error!(
                "nothing to tune: Q {:?} and K {:?} leave no work; every axis must be at least 1",
                q.shape(),
                k.shape()
            ));
        }
        let key = operands.tuning_key(&problem);
        let attention = attention.clone().weights(Weights::None).scores(None);
        Ok(Trial { gpu, attention, tensors: [q, k, v], problem, operands, key })
    }

    fn run(&self) -> Result<Tuned> {
        let tiles = Tile::candidates(&self.problem, self.gpu.capabilities(), MOST_TILES);
        let mut methods: Vec<Method> = tiles.into_iter().map(Method::Tile).collect();
        if three_passes_compete(&self.problem) {
            methods.push(Method::ThreePasses);
        }
        let case = Case::new(&self.gpu, &self.attention, &self.problem, &self.operands)?;
        let candidates = compete(&methods, |method| case.check(method), |method| self.time(method))?;
        let winner = match winner(&candidates) {
            Some(0) => Method::Auto,
            Some(n) => candidates[n].method,
            None => {
                let reasons: Vec<String> = (candidates.iter())
                    .filter_map(|candidate| Some(format!("{}: {}", candidate.method, candidate.time.as_ref().err()?)))
                    .collect();
                return Err(value_error!("no candidate runs on {}: {}", self.gpu.info().name, reasons.join("; ")));
            }
        };
        Ok(Tuned { key: self.key, candidates, winner, file: None })
    }

    fn time(&self, method: Method) -> Result<Times> {
        let [q, k, v] = self.tensors;
        let start = Instant::now();
        let (_, profile) = self.attention.clone().method(method).forward_profiled(q, k, v)?;
        Ok(Times { wall: start.elapsed(), gpu: profile.gpu_time })
    }
}

/// The time of a call.
#[derive(Clone, Copy, Debug)]
struct Times {
    wall: Duration,
    /// By the adapter's clock.
    gpu: Option<Duration>,
}

impl Times {
    fn best(self, other: Times) -> Times {
        Times { wall: self.wall.min(other.wall), gpu: self.gpu.zip(other.gpu).map(|(a, b)| a.min(b)) }
    }
}

/// Tests each method, then times those that passed in alternation, so that other load on the machine affects all alike.
fn compete(
    methods: &[Method],
    check: impl Fn(Method) -> Result<()>,
    time: impl Fn(Method) -> Result<Times>,
) -> Result<Vec<Candidate>> {
    let mut best: Vec<Result<Times, String>> = Vec::new();
    for &method in methods {
        let first = check(method).and_then(|()| {
            // The first call compiles (some drivers compile within the pass itself) and fills pools.
            time(method)?;
            time(method)
        });
        best.push(match first {
            Ok(times) => Ok(times),
            Err(error @ Error::DeviceLost { .. }) => return Err(error),
            Err(error) => Err(error.to_string()),
        });
    }
    // All candidates are compared by the same clock.
    let has_clock = best.iter().flatten().all(|times| times.gpu.is_some());
    let of = |times: &Times| times.gpu.filter(|_| has_clock).unwrap_or(times.wall);
    let started = Instant::now();
    for round in 1..MOST_ROUNDS {
        let least: Duration = best.iter().flatten().map(of).min().unwrap_or_default();
        let longest: Duration = best.iter().flatten().map(|times| times.wall).max().unwrap_or_default();
        if started.elapsed() >= BUDGET || longest >= BUDGET && round >= LEAST_ROUNDS {
            break;
        }
        for (&method, best) in methods.iter().zip(&mut best) {
            if let Ok(times) = best
                && of(times) <= least.mul_f64(HOPELESS)
            {
                *times = times.best(time(method)?);
            }
        }
    }
    let candidate = |(&method, best): (&Method, Result<Times, String>)| Candidate {
        method,
        time: best.map(|times| times.gpu.filter(|_| has_clock).unwrap_or(times.wall)),
    };
    Ok(methods.iter().zip(best).map(candidate).collect())
}

/// The first unless another is clearly faster; `None` if none ran.
fn winner(candidates: &[Candidate]) -> Option<usize> {
    let time = |n: usize| candidates[n].time.as_ref().ok();
    let fastest = (0..candidates.len()).filter(|&n| time(n).is_some()).min_by_key(|&n| time(n))?;
    match (time(0), time(fastest)) {
        (Some(first), Some(best)) if *best > first.mul_f64(CLEARLY_FASTER) => Some(0),
        _ => Some(fastest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(rows: u32) -> Method {
        Method::Tile(Tile::Registers { workgroup: 8, rows, keys: 4, share: 1 })
    }

    /// Made-up times, by rows per invocation.
    fn took(method: Method, of: impl Fn(u32) -> u64) -> Result<Times> {
        let Method::Tile(tile) = method else { panic!("{method}") };
        let wall = Duration::from_micros(of(tile.rows()));
        Ok(Times { wall, gpu: Some(wall) })
    }

    #[test]
    fn what_fails_its_self_test_is_never_chosen() {
        let methods = [tile(1), tile(2), tile(4), tile(8)];
        for broken in [1, 2, 4, 8] {
            let check = |method| {
                if method == tile(broken) { Err(value_error!("output 3 is 7 instead of 5")) } else { Ok(()) }
            };
            // The broken one would win by far.
            let time = |method| {
                assert_ne!(method, tile(broken), "what fails is not even run");
                took(method, |rows| 100 * u64::from(rows))
            };
            let candidates = compete(&methods, check, time).unwrap();
            let wins = candidates[winner(&candidates).unwrap()].method;
            assert_eq!(wins, if broken == 1 { tile(2) } else { tile(1) });
            for candidate in &candidates {
                match &candidate.time {
                    Ok(_) => assert_ne!(candidate.method, tile(broken)),
                    Err(reason) => assert!(candidate.method == tile(broken) && reason.contains("7 instead of 5")),
                }
            }
        }
        let none = compete(&methods, |_| Err(value_error!("no")), |method| took(method, |_| 1)).unwrap();
        assert_eq!(winner(&none), None);
        let lost = |_| Err(Error::DeviceLost { adapter: "a".into(), reason: "r".into() });
        assert!(matches!(compete(&methods, lost, |method| took(method, |_| 1)), Err(Error::DeviceLost { .. })));
    }

    #[test]
    fn the_default_wins_what_is_close() {
        let run = |default: u64, other: u64| {
            let time = |method| took(method, |rows| if rows == 1 { default } else { other });
            let candidates = compete(&[tile(1), tile(2)], |_| Ok(()), time).unwrap();
            winner(&candidates).unwrap()
        };
        assert_eq!([run(100, 100), run(100, 98), run(100, 300), run(100, 96)], [0, 0, 0, 1]);
    }

    #[test]
    fn the_first_call_does_not_count() {
        let calls = std::cell::Cell::new(0);
        let time = |method| {
            calls.set(calls.get() + 1);
            // Seconds of compiling before the faster one runs.
            let slow = calls.get() == 3;
            took(method, |rows| if slow { 5_000_000 } else { 100 / u64::from(rows) })
        };
        let candidates = compete(&[tile(1), tile(2)], |_| Ok(()), time).unwrap();
        assert_eq!(winner(&candidates), Some(1));
    }

    #[test]
    fn one_clock_for_all() {
        // By wall time the second is faster; by the adapter's clock, which one of them lacks, the first.
        let time = |method| {
            took(method, |rows| 100 / u64::from(rows))
                .map(|times| Times { gpu: (method == tile(2)).then_some(Duration::from_micros(900)), ..times })
        };
        let candidates = compete(&[tile(1), tile(2)], |_| Ok(()), time).unwrap();
        assert_eq!(winner(&candidates), Some(1));
        assert_eq!(candidates[1].time, Ok(Duration::from_micros(50)));
    }
}
