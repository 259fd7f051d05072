//! Slices work that exceeds a limit. No other file does.

use super::Window;
use crate::problem::Layout;

/// The `count` entries of an axis from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernels) struct Part {
    pub start: usize,
    pub count: usize,
}

impl Part {
    /// A whole axis.
    pub fn whole(count: usize) -> Part {
        Part { start: 0, count }
    }

    /// `total` in parts of at most `size`.
    pub fn all(total: usize, size: usize) -> impl Iterator<Item = Part> + Clone {
        let size = size.max(1);
        (0..total.div_ceil(size)).map(move |n| Part { start: n * size, count: size.min(total - n * size) })
    }

    /// The parts of three axes; those of the last axis vary fastest.
    pub fn grid([a, b, c]: [usize; 3], [size_a, size_b, size_c]: [usize; 3]) -> impl Iterator<Item = [Part; 3]> {
        let inner = move |a| Part::all(b, size_b).flat_map(move |b| Part::all(c, size_c).map(move |c| [a, b, c]));
        Part::all(a, size_a).flat_map(inner)
    }

    /// The part of another axis of which `each` entries of this one share one.
    pub fn grouped(self, each: usize) -> Part {
        let start = self.start / each;
        Part { start, count: (self.start + self.count).div_ceil(each) - start }
    }

    /// Truncated at `end`.
    pub fn within(self, end: usize) -> Part {
        let start = self.start.min(end);
        Part { start, count: (self.start + self.count).min(end) - start }
    }
}

/// An axis that may be halved while it is longer than `above`, to a multiple of `multiple`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Halving {
    pub axis: usize,
    pub above: usize,
    pub multiple: usize,
}

pub(super) const fn halving(axis: usize, above: usize, multiple: usize) -> Halving {
    Halving { axis, above, multiple }
}

/// Halves the first axis of `order` that may be halved, until a slice fits and is short. Returns the sizes and whether
/// they fit. A slice that fits but takes too long is sliced only along the first `for_time` entries of the order.
pub(super) fn slice<const N: usize>(
    mut sizes: [usize; N],
    order: &[Halving],
    for_time: usize,
    fits: impl Fn(&[usize; N]) -> bool,
    is_short: impl Fn(&[usize; N]) -> bool,
) -> ([usize; N], bool) {
    loop {
        let fit = fits(&sizes);
        if fit && is_short(&sizes) {
            return (sizes, true);
        }
        let allowed = if fit { &order[..for_time] } else { order };
        let Some(next) = allowed.iter().find(|next| sizes[next.axis] > next.above) else { return (sizes, fit) };
        sizes[next.axis] = sizes[next.axis].div_ceil(2).next_multiple_of(next.multiple);
    }
}

/// Slices three axes in order: an axis is sliced only if those before it are down to one entry, so that a slice of a
/// row-major result is contiguous.
pub(super) const IN_ORDER: [Halving; 3] = [halving(0, 1, 1), halving(1, 1, 1), halving(2, 1, 1)];

/// Slices of the first three axes of some operands, each with its bytes per element, whose bindings fit in `most`
/// bytes.
pub(super) fn slices_of(sizes: [usize; 3], operands: &[(&Layout, u64)], align: u64, most: u64) -> [usize; 3] {
    let fits = |sizes: &[usize; 3]| {
        let parts = sizes.map(Part::whole);
        operands.iter().all(|&(layout, element)| window(layout, &parts, element, 1).size + align <= most)
    };
    slice(sizes, &IN_ORDER, 0, fits, |_| true).0
}

/// A part of a strided operand as a binding. Axes without a given part are whole; an operand `[b, i, d]` has one head.
pub(super) fn window(layout: &Layout, parts: &[Part], element: u64, alignment: u64) -> Window {
    let mut start = layout.offset() as u64;
    let mut extent = 1u64;
    for (axis, (&stride, &len)) in layout.strides().iter().zip(layout.shape()).enumerate() {
        let part = parts.get(axis).copied().unwrap_or(Part::whole(len));
        start += part.start as u64 * stride as u64;
        extent += part.count.saturating_sub(1) as u64 * stride as u64;
    }
    let offset = start * element / alignment * alignment;
    let first = start - offset / element;
    Window { offset, size: ((first + extent) * element).next_multiple_of(16), first }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_halved_in_order_and_for_time_only_the_first() {
        let order = [halving(0, 1, 1), halving(1, 32, 32), halving(1, 1, 1)];
        let run = |sizes, most: usize, long: usize| {
            slice(sizes, &order, 2, |s: &[usize; 2]| s[0] * s[1] <= most, |s: &[usize; 2]| s[0] * s[1] <= long)
        };
        assert_eq!(run([4, 100], 400, 400), ([4, 100], true));
        assert_eq!(run([4, 100], 100, 400), ([1, 100], true));
        assert_eq!(run([4, 100], 70, 400), ([1, 64], true));
        assert_eq!(run([4, 100], 10, 400), ([1, 8], true));
        // A slice that only takes too long is not cut below 32 rows.
        assert_eq!(run([4, 100], 400, 10), ([1, 32], true));
        assert_eq!(run([4, 100], 0, 0), ([1, 1], false));
    }

    #[test]
    fn a_grid_has_every_entry_once() {
        let parts: Vec<_> = Part::grid([3, 2, 5], [2, 2, 3]).collect();
        assert_eq!(parts.len(), 4);
        let entries: usize = parts.iter().map(|[a, b, c]| a.count * b.count * c.count).sum();
        assert_eq!(entries, 30);
        assert_eq!(parts[1], [Part { start: 0, count: 2 }, Part::whole(2), Part { start: 3, count: 2 }]);
    }
}
