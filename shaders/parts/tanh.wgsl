// Cephes tanhf: a driver's own tanh may overflow or lose small arguments.
fn tanh_exact(x: vec4<f32>) -> vec4<f32> {
    let z = x * x;
    let small = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
        + 1.33314422036e-1) * z - 3.33332819422e-1) * z * x + x;
    let a = min(abs(x), vec4<f32>(20.0));
    let large = sign(x) * (1.0 - 2.0 / (exp2(a * 2.8853900817779268) + 1.0));
    return select(large, small, abs(x) < vec4<f32>(0.625));
}
