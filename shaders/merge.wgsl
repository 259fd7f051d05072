// O = Σ_s w_s · O_s,  w_s = exp(LSE_s − LSE),  LSE = ln Σ_s exp LSE_s
// O_s [s, row, d]   LSE_s [s, row]   O [b, h, i, d]   LSE [b, h, i]; row = (b, h, i)
//
// Joins the outputs of splits of the keys, each with its own log-sum-exp (Dao et al. 2023,
// "Flash-Decoding"), in the order of the splits; or two results that a caller brings. A split that saw no key (LSE −∞) weighs 0. One
// invocation per row and four columns.

const WORKGROUP: u32 = 64u;
// Splits that are joined before they are joined to the others.
const NEIGHBOURS: u32 = 32u;

alias OElem = f32;

struct Params {
    o_strides: vec4<u32>,
    lse_strides: vec3<u32>,
    lse_offset: u32,
    o_offset: u32,
    heads: u32,
    len_q: u32,
    rows: u32,
    splits: u32,
    dim: u32,
    // From row to row of the parts.
    row_stride: u32,
    total: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
    // Of two parts that lie apart.
    a_offset: u32,
    b_offset: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
    a_strides: vec4<u32>,
    b_strides: vec4<u32>,
    a_lse_strides: vec3<u32>,
    a_lse_offset: u32,
    b_lse_strides: vec3<u32>,
    b_lse_offset: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;

// @use splits

// @block lse
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
fn store_lse(at: u32, value: f32) {
    lse[at] = value;
}
// @end

// @use store(o dim false)

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
const LEAST: f32 = -3.4028234663852886e38;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    let at = index * WORKGROUP + local;
    if (index >= params.workgroups || at >= params.total) {
        return;
    }
    let dim4 = max((params.dim + 3u) / 4u, 1u);
    let row = at / dim4;
    let column = at % dim4 * 4u;
    let heads = row / params.len_q;
    let bhi = vec3<u32>(heads / params.heads, heads % params.heads, row % params.len_q);

    // A bound that is more than a parameter: see README.md.
    let splits = select(0u, params.splits, at < params.total);
    var peak = LEAST;
    var is_nan = false;
    for (var s = 0u; s < splits; s++) {
        let value = lse_of(s, row, bhi);
        // +∞ too, as in a row with such a score.
        let bits = bitcast<u32>(value);
        is_nan = is_nan || ((bits & 0x7fffffffu) >= 0x7f800000u && bits != params.minus_infinity);
        peak = max(peak, value);
    }
    var sum = 0.0;
    var joined = vec4<f32>();
    // Neighbours first: a long sum loses digits.
    for (var first = 0u; first < splits; first += NEIGHBOURS) {
        var sum_here = 0.0;
        var joined_here = vec4<f32>();
        for (var s = first; s < min(first + NEIGHBOURS, splits); s++) {
            let value = lse_of(s, row, bhi);
            if (bitcast<u32>(value) != params.minus_infinity) {
                let weight = exp2(max((value - peak) * LOG2_E, -200.0));
                sum_here += weight;
                joined_here += weight * part_of(s, row, bhi, column);
            }
        }
        sum += sum_here;
        joined += joined_here;
    }
    let nan = bitcast<f32>(params.not_a_number);
    let factor = select(select(1.0 / sum, 0.0, sum == 0.0), nan, is_nan);
    let to = params.o_offset + dot(params.o_strides.xyz, bhi);
    store_o(to, column / 4u, joined * factor, false);
    if (column == 0u) {
        let value = select(peak + log2(sum) * LN_2, bitcast<f32>(params.minus_infinity), sum == 0.0);
        store_lse(params.lse_offset + dot(params.lse_strides, bhi), select(value, nan, is_nan));
    }
}
