//! Merges results over disjoint keys.

use super::super::capabilities::Capabilities;
use super::super::catalogue::{self, Variant};
use super::super::params::{self, View};
use super::super::turns;
use super::slice::Part;
use super::{Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Plan, Planner, Slot, check_buffer};
use crate::error::Result;
use crate::problem::Layout;

/// Merges outputs `[b, h, i, d]` (Q, K), using their log-sum-exps `[b, h, i]` (Bias 0, Bias 1), into an output (Output)
/// and a row-major LSE (Lse).
pub fn merge(outputs: [&Layout; 2], lses: [&Layout; 2], output: &Layout, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, heads, len_q, dim] = output.shape() else { unreachable!("four axes") };
    check_buffer(adapter, "the merged output", output.end() as u64 * 4)?;
    let rows = |layout: &Layout| layout.unsqueeze(3);
    let lse = rows(&Layout::contiguous(&[batch, heads, len_q])?)?;
    let lses = [rows(lses[0])?, rows(lses[1])?];
    let operands = [
        ("a", Slot::Q, outputs[0]),
        ("a_lse", Slot::Bias(0), &lses[0]),
        ("b", Slot::K, outputs[1]),
        ("b_lse", Slot::Bias(1), &lses[1]),
        ("o", Slot::Output, output),
        ("lse", Slot::Lse, &lse),
    ];
    let sizes = planner.slices_of([batch, heads, len_q], &operands.map(|(_, _, layout)| (layout, 4)));
    for at in Part::grid([batch, heads, len_q], sizes) {
        let windows = operands.map(|(_, _, layout)| planner.window(layout, &at, 4));
        let view = |n: usize| View::new(operands[n].2, windows[n]);
        let [_, h, i] = at;
        let params = params::Merge {
            a: view(0),
            a_lse: view(1),
            b: view(2),
            b_lse: view(3),
            o: view(4),
            lse: view(5),
            heads: h.count as u32,
            len: i.count as u32,
            rows: at.iter().map(|part| part.count).product::<usize>() as u32,
            splits: 2,
            dim: dim as u32,
            ..Default::default()
        };
        let bindings =
            operands.iter().zip(windows).map(|(&(name, slot, _), at)| Binding::new(name, slot, at)).collect();
        planner.merge(catalogue::merge_pair(), params, bindings)?;
    }
    Ok(planner.plan)
}

impl Planner<'_> {
    /// Merges as `params` specify.
    pub(super) fn merge(&mut self, variant: Variant, params: params::Merge, bindings: Vec<Binding>) -> Result<()> {
        let total = u64::from(params.rows) * u64::from(params.dim.div_ceil(4).max(1));
        let splits = params.splits as usize;
        let cost = Cost { turns: turns::merge().of(splits), operations: total as f64 * 16.0 * splits as f64 };
        let params =
            params::Merge { total: total as u32, minus_infinity: MINUS_INFINITY, not_a_number: NOT_A_NUMBER, ..params };
        self.push_costly(variant, total.div_ceil(64), cost, |_| params, bindings)
    }
}
