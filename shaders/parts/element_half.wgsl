// @for half x
// @use one_half(x)
fn element(at: u32) -> f32 {
    return one_x(at);
}
