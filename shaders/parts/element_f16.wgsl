// @for view
fn element_view(at: u32) -> f32 {
    let word = view[at / 2u] >> (16u * (at % 2u));
    return unpack2x16float(word).x;
}
