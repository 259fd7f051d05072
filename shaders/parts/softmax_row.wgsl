// Running maximum and sum of a row of scores, in base 2, where drivers are exact. Non-finite scores are detected by
// their bits, because drivers differ on NaN in max and exp2.
const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
// The running maximum starts at the smallest finite number, because WGSL has no literal for −∞.
const LEAST: f32 = -3.4028234663852886e38;

// The largest of `so_far` and the sign-less bits of four scores. NaN and +∞ are above all others.
fn largest_bits(so_far: u32, x: vec4<f32>) -> u32 {
    let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
    return max(max(max(so_far, bits.x), bits.y), max(bits.z, bits.w));
}
fn largest(so_far: f32, x: vec4<f32>) -> f32 {
    return max(max(so_far, max(x.x, x.y)), max(x.z, x.w));
}
fn sum_of_four(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}
// Whether a score makes its row NaN; NaN and +∞ do.
fn makes_nan(score: f32) -> bool {
    let bits = bitcast<u32>(score);
    return (bits & 0x7fffffffu) >= 0x7f800000u && bits != params.minus_infinity;
}
// exp(x − peak); the floor keeps −∞ out of exp2, which some drivers get wrong.
fn exp_below(x: vec4<f32>, peak: f32) -> vec4<f32> {
    return exp2(max((x - peak) * LOG2_E, vec4<f32>(-200.0)));
}
// The factor that divides a row by its sum. A row without visible keys has sum 0 and stays 0.
fn inverse_of(sum: f32, is_nan: bool) -> f32 {
    return select(select(1.0 / sum, 0.0, sum == 0.0), bitcast<f32>(params.not_a_number), is_nan);
}
fn lse_of_row(peak: f32, sum: f32, is_nan: bool) -> f32 {
    let value = select(peak + log2(sum) * LN_2, bitcast<f32>(params.minus_infinity), sum == 0.0);
    return select(value, bitcast<f32>(params.not_a_number), is_nan);
}
// The bits of +∞; those of NaN are above.
const INFINITY_BITS: u32 = 0x7f800000u;
