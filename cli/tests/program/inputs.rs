//! Inputs as users have them: other types, files and shapes. Each is computed, or its error says what to do.

use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::kit::{Entry, Ran, adapters, attn, cases, close, close_as, floats, folder, load, numbers, save};

const SHAPE: [usize; 4] = [1, 2, 3, 4];
const LEN: usize = 24;

/// An .npy file from NumPy's name of the type, the shape and the data.
fn npy(dtype: &str, shape: &[usize], data: &[u8]) -> Vec<u8> {
    let axes: String = shape.iter().map(|n| format!("{n},")).collect();
    let header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({axes}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn bytes_of<const N: usize>(data: &[f32], to: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    data.iter().flat_map(|&x| to(x)).collect()
}

/// Runs `attn run` on `in.safetensors`, writing `out.safetensors`.
fn run(folder: &Path, adapter: &str, more: &[&str]) -> Ran {
    attn(folder, &[&["run", "in.safetensors", "-o", "out.safetensors", "--adapter", adapter], more].concat())
}

fn qkv() -> [Entry<'static>; 3] {
    ["q", "k", "v"].map(|name| floats(name, &SHAPE, &numbers(LEN, name.as_bytes()[0].into())))
}

/// Runs a call on queries, keys, values and additional tensors, and returns its output.
fn output(folder: &Path, adapter: &str, more: &[Entry<'_>], options: &[&str]) -> Vec<f64> {
    save(&folder.join("in.safetensors"), &[&qkv()[..], more].concat());
    run(folder, adapter, options).succeeded();
    load(&folder.join("out.safetensors"), "output").1
}

#[test]
fn arrays_of_other_types_are_computed() {
    let folder = folder();
    let at = folder.path();
    let q = numbers(LEN, 0.0);
    let of_f16: Vec<f32> = q.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
    let of_bf16: Vec<f32> = q.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    let with = |q: &[f32]| {
        save(&at.join("in.safetensors"), &["q", "k", "v"].map(|name| floats(name, &SHAPE, q)));
        run(at, "cpu", &[]).succeeded();
        load(&at.join("out.safetensors"), "output").1
    };
    // Rounding the inputs is not an error of the program.
    let (plain, of_f16, of_bf16) = (with(&q), with(&of_f16), with(&of_bf16));
    use wgpu_attention::Dtype::{BF16, F16, F32};
    for (dtype, data, truth, stored) in [
        ("<f4", bytes_of(&q, f32::to_le_bytes), &plain, F32),
        (">f4", bytes_of(&q, f32::to_be_bytes), &plain, F32),
        ("<f8", bytes_of(&q, |x| f64::from(x).to_le_bytes()), &plain, F32),
        (">f8", bytes_of(&q, |x| f64::from(x).to_be_bytes()), &plain, F32),
        ("<f2", bytes_of(&q, |x| f16::from_f32(x).to_le_bytes()), &of_f16, F16),
        (">f2", bytes_of(&q, |x| f16::from_f32(x).to_be_bytes()), &of_f16, F16),
        // As ml_dtypes writes bfloat16.
        ("<V2", bytes_of(&q, |x| bf16::from_f32(x).to_le_bytes()), &of_bf16, BF16),
        ("|V2", bytes_of(&q, |x| bf16::from_f32(x).to_le_bytes()), &of_bf16, BF16),
    ] {
        std::fs::write(at.join("x.npy"), npy(dtype, &SHAPE, &data)).unwrap();
        let same = ["run", "--q", "x.npy", "--k", "x.npy", "--v", "x.npy", "--adapter", "cpu"];
        let ran = attn(at, &[&same[..], &["-o", "out.safetensors"]].concat());
        ran.succeeded();
        close_as(stored, &load(&at.join("out.safetensors"), "output").1, truth, 1e-6);
        // Once for all three.
        assert_eq!(ran.stderr.matches("rounded to f32").count(), usize::from(dtype.ends_with("f8")), "{}", ran.stderr);
        // The output has the type of q and can be read back.
        let ran = attn(at, &[&same[..], &["-o", "q.npy"]].concat());
        ran.succeeded();
        assert_eq!(ran.stderr.contains("ml_dtypes"), dtype.ends_with("V2"), "{}", ran.stderr);
        let again = ["run", "--q", "q.npy", "--k", "q.npy", "--v", "q.npy", "-o", "again.safetensors"];
        attn(at, &[&again[..], &["--adapter", "cpu"]].concat()).succeeded();
        let written = std::fs::read(at.join("q.npy")).unwrap();
        assert_eq!(written.len() % 64, LEN * if dtype.ends_with("f4") || dtype.ends_with("f8") { 4 } else { 2 } % 64);
    }
}

#[test]
fn the_uint64_lengths_of_numpy() {
    for adapter in adapters() {
        let folder = folder();
        let file = cases("faults").join("6-u64.npz");
        let args = ["run", file.to_str().unwrap(), "-o", "out.safetensors", "--adapter", &adapter, "--weights"];
        attn(folder.path(), &args).succeeded();
        let (shape, weights) = load(&folder.path().join("out.safetensors"), "weights");
        assert_eq!(shape, [1, 1, 2, 2]);
        close(&weights, &[0.5; 4], 1e-6);
    }
    let folder = folder();
    let lengths = |name: &'static str, x: u64| (name, Dtype::U64, vec![1], x.to_le_bytes().to_vec());
    let signed = ("key_lengths", Dtype::I64, vec![1], 2i64.to_le_bytes().to_vec());
    let of_i64 = output(folder.path(), "cpu", &[signed], &[]);
    assert_eq!(output(folder.path(), "cpu", &[lengths("key_lengths", 2)], &[]), of_i64);
    let more = [lengths("key_lengths", u64::MAX)];
    save(&folder.path().join("in.safetensors"), &[&qkv()[..], &more].concat());
    run(folder.path(), "cpu", &[]).refused(1, "key_lengths holds 18446744073709551615; the largest integer allowed is");
}

#[test]
fn errors_for_unsupported_arrays_say_what_they_are() {
    let folder = folder();
    let at = folder.path();
    for (dtype, size, is, way_out) in [
        ("<c8", 8, "holds complex64 ('<c8')", "save x.real and x.imag separately"),
        ("<c16", 16, "holds complex128", "save x.real and x.imag separately"),
        ("<f16", 16, "holds float128", "x.astype('float32')"),
        ("<f1", 1, "holds float8", "x.astype('float32')"),
        ("<V1", 1, "float8 or int4 of ml_dtypes", "x.astype('float32')"),
        ("<V12", 12, "holds 12 bytes each without a type", "x.astype('float32')"),
        ("|O", 8, "holds Python objects", "numpy.array(x.tolist()"),
        ("<U2", 8, "holds strings", "x.astype('float32')"),
        ("|S3", 3, "holds strings", "x.astype('float32')"),
        ("<M8[s]", 8, "holds dates or times", "x.astype('int64')"),
        ("<q9", 9, "elements of an unknown type ('<q9')", "x.astype('float32')"),
    ] {
        std::fs::write(at.join("x.npy"), npy(dtype, &SHAPE, &vec![0; LEN * size])).unwrap();
        let ran = attn(at, &["run", "--q", "x.npy", "--k", "x.npy", "--v", "x.npy", "-o", "o.npz", "--adapter", "cpu"]);
        ran.refused(1, is);
        ran.refused(1, way_out);
        assert!(!ran.stderr.contains("not a valid"), "{}", ran.stderr);
    }
    let q = ("q", Dtype::F8_E4M3, SHAPE.to_vec(), vec![0; LEN]);
    save(&at.join("in.safetensors"), &[&[q][..], &qkv()[1..]].concat());
    run(at, "cpu", &[]).refused(1, "in.safetensors: q is F8_E4M3, which is not supported");
    run(at, "cpu", &[]).refused(1, "x.to(torch.float32) before save_file");
}

#[test]
fn f64_that_overflows_f32_is_reported() {
    let folder = folder();
    // A mask as transformers makes it in float64.
    let bias = [0.0, f64::MIN, 0.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    save(&folder.path().join("in.safetensors"), &[&qkv()[..], &[("bias", Dtype::F64, vec![3], bias)]].concat());
    for adapter in adapters() {
        let ran = run(folder.path(), &adapter, &["--weights"]);
        ran.succeeded();
        assert!(ran.stderr.contains("note: bias is f64"), "{}", ran.stderr);
        assert!(ran.stderr.contains("1 of the values of bias overflow f32 and become infinite"), "{}", ran.stderr);
        let (_, weights) = load(&folder.path().join("out.safetensors"), "weights");
        assert!(weights.chunks(3).all(|row| row[1] == 0.0 && (row[0] + row[2] - 1.0).abs() < 1e-6), "{weights:?}");
    }
}

#[test]
fn other_files_say_what_they_are_and_how_to_convert_them() {
    let folder = folder();
    let at = folder.path();
    let torch = [b"PK\x03\x04".as_slice(), &[0; 26], b"archive/data.pkl\x80\x02}q\0."].concat();
    let layer = std::fs::read(cases("faults").join("ok.safetensors")).unwrap();
    let npz = std::fs::read(cases("faults").join("6-u64.npz")).unwrap();
    let index: &[u8] = br#"{"metadata": {}, "weight_map": {"a": "b.safetensors"}}"#;
    for (name, bytes, says) in [
        ("m.pt", torch.as_slice(), "torch.load(\"m.pt\""),
        ("m.pth", &torch, "safetensors.torch.save_file(state, \"m.safetensors\")"),
        ("pytorch_model.bin", &torch, "torch.load(\"pytorch_model.bin\""),
        ("m.ckpt", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20", "PyTorch's own format"),
        ("renamed.safetensors", &torch, "PyTorch's own format"),
        ("renamed.npz", &torch, "PyTorch's own format"),
        ("renamed.npy", &torch, "PyTorch's own format"),
        ("m.pkl", b"\x80\x04\x95\x0a", "a Python pickle"),
        ("m.h5", b"\x89HDF\r\n\x1a\n\0\0", "h5py"),
        ("m.onnx", b"\x08\x07\x12\x07pytorch", "onnx.numpy_helper.to_array"),
        ("m.gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("model.safetensors.index.json", index, "an index of safetensors files"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "/resolve/"),
        ("empty.npz", b"", "it is empty"),
        ("empty.safetensors", b"", "it is empty"),
        (
            "cut.safetensors",
            &layer[..700],
            "the file is truncated: its header describes 1152 bytes of data, but it has 404",
        ),
        ("m.zip", &npz, "rename it to m.npz"),
        ("layer", &layer, "rename it to layer.safetensors"),
        ("x.csv", b"1,2\n3,4\n", "numpy.loadtxt(\"x.csv\""),
    ] {
        std::fs::write(at.join(name), bytes).unwrap();
        let status = if ["safetensors", "npz", "npy"].iter().any(|end| name.ends_with(end)) { 1 } else { 2 };
        attn(at, &["run", "--q", name, "--k", name, "--v", name, "-o", "o.npz", "--adapter", "cpu"])
            .refused(status, says);
        attn(at, &["plot", "attention", "--weights", name, "--adapter", "cpu"]).refused(status, says);
    }
    // As a layer's weights, whatever the name.
    std::fs::write(at.join("x.npy"), npy("<f4", &[1, 3, 8], &[0; 96])).unwrap();
    for (name, says) in [
        ("m.pt", "safetensors.torch.save_file(state, \"m.safetensors\")"),
        ("m.gguf", "GGUF"),
        ("renamed.npz", "PyTorch's own format"),
        ("m.zip", "dict(numpy.load(\"m.zip\"))"),
        ("empty.safetensors", "it is empty"),
        ("cut.safetensors", "the file is truncated"),
    ] {
        let args = ["mha", "--weights", name, "--heads", "2", "--query", "x.npy", "-o", "o.npy", "--adapter", "cpu"];
        attn(at, &args).refused(1, says);
    }
}

#[test]
fn float_key_padding_is_a_bias() {
    let case = cases("torch").join("mha_kpm_bool.safetensors");
    let bytes = std::fs::read(&case).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let padding = file.tensor("in.key_padding_mask").unwrap();
    // The same mask as PyTorch adds it.
    let bias: Vec<f32> = padding.data().iter().map(|&drop| if drop == 1 { f32::NEG_INFINITY } else { 0.0 }).collect();
    let folder = folder();
    let at = folder.path();
    save(&at.join("padding.safetensors"), &[floats("padding", padding.shape(), &bias)]);
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = metadata.metadata().as_ref().unwrap()["case"].clone();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let heads = json["num_heads"].to_string();
    let query = format!("{}:in.query", case.display());
    for adapter in adapters() {
        let mut args = vec!["mha", "--weights", case.to_str().unwrap(), "--prefix", "param.", "--heads", &heads];
        args.extend(["--query", &query, "--key-padding", "padding.safetensors", "-o", "out.safetensors"]);
        args.extend(["--adapter", &adapter]);
        if !json["batch_first"].as_bool().unwrap() {
            args.push("--seq-first");
        }
        attn(at, &args).succeeded();
        let (shape, truth) = load(&case, "ref64.out");
        let (got_shape, got) = load(&at.join("out.safetensors"), "output");
        assert_eq!(got_shape, shape);
        close(&got, &truth, 5e-6);
    }
    // The same case with its mask in floats, as `attn check` reads it.
    let case_folder = at.join("cases");
    std::fs::create_dir(&case_folder).unwrap();
    let data: Vec<u8> = bias.iter().flat_map(|x| x.to_le_bytes()).collect();
    let views: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| match name.as_str() {
            "in.key_padding_mask" => {
                let shape = view.shape().to_vec();
                (name, safetensors::tensor::TensorView::new(Dtype::F32, shape, &data).unwrap())
            }
            _ => (name, view),
        })
        .collect();
    let metadata = std::collections::HashMap::from([("case".to_string(), text)]);
    let bytes = safetensors::serialize(views, Some(metadata)).unwrap();
    std::fs::write(case_folder.join("mha_kpm_float.safetensors"), bytes).unwrap();
    for adapter in adapters() {
        let ran = attn(at, &["check", "cases", "--adapter", &adapter]);
        ran.succeeded();
        assert_eq!(ran.last_line(), "1 passed, 0 failed, 0 skipped", "{adapter}");
    }
    // The input of the original bug: entry 1 of two sees only its first key.
    let of = |name: &str| cases("faults").join(name).display().to_string();
    let (layer, x, padding) = (of("ok.safetensors"), of("2-x.npy"), of("7-padding-float.npy"));
    for adapter in adapters() {
        let mut args = vec!["mha", "--weights", &layer, "--heads", "2", "--query", &x, "--key-padding", &padding];
        args.extend(["-o", "out.safetensors", "--return-weights", "--adapter", &adapter]);
        attn(at, &args).succeeded();
        let (shape, weights) = load(&at.join("out.safetensors"), "weights");
        assert_eq!(shape, [2, 2, 3, 3]);
        close(&weights[18..], &[1.0, 0.0, 0.0].repeat(6), 1e-6);
        assert!(weights[..18].iter().all(|&weight| weight > 0.0));
    }
}

#[test]
fn run_takes_key_padding_and_query_lengths() {
    let folder = folder();
    let at = folder.path();
    let flags = |name: &'static str, data: [u8; 3]| (name, Dtype::BOOL, vec![1, 3], data.to_vec());
    let lengths = |name: &'static str, x: i64| (name, Dtype::I64, vec![1], x.to_le_bytes().to_vec());
    for adapter in adapters() {
        let two_keys = output(at, &adapter, &[lengths("key_lengths", 2)], &[]);
        let none = f32::NEG_INFINITY;
        close(&output(at, &adapter, &[floats("key_padding", &[1, 3], &[0.0, 0.0, none])], &[]), &two_keys, 1e-6);
        close(&output(at, &adapter, &[flags("key_padding", [0, 0, 1])], &["--mask", "drop"]), &two_keys, 1e-6);
        close(&output(at, &adapter, &[flags("key_padding", [1, 1, 0])], &["--mask", "keep"]), &two_keys, 1e-6);
        let one_query = output(at, &adapter, &[lengths("query_lengths", 1)], &[]);
        let whole = output(at, &adapter, &[], &[]);
        for (row, got) in one_query.chunks(4).enumerate() {
            let expected = if row % 3 == 0 { &whole[row * 4..][..4] } else { &[0.0; 4] };
            close(got, expected, 1e-6);
        }
    }
    save(&at.join("in.safetensors"), &[&qkv()[..], &[flags("key_padding", [0, 0, 1])]].concat());
    run(at, "cpu", &[]).refused(2, "add --mask keep");
    save(&at.join("in.safetensors"), &[&qkv()[..], &[floats("key_padding", &[1, 3], &[0.0; 3])]].concat());
    run(at, "cpu", &["--mask", "drop"]).refused(2, "nor a boolean \"key_padding\"");
}

#[test]
fn wrong_inputs_name_the_right_ones() {
    let folder = folder();
    let at = folder.path();
    let bools = |name: &'static str| (name, Dtype::BOOL, vec![3, 3], vec![1; 9]);
    for (more, options, status, says) in [
        (floats("mask", &[3, 3], &[0.0; 9]), &["--mask", "keep"][..], 2, "the tensor \"bias\" of attn run"),
        (floats("mask", &[3, 3], &[0.0; 9]), &[], 2, "the tensor \"bias\" of attn run"),
        (bools("bias"), &[], 2, "the tensor \"mask\" of attn run"),
        (floats("key_lengths", &[1], &[2.0]), &[], 1, "x.astype('int64')"),
        (floats("sink", &[3], &[0.0; 3]), &[], 1, "must be [heads_q] = [2]"),
        (floats("key_padding", &[3, 1], &[0.0; 3]), &[], 1, "must be [batch, len_k] = [1, 3]"),
        (floats("bias", &[2, 3], &[0.0; 6]), &[], 1, "[heads, len_k] must be [2, 1, 3]"),
        (floats("maks", &[1], &[0.0]), &[], 1, "known names are q, k, v, mask, bias, key_padding"),
        (floats("bias", &[1], &[0.0]), &["--window", "-1,0"], 2, "- leaves a side open"),
        (floats("bias", &[1], &[0.0]), &["--causal", "topleft"], 2, "top-left, bottom-right or a whole number"),
    ] {
        save(&at.join("in.safetensors"), &[&qkv()[..], &[more]].concat());
        run(at, "cpu", options).refused(status, says);
    }
    // Axes in the other order, which only fit that way.
    let permuted = [("q", [1, 3, 2, 4]), ("k", [1, 5, 2, 4]), ("v", [1, 5, 2, 4])];
    let permuted = permuted.map(|(name, shape)| floats(name, &shape, &numbers(shape.iter().product(), 1.0)));
    save(&at.join("in.safetensors"), &permuted);
    run(at, "cpu", &[]).refused(1, "use --layout bshd");
    run(at, "cpu", &["--layout", "bshd"]).succeeded();
    // A bias of [batch, len_k], and one of [batch, len_q, len_k].
    let four = ["q", "k", "v"].map(|name| floats(name, &[4, 2, 3, 4], &numbers(96, 1.0)));
    for (shape, says) in [(vec![4, 3], "x[:, None, None, :]"), (vec![4, 3, 3], "x[:, None]")] {
        let bias = floats("bias", &shape, &vec![0.0; shape.iter().product()]);
        save(&at.join("in.safetensors"), &[&four[..], &[bias]].concat());
        run(at, "cpu", &[]).refused(1, says);
    }
    std::fs::write(at.join("q.npy"), npy("<f4", &SHAPE, &[0; LEN * 4])).unwrap();
    attn(at, &["run", "q.npy", "-o", "o.npz", "--adapter", "cpu"]).refused(2, "--q FILE --k FILE --v FILE");
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("arr_0.npy", zip::write::SimpleFileOptions::default()).unwrap();
    std::io::Write::write_all(&mut zip, &npy("<f4", &[1], &[0; 4])).unwrap();
    std::fs::write(at.join("nameless.npz"), zip.finish().unwrap().into_inner()).unwrap();
    attn(at, &["run", "nameless.npz", "-o", "o.npz", "--adapter", "cpu"]).refused(1, "numpy.savez(file, q=…)");
}

#[test]
fn weights_that_do_not_fit_suggest_alternatives() {
    let folder = folder();
    let at = folder.path();
    // More than the largest buffer of any adapter, and more than the memory.
    let entries = ["q", "k", "v"].map(|name| (name, Dtype::F16, vec![1, 64, 60_000, 1], vec![0; 2 * 64 * 60_000]));
    save(&at.join("in.safetensors"), &entries);
    for adapter in adapters() {
        let ran = run(at, &adapter, &["--weights"]);
        ran.refused(1, "--inspect-heads and --inspect-queries");
        ran.refused(1, "--column-sums");
        // The CPU backend computes their mean from all of them.
        assert_eq!(ran.stderr.contains("--weights averaged"), adapter != "cpu", "{}", ran.stderr);
        ran.refused(1, "needs 921600000000 bytes");
        let averaged = run(at, &adapter, &["--weights", "averaged"]);
        averaged.refused(1, "--inspect-heads and --inspect-queries");
        assert!(!averaged.stderr.contains("--weights averaged"), "{}", averaged.stderr);
    }
}
