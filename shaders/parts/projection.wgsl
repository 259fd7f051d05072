// What project.wgsl and matvec.wgsl share: parameters, operands, the positions of rows.
// @use each_workgroup, view, load(x dim_in PADDED), load(w dim_in PADDED), add_bias
const PADDED: bool = true;

alias XElem = f32;
alias WElem = f32;
alias YElem = f32;

struct Params {
    // Batch, row, column at the axes b, i and j.
    x: View,
    y: View,
    // Output and input.
    w: View,
    bias: View,
    rows: u32,
    len: u32,
    dim_in: u32,
    dim_out: u32,
    // Chunks of the width: the end of this dispatch's chunks, the total, and the first of this dispatch.
    chunks: u32,
    all_chunks: u32,
    chunk_0: u32,
    row_blocks: u32,
    out_blocks: u32,
    outs_per_block: u32,
    workgroups: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read> w: array<WElem>;
@group(0) @binding(3) var<storage, read_write> y: array<YElem>;

// The position of row r, counted over all batch entries.
fn row_base(view: View, row: u32) -> u32 {
    let r = min(row, params.rows - 1u);
    return row_at(view, vec3<u32>(r / params.len, 0u, r % params.len));
}
