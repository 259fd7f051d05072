// One workgroup for each piece of work, numbered in two dimensions, because some adapters allow at most 65,535 in one.
const WORKGROUP: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    // @block lane_builtin
    // @end
) {
    // The index among the lanes that share their loads.
    // @block lane
    let lane = 0u;
    // @end
    let index = workgroup.y * workgroups.x + workgroup.x;
    if (index >= params.workgroups) {
        return;
    }
    run(index, local, lane);
}
