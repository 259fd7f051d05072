// @for y pack
// @use pack
fn store_y(at: u32, d4: u32, value: vec4<f32>) {
    y[at / 4u + d4] = pack(value);
}
