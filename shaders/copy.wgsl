// Y[a, b, c, j] = X[a, b, c, j], both with any strides; columns of Y beyond those of X become `fill`
// X [a, b, c, columns]   Y [a, b, c, d]

alias XElem = f32;

struct Params {
    x: View,
    y: View,
    // The shape of Y.
    shape: vec4<u32>,
    columns: u32,
    total: u32,
    fill: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// @use each_element, view, element(x)

fn run(at: u32) {
    let axes = axes_in(params.shape, at);
    var value = bitcast<f32>(params.fill);
    if (axes.w < params.columns) {
        value = element_x(element_at(params.x, axes));
    }
    y[element_at(params.y, axes)] = value;
}
