//! The tuner: what it tries, what it keeps, and which kept results it accepts. Never speed.
#![cfg(feature = "tune")]

use crate::kit;
use std::path::Path;

use wgpu_attention::kernels::{Kernel, Variant};
use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::Buckets;
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig, alibi};
use wgpu_attention::{Align, Attention, Device, Error, Gpu, GpuOptions, Mask, Method, Tensor, Tuned, Weights};

fn operands(device: impl Into<Device>, q: [usize; 4], k: [usize; 4]) -> [Tensor; 3] {
    let device = device.into();
    [q, k, k].map(|shape| {
        let data: Vec<f32> = (0..shape.iter().product()).map(|n| ((n * shape[2]) as f32).sin()).collect();
        Tensor::from_slice(&device, &shape, &data).unwrap()
    })
}

fn kernels(attention: &Attention, [q, k, v]: &[Tensor; 3]) -> Vec<String> {
    attention.forward_profiled(q, k, v).unwrap().1.kernels
}

fn tune(attention: &Attention, [q, k, v]: &[Tensor; 3]) -> Tuned {
    attention.tune(q, k, v).unwrap()
}

/// Edits the file so that other methods have won.
fn rewrite(file: &Path, change: impl Fn(&mut serde_json::Value)) {
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, serde_json::to_vec(&value).unwrap()).unwrap();
}

fn won(file: &Path, method: &str) {
    rewrite(file, |value| {
        for entry in value["entries"].as_array_mut().unwrap() {
            entry["method"] = method.into();
        }
    });
}

#[test]
fn the_winner_is_one_of_six_and_what_auto_runs() {
    for (name, gpu) in kit::gpus() {
        gpu.keep_tuning_in(None);
        for (q, k, causal) in [([1, 4, 40, 16], [1, 2, 70, 16], false), ([2, 2, 1, 33], [2, 1, 300, 33], true)] {
            let x = operands(&gpu, q, k);
            let mut attention = Attention::new();
            if causal {
                attention = attention.causal(Align::BottomRight);
            }
            let before = kernels(&attention, &x);
            let dry = attention.time_candidates(&x[0], &x[1], &x[2]).unwrap();
            assert_eq!(kernels(&attention, &x), before, "{name}: a dry run changes nothing");
            let tuned = tune(&attention, &x);
            assert_eq!((tuned.key, &tuned.file), (dry.key, &None));
            assert!((3..=6).contains(&tuned.candidates.len()), "{name}: {tuned:?}");
            assert!(tuned.candidates.iter().any(|candidate| candidate.method == Method::ThreePasses));
            for candidate in &tuned.candidates {
                assert!(candidate.time.is_ok(), "{name}: {candidate:?}");
            }
            // The default is the first.
            assert_eq!(kernels(&attention.clone().method(tuned.candidates[0].method), &x), before, "{name}");
            let wins = match tuned.winner {
                Method::Auto => tuned.candidates[0].method,
                other => tuned.candidates.iter().find(|candidate| candidate.method == other).unwrap().method,
            };
            assert_eq!(kernels(&attention, &x), kernels(&attention.clone().method(wins), &x), "{name}");
            let again = tune(&attention, &x);
            assert!(again.candidates.is_empty() && again.winner == tuned.winner, "{name}: {again:?}");
        }
    }
}

#[test]
fn kept_results_apply_only_to_the_same_adapter() {
    let folder = tempfile::tempdir().unwrap();
    // The first writer creates the folder.
    let folder = folder.path().join("deep/down");
    let mut files = 0;
    let gpus = kit::gpus();
    for (name, gpu) in &gpus {
        gpu.keep_tuning_in(Some(&folder));
        let x = operands(gpu, [1, 2, 20, 8], [1, 2, 30, 8]);
        let tuned = tune(&Attention::new(), &x);
        assert!(!tuned.candidates.is_empty(), "{name}: another adapter's result is not its own");
        assert_eq!(tuned.file, gpu.tuning_file());
        assert!(tuned.file.unwrap().starts_with(&folder));
        files += 1;
    }
    let file = folder.join("tuning.json");
    won(&file, "three passes");
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(value["entries"].as_array().unwrap().len(), files);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing temporary is left");
    for (name, gpu) in &gpus {
        gpu.keep_tuning_in(Some(&folder));
        let x = operands(gpu, [1, 2, 20, 8], [1, 2, 30, 8]);
        let plain = Attention::new();
        let passes = kernels(&plain.clone().method(Method::ThreePasses), &x);
        assert_eq!(kernels(&plain, &x), passes, "{name}");
        assert_eq!(tune(&plain, &x).winner, Method::ThreePasses);
        // The batch is not part of the key, and does not change a bit.
        let twice = operands(gpu, [2, 2, 20, 8], [2, 2, 30, 8]);
        assert_eq!(kernels(&plain, &twice), passes, "{name}");
        let first = |x: &Tensor| x.narrow(0, 0, 1).unwrap();
        let both = plain.forward(&twice[0], &twice[1], &twice[2]).unwrap().output;
        let alone = plain.forward(&first(&twice[0]), &first(&twice[1]), &first(&twice[2])).unwrap().output;
        assert_eq!(kit::bits(&first(&both).download().unwrap()), kit::bits(&alone.download().unwrap()), "{name}");
        // A mask, a bias, positions, a sink, a causal rule, more keys, another width: other keys.
        let mask = Mask::keep_where(Tensor::from_bools(gpu, &[30], &[true; 30]).unwrap()).unwrap();
        let slopes = Tensor::from_slice(gpu, &[2], &alibi::slopes(2).unwrap()).unwrap();
        let rotary = Rotary::new(Device::from(gpu), &RotaryConfig::new(8), 64).unwrap();
        let sink = Tensor::from_slice(gpu, &[2], &[0.5f32; 2]).unwrap();
        let bias = Tensor::from_slice(gpu, &[30], &[0.5f32; 30]).unwrap();
        for (attention, q, k) in [
            (plain.clone().mask(mask), [1, 2, 20, 8], [1, 2, 30, 8]),
            (plain.clone().bias(bias), [1, 2, 20, 8], [1, 2, 30, 8]),
            (plain.clone().alibi(slopes), [1, 2, 20, 8], [1, 2, 30, 8]),
            (plain.clone().rotary(rotary), [1, 2, 20, 8], [1, 2, 30, 8]),
            (plain.clone().sink(sink), [1, 2, 20, 8], [1, 2, 30, 8]),
            (plain.clone().causal(Align::TopLeft), [1, 2, 20, 8], [1, 2, 30, 8]),
            (plain.clone(), [1, 2, 20, 8], [1, 2, 33, 8]),
            (plain.clone(), [1, 2, 20, 12], [1, 2, 30, 12]),
        ] {
            let other = operands(gpu, q, k);
            assert!(kernels(&attention, &other)[0].starts_with("flash"), "{name}: {attention:?}");
        }
        // An explicit method takes precedence.
        assert!(kernels(&plain.clone().method(Method::Fused), &x)[0].starts_with("flash"));
    }
    let (_, last) = gpus.last().unwrap();
    last.clear_tuning().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(value["entries"].as_array().unwrap().len(), files - 1);
    let x = operands(last, [1, 2, 20, 8], [1, 2, 30, 8]);
    assert!(kernels(&Attention::new(), &x)[0].starts_with("flash"));
}

#[test]
fn requesting_weights_changes_no_bit_of_a_tuned_call() {
    for (name, gpu) in kit::gpus() {
        let folder = tempfile::tempdir().unwrap();
        gpu.keep_tuning_in(Some(folder.path()));
        let x = operands(&gpu, [1, 2, 20, 8], [1, 2, 30, 8]);
        let tuned = tune(&Attention::new(), &x);
        for candidate in tuned.candidates {
            won(&gpu.tuning_file().unwrap(), &candidate.method.to_string());
            gpu.keep_tuning_in(Some(folder.path()));
            let run = |weights| {
                let attended = Attention::new().weights(weights).forward(&x[0], &x[1], &x[2]).unwrap();
                kit::bits(&attended.output.download().unwrap())
            };
            assert_eq!(run(Weights::None), run(Weights::PerHead), "{name}: {}", candidate.method);
        }
    }
}

#[test]
fn invalid_entries_are_ignored() {
    let (name, gpu) = kit::gpus().swap_remove(0);
    let folder = tempfile::tempdir().unwrap();
    gpu.keep_tuning_in(Some(folder.path()));
    let file = gpu.tuning_file().unwrap();
    let x = operands(&gpu, [1, 2, 20, 8], [1, 2, 30, 8]);
    let plain = Attention::new();
    let default = kernels(&plain, &x);
    tune(&plain, &x);
    let whole = std::fs::read(&file).unwrap();
    let ignored = |what: &str| {
        gpu.keep_tuning_in(Some(folder.path()));
        assert_eq!(kernels(&plain, &x), default, "{name}: {what}");
    };
    type Change = fn(&mut serde_json::Value);
    let changes: [(&str, Change); 8] = [
        ("another version", |entry| entry["library"] = "0.0.0".into()),
        ("another driver", |entry| entry["adapter"]["driver_info"] = "older".into()),
        ("another backend", |entry| entry["adapter"]["backend"] = "other".into()),
        ("no such key", |entry| entry["key"] = "rows-1".into()),
        ("no such method", |entry| entry["method"] = "fast".into()),
        ("a cut that nothing runs", |entry| entry["method"] = "rows3x7/keys9".into()),
        ("a cut of more than there is", |entry| entry["method"] = "rows8x4294967295/keys8".into()),
        ("numbers beyond measure", |entry| entry["method"] = "rows99999999999999999999x8/keys8".into()),
    ];
    // First check that such an edit has an effect.
    won(&file, "three passes");
    gpu.keep_tuning_in(Some(folder.path()));
    assert_ne!(kernels(&plain, &x), default);
    let believed = std::fs::read(&file).unwrap();
    for (what, change) in changes {
        std::fs::write(&file, &believed).unwrap();
        rewrite(&file, |value| change(&mut value["entries"][0]));
        ignored(what);
    }
    for (what, bytes) in [
        ("an empty file", vec![]),
        ("half a file", whole[..whole.len() / 2].to_vec()),
        ("no JSON", vec![0xff; 100]),
        ("other JSON", b"[1, 2]".to_vec()),
        ("deep JSON", vec![b'['; 100_000]),
        ("a huge file", vec![b' '; 3 << 20]),
    ] {
        std::fs::write(&file, bytes).unwrap();
        ignored(what);
        // And the next writer replaces it.
        let tuned = tune(&plain, &x);
        assert_eq!(tuned.file.as_deref(), Some(file.as_path()), "{what}");
        gpu.keep_tuning_in(Some(folder.path()));
        assert!(tune(&plain, &x).candidates.is_empty(), "{what}");
    }
    std::fs::remove_file(&file).unwrap();
    ignored("no file");
    std::fs::create_dir(&file).unwrap();
    ignored("a folder");
    let tuned = tune(&plain, &x);
    assert!(tuned.file.is_none() && !tuned.candidates.is_empty(), "what cannot be kept is known all the same");
    assert!(tune(&plain, &x).candidates.is_empty());
}

#[test]
fn a_call_that_the_kept_method_does_not_support_still_runs() {
    for (name, gpu) in kit::limited(|limits| limits.max_storage_buffers_per_shader_stage = 5) {
        let folder = tempfile::tempdir().unwrap();
        gpu.keep_tuning_in(Some(folder.path()));
        let x = operands(&gpu, [1, 2, 20, 8], [1, 2, 30, 8]);
        // One bias fits in addition to the fused kernel's four buffers, but not together with the LSE.
        let bias = Tensor::from_slice(&gpu, &[30], &[1f32; 30]).unwrap();
        let attention = Attention::new().bias(bias);
        let tuned = attention.tune(&x[0], &x[1], &x[2]).unwrap();
        won(&gpu.tuning_file().unwrap(), &tuned.candidates[0].method.to_string());
        gpu.keep_tuning_in(Some(folder.path()));
        attention.clone().lse(true).forward(&x[0], &x[1], &x[2]).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn halves_masks_biases_windows_and_sinks_are_tuned_too() {
    for (name, gpu) in kit::gpus() {
        gpu.keep_tuning_in(None);
        let shape = [1, 2, 10, 20];
        let data: Vec<half::f16> = (0..400).map(|n| half::f16::from_f32((n as f32).sin())).collect();
        let q = Tensor::from_slice(&gpu, &shape, &data).unwrap();
        let bools: Vec<bool> = (0..100).map(|n| n % 7 != 3).collect();
        let mask = |bools: &[bool]| Tensor::from_bools(&gpu, &[10, 10], bools).unwrap();
        let attention = (Attention::new().softcap(5.0).window(Some(6), Some(2)).align(Align::BottomRight))
            .key_lengths(vec![9])
            .mask(Mask::keep_where(mask(&bools)).unwrap())
            .mask(Mask::hide_where(mask(&[false; 100])).unwrap())
            .bias(Tensor::from_slice(&gpu, &[10], &[0.5f32; 10]).unwrap())
            .sink(Tensor::from_slice(&gpu, &[2], &[half::f16::ONE; 2]).unwrap());
        let tuned = attention.tune(&q, &q, &q).unwrap();
        let rules = tuned.key.rules;
        assert!(rules.banded && rules.masks && rules.biases && rules.sink, "{name}: {tuned:?}");
        assert!(tuned.candidates.iter().all(|candidate| candidate.time.is_ok()), "{name}: {tuned:?}");
        // A caller's output is written by any winner.
        attention.forward(&q, &q, &q).unwrap().output.download().unwrap();
    }
}

/// Calls with every kind of positions, and the parts of their kernels' names.
fn positional(gpu: &Gpu) -> Vec<(&'static str, Attention, [usize; 4], [usize; 4])> {
    let device = Device::from(gpu);
    let plain = || Attention::new().causal(Align::BottomRight);
    let rotary = |pairing| Rotary::new(&device, &RotaryConfig::new(16).pairing(pairing), 64).unwrap();
    let table = |shape: &[usize]| {
        let data: Vec<f32> = (0..shape.iter().product()).map(|n| (n as f32 * 0.7).sin()).collect();
        Tensor::from_slice(&device, shape, &data).unwrap()
    };
    let slopes = Tensor::from_slice(&device, &[8], &alibi::slopes(8).unwrap()).unwrap();
    let shaw = RelativeKeys::new(&table(&[9, 16]), 5, 3).unwrap();
    let short = Attention::new().causal(Align::Offset(0)).key_lengths(vec![15]).rotary(rotary(Pairing::HalfSplit));
    let (q, k) = ([1, 4, 33, 16], [1, 2, 50, 16]);
    // More heads than a self-test has.
    let (wide_q, wide_k) = ([1, 8, 33, 16], [1, 4, 50, 16]);
    vec![
        ("/rotary", plain().rotary(rotary(Pairing::HalfSplit)), q, k),
        ("_interleaved", plain().rotary(rotary(Pairing::Interleaved)), q, k),
        // More queries than keys; queries begin at position 0.
        ("/rotary", Attention::new().rotary(rotary(Pairing::HalfSplit)), k, [1, 2, 33, 16]),
        // As many queries as keys, but not all keys count.
        ("/rotary", short, [1, 2, 16, 16], [1, 2, 16, 16]),
        ("/alibi", plain().alibi(slopes), wide_q, wide_k),
        ("/relative4", plain().t5_bias(table(&[32, 8]), Buckets::new(false)), wide_q, wide_k),
        ("/relative", plain().relative_keys(shaw).softcap(3.0), q, k),
    ]
}

#[test]
fn self_tests_cover_positions() {
    for (name, gpu) in kit::gpus() {
        gpu.keep_tuning_in(None);
        for (word, attention, q, k) in positional(&gpu) {
            let x = operands(&gpu, q, k);
            let kernels = kernels(&attention.clone().method(Method::Fused), &x);
            assert!(
                kernels.iter().any(|kernel| kernel.starts_with("flash") && kernel.contains(word)),
                "{name}: {kernels:?}"
            );
            let tuned = attention.time_candidates(&x[0], &x[1], &x[2]).unwrap();
            assert!(tuned.candidates.len() > 1, "{name}: {tuned:?}");
            assert!(tuned.candidates.iter().all(|candidate| candidate.time.is_ok()), "{name} {word}: {tuned:?}");
        }
    }
}

/// A driver that gets only positions wrong.
fn broken_positions(variant: &Variant, source: &str) -> Option<String> {
    let is_fused = matches!(variant.kernel, Kernel::Flash | Kernel::FlashTiled);
    let broken = (source.replace("-abs(vec4<f32>(distance))", "abs(vec4<f32>(distance))"))
        .replace("return view.factor * ", "return 2.0 * view.factor * ")
        .replace("let sine = ", "let sine = 1.01 * ")
        .replace("angle.xxyy", "angle.zzww");
    (is_fused && broken != source).then_some(broken)
}

#[test]
fn a_kernel_that_gets_positions_wrong_is_never_chosen() {
    for (index, (name, _)) in kit::gpus().iter().enumerate() {
        let options = GpuOptions::adapter(index.to_string()).rewrite(broken_positions);
        let gpu = Gpu::with_options(&options).unwrap();
        gpu.keep_tuning_in(None);
        for (word, attention, q, k) in positional(&gpu) {
            let x = operands(&gpu, q, k);
            let tuned = attention.time_candidates(&x[0], &x[1], &x[2]).unwrap();
            assert_eq!(tuned.winner, Method::ThreePasses, "{name} {word}: {tuned:?}");
            let (last, tiles) = tuned.candidates.split_last().unwrap();
            assert!(last.time.is_ok(), "{name} {word}: {tuned:?}");
            for tile in tiles {
                let reason = tile.time.as_ref().unwrap_err();
                assert!(reason.contains("self-test failed"), "{name} {word}: {reason}");
            }
        }
    }
}

#[test]
fn nothing_to_choose_is_an_error() {
    let x = operands(&Device::Cpu, [1, 1, 4, 4], [1, 1, 4, 4]);
    let error = Attention::new().tune(&x[0], &x[1], &x[2]).unwrap_err();
    assert!(matches!(&error, Error::Device { there, .. } if there == "cpu"), "{error}");
    let (_, gpu): (_, Gpu) = kit::gpus().swap_remove(0);
    gpu.keep_tuning_in(None);
    for (q, k) in [([1, 1, 0, 4], [1, 1, 4, 4]), ([1, 1, 4, 4], [1, 1, 0, 4]), ([0, 1, 4, 4], [0, 1, 4, 4])] {
        let x = operands(&gpu, q, k);
        let error = Attention::new().tune(&x[0], &x[1], &x[2]).unwrap_err();
        assert!(matches!(&error, Error::Value(message) if message.contains("nothing to tune")), "{error}");
    }
    // Too wide for the fused kernel: its tiles are reported as failing, and the three passes stay.
    let x = operands(&gpu, [1, 1, 3, 1028], [1, 1, 4, 1028]);
    let tuned = tune(&Attention::new(), &x);
    assert!(tuned.candidates[0].time.as_ref().is_err_and(|reason| reason.contains("1028")), "{tuned:?}");
    assert_eq!(tuned.winner, Method::ThreePasses);
}
