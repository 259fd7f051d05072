//! `attn check`.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::browser::Browser;
use crate::kit::{Ran, adapters, attn, cases, floats, folder};

fn report(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap()
}

fn results(report: &Value) -> &[Value] {
    report["results"].as_array().unwrap()
}

/// Nothing failed, but nothing was computed either, so it is not a success.
#[track_caller]
fn skipped_all(ran: &Ran) {
    assert_eq!(ran.status, Some(1), "{}", ran.stdout);
    assert!(ran.stdout.contains("NOTHING COMPUTED: all cases were skipped"), "{}", ran.stdout);
}

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
    // Except the widest of PyTorch's cases, whose eight rows of 255 columns take a software adapter a minute to
    // compile.
    let folder = folder();
    let index: Value = serde_json::from_slice(&std::fs::read(cases("torch").join("index.json")).unwrap()).unwrap();
    let wide = "sdpa_dim255";
    let names = index.as_array().unwrap().iter().map(|case| case["name"].as_str().unwrap());
    // Only every sixth case, because each compiles its own kernels for every method, which takes minutes for all cases.
    let narrow: Vec<&str> = names.filter(|&name| name != wide).step_by(6).collect();
    let packed = narrow.iter().filter(|name| name.contains("varlen")).count();
    assert!(narrow.len() == 16 && packed > 0, "{narrow:?}");
    let by_fused = (narrow.len(), 0);
    let by_passes = (narrow.len() - packed, packed);
    for name in narrow {
        let file = format!("{name}.safetensors");
        std::fs::copy(cases("torch").join(&file), folder.path().join(&file)).unwrap();
    }
    let gpu = wgpu_attention::Gpu::with_options(&wgpu_attention::GpuOptions::adapter(adapters()[0].clone()));
    let methods = wgpu_attention::Method::every(gpu.unwrap().capabilities());
    assert!(methods.len() >= 8, "{methods:?}");
    let first = adapters()[0].clone();
    let narrow = folder.path().to_path_buf();
    // Packed sequences run only fused, and ops other than attention have no methods.
    for (dir, by_passes, by_fused) in
        [(narrow, by_passes, by_fused), (cases("onnx"), (93, 43), (93, 43)), (cases("transformers"), (7, 25), (7, 25))]
    {
        let args = ["check", dir.to_str().unwrap(), "--adapter", &first, "--method", "all", "--json", "report.json"];
        let ran = attn(folder.path(), &args);
        ran.succeeded();
        let report = report(folder.path());
        let count = |variant: &str, status: &str| {
            let is_it = |result: &&Value| result["variant"] == variant && result["status"] == status;
            results(&report).iter().filter(is_it).count()
        };
        for (n, method) in methods.iter().enumerate() {
            let variant = method.to_string().replace("three passes", "three-passes");
            let (passed, skipped) = if n == 0 { by_passes } else { by_fused };
            assert_eq!((count(&variant, "passed"), count(&variant, "skipped")), (passed, skipped), "{variant}");
            // The table shows it too.
            let row = ran.stdout.lines().find(|line| line.starts_with(&format!("│   {variant} "))).unwrap();
            let cells: Vec<&str> = row.split(['│', '┆']).map(str::trim).collect();
            assert_eq!(cells[2..5], [passed.to_string().as_str(), "0", &skipped.to_string()], "{row}");
        }
    }
    // The widest case by the two methods that untuned calls use.
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
    skipped_all(&ran);
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    let reason = "skipped varlen_self@three-passes: the method three passes cannot compute this: packed sequences run fused only";
    assert!(ran.stdout.contains(reason), "{}", ran.stdout);
    let onnx = onnx.to_str().unwrap();
    let ran = check(&[onnx, "--adapter", "0", "--method", "fused", "--filter", "softmax_axis_0", "--verbose"]);
    assert!(ran.stdout.contains("skipped test_softmax_axis_0@fused: the op Softmax has no methods"), "{}", ran.stdout);
    // A tile that does not exist.
    let ran = check(&[torch, "--adapter", "0", "--method", "rows3x8/keys4", "--filter", "sdpa_dim005", "--verbose"]);
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    assert!(ran.stdout.contains("rows and keys must be 1, 2, 4 or 8"), "{}", ran.stdout);
    check(&[torch, "--method", "fast"]).refused(2, "is not a method");
    // There is only one method, named or not.
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
    for method in ["three-passes", "rows1x8/keys4"] {
        assert!(ran.stdout.contains(&format!("FAILED bad@{method}: out against ref64")), "{}", ran.stdout);
    }
    let report = report(folder.path());
    let variants: Vec<&Value> = results(&report).iter().map(|result| &result["variant"]).collect();
    assert_eq!(variants, ["three-passes", "rows1x8/keys4"]);
}

#[test]
fn several_adapters_add_up() {
    let ran = attn(
        folder().path(),
        &["check", cases("onnx").to_str().unwrap(), "--adapter", "all", "--filter", "softmax_axis_0"],
    );
    ran.succeeded();
    assert_eq!(ran.last_line(), format!("{} passed, 0 failed, 0 skipped", adapters().len()));
    assert!(ran.stdout.contains("│ CPU backend (CPU) "), "{}", ran.stdout);
}

/// A case file with one tensor changed by `change`, or another member in its header.
fn copy_case(from: &Path, to: &Path, member: Option<(&str, Value)>, change: impl Fn(&str, Dtype, &mut Vec<u8>)) {
    let bytes = std::fs::read(from).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    if let Some((path, value)) = member {
        let mut case: Value = serde_json::from_str(&metadata["case"]).unwrap();
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
    let lines = ran.stdout.lines().filter(|line| line.starts_with("FAILED bad@auto: out against ref64: difference "));
    assert!(lines.count() == 1 && ran.stdout.contains("1.2345e3"), "{}", ran.stdout);
    let report = report(folder.path());
    assert_eq!((&report["schema"], &report["folder"]), (&"attn-check/1".into(), &".".into()));
    let [bad, good] = results(&report) else { panic!("{report}") };
    assert_eq!((&bad["id"], &bad["op"], &bad["status"]), (&"bad@auto".into(), &"sdpa".into(), &"failed".into()));
    assert_eq!(
        (&good["id"], &good["status"], &good["same_bits"]),
        (&"good@auto".into(), &"passed".into(), &true.into())
    );
    let out = bad["outputs"].as_array().unwrap().iter().find(|output| output["name"] == "out").unwrap();
    assert_eq!((&out["ok"], &out["expected"]), (&false.into(), &1234.5.into()));
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
    skipped_all(&ran);
    assert_eq!(ran.last_line(), "0 passed, 0 failed, 1 skipped");
    assert!(ran.stdout.contains("skipped odd@auto: the op Telepathy is not known"), "{}", ran.stdout);
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
fn unknown_parts_of_a_call_are_named() {
    let folder = folder();
    let from = cases("keras_jax/jax_causal.safetensors");
    let bytes = std::fs::read(&from).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = header.metadata().clone().unwrap()["case"].clone();
    let with = |key: &str, value: Value| {
        let mut case: Value = serde_json::from_str(&text).unwrap();
        case[key] = value;
        copy_case(&from, &folder.path().join("odd.safetensors"), Some(("", case)), |_, _, _| {});
        attn(folder.path(), &["check", ".", "--adapter", "cpu"])
    };
    // The results agree without it, and the report says so.
    let ran = with("logits_soft_cap", 30.into());
    assert_eq!(ran.last_line(), "1 passed, 0 failed, 0 skipped");
    assert!(ran.stdout.contains("the case's logits_soft_cap is not known and was ignored"), "{}", ran.stdout);
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
    assert!(ran.stdout.contains("skipped odd@auto: the tensor in.sinks is not known"), "{}", ran.stdout);
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

/// Two PyTorch cases, one of them made wrong, and one of an unknown op.
fn mixed(folder: &Path) {
    let case = cases("torch").join("sdpa_dim005.safetensors");
    copy_case(&case, &folder.join("good.safetensors"), None, |_, _, _| {});
    copy_case(&case, &folder.join("bad@home.safetensors"), None, |name, _, data| {
        if name == "ref64.lse" {
            data[..8].copy_from_slice(&99f64.to_le_bytes());
        }
    });
    copy_case(&case, &folder.join("odd.safetensors"), Some(("/op", "Telepathy".into())), |_, _, _| {});
}

#[test]
fn a_folder_has_every_form_of_the_report() {
    let outer = folder();
    let (at, dir) = (outer.path(), outer.path().join("my cases"));
    std::fs::create_dir(&dir).unwrap();
    mixed(&dir);
    let forms = ["--json", "report.json", "--junit", "a.xml", "--markdown", "a.md", "--html", "a.html"];
    let ran = attn(at, &[&["check", "my cases", "--adapter", "cpu"], &forms[..]].concat());
    assert_eq!(ran.status, Some(1));
    assert_eq!(ran.last_line(), "1 passed, 1 failed, 1 skipped");
    let repro = "attn check 'my cases' --adapter cpu --repro bad@home@auto";
    assert!(ran.stdout.contains(repro), "{}", ran.stdout);

    let markdown = std::fs::read_to_string(at.join("a.md")).unwrap();
    for part in ["all cases of my cases", "| sdpa | f32 | ✗ 1 of 2 |", "| Telepathy | f32 | – |"] {
        assert!(markdown.contains(part), "{part} is not in {markdown}");
    }
    let junit = junit_parser::from_reader(std::fs::read(at.join("a.xml")).unwrap().as_slice()).unwrap();
    assert_eq!((junit.tests, junit.failures, junit.skipped), (3, 1, 1));
    let browser = &mut Browser::open(&at.join("a.html"), 390, 844);
    assert!(browser.text("document.getElementById('run').textContent").contains("all cases of my cases; "));
    assert_eq!(browser.text("document.getElementById('count').textContent"), "3 results");
    browser.click("document.querySelector('#results summary')");
    browser.wait("document.querySelector('#results code') !== null");
    assert_eq!(browser.text("document.querySelector('#results code').textContent"), repro);
    let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.value(overflow), 0, "nothing sticks out of a phone");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);

    // A saved report is shown again, and compared with a later one.
    let shown = attn(at, &["check", "--from", "report.json"]);
    shown.succeeded();
    assert_eq!(shown.last_line(), ran.last_line());
    std::fs::copy(dir.join("good.safetensors"), dir.join("bad@home.safetensors")).unwrap();
    std::fs::remove_file(dir.join("odd.safetensors")).unwrap();
    attn(at, &["check", "my cases", "--adapter", "cpu", "--json", "later.json"]).succeeded();
    let diff = attn(at, &["check", "--diff", "report.json", "later.json"]);
    diff.succeeded();
    assert!(diff.stdout.contains("newly passing: 1\n  sdpa, auto: 1 case, the first bad@home@auto"), "{}", diff.stdout);
    let back = attn(at, &["check", "--diff", "later.json", "report.json"]);
    assert_eq!(back.status, Some(1));
    assert!(back.stdout.contains("REGRESSION: newly failing: 1"), "{}", back.stdout);
}

#[test]
fn a_case_of_a_folder_runs_by_its_id() {
    let folder = folder();
    let at = folder.path();
    mixed(at);
    let check = |more: &[&str]| attn(at, &[&["check", ".", "--adapter", "cpu"], more].concat());
    let listed = check(&["--list"]);
    listed.succeeded();
    assert_eq!(listed.stdout, "bad@home@auto\ngood@auto\nodd@auto\n");
    let ran = check(&["--repro", "good@auto"]);
    ran.succeeded();
    assert!(ran.stdout.starts_with("passed: good@auto on cpu"), "{}", ran.stdout);
    let ran = check(&["--repro", "bad@home@auto", "--shrink"]);
    assert_eq!(ran.status, Some(1));
    assert!(ran.stdout.contains("lse is off by") && ran.stdout.contains("Not shrunk"), "{}", ran.stdout);
    check(&["--repro", "better"]).refused(2, "holds no case better");
    check(&["--repro", "good@fast"]).refused(2, "is not a method");
    for option in ["--quick", "--dawn"] {
        check(&[option]).refused(2, "leave out the folder .");
    }
    check(&["--json", "a", "--html", "./a"]).refused(2, "needs its own file");
}

#[test]
fn a_driver_crash_in_a_case_of_a_folder_is_reported_and_the_others_run() {
    let folder = folder();
    let at = folder.path();
    let case = cases("torch").join("sdpa_dim005.safetensors");
    for n in 10..24 {
        copy_case(&case, &at.join(format!("case{n}.safetensors")), None, |_, _, _| {});
    }
    for (fault, say) in [("hang", "the driver hung: no answer within 2 s"), ("crash", "the driver crashed: signal: 6")]
    {
        let ran = attn(at, &["check", ".", "--adapter", "cpu", "--time-limit", "2", "--plant", fault]);
        assert_eq!((ran.status, ran.last_line()), (Some(1), "13 passed, 1 failed, 0 skipped"), "{}", ran.stdout);
        assert!(ran.stdout.starts_with(&format!("FAILED case19@auto: {say}")), "{}", ran.stdout);
    }
}
