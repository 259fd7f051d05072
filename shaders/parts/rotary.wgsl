// Rotary positions: vec4 d4 of a row at `position`, whose first `2 · PAIRS4` vec4s are rotated, each together with the
// one half of them away (half-split pairs). Angles: for each position, cosines, then sines.
@group(0) @binding(13) var<storage, read> angles: array<vec4<f32>>;
const PAIRS4: u32 = 1u;
fn rotated_halves(low: vec4<f32>, high: vec4<f32>, pair: u32, position: u32) -> array<vec4<f32>, 2> {
    let at = position * 2u * PAIRS4 + pair;
    let cosine = angles[at];
    let sine = angles[at + PAIRS4];
    return array<vec4<f32>, 2>(low * cosine - high * sine, high * cosine + low * sine);
}
fn rotated(x: vec4<f32>, other: vec4<f32>, d4: u32, position: u32) -> vec4<f32> {
    let at = position * 2u * PAIRS4 + d4 % PAIRS4;
    let sine = select(angles[at + PAIRS4], -angles[at + PAIRS4], vec4<bool>(d4 < PAIRS4));
    return select(x * angles[at] + other * sine, x, vec4<bool>(d4 >= 2u * PAIRS4));
}
fn partner(d4: u32) -> u32 {
    return min(select(d4 - PAIRS4, d4 + PAIRS4, d4 < PAIRS4), 2u * PAIRS4 - 1u);
}
fn rotated_q(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return rotated(load_q(at, d4), load_q(at, partner(d4)), d4, position);
}
fn rotated_k(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return rotated(load_k(at, d4), load_k(at, partner(d4)), d4, position);
}
