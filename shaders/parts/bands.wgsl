@group(0) @binding(4) var<storage, read> bands: array<vec4<i32>>;
fn band_of(b: u32) -> vec4<i32> {
    return bands[params.slice.batch_0 + b];
}
