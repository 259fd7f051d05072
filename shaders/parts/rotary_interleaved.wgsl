// Rotary positions whose pairs are adjacent columns. Angles: cosines and sines of two pairs in each vec4.
@group(0) @binding(13) var<storage, read> angles: array<vec4<f32>>;
const PAIRS4: u32 = 1u;
fn rotated(x: vec4<f32>, d4: u32, position: u32) -> vec4<f32> {
    let angle = angles[position * PAIRS4 + min(d4, PAIRS4 - 1u)];
    let y = x * angle.xxyy + x.yxwz * vec4<f32>(-angle.z, angle.z, -angle.w, angle.w);
    return select(y, x, vec4<bool>(d4 >= PAIRS4));
}
fn rotated_q(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return rotated(load_q(at, d4), d4, position);
}
fn rotated_k(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return rotated(load_k(at, d4), d4, position);
}
