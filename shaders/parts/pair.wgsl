// The parts of merge.wgsl: two separate ones.
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> a_lse: array<f32>;
@group(0) @binding(5) var<storage, read> b: array<f32>;
@group(0) @binding(6) var<storage, read> b_lse: array<f32>;
// @use load(a dim false), load(b dim false)
fn lse_of(s: u32, row: u32, axes: vec3<u32>) -> f32 {
    if (s == 0u) {
        return a_lse[row_at(params.a_lse, axes)];
    }
    return b_lse[row_at(params.b_lse, axes)];
}
fn part_of(s: u32, row: u32, axes: vec3<u32>, column: u32) -> vec4<f32> {
    if (s == 0u) {
        return load_a(row_at(params.a, axes), column / 4u);
    }
    return load_b(row_at(params.b, axes), column / 4u);
}
