// Y[r, j] = X at any strides; columns behind the end become `fill`
// X [a, b, c, j]   Y [row, j], row-major over (a, b, c), rows padded

const WORKGROUP: u32 = 64u;

alias XElem = f32;

struct Params {
    x_strides: vec4<u32>,
    shape: vec4<u32>,
    x_offset: u32,
    y_offset: u32,
    y_row_stride: u32,
    total: u32,
    workgroups: u32,
    fill: u32,
    pad_0: u32,
    pad_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// @use element(x)

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
    let j = flat % params.y_row_stride;
    let row = flat / params.y_row_stride;
    let c = row % params.shape.z;
    let b = (row / params.shape.z) % params.shape.y;
    let a = row / (params.shape.z * params.shape.y);
    if (j < params.shape.w) {
        y[params.y_offset + flat] = element(params.x_offset + dot(params.x_strides, vec4<u32>(a, b, c, j)));
    } else {
        y[params.y_offset + flat] = bitcast<f32>(params.fill);
    }
}
