// Batch, head and index of a row.
fn axes_of(row: u32) -> vec3<u32> {
    return vec3<u32>(row / params.len / params.heads, row / params.len % params.heads, row % params.len);
}
