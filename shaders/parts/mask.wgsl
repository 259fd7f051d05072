// @for a 5
@group(0) @binding(5) var<storage, read> mask_a: array<u32>;
fn passes_a(b: u32, h: u32, i: u32, j: u32) -> bool {
    let at = element_at(params.rules.mask_a.view, vec4<u32>(b, h, i, j));
    return (((mask_a[at / 4u] >> (8u * (at % 4u))) & 255u) != 0u) == (params.rules.mask_a.keeps != 0u);
}
