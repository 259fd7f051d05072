// @use load(x dim false)
// Like rotate_unit.wgsl, four columns at a time.
fn rotate_unit(x_at: u32, y_at: u32, angle: u32, unit: u32) {
    let pairs4 = params.pairs / 4u;
    let is_copied = unit >= pairs4;
    let is_split = !INTERLEAVED && !is_copied;
    let d0 = select(2u * unit, unit, is_split);
    let d1 = select(2u * unit + 1u, unit + pairs4, is_split);
    let first = load_x(x_at, d0);
    if (is_copied) {
        y[y_at / 4u + d0] = first;
        if (4u * d1 < params.dim) {
            y[y_at / 4u + d1] = load_x(x_at, d1);
        }
        return;
    }
    let second = load_x(x_at, d1);
    let cosine = angles[angle / 4u + unit];
    let sine = params.sine_factor * angles[angle / 4u + params.row_stride / 8u + unit];
    if (INTERLEAVED) {
        let x0 = vec4<f32>(first.xz, second.xz);
        let x1 = vec4<f32>(first.yw, second.yw);
        let y0 = x0 * cosine - x1 * sine;
        let y1 = x1 * cosine + x0 * sine;
        y[y_at / 4u + d0] = vec4<f32>(y0.x, y1.x, y0.y, y1.y);
        y[y_at / 4u + d1] = vec4<f32>(y0.z, y1.z, y0.w, y1.w);
    } else {
        y[y_at / 4u + d0] = first * cosine - second * sine;
        y[y_at / 4u + d1] = second * cosine + first * sine;
    }
}
