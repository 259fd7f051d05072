fn relative_row(b: u32, h: u32, i: u32) -> u32 {
    return 0u;
}
fn relative_at(row: u32, distance: vec4<i32>) -> vec4<f32> {
    return vec4<f32>();
}
