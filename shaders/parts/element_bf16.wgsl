// @for view
fn element_view(at: u32) -> f32 {
    let word = view[at / 2u] >> (16u * (at % 2u));
    return bitcast<f32>(word << 16u);
}
