//! Running the program, and files to run it on.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use safetensors::Dtype;
pub use wgpu_attention_conformance::case_folder as cases;
use wgpu_attention_conformance::{Got, assert_close_to};

/// Every adapter of this machine by index, and `cpu`.
pub fn adapters() -> Vec<String> {
    let adapters = wgpu_attention::Gpu::adapters().into_iter().map(|adapter| adapter.index.to_string());
    adapters.chain(["cpu".to_string()]).collect()
}

/// The result of a run of the program.
pub struct Ran {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// The last line of stdout.
    pub fn last_line(&self) -> &str {
        self.stdout.lines().last().unwrap_or_default()
    }
    /// The program's own lines on stderr, without those of drivers.
    pub fn errors(&self) -> String {
        self.stderr.lines().filter(|line| !line.contains("XDG_RUNTIME_DIR")).collect::<Vec<_>>().join("\n")
    }
    /// Asserts that it ended with `status`, without a panic, and that stderr contains `part`.
    #[track_caller]
    pub fn refused(&self, status: i32, part: &str) {
        assert_eq!(self.status, Some(status), "{}\n{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        assert!(self.stderr.contains(part), "\"{part}\" is not in: {}", self.stderr);
    }
    #[track_caller]
    pub fn succeeded(&self) {
        assert_eq!(self.status, Some(0), "{}\n{}", self.stdout, self.stderr);
    }
}

/// Runs `attn` in `folder`.
pub fn attn(folder: &Path, args: &[&str]) -> Ran {
    attn_with(folder, args, &[])
}

/// The same with environment variables.
pub fn attn_with(folder: &Path, args: &[&str], env: &[(&str, &str)]) -> Ran {
    attn_within(MOST, folder, args, env)
}

/// The same, but killed with a report if it takes longer than `most`.
pub fn attn_within<S: AsRef<OsStr> + Debug>(most: Duration, folder: &Path, args: &[S], env: &[(&str, &str)]) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_attn"))
        .args(args)
        .env_remove("WGPU_ADAPTER_NAME")
        .envs(env.iter().copied())
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let stdout = all_of(child.stdout.take().expect("piped"));
    let stderr = all_of(child.stderr.take().expect("piped"));
    let began = Instant::now();
    let status = loop {
        match child.try_wait().expect("waited for") {
            Some(status) => break status,
            None if began.elapsed() > most => {
                child.kill().expect("killed");
                child.wait().expect("waited for");
                panic!("attn {args:?} takes more than {most:?}");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    Ran {
        status: status.code(),
        stdout: String::from_utf8(stdout.join().expect("read")).expect("UTF-8"),
        stderr: String::from_utf8_lossy(&stderr.join().expect("read")).into_owned(),
    }
}

/// The time limit of a call, including compilation on a busy machine.
const MOST: Duration = Duration::from_secs(1200);

fn all_of(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("read");
        bytes
    })
}

pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// The case that is embedded in `attn`.
pub fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/minilm-layer3.case.safetensors")
}

pub type Entry<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

pub fn floats<'a>(name: &'a str, shape: &[usize], data: &[f32]) -> Entry<'a> {
    (name, Dtype::F32, shape.to_vec(), data.iter().flat_map(|x| x.to_le_bytes()).collect())
}

pub fn save(path: &Path, entries: &[Entry<'_>]) {
    let views = entries.iter().map(|(name, dtype, shape, data)| {
        (*name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).expect("a tensor that fits"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("serialises")).expect("written");
}

/// Shape and values of a float tensor in a safetensors file.
pub fn load(path: &Path, name: &str) -> (Vec<usize>, Vec<f64>) {
    let bytes = std::fs::read(path).expect("the file is there");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a valid file");
    let view = file.tensor(name).expect("the tensor is there");
    let data = view.data();
    let values = match view.dtype() {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        Dtype::F64 => data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
        Dtype::BF16 => {
            data.chunks_exact(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect()
        }
        other => panic!("{name} is {other:?}"),
    };
    (view.shape().to_vec(), values)
}

/// Compares numbers of magnitude 1, each separately, as the library's tests do.
#[track_caller]
pub fn close(got: &[f64], expected: &[f64], allowed: f64) {
    close_as(wgpu_attention::Dtype::F32, got, expected, allowed);
}

/// The same for results rounded to a half type: half a unit in the last place more is allowed.
#[track_caller]
pub fn close_as(dtype: wgpu_attention::Dtype, got: &[f64], expected: &[f64], allowed: f64) {
    let values = got.iter().map(|&x| x as f32).collect();
    let got = Got { name: "numbers", shape: vec![got.len(), 1], values, dtype };
    assert_close_to("numbers of the size of 1", &got, expected, |_, _| 1.0, allowed);
}

/// Distinct, evenly spread, moderate numbers.
pub fn numbers(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 + seed) * 0.7).sin()).collect()
}
