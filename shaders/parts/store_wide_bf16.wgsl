// @for o dim whole
// @use pack_bf16
fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    if (whole || d4 * 4u < params.dim) {
        var sum = value;
        if (add) {
            let four = o[at / 4u + d4];
            sum += bitcast<vec4<f32>>(vec4<u32>(four.x << 16u, four.x & 0xffff0000u, four.y << 16u, four.y & 0xffff0000u));
        }
        o[at / 4u + d4] = pack_four(sum);
    }
}
