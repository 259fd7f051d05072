// 0 · NaN is NaN, so a weight of 0 does not hide a masked value. Values are usually finite: a sum over keys replaces a
// non-finite value by 0. If there was one, the terms that a row may see are added at the end.

// Number of keys whose values are checked together.
const SPAN: u32 = 32u;

fn not_finite(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}

// Adds the terms of non-finite values to the first `rows` of some rows. A weight is above 0, so only the values matter.
// The loops do few iterations per key, because some drivers limit them (src/kernels/turns.rs). The bounds are unknown
// to the compiler: unrolled, this rare part would take longer than all the rest.
// `columns`: the first vec4 of a row, the end, and the step.
fn add_not_finite(
    b: u32, head: array<u32, ROWS>, query: array<u32, ROWS>, o_base: array<u32, ROWS>, rows: u32, band: vec4<i32>,
    v_base: u32, keys: vec2<u32>, columns: vec3<u32>,
) {
    for (var j = keys.x; j < keys.y; j += SPAN) {
        // One bit for each key that a row sees.
        var sees = array<u32, ROWS>();
        for (var c = 0u; c < SPAN; c += PAIRS) {
            let key = four_from(j + c);
            let is_key = (key < vec4<u32>(keys.y)) & (four_from(0u) < vec4<u32>(PAIRS));
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                let seen = rule_of(b, head[r], vec4<u32>(query[r]), key, band, true).seen & is_key;
                let bits = vec4<u32>(seen & vec4<bool>(r < rows)) * vec4<u32>(1u, 2u, 4u, 8u);
                sees[r] |= (bits.x | bits.y | bits.z | bits.w) << c;
            }
        }
        for (var d = columns.x; d < columns.y; d += columns.z) {
            var term = array<vec4<f32>, ROWS>();
            for (var first = 0u; first < SPAN; first += 4u) {
                // @unroll
                for (var n = 0u; n < 4u; n++) {
                    let c = first + n;
                    let value = load_v(v_base + min(j + c, keys.y - 1u) * params.v.strides.z, d);
                    let term_of_key = select(vec4<f32>(), value, not_finite(value));
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        term[r] += select(vec4<f32>(), term_of_key, vec4<bool>(((sees[r] >> c) & 1u) != 0u));
                    }
                }
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (any(not_finite(term[r]))) {
                    store_o(o_base[r], d, term[r], true);
                }
            }
        }
    }
}
