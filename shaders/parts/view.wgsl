// A strided operand: three axes of rows, and the axis of a row.
struct View {
    strides: vec4<u32>,
    offset: u32,
}
// `sum` plus the products of four numbers.
fn dot_on(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}
// The position of a row's start.
fn row_at(view: View, axes: vec3<u32>) -> u32 {
    return view.offset + dot(view.strides.xyz, axes);
}
fn element_at(view: View, axes: vec4<u32>) -> u32 {
    return view.offset + dot(view.strides, axes);
}
// The axes of element `at` of a row-major array.
fn axes_in(shape: vec4<u32>, at: u32) -> vec4<u32> {
    let row = at / shape.w;
    return vec4<u32>(row / shape.z / shape.y, row / shape.z % shape.y, row % shape.z, at % shape.w);
}
