fn rotated_q(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return load_q(at, d4);
}
fn rotated_k(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return load_k(at, d4);
}
