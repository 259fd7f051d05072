// @for view width padded w
fn load_view(at: u32, d4: u32) -> vec4<f32> {
    let words = view[at / 4u + d4];
    let four = vec2<u32>(u32(words), u32(words >> 32u));
    return select(vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y)), vec4<f32>(), padded && d4 * 4u >= params.width);
}
