fn sequence_of(block: u32, b: u32) -> Sequence {
    let at = vec4<u32>(bands[params.slice.batch_0 + block]);
    let place = vec4<u32>(bands[2u * at.x]);
    return Sequence(at.x, 0u, at.y, place.x, place.y, place.z, place.w, u32(band_of(at.x).w));
}
