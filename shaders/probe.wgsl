// y[at] = Σ_c x_c,  x_c ← factor · x_c + summand, `rounds` · LINKS times, from x_c = local + c
//
// Measures what an adapter can multiply and add: chains of multiply-adds that do not wait for each other,
// enough to hide an instruction's latency and few enough to stay in registers. Both numbers come from
// outside and the sum is stored, so that no compiler can leave anything out. Per invocation and round
// 8 · CHAINS · LINKS operations.

const WORKGROUP: u32 = 64u;
const CHAINS: u32 = 4u;
const LINKS: u32 = 16u;

struct Params {
    factor: f32,
    summand: f32,
    rounds: u32,
    workgroups: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    if (index >= params.workgroups) {
        return;
    }
    let factor = vec4<f32>(params.factor);
    let summand = vec4<f32>(params.summand);
    var x: array<vec4<f32>, CHAINS>;
    // @unroll
    for (var c = 0u; c < CHAINS; c++) {
        x[c] = vec4<f32>(f32(local)) + vec4<f32>(0.0, 0.25, 0.5, 0.75) + f32(c);
    }
    for (var n = 0u; n < params.rounds; n++) {
        // @unroll
        for (var l = 0u; l < LINKS; l++) {
            // @unroll
            for (var c = 0u; c < CHAINS; c++) {
                x[c] = fma(x[c], factor, summand);
            }
        }
    }
    var sum = vec4<f32>();
    // @unroll
    for (var c = 0u; c < CHAINS; c++) {
        sum += x[c];
    }
    y[index * WORKGROUP + local] = sum.x + sum.y + sum.z + sum.w;
}
