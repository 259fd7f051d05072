// @for half view width padded w
// @use one_half(view)
fn load_view(at: u32, d4: u32) -> vec4<f32> {
    let d = d4 * 4u;
    let step = params.view_strides.w;
    let first = at + d * step;
    return select(
        vec4<f32>(),
        vec4<f32>(one_view(first), one_view(first + step), one_view(first + 2u * step), one_view(first + 3u * step)),
        vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.width),
    );
}
