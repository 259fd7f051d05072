var<workgroup> shared_value: array<f32, WORKGROUP>;
