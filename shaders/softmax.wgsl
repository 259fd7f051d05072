// P = softmax(S) over the last axis, in place; LSE = ln Σ exp S          pass 2 of the taught method
// S, P [row, j]   LSE [row]
//
// Max, sum, then weights (Milakov and Gimelshein 2018, "safe softmax"): exp(S − max) in base 2, where
// drivers are exact. LANES invocations share a row; 1 on CPU adapters, where a barrier costs more
// than it saves. A row of −∞ gives weights 0 and LSE −∞.
//
// A sink is one more score per head that takes part in the maximum and the sum and has no weight of its own
// (Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.3).

const WORKGROUP: u32 = 64u;
const LANES: u32 = 64u;
const LSE: bool = true;
const SINK: bool = true;

const_assert WORKGROUP % LANES == 0u;

struct Params {
    rows: u32,
    // vec4s per row that are used, and from row to row.
    width4: u32,
    row_stride4: u32,
    s_offset4: u32,
    lse_offset: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
    // Rows of a head, and heads of a batch entry.
    len_q: u32,
    heads: u32,
    sink_offset: u32,
    sink_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> s: array<vec4<f32>>;

// @block lse
@group(0) @binding(2) var<storage, read_write> lse: array<f32>;
fn store_lse(row: u32, value: f32) {
    lse[params.lse_offset + row] = value;
}
// @end

// @use sink

// @use join_sum

// @block join_max
fn join_max(local: u32, x: f32) -> f32 {
    shared_value[local] = x;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (local % LANES < step) {
            shared_value[local] = max(shared_value[local], shared_value[local + step]);
        }
    }
    workgroupBarrier();
    let joined = shared_value[local - local % LANES];
    workgroupBarrier();
    return joined;
}
// @end

// @block join_nan
var<workgroup> shared_nan: array<u32, WORKGROUP>;
fn join_nan(local: u32, x: bool) -> bool {
    shared_nan[local] = u32(x);
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (local % LANES < step) {
            shared_nan[local] |= shared_nan[local + step];
        }
    }
    workgroupBarrier();
    return shared_nan[local - local % LANES] != 0u;
}
// @end

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
// The running maximum starts at the least finite number: WGSL has no literal for −∞.
const LEAST: f32 = -3.4028234663852886e38;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    if (index >= params.workgroups) {
        return;
    }
    let row = index * (WORKGROUP / LANES) + local / LANES;
    let lane = local % LANES;
    let at = params.s_offset4 + min(row, params.rows - 1u) * params.row_stride4;

    var score = bitcast<f32>(params.minus_infinity);
    if (SINK) {
        score = sink_of(min(row, params.rows - 1u) / params.len_q % params.heads);
    }
    // A bound that is more than a parameter: see README.md.
    let width4 = select(0u, params.width4, index < params.workgroups);
    var highest = vec4<f32>(LEAST);
    var is_nan = vec4<bool>();
    if (SINK) {
        highest.x = max(LEAST, score);
        is_nan.x = (bitcast<u32>(score) & 0x7fffffffu) >= 0x7f800000u
            && bitcast<u32>(score) != params.minus_infinity;
    }
    for (var j = lane; j < width4; j += LANES) {
        let x = s[at + j];
        highest = max(highest, x);
        // NaN or +∞ in a row makes it NaN; told by bits, since drivers differ on NaN in max and exp2.
        let bits = bitcast<vec4<u32>>(x);
        is_nan = is_nan | (((bits & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u))
            & (bits != vec4<u32>(params.minus_infinity)));
    }
    let peak = join_max(local, max(max(highest.x, highest.y), max(highest.z, highest.w)));
    let broken = join_nan(local, any(is_nan));

    var sums = vec4<f32>();
    for (var j = lane; j < width4; j += LANES) {
        sums += weigh(s[at + j], peak);
    }
    var sum = join_sum(local, (sums.x + sums.y) + (sums.z + sums.w));
    if (SINK) {
        sum += weigh(vec4<f32>(score), peak).x;
    }

    if (row >= params.rows) {
        return;
    }
    let nan = bitcast<f32>(params.not_a_number);
    // The divisor of an empty row is never used: all its weights are 0.
    let factor = select(select(1.0 / sum, 0.0, sum == 0.0), nan, broken);
    for (var j = lane; j < width4; j += LANES) {
        let x = s[at + j];
        let hidden = bitcast<vec4<u32>>(x) == vec4<u32>(params.minus_infinity);
        s[at + j] = select(weigh(x, peak) * factor, vec4<f32>(), hidden);
    }
    if (LSE && lane == 0u) {
        let value = select(peak + log2(sum) * LN_2, bitcast<f32>(params.minus_infinity), sum == 0.0);
        store_lse(row, select(value, nan, broken));
    }
}

// exp(x − peak); the floor keeps −∞ out of exp2, which some drivers get wrong.
fn weigh(x: vec4<f32>, peak: f32) -> vec4<f32> {
    let hidden = bitcast<vec4<u32>>(x) == vec4<u32>(params.minus_infinity);
    return select(exp2(max((x - peak) * LOG2_E, vec4<f32>(-200.0))), vec4<f32>(), hidden);
}
