// ALiBi: the table holds slopes; the value for a row is the bits of its slope.
@group(0) @binding(12) var<storage, read> relative: array<u32>;
fn relative_row(b: u32, h: u32, i: u32) -> u32 {
    return relative[params.rules.relative.offset + dot(params.rules.relative.strides.xyz, vec3<u32>(b, h, i))];
}
fn relative_at(row: u32, distance: vec4<i32>) -> vec4<f32> {
    return bitcast<f32>(row) * -abs(vec4<f32>(distance));
}
