// Y[r, j] = X at any strides; columns behind the end become `fill`
// X [a, b, c, j]   Y [row, j], row-major over (a, b, c), rows padded

alias XElem = f32;

struct Params {
    x: View,
    shape: vec4<u32>,
    y_offset: u32,
    y_row_stride: u32,
    total: u32,
    fill: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// @use each_element, view, element(x)

fn run(at: u32) {
    let j = at % params.y_row_stride;
    let row = at / params.y_row_stride;
    let c = row % params.shape.z;
    let b = (row / params.shape.z) % params.shape.y;
    let a = row / (params.shape.z * params.shape.y);
    if (j < params.shape.w) {
        y[params.y_offset + at] = element_x(element_at(params.x, a, b, c, j));
    } else {
        y[params.y_offset + at] = bitcast<f32>(params.fill);
    }
}
