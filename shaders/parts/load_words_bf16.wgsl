// @for view width padded w
fn load_view(at: u32, d4: u32) -> vec4<f32> {
    let words = view[at / 4u + d4];
    let four = vec2<u32>(u32(words), u32(words >> 32u));
    return select(bitcast<vec4<f32>>(vec4<u32>(four.x << 16u, four.x & 0xffff0000u, four.y << 16u, four.y & 0xffff0000u)), vec4<f32>(), padded && d4 * 4u >= params.width);
}
