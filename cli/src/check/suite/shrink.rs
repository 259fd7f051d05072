//! One case again, and made as small as it still fails.

use wgpu_attention::{Device, Traced};

use super::judge;
use super::plan::{Item, Work};
use crate::check::report::{CaseResult, Status};
use crate::progress::Spinner;

/// The smallest case that fails too, found by leaving out and halving one thing after another, and how many were
/// tried.
pub fn shrink(item: &Item, device: &Device) -> (Item, CaseResult, usize) {
    let _spinner = Spinner::start("shrinking".into());
    let (mut item, mut result, mut tried) = (item.clone(), judge::run(item, device), 0);
    'smaller: while let Work::Drawn(case) = &item.work {
        for less in case.smaller() {
            let less = Item { work: Work::Drawn(less), method: item.method };
            let outcome = judge::run(&less, device);
            tried += 1;
            if outcome.status == Status::Failed {
                (item, result) = (less, outcome);
                continue 'smaller;
            }
        }
        break;
    }
    (item, result, tried)
}

/// What a bug report needs: the call, the kernels' text, and how to run it again.
pub fn describe(item: &Item, result: &CaseResult, device: &Device, place: &str) -> String {
    let mut text = String::new();
    let mut line = |line: String| text.push_str(&(line + "\n"));
    if let Work::Drawn(case) = &item.work {
        let call = case.call();
        line(format!("Q {:?}, K {:?}, V {:?} as {}, {:?}", call.q, call.k, call.v, case.storage, call.order));
        line(format!(
            "scale {:?}, softcap {:?}, masks {:?}, biases {:?}",
            call.scale, call.softcap, call.masks, call.biases
        ));
        line(format!("sink {}, {:?}", call.sink, call.positions));
        line(format!(
            "Inputs: the seed {} of PCG64 (rand_pcg), as wgpu-attention-conformance draws them in `Call::data`.",
            call.seed
        ));
        if let Some(gpu) = device.gpu() {
            let (_, trace) = gpu.trace(|| case.run(device, item.method).map(|_| ()));
            for Traced { variant, workgroups, .. } in trace {
                line(format!("\n// {} in {} x {} workgroups", variant.name, workgroups[0], workgroups[1]));
                line(gpu.source(&variant).unwrap_or_else(|error| error.to_string()));
            }
        }
    }
    line("To run it again:".into());
    line("  git clone <this project> && cd wgpu-attention".into());
    line(format!("  cargo run --release -- check --repro '{}' --adapter {place}", result.id));
    line("In Rust, with the crate `wgpu-attention-conformance`:".into());
    line("  let gpu = wgpu_attention::Gpu::new()?;".into());
    if let Work::Drawn(case) = &item.work {
        line(format!("  let case: wgpu_attention_conformance::Case = \"{case}\".parse()?;"));
        line(format!("  let got = case.run(&gpu.into(), \"{}\".parse()?)?;", result.variant));
        line("  println!(\"{got:?}\\n{:?}\", case.truth());".into());
    }
    text
}
