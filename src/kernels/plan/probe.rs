//! Measures how fast an adapter does multiply-adds in registers.

use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::{catalogue, params, turns};
use super::{Binding, Cost, Plan, Planner, Slot};
use crate::error::Result;

/// The plan of `rounds` rounds on every core of an adapter, the bytes of its output, and its number of floating-point
/// operations. Rounds beyond the adapter's loop limit become more workgroups.
pub fn probe(rounds: u32, adapter: &Capabilities) -> Result<(Plan, u64, f64)> {
    let at_once = rounds.min(turns::probe().longest(adapter.loop_turns()) as u32).max(1);
    let (workgroup, workgroups) = match adapter.class {
        AdapterClass::Cpu => (8, 256),
        // A million invocations fill the largest GPUs.
        AdapterClass::Gpu => (64, 16_384),
    };
    let workgroups = workgroups * u64::from(rounds.div_ceil(at_once).max(1));
    let bytes = workgroup * workgroups * 4;
    let operations = f64::from(catalogue::PROBE_OPERATIONS) * f64::from(at_once) * (workgroup * workgroups) as f64;
    let mut planner = Planner { adapter, plan: Plan::default() };
    planner.push_costly(
        catalogue::probe(workgroup as u32),
        workgroups,
        Cost { turns: turns::probe().of(at_once as usize), operations },
        |workgroups| params::Probe { factor: 0.999, summand: 0.001, rounds: at_once, workgroups, ..Default::default() },
        vec![Binding::whole("y", Slot::Output, bytes)],
    )?;
    Ok((planner.plan, bytes, operations))
}
