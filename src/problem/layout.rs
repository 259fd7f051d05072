//! Shape and strides: where a tensor's elements are in its buffer, in elements.

use crate::error::{Result, shape_error};

/// Maps an index to a buffer position: `offset + Σ index[i] · strides[i]`, all in elements.
///
/// A stride of 0 repeats (broadcasts) an axis. Strides are never negative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    shape: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
}

/// A layout of the given shape, with the heads inside the sequence (`[b, s, h, d]`) if `like` has that order, else
/// row-major.
pub(crate) fn in_order_of(like: &Layout, [batch, heads, len, dim]: [usize; 4]) -> Result<Layout> {
    let strides = like.strides();
    if heads > 1 && len > 1 && strides[1] < strides[2] {
        Layout::contiguous(&[batch, len, heads, dim])?.permute(&[0, 2, 1, 3])
    } else {
        Layout::contiguous(&[batch, heads, len, dim])
    }
}

/// The number of elements of `shape`, or an error if it is too large.
pub fn checked_len(shape: &[usize]) -> Result<usize> {
    if shape.contains(&0) {
        return Ok(0);
    }
    shape
        .iter()
        .try_fold(1u64, |n, &s| n.checked_mul(s as u64))
        // 2^60 elements leave room for the bytes in signed 64-bit arithmetic.
        .filter(|&n| n <= 1 << 60)
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| crate::Error::Overflow {
            what: format!("the number of elements of shape {shape:?}"),
            factors: shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" × "),
        })
}

impl Layout {
    /// Row-major: the last axis is contiguous.
    pub fn contiguous(shape: &[usize]) -> Result<Layout> {
        checked_len(shape)?;
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis].max(1);
        }
        Ok(Layout { shape: shape.to_vec(), strides, offset: 0 })
    }

    /// Any strides over a buffer of `available` elements.
    pub fn strided(shape: &[usize], strides: &[usize], offset: usize, available: usize) -> Result<Layout> {
        if shape.len() != strides.len() {
            return Err(shape_error!(
                "shape {shape:?} has {} axes but strides {strides:?} have {}",
                shape.len(),
                strides.len()
            ));
        }
        checked_len(shape)?;
        let layout = Layout { shape: shape.to_vec(), strides: strides.to_vec(), offset };
        let end = layout.checked_end()?;
        if end > available {
            return Err(shape_error!(
                "shape {shape:?} with strides {strides:?} and offset {offset} reaches element {end}, \
                 but the buffer has {available}"
            ));
        }
        Ok(layout)
    }

    fn checked_end(&self) -> Result<usize> {
        if self.is_empty() {
            return Ok(0);
        }
        self.shape
            .iter()
            .zip(&self.strides)
            .try_fold(self.offset, |end, (&n, &s)| (n - 1).checked_mul(s)?.checked_add(end))
            .and_then(|last| last.checked_add(1))
            .ok_or_else(|| crate::Error::Overflow {
                what: format!("the extent of shape {:?}", self.shape),
                factors: format!("strides {:?}, offset {}", self.strides, self.offset),
            })
    }

    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Strides of the axes, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }
    /// Position of the first element.
    pub fn offset(&self) -> usize {
        self.offset
    }
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// True if an axis has length 0.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }
    /// One past the position of the last element; 0 if empty.
    pub fn end(&self) -> usize {
        self.checked_end().expect("checked when the layout was made")
    }
    /// True if no two elements share a position in memory. Also false for some axes that interleave without sharing.
    pub fn is_one_to_one(&self) -> bool {
        let mut axes: Vec<(usize, usize)> =
            self.strides.iter().copied().zip(self.shape.iter().copied()).filter(|&(_, len)| len > 1).collect();
        axes.sort_unstable();
        let mut reach = 0;
        self.is_empty()
            || axes.iter().all(|&(stride, len)| {
                let is_beyond = stride > reach;
                reach += stride * (len - 1);
                is_beyond
            })
    }

    /// True if the elements are contiguous in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for (&n, &s) in self.shape.iter().zip(&self.strides).rev() {
            if n != 1 && s != expected {
                return self.is_empty();
            }
            expected *= n;
        }
        true
    }
    /// The position of the element at `index`.
    pub fn at(&self, index: &[usize]) -> usize {
        debug_assert_eq!(index.len(), self.rank());
        self.offset + index.iter().zip(&self.strides).map(|(i, s)| i * s).sum::<usize>()
    }

    fn axis(&self, axis: usize) -> Result<usize> {
        if axis >= self.rank() {
            return Err(shape_error!("axis {axis} of a tensor with {} axes", self.rank()));
        }
        Ok(axis)
    }

    /// The axes in another order.
    pub fn permute(&self, axes: &[usize]) -> Result<Layout> {
        let mut seen = vec![false; self.rank()];
        let valid =
            axes.len() == self.rank() && axes.iter().all(|&a| a < seen.len() && !std::mem::replace(&mut seen[a], true));
        if !valid {
            return Err(shape_error!("permute {axes:?} must name each of the {} axes once", self.rank()));
        }
        Ok(Layout {
            shape: axes.iter().map(|&a| self.shape[a]).collect(),
            strides: axes.iter().map(|&a| self.strides[a]).collect(),
            offset: self.offset,
        })
    }

    /// The `len` entries of `axis` from `start`.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Layout> {
        let axis = self.axis(axis)?;
        if start.checked_add(len).is_none_or(|end| end > self.shape[axis]) {
            return Err(shape_error!("narrow to {start}..{start}+{len} on axis {axis} of length {}", self.shape[axis]));
        }
        let mut out = self.clone();
        out.shape[axis] = len;
        if !out.is_empty() {
            out.offset += start * self.strides[axis];
        }
        Ok(out)
    }

    /// One entry of `axis`; the axis is removed.
    pub fn select(&self, axis: usize, index: usize) -> Result<Layout> {
        let mut out = self.narrow(axis, index, 1)?;
        out.shape.remove(axis);
        out.strides.remove(axis);
        Ok(out)
    }

    /// A new axis of length 1 before `axis`.
    pub fn unsqueeze(&self, axis: usize) -> Result<Layout> {
        if axis > self.rank() {
            return Err(shape_error!("axis {axis} of a tensor with {} axes", self.rank()));
        }
        let mut out = self.clone();
        out.shape.insert(axis, 1);
        out.strides.insert(axis, 0);
        Ok(out)
    }

    /// Broadcasts axes of length 1 (and missing leading axes) to `shape`, without a copy.
    pub fn broadcast_to(&self, shape: &[usize]) -> Result<Layout> {
        let refuse = || {
            shape_error!(
                "shape {:?} does not broadcast to {shape:?}: from the right, each axis must be equal or 1",
                self.shape
            )
        };
        let missing = shape.len().checked_sub(self.rank()).ok_or_else(refuse)?;
        let mut strides = vec![0; missing];
        for (axis, (&have, &want)) in self.shape.iter().zip(&shape[missing..]).enumerate() {
            strides.push(match have {
                _ if have == want => self.strides[axis],
                1 => 0,
                _ => return Err(refuse()),
            });
        }
        Ok(Layout { shape: shape.to_vec(), strides, offset: self.offset })
    }

    /// The same elements with another shape, without a copy; `None` if the strides do not allow it.
    pub fn reshape(&self, shape: &[usize]) -> Result<Option<Layout>> {
        if checked_len(shape)? != self.len() {
            return Err(shape_error!(
                "reshape {:?} ({} elements) to {shape:?} ({} elements)",
                self.shape,
                self.len(),
                checked_len(shape)?
            ));
        }
        if self.is_empty() {
            return Layout::contiguous(shape).map(Some);
        }
        // Merge adjacent axes with matching strides into runs, then split the runs (NumPy's no-copy reshape).
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (&n, &s) in self.shape.iter().zip(&self.strides) {
            if n == 1 {
                continue;
            }
            match runs.last_mut() {
                Some((len, stride)) if *stride == n * s => (*len, *stride) = (*len * n, s),
                _ => runs.push((n, s)),
            }
        }
        let mut strides = vec![0; shape.len()];
        let mut axis = shape.len();
        for &(len, stride) in runs.iter().rev() {
            let (mut left, mut step) = (len, stride);
            while left > 1 {
                if axis == 0 {
                    return Ok(None);
                }
                axis -= 1;
                if !left.is_multiple_of(shape[axis]) {
                    return Ok(None);
                }
                strides[axis] = step;
                step *= shape[axis];
                left /= shape[axis];
            }
        }
        Ok(Some(Layout { shape: shape.to_vec(), strides, offset: self.offset }))
    }

    /// The same layout with another offset.
    pub fn rebased(&self, offset: usize) -> Layout {
        Layout { offset, ..self.clone() }
    }

    /// The positions of all elements, in row-major order of the index.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        let mut index = vec![0usize; self.rank()];
        let mut at = self.offset;
        (0..self.len()).map(move |_| {
            let here = at;
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                at += self.strides[axis];
                if index[axis] < self.shape[axis] {
                    break;
                }
                at -= index[axis] * self.strides[axis];
                index[axis] = 0;
            }
            here
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_find_the_same_elements() {
        // Packed QKV [b, s, 3, h, d]: K as [b, h, s, d].
        let packed = Layout::contiguous(&[2, 5, 3, 4, 8]).unwrap();
        let k = packed.select(2, 1).unwrap().permute(&[0, 2, 1, 3]).unwrap();
        assert_eq!(k.shape(), [2, 4, 5, 8]);
        assert_eq!(k.at(&[1, 3, 2, 7]), packed.at(&[1, 2, 1, 3, 7]));
        assert!(!k.is_contiguous());
    }

    #[test]
    fn reshape_splits_and_merges_without_a_copy_where_it_can() {
        let x = Layout::contiguous(&[2, 6, 12]).unwrap();
        let heads = x.reshape(&[2, 6, 3, 4]).unwrap().unwrap().permute(&[0, 2, 1, 3]).unwrap();
        assert_eq!(heads.strides(), [72, 4, 12, 1]);
        assert_eq!(heads.reshape(&[2, 3, 24]).unwrap(), None);
        assert!(x.reshape(&[5, 5]).is_err());
    }

    #[test]
    fn positions_follow_the_strides() {
        let x = Layout::contiguous(&[2, 3]).unwrap().permute(&[1, 0]).unwrap();
        assert_eq!(x.positions().collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5]);
        assert_eq!(Layout::contiguous(&[2, 0]).unwrap().positions().count(), 0);
    }

    #[test]
    fn sizes_that_overflow_are_errors() {
        let huge = usize::MAX / 2;
        assert!(matches!(Layout::contiguous(&[huge, 3]), Err(crate::Error::Overflow { .. })));
        assert!(Layout::strided(&[3, 3], &[huge, 1], 0, 9).is_err());
        assert!(Layout::strided(&[3, 3], &[3, 1], 1, 9).is_err());
        assert_eq!(checked_len(&[huge, 3, 0]).unwrap(), 0);
    }
}
