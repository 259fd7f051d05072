//! `attn run` and `attn mha`: reading and writing the user's tensors.

use std::io::Write;
use std::path::Path;

use npyz::WriterBuilder;
use safetensors::Dtype;

use crate::kit::{adapters, attn, attn_with, cases, close, close_as, floats, folder, load, numbers, save};

const SHAPE: [usize; 4] = [2, 2, 3, 4];
const LEN: usize = 2 * 2 * 3 * 4;

/// Attention of `[2, 2, 3, 4]` tensors in float64: output, weights and LSE.
fn expected(q: &[f32], k: &[f32], v: &[f32], sees: impl Fn(usize, usize, usize) -> bool) -> [Vec<f64>; 3] {
    let [mut output, mut weights, mut lse] = [vec![], vec![], vec![]];
    for b in 0..2 {
        for h in 0..2 {
            let row = |x: &[f32], i: usize| -> Vec<f64> {
                x[((b * 2 + h) * 3 + i) * 4..][..4].iter().map(|&x| x.into()).collect()
            };
            for i in 0..3 {
                let score = |j: usize| row(q, i).iter().zip(row(k, j)).map(|(a, b)| a * b).sum::<f64>() / 2.0;
                let e: Vec<f64> = (0..3).map(|j| if sees(b, i, j) { score(j).exp() } else { 0.0 }).collect();
                let sum: f64 = e.iter().sum();
                lse.push(sum.ln());
                weights.extend(e.iter().map(|x| x / sum));
                output.extend((0..4).map(|d| (0..3).map(|j| e[j] / sum * row(v, j)[d]).sum::<f64>()));
            }
        }
    }
    [output, weights, lse]
}

fn qkv() -> [Vec<f32>; 3] {
    [numbers(LEN, 0.0), numbers(LEN, 100.0), numbers(LEN, 200.0)]
}

fn save_qkv(path: &Path, more: Vec<crate::kit::Entry<'_>>) -> [Vec<f32>; 3] {
    let [q, k, v] = qkv();
    let mut entries = vec![floats("q", &SHAPE, &q), floats("k", &SHAPE, &k), floats("v", &SHAPE, &v)];
    entries.extend(more);
    save(path, &entries);
    [q, k, v]
}

#[test]
fn run_gives_output_weights_and_lse() {
    for adapter in adapters() {
        let folder = folder();
        let mask = ("mask", Dtype::BOOL, vec![3, 3], vec![1, 0, 1, 1, 1, 1, 0, 1, 1]);
        let [q, k, v] = save_qkv(&folder.path().join("in.safetensors"), vec![mask]);
        let out = folder.path().join("out.safetensors");
        let keep = |i: usize, j: usize| !matches!((i, j), (0, 1) | (2, 0));
        let call = |more: &[&str]| {
            let mut args = vec!["run", "in.safetensors", "-o", "out.safetensors", "--adapter", &adapter];
            args.extend(more);
            attn(folder.path(), &args).succeeded();
        };
        call(&["--mask", "keep", "--weights", "--lse"]);
        let [output, weights, lse] = expected(&q, &k, &v, |_, i, j| keep(i, j));
        for (name, shape, values) in
            [("output", &SHAPE[..], &output), ("weights", &[2, 2, 3, 3][..], &weights), ("lse", &[2, 2, 3][..], &lse)]
        {
            let (got_shape, got) = load(&out, name);
            assert_eq!(got_shape, shape, "{name}");
            close(&got, values, 1e-6);
        }
        call(&["--mask", "drop", "--causal", "2"]);
        let [output, ..] = expected(&q, &k, &v, |_, i, j| !keep(i, j));
        // Row 1 sees nothing if the mask is inverted: output 0.
        let output: Vec<f64> = output.iter().map(|x| if x.is_nan() { 0.0 } else { *x }).collect();
        close(&load(&out, "output").1, &output, 1e-6);
    }
}

#[test]
fn threads_change_no_bit_of_the_cpu_backend() {
    // Several tiles of rows, a single row, and more keys than are summed in f32.
    let folder = folder();
    for (heads, len_q, len_k) in [(2, 150, 3000), (3, 1, 5000)] {
        let path = folder.path().join("in.safetensors");
        let part = |name, len, seed| floats(name, &[1, heads, len, 8], &numbers(heads * len * 8, seed));
        save(&path, &[part("q", len_q, 0.0), part("k", len_k, 100.0), part("v", len_k, 200.0)]);
        let results: Vec<_> = ["1", "2", "3", "7"]
            .into_iter()
            .map(|threads| {
                let args = ["run", "in.safetensors", "-o", "out.safetensors", "--lse", "--weights", "averaged"];
                let args = [&args[..], &["--adapter", "cpu"]].concat();
                attn_with(folder.path(), &args, &[("RAYON_NUM_THREADS", threads)]).succeeded();
                std::fs::read(folder.path().join("out.safetensors")).unwrap()
            })
            .collect();
        assert!(results.iter().all(|one| *one == results[0]), "{heads} heads, {len_q} queries, {len_k} keys");
    }
}

#[test]
fn run_inspects_chosen_heads_and_queries() {
    let folder = folder();
    let [q, k, v] = save_qkv(&folder.path().join("in.safetensors"), vec![]);
    let out = folder.path().join("out.safetensors");
    let [output, weights, _] = expected(&q, &k, &v, |_, i, j| j <= i);
    // Head 1, queries 1 and 2, of both batch entries.
    let rows: Vec<&[f64]> = [4, 5, 10, 11].iter().map(|row| &weights[row * 3..row * 3 + 3]).collect();
    for adapter in adapters() {
        let call = |more: &[&str]| {
            let mut args =
                vec!["run", "in.safetensors", "-o", "out.safetensors", "--causal", "0", "--adapter", &adapter];
            args.extend(more);
            attn(folder.path(), &args)
        };
        let choice = ["--inspect-heads", "1", "--inspect-queries", "1..3"];
        call(&[&choice[..], &["--weights", "--column-sums", "--entropy"]].concat()).succeeded();
        close(&load(&out, "output").1, &output, 1e-6);
        let (shape, got) = load(&out, "weights");
        assert_eq!(shape, [2, 1, 2, 3]);
        close(&got, &rows.concat(), 1e-6);
        let sums: Vec<f64> = rows.chunks(2).flat_map(|two| (0..3).map(|j| two[0][j] + two[1][j])).collect();
        assert_eq!(load(&out, "column_sums").0, [2, 1, 3]);
        close(&load(&out, "column_sums").1, &sums, 1e-6);
        let entropy = |row: &&[f64]| -row.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        assert_eq!(load(&out, "entropy").0, [2, 1, 2]);
        close(&load(&out, "entropy").1, &rows.iter().map(entropy).collect::<Vec<_>>(), 1e-6);
        // All heads and queries, together with the forward call's own weights; no LSE unless requested.
        call(&["--weights", "--entropy"]).succeeded();
        close(&load(&out, "weights").1, &weights, 1e-6);
        assert_eq!(load(&out, "entropy").0, [2, 2, 3]);
        let bytes = std::fs::read(&out).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("lse").is_err());

        call(&choice).refused(2, "add at least one");
        call(&[&choice[..], &["--weights", "averaged"]].concat()).refused(2, "not with averaged");
        call(&["--inspect-queries", "1-3", "--entropy"]).refused(2, "such as 10..20");
        call(&["--inspect-queries", "1..4", "--entropy"]).refused(1, "queries 1..4 are out of range");
        call(&["--inspect-heads", "2", "--column-sums"]).refused(1, "head 2 of [2] is out of range");
    }
}

#[test]
fn run_composes_window_causal_and_lengths() {
    let folder = folder();
    let lengths = ("key_lengths", Dtype::I64, vec![2], [3i64, 2].iter().flat_map(|x| x.to_le_bytes()).collect());
    let [q, k, v] = save_qkv(&folder.path().join("in.safetensors"), vec![lengths]);
    for adapter in adapters() {
        let args = [
            "run",
            "in.safetensors",
            "-o",
            "out.safetensors",
            "--causal",
            "top-left",
            "--window",
            "1,-",
            "--adapter",
            &adapter,
        ];
        attn(folder.path(), &args).succeeded();
        let [output, ..] = expected(&q, &k, &v, |b, i, j| j <= i && i <= j + 1 && j < 3 - b);
        close(&load(&folder.path().join("out.safetensors"), "output").1, &output, 1e-6);
    }
}

#[test]
fn run_takes_a_sink() {
    let folder = folder();
    let sinks = [0.5f32, -1.0];
    let [q, k, v] = save_qkv(&folder.path().join("in.safetensors"), vec![floats("sink", &[2], &sinks)]);
    let [output, weights, lse] = expected(&q, &k, &v, |_, i, j| j <= i);
    // The weight that the sink of a query's head leaves for its keys.
    let left = |row: usize| 1.0 / (1.0 + (f64::from(sinks[row / 3 % 2]) - lse[row]).exp());
    let rows =
        |x: &[f64], width: usize| -> Vec<f64> { x.iter().enumerate().map(|(n, x)| x * left(n / width)).collect() };
    for adapter in adapters() {
        let args = ["run", "in.safetensors", "-o", "out.safetensors", "--causal", "0", "--weights", "--lse"];
        attn(folder.path(), &[&args[..], &["--adapter", &adapter]].concat()).succeeded();
        let out = folder.path().join("out.safetensors");
        close(&load(&out, "output").1, &rows(&output, 4), 1e-6);
        close(&load(&out, "weights").1, &rows(&weights, 3), 1e-6);
        let lse: Vec<f64> = lse.iter().enumerate().map(|(row, lse)| lse - left(row).ln()).collect();
        close(&load(&out, "lse").1, &lse, 2e-6);
    }
    save_qkv(&folder.path().join("in.safetensors"), vec![floats("sink", &[3], &[0.0; 3])]);
    attn(folder.path(), &["run", "in.safetensors", "-o", "out.safetensors"]).refused(1, "must be [heads_q] = [2]");
}

fn write_npy(path: &Path, shape: &[u64], data: &[f32], order: npyz::Order) {
    let file = std::fs::File::create(path).unwrap();
    let mut writer =
        npyz::WriteOptions::new().default_dtype().order(order).shape(shape).writer(file).begin_nd().unwrap();
    writer.extend(data).unwrap();
    writer.finish().unwrap();
}

#[test]
fn numpy_files_and_folders_give_the_same_numbers() {
    let folder = folder();
    let [q, k, v] = save_qkv(&folder.path().join("in.safetensors"), vec![]);
    std::fs::create_dir(folder.path().join("arrays")).unwrap();
    for (name, data) in [("q", &q), ("k", &k), ("v", &v)] {
        write_npy(&folder.path().join(format!("arrays/{name}.npy")), &[2, 2, 3, 4], data, npyz::Order::C);
    }
    let [output, ..] = expected(&q, &k, &v, |_, _, _| true);
    let read = |path: &str| -> Vec<f64> {
        let bytes = std::fs::read(folder.path().join(path)).unwrap();
        npyz::NpyFile::new(&bytes[..]).unwrap().into_vec::<f32>().unwrap().into_iter().map(f64::from).collect()
    };
    for adapter in adapters() {
        attn(folder.path(), &["run", "arrays", "-o", "out.npy", "--adapter", &adapter]).succeeded();
        close(&read("out.npy"), &output, 1e-6);
        let files = ["--q", "arrays/q.npy", "--k", "arrays/k.npy", "--v", "arrays/v.npy"];
        let mut args = vec!["run", "-o", "out.npz", "--lse", "--adapter", &adapter];
        args.extend(files);
        attn(folder.path(), &args).succeeded();
        // The program reads back its own .npz, one of several arrays by name.
        let bytes = std::fs::read(folder.path().join("out.npz")).unwrap();
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes)).unwrap();
        let file = npyz::NpyFile::new(archive.by_name("output.npy").unwrap()).unwrap();
        let values: Vec<f32> = file.into_vec().unwrap();
        close(&values.into_iter().map(f64::from).collect::<Vec<_>>(), &output, 1e-6);
        assert!(archive.by_name("lse.npy").is_ok());
    }
    // Column-major files hold the same array.
    let mut columns = vec![0.0; LEN];
    for (n, &x) in q.iter().enumerate() {
        let [b, h, i, d] = [n / 24, n / 12 % 2, n / 4 % 3, n % 4];
        columns[b + 2 * (h + 2 * (i + 3 * d))] = x;
    }
    write_npy(&folder.path().join("arrays/q.npy"), &[2, 2, 3, 4], &columns, npyz::Order::Fortran);
    attn(folder.path(), &["run", "arrays", "-o", "out.npy", "--adapter", "cpu"]).succeeded();
    close(&read("out.npy"), &output, 1e-6);
    // As numpy.savez_compressed writes them.
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let deflated = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    for name in ["q.npy", "k.npy", "v.npy"] {
        zip.start_file(name, deflated).unwrap();
        zip.write_all(&std::fs::read(folder.path().join("arrays").join(name)).unwrap()).unwrap();
    }
    let mut archive = zip.finish().unwrap().into_inner();
    std::fs::write(folder.path().join("in.npz"), &archive).unwrap();
    let args = ["run", "in.npz", "-o", "out.npy", "--adapter", "cpu"];
    std::fs::remove_file(folder.path().join("out.npy")).unwrap();
    attn(folder.path(), &args).succeeded();
    close(&read("out.npy"), &output, 1e-6);
    // Compressed as NumPy never does: by bzip2, method 12 of zip.
    for (start, place) in [(b"PK\x03\x04", 8), (b"PK\x01\x02", 10)] {
        for at in (0..archive.len() - 4).filter(|&at| archive[at..].starts_with(start)).collect::<Vec<_>>() {
            archive[at + place] = 12;
        }
    }
    std::fs::write(folder.path().join("in.npz"), &archive).unwrap();
    attn(folder.path(), &args).refused(1, "ompression method not supported");
}

#[test]
fn the_other_layout_and_f16_come_back_as_they_came() {
    let folder = folder();
    let [q, k, v] = qkv();
    let bshd = |x: &[f32]| -> Vec<u8> {
        let at = |b: usize, s: usize, h: usize, d: usize| x[((b * 2 + h) * 3 + s) * 4 + d];
        let mut bytes = Vec::new();
        for n in 0..LEN {
            bytes.extend(half::f16::from_f32(at(n / 24, n / 8 % 3, n / 4 % 2, n % 4)).to_le_bytes());
        }
        bytes
    };
    let entry = |name, x: &[f32]| (name, Dtype::F16, vec![2, 3, 2, 4], bshd(x));
    save(&folder.path().join("in.safetensors"), &[entry("q", &q), entry("k", &k), entry("v", &v)]);
    // The truth is computed from the values in the file.
    let [q, k, v] = [q, k, v].map(|x| x.into_iter().map(|x| half::f16::from_f32(x).to_f32()).collect::<Vec<_>>());
    for adapter in adapters() {
        let args = ["run", "in.safetensors", "-o", "out.safetensors", "--layout", "bshd", "--adapter", &adapter];
        attn(folder.path(), &args).succeeded();
        let (shape, got) = load(&folder.path().join("out.safetensors"), "output");
        assert_eq!(shape, [2, 3, 2, 4]);
        let [output, ..] = expected(&q, &k, &v, |_, _, _| true);
        let permuted: Vec<f64> =
            (0..LEN).map(|n| output[((n / 24 * 2 + n / 4 % 2) * 3 + n / 8 % 3) * 4 + n % 4]).collect();
        close_as(wgpu_attention::Dtype::F16, &got, &permuted, 1e-6);
    }
}

#[test]
fn a_layer_gives_what_pytorch_gives() {
    let folder = folder();
    for (name, heads) in [("mha_e12_h4_nobias_self", "4"), ("mha_kpm_bool_cross", "4"), ("mha_zero_attn", "")] {
        let case = cases("torch").join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&case).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let text: serde_json::Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
        let count = text["num_heads"].to_string();
        assert!(heads.is_empty() || heads == count);
        let of = |tensor: &str| format!("{}:in.{tensor}", case.display());
        for adapter in adapters() {
            let [query, key, value, padding] = ["query", "key", "value", "key_padding_mask"].map(of);
            let mut args = vec!["mha", "--weights", case.to_str().unwrap(), "--prefix", "param.", "--heads", &count];
            args.extend(["--query", &query, "-o", "out.safetensors", "--adapter", &adapter]);
            if header.info("in.key").is_some() {
                args.extend(["--key", &key, "--value", &value]);
            }
            if header.info("in.key_padding_mask").is_some() {
                args.extend(["--key-padding", &padding, "--mask", "drop"]);
            }
            for (flag, on) in [
                ("--zero-attn", &text["add_zero_attn"]),
                ("--seq-first", &(!text["batch_first"].as_bool().unwrap()).into()),
            ] {
                if on.as_bool().unwrap() {
                    args.push(flag);
                }
            }
            if text["need_weights"].as_bool().unwrap() {
                let averaged = text["average_attn_weights"].as_bool().unwrap();
                args.extend(["--return-weights", if averaged { "averaged" } else { "per-head" }]);
            }
            attn(folder.path(), &args).succeeded();
            let out = folder.path().join("out.safetensors");
            for (ours, theirs) in [("output", "ref64.out"), ("weights", "ref64.weights")] {
                if header.info(theirs).is_some() {
                    let (shape, truth) = load(&case, theirs);
                    let (got_shape, got) = load(&out, ours);
                    assert_eq!(got_shape, shape, "{name} {ours}");
                    close(&got, &truth, 5e-6);
                }
            }
        }
    }
}

/// The numbers of an `.npy` file.
fn read_npy(path: &Path) -> Vec<f64> {
    let bytes = std::fs::read(path).unwrap();
    let file = npyz::NpyFile::new(&bytes[..]).unwrap();
    match file.dtype().num_bytes() {
        Some(8) => file.into_vec::<f64>().unwrap(),
        _ => file.into_vec::<f32>().unwrap().into_iter().map(f64::from).collect(),
    }
}

#[test]
fn layers_of_well_known_models_are_read_by_their_names() {
    let folder = folder();
    let at = |file: &str| cases("faults").join(file).display().to_string();
    let run = |weights: &str, prefix: &str, more: &[&str]| {
        let (weights, x) = (at(weights), at("x.npy"));
        let mut args = vec!["mha", "--weights", &weights, "--prefix", prefix, "--heads", "2", "-o", "o.npy"];
        args.extend(["--query", &x]);
        args.extend(more);
        attn(folder.path(), &args)
    };
    let want = read_npy(&cases("faults").join("want.npy"));
    let out = folder.path().join("o.npy");
    for adapter in adapters() {
        for (weights, prefix) in [
            ("ok", ""),
            ("1-own-biases", ""),
            ("4-bert", "encoder.layer.0.attention.self."),
            ("4-bert", "encoder.layer.0.attention."),
            ("4-bert", "encoder.layer.0.attention"),
            ("4-gpt2", "h.0.attn."),
        ] {
            run(&format!("{weights}.safetensors"), prefix, &["--adapter", &adapter]).succeeded();
            close(&read_npy(&out), &want, 2e-6);
        }
        // These can only be compared with the library: `tests/it/names.rs`.
        run("4-llama.safetensors", "model.layers.0.self_attn.", &["--adapter", &adapter]).succeeded();
        run("5-wide-heads.safetensors", "", &["--adapter", &adapter, "--kv-heads", "1"]).succeeded();
        std::fs::remove_file(&out).unwrap();
    }
    for (weights, prefix, more, part) in [
        ("1b-misspelt-bias", "", &[][..], "unexpected tensor in_proj.bias"),
        ("4-llama", "model.layers.0.attn.", &[], "\"model.layers.0.self_attn.\" (llama)"),
        ("4-llama", "", &[], "\"model.layers.0.self_attn.\" (llama)"),
        (
            "4-llama",
            "model.layers.0.self_attn.",
            &["--names", "bert"],
            "not named as those of an attention layer of bert",
        ),
        ("4-gpt2", "h.0.attn.", &["--names", "nanogpt"], "c_attn.weight has shape [8, 24]"),
        ("5-wide-heads", "", &["--kv-heads", "2"], "that is 1 key/value heads, not 2"),
        ("ok", "", &["--ignore", "in_proj.bias"], "is to be ignored, but"),
    ] {
        let more = [more, &["--adapter", "cpu"]].concat();
        run(&format!("{weights}.safetensors"), prefix, &more).refused(1, part);
    }
    run("1b-misspelt-bias.safetensors", "", &["--ignore", "in_proj.bias", "--adapter", "cpu"]).succeeded();
    run("ok.safetensors", "", &["--names", "bart"]).refused(2, "distilbert");
    run("x.npy", "", &["--adapter", "cpu"]).refused(1, "it is a NumPy array");
    run("no.safetensors", "", &["--adapter", "cpu"]).refused(1, "no.safetensors");
}

#[test]
fn config_json_resolves_ambiguous_names() {
    let folder = folder();
    let weight = |rows: usize, seed: f32| numbers(rows * 4, seed);
    let [q, k, v, o] = [0.0, 10.0, 20.0, 30.0].map(|seed| weight(4, seed));
    let (ones, zeros) = ([1.0f32; 2], [0.0f32; 2]);
    let write = |norm: &[f32]| {
        let entries = [("q_proj", &q), ("k_proj", &k), ("v_proj", &v), ("o_proj", &o)];
        let names = entries.map(|(name, _)| format!("model.layers.0.self_attn.{name}.weight"));
        let norms = ["q_norm", "k_norm"].map(|name| format!("model.layers.0.self_attn.{name}.weight"));
        let mut all: Vec<_> =
            (names.iter().zip(entries)).map(|(name, (_, data))| floats(name, &[4, 4], data)).collect();
        all.extend(norms.iter().map(|name| floats(name, &[2], norm)));
        save(&folder.path().join("model.safetensors"), &all);
    };
    save(&folder.path().join("x.safetensors"), &[floats("x", &[3, 4], &numbers(12, 5.0))]);
    let run = |more: &[&str]| {
        let mut args = vec!["mha", "--weights", ".", "--prefix", "model.layers.0.self_attn.", "--heads", "2"];
        args.extend(["--query", "x.safetensors", "-o", "out.safetensors", "--adapter", "cpu"]);
        args.extend(more);
        attn(folder.path(), &args)
    };
    let output = || load(&folder.path().join("out.safetensors"), "output").1;
    write(&ones);
    run(&[]).refused(1, "--names");
    run(&["--names", "qwen3"]).succeeded();
    let plain = output();
    // Gemma's w counts from 1.
    write(&zeros);
    std::fs::write(
        folder.path().join("config.json"),
        r#"{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}"#,
    )
    .unwrap();
    run(&[]).succeeded();
    close(&output(), &plain, 0.0);
    run(&["--norm-epsilon", "0.5"]).succeeded();
    assert!(output().iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3));
    run(&["--norm-epsilon", "-1"]).refused(1, "epsilon = -1");
    std::fs::write(folder.path().join("config.json"), "not JSON").unwrap();
    run(&[]).refused(1, "--names");
}

#[test]
fn a_mask_per_batch_entry_is_refused_with_advice() {
    let folder = folder();
    let at = |file: &str| cases("faults").join(file).display().to_string();
    let args = |mask: &str| {
        let args =
            ["mha", "--weights", &at("ok.safetensors"), "--heads", "2", "--query", &at("2-x.npy"), "-o", "o.npy"];
        let more = ["--attn-mask", mask, "--mask", "keep", "--adapter", "cpu"];
        args.iter().chain(&more).map(|word| word.to_string()).collect::<Vec<_>>()
    };
    let run = |mask: &str| {
        let args = args(mask);
        attn(folder.path(), &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    run(&at("2-mask.npy")).refused(1, "mask[:, None]");
    // Follow the advice.
    let bytes = std::fs::read(cases("faults").join("2-mask.npy")).unwrap();
    let bools: Vec<bool> = npyz::NpyFile::new(&bytes[..]).unwrap().into_vec().unwrap();
    let mask = ("mask", Dtype::BOOL, vec![2, 1, 3, 3], bools.iter().map(|&x| u8::from(x)).collect());
    save(&folder.path().join("mask.safetensors"), &[mask]);
    run("mask.safetensors").succeeded();
    close(&read_npy(&folder.path().join("o.npy")), &read_npy(&cases("faults").join("2-want.npy")), 2e-6);
}

/// The contents of a folder.
fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_mask_needs_a_meaning_and_names_must_be_right() {
    let folder = folder();
    let mask = ("mask", Dtype::BOOL, vec![3, 3], vec![1; 9]);
    save_qkv(&folder.path().join("masked.safetensors"), vec![mask]);
    save_qkv(&folder.path().join("plain.safetensors"), vec![]);
    save_qkv(&folder.path().join("odd.safetensors"), vec![floats("maks", &[1], &[0.0])]);
    save(&folder.path().join("few.safetensors"), &[floats("q", &[1, 1], &[0.0]), floats("keys", &[1, 1], &[0.0])]);
    let run = |file: &str, more: &[&str]| {
        let mut args = vec!["run", file, "-o", "out.safetensors", "--adapter", "cpu"];
        args.extend(more);
        attn(folder.path(), &args)
    };
    run("masked.safetensors", &[]).refused(2, "--mask keep");
    run("plain.safetensors", &["--mask", "keep"]).refused(2, "neither a tensor \"mask\"");
    run("odd.safetensors", &[]).refused(1, "\"maks\"");
    run("few.safetensors", &[]).refused(1, "found keys, q");
    run("absent.safetensors", &[]).refused(1, "cannot read absent.safetensors");
    run("plain.safetensors", &["--window", "3"]).refused(2, "two sides");
    run("plain.safetensors", &["--causal"]).refused(2, "--causal");
    run("plain.safetensors", &["--softcap", "-1"]).refused(1, "softcap = -1");
    run("plain.safetensors", &["--adapter-of-mine"]).refused(2, "--adapter-of-mine");
    attn(folder.path(), &["run", "plain.safetensors", "-o", "out.txt"]).refused(2, "the ending must be");
    attn(folder.path(), &["run", "plain.safetensors", "-o", "out.npy", "--lse"]).refused(2, "holds one tensor");
    attn(folder.path(), &["run", "plain.safetensors", "-o", "no/out.npz"]).refused(1, "there is no folder");
    attn(folder.path(), &["run", "plain.safetensors", "-o", "x.npz", "--adapter", "all"])
        .refused(2, "is not supported here");
    for file in listing(folder.path()) {
        assert!(!file.starts_with("out") && !file.starts_with(".attn"), "{file} was left behind");
    }
}

#[test]
fn shapes_that_disagree_are_named() {
    let folder = folder();
    let entry = |name, shape: &[usize]| floats(name, shape, &numbers(shape.iter().product(), 0.0)).clone();
    for (k, v, say) in
        [([1, 2, 3, 4], [1, 2, 5, 4], "different lengths"), ([1, 2, 3, 5], [1, 2, 3, 4], "different widths")]
    {
        save(&folder.path().join("in.safetensors"), &[entry("q", &[1, 2, 3, 4]), entry("k", &k), entry("v", &v)]);
        std::fs::write(folder.path().join("out.npz"), "as it was").unwrap();
        for adapter in adapters() {
            attn(folder.path(), &["run", "in.safetensors", "-o", "out.npz", "--adapter", &adapter]).refused(1, say);
        }
        assert_eq!(std::fs::read(folder.path().join("out.npz")).unwrap(), b"as it was");
        assert_eq!(listing(folder.path()), ["in.safetensors", "out.npz"]);
    }
}

/// An .npy file with this text as its header.
fn npy(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn hostile_numpy_files_are_errors() {
    let folder = folder();
    let with_shape = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut long = b"\x93NUMPY\x02\x00".to_vec();
    long.extend(u32::MAX.to_le_bytes());
    let files = [
        Vec::new(),
        b"\x93NUMPY".to_vec(),
        b"not an array at all".to_vec(),
        long,
        npy(&with_shape("(4611686018427387904,)"), &[0; 16]),
        npy(&with_shape("(4294967296, 4294967296, 4294967296)"), &[0; 16]),
        npy(&with_shape("(18446744073709551615, 18446744073709551615)"), &[0; 16]),
        npy(&with_shape("(-1,)"), &[0; 16]),
        npy(&with_shape("(5,)"), &[0; 16]),
        npy(&"(".repeat(9000), &[0; 16]),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", &[0; 8]),
        npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }\n", &[0; 8]),
    ];
    for (n, bytes) in files.iter().enumerate() {
        std::fs::write(folder.path().join("bad.npy"), bytes).unwrap();
        let ran = attn(
            folder.path(),
            &["run", "--q", "bad.npy", "--k", "bad.npy", "--v", "bad.npy", "-o", "out.npz", "--adapter", "cpu"],
        );
        ran.refused(1, "attn: ");
        assert!(ran.errors().lines().count() <= 2, "file {n}: {}", ran.stderr);
        std::fs::write(folder.path().join("bad.npz"), bytes).unwrap();
        attn(folder.path(), &["run", "bad.npz", "-o", "out.npz", "--adapter", "cpu"]).refused(1, "not a valid .npz");
    }
    assert_eq!(listing(folder.path()), ["bad.npy", "bad.npz"]);
}

#[test]
fn truncated_safetensors_are_errors() {
    let folder = folder();
    save_qkv(&folder.path().join("whole.safetensors"), vec![]);
    let whole = std::fs::read(folder.path().join("whole.safetensors")).unwrap();
    for length in (0..whole.len()).step_by(37) {
        std::fs::write(folder.path().join("in.safetensors"), &whole[..length]).unwrap();
        attn(folder.path(), &["run", "in.safetensors", "-o", "out.npz", "--adapter", "cpu"])
            .refused(1, "not a valid safetensors file");
    }
    // Offsets and shapes that do not match the data.
    let header = r#"{"q":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 16]);
    std::fs::write(folder.path().join("in.safetensors"), bytes).unwrap();
    attn(folder.path(), &["run", "in.safetensors", "-o", "out.npz", "--adapter", "cpu"])
        .refused(1, "not a valid safetensors file");
}
