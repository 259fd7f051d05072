// @for view
fn element_view(at: u32) -> f32 {
    return view[at];
}
