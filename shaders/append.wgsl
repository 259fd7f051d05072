// Y[b, len + e, :] = row e of the extra keys: a learned vector, or zeros.
// Y [b, len + extra, out]   row [out]
//
// PyTorch's add_bias_kv and add_zero_attn.

const WORKGROUP: u32 = 64u;

struct Params {
    y_offset: u32,
    y_batch_stride: u32,
    row_offset: u32,
    row_stride: u32,
    width: u32,
    batch: u32,
    workgroups: u32,
    pad: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

// @block row
@group(0) @binding(2) var<storage, read> row: array<f32>;
fn value_of(d: u32) -> f32 {
    return row[params.row_offset + d * params.row_stride];
}
// @end

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    let at = index * WORKGROUP + local;
    if (index >= params.workgroups || at >= params.batch * params.width) {
        return;
    }
    let d = at % params.width;
    y[params.y_offset + (at / params.width) * params.y_batch_stride + d] = value_of(d);
}
