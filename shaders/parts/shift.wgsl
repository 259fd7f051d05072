@group(0) @binding(4) var<storage, read> bias: array<f32>;
// @use load(bias dim false)
fn shift_of(d4: u32) -> vec4<f32> {
    return load_bias(params.bias.offset, d4);
}
