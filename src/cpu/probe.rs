//! Measures how fast this machine's cores do multiply-adds in registers.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};

/// Number of independent chains: enough to hide the latency of two units, few enough for 16 registers.
const CHAINS: usize = 12;

struct Chains {
    rounds: usize,
}

impl WithSimd for Chains {
    /// Operations per round, and a value that keeps the compiler from removing the work.
    type Output = (usize, f32);
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (usize, f32) {
        let factor = simd.splat_f32s(black_box(0.999));
        let summand = simd.splat_f32s(black_box(0.001));
        let mut x: [S::f32s; CHAINS] = std::array::from_fn(|c| simd.splat_f32s(black_box(c as f32)));
        for _ in 0..self.rounds {
            for x in &mut x {
                *x = simd.mul_add_e_f32s(*x, factor, summand);
            }
        }
        let sum = x.into_iter().fold(0.0, |sum, x| sum + simd.reduce_sum_f32s(x));
        (2 * CHAINS * size_of::<S::f32s>() / size_of::<f32>(), sum)
    }
}

/// Multiply-add operations per second on all threads, each counting as two; measured once.
pub(crate) fn multiply_add_ceiling() -> f64 {
    static CEILING: OnceLock<f64> = OnceLock::new();
    *CEILING.get_or_init(|| {
        let arch = Arch::new();
        let measure = |rounds| {
            let start = Instant::now();
            let per_thread = rayon::broadcast(|_| black_box(arch.dispatch(Chains { rounds })).0);
            let seconds = start.elapsed().as_secs_f64();
            (seconds, (per_thread.into_iter().sum::<usize>() * rounds) as f64 / seconds)
        };
        let mut rounds = 1 << 16;
        while measure(rounds).0 < 0.01 {
            rounds *= 2;
        }
        (0..10).map(|_| measure(rounds).1).fold(0.0, f64::max)
    })
}
