// Like relative.wgsl, from a table that holds, for each first distance, the values of four consecutive distances.
@group(0) @binding(12) var<storage, read> relative: array<vec4<f32>>;
fn relative_row(b: u32, h: u32, i: u32) -> u32 {
    return (params.rules.relative.offset + dot(params.rules.relative.strides.xyz, vec3<u32>(b, h, i))) / 4u;
}
fn relative_at(row: u32, distance: vec4<i32>) -> vec4<f32> {
    let view = params.rules.relative;
    let first = clamp(distance.x, view.low - 3, view.high);
    return view.factor * relative[row + u32(view.high - first)];
}
