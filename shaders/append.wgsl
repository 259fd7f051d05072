// Y[b, len + e, :] = row e of the extra keys: a learned vector, or zeros.
// Y [b, len + extra, out]   row [out]
//
// PyTorch's add_bias_kv and add_zero_attn.

struct Params {
    y_offset: u32,
    y_batch_stride: u32,
    row_offset: u32,
    row_stride: u32,
    width: u32,
    total: u32,
}

@group(0) @binding(1) var<storage, read_write> y: array<f32>;

// @use each_element

// @block row
@group(0) @binding(2) var<storage, read> row: array<f32>;
fn value_of(d: u32) -> f32 {
    return row[params.row_offset + d * params.row_stride];
}
// @end

fn run(at: u32) {
    let d = at % params.width;
    y[params.y_offset + (at / params.width) * params.y_batch_stride + d] = value_of(d);
}
