// @use of_f16
fn of_f16_words(x: u64) -> vec4<f32> {
    return of_f16(vec2<u32>(u32(x), u32(x >> 32u)));
}
