// @for view width padded
// @use element(view)
fn load_view(at: u32, d4: u32) -> vec4<f32> {
    let d = d4 * 4u;
    let step = params.view.strides.w;
    let first = at + d * step;
    // Elements beyond the width do not count.
    return select(
        vec4<f32>(),
        vec4<f32>(element_view(first), element_view(first + step), element_view(first + 2u * step), element_view(first + 3u * step)),
        vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.width),
    );
}
