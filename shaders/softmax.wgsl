// P = softmax(S) over the last axis, in place; LSE = ln Σ exp S          pass 2 of the unfused method
// S, P [row, j]   LSE [row]
//
// Max, sum, then weights (Milakov and Gimelshein 2018, "safe softmax"). LANES invocations share a row; 1 on CPU
// adapters, where a barrier costs more than it saves. A row of −∞ gives weights 0 and LSE −∞.
//
// A sink is one extra score per head that takes part in the maximum and the sum but has no weight of its own (Xiao et
// al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.3).

const LANES: u32 = 64u;
const SINK: bool = true;

const_assert WORKGROUP % LANES == 0u;

struct Params {
    rows: u32,
    // Number of vec4s per row that are used, and the stride from row to row.
    width4: u32,
    row_stride4: u32,
    s_offset4: u32,
    lse_offset: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
    // Number of rows of a head, and of heads of a batch entry.
    len_q: u32,
    heads: u32,
    sink_offset: u32,
    sink_stride: u32,
}

@group(0) @binding(1) var<storage, read_write> s: array<vec4<f32>>;

// @use each_workgroup, softmax_row, lse, sink, join(sum), join(largest)

fn join_two_sum(a: f32, b: f32) -> f32 {
    return a + b;
}
fn join_two_largest(a: f32, b: f32) -> f32 {
    return max(a, b);
}
// exp(x − peak), 0 for −∞.
fn weight_of(x: vec4<f32>, peak: f32) -> vec4<f32> {
    let is_hidden = bitcast<vec4<u32>>(x) == vec4<u32>(params.minus_infinity);
    return select(exp_below(x, peak), vec4<f32>(), is_hidden);
}

fn run(index: u32, local: u32, lane: u32) {
    let row = index * (WORKGROUP / LANES) + local / LANES;
    let in_row = local % LANES;
    let at = params.s_offset4 + min(row, params.rows - 1u) * params.row_stride4;

    var sink = bitcast<f32>(params.minus_infinity);
    if (SINK) {
        sink = sink_of(min(row, params.rows - 1u) / params.len_q % params.heads);
    }
    // The bound is more than a parameter; see README.md.
    let width4 = select(0u, params.width4, row < params.rows);
    var highest = vec4<f32>(max(LEAST, sink));
    let sink_bits = bitcast<u32>(sink);
    var is_nan = vec4<bool>(((sink_bits & 0x7fffffffu) >= INFINITY_BITS) & (sink_bits != params.minus_infinity));
    for (var j = in_row; j < width4; j += LANES) {
        let x = s[at + j];
        highest = max(highest, x);
        // A NaN or +∞ in a row makes the row NaN. Detected by bits, because drivers differ on NaN in max and exp2.
        let bits = bitcast<vec4<u32>>(x);
        is_nan = is_nan | (((bits & vec4<u32>(INFINITY_BITS)) == vec4<u32>(INFINITY_BITS))
            & (bits != vec4<u32>(params.minus_infinity)));
    }
    let peak = join_largest(local, largest(LEAST, highest));
    let row_is_nan = join_largest(local, select(0.0, 1.0, any(is_nan))) > 0.0;

    var sums = vec4<f32>();
    for (var j = in_row; j < width4; j += LANES) {
        sums += weight_of(s[at + j], peak);
    }
    var sum = join_sum(local, sum_of_four(sums));
    if (SINK) {
        sum += weight_of(vec4<f32>(sink), peak).x;
    }

    if (row >= params.rows) {
        return;
    }
    // The divisor of an empty row is never used: all its weights are 0.
    let factor = inverse_of(sum, row_is_nan);
    for (var j = in_row; j < width4; j += LANES) {
        let x = s[at + j];
        let is_hidden = bitcast<vec4<u32>>(x) == vec4<u32>(params.minus_infinity);
        s[at + j] = select(weight_of(x, peak) * factor, vec4<f32>(), is_hidden);
    }
    if (in_row == 0u) {
        store_lse(params.lse_offset + row, lse_of_row(peak, sum, row_is_nan));
    }
}
