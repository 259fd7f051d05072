// O = Σ_s w_s · O_s,  w_s = exp(LSE_s − LSE),  LSE = ln Σ_s exp LSE_s
// O_s [s, row, d]   LSE_s [s, row]   O [b, h, i, d]   LSE [b, h, i]; row = (b, h, i)
//
// Joins the outputs of splits of the keys, each with its own log-sum-exp (Dao et al. 2023, "Flash-Decoding"), in the
// order of the splits; or two results of a caller. A split that saw no key (LSE −∞) has weight 0. One invocation per
// row and four columns.

// Number of splits that are joined with each other before they are joined with the rest.
const NEIGHBOURS: u32 = 32u;

alias OElem = f32;

struct Params {
    o: View,
    lse: View,
    // For two separate parts.
    a: View,
    b: View,
    a_lse: View,
    b_lse: View,
    heads: u32,
    len: u32,
    rows: u32,
    splits: u32,
    dim: u32,
    // Stride from row to row of the parts.
    row_stride: u32,
    total: u32,
    minus_infinity: u32,
    not_a_number: u32,
}

@group(0) @binding(3) var<storage, read_write> o: array<OElem>;

// @use each_element, view, axes, softmax_row, splits, lse, store(o dim false)

fn run(at: u32) {
    let dim4 = max((params.dim + 3u) / 4u, 1u);
    let row = at / dim4;
    let column = at % dim4 * 4u;
    let axes = axes_of(row);

    // The bound is more than a parameter; see README.md.
    let splits = select(0u, params.splits, row < params.rows);
    var peak = LEAST;
    var is_nan = false;
    for (var s = 0u; s < splits; s++) {
        let value = lse_of(s, row, axes);
        is_nan = is_nan || makes_nan(value);
        peak = max(peak, value);
    }
    var sum = 0.0;
    var joined = vec4<f32>();
    // Join neighbours first: a long sum loses digits.
    for (var first = 0u; first < splits; first += NEIGHBOURS) {
        var sum_here = 0.0;
        var joined_here = vec4<f32>();
        for (var s = first; s < min(first + NEIGHBOURS, splits); s++) {
            let value = lse_of(s, row, axes);
            if (bitcast<u32>(value) != params.minus_infinity) {
                let weight = exp_below(vec4<f32>(value), peak).x;
                sum_here += weight;
                joined_here += weight * part_of(s, row, axes, column);
            }
        }
        sum += sum_here;
        joined += joined_here;
    }
    store_o(row_at(params.o, axes), column / 4u, joined * inverse_of(sum, is_nan), false);
    if (column == 0u) {
        store_lse(row_at(params.lse, axes), lse_of_row(peak, sum, is_nan));
    }
}
