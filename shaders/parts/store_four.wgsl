// Those of four neighbours that are fewer than `end` from 0.
fn store_four(at: u32, first: u32, end: u32, value: vec4<f32>) {
    y[at + first] = value.x;
    if (first + 1u < end) {
        y[at + first + 1u] = value.y;
    }
    if (first + 2u < end) {
        y[at + first + 2u] = value.z;
    }
    if (first + 3u < end) {
        y[at + first + 3u] = value.w;
    }
}
