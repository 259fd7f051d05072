// Rounds to nearest even, by bits: drivers differ in pack2x16float.
fn f16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let size = bits & 0x7fffffffu;
    // Below 2^-14, f16 has steps of 2^-24, like an f32 between 0.5 and 1.
    let small = bitcast<u32>(bitcast<f32>(size) + 0.5) - 0x3f000000u;
    let normal = (size + 0xfffu + ((size >> 13u) & 1u) - 0x38000000u) >> 13u;
    var half = select(normal, small, size < 0x38800000u);
    half = select(half, 0x7c00u, size >= 0x477ff000u);
    half = select(half, 0x7e00u, size > 0x7f800000u);
    return half | ((bits >> 16u) & 0x8000u);
}
fn to_f16(x: vec4<f32>) -> vec2<u32> {
    return vec2<u32>(f16_bits(x.x) | (f16_bits(x.y) << 16u), f16_bits(x.z) | (f16_bits(x.w) << 16u));
}
