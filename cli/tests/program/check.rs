//! `attn check`.

use std::path::Path;

use safetensors::Dtype;

use crate::kit::{adapters, attn, cases, floats, folder};

#[test]
fn every_case_passes_on_every_adapter() {
    for adapter in adapters() {
        for (name, last) in [
            ("keras_jax", "66 passed, 0 failed, 0 skipped"),
            ("onnx", "111 passed, 0 failed, 25 skipped"),
            ("torch", "94 passed, 0 failed, 0 skipped"),
            ("transformers", "32 passed, 0 failed, 0 skipped"),
        ] {
            let ran = attn(folder().path(), &["check", cases(name).to_str().unwrap(), "--adapter", &adapter]);
            ran.succeeded();
            assert_eq!(ran.last_line(), last, "{adapter}\n{}", ran.stdout);
        }
    }
}

#[test]
fn every_method_passes_every_case_on_the_first_adapter() {
    // But the widest of PyTorch's, whose eight rows of 255 columns take a software adapter a minute to compile.
    let folder = folder();
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(cases("torch").join("index.json")).unwrap()).unwrap();
    let wide = "sdpa_dim255";
    let names = index.as_array().unwrap().iter().map(|case| case["name"].as_str().unwrap());
    // Each compiles kernels of its own for every method, minutes for all of them: every sixth.
    let narrow: Vec<&str> = names.filter(|&name| name != wide).step_by(6).collect();
    let packed = narrow.iter().filter(|name| name.contains("varlen")).count();
    assert!(narrow.len() == 16 && packed > 0, "{narrow:?}");
    let by_fused = format!("{} passed, 0 failed, 0 skipped", narrow.len());
    let by_passes = format!("{} passed, 0 failed, {packed} skipped", narrow.len() - packed);
    for name in narrow {
        let file = format!("{name}.safetensors");
        std::fs::copy(cases("torch").join(&file), folder.path().join(&file)).unwrap();
    }
    let gpu = wgpu_attention::Gpu::with_options(&wgpu_attention::GpuOptions {
        adapter: Some(adapters()[0].clone()),
        ..Default::default()
    });
    let methods = wgpu_attention::Method::every(gpu.unwrap().capabilities());
    assert!(methods.len() >= 8, "{methods:?}");
    let first = adapters()[0].clone();
    let narrow = folder.path().to_path_buf();
    // Packed sequences run fused only, and other ops than attention have no methods.
    for (dir, by_passes, by_fused) in [
        (narrow, by_passes.as_str(), by_fused.as_str()),
        (cases("onnx"), "93 passed, 0 failed, 43 skipped", "93 passed, 0 failed, 43 skipped"),
        (cases("transformers"), "7 passed, 0 failed, 25 skipped", "7 passed, 0 failed, 25 skipped"),
    ] {
        let ran = attn(folder.path(), &["check", dir.to_str().unwrap(), "--adapter", &first, "--method", "all"]);
        ran.succeeded();
        let lines: Vec<&str> = ran.stdout.lines().collect();
        assert_eq!(lines.len(), methods.len() + 1, "{}", ran.stdout);
        for (n, (line, method)) in lines.iter().zip(&methods).enumerate() {
            let end = format!(", {method}: {}", if n == 0 { by_passes } else { by_fused });
            assert!(line.ends_with(&end), "{end} is not in {line}");
        }
    }
    // The widest by the two that calls run unless tuned.
    let args =
        ["check", "--filter", wide, "--adapter", &adapters()[0], "--method", "fused", "--method", "three-passes"];
    let ran = attn(folder.path(), &[&args[..], &[cases("torch").to_str().unwrap()]].concat());
    ran.succeeded();
    assert_eq!(ran.last_line(), "2 passed, 0 failed, 0 skipped");
}

#[test]
fn what_a_method_cannot_compute_is_skipped_with_the_reason() {
    let folder = folder();
    let (torch, onnx) = (cases("torch"), cases("onnx"));
    let check = |more: &[&str]| attn(folder.path(), &[&["check"], more].concat());
    let torch = torch.to_str().unwrap();
    let ran = check(&[torch, "--adapter", "0", "--method", "three-passes", "--filter", "varlen_self", "--verbose"]);
    ran.succeeded();
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    let reason = "skipped varlen_self: the method three passes cannot compute this: packed sequences run fused only";
    assert!(ran.stdout.contains(reason), "{}", ran.stdout);
    let onnx = onnx.to_str().unwrap();
    let ran = check(&[onnx, "--adapter", "0", "--method", "fused", "--filter", "softmax_axis_0", "--verbose"]);
    assert!(ran.stdout.contains("skipped test_softmax_axis_0: the op Softmax has no methods"), "{}", ran.stdout);
    // A cut that nothing runs.
    let ran = check(&[torch, "--adapter", "0", "--method", "rows3x8/keys4", "--filter", "sdpa_dim005", "--verbose"]);
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    assert!(ran.stdout.contains("rows and keys must be 1, 2, 4 or 8"), "{}", ran.stdout);
    check(&[torch, "--method", "fast"]).refused(2, "is no method");
    // One way only: named or not.
    let ran = check(&[torch, "--adapter", "cpu", "--method", "all", "--filter", "sdpa_dim005"]);
    ran.succeeded();
    assert_eq!(ran.last_line(), "1 passed, 0 failed, 0 skipped");
}

#[test]
fn a_failure_names_the_method() {
    let folder = folder();
    copy_case(
        &cases("torch").join("sdpa_dim005.safetensors"),
        &folder.path().join("bad.safetensors"),
        None,
        |name, _, data| {
            if name == "ref64.out" {
                data[..8].copy_from_slice(&1234.5f64.to_le_bytes());
            }
        },
    );
    let args = ["check", ".", "--adapter", "0", "--method", "three-passes", "--method", "rows1x8/keys4"];
    let ran = attn(folder.path(), &[&args[..], &["--method", "three-passes", "--json", "report.json"]].concat());
    assert_eq!(ran.status, Some(1));
    assert_eq!(ran.last_line(), "0 passed, 2 failed, 0 skipped");
    for method in ["three passes", "rows1x8/keys4"] {
        assert!(ran.stdout.contains(&format!("FAILED bad by {method}: out against ref64")), "{}", ran.stdout);
    }
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("report.json")).unwrap()).unwrap();
    assert_eq!((&report["runs"][1]["method"], &report["runs"][1]["failed"]), (&"rows1x8/keys4".into(), &1.into()));
    assert_eq!(report["cases"][0]["method"], "three passes");
}

#[test]
fn several_adapters_add_up() {
    let ran = attn(
        folder().path(),
        &["check", cases("onnx").to_str().unwrap(), "--adapter", "all", "--filter", "softmax_axis_0"],
    );
    ran.succeeded();
    assert_eq!(ran.last_line(), format!("{} passed, 0 failed, 0 skipped", adapters().len()));
    assert!(ran.stdout.contains("cpu (the CPU backend): 1 passed, 0 failed, 0 skipped"));
}

/// A case file with one tensor changed by `change`, or another member in its header.
fn copy_case(
    from: &Path,
    to: &Path,
    member: Option<(&str, serde_json::Value)>,
    change: impl Fn(&str, Dtype, &mut Vec<u8>),
) {
    let bytes = std::fs::read(from).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    if let Some((path, value)) = member {
        let mut case: serde_json::Value = serde_json::from_str(&metadata["case"]).unwrap();
        *case.pointer_mut(path).unwrap() = value;
        metadata.insert("case".into(), case.to_string());
    }
    let tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let mut data = view.data().to_vec();
            change(&name, view.dtype(), &mut data);
            (name, view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(to, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn one_wrong_number_fails_and_is_named() {
    let folder = folder();
    let case = cases("torch").join("sdpa_dim005.safetensors");
    copy_case(&case, &folder.path().join("bad.safetensors"), None, |name, _, data| {
        if name == "ref64.out" {
            data[8 * 9..][..8].copy_from_slice(&1234.5f64.to_le_bytes());
        }
    });
    copy_case(&case, &folder.path().join("good.safetensors"), None, |_, _, _| {});
    let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu", "--json", "report.json"]);
    assert_eq!(ran.status, Some(1));
    assert_eq!(ran.last_line(), "1 passed, 1 failed, 0 skipped");
    assert!(ran.stdout.contains("FAILED bad: out against ref64") && ran.stdout.contains("1.2345e3"), "{}", ran.stdout);
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("report.json")).unwrap()).unwrap();
    assert_eq!((&report["passed"], &report["failed"], &report["skipped"]), (&1.into(), &1.into(), &0.into()));
    let bad = report["cases"].as_array().unwrap().iter().find(|case| case["case"] == "bad").unwrap();
    assert_eq!(bad["status"], "failed");
    let out = bad["outputs"].as_array().unwrap().iter().find(|output| output["output"] == "out").unwrap();
    assert_eq!(out["ok"], false);
    assert_eq!(out["worst"]["expected"], 1234.5);
}

#[test]
fn a_nan_where_a_number_is_expected_fails() {
    let folder = folder();
    copy_case(
        &cases("onnx").join("test_attention_4d.safetensors"),
        &folder.path().join("nan.safetensors"),
        None,
        |name, _, data| {
            if name == "in.V" {
                data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }
        },
    );
    let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
    assert_eq!(ran.status, Some(1));
    assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped");
}

#[test]
fn an_unknown_op_is_skipped_with_the_reason() {
    let folder = folder();
    let case = cases("onnx").join("test_attention_4d.safetensors");
    copy_case(&case, &folder.path().join("odd.safetensors"), Some(("/op", "Telepathy".into())), |_, _, _| {});
    let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu", "--verbose"]);
    ran.succeeded();
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    assert!(ran.stdout.contains("skipped odd: the op Telepathy is not known"), "{}", ran.stdout);
}

#[test]
fn an_attribute_that_cannot_be_read_is_never_ignored() {
    let folder = folder();
    for (case, path) in [
        ("onnx/test_attention_4d_softcap", "/attributes/softcap"),
        ("onnx/test_attention_4d_causal", "/attributes/is_causal"),
        ("onnx/test_softmax_axis_0", "/attributes/axis"),
        ("torch/sdpa_causal_tl_q5_kv12", "/is_causal_top_left"),
        ("torch/sdpa_scale_neg", "/scale"),
        ("onnx/test_rotary_embedding_interleaved", "/attributes/interleaved"),
        ("transformers/rope_yarn4_d32", "/rope_parameters/factor"),
        ("transformers/rope_interleaved_d16_rot16", "/theta"),
        ("transformers/llama_window5", "/sliding_window"),
        ("transformers/llama_window5", "/causal"),
        ("transformers/t5_buckets_bi_8_20", "/bidirectional"),
        ("transformers/shaw_relative_key_l5", "/left_max"),
        ("keras_jax/keras_plain", "/num_heads"),
        ("keras_jax/keras_window", "/sliding_window"),
        ("keras_jax/keras_causal_scores", "/use_causal_mask"),
        ("keras_jax/keras_gate", "/use_gate"),
        ("keras_jax/keras_axes_one_of_two", "/attention_axes"),
        ("keras_jax/jax_scale", "/scale"),
        ("keras_jax/jax_causal", "/is_causal"),
        ("keras_jax/jax_window", "/local_window_size"),
    ] {
        let to = folder.path().join("odd.safetensors");
        copy_case(&cases(&format!("{case}.safetensors")), &to, Some((path, "yes".into())), |_, _, _| {});
        let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
        assert_eq!(ran.status, Some(1));
        assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped", "{case}");
    }
}

#[test]
fn a_position_outside_its_table_is_named() {
    let folder = folder();
    let case = cases("onnx").join("test_rotary_embedding.safetensors");
    for (position, say) in [(-1i64, "position_ids[2] = -1 must not be negative"), (50, "position 50 is beyond")] {
        copy_case(&case, &folder.path().join("odd.safetensors"), None, |name, _, data| {
            if name == "in.position_ids" {
                data[16..24].copy_from_slice(&position.to_le_bytes());
            }
        });
        let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
        assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped");
        assert!(ran.stdout.contains(say), "{}", ran.stdout);
    }
}

#[test]
fn a_wrong_rotation_fails() {
    let folder = folder();
    for (case, path, value) in [
        ("rope_default_1e4_d16", "/rope_parameters/rope_theta", 10_001.into()),
        ("rope_yarn4_d32", "/rope_parameters/factor", 4.01.into()),
        ("rope_longrope_d32", "/rope_parameters/original_max_position_embeddings", 65.into()),
        ("rope_interleaved_d16_rot16", "/rotary_dim", 14.into()),
        ("llama_window5", "/sliding_window", 6.into()),
        ("t5_bias_encoder", "/bidirectional", false.into()),
    ] {
        let to = folder.path().join("odd.safetensors");
        copy_case(&cases(&format!("transformers/{case}.safetensors")), &to, Some((path, value)), |_, _, _| {});
        let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
        assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped", "{case}");
    }
}

#[test]
fn a_wrong_argument_of_keras_or_jax_fails() {
    let folder = folder();
    for (case, path, value) in [
        ("keras_window", "/sliding_window", 3.into()),
        ("keras_window_causal", "/use_causal_mask", false.into()),
        ("keras_axes_one_of_two", "/attention_axes", serde_json::json!([1])),
        // Zero weights where nothing is seen, or the mean of V.
        ("keras_nothing_seen_scores", "/return_attention_scores", false.into()),
        ("keras_output_shape_two_axes", "/output_shape", serde_json::json!([5, 3])),
        ("keras_no_bias", "/use_bias", true.into()),
        ("keras_grouped_plain", "/num_key_value_heads", 4.into()),
        ("keras_grouped_gate_causal", "/use_causal_mask", false.into()),
        ("jax_scale", "/scale", 0.31.into()),
        ("jax_causal", "/is_causal", false.into()),
        ("jax_window_pair", "/local_window_size", serde_json::json!([1, 2])),
    ] {
        let to = folder.path().join("odd.safetensors");
        copy_case(&cases(&format!("keras_jax/{case}.safetensors")), &to, Some((path, value)), |_, _, _| {});
        let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
        assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped", "{case}: {}", ran.stdout);
    }
    // Every tensor counts.
    for (case, tensor) in [
        ("keras_every_mask_causal", "in.query_mask"),
        ("keras_every_mask_causal", "in.value_mask"),
        ("keras_every_mask_causal", "in.key_mask"),
        ("keras_every_mask_causal", "in.attention_mask"),
        ("keras_grouped_every_mask", "in.query_mask"),
        ("keras_gate", "param.gate/bias"),
        ("keras_plain", "param.attention_output/bias"),
        ("jax_everything", "in.mask"),
        ("jax_bias", "in.bias"),
        ("jax_both_lengths_causal", "in.query_seq_lengths"),
        ("jax_both_lengths_causal", "in.key_value_seq_lengths"),
    ] {
        let to = folder.path().join("odd.safetensors");
        copy_case(&cases(&format!("keras_jax/{case}.safetensors")), &to, None, |name, dtype, data| match dtype {
            _ if name != tensor => {}
            Dtype::BOOL => data.iter_mut().for_each(|x| *x = 1 - *x),
            Dtype::I32 => data[..4].copy_from_slice(&1i32.to_le_bytes()),
            _ => data[..4].copy_from_slice(&2.5f32.to_le_bytes()),
        });
        let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
        assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped", "{case} {tensor}: {}", ran.stdout);
    }
}

#[test]
fn what_is_not_known_of_a_call_is_named() {
    let folder = folder();
    let from = cases("keras_jax/jax_causal.safetensors");
    let bytes = std::fs::read(&from).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = header.metadata().clone().unwrap()["case"].clone();
    let with = |key: &str, value: serde_json::Value| {
        let mut case: serde_json::Value = serde_json::from_str(&text).unwrap();
        case[key] = value;
        copy_case(&from, &folder.path().join("odd.safetensors"), Some(("", case)), |_, _, _| {});
        attn(folder.path(), &["check", ".", "--adapter", "cpu"])
    };
    // It agrees without, and says so.
    let ran = with("logits_soft_cap", 30.into());
    assert_eq!(ran.last_line(), "1 passed, 0 failed, 0 skipped");
    assert!(ran.stdout.contains("the case's logits_soft_cap is not known: computed without"), "{}", ran.stdout);
    let ran = with("implementation", "flash".into());
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    // Arguments may come in groups, as long as they agree.
    let ran = with("call", serde_json::json!({"is_causal": true, "scale": 0.5}));
    assert_eq!(ran.last_line(), "1 passed, 0 failed, 0 skipped");
    let ran = with("call", serde_json::json!({"is_causal": false}));
    assert!(ran.stdout.contains("the case gives \"is_causal\" as"), "{}", ran.stdout);

    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = |from: &str, to: &str| {
        let views = file.tensors().into_iter().map(|(name, view)| (if name == from { to.into() } else { name }, view));
        let metadata = header.metadata().clone();
        let bytes = safetensors::serialize(views.collect::<Vec<(String, _)>>(), metadata).unwrap();
        std::fs::write(folder.path().join("odd.safetensors"), bytes).unwrap();
        attn(folder.path(), &["check", ".", "--adapter", "cpu", "--verbose"])
    };
    assert_eq!(renamed("in.query", "in.q").last_line(), "1 passed, 0 failed, 0 skipped");
    assert_eq!(renamed("out32.output", "t32.output").last_line(), "1 passed, 0 failed, 0 skipped");
    let ran = renamed("out32.output", "in.sinks");
    assert!(ran.stdout.contains("skipped odd: the tensor in.sinks is not known"), "{}", ran.stdout);
    assert_eq!(renamed("ref64.output", "ref64.telepathy").last_line(), "0 passed, 0 failed, 1 skipped");
}

#[test]
fn broken_files_fail_one_by_one_and_never_panic() {
    let folder = folder();
    let whole = std::fs::read(cases("torch").join("mha_e6_h3.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 1, 7, 8, 9, header / 2, header, header + 1, whole.len() - 1] {
        std::fs::write(folder.path().join(format!("cut{length}.safetensors")), &whole[..length]).unwrap();
    }
    let mut hostile = whole.clone();
    hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(folder.path().join("length.safetensors"), &hostile).unwrap();
    crate::kit::save(&folder.path().join("caseless.safetensors"), &[floats("in.q", &[1], &[1.0])]);
    let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
    assert_eq!(ran.status, Some(1));
    assert_eq!(ran.last_line(), "0 passed, 11 failed, 0 skipped", "{}", ran.stdout);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn a_folder_without_cases_is_an_error() {
    let folder = folder();
    attn(folder.path(), &["check", "."]).refused(1, "holds no cases");
    attn(folder.path(), &["check", "nowhere"]).refused(1, "is not a folder");
    std::fs::write(folder.path().join("index.json"), r#"[{"name": "../../secret"}]"#).unwrap();
    attn(folder.path(), &["check", "."]).refused(1, "is not a file name");
}
