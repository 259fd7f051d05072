// E[b, h, i] = −exp(sink_h − LSE[b, h, i]) · D[b, h, i]
// sink [h]   LSE, D [b, h, i]   E [b, h, i], row-major
//
// Summed over batch entries and queries, the gradient of the sinks: a sink is a key without a value.

const LOG2_E: f32 = 1.4426950408889634;

struct Params {
    lse: View,
    d: View,
    y_offset: u32,
    heads: u32,
    len: u32,
    sink_offset: u32,
    sink_stride: u32,
    total: u32,
    minus_infinity: u32,
}

@group(0) @binding(1) var<storage, read> lse: array<f32>;
@group(0) @binding(2) var<storage, read> d: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

// @use each_element, view, axes, sink

fn run(at: u32) {
    let axes = axes_of(at);
    let score = sink_of(axes.y);
    let weight = exp2((score - lse[row_at(params.lse, axes)]) * LOG2_E);
    y[params.y_offset + at] = select(-weight * d[row_at(params.d, axes)], 0.0, bitcast<u32>(score) == params.minus_infinity);
}
