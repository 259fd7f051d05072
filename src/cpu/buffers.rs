//! Memory for results and packed operands. Freed buffers are kept for later calls, because an operating system hands out
//! fresh memory page by page, which takes longer than the arithmetic of a short call.

use std::borrow::Cow;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::product::Panels;
use crate::problem::Layout;

/// Smaller buffers are left to the allocator, which reuses them itself.
const SMALLEST: usize = 4096;

/// The most numbers that are kept: 256 MB.
const MOST_KEPT: usize = 64 << 20;

/// Numbers of f32 in a cache line.
pub(super) const LINE: usize = 16;

/// The number of elements, below [`LINE`], from the start of `data` to that of a cache line.
pub(super) fn to_line<T>(data: &[T]) -> usize {
    data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1)
}

/// Free buffers, the last freed one last.
static KEPT: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Numbers whose memory is kept for the next buffer when this one is dropped.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    data: Vec<f32>,
    /// The numbers as the weight of a projection, packed by the first one that reads them.
    packed: OnceLock<Box<(Layout, Panels)>>,
}

impl Buffer {
    /// A buffer with arbitrary contents, for numbers that are all written before they are read.
    pub fn arbitrary(len: usize) -> Buffer {
        let mut data = Vec::new();
        if len >= SMALLEST {
            let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |capacity: usize| capacity >= len && capacity / 2 <= len;
            // The last freed one is the likeliest to be in a cache.
            if let Some(at) = kept.iter().rposition(|free| fits(free.capacity())) {
                data = kept.remove(at);
            }
        }
        if data.capacity() == 0 {
            return vec![0.0; len].into();
        }
        data.resize(len, 0.0);
        data.into()
    }

    pub fn filled(len: usize, value: f32) -> Buffer {
        let mut buffer = Buffer::arbitrary(len);
        buffer.fill(value);
        buffer
    }

    /// What `pack` returns for a matrix in this buffer, kept for later calls if it is the first matrix.
    pub fn packed(&self, layout: &Layout, pack: impl Fn() -> Panels) -> Cow<'_, Panels> {
        let (kept_layout, panels) = &**self.packed.get_or_init(|| Box::new((layout.clone(), pack())));
        if kept_layout == layout { Cow::Borrowed(panels) } else { Cow::Owned(pack()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        if !(SMALLEST..=MOST_KEPT).contains(&data.capacity()) {
            return;
        }
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = data.capacity() + kept.iter().map(Vec::capacity).sum::<usize>();
        kept.push(data);
        while all > MOST_KEPT {
            all -= kept.remove(0).capacity();
        }
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(data: Vec<f32>) -> Buffer {
        Buffer { data, packed: OnceLock::new() }
    }
}

impl FromIterator<f32> for Buffer {
    fn from_iter<I: IntoIterator<Item = f32>>(numbers: I) -> Buffer {
        numbers.into_iter().collect::<Vec<f32>>().into()
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        let mut copy = Buffer::arbitrary(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.packed.take();
        &mut self.data
    }
}
