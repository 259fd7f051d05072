// The parts of merge.wgsl: consecutive ones.
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read> part_lse: array<f32>;
fn lse_of(s: u32, row: u32, axes: vec3<u32>) -> f32 {
    return part_lse[s * params.rows + row];
}
fn part_of(s: u32, row: u32, axes: vec3<u32>, column: u32) -> vec4<f32> {
    let first = (s * params.rows + row) * params.row_stride + column;
    return vec4<f32>(parts[first], parts[first + 1u], parts[first + 2u], parts[first + 3u]);
}
