// Stores those of four adjacent elements whose index is below `end`.
fn store_four(at: u32, first: u32, end: u32, value: vec4<f32>) {
    // @unroll
    for (var e = 0u; e < 4u; e++) {
        if (first + e < end) {
            y[at + first + e] = value[e];
        }
    }
}
