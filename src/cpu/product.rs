//! Matrix products. Every element is a sum over the depth in one order, whatever rows and columns are computed with it,
//! so it has the same bits in every tile, batch and thread.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::buffers::{self, Buffer};
use super::{Matrix, exp, threads};

/// With fewer rows than this, packing the other operand costs more than it saves.
pub const FEW_ROWS: usize = 16;

/// Number of products that are summed in registers before their sum is added to the output. Longer f32 sums lose
/// digits: a sum of n equal values is off by up to n / 2 ulp.
const SUMMED: usize = 256;

/// The most columns of any panel. Column ranges start at multiples of it.
pub const MOST_COLUMNS: usize = 32;

/// Depths between two checks of bounds.
const UNROLLED: usize = 4;

/// Columns that a product computes at a time: two vector registers.
fn panel_columns(arch: Arch) -> usize {
    struct Columns;
    impl WithSimd for Columns {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            2 * lanes::<S>()
        }
    }
    arch.dispatch(Columns)
}

#[inline(always)]
const fn lanes<S: Simd>() -> usize {
    size_of::<S::f32s>() / size_of::<f32>()
}

/// A panel to pack from rows of a matrix. Not a closure, which the compiler may leave out of what `dispatch` compiles for
/// the SIMD level: packing would then be scalar.
struct Pack<'a> {
    matrix: &'a Matrix<'a>,
    rows: Range<usize>,
    /// The first column of the matrix to pack; none packs rows as columns.
    column: Option<usize>,
    panel: &'a mut [f32],
}

impl WithSimd for Pack<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match 2 * lanes::<S>() {
            32 => self.pack::<32>(),
            16 => self.pack::<16>(),
            8 => self.pack::<8>(),
            _ => self.pack::<2>(),
        }
    }
}

impl Pack<'_> {
    #[inline(always)]
    fn pack<const WIDTH: usize>(self) {
        let Pack { matrix, rows, column, panel } = self;
        match column {
            None => pack_transposed_panel::<WIDTH>(matrix, rows, panel),
            Some(column) => pack_panel::<WIDTH>(matrix, rows, column, panel),
        }
    }
}

/// A right operand `[depth, columns]`, packed: panels of a few columns, each with its rows one after another. The last
/// panel is padded with zeros.
#[derive(Clone, Debug, Default)]
pub struct Panels {
    data: Buffer,
    /// Where the panels start in `data`: at a cache line, so that a vector register is loaded from one line.
    start: usize,
    depth: usize,
    columns: usize,
}

impl Panels {
    /// Makes room for an operand and returns the columns of a panel. The contents are arbitrary.
    fn resize(&mut self, depth: usize, columns: usize) -> usize {
        let width = panel_columns(Arch::new());
        (self.depth, self.columns) = (depth, columns);
        let len = columns.div_ceil(width) * width * depth + buffers::LINE;
        if self.data.len() != len {
            self.data = Buffer::arbitrary(len);
            self.start = buffers::to_line(&self.data);
        }
        width
    }

    fn numbers(&self) -> &[f32] {
        &self.data[self.start..][..self.data.len().saturating_sub(buffers::LINE)]
    }

    /// The panels, to be written.
    fn panels_mut(&mut self, width: usize, depth: usize) -> impl Iterator<Item = (usize, &mut [f32])> {
        let len = self.data.len().saturating_sub(buffers::LINE);
        self.data[self.start..][..len].chunks_exact_mut((width * depth).max(1)).enumerate()
    }

    /// Packs rows of a matrix as columns, that is, its transpose.
    pub(super) fn pack_transposed(&mut self, matrix: &Matrix<'_>, rows: Range<usize>) {
        let width = self.resize(matrix.columns, rows.len());
        for (n, panel) in self.panels_mut(width, matrix.columns) {
            let rows = rows.start + n * width..rows.end;
            Arch::new().dispatch(Pack { matrix, rows, column: None, panel });
        }
    }

    /// [`Panels::pack_transposed`] of a whole matrix, on all threads.
    pub(super) fn transposed(matrix: &Matrix<'_>) -> Panels {
        let mut panels = Panels::default();
        let width = panels.resize(matrix.columns, matrix.rows);
        let tasks = panels.panels_mut(width, matrix.columns).collect();
        threads::for_each(tasks, (matrix.rows * matrix.columns) as f64, |(n, panel)| {
            Arch::new().dispatch(Pack { matrix, rows: n * width..matrix.rows, column: None, panel });
        });
        panels
    }

    /// Packs rows of a matrix. Calls `found` with the row and column of every value that is not finite, and packs 0 in
    /// its place.
    pub(super) fn pack_finite(&mut self, matrix: &Matrix<'_>, rows: Range<usize>, mut found: impl FnMut(usize, usize)) {
        let width = self.resize(rows.len(), matrix.columns);
        let arch = Arch::new();
        for (n, panel) in self.panels_mut(width, rows.len()) {
            arch.dispatch(Pack { matrix, rows: rows.clone(), column: Some(n * width), panel });
            if !exp::all_finite(arch, panel) {
                for (row, packed) in rows.clone().zip(panel.chunks_exact_mut(width)) {
                    for (c, x) in packed.iter_mut().enumerate().filter(|(_, x)| !x.is_finite()) {
                        found(row, n * width + c);
                        *x = 0.0;
                    }
                }
            }
        }
    }

    pub fn right(&self) -> Right<'_> {
        let width = panel_columns(Arch::new());
        Right {
            data: self.numbers(),
            row_stride: width,
            panel_stride: width * self.depth,
            depth: self.depth,
            columns: self.columns,
            is_padded: true,
        }
    }
}

/// Packs the first `WIDTH` of these rows, as far as there are any, as the columns of one panel.
#[inline(always)]
fn pack_transposed_panel<const WIDTH: usize>(matrix: &Matrix<'_>, rows: Range<usize>, panel: &mut [f32]) {
    /// Values of a row that are read at a time: a cache line.
    const READ: usize = 16;
    /// Rows that are read at a time, so that their values are stored together.
    const ROWS: usize = 4;
    let (lines, _) = panel.as_chunks_mut::<WIDTH>();
    let (groups, last) = lines.as_chunks_mut::<READ>();
    let packed_depth = groups.len() * READ;
    for (n, group) in groups.iter_mut().enumerate() {
        let values = |row: usize| -> &[f32; READ] {
            matrix.row(rows.start + row)[n * READ..].first_chunk().expect("as many as READ")
        };
        let mut packed_columns = 0;
        while packed_columns + ROWS <= WIDTH.min(rows.len()) {
            let [a, b, c, d] = std::array::from_fn(|row| values(packed_columns + row));
            for at in 0..READ {
                group[at].as_chunks_mut::<ROWS>().0[packed_columns / ROWS] = [a[at], b[at], c[at], d[at]];
            }
            packed_columns += ROWS;
        }
        for column in packed_columns..WIDTH.min(rows.len()) {
            group.iter_mut().zip(values(column)).for_each(|(line, &x)| line[column] = x);
        }
    }
    for column in 0..WIDTH.min(rows.len()) {
        let values = &matrix.row(rows.start + column)[packed_depth..];
        last.iter_mut().zip(values).for_each(|(line, &x)| line[column] = x);
    }
    if rows.len() < WIDTH {
        lines.iter_mut().for_each(|line| line[rows.len()..].fill(0.0));
    }
}

/// Packs columns from `column` on of these rows as one panel.
#[inline(always)]
fn pack_panel<const WIDTH: usize>(matrix: &Matrix<'_>, rows: Range<usize>, column: usize, panel: &mut [f32]) {
    let (lines, _) = panel.as_chunks_mut::<WIDTH>();
    for (row, line) in rows.zip(lines) {
        let values = &matrix.row(row)[column..];
        match values.first_chunk::<WIDTH>() {
            Some(values) => *line = *values,
            None => {
                line[..values.len()].copy_from_slice(values);
                line[values.len()..].fill(0.0);
            }
        }
    }
}

/// The right operand `[depth, columns]` of a product: packed, or a matrix as it is.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    data: &'a [f32],
    row_stride: usize,
    panel_stride: usize,
    depth: usize,
    columns: usize,
    is_padded: bool,
}

impl<'a> Right<'a> {
    pub(super) fn of_matrix(matrix: &'a Matrix<'_>) -> Right<'a> {
        Right {
            data: &matrix.data,
            row_stride: matrix.stride,
            panel_stride: panel_columns(Arch::new()),
            depth: matrix.rows,
            columns: matrix.columns,
            is_padded: false,
        }
    }

    /// Rows `start..start + depth`.
    pub fn rows(self, start: usize, depth: usize) -> Right<'a> {
        debug_assert!(start + depth <= self.depth);
        Right { data: &self.data[start * self.row_stride..], depth, ..self }
    }

    /// A range of columns that starts at a multiple of [`MOST_COLUMNS`].
    pub fn columns(self, columns: Range<usize>) -> Right<'a> {
        debug_assert!(columns.start.is_multiple_of(MOST_COLUMNS) && columns.end <= self.columns);
        let panel = columns.start / panel_columns(Arch::new());
        Right { data: &self.data[panel * self.panel_stride..], columns: columns.len(), ..self }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    Nothing,
    /// A row that is added to every row.
    Row(&'a [f32]),
    /// The contents of the output.
    Output,
}

/// `out = onto + scale · left · right`.
pub struct Product<'a> {
    /// The left operand's rows, as deep as `right`.
    pub left: &'a [f32],
    pub left_stride: usize,
    pub rows: usize,
    pub right: Right<'a>,
    pub scale: f32,
    pub onto: Onto<'a>,
    pub out: &'a mut [f32],
    pub out_stride: usize,
    /// At most this many products are summed in registers.
    pub summed: usize,
}

impl Product<'_> {
    pub fn compute(self, arch: Arch) {
        if self.rows > 0 && self.right.columns > 0 {
            arch.dispatch(self);
        }
    }
}

impl WithSimd for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { left, left_stride, rows, right, scale, onto, out, out_stride, summed } = self;
        let width = 2 * lanes::<S>();
        let summed = summed.clamp(1, SUMMED);
        // Without depth there is one step all the same, which writes zeros.
        let mut first = 0;
        loop {
            let depth = summed.min(right.depth - first);
            let onto = if first == 0 { onto } else { Onto::Output };
            for panel in 0..right.columns.div_ceil(width) {
                let column = panel * width;
                let columns = width.min(right.columns - column);
                let block = Block {
                    right: if depth == 0 {
                        &[]
                    } else {
                        &right.data[panel * right.panel_stride + first * right.row_stride..]
                    },
                    right_stride: right.row_stride,
                    loaded: if right.is_padded { width } else { columns },
                    left_stride,
                    depth,
                    columns,
                    scale,
                    onto: match onto {
                        Onto::Row(row) => Onto::Row(&row[column..][..columns]),
                        other => other,
                    },
                    out_stride,
                };
                let mut row = 0;
                macro_rules! rows {
                    ($count:literal) => {
                        while rows - row >= $count {
                            let left = &left[row * left_stride + first..];
                            block.compute::<S, $count>(simd, left, &mut out[row * out_stride + column..]);
                            row += $count;
                        }
                    };
                }
                // As many as there are registers for: 32 with the widest vectors, else 16.
                if lanes::<S>() == 16 {
                    rows!(12);
                    rows!(8);
                }
                rows!(6);
                rows!(4);
                rows!(2);
                rows!(1);
            }
            first += depth;
            if first >= right.depth {
                break;
            }
        }
    }
}

/// A few rows of the left operand times one panel.
#[derive(Clone, Copy)]
struct Block<'a> {
    right: &'a [f32],
    right_stride: usize,
    /// Numbers that each row of `right` holds for this panel.
    loaded: usize,
    left_stride: usize,
    depth: usize,
    columns: usize,
    scale: f32,
    onto: Onto<'a>,
    out_stride: usize,
}

impl Block<'_> {
    #[expect(clippy::needless_range_loop, reason = "the compiler unrolls these loops, so the sums stay in registers")]
    #[inline(always)]
    fn compute<S: Simd, const ROWS: usize>(&self, simd: S, left: &[f32], out: &mut [f32]) {
        let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
        let left: [&[f32]; ROWS] = std::array::from_fn(|r| &left[r * self.left_stride..][..self.depth]);
        let groups = self.depth / UNROLLED;
        for group in 0..groups {
            let numbers: [&[f32; UNROLLED]; ROWS] = std::array::from_fn(|r| &left[r].as_chunks::<UNROLLED>().0[group]);
            for n in 0..UNROLLED {
                let pair = self.pair(simd, group * UNROLLED + n);
                for r in 0..ROWS {
                    let number = simd.splat_f32s(numbers[r][n]);
                    sums[r][0] = simd.mul_add_e_f32s(number, pair[0], sums[r][0]);
                    sums[r][1] = simd.mul_add_e_f32s(number, pair[1], sums[r][1]);
                }
            }
        }
        for depth in groups * UNROLLED..self.depth {
            let pair = self.pair(simd, depth);
            for r in 0..ROWS {
                let number = simd.splat_f32s(left[r][depth]);
                sums[r][0] = simd.mul_add_e_f32s(number, pair[0], sums[r][0]);
                sums[r][1] = simd.mul_add_e_f32s(number, pair[1], sums[r][1]);
            }
        }
        let scale = simd.splat_f32s(self.scale);
        // A copy, because the compiler keeps only what is indexed by constants in registers.
        let mut scaled = [[scale; 2]; ROWS];
        for r in 0..ROWS {
            scaled[r] = [simd.mul_f32s(sums[r][0], scale), simd.mul_f32s(sums[r][1], scale)];
        }
        for (r, [a, b]) in scaled.into_iter().enumerate() {
            let out = &mut out[r * self.out_stride..][..self.columns];
            let (whole, part) = out.split_at_mut(self.columns.min(lanes::<S>()));
            self.store(simd, a, whole, 0);
            self.store(simd, b, part, lanes::<S>());
        }
    }

    /// A row of the panel.
    #[inline(always)]
    fn pair<S: Simd>(&self, simd: S, depth: usize) -> [S::f32s; 2] {
        let row = &self.right[depth * self.right_stride..][..self.loaded];
        match S::as_simd_f32s(row).0 {
            &[a, b] => [a, b],
            _ => {
                let (a, b) = row.split_at(self.loaded.min(lanes::<S>()));
                [simd.partial_load_f32s(a), simd.partial_load_f32s(b)]
            }
        }
    }

    #[inline(always)]
    fn store<S: Simd>(&self, simd: S, x: S::f32s, out: &mut [f32], column: usize) {
        if let ([whole], []) = S::as_mut_simd_f32s(&mut *out) {
            *whole = match self.onto {
                Onto::Nothing => x,
                Onto::Row(row) => simd.add_f32s(x, S::as_simd_f32s(&row[column..][..lanes::<S>()]).0[0]),
                Onto::Output => simd.add_f32s(x, *whole),
            };
            return;
        }
        if out.is_empty() {
            return;
        }
        let x = match self.onto {
            Onto::Nothing => x,
            Onto::Row(row) => simd.add_f32s(x, simd.partial_load_f32s(&row[column..][..out.len()])),
            Onto::Output => simd.add_f32s(x, simd.partial_load_f32s(out)),
        };
        simd.partial_store_f32s(out, x);
    }
}

/// The product of every row of `left` with every one of these rows of `right`. Reads each row of `right` once, which is
/// what a product of few rows takes its time for.
pub fn dots(
    arch: Arch,
    left: &Matrix<'_>,
    right: &Matrix<'_>,
    right_rows: Range<usize>,
    put: impl FnMut(usize, usize, f32),
) {
    arch.dispatch(Dots { left, right, right_rows, put });
}

struct Dots<'a, F> {
    left: &'a Matrix<'a>,
    right: &'a Matrix<'a>,
    right_rows: Range<usize>,
    put: F,
}

impl<F: FnMut(usize, usize, f32)> WithSimd for Dots<'_, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Dots { left, right, right_rows, mut put } = self;
        let mut next = right_rows.start;
        while next < right_rows.end {
            let few = (right_rows.end - next).min(4);
            let mut row = 0;
            macro_rules! rows {
                ($rows:literal, $few:literal) => {
                    while few == $few && left.rows - row >= $rows {
                        let sums = dot::<S, $rows, $few>(simd, left, row, right, next);
                        for (r, sums) in sums.into_iter().enumerate() {
                            sums.into_iter().enumerate().for_each(|(n, sum)| put(row + r, next + n, sum));
                        }
                        row += $rows;
                    }
                };
            }
            if lanes::<S>() == 16 {
                rows!(4, 4);
            }
            rows!(2, 4);
            rows!(1, 4);
            if few < 4 {
                for n in next..next + few {
                    for row in 0..left.rows {
                        put(row, n, dot::<S, 1, 1>(simd, left, row, right, n)[0][0]);
                    }
                }
            }
            next += few;
        }
    }
}

#[inline(always)]
fn dot<S: Simd, const ROWS: usize, const FEW: usize>(
    simd: S,
    left: &Matrix<'_>,
    left_row: usize,
    right: &Matrix<'_>,
    right_row: usize,
) -> [[f32; FEW]; ROWS] {
    let left: [_; ROWS] = std::array::from_fn(|r| S::as_simd_f32s(left.row(left_row + r)));
    let right: [_; FEW] = std::array::from_fn(|n| S::as_simd_f32s(right.row(right_row + n)));
    let mut sums = [[simd.splat_f32s(0.0); FEW]; ROWS];
    for at in 0..left[0].0.len().min(right[0].0.len()) {
        for r in 0..ROWS {
            for n in 0..FEW {
                sums[r][n] = simd.mul_add_e_f32s(left[r].0[at], right[n].0[at], sums[r][n]);
            }
        }
    }
    for r in 0..ROWS {
        for n in 0..FEW {
            let (a, b) = (simd.partial_load_f32s(left[r].1), simd.partial_load_f32s(right[n].1));
            sums[r][n] = simd.mul_add_e_f32s(a, b, sums[r][n]);
        }
    }
    let mut totals = [[0.0; FEW]; ROWS];
    for r in 0..ROWS {
        for n in 0..FEW {
            totals[r][n] = simd.reduce_sum_f32s(sums[r][n]);
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn matrix(rows: usize, columns: usize, stride: usize, seed: u32) -> Matrix<'static> {
        let mut state = seed;
        let data: Vec<f32> = (0..rows * stride)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Matrix { data: Cow::Owned(data), stride, rows, columns }
    }

    #[test]
    fn every_way_gives_the_products_of_every_size() {
        let arch = Arch::new();
        for rows in [1, 2, 3, 5, 11, 12, 13, 27, 33] {
            for columns in [1, 7, 16, 31, 32, 33, 80] {
                for depth in [0, 1, 3, 4, 18, 64, 300] {
                    let (a, b) = (matrix(rows, depth, depth + 3, 1), matrix(columns, depth, depth + 1, 2));
                    let c = matrix(depth, columns, columns + 2, 3);
                    let row: Vec<f32> = (0..columns).map(|n| n as f32).collect();
                    let exact = |r: usize, n: usize, transposed: bool| -> f64 {
                        let b = |d: usize| if transposed { b.row(n)[d] } else { c.row(d)[n] };
                        (0..depth).map(|d| f64::from(a.row(r)[d]) * f64::from(b(d))).sum()
                    };
                    let mut transposed = Panels::default();
                    transposed.pack_transposed(&b, 0..columns);
                    let mut packed = Panels::default();
                    packed.pack_finite(&c, 0..depth, |_, _| panic!("all are finite"));
                    for (right, is_transposed) in
                        [(transposed.right(), true), (packed.right(), false), (Right::of_matrix(&c), false)]
                    {
                        let (stride, mut out) = (columns + 5, vec![7.0; rows * (columns + 5)]);
                        let onto = if is_transposed { Onto::Row(&row) } else { Onto::Output };
                        let product = Product {
                            left: &a.data,
                            left_stride: a.stride,
                            rows,
                            right,
                            scale: 0.5,
                            onto,
                            out: &mut out,
                            out_stride: stride,
                            summed: 128,
                        };
                        product.compute(arch);
                        for r in 0..rows {
                            for n in 0..stride {
                                let expected = match n < columns {
                                    true if is_transposed => row[n] as f64 + 0.5 * exact(r, n, true),
                                    true => 7.0 + 0.5 * exact(r, n, false),
                                    false => 7.0,
                                };
                                let got = f64::from(out[r * stride + n]);
                                assert!((got - expected).abs() < 2e-5, "{rows} {columns} {depth}: {got} {expected}");
                            }
                        }
                    }
                    let mut seen = 0;
                    dots(arch, &a, &b, 0..columns, |r, n, got| {
                        seen += 1;
                        assert!((f64::from(got) - exact(r, n, true)).abs() < 2e-5);
                    });
                    assert_eq!(seen, rows * columns);
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_tile() {
        let (arch, depth, columns) = (Arch::new(), 300, 40);
        let (a, b) = (matrix(40, depth, depth, 1), matrix(columns, depth, depth, 2));
        let mut panels = Panels::default();
        panels.pack_transposed(&b, 0..columns);
        let compute = |first: usize, rows: usize| {
            let mut out = vec![0.0; rows * columns];
            Product {
                left: &a.data[first * depth..],
                left_stride: depth,
                rows,
                right: panels.right(),
                scale: 1.0,
                onto: Onto::Nothing,
                out: &mut out,
                out_stride: columns,
                summed: 256,
            }
            .compute(arch);
            out
        };
        let all = compute(0, 40);
        for rows in 1..=20 {
            for first in 0..=40 - rows {
                assert_eq!(compute(first, rows), all[first * columns..][..rows * columns], "{first} {rows}");
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_are_found() {
        let mut values = matrix(5, 70, 70, 1);
        let wrong = [(0, 0, f32::NAN), (2, 33, f32::INFINITY), (4, 69, f32::NEG_INFINITY)];
        wrong.iter().for_each(|&(row, column, x)| values.data.to_mut()[row * 70 + column] = x);
        let (mut panels, mut found) = (Panels::default(), Vec::new());
        panels.pack_finite(&values, 0..5, |row, column| found.push((row, column)));
        found.sort_unstable();
        assert_eq!(found, wrong.map(|(row, column, _)| (row, column)));
        assert!(panels.numbers().iter().all(|x| x.is_finite()));
    }
}
