// Y[a, b, c, d] = factor · Σ_n X[a, b, c, d + n · step]
// X, Y: any strides
//
// Sums one axis in order. The gradient of an operand that was broadcast is a sum over the axes that it was broadcast along.
// One invocation per element of Y.

// Adds to Y.
const ACCUMULATE: bool = false;
// Numbers that are summed before they are added to the rest: longer sums lose digits.
const SUMMED: u32 = 64u;

struct Params {
    x: View,
    y: View,
    // The shape of Y.
    shape: vec4<u32>,
    count: u32,
    step: u32,
    total: u32,
    factor: f32,
}

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// @use each_element, view

fn run(at: u32) {
    let axes = axes_in(params.shape, at);
    let first_at = element_at(params.x, axes);
    let to = element_at(params.y, axes);
    // The bound is more than a parameter; see README.md.
    let count = select(0u, params.count, at < params.total);
    var sum = 0.0;
    for (var first = 0u; first < count; first += SUMMED) {
        var part = 0.0;
        for (var n = first; n < min(first + SUMMED, count); n++) {
            part += x[first_at + n * params.step];
        }
        sum += part;
    }
    sum *= params.factor;
    if (ACCUMULATE) {
        sum += y[to];
    }
    y[to] = sum;
}
