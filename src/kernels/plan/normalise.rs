//! Norms of rows.

use super::super::access::{Operand, is_wide};
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::params::{self, View};
use super::super::{catalogue, turns};
use super::slice::Part;
use super::{Binding, Cost, Plan, Planner, Slot, check_buffer, padded_bytes};
use crate::error::{Result, shape_error};
use crate::problem::{Dtype, Layout};

/// The widest row: 64 invocations read it three times, in fours.
pub const MOST_NORMALISED: usize = 1 << 20;

/// RMSNorm, or LayerNorm if `centred`, over the last axis of X `[a, b, c, d]` (Q, any strides) with a weight `[d]` (K,
/// f32) and a bias `[d]` (Bias 0, f32) into Y, row-major (Output, f32).
pub fn normalise(
    x: Operand<'_>,
    weight: &Layout,
    bias: Option<&Layout>,
    centred: bool,
    epsilon: f32,
    adapter: &Capabilities,
) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[a_len, b_len, c_len, dim] = x.shape() else { unreachable!("four axes") };
    let y = Layout::contiguous(x.shape())?;
    check_buffer(adapter, "normalised rows", padded_bytes(&y, Dtype::F32))?;
    if dim > MOST_NORMALISED {
        return Err(shape_error!("rows {dim} wide cannot be normalised; at most {MOST_NORMALISED} is possible"));
    }
    if x.is_empty() {
        return Ok(planner.plan);
    }
    // How a row's sum is split depends only on its width. A software adapter splits rows to keep its loops short.
    let (workgroup, lanes) = match (adapter.class, dim) {
        (AdapterClass::Cpu, ..=8192) => (8, 1),
        (AdapterClass::Cpu, ..=65_536) | (AdapterClass::Gpu, ..=256) => (64, 8),
        _ => (64, 64),
    };
    let vector = |layout: &Layout| {
        let at = planner.window(layout, &[], 4);
        (View::new(layout, at), at)
    };
    let (w, w_at) = vector(weight);
    let bias = bias.map(vector);
    let variant = catalogue::normalise(workgroup, lanes, x.access(), is_wide(&y), centred, bias.is_some());
    let axes = [a_len, b_len, c_len];
    let sizes = planner.slices_of(axes, &[(&x, x.element()), (&y, 4)]);
    for at in Part::grid(axes, sizes) {
        let (x_at, y_at) = (planner.window(&x, &at, x.element()), planner.window(&y, &at, 4));
        let [a, b, c] = at.map(|part| part.count);
        let rows = (a * b * c) as u64;
        let mut bindings = vec![
            Binding::new("x", Slot::Q, x_at),
            Binding::new("y", Slot::Output, y_at),
            Binding::new("w", Slot::K, w_at),
        ];
        if let Some((_, at)) = bias {
            bindings.push(Binding::new("bias", Slot::Bias(0), at));
        }
        let cost = Cost { turns: turns::normalise(lanes).of(dim), operations: rows as f64 * dim as f64 * 8.0 };
        planner.push_costly(
            variant.clone(),
            rows.div_ceil(u64::from(workgroup / lanes)),
            cost,
            |workgroups| params::Normalise {
                x: View::new(&x, x_at),
                w,
                bias: bias.map_or(View::default(), |(view, _)| view),
                y_offset: y_at.first as u32,
                heads: b as u32,
                len: c as u32,
                dim: dim as u32,
                rows: rows as u32,
                workgroups,
                epsilon,
                ..Default::default()
            },
            bindings,
        )?;
    }
    Ok(planner.plan)
}
