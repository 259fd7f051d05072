use super::View;
use crate::problem::{Layout, Place};

/// Copies rows of X `[b, h, i, d]`, rounded, into Y `[b, h, rows, d]`, whose last axis is contiguous and may
/// be longer.
pub(crate) fn scatter(x: View<'_>, y: &mut [f32], layout: &Layout, places: &[Place], round: impl Fn(f32) -> f32) {
    let (&[_, heads, rows, _], dim) = (layout.shape(), x.layout.shape()[3]) else { unreachable!("four axes") };
    let step = x.layout.strides()[3];
    for (b, place) in places.iter().enumerate() {
        for h in 0..heads {
            for i in 0..if dim == 0 { 0 } else { place.count } {
                let from = x.layout.at(&[b, h, place.from + i, 0]);
                let to = layout.at(&[b, h, (place.to + i) % rows, 0]);
                let to = &mut y[to..][..dim];
                to.iter_mut().enumerate().for_each(|(d, to)| *to = round(x.data[from + d * step]));
            }
        }
    }
}
