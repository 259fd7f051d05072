//! Random command lines, plausible and absurd: each ends soon, with one of the program's exit statuses and no panic.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::kit::{Ran, attn_within, example, floats, folder, numbers, save};

/// The value that an option takes.
enum Takes {
    Nothing,
    File,
    /// An output file.
    Out,
    Whole,
    Real,
    /// Usually one of these.
    Word(&'static [&'static str]),
}
use Takes::{File, Nothing, Out, Real, Whole, Word};

/// A command and its options, each with its frequency out of ten; an option without a name is a positional argument.
type Form = (&'static [&'static str], &'static [(&'static str, Takes, u32)]);

const CAUSAL: Takes = Word(&["top-left", "bottom-right", "0", "-3", "9"]);
const WINDOW: Takes = Word(&["3,0", "-,2", ",", "0,0", "1"]);
const MASK: Takes = Word(&["keep", "drop"]);
const PICTURE: Takes = Word(&["a.png", "a.svg", "a.gif", "none/a.png"]);
const SHAPE: Takes =
    Word(&["1,2,2,8,8,4", "1,4,2,1,9,8:causal", "1,2,2,8,8,4:alibi", "1,2,2,0,8,4", "2,3,2,8,8,4", "P9", "1,1"]);

const FORMS: [Form; 13] = [
    (
        &["run"],
        &[
            ("", File, 7),
            ("--q", File, 2),
            ("--k", File, 2),
            ("--v", File, 2),
            ("-o", Out, 9),
            ("--causal", CAUSAL, 3),
            ("--window", WINDOW, 3),
            ("--softcap", Real, 2),
            ("--scale", Real, 2),
            ("--mask", MASK, 4),
            ("--weights", Word(&["per-head", "averaged"]), 3),
            ("--lse", Nothing, 3),
            ("--inspect-heads", Word(&["0", "0,1", "1,1", "9", ""]), 2),
            ("--inspect-queries", Word(&["0..3", "3..0", "0..99", "..", "7..8"]), 2),
            ("--column-sums", Nothing, 2),
            ("--entropy", Nothing, 2),
            ("--layout", Word(&["bhsd", "bshd"]), 2),
        ],
    ),
    (
        &["run", "in.safetensors"],
        &[("-o", Out, 10), ("--mask", MASK, 8), ("--causal", CAUSAL, 3), ("--scale", Real, 3), ("--lse", Nothing, 3)],
    ),
    (
        &["mha"],
        &[
            ("--weights", File, 9),
            ("--heads", Whole, 9),
            ("--query", File, 9),
            ("--key", File, 1),
            ("--value", File, 1),
            ("-o", Out, 9),
            ("--prefix", Word(&["", "layer.", "."]), 1),
            ("--zero-attn", Nothing, 2),
            ("--seq-first", Nothing, 2),
            ("--return-weights", Nothing, 2),
            ("--attn-mask", File, 1),
            ("--bias", File, 1),
            ("--key-padding", File, 1),
        ],
    ),
    (
        &["mha", "--weights", "layer.safetensors", "--query", "x.npy"],
        &[("--heads", Whole, 10), ("-o", Out, 10), ("--key-padding", File, 2), ("--causal", CAUSAL, 3)],
    ),
    (&["devices"], &[("--json", Nothing, 5), ("", Whole, 1)]),
    (
        &["check"],
        &[
            ("", Word(&["case", "broken", "arrays", "none", "q.npy"]), 10),
            ("--filter", Word(&["", "min", "x"]), 3),
            ("--method", Word(&["auto", "fused", "rows8x8/keys8", "rows0x0/keys0"]), 3),
            ("--verbose", Nothing, 3),
            ("--json", Out, 3),
        ],
    ),
    (&["check", "--from"], &[("", File, 10), ("--json", Out, 3)]),
    (&["check", "--diff"], &[("", File, 10), ("", File, 10)]),
    (
        &["bench", "--seconds", "0"],
        &[
            ("--shape", SHAPE, 10),
            ("--method", Word(&["auto", "fused,passes", "rows8x8/keys8", ",", "auto,auto"]), 2),
            ("--weights", Nothing, 2),
            ("--json", Out, 3),
            ("--plot", PICTURE, 2),
        ],
    ),
    (
        &["bench", "--seconds", "0"],
        &[
            ("--lengths", Word(&["8", "8,16", "0", "16,8", ""]), 10),
            ("--heads", Whole, 4),
            ("--dim", Whole, 4),
            ("--batch", Whole, 4),
            ("--causal", Nothing, 4),
            ("--plot", PICTURE, 2),
        ],
    ),
    (
        &["plot", "attention"],
        &[
            ("--weights", File, 3),
            ("--q", File, 7),
            ("--k", File, 7),
            ("--attn-mask", File, 1),
            ("--batch", Whole, 2),
            ("--tokens", Word(&["a,b,c", "a,b,c,d,e,f,g,h", "", "q.npy", "\u{1f600},\u{202e}"]), 3),
            ("--head", Word(&["0", "0,1", "1,1", "9"]), 3),
            ("--average", Nothing, 2),
            ("--lines", Nothing, 2),
            ("--token", Word(&["0", "7", "8", "a"]), 2),
            ("--title", Word(&["", "t", "<b>&\"", "\u{0}"]), 2),
            ("-o", PICTURE, 7),
            ("--html", Out, 3),
            ("--causal", CAUSAL, 2),
            ("--scale", Real, 2),
        ],
    ),
    (
        &["plot", "positions"],
        &[
            ("--method", Word(&["sinusoidal", "rotary", "alibi", "t5", "learned"]), 10),
            ("--len", Whole, 6),
            ("--dim", Whole, 6),
            ("--heads", Whole, 3),
            ("--base", Real, 3),
            ("--interleaved", Nothing, 2),
            ("--halves", Nothing, 2),
            ("--table", File, 3),
            ("--causal", Nothing, 2),
            ("--bidirectional", Nothing, 2),
            ("--buckets", Whole, 3),
            ("--max-distance", Whole, 3),
            ("-o", PICTURE, 9),
        ],
    ),
    (&["shader"], &[("", Word(&["softmax.wgsl", "softmax/lanes1x8", "../Cargo.toml", "flash/rows0"]), 7)]),
];

const FILES: [&str; 20] = [
    "in.safetensors",
    "in.safetensors:q",
    "in.safetensors:none",
    "layer.safetensors",
    "arrays",
    "arrays/q.npy",
    "q.npy",
    "x.npy",
    "weights.npy",
    "none.npy",
    "empty.npy",
    "cut.safetensors",
    "folder.npz",
    "report.json",
    "model.pt",
    "double.npy",
    "half.npy",
    "page.safetensors",
    ".",
    "/dev/null",
];
const OUTS: [&str; 10] = [
    "out.safetensors",
    "out.npz",
    "out.npy",
    "out.json",
    "out",
    "in.safetensors",
    "folder.npz",
    "none/out.npz",
    "/dev/null",
    "/proc/out.npz",
];
/// Small numbers, or more than any machine has; values in between would only take long.
const WHOLES: [&str; 9] =
    ["1", "2", "4", "8", "0", "-1", "9223372036854775807", "18446744073709551615", "99999999999999999999"];
const REALS: [&str; 10] = ["1", "0.5", "0", "-2", "1e-45", "3.5e38", "1e999", "NaN", "inf", "0x1"];

fn pick(rng: &mut Pcg64, from: &[&str]) -> OsString {
    from[rng.random_range(0..from.len())].into()
}

/// Values that fit nowhere.
fn hostile(rng: &mut Pcg64) -> OsString {
    #[cfg(unix)]
    if rng.random_bool(0.3) {
        return std::os::unix::ffi::OsStringExt::from_vec(vec![b'a', 0xff, 0xfe, b'.', b'n', b'p', b'y']);
    }
    match rng.random_range(0..4) {
        0 => OsString::new(),
        1 => "x".repeat(5000).into(),
        2 => pick(rng, &["--", "-", "\u{7f}", "%s%n", "$(true)", "ä;b", " ", "\n", ":", "=", "nul", "-o"]),
        _ => pick(rng, &WHOLES),
    }
}

fn line(seed: u64) -> Vec<OsString> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let rng = &mut rng;
    let (command, options) = &FORMS[seed as usize % FORMS.len()];
    let mut args: Vec<OsString> = command.iter().map(OsString::from).collect();
    for (name, takes, often) in *options {
        if rng.random_range(0..10) >= *often {
            continue;
        }
        if !name.is_empty() {
            args.push(name.into());
        }
        let value = match takes {
            Nothing => continue,
            _ if rng.random_bool(0.06) => hostile(rng),
            File => pick(rng, &FILES),
            Out => pick(rng, &OUTS),
            Whole => pick(rng, &WHOLES),
            Real => pick(rng, &REALS),
            // NUL terminates an argument, so no program ever receives one.
            Word(words) => pick(rng, words).to_string_lossy().replace('\0', "").into(),
        };
        args.push(value);
    }
    args.push("--adapter".into());
    args.push(match rng.random_range(0..20) {
        0 => hostile(rng),
        1 => "none".into(),
        _ => "cpu".into(),
    });
    args
}

/// Valid files, invalid files, and paths that are not files.
fn fill(at: &Path) {
    let npy = |name: &str, shape: &[u64], data: &[f32]| {
        use npyz::WriterBuilder;
        let file = std::fs::File::create(at.join(name)).expect("created");
        let mut writer =
            npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd().expect("a header");
        writer.extend(data.iter().copied()).expect("written");
        writer.finish().expect("written");
    };
    for name in ["arrays", "case", "broken", "folder.npz"] {
        std::fs::create_dir(at.join(name)).expect("created");
    }
    let qkv = ["q", "k", "v"].map(|name| floats(name, &[1, 2, 8, 4], &numbers(64, 1.0)));
    save(&at.join("in.safetensors"), &qkv);
    for name in ["q", "k", "v"] {
        npy(&format!("arrays/{name}.npy"), &[1, 2, 8, 4], &numbers(64, 2.0));
    }
    npy("q.npy", &[1, 2, 8, 4], &numbers(64, 3.0));
    npy("x.npy", &[2, 5, 8], &numbers(80, 4.0));
    npy("weights.npy", &[1, 2, 8, 8], &[0.125; 128]);
    let layer = [
        floats("in_proj_weight", &[24, 8], &numbers(192, 5.0)),
        floats("in_proj_bias", &[24], &numbers(24, 6.0)),
        floats("out_proj.weight", &[8, 8], &numbers(64, 7.0)),
        floats("out_proj.bias", &[8], &numbers(8, 8.0)),
    ];
    save(&at.join("layer.safetensors"), &layer);
    let case = std::fs::read(example()).expect("readable");
    std::fs::write(at.join("cut.safetensors"), &case[..case.len() / 2]).expect("written");
    std::fs::write(at.join("case/minilm.safetensors"), case).expect("written");
    std::fs::write(at.join("broken/index.json"), r#"[{"name": "none"}, {"name": "../in"}]"#).expect("written");
    std::fs::write(at.join("empty.npy"), "").expect("written");
    std::fs::write(at.join("model.pt"), b"PK\x03\x04archive/data.pkl").expect("written");
    std::fs::write(at.join("page.safetensors"), "<!doctype html>").expect("written");
    // Queries in float64, and in bfloat16 as ml_dtypes writes it.
    let whole = std::fs::read(at.join("q.npy")).expect("readable");
    let typed = |name: &str, dtype: &[u8], bytes: usize| {
        let mut file = whole.clone();
        let from = file.windows(3).position(|part| part == b"<f4").expect("a type");
        file[from..from + 3].copy_from_slice(dtype);
        file.resize(whole.len() - 64 * 4 + 64 * bytes, 0);
        std::fs::write(at.join(name), file).expect("written");
    };
    typed("double.npy", b"<f8", 8);
    typed("half.npy", b"<V2", 2);
    std::fs::write(at.join("report.json"), r#"{"schema": 1, "results": [{"id": 3}]}"#).expect("written");
}

#[test]
fn random_command_lines() {
    const LINES: u64 = 520;
    const MOST: Duration = Duration::from_secs(20);
    let mut statuses = [0; 4];
    let mut slowest = Duration::ZERO;
    for seed in 0..LINES {
        let folder = folder();
        fill(folder.path());
        let args = line(seed);
        let began = Instant::now();
        let Ran { status, stdout, stderr } = attn_within(MOST, folder.path(), &args, &[("WGPU_ATTENTION_CACHE", "")]);
        slowest = slowest.max(began.elapsed());
        let what = format!("line {seed}, {args:?}, {status:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{what}");
        match status {
            Some(code @ 0..=3) => statuses[code as usize] += 1,
            _ => panic!("{what}"),
        }
        // A check that fails says so in its report, on stdout.
        let reported = !stderr.trim().is_empty() || args[0] == "check" && !stdout.is_empty();
        assert!(status == Some(0) || reported, "{what}: no message");
    }
    println!("{LINES} lines, by exit status {statuses:?}, the slowest {slowest:.1?}");
    assert!(statuses[..3].iter().all(|&n| n > LINES / 20), "{statuses:?}: the lines are all of one kind");
}
