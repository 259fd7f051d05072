// One invocation for each of `total` elements. Workgroups lie in two dimensions: some adapters take 65,535 at most in
// one.
const WORKGROUP: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let at = (workgroup.y * workgroups.x + workgroup.x) * WORKGROUP + local;
    if (at >= params.total) {
        return;
    }
    run(at);
}
