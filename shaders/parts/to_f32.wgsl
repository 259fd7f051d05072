fn to_f32(x: vec4<f32>) -> vec4<f32> {
    return x;
}
