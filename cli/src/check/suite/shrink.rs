//! Repeats a case and shrinks it to the smallest that still fails.

use clap::ValueEnum;
use wgpu_attention::{Device, Traced};

use super::faults::Fault;
use super::judge;
use super::plan::{Item, Work};
use crate::check::report::{CaseResult, Status, quoted};
use crate::progress::Spinner;
use crate::target::backend_name;

/// The smallest case that fails in the same way, found by removing and halving one thing after another, and the number
/// of cases tried.
pub fn shrink(item: &Item, device: &Device) -> (Item, CaseResult, usize) {
    let _spinner = Spinner::start("shrinking".into());
    let (mut item, mut result, mut tried) = (item.clone(), judge::run(item, device), 0);
    'smaller: while let Work::Drawn(case) = &item.work {
        for less in case.smaller() {
            let less = Item { work: Work::Drawn(less), method: item.method };
            let outcome = judge::run(&less, device);
            tried += 1;
            if outcome.status == Status::Failed && kind(&outcome) == kind(&result) {
                (item, result) = (less, outcome);
                continue 'smaller;
            }
        }
        break;
    }
    (item, result, tried)
}

/// How a case fails: wrong numbers, different bits, or no result.
fn kind(result: &CaseResult) -> [bool; 3] {
    [result.outputs.iter().any(|one| !one.ok), result.same_bits == Some(false), result.outputs.is_empty()]
}

/// Everything that a bug report needs: the call, the kernels' text, and how to run it again.
pub fn describe(item: &Item, result: &CaseResult, device: &Device, fault: Option<Fault>) -> String {
    let mut text = String::new();
    let mut line = |line: String| text.push_str(&(line + "\n"));
    let Work::Drawn(case) = &item.work else { return text };
    let call = case.meant();
    line(format!("Q {:?}, K {:?}, V {:?} as {}, {:?}", call.q, call.k, call.v, case.storage, call.order));
    line(format!(
        "scale {:?}, softcap {:?}, masks {:?}, biases {:?}",
        call.scale, call.softcap, call.masks, call.biases
    ));
    line(format!("sink {}, {:?}", call.sink, call.positions));
    line(format!(
        "Inputs: the seed {} of PCG64 (rand_pcg), as wgpu-attention-conformance draws them for {}.",
        call.seed,
        case.op.name()
    ));
    let (mut adapter, mut open) = ("cpu".to_string(), "wgpu_attention::Device::Cpu".to_string());
    if let Some(gpu) = device.gpu() {
        let (_, trace) = gpu.trace(|| case.run(device, item.method).map(|_| ()));
        for Traced { variant, workgroups, .. } in trace {
            line(format!("\n// {} in {} x {} workgroups", variant.name, workgroups[0], workgroups[1]));
            line(gpu.source(&variant).unwrap_or_else(|error| error.to_string()));
        }
        adapter = format!("{}:{}", backend_name(gpu.info().backend).to_lowercase(), gpu.info().name);
        let options = format!("wgpu_attention::GpuOptions::adapter({adapter:?})");
        open = format!("wgpu_attention::Gpu::with_options(&{options})?.into()");
    }
    let plant = fault.and_then(|fault| fault.to_possible_value());
    let plant = plant.map_or(String::new(), |name| format!(" --plant {}", name.get_name()));
    line("To run it again:".into());
    line("  git clone <this project> && cd wgpu-attention".into());
    line(format!(
        "  cargo run --release -- check --repro {} --adapter {}{plant}",
        quoted(&result.id),
        quoted(&adapter)
    ));
    line("In Rust, with the crate `wgpu-attention-conformance`:".into());
    line(format!("  let device: wgpu_attention::Device = {open};"));
    line(format!("  let case: wgpu_attention_conformance::Case = \"{case}\".parse()?;"));
    line(format!("  let got = case.run(&device, \"{}\".parse()?)?;", result.variant));
    line("  println!(\"{got:?}\\n{:?}\", case.truth());".into());
    text
}
