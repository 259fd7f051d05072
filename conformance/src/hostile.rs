//! Corrupted files: readers must return an error or a result, and never panic.

use std::panic::AssertUnwindSafe;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

/// A copy with a few bytes changed, cut off, repeated or inserted, in the first `head` bytes or anywhere.
fn changed(bytes: &[u8], head: usize, rng: &mut Pcg64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let head = head.min(bytes.len()).max(1);
    match rng.random_range(0..7) {
        0 => bytes.truncate(rng.random_range(0..bytes.len())),
        1 => {
            let digits: Vec<usize> = (0..head).filter(|&at| bytes[at].is_ascii_digit()).collect();
            for _ in 0..rng.random_range(1..4) {
                if let Some(&at) = digits.get(rng.random_range(0..digits.len().max(1))) {
                    bytes[at] = b'0' + rng.random_range(0..10u8);
                }
            }
        }
        2 => {
            let at = rng.random_range(0..head);
            let part: Vec<u8> = bytes[at..].iter().copied().take(rng.random_range(1..40)).collect();
            bytes.splice(at..at, part);
        }
        3 => {
            let at = rng.random_range(0..head);
            let odd: [&[u8]; 8] =
                [b"NaN", b"-1", b"18446744073709551615", b"1e999", b"null", b"[[[[[[[[[[[[", b"\"", b"\xff\xfe\x00"];
            bytes.splice(at..at, odd[rng.random_range(0..odd.len())].iter().copied());
        }
        // The header length of a safetensors file.
        4 => {
            let length = rng.random::<u64>().to_le_bytes();
            bytes.splice(..bytes.len().min(8), length);
        }
        _ => {
            for _ in 0..rng.random_range(1..8) {
                let at = rng.random_range(0..head);
                bytes[at] ^= 1 << rng.random_range(0..8);
            }
        }
    }
    bytes
}

/// Runs `read`, which returns whether it accepted a file, on `count` corrupted copies of `originals`, drawn from seeds
/// 0 to `count`. Most changes are in the first `head` bytes. Panics if it rejects an original, or too few of the
/// copies.
pub fn refused(
    what: &str,
    originals: &[Vec<u8>],
    head: impl Fn(&[u8]) -> usize,
    count: u64,
    mut read: impl FnMut(&[u8]) -> bool,
) {
    assert!(originals.iter().all(|bytes| read(bytes)), "{what}: an original was rejected");
    let mut errors = 0;
    for seed in 0..count {
        let mut rng = Pcg64::seed_from_u64(seed);
        let original = &originals[rng.random_range(0..originals.len())];
        let bytes = changed(original, head(original), &mut rng);
        let taken = std::panic::catch_unwind(AssertUnwindSafe(|| read(&bytes)));
        errors += u64::from(!taken.unwrap_or_else(|_| panic!("{what}: the copy of seed {seed}, see above")));
    }
    println!("{count} corrupted {what}, {errors} rejected");
    assert!(errors > count / 10, "{what}: {errors} of {count}");
}
