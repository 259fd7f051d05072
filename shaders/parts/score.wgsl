struct Scores {
    x: vec4<f32>,
    // False for what is no key, may not be seen, or is −∞.
    seen: vec4<bool>,
}

// The distances of keys j, j + 1, … from query i.
fn away(i: u32, j: u32, band: vec4<i32>) -> vec4<i32> {
    return vec4<i32>(0, 1, 2, 3) + vec4<i32>(i32(j + params.key_0) - i32(i + params.row_0) - band.w);
}

// Scores of keys j, j + 1, …; `more` is what their distances add.
fn finish(sum: vec4<f32>, b: u32, h: u32, i: u32, j: u32, end: u32, band: vec4<i32>, listed: bool, more: vec4<f32>) -> Scores {
    let step = vec4<u32>(0u, 1u, 2u, 3u);
    var x = sum * params.scale;
    if (SOFTCAP) {
        let is_nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
        x = select(params.softcap * tanh_exact(x / params.softcap), x, is_nan);
    }
    var seen = (vec4<u32>(j) + step < vec4<u32>(end)) & (step < vec4<u32>(KEYS));
    let key = vec4<i32>(vec4<u32>(j + params.key_0) + step);
    if (BANDED) {
        let row = vec4<i32>(i32(i + params.row_0));
        let inside = (key < vec4<i32>(band.x)) & (key >= row + vec4<i32>(band.y)) & (key <= row + vec4<i32>(band.z));
        seen = seen & (inside | (key >= vec4<i32>(i32(params.ruled_keys))));
    }
    if (RELATIVE) {
        x += select(more, vec4<f32>(), key >= vec4<i32>(i32(params.ruled_keys)));
    }
    if (LISTED && listed) {
        // @unroll
        for (var c = 0u; c < 4u; c++) {
            if (c < KEYS) {
                let ruled = u32(key[c]) < params.ruled_keys;
                let bias = bias_at(b, h, i, j + c);
                let passes = passes_a(b, h, i, j + c) & passes_b(b, h, i, j + c)
                    & (bitcast<u32>(bias) != params.minus_infinity);
                x[c] = select(x[c], x[c] + bias, ruled);
                seen[c] = seen[c] & (passes | !ruled);
            }
        }
    }
    return Scores(x, seen & (bitcast<vec4<u32>>(x) != vec4<u32>(params.minus_infinity)));
}

// exp(x − peak) of what is seen; the floor keeps −∞ out of exp2, which some drivers get wrong.
fn weigh(scores: Scores, peak: f32) -> vec4<f32> {
    return select(vec4<f32>(), exp2(max((scores.x - peak) * LOG2_E, vec4<f32>(-200.0))), scores.seen);
}
