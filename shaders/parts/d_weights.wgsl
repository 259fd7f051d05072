@group(0) @binding(6) var<storage, read> d_weights: array<f32>;
fn d_weights_of(axes: vec3<u32>, j: u32) -> vec4<f32> {
    let first = row_at(params.d_weights, axes);
    // Columns beyond the last key repeat the last one; their weight is 0.
    let key = min(vec4<u32>(j, j + 1u, j + 2u, j + 3u), vec4<u32>(params.keys - 1u));
    let place = vec4<u32>(first) + key * params.d_weights.strides.w;
    return params.d_weights_factor
        * vec4<f32>(d_weights[place.x], d_weights[place.y], d_weights[place.z], d_weights[place.w]);
}
