@group(0) @binding(4) var<storage, read> bias: array<f32>;
fn bias_of(o: u32) -> f32 {
    return bias[params.bias.offset + o * params.bias.strides.w];
}
