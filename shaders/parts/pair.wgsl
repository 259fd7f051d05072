@group(0) @binding(1) var<storage, read> out_a: array<f32>;
@group(0) @binding(2) var<storage, read> lse_a: array<f32>;
@group(0) @binding(5) var<storage, read> out_b: array<f32>;
@group(0) @binding(6) var<storage, read> lse_b: array<f32>;
fn lse_of(s: u32, row: u32, bhi: vec3<u32>) -> f32 {
    if (s == 0u) {
        return lse_a[params.a_lse_offset + dot(params.a_lse_strides, bhi)];
    }
    return lse_b[params.b_lse_offset + dot(params.b_lse_strides, bhi)];
}
fn part_of(s: u32, row: u32, bhi: vec3<u32>, column: u32) -> vec4<f32> {
    if (s == 0u) {
        let step = params.a_strides.w;
        let at = params.a_offset + dot(params.a_strides.xyz, bhi) + column * step;
        return vec4<f32>(out_a[at], out_a[at + step], out_a[at + 2u * step], out_a[at + 3u * step]);
    }
    let step = params.b_strides.w;
    let at = params.b_offset + dot(params.b_strides.xyz, bhi) + column * step;
    return vec4<f32>(out_b[at], out_b[at + step], out_b[at + 2u * step], out_b[at + 3u * step]);
}
