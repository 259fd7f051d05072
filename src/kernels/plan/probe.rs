//! How fast an adapter multiplies and adds in registers.

use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::{catalogue, params};
use super::{Binding, Plan, Planner, Slot};
use crate::error::Result;

/// The plan of `rounds` rounds on every core of an adapter, the bytes of its output, and the floating-point
/// operations in it.
pub fn probe(rounds: u32, adapter: &Capabilities) -> Result<(Plan, u64, f64)> {
    let (workgroup, workgroups) = match adapter.class {
        AdapterClass::Cpu => (8, 256),
        // A million invocations fill the largest.
        AdapterClass::Gpu => (64, 16_384),
    };
    let bytes = workgroup * workgroups * 4;
    let mut planner = Planner { adapter, plan: Plan::default() };
    planner.push(
        catalogue::probe(workgroup as u32),
        workgroups,
        |workgroups| params::Probe { factor: 0.999, summand: 0.001, rounds, workgroups },
        vec![Binding { binding: 1, slot: Slot::Output, offset: 0, size: bytes }],
    )?;
    let operations = f64::from(catalogue::PROBE_OPERATIONS) * f64::from(rounds) * (workgroup * workgroups) as f64;
    Ok((planner.plan, bytes, operations))
}
