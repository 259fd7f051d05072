// @for sum
// @use shared_value
// Combines the values of all lanes of a row with `join_two_sum`.
fn join_sum(local: u32, x: f32) -> f32 {
    shared_value[local] = x;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (local % LANES < step) {
            shared_value[local] = join_two_sum(shared_value[local], shared_value[local + step]);
        }
    }
    workgroupBarrier();
    let joined = shared_value[local - local % LANES];
    workgroupBarrier();
    return joined;
}
