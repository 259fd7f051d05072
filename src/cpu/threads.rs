//! Splits tasks among threads. The calling thread works, too.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Work that one thread does before another has woken up.
const SMALL: f64 = 1e6;

/// Turns of waiting for the other threads' last tasks before the calling thread sleeps: a sleeping thread wakes up late.
const TURNS: usize = 2000;

/// Calls `work` with every task, the last one first. `operations` is the number of multiply-adds or moved numbers of all
/// tasks together; few of them are done by the calling thread alone.
pub fn for_each<T: Send>(mut tasks: Vec<T>, operations: f64, work: impl Fn(T) + Sync) {
    let helpers = if operations < SMALL { 0 } else { rayon::current_num_threads().min(tasks.len()).saturating_sub(1) };
    if helpers == 0 {
        while let Some(task) = tasks.pop() {
            work(task);
        }
        return;
    }
    let queue = Mutex::new(tasks);
    let drain = || {
        // The lock is held for taking a task only.
        while let Some(task) = { queue.lock().expect("no task is taken in a panic").pop() } {
            work(task);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for operations in [0.0, 1e9] {
            for count in [0, 1, 2, 7, 300] {
                let mut seen = vec![0; count];
                for_each(seen.iter_mut().collect(), operations, |n| *n += 1);
                assert!(seen.iter().all(|&n| n == 1));
            }
        }
    }
}
