// What flash.wgsl and flash_tiled.wgsl share: parameters, buffers, and the rows and keys of a workgroup.
// @use each_workgroup, score, softmax_row, sink, sequence, block_mask, block_is_full, lse, not_finite
// @use load(q dim_k PADDED_K), load(k dim_k PADDED_K), rotary, load(v dim_v PADDED_V), store(o dim_v !PADDED_V)

const SINK: bool = true;
// True if the vec4s are wider than a key, and than a value.
const PADDED_K: bool = true;
const PADDED_V: bool = true;

alias QElem = f32;
alias KElem = f32;
alias VElem = f32;
alias OElem = f32;

struct Params {
    q: View,
    k: View,
    v: View,
    o: View,
    // Batch, head, row, split.
    lse: View,
    // Batch, head, block of rows, block of keys.
    block_mask: View,
    rules: Rules,
    slice: Slice,
    dim_k: u32,
    dim_v: u32,
    row_blocks: u32,
    splits: u32,
    keys_per_split: u32,
    // Stride from the output of one split to the next.
    o_split_stride: u32,
    sink_offset: u32,
    sink_stride: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
}

@group(0) @binding(1) var<storage, read> q: array<QElem>;
@group(0) @binding(2) var<storage, read> k: array<KElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;
@group(0) @binding(8) var<storage, read> v: array<VElem>;

// The position of a workgroup's rows and keys.
struct Sequence {
    // The index of the band, and of the batch strides.
    index: u32,
    b: u32,
    row_block: u32,
    first_query: u32,
    len_q: u32,
    first_key: u32,
    len_k: u32,
    keys_per_split: u32,
}

// The work of a workgroup. The rows of all heads that share keys are consecutive.
struct Work {
    band: vec4<i32>,
    b: u32,
    head_kv: u32,
    split: u32,
    first_row: u32,
    rows: u32,
    first_query: u32,
    len_q: u32,
    len_k: u32,
    k_base: u32,
    v_base: u32,
    mask_base: u32,
    // The keys of the split that any row can see by position.
    start: u32,
    end: u32,
}

fn work_of(index: u32) -> Work {
    let split = index % params.splits;
    let bh = index / (params.splits * params.row_blocks);
    let head_kv = bh % params.slice.heads_kv;
    let sequence = sequence_of((index / params.splits) % params.row_blocks, bh / params.slice.heads_kv);
    let band = band_of(sequence.index);
    let rows = params.slice.group * sequence.len_q;
    let first_row = sequence.row_block * BLOCK_ROWS;
    let keys = vec3<u32>(sequence.b, head_kv, sequence.first_key);

    let last_row = min(first_row + BLOCK_ROWS, rows) - 1u;
    let one_head = first_row / sequence.len_q == last_row / sequence.len_q;
    let first_query = select(0u, first_row % sequence.len_q, one_head);
    let last_query = select(sequence.len_q - 1u, last_row % sequence.len_q, one_head);
    let start = min(split * sequence.keys_per_split, sequence.len_k);
    let end = min(start + sequence.keys_per_split, sequence.len_k);
    let seen = keys_in_band(first_query, last_query, band, vec2<u32>(start, end), KEYS, sequence.len_k);
    return Work(
        band, sequence.b, head_kv, split, first_row, rows, sequence.first_query, sequence.len_q, sequence.len_k,
        row_at(params.k, keys), row_at(params.v, keys),
        row_at(params.block_mask, vec3<u32>(sequence.b, head_kv, sequence.row_block)), seen.x, seen.y,
    );
}

// Head and query of a row; beyond the last row, those of the last one.
fn row_of(work: Work, row: u32) -> vec2<u32> {
    let at = min(row, work.rows - 1u);
    return vec2<u32>(work.head_kv * params.slice.group + at / work.len_q, at % work.len_q);
}
fn place_of(work: Work, row: vec2<u32>) -> vec3<u32> {
    return vec3<u32>(work.b, row.x, work.first_query + row.y);
}
fn position_of(work: Work, query: u32) -> u32 {
    return u32(i32(query + params.slice.row_0) + work.band.w);
}
// Maximum, sum and largest bits of a row before any key: those of the sink in split 0, unless it is −∞, which means
// none.
struct Sums {
    peak: f32,
    total: f32,
    score_bits: u32,
}
fn first_sums(work: Work, h: u32) -> Sums {
    let score = sink_of(h);
    let is_there = SINK && work.split == 0u && bitcast<u32>(score) != params.minus_infinity;
    return Sums(
        select(LEAST, score, is_there), select(0.0, 1.0, is_there), select(0u, bitcast<u32>(score) & 0x7fffffffu, is_there),
    );
}
