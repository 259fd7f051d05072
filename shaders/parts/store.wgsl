// @for o dim whole
fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    // @unroll
    for (var e = 0u; e < 4u; e++) {
        let d = d4 * 4u + e;
        if (d < params.dim) {
            let here = at + d * params.o.strides.w;
            if (add) {
                o[here] += value[e];
            } else {
                o[here] = value[e];
            }
        }
    }
}
