@group(0) @binding(9) var<storage, read_write> lse: array<f32>;
fn store_lse(at: u32, value: f32) {
    lse[at] = value;
}
