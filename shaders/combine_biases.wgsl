// B[b, h, i, j] += one rule: a bias, a boolean mask, or the bands of a batch (−∞ where it hides)
// B [b, h, i, j]
//
// For adapters with too few storage buffers, and for calls with more masks or biases than the other kernels can bind:
// combines all rules into one additive bias.

const ACCUMULATE: bool = false;
// 0: bias, 1: mask, 2: bands
const SOURCE: u32 = 1u;

struct Params {
    source: View,
    shape: vec4<u32>,
    keeps: u32,
    total: u32,
    minus_infinity: u32,
    row_0: u32,
    key_0: u32,
}

@group(0) @binding(1) var<storage, read> source: array<u32>;
@group(0) @binding(2) var<storage, read_write> combined: array<f32>;

// @use each_element, view

fn run(at: u32) {
    let axes = axes_in(params.shape, at);
    let place = element_at(params.source, axes);
    var value = 0.0;
    var hides = false;
    if (SOURCE == 0u) {
        value = bitcast<f32>(source[place]);
        hides = source[place] == params.minus_infinity;
    } else if (SOURCE == 1u) {
        hides = (((source[place / 4u] >> (8u * (place % 4u))) & 255u) != 0u) != (params.keeps != 0u);
    } else {
        let row = i32(axes.z + params.row_0);
        let key = i32(axes.w + params.key_0);
        let first = place * 4u;
        hides = !(key < bitcast<i32>(source[first])
            && key >= row + bitcast<i32>(source[first + 1u])
            && key <= row + bitcast<i32>(source[first + 2u]));
    }
    if (ACCUMULATE) {
        let before = combined[at];
        hides = hides || bitcast<u32>(before) == params.minus_infinity;
        value += before;
    }
    combined[at] = select(value, bitcast<f32>(params.minus_infinity), hides);
}
