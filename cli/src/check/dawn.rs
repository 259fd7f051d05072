//! Exported calls on Dawn, Chrome's implementation of WebGPU, whose compiler and validation differ from wgpu's.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;
use wgpu_attention::ExportedCall;

use super::report::Adapter;
use crate::error::{Error, Result, fail};
use crate::files;

const SCRIPT: &str = include_str!("dawn.mjs");
/// The script's exit status if Dawn has no adapter.
const NO_ADAPTER: i32 = 3;
/// The time for starting Node and opening a device.
pub const START: Duration = Duration::from_secs(30);

/// The location of Dawn, and how long a call may take.
pub struct Dawn {
    /// A folder with `node_modules/webgpu`; it must be writable.
    pub modules: PathBuf,
    /// The Vulkan driver's manifest (`VK_DRIVER_FILES`), for Dawn only; `None`: that of this process.
    pub driver: Option<PathBuf>,
    /// The time limit for both runs of one call.
    pub limit: Duration,
}

/// The result of one call on Dawn.
pub struct DawnResult {
    /// The outputs, or why there are none: a missing feature or limit, a message of the compiler or device, a hang.
    pub outputs: Result<Vec<DawnOutput>, String>,
    /// Whether a feature or limit is missing.
    pub lacks: bool,
    /// Whether a second run gave the same bits, memory between the elements included.
    pub same_bits: bool,
    /// The time of the first run, including compilation.
    pub milliseconds: f64,
}

/// A result, in row-major order.
pub struct DawnOutput {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// The JSON that the script writes beside a plan.
#[derive(Deserialize)]
struct Written {
    adapter: About,
    error: Option<String>,
    #[serde(default)]
    lacks: bool,
    #[serde(default)]
    same_bits: bool,
    #[serde(default)]
    milliseconds: f64,
}

#[derive(Deserialize)]
struct About {
    backend: String,
    vendor: String,
    architecture: String,
    device: String,
    description: String,
    software: Option<bool>,
    subgroup_min: Option<u32>,
    subgroup_max: Option<u32>,
    features: Vec<String>,
    limits: BTreeMap<String, u64>,
}

impl Dawn {
    /// Reads `ATTN_DAWN` (a folder with `node_modules/webgpu`) and `ATTN_DAWN_DRIVER` (a driver's manifest); `None` if
    /// `ATTN_DAWN` is not set.
    pub fn from_environment(limit: Duration) -> Option<Dawn> {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Some(Dawn { modules: path("ATTN_DAWN")?, driver: path("ATTN_DAWN_DRIVER"), limit })
    }

    /// Runs each call twice and reports the results in the order of the calls. The first result includes the adapter.
    /// Pass a few hundred calls at a time, because their files exist until all are done.
    pub fn run(&self, calls: &[&ExportedCall], mut report: impl FnMut(Option<Adapter>, DawnResult)) -> Result<()> {
        let version = self.version()?;
        // Node searches the folders above the script for packages.
        let folder = tempfile::Builder::new().prefix("run-").tempdir_in(&self.modules);
        let folder = folder.map_err(|error| failed(&self.modules, &error))?;
        let root = std::path::absolute(folder.path()).map_err(|error| failed(folder.path(), &error))?;
        let script = root.join("dawn.mjs");
        std::fs::write(&script, SCRIPT).map_err(|error| failed(&script, &error))?;
        let folders: Vec<PathBuf> = (0..calls.len()).map(|n| root.join(n.to_string())).collect();
        for (call, folder) in calls.iter().zip(&folders) {
            std::fs::create_dir(folder).map_err(|error| failed(folder, &error))?;
            call.save(folder)?;
        }
        let (mut first, mut is_known) = (0, false);
        while first < folders.len() {
            let mut done = 0;
            let why = self.start(&script, &folders[first..], || {
                let at = first + done;
                done += 1;
                let (adapter, result) = read(calls[at], &folders[at], &version)?;
                report(Some(adapter).filter(|_| !std::mem::replace(&mut is_known, true)), result);
                Ok(())
            })?;
            first += done;
            if let Some(why) = why.filter(|_| first < folders.len()) {
                report(None, DawnResult { outputs: Err(why), lacks: false, same_bits: false, milliseconds: 0.0 });
                first += 1;
            }
        }
        Ok(())
    }

    /// The version of the npm package.
    fn version(&self) -> Result<String> {
        #[derive(Deserialize)]
        struct Package {
            version: String,
        }
        let path = self.modules.join("node_modules/webgpu/package.json");
        let package = std::fs::read(&path).map_err(|error| {
            Error::Failed(format!("{}: {error}; tests/portability/install-dawn installs Dawn for Node", path.display()))
        })?;
        let package: Package =
            serde_json::from_slice(&package).map_err(|error| Error::Failed(format!("{}: {error}", path.display())))?;
        Ok(package.version)
    }

    /// Runs one process over `folders` and calls `done` for each folder that has its result. Returns why the process
    /// ended before the next folder had one. Each call finishes at least one folder or returns a reason.
    fn start(
        &self,
        script: &Path,
        folders: &[PathBuf],
        mut done: impl FnMut() -> Result<()>,
    ) -> Result<Option<String>> {
        let stderr = script.with_file_name("stderr.txt");
        let file = std::fs::File::create(&stderr).map_err(|error| failed(&stderr, &error))?;
        let mut node = Command::new("node");
        node.arg(script).arg(self.limit.as_secs_f64().to_string()).args(folders);
        node.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        if let Some(driver) = &self.driver {
            node.env("VK_DRIVER_FILES", driver);
        }
        let mut node = match node.spawn() {
            Ok(node) => node,
            Err(error) => fail!("node: {error}; Dawn runs in Node.js 20 or newer"),
        };
        let lines = BufReader::new(node.stdout.take().expect("piped")).lines();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut any = false;
        // The script's own limit applies first, unless Dawn blocks its thread.
        let (killed, why) = loop {
            match receiver.recv_timeout(self.limit + START) {
                Ok(line) => {
                    any = true;
                    if let Err(error) = done() {
                        let _ = node.kill();
                        let _ = node.wait();
                        return Err(error);
                    }
                    if line.ends_with("\tlate") {
                        break (true, None);
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break (false, None),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let seconds = (self.limit + START).as_secs();
                    break (true, Some(format!("Dawn hung: no answer within {seconds} s")));
                }
            }
        };
        if killed {
            // It may have exited in the meantime.
            let _ = node.kill();
        }
        let status = node.wait().map_err(|error| Error::Failed(format!("node: {error}")))?;
        if killed {
            return Ok(why);
        }
        let said = std::fs::read(&stderr).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
        let said = lines[lines.len().saturating_sub(5)..].join("; ");
        match status.code() {
            Some(NO_ADAPTER) => fail!("Dawn found no suitable adapter: {said}"),
            Some(0) if any => Ok(None),
            _ => Ok(Some(format!("Dawn ended with {status}: {said}"))),
        }
    }
}

impl About {
    fn describe(self, version: &str) -> Adapter {
        let first = |texts: [&String; 2]| texts.into_iter().find(|text| !text.is_empty()).cloned().unwrap_or_default();
        Adapter {
            name: format!("Dawn on {}", first([&self.description, &self.device])),
            backend: format!("Dawn, {}", self.backend),
            kind: if self.software == Some(true) { "Cpu".into() } else { String::new() },
            driver: format!("{} {}", self.vendor, self.architecture).trim().into(),
            driver_info: self.description,
            shader_compiler: format!("Tint (webgpu {version})"),
            subgroups: self.subgroup_min.zip(self.subgroup_max).map(|(least, most)| [least, most]),
            features: self.features,
            limits: self.limits,
            ..Default::default()
        }
    }
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::Failed(format!("{}: {error}", path.display()))
}

/// Reads what the script wrote beside a plan.
fn read(call: &ExportedCall, folder: &Path, version: &str) -> Result<(Adapter, DawnResult)> {
    let path = folder.join("result.json");
    let written: Written = serde_json::from_slice(&files::read_bytes(&path)?)
        .map_err(|error| Error::Failed(format!("{}: {error}", path.display())))?;
    let Written { adapter, error, lacks, same_bits, milliseconds } = written;
    let outputs = match error {
        Some(error) => Err(error),
        None => Ok(outputs(call, folder)?),
    };
    Ok((adapter.describe(version), DawnResult { outputs, lacks, same_bits, milliseconds }))
}

fn outputs(call: &ExportedCall, folder: &Path) -> Result<Vec<DawnOutput>> {
    let read = |output: &wgpu_attention::ExportedOutput| {
        let path = folder.join(format!("result-{}.bin", output.name));
        let bytes = files::read_bytes(&path)?;
        Ok(DawnOutput { name: output.name.into(), shape: output.shape.clone(), values: output.read(&bytes)? })
    };
    call.outputs.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu_attention::{Attention, Device, Dtype, Gpu, GpuOptions, Method, Tensor, Weights, wgpu};
    use wgpu_attention_conformance::{Call, worst};

    /// Dawn as `./test` installs it. Uses Chromium's driver if there is one, because Dawn rejects the lavapipe of old
    /// Mesa versions.
    fn dawn(seconds: u64) -> Option<Dawn> {
        let limit = Duration::from_secs(seconds);
        if let Some(dawn) = Dawn::from_environment(limit) {
            return Some(dawn);
        }
        let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/portability");
        let driver = ["/usr/lib/chromium", "/usr/lib64/chromium-browser", "/opt/google/chrome"]
            .map(|folder| Path::new(folder).join("vk_swiftshader_icd.json"))
            .into_iter()
            .find(|path| path.exists());
        let has_node = Command::new("node").arg("--version").output().is_ok_and(|done| done.status.success());
        if has_node && modules.join("node_modules/webgpu").exists() {
            return Some(Dawn { modules, driver, limit });
        }
        assert!(std::env::var_os("CI").is_none(), "no Dawn for Node; tests/portability/install-dawn installs it");
        eprintln!("NOT TESTED: no Dawn for Node here; tests/portability/install-dawn installs it");
        None
    }

    /// Plans for any implementation, with WebGPU's default limits.
    fn planner(without_subgroups: bool) -> Gpu {
        let options = GpuOptions::new().limits(wgpu::Limits::default()).without_subgroups(without_subgroups);
        Gpu::with_options(&options).unwrap()
    }

    fn run(dawn: &Dawn, calls: &[ExportedCall]) -> (Option<Adapter>, Vec<DawnResult>) {
        let (mut adapter, mut results) = (None, Vec::new());
        let report = |seen: Option<Adapter>, result| {
            assert!(seen.is_none() || adapter.is_none(), "reported once");
            adapter = adapter.take().or(seen);
            results.push(result);
        };
        dawn.run(&calls.iter().collect::<Vec<_>>(), report).unwrap();
        (adapter, results)
    }

    #[test]
    fn calls_come_out_of_dawn_as_from_the_cpu_backend() {
        let Some(dawn) = dawn(600) else { return };
        let gpu = Device::Gpu(planner(true));
        let methods = Method::every(gpu.gpu().unwrap().capabilities());
        let mut calls = Vec::new();
        let mut expected = Vec::new();
        for seed in 0..12 {
            let call = Call::random(seed);
            let data = call.data();
            let stored = [Dtype::F32, Dtype::F16, Dtype::BF16][seed as usize % 3];
            let ruled = |device: &Device| {
                let attention = call.ruled(device, &data, call.attention().lse(true)).unwrap();
                if seed % 4 == 0 { attention.weights(Weights::PerHead) } else { attention }
            };
            let [q, k, v] = call.operands(&gpu, &data, stored).unwrap();
            let chosen = ruled(&gpu).method(methods[seed as usize % methods.len()]);
            // Not every tile supports every call.
            let exported = chosen.export(&q, &k, &v).or_else(|_| ruled(&gpu).export(&q, &k, &v)).unwrap();
            calls.push(exported);
            let [q, k, v] = call.operands(&Device::Cpu, &data, stored).unwrap();
            expected.push((ruled(&Device::Cpu).forward(&q, &k, &v).unwrap(), stored));
        }
        let (adapter, results) = run(&dawn, &calls);
        assert_eq!(results.len(), calls.len());
        let mut furthest = [0f64; 3];
        for (n, (result, (truth, stored))) in results.iter().zip(&expected).enumerate() {
            let outputs = result.outputs.as_ref().unwrap_or_else(|error| panic!("call {n}: {error}"));
            assert!(result.same_bits && result.milliseconds > 0.0, "call {n}");
            for output in outputs {
                let (tensor, tolerance) = match output.name.as_str() {
                    "output" => (Some(&truth.output), *stored),
                    "lse" => (truth.lse.as_ref(), Dtype::F32),
                    _ => (truth.weights.as_ref(), *stored),
                };
                let tensor = tensor.unwrap();
                assert_eq!(output.shape, tensor.shape(), "{} of call {n}", output.name);
                let truth: Vec<f64> = tensor.download().unwrap().into_iter().map(f64::from).collect();
                let (off, at) = worst(&output.values, &truth);
                // If both round to the storage type, they may round to adjacent values.
                furthest[tolerance as usize] = off.max(furthest[tolerance as usize]);
                let tolerance = [3e-6, 1e-3, 8e-3][tolerance as usize];
                assert!(off <= tolerance, "{} of call {n} is off by {off:e} at {at}", output.name);
            }
        }
        let adapter = adapter.unwrap();
        let mean = results.iter().map(|result| result.milliseconds).sum::<f64>() / calls.len() as f64;
        let [f32, f16, bf16] = furthest;
        println!("{}: {mean:.0} ms a call, off by {f32:.1e} in f32, {f16:.1e} f16, {bf16:.1e} bf16", adapter.name);
        assert!(adapter.limits["maxBufferSize"] >= 256 << 20, "{adapter:?}");
        assert!(adapter.backend.starts_with("Dawn, ") && !adapter.driver.is_empty(), "{adapter:?}");
    }

    /// One three-pass call, with its first kernel broken by `change`.
    fn broken(change: impl FnOnce(&mut ExportedCall)) -> ExportedCall {
        let x = Tensor::from_slice(planner(true), &[8, 4], &[0.5f32; 32]).unwrap();
        let mut call = Attention::new().method(Method::ThreePasses).export(&x, &x, &x).unwrap();
        change(&mut call);
        call
    }

    #[test]
    fn what_dawn_refuses_is_told_and_the_rest_goes_on() {
        let Some(dawn) = dawn(20) else { return };
        let calls = [
            broken(|_| ()),
            broken(|call| call.steps[0].wgsl.truncate(900)),
            broken(|call| call.steps[0].bindings[1].offset = 4),
            broken(|call| *call.limits.get_mut("maxBufferSize").unwrap() = 1 << 50),
            broken(|call| call.subgroup_min = Some(4096)),
            broken(|call| call.steps[0].wgsl = endless(&call.steps[0].wgsl)),
            broken(|_| ()),
        ];
        let (_, results) = run(&dawn, &calls);
        let seen: Vec<String> = (results.iter())
            .map(|result| match &result.outputs {
                Ok(outputs) => format!("{} {:?}", outputs[0].name, &outputs[0].values[..2]),
                Err(error) => error.clone(),
            })
            .collect();
        for (seen, say) in seen.iter().zip([
            "output [0.5, 0.5]",
            "error:",
            "ffset",
            "maxBufferSize = 1125899906842624",
            "4096 lanes",
            "no answer within 20 s",
            "output [0.5, 0.5]",
        ]) {
            assert!(seen.contains(say), "{say}: {seen:#?}");
        }
        let lack: Vec<usize> = (0..results.len()).filter(|&n| results[n].lacks).collect();
        assert_eq!(lack, [3, 4], "a limit and a subgroup");
    }

    /// The text of the first pass with an infinite loop before its first statement.
    fn endless(wgsl: &str) -> String {
        let entry = wgsl.find("fn main(").unwrap();
        let body = entry + wgsl[entry..].find(") {").unwrap() + 3;
        let (head, tail) = wgsl.split_at(body);
        format!("{head} while (s[0].x != 77.0) {{ s[0] = vec4<f32>(s[0].y + 1.0); }} {tail}")
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let dawn = Dawn { modules: folder.path().into(), driver: None, limit: Duration::from_secs(1) };
        let error = dawn.run(&[], |_, _| ()).err().unwrap().to_string();
        assert!(error.contains("node_modules/webgpu/package.json") && error.contains("install-dawn"), "{error}");
    }
}
