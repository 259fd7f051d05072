// Those of four neighbours that are fewer than `end` from 0.
fn store_four(at: u32, first: u32, end: u32, value: vec4<f32>) {
    // @unroll
    for (var e = 0u; e < 4u; e++) {
        if (first + e < end) {
            y[at + first + e] = value[e];
        }
    }
}
