// A barrier that not every invocation of a workgroup reaches: naga accepts it, Tint must not.
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
var<workgroup> shared_x: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) local: u32) {
    shared_x[local] = x[local];
    if (local < 32u) {
        workgroupBarrier();
    }
    x[local] = shared_x[63u - local];
}
