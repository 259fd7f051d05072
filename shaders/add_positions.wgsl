// Y[b, i, d] = X[b, i, d] + T[row of token i of b, d]
// X [b, i, d]   Y [b, i, d], row-major   T [row, d]
//
// Vaswani et al. 2017, section 3.5. One invocation per token and four columns.

alias XElem = f32;
alias TableElem = f32;
alias YElem = f32;

struct Params {
    x: View,
    table: View,
    y_offset: u32,
    // One head.
    heads: u32,
    len: u32,
    dim: u32,
    row_0: u32,
    rows_batch_stride: u32,
    total: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> table: array<TableElem>;

// @use each_element, view, axes, row_of, load(x dim false), load(table dim false), store_four

fn run(at: u32) {
    let dim4 = (params.dim + 3u) / 4u;
    let d4 = at % dim4;
    let token = at / dim4;
    let axes = axes_of(token);
    let place = load_table(params.table.offset + params.table.strides.z * row_of(axes.x, axes.z), d4);
    store_four(params.y_offset + token * params.dim, d4 * 4u, params.dim, load_x(row_at(params.x, axes), d4) + place);
}
