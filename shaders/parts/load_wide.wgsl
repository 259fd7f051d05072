// @for unpack view width padded
// @use unpack
fn load_view(at: u32, d4: u32) -> vec4<f32> {
    return select(unpack(view[at / 4u + d4]), vec4<f32>(), padded && d4 * 4u >= params.width);
}
