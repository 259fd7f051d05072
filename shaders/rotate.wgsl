// Y[b, h, i] = X[b, h, i], each pair (x0, x1) of its first columns rotated by the angle of its position:
//   y0 = x0 · cos − x1 · sin      y1 = x1 · cos + x0 · sin
// X [b, h, i, d]   Y [b, h, i, d]   angles [row, 2 · columns]: cosines, then sines
//
// Su et al. 2021, "RoFormer", section 3.4. One invocation per pair, or per four pairs if everything is read in fours.
// Columns beyond the pairs are copied, the same number per invocation.

// If true, pairs are columns 2n and 2n + 1, else n and n + pairs.
const INTERLEAVED: bool = false;

alias XElem = f32;
alias YElem = f32;
alias AngleElem = f32;

struct Params {
    x: View,
    y: View,
    angles_offset: u32,
    row_stride: u32,
    pairs: u32,
    dim: u32,
    units: u32,
    heads: u32,
    len: u32,
    row_0: u32,
    rows_batch_stride: u32,
    total: u32,
    // −1 rotates back.
    sine_factor: f32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> angles: array<AngleElem>;

// @use each_element, view, axes, row_of, rotate_unit

fn run(at: u32) {
    let axes = axes_of(at / params.units);
    let angle = params.angles_offset + row_of(axes.x, axes.z) * params.row_stride;
    rotate_unit(row_at(params.x, axes), row_at(params.y, axes), angle, at % params.units);
}
