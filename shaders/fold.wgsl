// B[b, h, i, j] += one rule: a bias, a boolean mask, or the bands of a batch (−∞ where it hides)
// B [b, h, i, j]
//
// For adapters with too few storage buffers, and for calls with more masks or biases than the other
// kernels have bindings: all rules become one additive bias.

const WORKGROUP: u32 = 64u;
const ACCUMULATE: bool = false;
// 0: bias, 1: mask, 2: bands
const SOURCE: u32 = 1u;

struct Params {
    source_strides: vec4<u32>,
    shape: vec4<u32>,
    source_offset: u32,
    keeps: u32,
    total: u32,
    workgroups: u32,
    minus_infinity: u32,
    row_0: u32,
    key_0: u32,
    pad: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<u32>;
@group(0) @binding(2) var<storage, read_write> folded: array<f32>;

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
    let j = flat % params.shape.w;
    let i = (flat / params.shape.w) % params.shape.z;
    let h = (flat / (params.shape.w * params.shape.z)) % params.shape.y;
    let b = flat / (params.shape.w * params.shape.z * params.shape.y);
    let at = params.source_offset + dot(params.source_strides, vec4<u32>(b, h, i, j));
    var value = 0.0;
    var hides = false;
    if (SOURCE == 0u) {
        value = bitcast<f32>(source[at]);
        hides = source[at] == params.minus_infinity;
    } else if (SOURCE == 1u) {
        hides = (((source[at / 4u] >> (8u * (at % 4u))) & 255u) != 0u) != (params.keeps != 0u);
    } else {
        let row = i32(i + params.row_0);
        let key = i32(j + params.key_0);
        let first = at * 4u;
        hides = !(key < bitcast<i32>(source[first])
            && key >= row + bitcast<i32>(source[first + 1u])
            && key <= row + bitcast<i32>(source[first + 2u]));
    }
    if (ACCUMULATE) {
        let before = folded[flat];
        hides = hides || bitcast<u32>(before) == params.minus_infinity;
        value += before;
    }
    folded[flat] = select(value, bitcast<f32>(params.minus_infinity), hides);
}
