@group(0) @binding(10) var<storage, read> sink: array<f32>;
fn sink_of(h: u32) -> f32 {
    return sink[params.sink_offset + h * params.sink_stride];
}
