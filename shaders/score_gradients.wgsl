// P = exp(X − LSE)   dX = P ∘ (dP + dW − D)   dS = scale · dX ∘ (1 − (C / cap)²)
// X, P [b, h, i, j]   dP, dS   C: capped scores   dX   LSE, D [b, h, i]   dW [b, h, i, j], any strides
//
// The softmax of the backward: its Jacobian times the gradient of the weights (Dao et al. 2022, "FlashAttention",
// appendix B.2), and the derivative of the softcap. P takes the place of X, dS that of dP. X holds −∞ where a key is
// hidden: there everything is 0, whatever dP and dW hold. One invocation per row and four keys.

// False if X holds P already.
const FROM_SCORES: bool = true;
// False if only P is computed.
const GRADIENTS: bool = true;
const SOFTCAP: bool = true;

// The weight of a visible key is above 0: then a NaN reaches all that depends on it, though exp gives 0.
const SMALLEST: f32 = 1.1754943508222875e-38;
const LOG2_E: f32 = 1.4426950408889634;

struct Params {
    lse: View,
    d: View,
    d_weights: View,
    heads: u32,
    len: u32,
    width4: u32,
    // Number of keys.
    keys: u32,
    total: u32,
    scale: f32,
    softcap: f32,
    d_weights_factor: f32,
    minus_infinity: u32,
    not_a_number: u32,
}

@group(0) @binding(1) var<storage, read_write> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> dp: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> d: array<f32>;

// @use each_element, view, axes, capped, d_weights, keep_dx

fn run(at: u32) {
    let axes = axes_of(at / params.width4);
    var weight = p[at];
    if (FROM_SCORES) {
        let is_seen = bitcast<vec4<u32>>(weight) != vec4<u32>(params.minus_infinity);
        let below = weight - vec4<f32>(lse[row_at(params.lse, axes)]);
        // Drivers differ on NaN in max and exp2.
        let is_nan = (bitcast<vec4<u32>>(below) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
        let seen = select(
            max(exp2(max(below * LOG2_E, vec4<f32>(-200.0))), vec4<f32>(SMALLEST)),
            vec4<f32>(bitcast<f32>(params.not_a_number)), is_nan,
        );
        weight = select(vec4<f32>(), seen, is_seen);
        p[at] = weight;
    }
    if (GRADIENTS) {
        let is_hidden = weight == vec4<f32>();
        let of_weight = dp[at] + d_weights_of(axes, at % params.width4 * 4u);
        let dx = select(weight * (of_weight - vec4<f32>(d[row_at(params.d, axes)])), vec4<f32>(), is_hidden);
        keep_dx(at, dx);
        var ds = params.scale * dx;
        if (SOFTCAP) {
            let ratio = capped_of(at) / params.softcap;
            ds = select(ds * fma(-ratio, ratio, vec4<f32>(1.0)), vec4<f32>(), is_hidden);
        }
        dp[at] = ds;
    }
}
