// A strided operand: three axes of rows, and the axis of a row.
struct View {
    strides: vec4<u32>,
    offset: u32,
}
// Where a row begins.
fn row_at(view: View, axes: vec3<u32>) -> u32 {
    return view.offset + dot(view.strides.xyz, axes);
}
fn element_at(view: View, b: u32, h: u32, i: u32, j: u32) -> u32 {
    return view.offset + dot(view.strides, vec4<u32>(b, h, i, j));
}
