// @for unpack pack o dim whole
// @use unpack
// @use pack
fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    if (whole || d4 * 4u < params.dim) {
        var sum = value;
        if (add) {
            sum += unpack(o[at / 4u + d4]);
        }
        o[at / 4u + d4] = pack(sum);
    }
}
