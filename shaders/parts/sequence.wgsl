fn sequence_of(block: u32, b: u32) -> Sequence {
    return Sequence(b, b, block, 0u, params.slice.len_q, 0u, params.slice.len_k, params.keys_per_split);
}
