// Y[b, i, d] = X[b, i, d] + T[row of token i of b, d]
// X [b, i, d]   Y [b, i, d], row-major   T [row, d]
//
// Vaswani et al. 2017, section 3.5. One invocation per token and four columns.

const WORKGROUP: u32 = 64u;

alias XElem = f32;
alias TableElem = f32;
alias YElem = f32;

struct Params {
    x_strides: vec3<u32>,
    x_offset: u32,
    table_strides: vec2<u32>,
    table_offset: u32,
    y_offset: u32,
    len: u32,
    dim: u32,
    row_0: u32,
    rows_batch_stride: u32,
    total: u32,
    workgroups: u32,
    pad_0: u32,
    pad_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> table: array<TableElem>;

// @use row_of

// @use load(x dim false z)

// @use load(table dim false y)

// @use store_four

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    let flat = index * WORKGROUP + local;
    if (index >= params.workgroups || flat >= params.total) {
        return;
    }
    let dim4 = (params.dim + 3u) / 4u;
    let d4 = flat % dim4;
    let token = flat / dim4;
    let i = token % params.len;
    let b = token / params.len;
    let embedding = load_x(params.x_offset + dot(params.x_strides.xy, vec2<u32>(b, i)), d4);
    let place = load_table(params.table_offset + params.table_strides.x * row_of(b, i), d4);
    store_four(params.y_offset + token * params.dim, d4 * 4u, params.dim, embedding + place);
}
