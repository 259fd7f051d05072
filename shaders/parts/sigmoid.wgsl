const LOG2_E: f32 = 1.4426950408889634;
// In base 2, where drivers are exact; the bounds keep ∞ out. NaN is detected by its bits.
fn sigmoid(x: vec4<f32>) -> vec4<f32> {
    let is_nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    let value = 1.0 / (1.0 + exp2(clamp(x * -LOG2_E, vec4<f32>(-126.0), vec4<f32>(126.0))));
    return select(value, vec4<f32>(bitcast<f32>(params.not_a_number)), is_nan);
}
