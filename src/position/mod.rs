//! Positional methods. They encode a token's position in its embedding (sinusoidal, learned), by rotating queries and
//! keys ([`Rotary`]), or in a bias on the scores ([`alibi`], [`t5`], [`shaw`]).
//!
//! Every table is computed on the host in f64 and rounded once to f32, because adapters' sines and cosines are off by
//! up to 4e-4. Everything that depends on data runs on the tensor's device.

pub mod alibi;
mod distance;
mod relative;
mod rotary;
pub mod shaw;
mod sinusoidal;
pub mod t5;
mod table;

pub(crate) use distance::Distance;
pub use rotary::{LongRope, Pairing, Rotary, RotaryConfig, RotaryScaling, Yarn};
pub use sinusoidal::{sinusoidal, sinusoidal_halves};
pub use table::PositionTable;

use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::kernels::plan::check_buffer;
use crate::problem::{MAX_LEN, Rows, checked_len};

/// The positions of the tokens `[batch, len]` of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenPositions {
    /// Token `i` is at `start + i`.
    From(usize),
    /// Token `i` of batch entry `b` is at `starts[b] + i`.
    FromEach(Vec<usize>),
    /// Explicit positions, row-major: `[len]` for all batch entries, or `[batch, len]`.
    Given(Vec<usize>),
}

impl From<usize> for TokenPositions {
    fn from(start: usize) -> TokenPositions {
        TokenPositions::From(start)
    }
}

impl Default for TokenPositions {
    fn default() -> TokenPositions {
        TokenPositions::From(0)
    }
}

impl TokenPositions {
    /// The table row of each of `[batch, len]` tokens, in a table of `rows` positions.
    pub(crate) fn rows(&self, batch: usize, len: usize, rows: usize) -> Result<Rows> {
        let beyond = |position: u128| {
            value_error!("position {position} is beyond the table, which holds positions 0 to {}", rows as i128 - 1)
        };
        let last = |start: usize| start as u128 + len as u128 - 1;
        if batch == 0 || len == 0 {
            return Ok(Rows::From(0));
        }
        let within = |position: u128| if position < rows as u128 { Ok(()) } else { Err(beyond(position)) };
        match self {
            TokenPositions::From(start) => {
                within(last(*start))?;
                Ok(Rows::From(*start))
            }
            TokenPositions::FromEach(starts) => {
                if starts.len() != batch {
                    return Err(shape_error!(
                        "{} first positions for a batch of {batch}; one per batch entry is needed",
                        starts.len()
                    ));
                }
                starts.iter().try_for_each(|&start| within(last(start)))?;
                if starts.iter().all(|&start| start == starts[0]) {
                    return Ok(Rows::From(starts[0]));
                }
                let each = starts.iter().flat_map(|&start| (start..start + len).map(|row| row as u32)).collect();
                Ok(Rows::Each { rows: each, per_batch: true })
            }
            TokenPositions::Given(given) => {
                let per_batch = given.len() != len;
                if per_batch && Some(given.len()) != batch.checked_mul(len) {
                    return Err(shape_error!(
                        "{} positions for {len} tokens in a batch of {batch}; [len] or [batch, len] is needed",
                        given.len()
                    ));
                }
                given.iter().try_for_each(|&position| within(position as u128))?;
                Ok(Rows::Each { rows: given.iter().map(|&row| row as u32).collect(), per_batch })
            }
        }
    }
}

/// The position of the first query of a batch entry whose band has this offset.
pub(crate) fn first_position(b: usize, offset: i32) -> Result<usize> {
    usize::try_from(offset)
        .map_err(|_| value_error!("query 0 of batch entry {b} is at position {offset}; rotary positions begin at 0"))
}

/// An error if a length is too large for indices.
fn check_len(what: &str, len: usize) -> Result<()> {
    if len > MAX_LEN {
        return Err(shape_error!("{what} = {len} is more than {MAX_LEN}"));
    }
    Ok(())
}

/// An error if the device cannot hold a table; checked before it is computed.
fn check_table(device: &Device, what: &str, shape: &[usize]) -> Result<()> {
    let elements = checked_len(shape)? as u64;
    match device {
        Device::Gpu(gpu) => check_buffer(gpu.capabilities(), what, elements * 4),
        #[cfg(feature = "cpu")]
        Device::Cpu => crate::memory::check_floats(what, shape),
    }
}
