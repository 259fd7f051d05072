//! Splits tasks among threads. The calling thread works, too.

#[cfg(not(target_arch = "wasm32"))]
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
#[cfg(not(target_arch = "wasm32"))]
use std::time::Duration;
use std::time::Instant;

/// Work that one thread does before another has woken up.
const SMALL: f64 = 1e6;

/// Turns of waiting for the other threads' last tasks before the calling thread sleeps: a sleeping thread wakes up late.
const TURNS: usize = 2000;

#[cfg(not(target_arch = "wasm32"))]
thread_local! {
    /// How long all threads have computed for calls of this thread, in nanoseconds, while that is measured.
    static COMPUTED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs `call` on this thread and measures how long threads computed for it, on average over all of them.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn measured<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let before = COMPUTED.replace(Some(0));
    let result = call();
    let computed = COMPUTED.replace(before).unwrap_or(0);
    (result, Duration::from_nanos(computed / rayon::current_num_threads() as u64))
}

/// Calls `work` with every task, the last one first. `operations` is the number of multiply-adds or moved numbers of all
/// tasks together; few of them are done by the calling thread alone.
pub fn for_each<T: Send>(mut tasks: Vec<T>, operations: f64, work: impl Fn(T) + Sync) {
    let helpers = if operations < SMALL { 0 } else { rayon::current_num_threads().min(tasks.len()).saturating_sub(1) };
    let clock = Clock::new();
    if helpers == 0 {
        clock.measure(|| {
            while let Some(task) = tasks.pop() {
                work(task);
            }
        });
    } else {
        let queue = Mutex::new(tasks);
        let drain = || {
            clock.measure(|| {
                // The lock is held for taking a task only.
                while let Some(task) = { queue.lock().expect("no task is taken in a panic").pop() } {
                    work(task);
                }
            });
        };
        let done = AtomicUsize::new(0);
        rayon::in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| {
                    drain();
                    done.fetch_add(1, Ordering::Release);
                });
            }
            drain();
            for _ in 0..TURNS {
                if done.load(Ordering::Acquire) == helpers {
                    break;
                }
                std::hint::spin_loop();
            }
        });
    }
    clock.keep();
}

/// Adds up how long threads compute, if that is measured.
struct Clock {
    nanoseconds: Option<AtomicU64>,
}

impl Clock {
    #[cfg(not(target_arch = "wasm32"))]
    fn new() -> Clock {
        Clock { nanoseconds: COMPUTED.get().map(AtomicU64::new) }
    }

    /// There is no clock.
    #[cfg(target_arch = "wasm32")]
    fn new() -> Clock {
        Clock { nanoseconds: None }
    }

    fn measure(&self, work: impl FnOnce()) {
        match &self.nanoseconds {
            None => work(),
            Some(sum) => {
                let start = Instant::now();
                work();
                sum.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
        }
    }

    fn keep(self) {
        #[cfg(not(target_arch = "wasm32"))]
        if let Some(sum) = self.nanoseconds {
            COMPUTED.set(Some(sum.into_inner()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for operations in [0.0, 1e9] {
            for count in [0, 1, 2, 7, 300] {
                let mut seen = vec![0; count];
                let ((), computed) = measured(|| for_each(seen.iter_mut().collect(), operations, |n| *n += 1));
                assert!(seen.iter().all(|&n| n == 1));
                assert!(computed > Duration::ZERO && COMPUTED.get().is_none());
            }
        }
    }
}
