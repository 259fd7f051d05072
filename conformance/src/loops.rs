//! Measures how many iterations the loops of an invocation run before a driver stops them.

use wgpu_attention::{Error, Gpu, Result};

use crate::probe::one_workgroup;

/// Iterations of the first loop; two nested loops run the same number again.
const HALF: u32 = 500_000;
/// The total number of iterations requested.
pub const ASKED: u32 = 2 * HALF;
const START: u32 = 12_345;
const DURING: &str = "counting loop iterations";

/// One step of a chain whose end a compiler cannot know without running all steps (Knuth, TAOCP 2, 3.2.1).
const fn next(x: u32) -> u32 {
    x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)
}

const TEXT: &str = "
@group(0) @binding(0) var<storage, read_write> x: array<u32>;
@compute @workgroup_size(1)
fn main() {
    var value = x[0];
    let turns = vec3<u32>(x[1], x[2], x[3]);
    for (var i = 0u; i < turns.x; i++) {
        value = value * 1664525u + 1013904223u;
    }
    for (var i = 0u; i < turns.y; i++) {
        for (var j = 0u; j < turns.z; j++) {
            value = value * 1664525u + 1013904223u;
        }
    }
    x[0] = value;
}
";

/// How many of [`ASKED`] iterations an invocation actually runs.
pub fn turns(gpu: &Gpu) -> Result<u32> {
    let end = one_workgroup(gpu, DURING, TEXT, &[START, HALF, HALF / 1000, 1000])?[0];
    let mut value = START;
    for count in 0..=ASKED {
        if value == end {
            return Ok(count);
        }
        value = next(value);
    }
    Err(Error::Gpu {
        adapter: gpu.info().name.clone(),
        during: DURING.into(),
        message: format!("the chain ends at {end}, which no number of iterations up to {ASKED} gives"),
    })
}
