// @for view width padded w
fn load_view(at: u32, d4: u32) -> vec4<f32> {
    // A word of 64 bits costs a software adapter as much as one of 32.
    let words = view[at / 4u + d4];
    let four = bitcast<vec4<f32>>(vec4<u32>(u32(words.x), u32(words.x >> 32u), u32(words.y), u32(words.y >> 32u)));
    return select(four, vec4<f32>(), padded && d4 * 4u >= params.width);
}
