fn load_four(at: u32, first: u32) -> vec4<f32> {
    let here = at + first;
    return vec4<f32>(y[here], y[here + 1u], y[here + 2u], y[here + 3u]);
}
