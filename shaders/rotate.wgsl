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

// The row of X at x_at, its cosines and sines at angle.
// @block turn
fn turn(x_at: u32, y_at: u32, angle: u32, unit: u32) {
    let x_step = params.x_strides.w;
    let y_step = params.y_strides.w;
    if (unit >= params.pairs) {
        let d = 2u * unit;
        y[y_at + d * y_step] = element(x_at + d * x_step);
        if (d + 1u < params.dim) {
            y[y_at + (d + 1u) * y_step] = element(x_at + (d + 1u) * x_step);
        }
        return;
    }
    let d0 = select(unit, 2u * unit, INTERLEAVED);
    let d1 = select(unit + params.pairs, 2u * unit + 1u, INTERLEAVED);
    let cosine = angles[angle + unit];
    let sine = angles[angle + params.row_stride / 2u + unit];
    let x0 = element(x_at + d0 * x_step);
    let x1 = element(x_at + d1 * x_step);
    y[y_at + d0 * y_step] = x0 * cosine - x1 * sine;
    y[y_at + d1 * y_step] = x1 * cosine + x0 * sine;
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
    let unit = flat % params.units;
    let row = flat / params.units;
    let i = row % params.len;
    let h = row / params.len % params.heads;
    let b = row / params.len / params.heads;
    let x_at = params.x_offset + dot(params.x_strides.xyz, vec3<u32>(b, h, i));
    let y_at = params.y_offset + dot(params.y_strides.xyz, vec3<u32>(b, h, i));
    turn(x_at, y_at, params.angles_offset + row_of(b, i) * params.row_stride, unit);
}
