//! `attn tune`: finds the fastest kernels on this machine and keeps them for later calls.

use clap::Args;
use wgpu_attention::{Align, Attention, Method, Tuned};

use crate::bench::digits;
use crate::bench::measure::{check_memory, operands};
use crate::bench::shape::Shape;
use crate::error::{Result, usage};
use crate::progress::Spinner;
use crate::table::{align_right, table};
use crate::target::{self, Target};

#[derive(Args, Debug)]
#[command(after_help = "\
Shapes are those of attn bench: b,hq,hkv,sq,skv,d, optionally with :causal, or a name; all f32. A result applies to all \
calls with the same tuning key: query rows per key/value head and keys, both rounded up to a power of two, head width, \
and causal or not. The batch does not matter. A known key is not timed again.

Each candidate must first agree with float64 on a small random call. The default stays unless another candidate \
takes 3 % less time. Results before and after tuning may differ in their last bits.

Results are kept in tuning.json, in the folder that WGPU_ATTENTION_CACHE names (if it is empty, nothing is kept), else \
in wgpu-attention in the user's cache folder.

Examples:
  attn tune
  attn tune --adapter vulkan --shape 1,32,8,1,4096,128 --dry-run
  attn tune --clear")]
pub struct TuneArgs {
    /// A named shape or b,hq,hkv,sq,skv,d, then :causal; may be repeated [default: all named ones]
    #[arg(long = "shape", value_name = "SHAPE", value_parser = parse_shape)]
    shapes: Vec<Shape>,
    /// Time known keys again, and keep nothing
    #[arg(long)]
    dry_run: bool,
    /// Delete the kept results of the adapter
    #[arg(long, conflicts_with_all = ["shapes", "dry_run"])]
    clear: bool,
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let shape = Shape::parse(text)?;
    if shape.calls > 1 { Err("xN is for attn bench: tuning times single calls".into()) } else { Ok(shape) }
}

/// Whether every shape could be tuned.
pub fn tune(args: &TuneArgs, adapter: Option<&str>) -> Result<bool> {
    let mut shapes = args.shapes.clone();
    if shapes.is_empty() {
        shapes = Shape::named().into_iter().filter(|shape| shape.calls == 1).collect();
    }
    let targets = target::targets(adapter)?;
    let several = targets.len() > 1;
    let mut complete = true;
    for target in &targets {
        target.announce();
        let Some(gpu) = target.device.gpu() else {
            if several {
                continue;
            }
            usage!("the CPU backend has one method only: there is nothing to tune");
        };
        if args.clear {
            gpu.clear_tuning()?;
            anstream::println!("{}: results deleted", target.label());
            continue;
        }
        let results: Vec<_> = shapes.iter().map(|shape| (shape, tune_shape(shape, target, args.dry_run))).collect();
        complete &= results.iter().all(|(_, tuned)| tuned.is_ok());
        print(target, &results);
        match gpu.tuning_file() {
            _ if args.dry_run => anstream::println!("dry run: nothing is kept\n"),
            None => anstream::println!("nothing is kept: WGPU_ATTENTION_CACHE is empty, or there is no cache folder\n"),
            Some(file) if results.iter().flat_map(|(_, tuned)| tuned).all(|tuned| tuned.file.is_some()) => {
                anstream::println!("kept in {}\n", file.display());
            }
            Some(file) => {
                anstream::eprintln!("attn: {} cannot be written\n", file.display());
                complete = false;
            }
        }
    }
    Ok(complete)
}

fn tune_shape(shape: &Shape, target: &Target, dry_run: bool) -> Result<Tuned> {
    let device = &target.device;
    let _spinner = Spinner::start(format!("{} on {}", shape.name, device.name()));
    check_memory(shape, device, false)?;
    let [q, k, v] = operands(shape, device)?;
    let mut attention = Attention::new();
    if shape.causal {
        attention = attention.causal(Align::BottomRight);
    }
    Ok(if dry_run { attention.time_candidates(&q, &k, &v)? } else { attention.tune(&q, &k, &v)? })
}

fn print(target: &Target, results: &[(&Shape, Result<Tuned>)]) {
    anstream::println!("{}", target.label());
    let mut table = table();
    table.set_header(["shape", "candidate", "best ms", "of the default", "result"]);
    for (shape, tuned) in results {
        match tuned {
            Err(error) => {
                table.add_row([&shape.name, "–", "–", "–", &format!("cannot be tuned: {error}")]);
            }
            Ok(tuned) if tuned.candidates.is_empty() => {
                table.add_row([&shape.name, &name(tuned.winner), "–", "–", "known already"]);
            }
            Ok(tuned) => rows(shape, tuned).into_iter().for_each(|row| _ = table.add_row(row)),
        }
    }
    align_right(&mut table, 2..4);
    anstream::println!("{table}");
}

fn name(method: Method) -> String {
    match method {
        Method::Auto => "the default".into(),
        method => method.to_string(),
    }
}

fn rows(shape: &Shape, tuned: &Tuned) -> Vec<[String; 5]> {
    let default = tuned.candidates[0].time.as_ref().ok();
    let row = |(n, candidate): (usize, &wgpu_attention::Candidate)| {
        let wins = candidate.method == tuned.winner || n == 0 && tuned.winner == Method::Auto;
        let dash = || "–".to_string();
        let (time, share, result) = match &candidate.time {
            Ok(time) => {
                let share =
                    default.map(|default| format!("{:.0} %", 100.0 * time.as_secs_f64() / default.as_secs_f64()));
                let result = if wins { "wins" } else { "" };
                (digits(time.as_secs_f64() * 1e3), share.unwrap_or_else(dash), result.into())
            }
            Err(reason) => (dash(), dash(), reason.clone()),
        };
        let default = if n == 0 { ", the default" } else { "" };
        let shape = if n == 0 { shape.name.clone() } else { String::new() };
        [shape, format!("{}{default}", candidate.method), time, share, result]
    };
    tuned.candidates.iter().enumerate().map(row).collect()
}
