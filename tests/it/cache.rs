//! The key/value cache and the merge of two results, on every device of this machine.

use crate::kit::{Call, Order, Truth, assert_close, assert_close_to, assert_logs_close, devices, gpus, noise, place};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::problem::{Align, Positions};
use wgpu_attention::{Attention, Device, Dtype, KvCache, KvCacheConfig, Result, ScatterMode, Tensor, merge};

const TOLERANCE: f64 = 3e-6;

/// Whole sequences, and the result of one causal pass over them.
struct Story {
    call: Call,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    truth: Truth,
}

impl Story {
    fn new([batch, heads_q, heads_kv, len]: [usize; 4], [dim_k, dim_v]: [usize; 2], window: Option<usize>) -> Story {
        let call = Call {
            q: [batch, heads_q, len, dim_k],
            k: [batch, heads_kv, len, dim_k],
            v: [batch, heads_kv, len, dim_v],
            order: Order::Bhsd,
            positions: Positions { causal: true, window_left: window, ..Default::default() },
            scale: None,
            softcap: None,
            masks: vec![],
            biases: vec![],
            sink: false,
            seed: 11,
        };
        let data = call.data();
        let (truth, _) = call.truth(&data);
        Story { q: data.q, k: data.k, v: data.v, truth, call }
    }

    /// Tokens `starts[b]..starts[b] + n` of every batch entry: Q, K and V. Tokens after the first `counts[b]` are NaN.
    fn tokens(&self, device: &Device, order: Order, starts: &[usize], n: usize, counts: &[usize]) -> [Tensor; 3] {
        let cut = |part: usize, shape: [usize; 4], data: &[f32]| {
            let [batch, heads, len, dim] = shape;
            let mut out = Vec::new();
            for b in 0..batch {
                for h in 0..heads {
                    for i in 0..n {
                        let first = ((b * heads + h) * len + starts[b] + i) * dim;
                        match i < counts[b] {
                            true => out.extend_from_slice(&data[first..][..dim]),
                            false => out.extend(vec![f32::NAN; dim]),
                        }
                    }
                }
            }
            place(device, [batch, heads, n, dim], &out, order, part).unwrap()
        };
        [cut(0, self.call.q, &self.q), cut(1, self.call.k, &self.k), cut(2, self.call.v, &self.v)]
    }

    /// Compares the first `counts[b]` queries with the truth from position `starts[b]` on.
    fn check(&self, what: &str, output: &[f32], lse: Option<&[f32]>, starts: &[usize], n: usize, counts: &[usize]) {
        let ([batch, heads, len, _], dim) = (self.call.q, self.call.v[3]);
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        let (mut got_lse, mut expected_lse, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..counts[b] {
                    let (row, truth) = ((b * heads + h) * n + i, (b * heads + h) * len + starts[b] + i);
                    got.extend_from_slice(&output[row * dim..][..dim]);
                    expected.extend_from_slice(&self.truth.output[truth * dim..][..dim]);
                    scales.push(self.truth.values[truth]);
                    got_lse.extend(lse.map(|lse| lse[row]));
                    expected_lse.extend(lse.map(|_| self.truth.lse[truth]));
                }
            }
        }
        assert_close_to(what, &(got, dim), &expected, |row, _| scales[row], TOLERANCE);
        assert_logs_close(what, &(got_lse, 1), &expected_lse, TOLERANCE);
    }
}

fn floats(device: &Device, shape: &[usize], value: f32) -> Tensor {
    Tensor::from_slice(device, shape, &vec![value; shape.iter().product()]).unwrap()
}

fn says<T>(name: &str, result: Result<T>, say: &str) {
    let Err(error) = result else { panic!("{name}: no error that says {say}") };
    assert!(error.to_string().contains(say), "{name}: {error}");
}

#[test]
fn a_thousand_steps_with_rollbacks_are_one_causal_pass() {
    let mut rng = Pcg64::seed_from_u64(1);
    // Before each step: rejected tokens (appended and rolled back), and accepted tokens rolled back.
    let mut len = 0;
    let steps: Vec<(usize, usize)> = (0..1000)
        .map(|_| {
            let refused = if rng.random_bool(0.2) { rng.random_range(1..4) } else { 0 };
            let back = if rng.random_bool(0.2) { rng.random_range(0..=len.min(5)) } else { 0 };
            len = len - back + 1;
            (refused, back)
        })
        .collect();
    let story = Story::new([1, 4, 2, 700], [8, 8], None);
    for (name, device) in devices() {
        let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 704, 8)).unwrap();
        let attention = Attention::new().lse(true);
        for &(refused, back) in &steps {
            let junk = floats(&device, &[1, 2, refused, 8], f32::NAN);
            cache.append(&junk, &junk).unwrap();
            cache.rollback(refused + back).unwrap();
            let at = cache.lengths();
            let [q, k, v] = story.tokens(&device, Order::Bhsd, &at, 1, &[1]);
            let step = cache.step(&attention, &q, &k, &v).unwrap();
            let (output, lse) = (step.output.download().unwrap(), step.lse.unwrap().download().unwrap());
            story.check(&format!("{name} at {}", at[0]), &output, Some(&lse), &at, 1, &[1]);
        }
        // Long enough that the keys are split.
        assert!(cache.lengths()[0] > 300, "{:?}", cache.lengths());
        let held = cache.lengths()[0];
        assert_eq!(cache.keys().unwrap().shape(), [1, 2, held, 8]);
        let keys = cache.keys().unwrap().download().unwrap();
        assert_eq!(keys[..held * 8], story.k[..held * 8], "{name}");
    }
}

#[test]
fn a_thousand_steps_allocate_nothing() {
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        for window in [None, Some(100)] {
            let mut cache = KvCache::new(&device, KvCacheConfig::new(2, 2, 600, 8).window(window)).unwrap();
            let attention = Attention::new().lse(true);
            let (q, token) = (floats(&device, &[2, 4, 1, 8], 0.5), floats(&device, &[2, 2, 1, 8], 0.25));
            let chunk = floats(&device, &[2, 2, 255, 8], 0.25);
            let mut rng = Pcg64::seed_from_u64(2);
            let mut run = |cache: &mut KvCache, steps: usize| {
                for _ in 0..steps {
                    let back = [0, 1].map(|_| if rng.random_bool(0.3) { rng.random_range(0..3) } else { 0 });
                    if cache.lengths().iter().all(|&len| len > 150 && len < 590) {
                        cache.rollback_lengths(&back).unwrap();
                    } else if window.is_none() && cache.lengths().contains(&600) {
                        cache.rollback(400).unwrap();
                    }
                    drop(cache.step(&attention, &q, &token, &token).unwrap());
                }
            };
            // Every length once: short, split, and with a window until old keys were dropped.
            for _ in 0..2 {
                cache.append(&chunk, &chunk).unwrap();
                run(&mut cache, 1);
            }
            run(&mut cache, 1000);
            let before = gpu.allocation_counts();
            run(&mut cache, 1000);
            gpu.wait().unwrap();
            assert_eq!(gpu.allocation_counts(), before, "{name}, window {window:?}");
        }
    }
}

#[test]
fn sequences_of_a_batch_have_their_own_lengths() {
    // Widths that are not multiples of a vec4, a prefill of several tokens, operands with arbitrary strides.
    let story = Story::new([3, 4, 2, 90], [5, 3], None);
    for (name, device) in devices() {
        for order in [Order::Bhsd, Order::Packed, Order::Bhds] {
            let mut cache = KvCache::new(&device, KvCacheConfig::new(3, 2, 90, 5).dim_v(3)).unwrap();
            let mut rng = Pcg64::seed_from_u64(3);
            for n in [9, 1, 1, 4, 1, 20] {
                let counts: Vec<usize> = (0..3).map(|_| rng.random_range(0..=n)).collect();
                let at = cache.lengths();
                let [q, k, v] = story.tokens(&device, order, &at, n, &counts);
                let what = format!("{name}, {order:?}, {counts:?} tokens at {at:?}");
                let together = Attention::new().lse(true);
                let step = cache.step_lengths(&together, &q, &k, &v, &counts).unwrap();
                let (output, lse) = (step.output.download().unwrap(), step.lse.unwrap().download().unwrap());
                story.check(&what, &output, Some(&lse), &at, n, &counts);
                // The same separately.
                cache.rollback_lengths(&counts).unwrap();
                cache.append_lengths(&k, &v, &counts).unwrap();
                let apart = cache.attend_lengths(&Attention::new(), &q, &counts).unwrap().output.download().unwrap();
                story.check(&what, &apart, None, &at, n, &counts);
                let ends: Vec<usize> = at.iter().zip(&counts).map(|(at, count)| at + count).collect();
                assert_eq!(cache.lengths(), ends);
            }
        }
    }
}

#[test]
fn a_window_slides_indefinitely() {
    for window in [6, 0] {
        let story = Story::new([2, 2, 1, 200], [8, 12], Some(window));
        for (name, device) in devices() {
            let config = KvCacheConfig::new(2, 1, 17, 8).dim_v(12).window(Some(window));
            let mut cache = KvCache::new(&device, config).unwrap();
            let mut rng = Pcg64::seed_from_u64(4);
            while cache.positions().iter().all(|&at| at < 180) {
                let n = [1, 1, 1, 3, 17 - window][rng.random_range(0..5)];
                let counts = [n, if rng.random_bool(0.7) { n } else { 0 }];
                let at = cache.positions();
                let [q, k, v] = story.tokens(&device, Order::Bshd, &at, n, &counts);
                let output = cache.step_lengths(&Attention::new(), &q, &k, &v, &counts).unwrap().output;
                let what = format!("{name}, window {window}, {counts:?} tokens at {at:?}");
                story.check(&what, &output.download().unwrap(), None, &at, n, &counts);
                let (lengths, positions) = (cache.lengths(), cache.positions());
                // Once keys were dropped, everything except the window can be rolled back.
                let most: Vec<usize> = (lengths.iter().zip(&positions))
                    .map(|(&len, &at)| if len == at { len } else { len - window })
                    .collect();
                for b in 0..2 {
                    let mut tokens = most.clone();
                    tokens[b] += 1;
                    says(&name, cache.rollback_lengths(&tokens), &format!("at most {}", most[b]));
                }
                assert_eq!(cache.positions(), positions, "{name}: a refused rollback changes nothing");
                if rng.random_bool(0.2) {
                    let back: Vec<usize> = most.iter().map(|&most| rng.random_range(0..=most.min(4))).collect();
                    cache.rollback_lengths(&back).unwrap();
                }
            }
            // As many queries as have their whole window in the cache, and one more.
            let (lengths, ends) = (cache.lengths(), cache.positions());
            assert!(lengths.iter().zip(&ends).all(|(&len, &end)| len <= 17 && len < end));
            let mut counts = [0, 1].map(|b| lengths[b] - window);
            let at: Vec<usize> = (0..2).map(|b| ends[b] - counts[b]).collect();
            let n = counts[0].max(counts[1]) + 1;
            let [q, ..] = story.tokens(&device, Order::Bhsd, &at, n, &counts);
            let output = cache.attend_lengths(&Attention::new(), &q, &counts).unwrap().output.download().unwrap();
            story.check(&format!("{name}, window {window}, the last {counts:?}"), &output, None, &at, n, &counts);
            counts[1] += 1;
            let say = format!("the last {} positions of batch entry 1 need", counts[1]);
            says(&name, cache.attend_lengths(&Attention::new(), &q, &counts), &say);
        }
    }
}

#[test]
fn a_narrower_window_of_one_call() {
    let story = Story::new([1, 2, 2, 40], [8, 8], Some(3));
    for (name, device) in devices() {
        let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 40, 8)).unwrap();
        let [q, k, v] = story.tokens(&device, Order::Bhsd, &[0], 40, &[40]);
        let attention = Attention::new().window(Some(3), None);
        let output = cache.step(&attention, &q, &k, &v).unwrap().output.download().unwrap();
        story.check(&name, &output, None, &[0], 40, &[40]);
    }
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let story = Story::new([1, 2, 1, 40], [8, 8], Some(4));
    for (name, device) in devices() {
        let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 1, 9, 8).window(Some(4))).unwrap();
        for at in 0..30 {
            let [q, k, v] = story.tokens(&device, Order::Bhsd, &[at], 1, &[1]);
            // Queries of another width: rejected after the append was recorded, including the dropped keys.
            let wrong = floats(&device, &[1, 2, 1, 4], 1.0);
            says(&name, cache.step(&Attention::new(), &wrong, &k, &v), "different widths");
            assert_eq!(cache.positions(), [at]);
            let output = cache.step(&Attention::new(), &q, &k, &v).unwrap().output.download().unwrap();
            story.check(&format!("{name} at {at}"), &output, None, &[at], 1, &[1]);
        }
    }
}

#[test]
fn steps_recorded_into_a_callers_encoder() {
    let story = Story::new([2, 2, 1, 40], [8, 8], Some(4));
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        let mut cache = KvCache::new(&device, KvCacheConfig::new(2, 1, 9, 8).window(Some(4))).unwrap();
        let mut kept = Vec::new();
        for round in 0..2 {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            for at in (0..15).map(|n| round * 15 + n) {
                let tokens = story.tokens(&device, Order::Bhsd, &[at, at], 1, &[1, 1]);
                let [q, k, v] = &tokens;
                let step = cache.encode(&gpu, &mut encoder, &Attention::new(), q, k, v, None, None).unwrap();
                kept.push((at, tokens, step.output));
            }
            // Old keys were dropped in between: an upload before the submit must not reuse their buffers.
            let noise: Vec<Tensor> = (0..40).map(|_| floats(&device, &[2, 1, 9, 8], f32::NAN)).collect();
            gpu.queue().submit([encoder.finish()]);
            drop(noise);
        }
        for (at, _, output) in &kept {
            story.check(&format!("{name} at {at}"), &output.download().unwrap(), None, &[*at, *at], 1, &[1, 1]);
        }
        let other = Device::Cpu;
        let mut on_cpu = KvCache::new(&other, KvCacheConfig::new(1, 1, 4, 8)).unwrap();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let x = floats(&other, &[1, 1, 1, 8], 0.0);
        says(&name, on_cpu.encode(&gpu, &mut encoder, &Attention::new(), &x, &x, &x, None, None), "lives on cpu");
    }
}

#[test]
fn rows_are_overwritten() {
    let (batch, heads, capacity, dim) = (3, 2, 7, 5);
    let mut rng = Pcg64::seed_from_u64(6);
    let shape = |rows| [batch, heads, rows, dim];
    for (name, device) in devices() {
        let mut model = noise(&mut rng, batch * heads * capacity * dim);
        let mut cache = KvCache::new(&device, KvCacheConfig::new(batch, heads, capacity, dim)).unwrap();
        let whole = Tensor::from_slice(&device, &shape(capacity), &model).unwrap();
        cache.append(&whole, &whole).unwrap();
        for (starts, rows, mode) in [
            ([0, 3, 5], 2, ScatterMode::Linear),
            ([5, 6, 7], 3, ScatterMode::Circular),
            ([0, 0, 0], 7, ScatterMode::Linear),
            ([1, 0, 6], 7, ScatterMode::Circular),
        ] {
            let update = noise(&mut rng, batch * heads * rows * dim);
            for (n, value) in update.iter().enumerate() {
                let (d, i, h, b) = (n % dim, n / dim % rows, n / dim / rows % heads, n / dim / rows / heads);
                model[((b * heads + h) * capacity + (starts[b] + i) % capacity) * dim + d] = *value;
            }
            let update = place(&device, shape(rows), &update, Order::Bshd, 0).unwrap();
            cache.write(&starts, &update, &update, mode).unwrap();
            for held in [cache.keys().unwrap(), cache.values().unwrap()] {
                assert_eq!(held.download().unwrap(), model, "{name}: {starts:?} {mode:?}");
            }
        }
        let one = floats(&device, &shape(1), 1.0);
        says(&name, cache.append(&one, &one), "no longer in order of position");
        says(&name, cache.rollback(1), "no longer in order of position");
        says(&name, cache.attend(&Attention::new(), &one), "no longer in order of position");
        cache.clear();
        says(&name, cache.write(&[0, 1, 0], &one, &one, ScatterMode::Linear), "starts[1] = 1 leaves a gap");
        says(&name, cache.write(&[0, 0], &one, &one, ScatterMode::Linear), "2 entries for a batch of 3");
        cache.write(&[0, 0, 0], &one, &one, ScatterMode::Linear).unwrap();
        assert_eq!(cache.lengths(), [1, 1, 1]);
        let seven = floats(&device, &shape(7), 1.0);
        let linear = cache.write(&[0, 1, 0], &seven, &seven, ScatterMode::Linear);
        says(&name, linear, "7 tokens from row 1 on of batch entry 1 do not fit capacity = 7");
        let eight = floats(&device, &shape(8), 1.0);
        let circular = cache.write(&[0, 1, 0], &eight, &eight, ScatterMode::Circular);
        says(&name, circular, "8 tokens from row 0 on of batch entry 0 do not fit capacity = 7");
    }
}

#[test]
fn a_view_keeps_its_contents_on_the_cpu() {
    let mut cache = KvCache::new(Device::Cpu, KvCacheConfig::new(1, 1, 8, 4)).unwrap();
    let token = |x| floats(&Device::Cpu, &[1, 1, 1, 4], x);
    cache.append(&token(1.0), &token(2.0)).unwrap();
    let keys = cache.keys().unwrap();
    cache.rollback(1).unwrap();
    cache.append(&token(3.0), &token(4.0)).unwrap();
    assert_eq!(keys.download().unwrap(), [1.0; 4]);
    assert_eq!(cache.keys().unwrap().download().unwrap(), [3.0; 4]);
    // Append the cache's own rows.
    let (keys, values) = (cache.keys().unwrap(), cache.values().unwrap());
    cache.append(&keys, &values).unwrap();
    assert_eq!(cache.values().unwrap().download().unwrap(), [4.0; 8]);
}

#[test]
fn a_half_type_cache_rounds_its_input() {
    for (name, device) in devices() {
        for (dtype, dim) in [(Dtype::F16, 8), (Dtype::BF16, 6), (Dtype::F16, 5)] {
            let mut cache =
                KvCache::new(&device, KvCacheConfig::new(1, 2, 8, dim).dtype(dtype).window(Some(3))).unwrap();
            let mut all: Vec<f32> = Vec::new();
            // Beyond the capacity: the newest rows move.
            for step in 0..13 {
                let row: Vec<f32> = (0..2 * dim).map(|i| ((step * 31 + i * 7) as f32 * 0.37).sin()).collect();
                let x = Tensor::from_slice(&device, &[1, 2, 1, dim], &row).unwrap();
                let y = cache.step(&Attention::new(), &x, &x, &x).unwrap();
                assert_eq!(y.output.shape(), [1, 2, 1, dim]);
                all.extend(row.iter().map(|&x| dtype.round(x)));
            }
            let held = cache.keys().unwrap();
            let len = held.shape()[2];
            assert!((4..=8).contains(&len), "{name}: {len}");
            let got = held.download().unwrap();
            let want: Vec<f32> = (0..2)
                .flat_map(|h| (13 - len..13).map(move |t| (h, t)))
                .flat_map(|(h, t)| all[(t * 2 + h) * dim..][..dim].to_vec())
                .collect();
            assert_eq!(got, want, "{name} {dtype}");
        }
    }
}

#[test]
fn wrong_calls_are_errors_with_the_numbers() {
    for (name, device) in devices() {
        let make = |config: KvCacheConfig| KvCache::new(&device, config);
        says(&name, make(KvCacheConfig::new(1, 1, 8, 4).window(Some(8))), "capacity = 8 must be more than window = 8");
        says(&name, make(KvCacheConfig::new(1, 1, 1 << 30, 4)), "capacity = 1073741824 is more than");
        says(&name, make(KvCacheConfig::new(usize::MAX, 2, 8, 4)), "does not fit in 64 bits");
        says(&name, make(KvCacheConfig::new(1, 1, 8, usize::MAX)), "does not fit in 64 bits");
        says(&name, make(KvCacheConfig::new(1, 1, 8, 4).dtype(Dtype::Bool)), "holds f32, f16 or bf16, not bool");
        says(&name, make(KvCacheConfig::new(1 << 15, 1 << 15, 1 << 15, 128)), "the key cache needs");

        let zeros = |shape: &[usize]| floats(&device, shape, 0.0);
        let mut cache = make(KvCacheConfig::new(2, 2, 8, 4)).unwrap();
        let five = zeros(&[2, 2, 5, 4]);
        cache.append(&five, &five).unwrap();
        says(
            &name,
            cache.append(&five, &five),
            "cache overflow: batch entry 0 holds 5 keys, 5 more do not fit capacity = 8",
        );
        says(&name, cache.rollback(6), "batch entry 0 cannot roll back 6 tokens, at most 5: it holds 5");
        says(&name, cache.rollback_lengths(&[1]), "1 entries for a batch of 2");
        let (one, two) = (zeros(&[2, 2, 1, 4]), zeros(&[2, 2, 2, 4]));
        says(&name, cache.append(&one, &two), "different lengths");
        says(&name, cache.append(&zeros(&[2, 1, 1, 4]), &one), "[2, 2, n, 4] is needed");
        says(&name, cache.append(&one, &zeros(&[2, 2, 1, 3])), "V [2, 2, 1, 3] does not fit the cache");
        says(&name, cache.append_lengths(&two, &two, &[1, 3]), "lengths[1] = 3 is more than the 2 tokens of K");
        says(&name, cache.append_lengths(&two, &two, &[1]), "1 entries for a batch of 2");
        let bools = Tensor::from_bools(&device, &[2, 2, 1, 4], &[true; 16]).unwrap();
        says(&name, cache.append(&bools, &one), "bool tensor");
        let attention = Attention::new();
        says(
            &name,
            cache.attend(&attention, &zeros(&[2, 4, 6, 4])),
            "the last 6 positions of batch entry 0 need 6 keys",
        );
        says(&name, cache.step(&attention, &two, &one, &one), "different lengths");
        says(&name, cache.attend(&attention, &zeros(&[2, 3, 1, 4])), "heads_q = 3 is not a multiple of heads_kv = 2");
        says(
            &name,
            cache.attend(&attention.clone().key_lengths(vec![5, 6]), &one),
            "key_lengths[1] = 6 is more than the 5 keys that batch entry 1 of the cache holds",
        );
        assert_eq!(cache.lengths(), [5, 5]);
        let mut windowed = make(KvCacheConfig::new(1, 1, 8, 4).window(Some(5))).unwrap();
        let four = zeros(&[1, 1, 4, 4]);
        windowed.append(&four, &four).unwrap();
        windowed.append(&four, &four).unwrap();
        says(&name, windowed.append(&four, &four), "append at most 3");
        says(&name, windowed.write(&[0], &four, &four, ScatterMode::Linear), "a cache with a window");
        if device.gpu().is_some() {
            says(&name, cache.append(&floats(&Device::Cpu, &[2, 2, 1, 4], 0.0), &one), "lives on");
            cache.rollback(4).unwrap();
            let own = (cache.keys().unwrap(), cache.values().unwrap());
            says(&name, cache.append(&own.0, &own.1), "a view of the cache itself");
        }
        // Empty input is valid: an empty chunk, an empty batch, an empty cache.
        let none = zeros(&[2, 2, 0, 4]);
        cache.append(&none, &none).unwrap();
        assert!(cache.attend(&attention, &none).unwrap().output.download().unwrap().is_empty());
        cache.clear();
        let nothing = cache.attend_lengths(&attention, &one, &[0, 0]).unwrap().output.download().unwrap();
        assert_eq!(nothing, [0.0; 16], "{name}");
        let mut empty = make(KvCacheConfig::new(0, 2, 8, 4)).unwrap();
        let x = zeros(&[0, 2, 1, 4]);
        assert_eq!(empty.step(&attention, &x, &x, &x).unwrap().output.shape(), [0, 2, 1, 4]);
        assert!(make(KvCacheConfig::new(1, 1, 0, 4)).unwrap().lengths() == [0]);
    }
}

/// Output and LSE of attention over `keys` of a call's keys.
fn part(call: &Call, device: &Device, [q, k, v]: &[Tensor; 3], keys: std::ops::Range<usize>) -> [Tensor; 2] {
    let narrow = |x: &Tensor| x.narrow(2, keys.start, keys.len()).unwrap();
    // The same causal rule, relative to the first key of the part.
    let attention = Attention::new().causal(Align::Offset(-(keys.start as i64))).lse(true);
    let attended = attention.forward(q, &narrow(k), &narrow(v)).unwrap();
    assert!(attended.output.device().name() == device.name() && call.q[2] == q.shape()[2]);
    [attended.output, attended.lse.unwrap()]
}

#[test]
fn two_results_merge_into_the_result_of_all_keys() {
    for (dims, order) in [([8, 8], Order::Bhsd), ([6, 7], Order::Bshd)] {
        let story = Story::new([2, 4, 2, 33], dims, None);
        for (name, device) in devices() {
            let tokens = story.tokens(&device, order, &[0, 0], 33, &[33, 33]);
            for cut in [0, 1, 20, 33] {
                // Queries before the cut see nothing of the second part: LSE −∞.
                let [a, lse_a] = part(&story.call, &device, &tokens, 0..cut);
                let [b, lse_b] = part(&story.call, &device, &tokens, cut..33);
                let whole = merge(&a, &lse_a, &b, &lse_b).unwrap();
                let what = format!("{name}, {order:?}, cut at {cut}");
                let lse = whole.lse.unwrap();
                assert_eq!((whole.output.shape(), lse.shape()), (&[2, 4, 33, dims[1]][..], &[2, 4, 33][..]));
                let (output, lse) = (whole.output.download().unwrap(), lse.download().unwrap());
                story.check(&what, &output, Some(&lse), &[0, 0], 33, &[33, 33]);
            }
        }
    }
}

#[test]
fn merging_with_empty_results_and_with_nan() {
    const NAN: f32 = f32::NAN;
    const NONE: f32 = f32::NEG_INFINITY;
    for (name, device) in devices() {
        let rows = |x: &[f32]| Tensor::from_slice(&device, &[x.len()], x).unwrap();
        let wide = |x: &[f32]| {
            let data: Vec<f32> = x.iter().flat_map(|&x| [x; 3]).collect();
            Tensor::from_slice(&device, &[x.len(), 3], &data).unwrap()
        };
        // A part with LSE −∞ has no weight, whatever it holds; NaN and +∞ affect only their rows.
        let a = ([1.0, NAN, 5.0, NAN, NAN, 1.0, 1.0, 4.0], [0.0, NONE, NONE, NONE, 0.0, NAN, f32::INFINITY, 1e30]);
        let b = ([3.0, 2.0, NAN, NAN, 1.0, 1.0, 1.0, 2.0], [0.0, 1.0, NONE, NONE, 0.0, 0.0, 0.0, -1e30]);
        let merged = merge(&wide(&a.0), &rows(&a.1), &wide(&b.0), &rows(&b.1)).unwrap();
        let output: Vec<f64> =
            [2.0, 2.0, 0.0, 0.0, f64::NAN, f64::NAN, f64::NAN, 4.0].iter().flat_map(|&x| [x; 3]).collect();
        let none = f64::NEG_INFINITY;
        let lse = [2.0f64.ln(), 1.0, none, none, 2.0f64.ln(), f64::NAN, f64::NAN, 1e30];
        assert_close(&name, &merged.output, &output, 1e-6);
        assert_logs_close(&name, &merged.lse.unwrap(), &lse, 1e-6);

        let (x, y) = (wide(&[1.0, 2.0]), rows(&[1.0, 2.0]));
        says(&name, merge(&x, &y, &wide(&[1.0]), &rows(&[1.0])), "output a [2, 3] and output b [1, 3] differ");
        says(&name, merge(&x, &y, &x, &rows(&[1.0])), "LSE b [1] must be [2]");
        says(&name, merge(&x, &x, &x, &y), "LSE a [2, 3] must be [2]");
        says(&name, merge(&y, &y, &y, &y), "at least two axes");
        let empty = merge(&wide(&[]), &rows(&[]), &wide(&[]), &rows(&[])).unwrap();
        assert_eq!((empty.output.shape(), empty.lse.unwrap().shape()), (&[0, 3][..], &[0][..]));
        if device.gpu().is_some() {
            says(
                &name,
                merge(&x, &y, &Tensor::from_slice(Device::Cpu, &[2, 3], &[0.0f32; 6]).unwrap(), &y),
                "lives on cpu",
            );
        }
    }
}
