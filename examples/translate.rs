//! Writes every kernel variant to a folder, in WGSL and in the languages that drivers accept, for the compilers that
//! `./portability` runs. With `--gpu` it writes the SPIR-V that wgpu passes to a GPU's driver, of the variants that a GPU
//! may be given, for `./gpu-compilers`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{env, fs, io, thread};

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use wgpu_attention::kernels::catalogue::{self, FlashAccess, FlashOptions, FlashTile, Kernel, Variant, variants};
use wgpu_attention::kernels::plan::{self, AttentionOperands, InspectOperands};
use wgpu_attention::kernels::{Access, Capabilities, GpuKind, Method, Tile};
use wgpu_attention::problem::{Layout, Positions, Problem};

#[path = "../tests/portability/translate.rs"]
mod translate;

fn kind(variant: &Variant) -> &'static str {
    if variant.uses_subgroups() { "subgroups" } else { "plain" }
}

fn path(folder: &Path, variant: &Variant, ending: &str) -> PathBuf {
    folder.join(format!("{}.{}.{ending}", variant.name.replace('/', "."), kind(variant)))
}

fn write_translations(folder: &Path, variant: &Variant) -> io::Result<()> {
    let source = variant.source().map_err(io::Error::other)?;
    fs::write(path(folder, variant, "wgsl"), &source)?;
    let (module, info) = translate::validate(&variant.name, &source);
    let texts = translate::translate(&module, &info, variant.uses_subgroups())
        .map_err(|error| io::Error::other(format!("{} {error}", variant.name)))?;
    // Metal's compiler runs only on Apple machines.
    for (ending, bytes) in texts.into_iter().filter(|(ending, _)| *ending != "metal") {
        fs::write(path(folder, variant, ending), bytes)?;
    }
    Ok(())
}

/// The kernels of plain calls on each kind of GPU, each with a label: those that most calls run.
fn defaults() -> wgpu_attention::Result<BTreeMap<(String, Variant), Vec<GpuKind>>> {
    let mut all: BTreeMap<(String, Variant), Vec<GpuKind>> = BTreeMap::new();
    for kind in GpuKind::ALL {
        let adapter = Capabilities { kind, ..Capabilities::webgpu_minimum() };
        let mut add = |what: &str, plan: plan::Plan| {
            for variant in plan.steps.into_iter().map(|step| step.variant) {
                let kernel = variant.kernel.name();
                let label = match variant.kernel {
                    Kernel::Flash | Kernel::FlashTiled | Kernel::Inspect => format!("{kernel} {what}"),
                    _ => kernel.to_string(),
                };
                let kinds = all.entry((label, variant)).or_default();
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
        };
        for (method, dim, len_q, len_k) in [
            (Method::Fused, 64, 256, 256),
            (Method::Fused, 128, 256, 256),
            (Method::Fused, 256, 256, 256),
            (Method::Fused, 512, 256, 256),
            // Few rows, whose keys are split.
            (Method::Fused, 64, 1, 4096),
            (Method::Fused, 128, 1, 4096),
            (Method::Fused, 256, 1, 4096),
            (Method::ThreePasses, 64, 256, 256),
        ] {
            let (q, k) = ([1, 8, len_q, dim], [1, 8, len_k, dim]);
            let problem = Problem::new(&q, &k, &k, None, None, &Positions::default(), 0)?;
            let [q, k] = [Layout::contiguous(&q)?, Layout::contiguous(&k)?];
            let operands = AttentionOperands {
                q: (&q).into(),
                k: (&k).into(),
                v: (&k).into(),
                output: (&q).into(),
                masks: vec![],
                biases: vec![],
                relative: None,
                rotary: None,
                sink: None,
                lse: false,
                weights: false,
                averaged: false,
                stage: None,
                method,
                tuned: None,
            };
            let few = if len_q == 1 { ", few rows" } else { "" };
            add(&format!("{dim}{few}"), plan::attention(&problem, &operands, &adapter)?);
            let lse = Layout::contiguous(&[1, 8, len_q])?;
            let inspections = [("weights", [true, false, false]), ("sums", [false, true, false])];
            for (what, [weights, column_sums, entropy]) in inspections.into_iter().filter(|_| dim == 64 && len_q > 1) {
                let operands = InspectOperands {
                    q: (&q).into(),
                    k: (&k).into(),
                    lse: &lse,
                    masks: vec![],
                    biases: vec![],
                    relative: None,
                    heads: &[0],
                    queries: 0..len_q,
                    weights,
                    column_sums,
                    entropy,
                };
                let mut plan = plan::inspect(&problem, &operands, &adapter)?;
                plan.steps.retain(|step| step.variant.kernel == Kernel::Inspect);
                add(what, plan);
            }
        }
        let [x, w, bias] =
            [Layout::contiguous(&[4, 256, 512])?, Layout::contiguous(&[512, 512])?, Layout::contiguous(&[512])?];
        add("", plan::project((&x).into(), (&w).into(), Some(&bias), &[], &adapter)?);
    }
    Ok(all)
}

/// Every tile in workgroup memory at every width.
fn tiles() -> impl Iterator<Item = Variant> {
    let wide = Access::WIDE;
    let access = FlashAccess { q: wide, k: wide, v: wide, o: wide };
    let widths = [16, 32, 64, 128];
    Tile::IN_MEMORY.into_iter().flat_map(move |tile| {
        widths.map(|width4| {
            catalogue::flash(FlashTile { tile, depth4: width4, cols4: width4 }, access, FlashOptions::default())
        })
    })
}

/// wgpu-hal's options for Vulkan 1.3 and a driver with `robustBufferAccess2`, which checks the bounds of buffers.
/// `checked`: whether indices of workgroup arrays are checked and loops bounded, as they are when they run.
fn write_spirv_for_gpus(folder: &Path, variant: &Variant, checked: bool) -> io::Result<()> {
    let options = spv::Options {
        force_loop_bounding: checked,
        lang_version: (1, 6),
        flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
        bounds_check_policies: BoundsCheckPolicies {
            index: if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked },
            buffer: BoundsCheckPolicy::Unchecked,
            image_load: BoundsCheckPolicy::Unchecked,
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        ..Default::default()
    };
    let (module, info) = translate::validate(&variant.name, &variant.source().map_err(io::Error::other)?);
    let words = spv::write_vec(&module, &info, &options, None)
        .map_err(|error| io::Error::other(format!("{}: {error}", variant.name)))?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mark = if checked { "" } else { ".unchecked" };
    fs::write(folder.join(format!("{}{mark}.spv", variant.name.replace('/', "."))), bytes)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (for_gpus, folder) = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--gpu", folder] => (true, PathBuf::from(folder)),
        [folder] => (false, PathBuf::from(folder)),
        _ => return Err("usage: translate [--gpu] FOLDER".into()),
    };
    let folder = folder.as_path();
    fs::create_dir_all(folder)?;
    if for_gpus {
        let mut all: BTreeSet<Variant> =
            variants().into_iter().filter(|one| GpuKind::ALL.iter().any(|&kind| one.is_given_to(kind))).collect();
        let defaults = defaults()?;
        let joined = |kinds: &[GpuKind]| kinds.iter().map(|kind| kind.to_string()).collect::<Vec<_>>().join(",");
        let lines: String = (defaults.iter())
            .map(|((label, variant), kinds)| format!("{label}\t{}\t{}\n", variant.name, joined(kinds)))
            .collect();
        fs::write(folder.join("defaults.tsv"), lines)?;
        for (_, variant) in defaults.into_keys() {
            write_spirv_for_gpus(folder, &variant, false)?;
            all.insert(variant);
        }
        all.extend(tiles());
        let kinds =
            |variant: &Variant| GpuKind::ALL.into_iter().filter(|&kind| variant.is_given_to(kind)).collect::<Vec<_>>();
        let lines: String = all.iter().map(|one| format!("{}\t{}\n", one.name, joined(&kinds(one)))).collect();
        fs::write(folder.join("given.tsv"), lines)?;
        for variant in all {
            write_spirv_for_gpus(folder, &variant, true)?;
        }
        return Ok(());
    }
    for kernel in Kernel::ALL {
        fs::write(folder.join(format!("{}.file.wgsl", kernel.name())), kernel.source().map_err(io::Error::other)?)?;
    }
    let all: BTreeSet<Variant> = variants().into_iter().collect();
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|first| {
                let all = &all;
                scope.spawn(move || {
                    all.iter().skip(first).step_by(threads).try_for_each(|v| write_translations(folder, v))
                })
            })
            .collect();
        parts.into_iter().try_for_each(|part| part.join().expect("a panic has been reported"))
    })?;
    Ok(())
}
