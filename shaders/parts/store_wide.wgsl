// @for o dim whole
fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    if (whole || d4 * 4u < params.dim) {
        var sum = value;
        if (add) {
            let four = o[at / 4u + d4];
            sum += four;
        }
        o[at / 4u + d4] = sum;
    }
}
