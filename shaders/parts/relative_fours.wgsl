@group(0) @binding(12) var<storage, read> relative: array<vec4<f32>>;
fn relative_row(b: u32, h: u32, i: u32) -> u32 {
    return (params.relative_offset + dot(params.relative_strides.xyz, vec3<u32>(b, h, i))) / 4u;
}
fn relative_at(row: u32, distance: vec4<i32>) -> vec4<f32> {
    let first = clamp(distance.x, params.relative_low - 3, params.relative_high);
    return params.relative_factor * relative[row + u32(params.relative_high - first)];
}
