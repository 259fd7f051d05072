//! Fuzzing: every file reader of the program on thousands of corrupted files. Each must return an error or a result,
//! and never panic.

use std::io::Write;

use wgpu_attention::{Device, Method};
use wgpu_attention_conformance::{case_folder, refused};

use crate::check::{case::Case, compute::compute, report};
use crate::files::TensorFile;

/// The small cases of one of the project's case folders.
fn cases(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<_> = std::fs::read_dir(case_folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    files.sort();
    files.into_iter().map(|path| std::fs::read(path).unwrap()).filter(|bytes| bytes.len() < 8000).take(25).collect()
}

#[test]
fn cases_read_and_computed() {
    for (name, count) in [("keras_jax", 2000), ("onnx", 2000), ("torch", 2000), ("transformers", 1000)] {
        refused(
            &format!("cases of {name}, computed"),
            &cases(name),
            |_| 3000,
            count,
            |bytes| {
                let case = Case::parse("changed".into(), bytes.to_vec());
                case.is_ok_and(|case| compute(&case, &Device::Cpu, Method::Auto).is_ok())
            },
        );
    }
}

#[test]
fn arrays_of_numpy() {
    let folder = tempfile::tempdir().unwrap();
    let mut npy = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }".to_vec();
    npy.resize(127, b' ');
    npy.push(b'\n');
    npy.extend((0..24).flat_map(|n| (n as f32).to_le_bytes()));
    let read = |ending: &str, bytes: &[u8]| {
        let path = folder.path().join("x").with_extension(ending);
        std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        TensorFile::open(&path).is_ok_and(|file| file.single(None).is_ok())
    };
    let npz = folder.path().join("made.npz");
    assert!(read("npy", &npy));
    let array = TensorFile::open(&folder.path().join("x.npy")).unwrap().single(None).unwrap();
    crate::files::write_tensors(&npz, &[("x", array)]).unwrap();
    let npz = std::fs::read(npz).unwrap();
    refused("npy files", &[npy], |_| 128, 3000, |bytes| read("npy", bytes));
    refused("npz files", &[npz], |_| 1000, 2000, |bytes| read("npz", bytes));
}

#[test]
fn reports() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let json = br#"{"schema":"attn-check/1","version":"0.1.0","wgpu":"30","naga":"30","suite":"quick","seed":1,
        "date":"2026-11-25T00:00:00Z","host":"linux","adapters":[{"name":"a","backend":"Vulkan","kind":"Cpu","vendor":1,
        "device":2,"driver":"d","driver_info":"1","shader_compiler":"s","subgroups":[4,8],"features":["A"],
        "limits":{"x":1},"observed":[{"workgroup":8,"invocations":8,"subgroup":8}],"ended":null,"seconds":1.5}],
        "results":[{"adapter":0,"id":"attention/plain/f32/1@auto","op":"attention","variant":"auto","storage":"f32",
        "status":"passed","outputs":[{"name":"output","against":"f64","ok":true,"count":2,"max_abs":1e-7,"allowed":1e-6,
        "ulps":1.0,"nmse":"NaN","nmse_allowed":"inf","worst":[0,1],"got":1.0,"expected":1.0,"nans":0}],
        "milliseconds":1.5}]}"#;
    refused("reports", &[json.to_vec()], <[u8]>::len, 2000, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        report::file::read(&path).is_ok()
    });
}
