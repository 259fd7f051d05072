// @for a 7
@group(0) @binding(7) var<storage, read> bias_a: array<f32>;
fn added_a(b: u32, h: u32, i: u32, j: u32) -> f32 {
    return bias_a[element_at(params.rules.bias_a, vec4<u32>(b, h, i, j))];
}
