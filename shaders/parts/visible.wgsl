// Whether query i may see key j, all rules together; a bias of −∞ hides too.
fn visible(b: u32, h: u32, i: u32, j: u32, band: vec4<i32>) -> bool {
    let row = i32(i + params.row_0);
    let key = i32(j + params.key_0);
    if (u32(key) >= params.ruled_keys) {
        return true;
    }
    if (BANDED && !(key < band.x && key >= row + band.y && key <= row + band.z)) {
        return false;
    }
    return passes_a(b, h, i, j) && passes_b(b, h, i, j)
        && bitcast<u32>(bias_at(b, h, i, j)) != params.minus_infinity;
}
