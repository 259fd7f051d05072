@group(0) @binding(7) var<storage, read> bias: array<f32>;
fn bias_at(b: u32, h: u32, i: u32, j: u32) -> f32 {
    return bias[element_at(params.rules.bias, vec4<u32>(b, h, i, j))];
}
