// A 64-bit word costs a software adapter as much as a 32-bit one.
fn of_f32_words(x: vec2<u64>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(u32(x.x), u32(x.x >> 32u), u32(x.y), u32(x.y >> 32u)));
}
