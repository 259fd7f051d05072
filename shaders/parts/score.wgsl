// The score of a pair: scale, softcap, bias by distance, biases in the order given, masks. Defined only here.
// @use rules, relative, tanh

const SOFTCAP: bool = true;
// True if there is a bias by distance.
const RELATIVE: bool = true;

struct Scores {
    x: vec4<f32>,
    // False for pairs that do not exist, are hidden, or have a score of −∞.
    seen: vec4<bool>,
}

// The distances of keys j, j + 1, … from query i.
fn distances(i: u32, j: u32, band: vec4<i32>) -> vec4<i32> {
    return vec4<i32>(0, 1, 2, 3)
        + vec4<i32>(i32(j + params.slice.key_0) - i32(i + params.slice.row_0) - band.w);
}

// The scores of four queries i and keys j, from their products; `by_distance` is their bias by distance.
fn scores_of(
    product: vec4<f32>, by_distance: vec4<f32>, b: u32, h: u32, i: vec4<u32>, j: vec4<u32>, band: vec4<i32>,
    masked: bool, is_pair: vec4<bool>,
) -> Scores {
    var x = product * params.rules.scale;
    if (SOFTCAP) {
        let is_nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
        x = select(params.rules.softcap * tanh_exact(x / params.rules.softcap), x, is_nan);
    }
    let rule = rule_of(b, h, i, j, band, masked);
    if (RELATIVE) {
        x += select(vec4<f32>(), by_distance, rule.maskable);
    }
    if (MASKED && masked) {
        x += rule.bias_a;
        if (TWO_BIASES) {
            x += rule.bias_b;
        }
    }
    return Scores(x, is_pair & rule.seen & (bitcast<vec4<u32>>(x) != vec4<u32>(params.minus_infinity)));
}
