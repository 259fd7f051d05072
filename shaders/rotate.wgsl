// Y[b, h, i] = X[b, h, i], each pair (x0, x1) of its first columns turned by the angle of its position:
//   y0 = x0 · cos − x1 · sin      y1 = x1 · cos + x0 · sin
// X [b, h, i, d]   Y [b, h, i, d]   angles [row, 2 · columns]: cosines, then sines
//
// Su et al. 2021, "RoFormer", section 3.4. One invocation per pair, or per four pairs where all is read in
// fours; columns behind the pairs are copied, as many to an invocation.

const WORKGROUP: u32 = 64u;
// Pairs are columns 2n and 2n + 1, else n and n + pairs.
const INTERLEAVED: bool = false;

alias XElem = f32;
alias YElem = f32;
alias AngleElem = f32;

struct Params {
    x_strides: vec4<u32>,
    y_strides: vec4<u32>,
    x_offset: u32,
    y_offset: u32,
    angles_offset: u32,
    row_stride: u32,
    pairs: u32,
    dim: u32,
    units: u32,
    heads: u32,
    len: u32,
    row_0: u32,
    rows_batch_stride: u32,
    total: u32,
    workgroups: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> angles: array<AngleElem>;

// @use row_of

// @use element(x dim false w)

// @use turn

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
    let unit = flat % params.units;
    let row = flat / params.units;
    let i = row % params.len;
    let h = row / params.len % params.heads;
    let b = row / params.len / params.heads;
    let x_at = params.x_offset + dot(params.x_strides.xyz, vec3<u32>(b, h, i));
    let y_at = params.y_offset + dot(params.y_strides.xyz, vec3<u32>(b, h, i));
    turn(x_at, y_at, params.angles_offset + row_of(b, i) * params.row_stride, unit);
}
