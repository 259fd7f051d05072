// D[b, h, i] = factor · Σ_n A[b, h, i, n] · B[b, h, i, n] − dLSE[b, h, i]
// A, B [b, h, i, n], any strides   dLSE, D [b, h, i]
//
// The row sums of the backward (Dao et al. 2022, "FlashAttention", appendix B.2): of the output and its gradient, and of
// weights and theirs. One invocation per row. Where A is 0, B does not count, whatever it holds: a query that sees nothing
// has an output of 0, a hidden key a weight of 0.

// Adds to the result.
const ACCUMULATE: bool = false;
// Products that are summed before they are added to the rest: longer sums lose digits.
const SUMMED4: u32 = 32u;

alias AElem = f32;
alias BElem = f32;

struct Params {
    a: View,
    b: View,
    d_lse: View,
    d: View,
    heads: u32,
    len: u32,
    dim: u32,
    total: u32,
    factor: f32,
}

@group(0) @binding(1) var<storage, read> a: array<AElem>;
@group(0) @binding(2) var<storage, read> b: array<BElem>;
@group(0) @binding(3) var<storage, read_write> d: array<f32>;

// @use each_element, view, axes, load(a dim true), load(b dim true), d_lse

fn run(at: u32) {
    let axes = axes_of(at);
    let a_row = row_at(params.a, axes);
    let b_row = row_at(params.b, axes);
    let here = row_at(params.d, axes);
    // The bound is more than a parameter; see README.md.
    let width4 = select(0u, (params.dim + 3u) / 4u, axes.z < params.len);
    var sum = 0.0;
    for (var first = 0u; first < width4; first += SUMMED4) {
        var part = vec4<f32>();
        for (var n = first; n < min(first + SUMMED4, width4); n++) {
            let a4 = load_a(a_row, n);
            part += select(a4 * load_b(b_row, n), vec4<f32>(), a4 == vec4<f32>());
        }
        sum += (part.x + part.y) + (part.z + part.w);
    }
    sum = params.factor * sum - d_lse_of(axes);
    if (ACCUMULATE) {
        sum += d[here];
    }
    d[here] = sum;
}
