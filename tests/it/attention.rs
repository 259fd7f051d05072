//! Attention on every device of this machine, against the f64 truth.

use crate::kit::{self, Call, Order, assert_close, assert_logs_close, bits, devices, gpus, methods_in_turn, noise};
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{
    Align, Attention, Device, Dtype, EmptyRows, Inspect, Mask, Method, ScoreStage, Tensor, Tile, Weights,
};

/// Relative to the largest value of a result.
const TOLERANCE: f64 = 3e-6;

#[test]
fn random_calls_match_the_truth() {
    for (name, device) in devices().into_iter().chain(kit::as_gpus()) {
        // On an adapter each call compiles its own kernels, for seconds if no driver cache is warm. Therefore the quick
        // suite of `attn check`, in the program's tests, draws many calls for few kernels.
        let calls = if matches!(device, Device::Cpu) { 400 } else { 5 };
        for seed in 0..calls {
            Call::random(seed).check(&name, &device, TOLERANCE);
        }
    }
}

#[test]
fn small_rows_beside_large_ones() {
    // Values of heads and batch entries differ by 1e4, and so do scores of queries: each row is judged by its own
    // scale.
    let positions = Positions { causal: true, align: Align::BottomRight, ..Default::default() };
    for len_k in [60, 700] {
        let len_q = if len_k == 60 { 21 } else { 2 };
        let call = Call {
            positions: positions.clone(),
            ..Call::plain([2, 4, len_q, 16], [2, 2, len_k, 16], [2, 2, len_k, 20])
        };
        let mut data = call.data();
        for (at, x) in data.v.iter_mut().enumerate() {
            *x *= [1.0, 1e-4, 1e4][at / (20 * len_k) % 3];
        }
        for (at, x) in data.q.iter_mut().enumerate() {
            *x *= [1.0, 1e-4, 1e-8, 3.0][at / 16 % 4];
        }
        let (truth, stages) = call.truth(&data);
        for (name, device) in devices() {
            for method in methods_in_turn(&device, len_k, 4) {
                let what = format!("{len_k} keys by {method} on {name}");
                let attention = call.attention().lse(true).method(method);
                truth.hold(&what, &call.run(&device, &data, attention).unwrap(), TOLERANCE);
            }
            let all = call.attention().weights(Weights::PerHead).scores(Some(ScoreStage::Masked));
            let all = call.run(&device, &data, all).unwrap();
            truth.hold(&name, &all, TOLERANCE);
            truth.hold_scores(&name, &all.scores.unwrap(), &stages[2], TOLERANCE);
        }
    }
}

#[test]
fn every_width_up_to_512() {
    for (name, device) in devices() {
        // Every width on the CPU, but not on adapters, where each width compiles its own kernels.
        let widths: Vec<usize> = match device {
            Device::Cpu => (1..=512).collect(),
            _ => vec![6, 63, 257, 512],
        };
        for dim in widths {
            let call = Call::plain([1, 1, 5, dim], [1, 1, 9, dim], [1, 1, 9, dim]);
            if matches!(device, Device::Cpu) || [63, 512].contains(&dim) {
                call.check(&name, &device, TOLERANCE);
            } else {
                call.check_output(&name, &device, Method::Auto, TOLERANCE);
            }
        }
    }
}

#[test]
fn sixty_five_thousand_keys() {
    // The last queries of a long sequence; every key before them is seen.
    let call = Call {
        positions: Positions { causal: true, align: Align::BottomRight, ..Default::default() },
        ..Call::plain([1, 1, 16, 64], [1, 1, 65_536, 64], [1, 1, 65_536, 64])
    };
    for (name, device) in devices() {
        call.check_output(&name, &device, Method::Auto, TOLERANCE);
    }
}

#[test]
fn empty_axes_are_valid() {
    for (name, device) in devices() {
        Call::plain([0, 2, 3, 4], [0, 2, 5, 4], [0, 2, 5, 4]).check(&name, &device, TOLERANCE);
        Call::plain([2, 2, 0, 4], [2, 2, 5, 4], [2, 2, 5, 4]).check(&name, &device, TOLERANCE);
        Call::plain([2, 2, 3, 4], [2, 2, 0, 4], [2, 2, 0, 4]).check(&name, &device, TOLERANCE);
        Call::plain([2, 0, 3, 4], [2, 0, 5, 4], [2, 0, 5, 4]).check(&name, &device, TOLERANCE);
        let strided = Call { order: Order::Bshd, ..Call::plain([2, 2, 3, 4], [2, 1, 0, 4], [2, 1, 0, 6]) };
        strided.check(&name, &device, TOLERANCE);
    }
}

#[test]
fn contents_of_masked_keys_do_not_change_a_bit() {
    let call = Call {
        masks: vec![(vec![2, 1, 20, 33], MaskMeaning::Keep)],
        positions: Positions { key_lengths: Some(vec![30, 17]), ..Default::default() },
        ..Call::plain([2, 2, 20, 12], [2, 1, 33, 12], [2, 1, 33, 12])
    };
    let clean = call.data();
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        let mut data = clean.clone();
        for b in 0..2 {
            let hidden = |j: usize| (0..20).all(|i| !clean.masks[0][(b * 20 + i) * 33 + j]);
            for j in (0..33).filter(|&j| j >= [30, 17][b] || hidden(j)) {
                data.k[(b * 33 + j) * 12..][..12].fill(poison);
                data.v[(b * 33 + j) * 12..][..12].fill(poison);
            }
        }
        for (name, device) in devices() {
            let attention = || call.attention().lse(true).weights(Weights::PerHead);
            let expected = call.run(&device, &clean, attention()).unwrap();
            let actual = call.run(&device, &data, attention()).unwrap();
            let part = |t: &Tensor| bits(&t.download().unwrap());
            assert_eq!(part(&actual.output), part(&expected.output), "{name} {poison}");
            assert_eq!(part(&actual.lse.unwrap()), part(&expected.lse.unwrap()), "{name} {poison}");
            assert_eq!(part(&actual.weights.unwrap()), part(&expected.weights.unwrap()), "{name} {poison}");
        }
    }
}

#[test]
fn fully_masked_tiles_are_skipped() {
    // Documents packed in one sequence: a block-diagonal mask, for all heads or only for some; alone, with a band, with
    // an additive −∞, and with a padded batch of one query.
    let (len, dim) = (200, 20);
    for (name, gpu) in gpus() {
        let device = Device::from(&gpu);
        for (heads, masked_heads, decode) in [(6, 1, false), (6, 6, false), (4, 1, true)] {
            let len_q = if decode { 1 } else { len };
            let (q, kv) = ([2, heads, len_q, dim], [2, heads / 2, len, dim]);
            for causal in [false, true] {
                let positions = Positions { causal, align: Align::BottomRight, ..Positions::default() };
                let mut call = Call { positions, ..Call::plain(q, kv, kv) };
                let shape = vec![2, masked_heads, len_q, len];
                let starts = [0, 40, 41, 133, len];
                let document = |at: usize| starts.iter().filter(|&&start| start <= at).count();
                let keep: Vec<bool> = (0..shape.iter().product::<usize>())
                    .map(|at| {
                        let (i, j) = (at / len % len_q, at % len);
                        if decode { j >= 70 && j < 128 + at / len } else { document(i) == document(j) }
                    })
                    .collect();
                for additive in [false, true] {
                    let mut data = call.data();
                    if additive {
                        call.biases = vec![shape.clone()];
                        data.biases =
                            vec![keep.iter().map(|&keep| if keep { 0.5 } else { f32::NEG_INFINITY }).collect()];
                        (call.masks, data.masks) = (vec![], vec![]);
                    } else {
                        call.masks = vec![(shape.clone(), MaskMeaning::Keep)];
                        data.masks = vec![keep.clone()];
                    }
                    let (truth, _) = call.truth(&data);
                    let what = format!("{name}, {masked_heads} of {heads} heads, causal {causal}, additive {additive}");
                    let out = call.run(&device, &data, call.attention().lse(true)).unwrap();
                    truth.hold_output(&what, &out.output, TOLERANCE);
                    assert_logs_close(&what, &out.lse.unwrap(), &truth.lse, TOLERANCE);
                }
            }
        }
        let made = gpu.kernels();
        for part in ["block_mask/mask", "block_mask/bias"] {
            assert!(made.iter().any(|kernel| kernel.starts_with(part)), "{name}: {made:?}");
        }
        assert!(made.iter().any(|kernel| kernel.contains("/mask/block_mask")), "{name}: {made:?}");
    }
}

#[test]
fn non_finite_inputs_reach_exactly_their_dependents() {
    // Causal: row i depends on keys 0..=i. Compare each poison value with the truth.
    let call = Call {
        positions: Positions { causal: true, ..Default::default() },
        ..Call::plain([1, 2, 40, 8], [1, 2, 40, 8], [1, 2, 40, 8])
    };
    for (name, device) in devices() {
        for poison in [f32::NAN, f32::INFINITY] {
            for at in 0..3 {
                let mut data = call.data();
                [&mut data.q, &mut data.k, &mut data.v][at][8 * 21 + 3] = poison;
                let (truth, _) = call.truth(&data);
                let run = call.run(&device, &data, call.attention()).unwrap();
                let output = run.output.download().unwrap();
                for (j, (a, e)) in output.iter().zip(&truth.output).enumerate() {
                    let row = j / 8 % 40;
                    assert_eq!(
                        a.is_finite(),
                        e.is_finite(),
                        "{name}: {poison} in operand {at}, [{j}] row {row}: {a} {e}"
                    );
                }
            }
        }
    }
}

#[test]
fn same_bits_every_run_and_in_every_batch() {
    const BATCH: usize = 7;
    let call = Call::plain([BATCH, 2, 37, 24], [BATCH, 2, 51, 24], [BATCH, 2, 51, 24]);
    let data = call.data();
    for (name, device) in devices() {
        let mut methods = vec![Method::Auto, Method::ThreePasses];
        if let Some(gpu) = device.gpu() {
            methods.extend(Tile::candidates(&call.problem(), gpu.capabilities(), 4).into_iter().map(Method::Tile));
        }
        for method in methods {
            same_bits(&call, &data, &format!("{name}, {method:?}"), &device, method);
        }
    }

    fn same_bits(call: &Call, data: &kit::Data, name: &str, device: &Device, method: Method) {
        let attention = || call.attention().method(method);
        let all = call.run(device, data, attention()).unwrap().output.download().unwrap();
        for _ in 0..20 {
            let again = call.run(device, data, attention()).unwrap().output.download().unwrap();
            assert_eq!(bits(&again), bits(&all), "{name}");
        }
        for b in 0..BATCH {
            let part = |x: &[f32], n: usize| x[b * n..][..n].to_vec();
            let mut one = data.clone();
            (one.q, one.k, one.v) =
                (part(&data.q, 2 * 37 * 24), part(&data.k, 2 * 51 * 24), part(&data.v, 2 * 51 * 24));
            let single = Call::plain([1, 2, 37, 24], [1, 2, 51, 24], [1, 2, 51, 24]);
            let alone = single.run(device, &one, attention()).unwrap().output.download().unwrap();
            assert_eq!(bits(&alone), bits(&part(&all, 2 * 37 * 24)), "{name}, batch entry {b}");
        }
    }
}

/// Two biases of ±2²⁸, added one after the other, round a small score to 0, so all keys have the same weight. Added to
/// each other first, they would leave the score unchanged.
#[test]
fn two_biases_are_added_one_after_the_other() {
    let shape = [1, 2, 5, 8];
    let [q, k] = [1, 2].map(|seed| noise(&mut Pcg64::seed_from_u64(seed), 80));
    for (name, device) in devices() {
        if device.gpu().is_some_and(|gpu| gpu.capabilities().max_storage_buffers < 10) {
            continue;
        }
        let q = Tensor::from_slice(&device, &shape, &q).unwrap();
        let k = Tensor::from_slice(&device, &shape, &k).unwrap();
        let bias = |shape: &[usize], value: f32| {
            Tensor::from_slice(&device, shape, &vec![value; shape.iter().product()]).unwrap()
        };
        for method in methods_in_turn(&device, 0, usize::MAX) {
            let attention = Attention::new()
                .scale(0.1)
                .method(method)
                .bias(bias(&[1, 5], (1 << 28) as f32))
                .bias(bias(&[2, 5, 1], -(1 << 28) as f32))
                .weights(Weights::PerHead)
                .lse(true);
            let attended = attention.forward(&q, &k, &k).unwrap();
            let lse = attended.lse.unwrap().download().unwrap();
            assert!(lse.iter().all(|lse| (lse - 5f32.ln()).abs() < 1e-6), "{name}, {method}: {lse:?}");
            let weights = attended.weights.unwrap().download().unwrap();
            assert!(weights.iter().all(|weight| (weight - 0.2).abs() < 1e-6), "{name}, {method}: {weights:?}");
        }
    }
}

#[test]
fn a_thousand_forwards_allocate_nothing() {
    let call = Call::plain([2, 2, 16, 16], [2, 2, 24, 16], [2, 2, 24, 16]);
    let data = call.data();
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
            .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
        let attention = Attention::new().causal(Align::PerBatch(vec![3, 8])).lse(true).weights(Weights::PerHead);
        drop(attention.forward(&q, &k, &v).unwrap());
        let before = gpu.allocation_counts();
        for _ in 0..1000 {
            drop(attention.forward(&q, &k, &v).unwrap());
        }
        gpu.wait().unwrap();
        assert_eq!(gpu.allocation_counts(), before, "{name}");
    }
}

#[test]
fn softmax_over_every_axis() {
    let mut rng = Pcg64::seed_from_u64(9);
    let data = noise(&mut rng, 3 * 4 * 5);
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[3, 4, 5], &data).unwrap();
        for axis in -3..3isize {
            let at = axis.rem_euclid(3) as usize;
            let step = [20, 5, 1][at];
            let width = [3, 4, 5][at];
            let expected: Vec<f64> = (0..60)
                .map(|i| {
                    let first = i - i / step % width * step;
                    let e = |j: usize| f64::from(data[first + j * step]).exp();
                    f64::from(data[i]).exp() / (0..width).map(e).sum::<f64>()
                })
                .collect();
            let y = wgpu_attention::softmax(&x, axis).unwrap();
            assert_close(&format!("axis {axis} on {name}"), &y, &expected, 1e-6);
        }
        assert!(wgpu_attention::softmax(&x, 3).is_err() && wgpu_attention::softmax(&x, -4).is_err());
    }
}

#[test]
fn work_recorded_into_a_callers_encoder() {
    let call = Call::plain([2, 2, 19, 16], [2, 2, 23, 16], [2, 2, 23, 12]);
    let data = call.data();
    let (truth, _) = call.truth(&data);
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
            .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
        // The caller's output buffer, [b, s, h, d], surrounded by NaN.
        let bytes: Vec<u8> = [f32::NAN; 64]
            .iter()
            .chain(&[0.0; 2 * 19 * 2 * 12])
            .chain(&[f32::NAN; 64])
            .flat_map(|x| x.to_le_bytes())
            .collect();
        use wgpu_attention::wgpu::BufferUsages as Usage;
        let buffer = gpu.device().create_buffer(&wgpu_attention::wgpu::BufferDescriptor {
            label: None,
            size: bytes.len() as u64,
            usage: Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST,
            mapped_at_creation: false,
        });
        gpu.queue().write_buffer(&buffer, 0, &bytes);
        let strides = [19 * 2 * 12, 12, 2 * 12, 1];
        let out = Tensor::from_wgpu(&gpu, &buffer, &[2, 2, 19, 12], &strides, 64, wgpu_attention::Dtype::F32).unwrap();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let kept: Vec<_> =
            (0..3).map(|_| Attention::new().encode(&gpu, &mut encoder, &q, &k, &v, Some(&out)).unwrap()).collect();
        // Uploads before the submit must not disturb what was recorded.
        let noise: Vec<Tensor> =
            (0..20).map(|_| Tensor::from_slice(&device, &[4096], &[9.0f32; 4096]).unwrap()).collect();
        gpu.queue().submit([encoder.finish()]);
        truth.hold_output(&name, &out, TOLERANCE);
        let whole = Tensor::from_wgpu(&gpu, &buffer, &[bytes.len() / 4], &[1], 0, wgpu_attention::Dtype::F32).unwrap();
        let whole = whole.download().unwrap();
        assert!(whole[..64].iter().chain(&whole[whole.len() - 64..]).all(|x| x.is_nan()), "{name}: wrote outside");
        assert!(
            noise.iter().all(|t| t.download().unwrap().iter().all(|&x| x == 9.0)),
            "{name}: an upload was overwritten"
        );
        drop(kept);
    }
}

#[test]
fn wrong_calls_are_errors_with_the_numbers() {
    for (name, device) in devices() {
        let zeros =
            |shape: &[usize]| Tensor::from_slice(&device, shape, &vec![0.0f32; shape.iter().product()]).unwrap();
        let x = zeros(&[2, 4, 3, 8]);
        let bools = |shape: &[usize]| Tensor::from_bools(&device, shape, &vec![true; shape.iter().product()]).unwrap();
        let expect = |result: wgpu_attention::Result<wgpu_attention::Attended>, say: &str| {
            let message = result.expect_err(say).to_string();
            assert!(message.contains(say), "{name}: {message}");
        };
        let plain = Attention::new();
        expect(plain.forward(&x, &zeros(&[2, 4, 5, 8]), &zeros(&[2, 4, 6, 8])), "different lengths");
        expect(
            plain.forward(&x, &zeros(&[2, 3, 5, 8]), &zeros(&[2, 3, 5, 8])),
            "heads_q = 4 is not a multiple of heads_kv = 3",
        );
        expect(plain.forward(&zeros(&[8]), &x, &x), "at least two axes");
        expect(plain.forward(&bools(&[2, 4, 3, 8]), &x, &x), "bool tensor");
        let mask = Mask::keep_where(bools(&[5, 3])).unwrap();
        expect(
            plain.clone().mask(mask).forward(&x, &x, &x),
            "[5, 3] does not broadcast to [batch, heads_q, len_q, len_k] = [2, 4, 3, 3]",
        );
        expect(plain.clone().bias(zeros(&[7])).forward(&x, &x, &x), "does not broadcast");
        expect(plain.clone().softcap(-1.0).forward(&x, &x, &x), "softcap = -1");
        expect(plain.clone().scale(f32::NAN).forward(&x, &x, &x), "scale = NaN");
        expect(plain.clone().key_lengths(vec![1]).forward(&x, &x, &x), "key_lengths has 1 entries");
        expect(plain.clone().key_lengths(vec![1, 4]).forward(&x, &x, &x), "key_lengths[1] = 4 is more than len_k = 3");
        assert!(Mask::keep_where(x.clone()).unwrap_err().to_string().contains("bias"));
        assert!(Tensor::from_slice(&device, &[2, 3], &[0.0f32; 5]).is_err());
        assert!(Tensor::from_slice(&device, &[usize::MAX, 3], &[0.0f32; 5]).is_err());
        if device.gpu().is_some() {
            let other = Tensor::from_slice(Device::Cpu, &[2, 4, 3, 8], &[0.0f32; 192]).unwrap();
            expect(plain.forward(&x, &other, &x), "lives on cpu");
        }
    }
}

#[test]
fn queries_beyond_their_lengths_see_nothing() {
    // Alone, and combined with everything else: grouped heads, weights, an inspection, a sink.
    let lengths = vec![7, 0, 20];
    let (q, kv) = ([3, 4, 20, 12], [3, 2, 33, 12]);
    let mut plain = Call::plain(q, kv, kv);
    // The rule as an explicit mask.
    plain.masks = vec![(vec![3, 1, 20, 1], MaskMeaning::Keep)];
    let keep: Vec<bool> = lengths.iter().flat_map(|&len| (0..20).map(move |i| i < len)).collect();
    let positions = Positions { causal: true, key_lengths: Some(vec![33, 20, 9]), ..Positions::default() };
    let ruled = Call {
        positions,
        masks: vec![(vec![3, 1, 20, 1], MaskMeaning::Keep), (vec![20, 33], MaskMeaning::Hide)],
        biases: vec![vec![4, 20, 33]],
        softcap: Some(5.0),
        sink: true,
        ..plain.clone()
    };
    for call in [plain, ruled] {
        let mut data = call.data();
        data.masks[0] = keep.clone();
        let (truth, _) = call.truth(&data);
        let without = Call { masks: call.masks[1..].to_vec(), ..call.clone() };
        data.masks.remove(0);
        for (name, device) in devices() {
            let attention = || without.attention().query_lengths(lengths.clone()).lse(true);
            let out = without.run(&device, &data, attention().weights(Weights::PerHead)).unwrap();
            truth.hold_output(&name, &out.output, TOLERANCE);
            let lse = out.lse.unwrap();
            assert_logs_close(&name, &lse, &truth.lse, TOLERANCE);
            assert_close(&name, &out.weights.unwrap(), &truth.weights, TOLERANCE);
            let [q, k, v] = without.operands(&device, &data, Dtype::F32).unwrap();
            let attention = without.ruled(&device, &data, attention()).unwrap();
            let seen = attention.inspect(&q, &k, &lse, &Inspect::new().weights()).unwrap().weights.unwrap();
            assert_close(&name, &seen, &truth.weights, 1e-5);
            if device.gpu().is_some() {
                let passes = attention.clone().method(Method::ThreePasses).forward(&q, &k, &v).unwrap();
                truth.hold_output(&name, &passes.output, TOLERANCE);
            }
            // Full lengths are not a rule.
            let whole = without.attention().query_lengths(vec![20; 3]);
            let whole = without.run(&device, &data, whole).unwrap().output.download().unwrap();
            let bare = without.run(&device, &data, without.attention()).unwrap().output.download().unwrap();
            assert_eq!(bits(&whole), bits(&bare), "{name}");
        }
    }
}

#[test]
fn key_padding_of_floats_is_added() {
    let (q, kv) = ([2, 4, 5, 8], [2, 2, 9, 8]);
    for (shape, as_bias) in [(vec![2, 9], vec![2, 1, 1, 9]), (vec![9], vec![9]), (vec![1, 9], vec![1, 1, 1, 9])] {
        let call = Call {
            biases: vec![as_bias],
            positions: Positions { causal: true, align: Align::BottomRight, ..Positions::default() },
            ..Call::plain(q, kv, kv)
        };
        let data = call.data();
        assert!(data.biases[0].contains(&f32::NEG_INFINITY) || shape.len() == 1, "some keys are masked");
        let (truth, _) = call.truth(&data);
        for (name, device) in devices() {
            let padding = Tensor::from_slice(&device, &shape, &data.biases[0]).unwrap();
            let [q, k, v] = call.operands(&device, &data, Dtype::F32).unwrap();
            let out = call.attention().key_padding_bias(padding).lse(true).forward(&q, &k, &v).unwrap();
            truth.hold_output(&name, &out.output, TOLERANCE);
            assert_logs_close(&name, &out.lse.unwrap(), &truth.lse, TOLERANCE);
        }
    }
}

#[test]
fn lengths_and_padding_that_do_not_fit() {
    for (name, device) in devices() {
        let floats =
            |shape: &[usize]| Tensor::from_slice(&device, shape, &vec![0.5f32; shape.iter().product()]).unwrap();
        let bools = |shape: &[usize]| Tensor::from_bools(&device, shape, &vec![true; shape.iter().product()]).unwrap();
        let (q, k) = (floats(&[2, 4, 5, 8]), floats(&[2, 2, 9, 8]));
        for (attention, say) in [
            (Attention::new().query_lengths(vec![5]), "query_lengths has 1 entries for a batch of 2"),
            (Attention::new().query_lengths(vec![5, 6]), "query_lengths[1] = 6 is more than len_q = 5"),
            (Attention::new().key_padding_bias(floats(&[2, 5])), "must be [batch, len_k] = [2, 9]"),
            (Attention::new().key_padding_bias(floats(&[2, 1, 9])), "is a mask or a bias, not key padding"),
            (Attention::new().key_padding_bias(bools(&[2, 9])), "a bias is a bool tensor"),
            (
                Attention::new().key_padding(Mask::hide_where(bools(&[9, 2])).unwrap()),
                "must be [batch, len_k] = [2, 9]",
            ),
        ] {
            let error = attention.forward(&q, &k, &k).unwrap_err().to_string();
            assert!(error.contains(say), "{name}: {error}");
        }
        let x = floats(&[3, 1, 8]);
        for (attention, say) in [
            (Attention::new().query_lengths(vec![3]), "query_lengths"),
            (Attention::new().key_padding_bias(floats(&[1, 3])), "a key padding mask"),
        ] {
            let error = attention.forward_packed(&x, &x, &x, &[0, 3], &[0, 3]).unwrap_err().to_string();
            assert!(error.contains(say) && error.contains("run the sequences separately"), "{name}: {error}");
        }
    }
}

#[test]
fn weights_that_do_not_fit_suggest_alternatives() {
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[1, 64, 60_000, 1], &vec![0.5f32; 64 * 60_000]).unwrap();
        let with = |weights| Attention::new().weights(weights).forward(&x, &x, &x).unwrap_err().to_string();
        let per_head = with(Weights::PerHead);
        assert!(per_head.contains("the weights needs 921600000000 bytes"), "{name}: {per_head}");
        assert!(per_head.contains("Attention::inspect"), "{name}: {per_head}");
        // The CPU backend computes their mean from all of them.
        assert_eq!(per_head.contains("Weights::Averaged"), device.gpu().is_some(), "{name}: {per_head}");
        let averaged = with(Weights::Averaged);
        assert!(averaged.contains("; Attention::inspect") && !averaged.contains("Weights::"), "{name}: {averaged}");
        let lse = Tensor::from_slice(&device, &[1, 64, 60_000], &vec![0.5f32; 64 * 60_000]).unwrap();
        let seen = Attention::new().inspect(&x, &x, &lse, &Inspect::new().weights()).unwrap_err().to_string();
        assert!(seen.contains("Inspect::heads and Inspect::queries choose fewer"), "{name}: {seen}");
    }
}

#[test]
fn a_query_without_keys_gets_the_mean_of_values_if_requested() {
    let v: Vec<f32> = (0..2 * 5 * 3).map(|i| i as f32).collect();
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[2, 1, 5, 4], &noise(&mut Pcg64::seed_from_u64(3), 40)).unwrap();
        let v = Tensor::from_slice(&device, &[2, 1, 5, 3], &v).unwrap();
        // The first two queries of the first entry see nothing, nor do the first four of the second entry.
        let plain = Attention::new().causal(Align::PerBatch(vec![-2, -4])).lse(true);
        let zero = plain.forward(&x, &x, &v).unwrap();
        let mean = plain.clone().empty_rows(EmptyRows::MeanOfValues).forward(&x, &x, &v).unwrap();
        let (zero, lse) = (zero.output.download().unwrap(), zero.lse.unwrap().download().unwrap());
        let wanted: Vec<f64> = (0..30)
            .map(|at| match lse[at / 3] {
                // The mean of 0, 3 … 12 for the first column of the first entry, and so on.
                f32::NEG_INFINITY => 6.0 + (at / 15 * 15 + at % 3) as f64,
                _ => f64::from(zero[at]),
            })
            .collect();
        assert_close(&name, &mean.output, &wanted, 1e-6);
        assert_eq!(mean.lse.unwrap().download().unwrap(), lse, "{name}");
        assert_eq!(lse.iter().filter(|x| **x == f32::NEG_INFINITY).count(), 6);
        for refused in [
            plain.clone().weights(Weights::PerHead),
            plain.clone().sink(Tensor::from_slice(&device, &[1], &[0.0f32]).unwrap()),
            plain.clone().query_lengths(vec![5, 4]),
        ] {
            let error = refused.empty_rows(EmptyRows::MeanOfValues).forward(&x, &x, &v).unwrap_err();
            assert!(error.to_string().contains("MeanOfValues cannot be combined with"), "{error}");
        }
    }
}
