//! The CPU backend: the same calls without an adapter. Tiles of rows are tasks for rayon's threads. Work is split by
//! shapes only, so results do not depend on the number of threads.

mod attention;
mod backward;
mod buffers;
mod exp;
mod inspect;
#[cfg(not(target_arch = "wasm32"))]
mod probe;
mod product;
mod project;
mod rows;
mod softmax;
mod threads;

pub(crate) use attention::attention;
pub(crate) use backward::{BackwardInputs, backward};
pub(crate) use buffers::Buffer;
pub(crate) use inspect::inspect;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use probe::multiply_add_ceiling;
pub(crate) use project::project;
pub(crate) use rows::{add_positions, gate, merge, normalise, relative, rotate, scatter};
pub(crate) use softmax::softmax;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use threads::measured;

use std::borrow::Cow;

use crate::kernels::plan::RelativeOperand;
use crate::problem::{Layout, MaskMeaning};

/// A strided view of floats.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub layout: &'a Layout,
}

impl<'a> View<'a> {
    /// The elements in row-major order.
    pub fn values(&self) -> Vec<f32> {
        self.layout.positions().map(|at| self.data[at]).collect()
    }

    /// Whether [`View::matrix`] copies.
    fn is_copied(&self) -> bool {
        let rank = self.layout.rank();
        let [rows, columns] = [self.layout.shape()[rank - 2], self.layout.shape()[rank - 1]];
        let [row_stride, step] = [self.layout.strides()[rank - 2], self.layout.strides()[rank - 1]];
        !((step == 1 || columns == 1) && (row_stride >= columns || rows == 1))
    }

    /// The last two axes at `lead` as a matrix with contiguous rows; copied if the strides require it.
    fn matrix(&self, lead: &[usize]) -> Matrix<'a> {
        let rank = self.layout.rank();
        let [rows, columns] = [self.layout.shape()[rank - 2], self.layout.shape()[rank - 1]];
        let [row_stride, step] = [self.layout.strides()[rank - 2], self.layout.strides()[rank - 1]];
        let start = self.layout.offset() + lead.iter().zip(self.layout.strides()).map(|(i, s)| i * s).sum::<usize>();
        if rows == 0 || columns == 0 {
            return Matrix { data: Cow::Borrowed(&[]), stride: columns, rows, columns };
        }
        if !self.is_copied() {
            let end = start + (rows - 1) * row_stride + columns;
            return Matrix {
                data: Cow::Borrowed(&self.data[start..end]),
                stride: row_stride.max(columns),
                rows,
                columns,
            };
        }
        let copy = (0..rows)
            .flat_map(|r| (0..columns).map(move |c| start + r * row_stride + c * step))
            .map(|at| self.data[at])
            .collect();
        Matrix { data: Cow::Owned(copy), stride: columns, rows, columns }
    }
}

/// A matrix with contiguous rows.
struct Matrix<'a> {
    data: Cow<'a, [f32]>,
    stride: usize,
    rows: usize,
    columns: usize,
}

impl Matrix<'_> {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..][..self.columns]
    }
}

/// A strided view of a boolean mask, broadcast to `problem.mask_shape()`.
#[derive(Clone, Copy)]
pub(crate) struct MaskView<'a> {
    pub data: &'a [u8],
    pub layout: &'a Layout,
    pub meaning: MaskMeaning,
}

impl MaskView<'_> {
    fn keeps(&self, index: [usize; 4]) -> bool {
        (self.data[self.layout.at(&index)] != 0) == (self.meaning == MaskMeaning::Keep)
    }
}

/// Operands with four axes each, masks and biases broadcast to `problem.mask_shape()`.
pub(crate) struct Inputs<'a> {
    pub q: View<'a>,
    pub k: View<'a>,
    pub v: View<'a>,
    pub masks: Vec<MaskView<'a>>,
    pub biases: Vec<View<'a>>,
    pub relative: Option<(View<'a>, RelativeOperand<'a>)>,
    /// `[hq]`
    pub sink: Option<View<'a>>,
}

/// Results: `output` in the requested layout, the rest row-major.
pub(crate) struct Outputs {
    pub output: Buffer,
    /// `[b, h, i]`
    pub lse: Option<Buffer>,
    /// `[b, h, i, j]` or, averaged, `[b, i, j]`
    pub weights: Option<Buffer>,
    /// `[b, h, i, j]`
    pub scores: Option<Buffer>,
}

/// Takes the first elements of a slice; none if they were not requested.
fn take<'a>(from: &mut &'a mut [f32], count: usize) -> &'a mut [f32] {
    let whole = std::mem::take(from);
    let (taken, rest) = whole.split_at_mut(count.min(whole.len()));
    *from = rest;
    taken
}
