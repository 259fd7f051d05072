//! What queries over a cache see: the cache's causal rule, or the caller's instead. On every device, against f64.

use crate::kit::{Call, Data, Order, assert_close, assert_close_to, assert_logs_close, devices, gpus, place};
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig, TokenPositions};
use wgpu_attention::problem::{Align, MaskMeaning, Positions};
use wgpu_attention::{Attention, Device, KvCache, KvCacheConfig, Mask, Result, ScatterMode, Tensor};

const TOLERANCE: f64 = 3e-6;
const BATCH: usize = 2;
const HEADS: [usize; 2] = [4, 2];
const KEYS: usize = 12;
const QUERIES: usize = 5;
const DIM: usize = 8;

/// The last queries of a cache's sequence, under `positions`.
fn call(positions: Positions) -> Call {
    let kv = [BATCH, HEADS[1], KEYS, DIM];
    Call { positions, ..Call::plain([BATCH, HEADS[0], QUERIES, DIM], kv, kv) }
}

fn tensor(device: &Device, shape: [usize; 4], data: &[f32]) -> Tensor {
    place(device, shape, data, Order::Bshd, 0).unwrap()
}

/// A cache that holds the keys and values of a call, and its queries.
fn filled(device: &Device, call: &Call, data: &Data, config: KvCacheConfig) -> (KvCache, Tensor) {
    let mut cache = KvCache::new(device, config).unwrap();
    cache.append(&tensor(device, call.k, &data.k), &tensor(device, call.v, &data.v)).unwrap();
    (cache, tensor(device, call.q, &data.q))
}

fn config() -> KvCacheConfig {
    KvCacheConfig::new(BATCH, HEADS[1], KEYS, DIM)
}

fn says<T>(name: &str, result: Result<T>, say: &str) {
    let Err(error) = result else { panic!("{name}: no error that says {say}") };
    assert!(error.to_string().contains(say), "{name}: {error}");
}

/// Every way to specify what queries see, and the resulting rule.
fn rules() -> Vec<(&'static str, Attention, Positions)> {
    let plain = || Positions { align: Align::BottomRight, ..Positions::default() };
    let causal = || Positions { causal: true, ..plain() };
    let new = Attention::new;
    let each = vec![9, 3];
    vec![
        ("default", new(), causal()),
        ("said aloud", new().causal(Align::BottomRight), causal()),
        ("not causal", new().not_causal(), plain()),
        ("not causal, after causal", new().causal(Align::TopLeft).not_causal(), Positions::default()),
        ("causal, after not causal", new().not_causal().causal(Align::BottomRight), causal()),
        ("top-left", new().causal(Align::TopLeft), Positions { align: Align::TopLeft, ..causal() }),
        ("an offset", new().causal(Align::Offset(3)), Positions { align: Align::Offset(3), ..causal() }),
        (
            "an offset each",
            new().causal(Align::PerBatch(vec![8, -2])),
            Positions { align: Align::PerBatch(vec![8, -2]), ..causal() },
        ),
        (
            "align with a window",
            new().align(Align::Offset(4)).window(Some(2), Some(1)),
            Positions { align: Align::Offset(4), window_left: Some(2), window_right: Some(1), ..plain() },
        ),
        ("window", new().window(Some(2), None), Positions { window_left: Some(2), ..causal() }),
        (
            "window to both sides",
            new().window(Some(2), Some(1)),
            Positions { window_left: Some(2), window_right: Some(1), ..plain() },
        ),
        ("window, not causal", new().window(Some(2), None).not_causal(), Positions { window_left: Some(2), ..plain() }),
        ("key lengths", new().key_lengths(each.clone()), Positions { key_lengths: Some(each.clone()), ..causal() }),
        (
            "key lengths, not causal",
            new().key_lengths(each.clone()).not_causal(),
            Positions { key_lengths: Some(each), ..plain() },
        ),
    ]
}

#[test]
fn the_callers_rules_hold() {
    for (name, device) in devices() {
        for (rule, attention, positions) in rules() {
            let call = call(positions);
            let data = call.data();
            let (truth, _) = call.truth(&data);
            let (cache, q) = filled(&device, &call, &data, config());
            let out = cache.attend(&attention.lse(true), &q).unwrap();
            let what = format!("{name}, {rule}");
            truth.hold_output(&what, &out.output, TOLERANCE);
            assert_logs_close(&what, &out.lse.unwrap(), &truth.lse, TOLERANCE);
        }
    }
}

#[test]
fn a_mask_replaces_the_causal_rule() {
    let bottom_right = |causal| Positions { align: Align::BottomRight, causal, ..Positions::default() };
    for (name, device) in devices() {
        for shape in [vec![QUERIES, KEYS], vec![BATCH, 1, QUERIES, KEYS], vec![KEYS], vec![1]] {
            for (causal, keeps_all) in [(false, true), (false, false), (true, false)] {
                let mut call = call(bottom_right(causal));
                call.masks = vec![(shape.clone(), MaskMeaning::Keep)];
                let mut data = call.data();
                if keeps_all {
                    data.masks[0].fill(true);
                }
                let (truth, _) = call.truth(&data);
                let (cache, q) = filled(&device, &call, &data, config());
                let attention = call.ruled(&device, &data, Attention::new()).unwrap();
                let attention = if causal { attention.causal(Align::BottomRight) } else { attention };
                let output = cache.attend(&attention, &q).unwrap().output;
                let what = format!("{name}, a mask {shape:?}, causal {causal}, keeps all {keeps_all}");
                truth.hold_output(&what, &output, TOLERANCE);
            }
        }
        // A step: both queries see both keys, weights 1/2 and 1/(1 + e) to e/(1 + e).
        let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 1, 4, 1)).unwrap();
        let x = Tensor::from_slice(&device, &[1, 1, 2, 1], &[0.0f32, 1.0]).unwrap();
        let keeps_all = Mask::keep_where(Tensor::from_bools(&device, &[2, 2], &[true; 4]).unwrap()).unwrap();
        let stepped = cache.step(&Attention::new().mask(keeps_all), &x, &x, &x).unwrap().output;
        let e = std::f64::consts::E;
        assert_close(&name, &stepped, &[0.5, e / (1.0 + e)], TOLERANCE);
        // Key padding, as a mask and as a bias, hides keys and does not replace the causal rule.
        let mut call = call(bottom_right(true));
        call.masks = vec![(vec![BATCH, 1, 1, KEYS], MaskMeaning::Hide)];
        call.biases = vec![vec![BATCH, 1, 1, KEYS]];
        let data = call.data();
        let (truth, _) = call.truth(&data);
        let (cache, q) = filled(&device, &call, &data, config());
        let padding = Tensor::from_bools(&device, &[BATCH, KEYS], &data.masks[0]).unwrap();
        let bias = Tensor::from_slice(&device, &[BATCH, KEYS], &data.biases[0]).unwrap();
        let attention = Attention::new().key_padding(Mask::hide_where(padding).unwrap()).key_padding_bias(bias);
        let output = cache.attend(&attention, &q).unwrap().output;
        truth.hold_output(&name, &output, TOLERANCE);
    }
}

#[test]
fn a_bias_for_several_queries_must_say_which_rule() {
    for (name, device) in devices() {
        for causal in [true, false] {
            let mut call = call(Positions { align: Align::BottomRight, causal, ..Positions::default() });
            call.biases = vec![vec![QUERIES, KEYS]];
            let data = call.data();
            let (truth, _) = call.truth(&data);
            let (cache, q) = filled(&device, &call, &data, config());
            let attention = call.ruled(&device, &data, Attention::new()).unwrap();
            says(&name, cache.attend(&attention, &q), "call causal(Align::BottomRight)");
            says(&name, cache.attend_lengths(&attention, &q, &[1, 3]), "3 queries of batch entry 1");
            let said = if causal { attention.causal(Align::BottomRight) } else { attention.not_causal() };
            let output = cache.attend(&said, &q).unwrap().output;
            truth.hold_output(&format!("{name}, causal {causal}"), &output, TOLERANCE);
        }
        // A single query is at the end of its sequence, so both rules are the same.
        let mut call = call(Positions::default());
        call.q[2] = 1;
        call.biases = vec![vec![1, KEYS]];
        let data = call.data();
        let (truth, _) = call.truth(&data);
        let (cache, q) = filled(&device, &call, &data, config());
        let attention = call.ruled(&device, &data, Attention::new()).unwrap();
        let output = cache.attend(&attention, &q).unwrap().output;
        truth.hold_output(&name, &output, TOLERANCE);
    }
}

/// Tokens `from..from + count` of row-major `[b, h, s, d]` data.
fn tokens(shape: [usize; 4], data: &[f32], from: usize, count: usize) -> ([usize; 4], Vec<f32>) {
    let [batch, heads, len, dim] = shape;
    let row = |n: usize| &data[(n * len + from) * dim..][..count * dim];
    ([batch, heads, count, dim], (0..batch * heads).flat_map(row).copied().collect())
}

/// `count` new tokens from position `from` on, over all keys up to the last of them.
fn chunk(whole: &Call, data: &Data, from: usize, count: usize, positions: Positions) -> (Call, Data) {
    let (q, q_data) = tokens(whole.q, &data.q, from, count);
    let (k, k_data) = tokens(whole.k, &data.k, 0, from + count);
    let (v, v_data) = tokens(whole.v, &data.v, 0, from + count);
    let positions = Positions { align: Align::Offset(from as i64), ..positions };
    (Call { q, k, v, positions, ..whole.clone() }, Data { q: q_data, k: k_data, v: v_data, ..data.clone() })
}

/// A sequence of text and images: the length of each block, and whether its tokens see each other in both directions.
const STORY: [(usize, bool); 9] =
    [(4, true), (1, false), (3, false), (1, false), (6, true), (2, false), (1, false), (5, true), (7, false)];

#[test]
fn image_tokens_see_each_other_and_text_is_causal() {
    let len = STORY.iter().map(|(count, _)| count).sum();
    let (q, kv) = ([BATCH, HEADS[0], len, DIM], [BATCH, HEADS[1], len, DIM]);
    let whole = Call::plain(q, kv, kv);
    let data = whole.data();
    for (name, device) in devices() {
        // Without a window, and with one that drops keys in between.
        for window in [None, Some(5)] {
            let capacity = if window.is_some() { 13 } else { len };
            let mut cache =
                KvCache::new(&device, KvCacheConfig::new(BATCH, HEADS[1], capacity, DIM).window(window)).unwrap();
            let mut at = 0;
            for (count, both_ways) in STORY {
                let rule = Positions { causal: !both_ways, window_left: window, ..Positions::default() };
                let (call, part) = chunk(&whole, &data, at, count, rule);
                let (truth, _) = call.truth(&part);
                let step = |shape, data: &[f32]| {
                    let (shape, data) = tokens(shape, data, at, count);
                    tensor(&device, shape, &data)
                };
                let attention = if both_ways { Attention::new().not_causal() } else { Attention::new() };
                let [q, k, v] = [step(whole.q, &data.q), step(whole.k, &data.k), step(whole.v, &data.v)];
                let output = cache.step(&attention, &q, &k, &v).unwrap().output;
                let what = format!("{name}, window {window:?}, {count} tokens at {at}");
                truth.hold_output(&what, &output, TOLERANCE);
                at += count;
            }
        }
    }
}

#[test]
fn rotary_positions_do_not_depend_on_the_rule() {
    let len: usize = STORY.iter().map(|(count, _)| count).sum();
    let (q, kv) = ([BATCH, HEADS[0], len, DIM], [BATCH, HEADS[1], len, DIM]);
    let whole = Call::plain(q, kv, kv);
    let data = whole.data();
    for (name, device) in devices() {
        let rotary = Rotary::new(&device, &RotaryConfig::new(DIM).pairing(Pairing::HalfSplit), len).unwrap();
        // Rotated by hand.
        let rotated = |shape: [usize; 4], data: &[f32]| {
            let x = Tensor::from_slice(&device, &shape, data).unwrap();
            rotary.rotate(&x, &TokenPositions::From(0)).unwrap().download().unwrap()
        };
        let by_hand = Data { q: rotated(whole.q, &data.q), k: rotated(whole.k, &data.k), ..data.clone() };
        for window in [None, Some(5)] {
            let capacity = if window.is_some() { 13 } else { len };
            let config = KvCacheConfig::new(BATCH, HEADS[1], capacity, DIM).window(window);
            let mut cache = KvCache::new(&device, config).unwrap().with_rotary(rotary.clone()).unwrap();
            let mut at = 0;
            for (n, (count, both_ways)) in STORY.into_iter().enumerate() {
                let rule = Positions { causal: !both_ways, window_left: window, ..Positions::default() };
                let (call, part) = chunk(&whole, &by_hand, at, count, rule);
                let (truth, _) = call.truth(&part);
                let step = |shape, data: &[f32]| {
                    let (shape, data) = tokens(shape, data, at, count);
                    tensor(&device, shape, &data)
                };
                let [q, k, v] = [step(whole.q, &data.q), step(whole.k, &data.k), step(whole.v, &data.v)];
                // Alternate between the ways to specify the rule; `align` may state the default.
                let held = cache.lengths()[0] as i64;
                let attention = match (both_ways, n % 2) {
                    (true, 0) => Attention::new().not_causal(),
                    (true, _) => Attention::new().mask(all(&device)),
                    (false, 0) => Attention::new().causal(Align::BottomRight),
                    (false, _) if window.is_none() => Attention::new().causal(Align::Offset(held)),
                    (false, _) => Attention::new(),
                };
                let output = cache.step(&attention, &q, &k, &v).unwrap().output;
                let what = format!("{name}, window {window:?}, {count} tokens at {at}");
                truth.hold_output(&what, &output, 2e-5);
                at += count;
            }
            let one = tensor(&device, [BATCH, HEADS[0], 1, DIM], &data.q[..BATCH * HEADS[0] * DIM]);
            let elsewhere = cache.attend(&Attention::new().causal(Align::TopLeft), &one);
            says(&name, elsewhere, "by which the cache's rotary rotates it, but the attention's align says 0");
            let many = Tensor::from_slice(&device, &[BATCH, HEADS[0], len + 1, DIM], &vec![0.5f32; (len + 1) * 64]);
            says(&name, cache.attend(&Attention::new().not_causal(), &many.unwrap()), "are no tokens of the cache");
        }
    }
}

/// A mask that keeps all keys.
fn all(device: &Device) -> Mask {
    Mask::keep_where(Tensor::from_bools(device, &[1, 1], &[true]).unwrap()).unwrap()
}

#[test]
fn queries_of_another_sequence_over_encoder_keys() {
    // More queries than keys, and sequences of different lengths.
    let held = [4, 9];
    let positions = Positions { key_lengths: Some(held.to_vec()), ..Positions::default() };
    let call = Call {
        positions,
        ..Call::plain([BATCH, HEADS[0], 20, DIM], [BATCH, HEADS[1], 9, DIM], [BATCH, HEADS[1], 9, DIM])
    };
    let data = call.data();
    let (truth, _) = call.truth(&data);
    for (name, device) in devices() {
        let mut cache = KvCache::new(&device, config()).unwrap();
        let (k, v) = (tensor(&device, call.k, &data.k), tensor(&device, call.v, &data.v));
        cache.append_lengths(&k, &v, &held).unwrap();
        let q = tensor(&device, call.q, &data.q);
        for attention in [Attention::new().not_causal(), Attention::new().mask(all(&device))] {
            let output = cache.attend(&attention, &q).unwrap().output;
            truth.hold_output(&name, &output, TOLERANCE);
        }
        says(&name, cache.attend(&Attention::new(), &q), "take not_causal() and no window");
        let sided = Attention::new().not_causal().window(Some(3), None);
        says(&name, cache.attend(&sided, &q), "take not_causal() and no window");
        says(
            &name,
            cache.attend(&Attention::new().key_lengths(vec![4, 10]), &q.narrow(2, 0, 1).unwrap()),
            "is more than",
        );
        // Fewer than the cache holds.
        let fewer = Positions { key_lengths: Some(vec![2, 0]), ..Positions::default() };
        let fewer = Call { positions: fewer, ..call.clone() };
        let attention = Attention::new().not_causal().key_lengths(vec![2, 0]);
        let output = cache.attend(&attention, &q).unwrap().output;
        fewer.truth(&data).0.hold_output(&name, &output, TOLERANCE);
    }
}

#[test]
fn lengths_of_their_own_under_the_callers_rules() {
    let (held, counts) = ([12, 7], [3, 5]);
    let offsets: Vec<i64> = vec![12 - 3, 7 - 5];
    for (name, device) in devices() {
        for (rule, attention, positions) in [
            ("default", Attention::new(), Positions { causal: true, ..Positions::default() }),
            (
                "bottom-right",
                Attention::new().causal(Align::BottomRight),
                Positions { causal: true, ..Default::default() },
            ),
            ("not causal", Attention::new().not_causal(), Positions::default()),
            ("a mask", Attention::new().mask(all(&device)), Positions::default()),
            (
                "a window",
                Attention::new().window(Some(1), Some(2)),
                Positions { window_left: Some(1), window_right: Some(2), ..Positions::default() },
            ),
        ] {
            let positions =
                Positions { align: Align::PerBatch(offsets.clone()), key_lengths: Some(held.to_vec()), ..positions };
            let call = call(positions);
            let data = call.data();
            let (truth, _) = call.truth(&data);
            let mut cache = KvCache::new(&device, config()).unwrap();
            let (k, v) = (tensor(&device, call.k, &data.k), tensor(&device, call.v, &data.v));
            cache.append_lengths(&k, &v, &held).unwrap();
            let q = tensor(&device, call.q, &data.q);
            let output = cache.attend_lengths(&attention, &q, &counts).unwrap().output.download().unwrap();
            for (row, got) in output.chunks(DIM).enumerate() {
                let (b, i) = (row / QUERIES / HEADS[0], row % QUERIES);
                if i < counts[b] {
                    let what = format!("{name}, {rule}, entry {b}");
                    let expected = &truth.output[row * DIM..][..DIM];
                    assert_close_to(&what, &(got, DIM), expected, |_, _| truth.values[row], TOLERANCE);
                }
            }
            // The queries within the length; the rest are 0.
            let attention = attention.query_lengths(counts.to_vec()).lse(true);
            let out = cache.attend_lengths(&attention, &q, &counts).unwrap();
            let (output, lse) = (out.output.download().unwrap(), out.lse.unwrap().download().unwrap());
            for (row, lse) in lse.iter().enumerate() {
                let (b, i) = (row / QUERIES / HEADS[0], row % QUERIES);
                let rows = row * DIM..(row + 1) * DIM;
                if i < counts[b] {
                    let got = (&output[rows.clone()], DIM);
                    assert_close_to(&name, &got, &truth.output[rows], |_, _| truth.values[row], TOLERANCE);
                } else {
                    assert_eq!((&output[rows], *lse), (&[0.0; DIM][..], f32::NEG_INFINITY), "{name}, {rule}");
                }
            }
        }
    }
}

#[test]
fn a_ring_continues_without_positions() {
    for (name, device) in devices() {
        let call = call(Positions::default());
        let mut data = call.data();
        let (mut cache, q) = filled(&device, &call, &data, config());
        // Three rows that wrap around: 11, 0 and 1.
        let (shape, new) = tokens(call.k, &data.v, 4, 3);
        let update = tensor(&device, shape, &new);
        cache.write(&[KEYS - 1; BATCH], &update, &update, ScatterMode::Circular).unwrap();
        for (n, row) in new.chunks(DIM).enumerate() {
            let at = (n / 3 * KEYS + [KEYS - 1, 0, 1][n % 3]) * DIM;
            data.k[at..][..DIM].copy_from_slice(row);
            data.v[at..][..DIM].copy_from_slice(row);
        }
        let (truth, _) = call.truth(&data);
        for attention in [Attention::new().not_causal(), Attention::new().mask(all(&device))] {
            let output = cache.attend(&attention, &q).unwrap().output;
            truth.hold_output(&name, &output, TOLERANCE);
        }
        for attention in [
            Attention::new(),
            Attention::new().causal(Align::TopLeft),
            Attention::new().window(Some(1), Some(1)),
            Attention::new().not_causal().window(Some(1), None),
        ] {
            says(&name, cache.attend(&attention, &q), "attend with a mask of your own or not_causal()");
        }
    }
}

#[test]
fn callers_rules_do_not_cover_dropped_keys() {
    for (name, device) in devices() {
        let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 1, 9, DIM).window(Some(3))).unwrap();
        let x = Tensor::from_slice(&device, &[1, 1, 4, DIM], &[0.5f32; 4 * DIM]).unwrap();
        for _ in 0..3 {
            cache.append(&x, &x).unwrap();
        }
        let (held, one) = (cache.lengths()[0], x.narrow(2, 0, 1).unwrap());
        assert!(held < cache.positions()[0]);
        says(&name, cache.attend(&Attention::new().causal(Align::TopLeft), &one), "the window dropped the keys before");
        says(&name, cache.attend(&Attention::new().key_lengths(vec![held - 1]), &one), "the window dropped");
        says(&name, cache.attend(&Attention::new().key_lengths(vec![12]), &one), "leave key_lengths out");
        cache.attend(&Attention::new().key_lengths(vec![held]), &one).unwrap();
        cache.attend(&Attention::new().causal(Align::Offset(held as i64 - 1)), &one).unwrap();
        let three = Align::PerBatch(vec![0; 3]);
        says(&name, cache.attend(&Attention::new().causal(three), &one), "3 entries for a batch of 1");
        says(&name, cache.attend(&Attention::new().key_lengths(vec![1; 3]), &one), "3 entries for a batch of 1");
    }
}

#[test]
fn rules_of_steps_in_a_callers_encoder() {
    let mut call = call(Positions::default());
    call.masks = vec![(vec![QUERIES, KEYS], MaskMeaning::Keep)];
    let data = call.data();
    let (truth, _) = call.truth(&data);
    let (k, v) = (tokens(call.k, &data.k, 0, KEYS - QUERIES), tokens(call.v, &data.v, 0, KEYS - QUERIES));
    let (new_k, new_v) =
        (tokens(call.k, &data.k, KEYS - QUERIES, QUERIES), tokens(call.v, &data.v, KEYS - QUERIES, QUERIES));
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        let mut cache = KvCache::new(&device, config()).unwrap();
        cache.append(&tensor(&device, k.0, &k.1), &tensor(&device, v.0, &v.1)).unwrap();
        let q = tensor(&device, call.q, &data.q);
        let (k, v) = (tensor(&device, new_k.0, &new_k.1), tensor(&device, new_v.0, &new_v.1));
        let attention = call.ruled(&device, &data, Attention::new()).unwrap().query_lengths(vec![QUERIES, 2]);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let out = cache.encode(&gpu, &mut encoder, &attention, &q, &k, &v, None, None).unwrap();
        // The tensor of lengths is dropped: no upload before the submit may reuse its memory.
        let noise: Vec<Tensor> = (0..40).map(|_| Tensor::from_bools(&device, &[64], &[true; 64]).unwrap()).collect();
        gpu.queue().submit([encoder.finish()]);
        drop(noise);
        let output = out.output.download().unwrap();
        for (row, got) in output.chunks(DIM).enumerate() {
            let (b, i) = (row / QUERIES / HEADS[0], row % QUERIES);
            if i < [QUERIES, 2][b] {
                let expected = &truth.output[row * DIM..][..DIM];
                assert_close_to(&name, &(got, DIM), expected, |_, _| truth.values[row], TOLERANCE);
            } else {
                assert_eq!(got, [0.0; DIM], "{name}");
            }
        }
    }
}
