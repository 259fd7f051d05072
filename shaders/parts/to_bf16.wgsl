// Rounds to nearest even, by bits.
fn bf16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return select((bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u, (bits >> 16u) | 0x40u, is_nan);
}
fn to_bf16(x: vec4<f32>) -> vec2<u32> {
    return vec2<u32>(bf16_bits(x.x) | (bf16_bits(x.y) << 16u), bf16_bits(x.z) | (bf16_bits(x.w) << 16u));
}
