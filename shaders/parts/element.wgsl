// @for x
fn element(at: u32) -> f32 {
    return x[at];
}
