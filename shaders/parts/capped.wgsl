@group(0) @binding(5) var<storage, read> capped: array<vec4<f32>>;
fn capped_of(at: u32) -> vec4<f32> {
    return capped[at];
}
