// @for x
// @use one_f16(x)
fn element(at: u32) -> f32 {
    return one_x(at);
}
