// y[at] = Σ_c x_c,  x_c ← factor · x_c + summand, `rounds` · LINKS times, from x_c = local + c
//
// Measures how fast an adapter does multiply-adds, in independent chains: enough of them to hide an instruction's
// latency, and few enough for the 16 registers of an x86 processor. Both numbers come from outside and the sum is
// stored, so that no compiler can remove anything. Each invocation does 2 · CHAINS · LINKS operations per round.

const CHAINS: u32 = 9u;
const LINKS: u32 = 32u;

struct Params {
    factor: f32,
    summand: f32,
    rounds: u32,
    workgroups: u32,
}

@group(0) @binding(1) var<storage, read_write> y: array<f32>;

// @use each_workgroup

fn run(index: u32, local: u32, lane: u32) {
    var x: array<f32, CHAINS>;
    // @unroll
    for (var c = 0u; c < CHAINS; c++) {
        x[c] = f32(local) + f32(c);
    }
    for (var n = 0u; n < params.rounds; n++) {
        // @unroll
        for (var l = 0u; l < LINKS; l++) {
            // @unroll
            for (var c = 0u; c < CHAINS; c++) {
                x[c] = fma(x[c], params.factor, params.summand);
            }
        }
    }
    var sum = 0.0;
    // @unroll
    for (var c = 0u; c < CHAINS; c++) {
        sum += x[c];
    }
    y[index * WORKGROUP + local] = sum;
}
