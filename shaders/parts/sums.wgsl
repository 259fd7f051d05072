fn load_y(at: u32, o: u32) -> vec4<f32> {
    let here = at + o;
    return vec4<f32>(y[here], y[here + 1u], y[here + 2u], y[here + 3u]);
}
fn store_y(at: u32, o: u32, value: vec4<f32>) {
    // @unroll
    for (var e = 0u; e < 4u; e++) {
        if (o + e < params.dim_out) {
            y[at + o + e] = value[e];
        }
    }
}
