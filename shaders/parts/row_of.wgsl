@group(0) @binding(4) var<storage, read> rows: array<u32>;
fn row_of(b: u32, i: u32) -> u32 {
    return rows[params.row_0 + b * params.rows_batch_stride + i];
}
