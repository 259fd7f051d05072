// Y[b, i, d] = X[b, i, d] + T[row of token i of b, d]
// X [b, i, d]   Y [b, i, d]   T [row, d]
//
// Vaswani et al. 2017, section 3.5. One invocation per element.

const WORKGROUP: u32 = 64u;

alias XElem = f32;

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
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> table: array<f32>;

// @block row_of
@group(0) @binding(4) var<storage, read> rows: array<u32>;
fn row_of(b: u32, i: u32) -> u32 {
    return rows[params.row_0 + b * params.rows_batch_stride + i];
}
// @end

// @block element
fn element(at: u32) -> f32 {
    return x[at];
}
// @end

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
    let d = flat % params.dim;
    let i = flat / params.dim % params.len;
    let b = flat / params.dim / params.len;
    let embedding = element(params.x_offset + dot(params.x_strides, vec3<u32>(b, i, d)));
    let place = params.table_offset + dot(params.table_strides, vec2<u32>(row_of(b, i), d));
    y[params.y_offset + flat] = embedding + table[place];
}
