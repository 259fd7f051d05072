@group(0) @binding(4) var<storage, read> d_lse: array<f32>;
fn d_lse_of(axes: vec3<u32>) -> f32 {
    return d_lse[row_at(params.d_lse, axes)];
}
