// Y = Pᵀ·X, summed over the query heads of a group
// P [b, h, i, j]   X [b, h, i, d]   Y [b, h / group, j, d], row-major
//
// The gradients of values (P: weights, X: dO) and of keys (P: dS, X: queries). Each invocation sums four keys by COLS4 · 4
// columns in registers, over all queries that share the keys: BLOCK queries of each head of the group, then the next
// BLOCK. So a sum has the same order however queries are sliced, if slices are whole blocks. QUERIES are summed before
// they are added to the rest. With subgroups, SHARE lanes load different parts of X and broadcast them.
//
// Values of X that are not finite count only where P is not 0: a sum without them first, then their terms.

const QUERIES: u32 = 4u;
const COLS4: u32 = 4u;
const SHARE: u32 = 1u;
const BLOCK: u32 = 256u;
// Adds to what earlier slices of the queries left in Y.
const ACCUMULATE: bool = false;

const_assert COLS4 * QUERIES % SHARE == 0u && BLOCK % QUERIES == 0u;

alias XElem = f32;

struct Params {
    p: View,
    x: View,
    y_offset: u32,
    // Stride of Y from head to head, and from batch entry to batch entry.
    y_head_stride: u32,
    y_batch_stride: u32,
    heads_kv: u32,
    group: u32,
    len_q: u32,
    len_k: u32,
    dim: u32,
    key_blocks: u32,
    column_blocks: u32,
    workgroups: u32,
}

@group(0) @binding(1) var<storage, read> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> x: array<XElem>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

// @use each_workgroup, view, load(x dim true)

fn is_not_finite(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}

fn run(index: u32, local: u32, lane: u32) {
    let column = index % params.column_blocks * COLS4;
    let j = (index / params.column_blocks % params.key_blocks * WORKGROUP + local) * 4u;
    let bh = index / params.column_blocks / params.key_blocks;
    let b = bh / params.heads_kv;
    let head_kv = bh % params.heads_kv;
    // Lanes beyond the last key help to load.
    let j4 = min(j, (params.len_k - 1u) / 4u * 4u) / 4u;
    // The bounds are more than parameters; see README.md.
    let len_q = select(0u, params.len_q, b * params.heads_kv <= bh);
    let group = select(0u, params.group, b * params.heads_kv <= bh);

    var total: array<vec4<f32>, 4u * COLS4>;
    var has_not_finite = vec4<bool>();
    for (var first = 0u; first < len_q; first += BLOCK) {
        for (var g = 0u; g < group; g++) {
            let axes = vec3<u32>(b, head_kv * params.group + g, 0u);
            let p_head = row_at(params.p, axes);
            let x_head = row_at(params.x, axes);
            var sum: array<vec4<f32>, 4u * COLS4> = array<vec4<f32>, 4u * COLS4>();
            let end = min(first + BLOCK, len_q);
            for (var i = first; i < end; i += QUERIES) {
                var weight = array<vec4<f32>, QUERIES>();
                // @unroll
                for (var n = 0u; n < QUERIES; n++) {
                    let here = p[(p_head + min(i + n, end - 1u) * params.p.strides.z) / 4u + j4];
                    weight[n] = select(vec4<f32>(), here, i + n < end);
                }
                var loaded = vec4<f32>();
                // @unroll
                for (var e = 0u; e < COLS4; e++) {
                    var part = array<vec4<f32>, 4>();
                    // @unroll
                    for (var n = 0u; n < QUERIES; n++) {
                        if ((e * QUERIES + n) % SHARE == 0u) {
                            let place = e * QUERIES + n + lane;
                            let query = min(i + place % QUERIES, end - 1u);
                            loaded = load_x(x_head + query * params.x.strides.z, column + place / QUERIES);
                            has_not_finite = has_not_finite | is_not_finite(loaded);
                            loaded = select(loaded, vec4<f32>(), is_not_finite(loaded));
                        }
                        // @block share
                        let x4 = loaded;
                        // @end
                        // @unroll
                        for (var c = 0u; c < 4u; c++) {
                            part[c] = fma(vec4<f32>(weight[n][c]), x4, part[c]);
                        }
                    }
                    // @unroll
                    for (var c = 0u; c < 4u; c++) {
                        sum[c * COLS4 + e] += part[c];
                    }
                }
            }
            // @unroll
            for (var n = 0u; n < 4u * COLS4; n++) {
                total[n] += sum[n];
            }
        }
    }

    // @block any_not_finite
    let any_not_finite = any(has_not_finite);
    // @end
    if (any_not_finite) {
        for (var g = 0u; g < group; g++) {
            let axes = vec3<u32>(b, head_kv * params.group + g, 0u);
            let p_head = row_at(params.p, axes);
            let x_head = row_at(params.x, axes);
            for (var i = 0u; i < len_q; i++) {
                let weight = p[(p_head + i * params.p.strides.z) / 4u + j4];
                // @unroll
                for (var e = 0u; e < COLS4; e++) {
                    let x4 = load_x(x_head + i * params.x.strides.z, column + e);
                    // @unroll
                    for (var c = 0u; c < 4u; c++) {
                        let counts = is_not_finite(x4) & vec4<bool>(weight[c] != 0.0);
                        total[c * COLS4 + e] += select(vec4<f32>(), weight[c] * x4, counts);
                    }
                }
            }
        }
    }

    let y_at = params.y_offset + b * params.y_batch_stride + head_kv * params.y_head_stride;
    // @unroll
    for (var c = 0u; c < 4u; c++) {
        // @unroll
        for (var e = 0u; e < COLS4; e++) {
            if (j + c < params.len_k) {
                add_four(y_at + (j + c) * params.dim, (column + e) * 4u, total[c * COLS4 + e]);
            }
        }
    }
}

fn add_four(at: u32, first: u32, value: vec4<f32>) {
    // @unroll
    for (var e = 0u; e < 4u; e++) {
        if (first + e < params.dim) {
            y[at + first + e] = select(value[e], y[at + first + e] + value[e], ACCUMULATE);
        }
    }
}
