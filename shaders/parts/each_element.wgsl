// One invocation for each of `total` elements. Workgroups are numbered in two dimensions, because some adapters allow
// at most 65,535 in one.
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
