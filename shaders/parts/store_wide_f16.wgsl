// @for o dim whole
// @use pack_f16
fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    if (whole || d4 * 4u < params.dim) {
        var sum = value;
        if (add) {
            let four = o[at / 4u + d4];
            sum += vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y));
        }
        o[at / 4u + d4] = pack_four(sum);
    }
}
