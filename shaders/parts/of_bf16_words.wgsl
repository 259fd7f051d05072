// @use of_bf16
fn of_bf16_words(x: u64) -> vec4<f32> {
    return of_bf16(vec2<u32>(u32(x), u32(x >> 32u)));
}
