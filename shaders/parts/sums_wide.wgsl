fn load_y(at: u32, o: u32) -> vec4<f32> {
    return y[(at + o) / 4u];
}
fn store_y(at: u32, o: u32, value: vec4<f32>) {
    y[(at + o) / 4u] = value;
}
