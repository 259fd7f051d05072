// Where the rows and keys of a workgroup lie.
struct Sequence {
    // Which band, and which step of the batch strides.
    index: u32,
    b: u32,
    row_block: u32,
    first_query: u32,
    len_q: u32,
    first_key: u32,
    len_k: u32,
    keys_per_split: u32,
}
