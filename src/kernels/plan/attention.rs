//! Chooses the kernels of an attention call. Only this file decides between fused, tiled and unfused, and whether
//! queries and keys are rotated before or while they are read. A plan has all steps of its call.

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::method::{Method, Tile, three_passes_compete};
use super::call::Call;
use super::fused::Fused;
use super::{
    AttentionOperands, Pairs, Plan, Planner, RotaryOperand, Slot, check_buffer, padded_bytes, rows_padded, unfused,
};
use crate::error::{Error, INSTEAD_OF_AVERAGED, INSTEAD_OF_WEIGHTS, Result};
use crate::problem::{Dtype, Problem, ScoreStage, Sequence, in_order_of};

/// Wider heads with more rows per key/value head than this are faster in three passes (docs/performance.md).
const WIDE_DIM: usize = 512;
const MOST_WIDE_ROWS: usize = 32;

/// The plan of the attention call `problem` over `operands`.
pub fn attention(problem: &Problem, operands: &AttentionOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: results(problem, operands, adapter)? };
    if problem.is_empty() {
        if let Some(averaged) = planner.plan.averaged.clone().filter(|layout| !layout.is_empty()) {
            // The mean over zero heads is 0.
            planner.plan.scratch = vec![16];
            planner.fill(Slot::Averaged, (padded_bytes(&averaged, Dtype::F32) / 4) as usize, 0)?;
        }
        return Ok(planner.plan);
    }
    if problem.len_k == 0 {
        planner.plan.scratch = vec![16];
        Call::new(problem, operands, adapter, 3).nothing_to_see(&mut planner)?;
        return Ok(planner.plan);
    }
    if let Some(method) = operands.tuned.filter(|_| operands.method == Method::Auto) {
        let tuned = AttentionOperands { method, tuned: None, ..operands.clone() };
        // A result that was tuned on one call of a key may not fit another call.
        let fits = match method {
            Method::ThreePasses => three_passes_compete(problem),
            _ => Fused::new(problem, &AttentionOperands { rotary: None, ..tuned.clone() }, adapter, &[]).is_ok(),
        };
        if fits && method != Method::Auto {
            let plan = attention(problem, &tuned, adapter)?;
            return Ok(Plan { why: format!("tuned for such calls: {}", plan.why), ..plan });
        }
    }
    let is_alone = !operands.weights && !operands.averaged && operands.stage.is_none();
    let rows = problem.group() * problem.len_q;
    let is_wide = problem.dim_k.max(problem.dim_v) > WIDE_DIM && rows > MOST_WIDE_ROWS;
    let fused = match operands.method {
        Method::ThreePasses => Err("they were requested".into()),
        Method::Auto if is_wide => {
            Err(format!("heads wider than {WIDE_DIM} with {rows} rows of a key head are faster that way"))
        }
        _ => Fused::new(problem, operands, adapter, &[]),
    };
    if let Some(rotary) = operands.rotary
        && (fused.is_err() || !is_alone)
    {
        return rotated_first(operands, rotary, adapter, |rotated| attention(problem, rotated, adapter));
    }
    match fused {
        Ok(fused) => {
            let why = why_fused(problem, operands.method, adapter);
            let fused = fused.plan()?;
            if is_alone {
                return Ok(Plan { output: operands.output.stored, why, ..fused });
            }
            // The output always comes from the fused kernel, so requesting more does not change its bits.
            let Plan { steps, scratch, bands, .. } = fused;
            planner.plan = Plan { steps, scratch, bands, why: why + "; weights and scores separately", ..planner.plan };
            unfused::passes(&mut planner, problem, operands, false)?;
        }
        Err(reason) if matches!(operands.method, Method::Fused | Method::Tile(_)) => {
            return Err(Error::Method { method: operands.method.to_string(), reason });
        }
        Err(reason) => {
            planner.plan.why = format!("three passes: {reason}");
            // Sums over slices of the keys accumulate in the output.
            planner.plan.output = Dtype::F32;
            unfused::passes(&mut planner, problem, operands, true)?;
        }
    }
    Ok(planner.plan)
}

/// The plan of packed sequences in operands with batch 1: Q `[1, hq, total, d]`. `problem` gives heads, widths, scale
/// and softcap; each sequence's band gives the keys that its queries may see.
pub fn packed(
    problem: &Problem,
    operands: &AttentionOperands<'_>,
    sequences: &[Sequence],
    adapter: &Capabilities,
) -> Result<Plan> {
    if problem.is_empty() || sequences.iter().all(|sequence| sequence.len_q == 0) {
        return Ok(Plan { output: operands.output.stored, ..Plan::default() });
    }
    match (Fused::new(problem, operands, adapter, sequences), operands.rotary) {
        (Ok(fused), _) => Ok(Plan { output: operands.output.stored, ..fused.plan()? }),
        (Err(_), Some(rotary)) => {
            rotated_first(operands, rotary, adapter, |rotated| packed(problem, rotated, sequences, adapter))
        }
        (Err(reason), None) if matches!(operands.method, Method::Tile(_)) => {
            Err(Error::Method { method: operands.method.to_string(), reason })
        }
        (Err(reason), None) => Err(Error::Unsupported {
            what: "attention over packed sequences".into(),
            adapter: adapter.adapter.clone(),
            needs: format!("the fused kernel, but {reason}; run the longest sequences separately"),
        }),
    }
}

/// A plan without steps: the layouts of a call's results, if they fit.
pub(super) fn results(problem: &Problem, operands: &AttentionOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let result = |wanted: bool, shape: &[usize]| wanted.then(|| rows_padded(shape)).transpose();
    let square = [batch, heads_q, len_q, len_k];
    let of_weights = operands.stage == Some(ScoreStage::Weights);
    let plan = Plan {
        weights: result(operands.weights || of_weights, &square)?,
        averaged: result(operands.averaged, &[batch, len_q, len_k])?,
        stage: result(operands.stage.is_some() && !of_weights, &square)?,
        output: operands.output.stored,
        ..Plan::default()
    };
    for (what, layout, instead) in [
        ("the weights", &plan.weights, INSTEAD_OF_WEIGHTS),
        ("the averaged weights", &plan.averaged, INSTEAD_OF_AVERAGED),
        ("the scores", &plan.stage, INSTEAD_OF_AVERAGED),
    ] {
        if let Some(layout) = layout {
            check_buffer(adapter, what, padded_bytes(layout, Dtype::F32)).map_err(|error| error.or_rather(instead))?;
        }
    }
    Ok(plan)
}

fn why_fused(problem: &Problem, method: Method, adapter: &Capabilities) -> String {
    if let Method::Tile(tile) = method {
        return format!("the tile {tile} was requested");
    }
    let kind = match adapter.class {
        AdapterClass::Cpu => "software adapters",
        AdapterClass::Gpu => "GPUs",
    };
    let rows = problem.group() * problem.len_q;
    let asked = if method == Method::Fused { "asked for" } else { "where nothing else was found" };
    let tile = Tile::default_for(problem, adapter);
    format!("fused, {asked}; {tile} is the default of {kind} for {rows} rows of a key head")
}

/// The plan of a call whose queries and keys are rotated before its kernels read them. `plan` plans the rest, over
/// operands without rotary positions.
fn rotated_first(
    operands: &AttentionOperands<'_>,
    rotary: RotaryOperand<'_>,
    adapter: &Capabilities,
    plan: impl FnOnce(&AttentionOperands<'_>) -> Result<Plan>,
) -> Result<Plan> {
    let layout = |x: Operand<'_>| {
        let &[b, h, i, d] = x.shape() else { unreachable!("four axes") };
        in_order_of(&x, [b, h, i, d])
    };
    let layouts = [layout(operands.q)?, layout(operands.k)?];
    let [q, k]: [Operand<'_>; 2] = layouts.each_ref().map(Operand::from);
    let mut rest = plan(&AttentionOperands { q, k, rotary: None, ..operands.clone() })?;
    // The rotated operands come after the working memory of the rest.
    let slots = [0, 1].map(|n| Slot::Scratch(rest.scratch.len() + n));
    for binding in rest.steps.iter_mut().flat_map(|step| &mut step.bindings) {
        binding.slot = match binding.slot {
            Slot::Q => slots[0],
            Slot::K => slots[1],
            other => other,
        };
    }
    let mut planner = Planner { adapter, plan: Plan::default() };
    let pairs = Pairs { count: rotary.pairs, interleaved: rotary.interleaved, back: false };
    for (n, x) in [operands.q, operands.k].into_iter().enumerate() {
        let of = [[Slot::Q, Slot::K][n], slots[n], Slot::Rotations];
        planner.rotate(x, &layouts[n], rotary.rotations, of, pairs, rotary.rows[n])?;
        rest.scratch.push(padded_bytes(&layouts[n], Dtype::F32).max(16));
    }
    let mut steps = planner.plan.steps;
    steps.append(&mut rest.steps);
    Ok(Plan { steps, rows: planner.plan.rows, ..rest })
}
