// What the distance between key and query adds to a score: X[b, h, i, clip(distance, low, high) − low].
@group(0) @binding(12) var<storage, read> relative: array<f32>;
fn relative_row(b: u32, h: u32, i: u32) -> u32 {
    return params.rules.relative.offset + dot(params.rules.relative.strides.xyz, vec3<u32>(b, h, i));
}
fn relative_at(row: u32, distance: vec4<i32>) -> vec4<f32> {
    let view = params.rules.relative;
    let low = vec4<i32>(view.low);
    let column = vec4<u32>(clamp(distance, low, vec4<i32>(view.high)) - low);
    let at = vec4<u32>(row) + column * view.strides.w;
    return view.factor * vec4<f32>(relative[at.x], relative[at.y], relative[at.z], relative[at.w]);
}
