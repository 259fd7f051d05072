// @use element(x)
// Rotates the row of X at x_at by the cosines and sines at `angle`.
fn rotate_unit(x_at: u32, y_at: u32, angle: u32, unit: u32) {
    let x_step = params.x.strides.w;
    let y_step = params.y.strides.w;
    if (unit >= params.pairs) {
        let d = 2u * unit;
        y[y_at + d * y_step] = element_x(x_at + d * x_step);
        if (d + 1u < params.dim) {
            y[y_at + (d + 1u) * y_step] = element_x(x_at + (d + 1u) * x_step);
        }
        return;
    }
    let d0 = select(unit, 2u * unit, INTERLEAVED);
    let d1 = select(unit + params.pairs, 2u * unit + 1u, INTERLEAVED);
    let cosine = angles[angle + unit];
    let sine = params.sine_factor * angles[angle + params.row_stride / 2u + unit];
    let x0 = element_x(x_at + d0 * x_step);
    let x1 = element_x(x_at + d1 * x_step);
    y[y_at + d0 * y_step] = x0 * cosine - x1 * sine;
    y[y_at + d1 * y_step] = x1 * cosine + x0 * sine;
}
