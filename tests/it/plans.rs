//! Plans calls of every kind for made-up adapters: every kernel of a plan is validated by naga with the adapter's
//! capabilities, and compared with the bindings of its step.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, LazyLock, Mutex};

use naga::valid::{Capabilities as NagaCapabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::kernels::access::is_wide;
use wgpu_attention::kernels::catalogue::RelativeKind;
use wgpu_attention::kernels::plan::{self, AttentionOperands, InspectOperands, Pairs, RelativeOperand, RotaryOperand};
use wgpu_attention::kernels::{
    AdapterClass, Binding, Capabilities, GpuKind, Method, Operand, Plan, Step, Tile, Variant, gpu_kind,
};
use wgpu_attention::problem::{Align, Band, Layout, MaskMeaning, Place, Positions, Problem, Rows, Sequence};
use wgpu_attention::{Dtype, Error, Result, ScoreStage};

/// What naga finds in a kernel's text.
struct Read {
    /// Storage buffers by their names in a step, and whether they are written.
    buffers: BTreeMap<String, bool>,
    /// The size of the uniform block (binding 0) in bytes.
    params: usize,
    workgroup_memory: u32,
    workgroup_size: [u32; 3],
}

/// The name that a step and a kernel's text use for a buffer.
fn called(binding: &Binding) -> String {
    binding.name.to_string()
}

fn read(variant: &Variant, subgroups: bool) -> Read {
    let (name, source) = (&variant.name, variant.source().unwrap());
    let module =
        naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    // WebGPU's core capabilities, and subgroups if the adapter has them.
    let mut offered = NagaCapabilities::SHADER_FLOAT16_IN_FLOAT32;
    offered.set(NagaCapabilities::SUBGROUP, subgroups);
    Validator::new(ValidationFlags::all(), offered)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let (mut buffers, mut numbers, mut params, mut workgroup_memory) = (BTreeMap::new(), BTreeSet::new(), 0, 0);
    for (_, variable) in module.global_variables.iter() {
        let at = variable.binding.as_ref().map(|at| (at.group, at.binding));
        match (variable.space, at) {
            (AddressSpace::Storage { access }, Some((0, binding))) => {
                assert!(numbers.insert(binding), "{name}: two buffers at {binding}");
                buffers.insert(variable.name.clone().unwrap(), access.contains(StorageAccess::STORE));
            }
            (AddressSpace::Uniform, Some((0, 0))) => params = layouter[variable.ty].size as usize,
            (AddressSpace::WorkGroup, None) => workgroup_memory += layouter[variable.ty].size,
            (AddressSpace::Private, None) => {}
            other => panic!("{name} declares {other:?}"),
        }
    }
    assert_eq!(module.entry_points.len(), 1, "{name}");
    Read { buffers, params, workgroup_memory, workgroup_size: module.entry_points[0].workgroup_size }
}

/// Each text is parsed once, without subgroups unless its variant needs them; each step is checked for that.
fn known(variant: &Variant) -> Arc<Read> {
    static KNOWN: LazyLock<Mutex<HashMap<Variant, Arc<Read>>>> = LazyLock::new(Default::default);
    if let Some(read) = KNOWN.lock().unwrap().get(variant) {
        return read.clone();
    }
    let read = Arc::new(read(variant, variant.uses_subgroups()));
    KNOWN.lock().unwrap().insert(variant.clone(), read.clone());
    read
}

/// What must hold for every step on every adapter.
fn check_step(step: &Step, adapter: &Capabilities) {
    let name = format!("{} on {}", step.variant.name, adapter.adapter);
    assert!(step.workgroups.iter().all(|&n| n >= 1 && n <= adapter.max_workgroups), "{name}: {:?}", step.workgroups);
    let most = adapter.max_storage_buffers as usize;
    assert!(step.bindings.len() <= most, "{name}: {} buffers", step.bindings.len());
    assert!(step.variant.workgroup_memory() <= adapter.workgroup_memory, "{name}");
    assert!(step.variant.workgroup_size() <= adapter.max_invocations, "{name}");
    if let Some(most) = adapter.max_operations {
        assert!(step.cost.operations <= most, "{name}: {:e} operations in one dispatch", step.cost.operations);
    }
    let turns = step.cost.turns;
    assert!(adapter.max_loop_turns.is_none_or(|most| turns <= u64::from(most)), "{name}: {turns} turns");
    assert!(adapter.subgroup_min.is_some() || !step.variant.uses_subgroups(), "{name} needs subgroups");
    for binding in &step.bindings {
        assert!(binding.size > 0 && binding.size <= adapter.max_binding, "{name}: {binding:?}");
        assert_eq!(binding.offset % adapter.offset_alignment, 0, "{name}: {binding:?}");
        assert_eq!(binding.size % 4, 0, "{name}: {binding:?}");
    }
    let share = step.variant.changes.consts.get("SHARE").map_or("1u", String::as_str);
    let share: u32 = share.trim_end_matches('u').parse().unwrap();
    assert!(share == 1 || share <= adapter.subgroup_min.unwrap(), "{name} shares among more lanes than there are");

    let read = known(&step.variant);
    let bound: BTreeMap<String, bool> = step
        .bindings
        .iter()
        .map(|binding| (called(binding), read.buffers.get(&called(binding)) == Some(&true)))
        .collect();
    assert_eq!(bound.len(), step.bindings.len(), "{name} binds a buffer twice: {:?}", step.bindings);
    assert_eq!(bound, read.buffers, "{name}: what is bound and what is declared");
    assert_eq!(step.params.len().next_multiple_of(16), read.params.next_multiple_of(16), "{name}: the uniform block");
    assert_eq!(step.variant.workgroup_memory(), read.workgroup_memory, "{name}: workgroup memory");
    assert_eq!([step.variant.workgroup_size(), 1, 1], read.workgroup_size, "{name}: the workgroup");
    // WebGPU rejects a dispatch that reads a buffer which it also writes.
    for one in step.bindings.iter().filter(|one| bound[&called(one)]) {
        let others = step.bindings.iter().filter(|other| other.slot == one.slot).count();
        assert_eq!(others, 1, "{name} writes {:?} and binds it elsewhere", one.slot);
    }
}

/// What must hold for every plan on every adapter.
pub fn check(plan: &Plan, adapter: &Capabilities) {
    assert!(!plan.steps.is_empty());
    plan.steps.iter().for_each(|step| check_step(step, adapter));
    assert!(plan.scratch.iter().all(|&bytes| bytes <= adapter.max_buffer), "{:?}", plan.scratch);
}

/// The limits of real GPUs, as wgpu finds them.
fn real_gpus() -> Vec<Capabilities> {
    let lines = include_str!("../gpu/limits.tsv").lines().skip(1);
    let one = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |n: usize| fields[n].parse::<u64>().unwrap();
        Capabilities {
            adapter: fields[0].into(),
            kind: fields[1].parse().unwrap(),
            subgroup_min: fields[2].parse().ok(),
            max_binding: number(3),
            max_buffer: number(4),
            max_storage_buffers: number(5) as u32,
            max_workgroups: number(6) as u32,
            max_invocations: number(7) as u32,
            workgroup_memory: number(8) as u32,
            offset_alignment: number(9).max(16),
            ..Capabilities::webgpu_minimum()
        }
    };
    lines.map(one).collect()
}

/// Both adapter classes, no subgroups and several subgroup sizes, 4 to 16 storage buffers, and each limit made small.
fn adapters() -> Vec<Capabilities> {
    let mut all = Vec::new();
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        for subgroup_min in [None, Some(4), Some(8), Some(32)] {
            let base = Capabilities { class, subgroup_min, ..Capabilities::webgpu_minimum() };
            let named = |limit: &str, change: &dyn Fn(&mut Capabilities)| {
                let mut one = Capabilities { adapter: format!("{class:?}, {subgroup_min:?}, {limit}"), ..base.clone() };
                change(&mut one);
                one
            };
            all.extend(
                [4, 5, 6, 7, 8, 10, 16].map(|n| named(&format!("{n} buffers"), &|one| one.max_storage_buffers = n)),
            );
            all.push(named("small bindings", &|one| one.max_binding = 256 << 10));
            all.push(named("small bindings, five buffers", &|one| {
                (one.max_binding, one.max_storage_buffers) = (256 << 10, 5);
            }));
            all.push(named("64 invocations", &|one| one.max_invocations = 64));
            all.push(named("loops of 2,000 iterations", &|one| one.max_loop_turns = Some(2000)));
            all.push(named("loops of 65,535 iterations, four buffers", &|one| {
                (one.max_loop_turns, one.max_storage_buffers) = (Some(65_535), 4);
            }));
            all.push(named("few workgroups and operations", &|one| {
                (one.max_workgroups, one.max_operations) = (300, Some(1e9));
            }));
        }
    }
    // Every kind of GPU with every subgroup size and little to much workgroup memory.
    for kind in GpuKind::ALL {
        for (n, subgroup) in [4, 8, 16, 32, 64, 128].into_iter().enumerate() {
            let workgroup_memory = [16, 32, 48, 64][n % 4] << 10;
            let adapter = format!("{kind}, subgroups of {subgroup}, {workgroup_memory} bytes of workgroup memory");
            let subgroup_min = Some(subgroup);
            all.push(Capabilities { adapter, kind, subgroup_min, workgroup_memory, ..Capabilities::webgpu_minimum() });
        }
    }
    all.extend(real_gpus());
    all
}

fn pick<T: Copy>(rng: &mut Pcg64, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

const STORED: [Dtype; 4] = [Dtype::F32, Dtype::F32, Dtype::F16, Dtype::BF16];

/// `[b, h, i, d]` in one of three layouts, some of which no kernel can read in fours.
fn placed(rng: &mut Pcg64, [b, h, i, d]: [usize; 4]) -> Layout {
    let (shape, back) = match rng.random_range(0..4) {
        0 => ([b, i, h, d], [0, 2, 1, 3]),
        1 => ([b, h, d, i], [0, 1, 3, 2]),
        _ => ([b, h, i, d], [0, 1, 2, 3]),
    };
    Layout::contiguous(&shape).unwrap().permute(&back).unwrap()
}

/// A shape that broadcasts to `[b, h, i, j]`.
fn spread(rng: &mut Pcg64, full: [usize; 4]) -> Layout {
    let shape = full.map(|n| if rng.random_bool(0.4) { 1 } else { n });
    Layout::contiguous(&shape).unwrap().broadcast_to(&full).unwrap()
}

/// A random attention call with every kind of rule that kernels support; few three-pass calls are large.
struct Drawn {
    problem: Problem,
    q: Layout,
    k: Layout,
    v: Layout,
    output: Layout,
    stored: [Dtype; 3],
    masks: Vec<(Layout, MaskMeaning)>,
    biases: Vec<Layout>,
    relative: Option<(Layout, RelativeKind, [i32; 2])>,
    rotary: Option<(Layout, usize, bool, [Rows; 2])>,
    sink: Option<Layout>,
}

impl Drawn {
    fn new(rng: &mut Pcg64) -> Drawn {
        let [batch, heads_kv, group] = [pick(rng, &[1, 2, 3]), pick(rng, &[1, 2, 3]), pick(rng, &[1, 2, 4])];
        let (len_q, len_k) = (pick(rng, &[1, 2, 9, 33, 70, 200]), pick(rng, &[1, 5, 40, 130, 700, 1500]));
        // Few widths, none of them large, because each produces its own unrolled texts.
        let (dim_k, dim_v) = pick(rng, &[(5, 7), (8, 8), (8, 8), (20, 16), (64, 64)]);
        let heads = heads_kv * group;
        let (q, k) = ([batch, heads, len_q, dim_k], [batch, heads_kv, len_k, dim_k]);
        let v = [batch, heads_kv, len_k, dim_v];
        let extra = if rng.random_bool(0.1) { len_k.min(2) } else { 0 };
        let ruled = len_k - extra;
        let per_batch = rng.random_bool(0.4);
        let align = if per_batch {
            Align::PerBatch((0..batch).map(|_| rng.random_range(0..=len_k as i64)).collect())
        } else {
            Align::Offset(pick(rng, &[0, 3]))
        };
        let positions = Positions {
            align,
            causal: rng.random_bool(0.5),
            window_left: rng.random_bool(0.2).then_some(5),
            window_right: rng.random_bool(0.1).then_some(2),
            key_lengths: rng.random_bool(0.2).then(|| (0..batch).map(|_| rng.random_range(0..=ruled)).collect()),
        };
        let softcap = rng.random_bool(0.3).then_some(3.0);
        let problem = Problem::new(&q, &k, &v, None, softcap, &positions, extra).unwrap();
        let full = problem.mask_shape();
        let (masks, biases) = (pick(rng, &[0, 0, 1, 2, 3]), pick(rng, &[0, 0, 1, 2]));
        let masks =
            (0..masks).map(|_| (spread(rng, full), pick(rng, &[MaskMeaning::Keep, MaskMeaning::Hide]))).collect();
        let biases = (0..biases).map(|_| spread(rng, full)).collect();
        let relative = rng.random_bool(0.4).then(|| {
            let table = |shape: [usize; 4]| {
                Layout::contiguous(&shape).unwrap().broadcast_to(&[batch, heads, len_q, shape[3]]).unwrap()
            };
            match rng.random_range(0..3) {
                0 => (table([1, heads, 1, 1]), RelativeKind::Slope, [0, 0]),
                1 => (table([batch, heads, len_q, 9]), RelativeKind::Table, [-5, 3]),
                _ => (table([1, heads, 1, (20 + 4) * 4]), RelativeKind::Fours, [-20, 0]),
            }
        });
        let rotary = (dim_k >= 8 && rng.random_bool(0.3)).then(|| {
            let (pairs, interleaved) = (pick(rng, &[dim_k / 8 * 4, 4]), rng.random_bool(0.5));
            let listed = |len: usize| Rows::Each { rows: (0..(batch * len) as u32).collect(), per_batch: true };
            let rows = if rng.random_bool(0.3) { [listed(len_q), listed(len_k)] } else { [3, 0].map(Rows::From) };
            let positions = (len_q + 2 * len_k).max(batch * len_q).max(batch * len_k);
            (Layout::contiguous(&[positions, 2 * pairs]).unwrap(), pairs, interleaved, rows)
        });
        let sink = rng.random_bool(0.3).then(|| Layout::contiguous(&[heads]).unwrap());
        let [q, k, v, output] = [q, k, v, [batch, heads, len_q, dim_v]].map(|shape| placed(rng, shape));
        let stored = [0, 1, 2].map(|_| pick(rng, &STORED));
        Drawn { problem, q, k, v, output, stored, masks, biases, relative, rotary, sink }
    }

    fn relative(&self) -> Option<RelativeOperand<'_>> {
        self.relative.as_ref().map(|&(ref layout, kind, [low, high])| RelativeOperand {
            layout,
            kind,
            low,
            high,
            factor: 0.5,
        })
    }

    fn masks(&self) -> Vec<(&Layout, MaskMeaning)> {
        self.masks.iter().map(|(layout, meaning)| (layout, *meaning)).collect()
    }

    fn attention(&self, rng: &mut Pcg64, method: Method) -> AttentionOperands<'_> {
        let operand = |layout, stored| Operand { layout, stored };
        let is_fused = matches!(method, Method::Fused | Method::Tile(_));
        // Fused kernels return only output and LSE.
        let mut asked = |chance| !is_fused && rng.random_bool(chance);
        let (weights, averaged, staged) = (asked(0.3), asked(0.2), asked(0.3));
        let stages = [ScoreStage::Scaled, ScoreStage::Capped, ScoreStage::Masked];
        AttentionOperands {
            q: operand(&self.q, self.stored[0]),
            k: operand(&self.k, self.stored[1]),
            v: operand(&self.v, self.stored[2]),
            // Halves are stored in fours.
            output: operand(&self.output, if is_wide(&self.output) { self.stored[0] } else { Dtype::F32 }),
            masks: self.masks(),
            biases: self.biases.iter().collect(),
            relative: self.relative(),
            // Rotated while they are read if possible, else beforehand.
            rotary: self.rotary.as_ref().map(|&(ref table, pairs, interleaved, [ref queries, ref keys])| {
                RotaryOperand { table, rotations: table, rows: [queries, keys], pairs, interleaved }
            }),
            sink: self.sink.as_ref(),
            lse: rng.random_bool(0.5),
            weights,
            averaged,
            stage: staged.then(|| pick(rng, &stages)),
            method,
            tuned: rng.random_bool(0.2).then_some(Method::ThreePasses),
        }
    }
}

/// Counts of plans and refusals over all adapters, and their kernels.
#[derive(Default)]
struct Tally {
    planned: usize,
    refused: usize,
    /// Adapters on which a kernel is planned.
    kernels: BTreeMap<&'static str, usize>,
    texts: std::collections::BTreeSet<String>,
}

impl Tally {
    /// Records a valid plan, or a refusal because of a limit.
    fn add(&mut self, what: &str, plan: Result<Plan>, adapter: &Capabilities) {
        match plan {
            Ok(plan) => {
                check(&plan, adapter);
                self.planned += 1;
                for step in plan.steps {
                    *self.kernels.entry(step.variant.kernel.name()).or_default() += 1;
                    self.texts.insert(step.variant.name);
                }
            }
            Err(Error::Unsupported { .. } | Error::TooLarge { .. } | Error::Method { .. }) => self.refused += 1,
            Err(error) => panic!("{what} on {}: {error:?}", adapter.adapter),
        }
    }
}

/// Calls per adapter of each kind.
const CALLS: u64 = 8;

/// What a kind of GPU runs by default spills nothing there, by the record of its compiler; width 512 on Apple and Intel
/// excepted, where every tile does.
#[test]
fn default_tiles_spill_no_registers() {
    let of_gpu = |name: &str| match name {
        "polaris10" | "navi21" | "navi31" | "gfx1201" => GpuKind::Amd,
        "turing" | "ampere" => GpuKind::Nvidia,
        "adreno740" => GpuKind::Qualcomm,
        "m1" => GpuKind::Apple,
        "tgl" | "dg2" | "bmg" => GpuKind::Intel,
        other => panic!("whose is {other}?"),
    };
    let mut seen = 0;
    for line in include_str!("../gpu/table.tsv").lines().skip(2) {
        let fields: Vec<&str> = line.split('\t').collect();
        let (kind, name, result, spills) = (of_gpu(fields[0]), fields[1], fields[3], fields[6]);
        let Some(rest) = name.strip_prefix("flash_tiled/") else { continue };
        // `rows4x128/across8/keys32/dims64x64/wide`
        let Some((tile, rest)) = rest.split_once("/keys") else { continue };
        let Some(width) = rest.split_once("/dims").and_then(|(_, rest)| rest.strip_suffix("/wide")) else { continue };
        let Some((dim_k, dim_v)) = width.split_once('x') else { continue };
        let (Ok(dim_k), Ok(dim_v)) = (dim_k.parse::<usize>(), dim_v.parse::<usize>()) else { continue };
        let tile: Tile = tile.parse().unwrap();
        let may_spill = dim_k == 512 && matches!(kind, GpuKind::Apple | GpuKind::Intel);
        if dim_k == dim_v && gpu_kind::takes(kind, tile, dim_v) {
            assert_eq!((result, spills == "0" || may_spill), ("ok", true), "{line}");
            seen += 1;
        }
    }
    assert!(seen > 60, "{seen} rows of the table concern the tiles of a kind");
}

/// Predictions are not above what the newest GPU of a kind reads off its listing, and not far below.
#[test]
fn predictions_follow_the_record() {
    let mut seen = 0;
    for line in include_str!("../gpu/table.tsv").lines().skip(2) {
        let fields: Vec<&str> = line.split('\t').collect();
        let kind = match fields[0] {
            "navi31" => GpuKind::Amd,
            "ampere" => GpuKind::Nvidia,
            "tgl" => GpuKind::Intel,
            _ => continue,
        };
        let (name, share) = (fields[1], fields[13]);
        let Some(predicted) = gpu_kind::predicted_share(kind, name).filter(|_| name.ends_with("/wide")) else {
            continue;
        };
        let share: f64 = share.parse().unwrap_or_else(|_| panic!("no share: {line}"));
        assert!(predicted <= share + 0.006 && predicted >= share - 0.04, "{predicted}: {line}");
        seen += 1;
    }
    assert_eq!(seen, 6);
}

#[test]
fn plans_are_valid_on_their_adapters() {
    let mut tally = Tally::default();
    // Planned and refused calls: those that may use any method, and those that must run fused.
    let mut attention = [[0; 2]; 2];
    for (a, adapter) in adapters().iter().enumerate() {
        let methods: Vec<Method> = [Method::Auto, Method::Auto].into_iter().chain(Method::every(adapter)).collect();
        for n in 0..CALLS {
            let rng = &mut Pcg64::seed_from_u64(a as u64 * 1000 + n);
            let drawn = Drawn::new(rng);
            let operands = drawn.attention(rng, methods[n as usize % methods.len()]);
            let planned = plan::attention(&drawn.problem, &operands, adapter);
            let is_fused = matches!(operands.method, Method::Fused | Method::Tile(_));
            attention[usize::from(is_fused)][usize::from(planned.is_err())] += 1;
            tally.add("attention", planned, adapter);
        }
        for n in 0..CALLS / 4 {
            let rng = &mut Pcg64::seed_from_u64(a as u64 * 1000 + 500 + n);
            inspected(rng, adapter, &mut tally);
            packed(rng, adapter, &mut tally);
            others(rng, adapter, &mut tally);
        }
    }
    let Tally { planned, refused, kernels, texts } = &tally;
    println!("{planned} plans of {} kernels, {refused} refused; attention {attention:?}; {kernels:?}", texts.len());
    for kernel in [
        "scores",
        "softmax",
        "weighted_sum",
        "flash",
        "flash_tiled",
        "merge",
        "inspect",
        "project",
        "matvec",
        "mean_heads",
        "combine_biases",
        "copy",
        "scatter",
        "block_mask",
        "rotate",
        "tokens",
        "relative",
        "normalise",
    ] {
        assert!(kernels.contains_key(kernel), "no plan has {kernel}: {kernels:?}");
    }
    // Refusals prove nothing, so most calls must be planned.
    assert!(attention.iter().all(|[planned, refused]| planned > refused), "{attention:?} calls planned and refused");
    assert!(*refused < planned / 4, "{refused} refused, {planned} planned");
    assert!(texts.len() > 500, "{} kernels", texts.len());
}

fn inspected(rng: &mut Pcg64, adapter: &Capabilities, tally: &mut Tally) {
    let drawn = Drawn::new(rng);
    let Problem { batch, heads_q, len_q, .. } = drawn.problem;
    let lse = Layout::contiguous(&[batch, heads_q, len_q]).unwrap();
    let heads: Vec<usize> = (0..heads_q).rev().step_by(pick(rng, &[1, 2])).collect();
    let [weights, column_sums] = [rng.random_bool(0.6), rng.random_bool(0.6)];
    let operands = InspectOperands {
        q: Operand { layout: &drawn.q, stored: drawn.stored[0] },
        k: Operand { layout: &drawn.k, stored: drawn.stored[1] },
        lse: &lse,
        masks: drawn.masks(),
        biases: drawn.biases.iter().collect(),
        relative: drawn.relative(),
        heads: &heads,
        queries: len_q / 3..len_q,
        weights,
        column_sums,
        entropy: !(weights || column_sums) || rng.random_bool(0.6),
    };
    tally.add("inspect", plan::inspect(&drawn.problem, &operands, adapter), adapter);
}

fn packed(rng: &mut Pcg64, adapter: &Capabilities, tally: &mut Tally) {
    let mut drawn = Drawn::new(rng);
    let (heads, heads_kv, dim_k, dim_v) =
        (drawn.problem.heads_q, drawn.problem.heads_kv, drawn.q.shape()[3], drawn.v.shape()[3]);
    let mut sequences = Vec::new();
    let (mut first_query, mut first_key) = (0, 0);
    for _ in 0..pick(rng, &[1, 3, 7]) {
        let (len_q, len_k) = (pick(rng, &[0, 1, 9, 70]), pick(rng, &[1, 40, 300]));
        let band = Band { keys: len_k as i32, lo: -1_000_000, hi: len_k as i32 - len_q as i32, offset: 0 };
        sequences.push(Sequence { first_query, len_q, first_key, len_k, band });
        (first_query, first_key) = (first_query + len_q, first_key + len_k);
    }
    if first_query == 0 {
        return;
    }
    let rows = |rows: usize, heads: usize, dim: usize| {
        Layout::contiguous(&[1, rows, heads, dim]).unwrap().permute(&[0, 2, 1, 3]).unwrap()
    };
    drawn.q = rows(first_query, heads, dim_k);
    drawn.k = rows(first_key, heads_kv, dim_k);
    drawn.v = rows(first_key, heads_kv, dim_v);
    drawn.output = rows(first_query, heads, dim_v);
    let softcap = drawn.problem.softcap;
    let shapes = [drawn.q.shape(), drawn.k.shape(), drawn.v.shape()];
    let problem = Problem::new(shapes[0], shapes[1], shapes[2], None, softcap, &Positions::default(), 0).unwrap();
    drawn.masks.clear();
    drawn.biases.clear();
    (drawn.relative, drawn.rotary) = (None, None);
    let operands = AttentionOperands { lse: rng.random_bool(0.5), ..drawn.attention(rng, Method::Fused) };
    let operands = AttentionOperands { method: Method::Auto, ..operands };
    tally.add("packed sequences", plan::packed(&problem, &operands, &sequences, adapter), adapter);
}

/// Everything except attention: projections, norms, gates, caches, positions, merges and softmax.
fn others(rng: &mut Pcg64, adapter: &Capabilities, tally: &mut Tally) {
    let layout = |shape: &[usize]| Layout::contiguous(shape).unwrap();
    let (batch, heads, len) = (pick(rng, &[1, 3]), pick(rng, &[1, 4]), pick(rng, &[1, 3, 30, 200]));
    let (dim, dim_out) = (pick(rng, &[1, 7, 64, 130, 600]), pick(rng, &[1, 9, 64, 300]));
    let stored = pick(rng, &STORED);
    let (x3, w, row) = (layout(&[batch, len, dim]), layout(&[dim_out, dim]), layout(&[dim_out]));
    let x = Operand { layout: &x3, stored };
    let bias = rng.random_bool(0.5).then_some(&row);
    let rows = [Some(&row), None];
    let extra = &rows[pick(rng, &[0, 1, 2])..];
    let weight = Operand { layout: &w, stored: pick(rng, &STORED) };
    tally.add("a projection", plan::project(x, weight, bias, extra, adapter), adapter);

    let x4_layout = placed(rng, [batch, heads, len, dim]);
    let x4 = Operand { layout: &x4_layout, stored };
    let vector = layout(&[dim]);
    let [centred, shifted] = [rng.random_bool(0.5), rng.random_bool(0.5)];
    let norm = plan::normalise(x4, &vector, shifted.then_some(&vector), centred, 1e-5, adapter);
    tally.add("a norm", norm, adapter);
    tally.add("a gate", plan::gate(x, Operand { layout: &x3, stored: pick(rng, &STORED) }, adapter), adapter);
    tally.add("a softmax", plan::softmax(x4, adapter), adapter);
    tally.add("a tensor widened", plan::widen(x4, adapter), adapter);

    // Rows of whole vec4s, as a cache holds them.
    let rows = len + pick(rng, &[0, 5]);
    let cache = layout(&[batch, heads, rows, dim.next_multiple_of(4)]);
    let places: Vec<Place> = (0..batch).map(|b| Place { from: 0, to: b % rows, count: len }).collect();
    let y = Operand { layout: &cache, stored: pick(rng, &STORED) };
    tally.add("a scatter", plan::scatter(x4, y, &places, adapter), adapter);

    let listed = |rng: &mut Pcg64, per_batch: bool| match rng.random_bool(0.5) {
        true => Rows::From(3),
        false => {
            let count = if per_batch { batch * len } else { len };
            Rows::Each { rows: (0..count as u32).map(|row| row % 7).collect(), per_batch }
        }
    };
    let per_batch = batch > 1 && rng.random_bool(0.5);
    let (which, table) = (listed(rng, per_batch), layout(&[len + 10, dim]));
    let table = Operand { layout: &table, stored: pick(rng, &STORED) };
    tally.add("positions added", plan::add_positions(x, table, &which, adapter), adapter);
    if dim >= 2 {
        let (count, interleaved, back) = (pick(rng, &[1, dim / 2]), rng.random_bool(0.5), rng.random_bool(0.5));
        let pairs = Pairs { count, interleaved, back };
        let table = layout(&[len + 10, 2 * count.next_multiple_of(4)]);
        let y = layout(&[batch, heads, len, dim]);
        let which = listed(rng, per_batch);
        let rotated = plan::rotate(x4, &y, &table, pairs, &which, adapter);
        tally.add("rows rotated", rotated, adapter);
    }
    let len_k = pick(rng, &[1, 40, 300]);
    let columns: Vec<u32> = (0..len as u32 + len_k as u32 - 1).map(|at| at % 8).collect();
    let table = layout(&[batch, heads, len, 8]);
    tally.add("a bias by distance", plan::relative(&table, &columns, len_k, 1.0, adapter), adapter);

    let (y, lse) = (placed(rng, [batch, heads, len, dim]), layout(&[batch, heads, len]));
    tally.add("a merge", plan::merge([&x4_layout, &y], [&lse, &lse], &y, adapter), adapter);
    // A probe must run long enough to be measured.
    let free = Capabilities { max_operations: None, ..adapter.clone() };
    tally.add("a probe", plan::probe(100, &free).map(|(plan, ..)| plan), &free);
}

#[test]
fn a_wrong_step_is_found() {
    let adapter = Capabilities { subgroup_min: Some(8), ..Capabilities::webgpu_minimum() };
    let layout = Layout::contiguous(&[1, 2, 40, 64]).unwrap();
    let problem = Problem::new(layout.shape(), layout.shape(), layout.shape(), None, None, &Positions::default(), 0);
    let drawn = Drawn {
        problem: problem.unwrap(),
        output: layout.clone(),
        q: layout.clone(),
        k: layout.clone(),
        v: layout,
        stored: [Dtype::F32; 3],
        masks: vec![],
        biases: vec![],
        relative: None,
        rotary: None,
        sink: None,
    };
    let rng = &mut Pcg64::seed_from_u64(1);
    let cut: Method = "rows8x8/keys8/subgroup8".parse().unwrap();
    let good = plan::attention(&drawn.problem, &drawn.attention(rng, cut), &adapter).unwrap();
    check(&good, &adapter);
    type Change<'a> = &'a dyn Fn(&mut Step);
    let wrong: [(&str, Change<'_>); 6] = [
        ("a binding less", &|step| step.bindings.truncate(step.bindings.len() - 1)),
        ("one more", &|step| step.bindings.push(Binding { name: "nobody", ..step.bindings[0] })),
        ("another name", &|step| step.bindings[0].name = "nobody"),
        ("the same twice", &|step| step.bindings[1].name = step.bindings[0].name),
        ("fewer parameters", &|step| step.params.truncate(step.params.len() - 16)),
        ("a buffer that is read and written", &|step| {
            let written = step.bindings.iter().position(|one| one.slot == wgpu_attention::kernels::Slot::Output);
            step.bindings[0].slot = step.bindings[written.unwrap()].slot;
        }),
    ];
    let fails = |step: &Step, adapter: &Capabilities| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check_step(step, adapter))).is_err()
    };
    for (what, change) in wrong {
        let mut step = good.steps[0].clone();
        change(&mut step);
        assert!(fails(&step, &adapter), "{what} is taken");
    }
    // Without subgroups naga rejects the text, whatever else is checked.
    let variant = good.steps[0].variant.clone();
    assert!(variant.uses_subgroups());
    assert!(std::panic::catch_unwind(|| read(&variant, false)).is_err());
    assert!(fails(&good.steps[0], &Capabilities { max_invocations: 4, ..adapter.clone() }));
    assert!(fails(&good.steps[0], &Capabilities { max_storage_buffers: 3, ..adapter }));
}
