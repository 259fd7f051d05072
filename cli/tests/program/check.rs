//! `attn check`.

use std::path::Path;

use safetensors::Dtype;

use crate::kit::{adapters, attn, cases, floats, folder};

#[test]
fn every_case_passes_on_every_adapter() {
    for adapter in adapters() {
        for (name, last) in [
            ("onnx", "103 passed, 0 failed, 33 skipped"),
            ("torch", "94 passed, 0 failed, 0 skipped"),
            ("transformers", "3 passed, 0 failed, 0 skipped"),
        ] {
            let ran = attn(folder().path(), &["check", cases(name).to_str().unwrap(), "--adapter", &adapter]);
            ran.succeeded();
            assert_eq!(ran.last_line(), last, "{adapter}\n{}", ran.stdout);
        }
    }
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
    ] {
        let to = folder.path().join("odd.safetensors");
        copy_case(&cases(&format!("{case}.safetensors")), &to, Some((path, "yes".into())), |_, _, _| {});
        let ran = attn(folder.path(), &["check", ".", "--adapter", "cpu"]);
        assert_eq!(ran.status, Some(1));
        assert_eq!(ran.last_line(), "0 passed, 1 failed, 0 skipped", "{case}");
    }
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
