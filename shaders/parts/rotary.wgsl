// Rotary positions: vec4 d4 of a row at `position`, its first `2 · PAIRS4` vec4s rotated, each with
// the one half of them away (half-split pairs). Angles: cosines, then sines, of each position.
@group(0) @binding(13) var<storage, read> angles: array<vec4<f32>>;
const PAIRS4: u32 = 1u;
fn turned(x: vec4<f32>, other: vec4<f32>, d4: u32, position: u32) -> vec4<f32> {
    let pair = d4 % PAIRS4;
    let at = position * 2u * PAIRS4 + pair;
    let sine = select(angles[at + PAIRS4], -angles[at + PAIRS4], vec4<bool>(d4 < PAIRS4));
    return select(x * angles[at] + other * sine, x, vec4<bool>(d4 >= 2u * PAIRS4));
}
fn partner(d4: u32) -> u32 {
    return select(d4 - PAIRS4, d4 + PAIRS4, d4 < PAIRS4);
}
fn turned_q(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return turned(load_q(at, d4), load_q(at, min(partner(d4), 2u * PAIRS4 - 1u)), d4, position);
}
fn turned_k(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return turned(load_k(at, d4), load_k(at, min(partner(d4), 2u * PAIRS4 - 1u)), d4, position);
}
