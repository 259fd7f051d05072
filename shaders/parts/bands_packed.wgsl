// Two entries per sequence: the position of its rows and keys, and its band and keys per split. Then, for every block
// of rows, the sequence and the block's index in it.
@group(0) @binding(4) var<storage, read> bands: array<vec4<i32>>;
fn band_of(s: u32) -> vec4<i32> {
    return bands[2u * s + 1u];
}
