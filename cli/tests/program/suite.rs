//! `attn check` without a folder: the suite, and that it finds planted faults.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::kit::{Ran, attn, attn_with, folder};

/// A driver's manifest, if it exists.
fn driver(folder: &str, starts: &str) -> Option<String> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_it = |path: &PathBuf| {
        path.extension().is_some_and(|ending| ending == "json")
            && path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(starts))
    };
    Some(files.into_iter().find(is_it)?.to_str()?.to_string())
}

/// The manifest of Mesa's software driver.
fn lavapipe() -> Option<String> {
    driver("/usr/share/vulkan/icd.d", "lvp")
}

/// The manifest of Chromium's software driver.
fn swiftshader() -> Option<String> {
    driver("/usr/lib/chromium", "vk_swiftshader")
}

/// The environment that enables Vulkan's validation layers and their messages.
const LAYERS: [(&str, &str); 2] = [("WGPU_VALIDATION", "1"), ("WGPU_DEBUG", "1")];

/// The layers' messages for a case. Layers older than WGSL's language id complain about it in every module.
fn complaints(result: &Value) -> Vec<&str> {
    let all = result["messages"].as_array().into_iter().flatten().filter_map(Value::as_str);
    all.filter(|text| text.contains("VALIDATION") && !text.contains("Invalid source language operand: 10")).collect()
}

fn check(folder: &Path, more: &[&str]) -> (Ran, Value) {
    let ran = attn(folder, &[&["check", "--json", "report.json"], more].concat());
    (ran, report(folder))
}

fn report(folder: &Path) -> Value {
    std::fs::read(folder.join("report.json")).map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap())
}

fn results(report: &Value) -> &[Value] {
    report["results"].as_array().map_or(&[], Vec::as_slice)
}

fn with_status<'a>(report: &'a Value, status: &str) -> Vec<&'a Value> {
    results(report).iter().filter(|result| result["status"] == status).collect()
}

/// Runs the quick suite on a software driver if it is installed, else on the adapters of this machine; returns the
/// backends.
fn quick_suite(driver: Option<String>, more: &[&str]) -> Vec<String> {
    assert!(
        driver.is_some() || std::env::var_os("CI").is_none(),
        "the software drivers of Mesa and Chromium are needed"
    );
    let folder = folder();
    // With the driver's normal compilation, without the settings that speed up other tests.
    let mut env = [&LAYERS[..], &[("GALLIVM_PERF", "")]].concat();
    env.extend(driver.iter().map(|file| ("VK_DRIVER_FILES", file.as_str())));
    let args = ["check", "--quick", "--json", "report.json"];
    let ran = attn_with(folder.path(), &[&args[..], more].concat(), &env);
    ran.succeeded();
    let report = report(folder.path());
    assert_eq!(
        (&report["schema"], &report["suite"], &report["seed"]),
        (&"attn-check/1".into(), &"quick".into(), &1.into())
    );
    for (name, versions) in [("wgpu", "30."), ("naga", "30."), ("version", "0.")] {
        assert!(report[name].as_str().unwrap().starts_with(versions), "{}", report[name]);
    }
    let adapters = report["adapters"].as_array().unwrap();
    for (at, adapter) in adapters.iter().enumerate() {
        let of_it: Vec<&Value> = results(&report).iter().filter(|result| result["adapter"] == at).collect();
        let passed: Vec<&&Value> = of_it.iter().filter(|result| result["status"] == "passed").collect();
        assert!(passed.len() >= 180, "{adapter}: {}", passed.len());
        for result in passed {
            assert!(!result["outputs"].as_array().unwrap().is_empty(), "{result}");
            assert_eq!(result["same_bits"], true, "{result}");
            assert!(complaints(result).is_empty(), "{result}");
        }
        if adapter["backend"] == "CPU" {
            continue;
        }
        assert!(adapter["limits"]["max_buffer_size"].as_u64().unwrap() > 0, "{adapter}");
        assert!(!adapter["shader_compiler"].as_str().unwrap().is_empty() && !adapter["driver"].is_null(), "{adapter}");
        // As observed on the device: every requested invocation ran.
        for seen in adapter["observed"].as_array().unwrap() {
            assert_eq!(seen["invocations"], seen["workgroup"], "{adapter}");
        }
        let cut = of_it.iter().find(|result| result["variant"] == "rows4x128/across8").unwrap();
        assert_eq!((&cut["workgroup"], &cut["why"]), (&128.into(), &"the tile rows4x128/across8 was requested".into()));
        if let Some([least, most]) = adapter["subgroups"].as_array().map(Vec::as_slice) {
            let seen = cut["subgroup"].as_u64().unwrap();
            assert!(least.as_u64().unwrap() <= seen && seen <= most.as_u64().unwrap(), "{cut}");
        }
    }
    adapters.iter().map(|adapter| adapter["backend"].as_str().unwrap().to_string()).collect()
}

// Two tests, so that two cores can compile.

#[test]
fn the_quick_suite_passes_on_mesa_and_the_cpu_backend() {
    let backends = quick_suite(lavapipe(), &[]);
    assert!(backends.len() >= 2 && backends.contains(&"CPU".to_string()), "{backends:?}");
    if lavapipe().is_some() {
        assert!(backends.contains(&"Vulkan".into()) && backends.contains(&"GL".into()), "{backends:?}");
    }
}

#[test]
fn the_quick_suite_passes_on_swiftshader() {
    if swiftshader().is_some() || std::env::var_os("CI").is_some() {
        assert_eq!(quick_suite(swiftshader(), &["--adapter", "vulkan"]), ["Vulkan"]);
    }
}

/// Proves that the validation layers are active in the quick suite.
#[test]
fn validation_layers_report_a_broken_rule() {
    let folder = folder();
    let args = ["check", "--quick", "--adapter", "vulkan", "--op", "alibi", "--op", "t5"];
    let plant = ["--plant", "broken-rule", "--json", "report.json"];
    let ran = attn_with(folder.path(), &[&args[..], &plant].concat(), &LAYERS);
    let report = report(folder.path());
    let lost = results(&report).iter().any(|result| result["messages"].to_string().contains("unable to find layer"));
    if lost && std::env::var_os("CI").is_none() {
        eprintln!("NOT TESTED: Vulkan's validation layers are not here; ./test installs them");
        return;
    }
    assert_eq!(ran.status, Some(1), "{}", ran.stdout);
    let [failed] = with_status(&report, "failed")[..] else { panic!("{}", ran.stdout) };
    assert!(failed["reason"].as_str().unwrap().contains("VUID-VkBufferCreateInfo-"), "{failed}");
    assert!(complaints(failed).iter().any(|text| text.contains("VUID-VkBufferCreateInfo-size-00912")), "{failed}");
}

#[test]
fn single_calls_also_run_on_dawn() {
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/portability");
    if !modules.join("node_modules/webgpu").exists() {
        assert!(std::env::var_os("CI").is_none(), "no Dawn for Node; ./test installs it where there is npm");
        eprintln!("NOT TESTED: no Dawn for Node here; ./test installs it where there is npm");
        return;
    }
    let folder = folder();
    // Dawn rejects lavapipe before Mesa 23.2.
    let driver = swiftshader().unwrap_or_default();
    let env = [("ATTN_DAWN", modules.to_str().unwrap()), ("ATTN_DAWN_DRIVER", driver.as_str())];
    let args = ["check", "--quick", "--dawn", "--adapter", "0", "--json", "report.json"];
    let some = [
        "--op",
        "alibi",
        "--op",
        "rotary",
        "--op",
        "attention",
        "--variant",
        "fused",
        "--variant",
        "rows4x128/across8",
    ];
    let ran = attn_with(folder.path(), &[&args[..], &some].concat(), &env);
    ran.succeeded();
    let report = report(folder.path());
    let dawn = &report["adapters"][1];
    assert!(dawn["backend"].as_str().unwrap().starts_with("Dawn") && !dawn["limits"].is_null(), "{dawn}");
    let passed = with_status(&report, "passed").into_iter().filter(|result| result["adapter"] == 1).count();
    assert!(passed >= 10, "{passed}: {}", ran.stdout);
    let alone = ["check", "--dawn", "--adapter", "0", "--repro"];
    let ran = attn_with(folder.path(), &[&alone[..], &["alibi/causal/f32/1@auto"]].concat(), &env);
    ran.succeeded();
    assert!(ran.stdout.contains("passed: alibi/causal/f32/1@auto on dawn"), "{}", ran.stdout);
    attn_with(folder.path(), &[&alone[..], &["torch/sdpa_dim005"]].concat(), &env).refused(1, "is not a single call");
    // Without ATTN_DAWN.
    let lost = attn_with(folder.path(), &[&args[..], &["--op", "alibi"]].concat(), &[("ATTN_DAWN", "")]);
    lost.refused(2, "--dawn needs ATTN_DAWN");
}

#[test]
fn planted_faults_are_found_named_and_shrunk() {
    for (fault, kernel) in [("skipped-key", "flash"), ("missing-barrier", "flash_tiled"), ("f16-sums", "flash")] {
        let folder = folder();
        // Variants without the fault run too, so every failure is due to the fault.
        let args = ["--quick", "--adapter", "0", "--op", "attention", "--filter", "plain/f32"];
        let (ran, report) = check(folder.path(), &[&args[..], &["--plant", fault]].concat());
        assert_eq!(ran.status, Some(1), "{fault}: {}", ran.stdout);
        let failed = with_status(&report, "failed");
        assert!(!failed.is_empty(), "{fault}");
        for result in &failed {
            let kernels = result["kernels"].to_string();
            let of_fault = |name: &str| name == kernel || fault != "missing-barrier" && name == "flash_tiled";
            let named = kernels.split('"').filter_map(|name| name.split('/').next());
            assert!(named.into_iter().any(of_fault), "{fault}: {result}");
            assert!(result["reason"].as_str().unwrap().contains("is off by"), "{fault}: {result}");
        }
        if fault == "missing-barrier" {
            // No other kernel lost a barrier.
            assert!(failed.iter().all(|result| result["variant"].as_str().unwrap().contains("/across")), "{failed:?}");
        }
        let id = failed[0]["id"].as_str().unwrap();
        let shrunk = attn(folder.path(), &["check", "--repro", id, "--shrink", "--plant", fault, "--adapter", "0"]);
        assert_eq!(shrunk.status, Some(1));
        // In `K [1, 1, 9, 1]` the third number is the number of keys.
        let keys = shrunk.stdout.split("K [").nth(1).and_then(|rest| rest.split(", ").nth(2)).unwrap();
        assert!(keys.parse::<usize>().unwrap() <= 64, "{fault}: {}", shrunk.stdout);
        for part in ["@compute", "the seed", "cargo run --release -- check --repro", kernel] {
            assert!(shrunk.stdout.contains(part), "{fault}: no {part} in {}", shrunk.stdout);
        }
        // The shrunk call passes without the fault.
        let line = shrunk.stdout.lines().find(|line| line.starts_with("failed: ")).unwrap();
        let small = line["failed: ".len()..].split(" on ").next().unwrap();
        attn(folder.path(), &["check", "--repro", small, "--adapter", "0"]).succeeded();
        let broken = attn(folder.path(), &["check", "--repro", small, "--adapter", "0", "--plant", fault]);
        assert_eq!(broken.status, Some(1), "{small}");
    }
}

#[test]
fn a_driver_hang_or_crash_is_one_failure_in_the_report() {
    for (fault, say) in [("hang", "the driver hung: no answer within 2 s"), ("crash", "the driver crashed: signal: 6")]
    {
        let folder = folder();
        let args = ["--quick", "--adapter", "cpu", "--op", "attention", "--time-limit", "2", "--plant", fault];
        let (ran, report) = check(folder.path(), &args);
        assert_eq!(ran.status, Some(1), "{}", ran.stdout);
        let failed = with_status(&report, "failed");
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0]["reason"].as_str().unwrap().starts_with(say), "{}", failed[0]);
        assert!(ran.stdout.contains(failed[0]["id"].as_str().unwrap()), "{}", ran.stdout);
        // All others ran, before and after it.
        let (_, whole) = check(folder.path(), &["--quick", "--adapter", "cpu", "--op", "attention"]);
        assert_eq!(results(&report).len(), results(&whole).len());
        assert_eq!(with_status(&report, "passed").len(), results(&whole).len() - 1);
        // A single case has a time limit too.
        let alone = ["check", "--adapter", "cpu", "--repro", "softmax/plain/f32/1", "--shrink", "--time-limit", "2"];
        let ran = attn(folder.path(), &[&alone[..], &["--plant", fault]].concat());
        assert_eq!(ran.status, Some(1), "{}", ran.stdout);
        assert!(ran.stdout.contains(say) && ran.stdout.contains("Not shrunk"), "{}", ran.stdout);
    }
}

#[test]
fn a_driver_crash_during_enumeration_spares_other_backends() {
    let Some(driver) = lavapipe() else {
        assert!(std::env::var_os("CI").is_none(), "Mesa's software driver is needed");
        return;
    };
    let folder = folder();
    let env = [("VK_DRIVER_FILES", driver.as_str())];
    let plant = ["check", "--plant", "crash-at-sight", "--json", "report.json"];
    let ran = attn_with(folder.path(), &[&plant[..], &["--quick", "--op", "softmax"]].concat(), &env);
    assert_eq!(ran.status, Some(1), "{}", ran.stdout);
    let report = report(folder.path());
    let backends: Vec<_> = report["adapters"].as_array().unwrap().iter().map(|adapter| &adapter["backend"]).collect();
    assert_eq!(backends, ["gl", "Vulkan", "CPU"]);
    assert!(report["adapters"][0]["ended"].as_str().unwrap().contains("signal: 6"), "{}", report["adapters"][0]);
    for adapter in [1, 2] {
        let passed = with_status(&report, "passed").into_iter().filter(|result| result["adapter"] == adapter).count();
        assert!(passed >= 4 && report["adapters"][adapter]["ended"].is_null(), "{report}");
    }
    let repro = ["check", "--plant", "crash-at-sight", "--repro", "softmax/plain/f32/1"];
    let ran = attn_with(folder.path(), &repro, &env);
    ran.succeeded();
    assert!(ran.stdout.contains("(Vulkan)"), "{}", ran.stdout);
    let lost = attn_with(folder.path(), &[&repro[..], &["--adapter", "gl"]].concat(), &env);
    lost.refused(3, "gl: listing its adapters: signal: 6");
}

#[test]
fn known_issues_are_known_until_they_are_fixed() {
    let folder = folder();
    let entry = |message: &str| {
        format!(
            "[[issue]]\nid = \"made-1\"\nlink = \"https://example.org/1\"\ncase = \"^attention/plain/f32/.*@fused$\"\n\
             backend = \"Vulkan\"\nmessage = \"{message}\"\n[[issue]]\nid = \"made-2\"\nlink = \"https://example.org/2\"\n\
             case = \"^attention/plain/f32/.*@auto$\"\nadapter = \".\"\nmessage = \"{message}\"\n"
        )
    };
    let vulkan = wgpu_attention::Gpu::adapters();
    assert_eq!(vulkan[0].info.backend, wgpu_attention::wgpu::Backend::Vulkan, "{vulkan:?}");
    let run = |message: &str, more: &[&str]| {
        std::fs::write(folder.path().join("issues.toml"), entry(message)).unwrap();
        let args =
            ["--quick", "--adapter", "0", "--filter", "attention/plain/f32", "--variant", "fused", "--variant", "auto"];
        check(folder.path(), &[&args[..], &["--known-issues", "issues.toml"], more].concat())
    };
    let (ran, report) = run("is off by", &["--plant", "skipped-key"]);
    ran.succeeded();
    let known = with_status(&report, "known");
    assert!(known.len() >= 2, "{report}");
    assert!(known.iter().any(|result| result["issue"] == "made-1 (https://example.org/1)"), "{known:?}");
    // Another failure than the known one.
    let (ran, report) = run("the device was lost", &["--plant", "skipped-key"]);
    assert_eq!((ran.status, with_status(&report, "known").len()), (Some(1), 0));
    // If the issue no longer occurs, the check fails.
    let (ran, report) = run("is off by", &[]);
    assert_eq!((ran.status, with_status(&report, "mended").len()), (Some(1), results(&report).len()), "{report}");
    std::fs::write(folder.path().join("issues.toml"), "[[issue]]\nid = 3\n").unwrap();
    attn(folder.path(), &["check", "--quick", "--known-issues", "issues.toml"]).refused(1, "issues.toml");
}

#[test]
fn cases_are_listed_chosen_and_run_alone() {
    let folder = folder();
    let list = |more: &[&str]| {
        let ran = attn(folder.path(), &[&["check", "--list", "--adapter", "cpu"], more].concat());
        ran.succeeded();
        ran.stdout.lines().map(str::to_string).collect::<Vec<_>>()
    };
    let (full, quick) = (list(&[]), list(&["--quick"]));
    let drawn = |ids: &[String]| ids.iter().filter(|id| id.split('/').count() == 4).count();
    assert!(drawn(&full) >= 5_100 && quick.len() < 400, "{} {}", full.len(), quick.len());
    let mut once = full.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), full.len());
    // All cases of the other frameworks are included.
    let golden = ["keras_jax", "onnx", "torch", "transformers"].map(|name| {
        let files = std::fs::read_dir(crate::kit::cases(name)).unwrap().flatten();
        files.filter(|file| file.path().extension().is_some_and(|ending| ending == "safetensors")).count()
    });
    assert_eq!(full.len() - drawn(&full), golden.iter().sum::<usize>());
    assert!(list(&["--op", "softmax"]).iter().all(|id| id.starts_with("softmax/")));
    assert!(list(&["--filter", "bf16"]).iter().all(|id| id.contains("bf16")));
    assert_ne!(list(&["--seed", "2", "--op", "softmax"]), list(&["--op", "softmax"]));

    let ran =
        attn(folder.path(), &["check", "--adapter", "cpu", "--repro", "attention/all/f16/7,len_k=9,no-masks@auto"]);
    ran.succeeded();
    assert!(ran.stdout.contains("passed: attention/all/f16/7,len_k=9,no-masks@auto on cpu"), "{}", ran.stdout);
    attn(folder.path(), &["check", "--adapter", "cpu", "--repro", "torch/sdpa_dim005"]).succeeded();
    let refused = |args: &[&str], status: i32, say: &str| {
        attn(folder.path(), &[&["check"], args].concat()).refused(status, say);
    };
    refused(&["--repro", "attention/all/f16"], 2, "expected op/form/storage/seed");
    refused(&["--repro", "attention/all/f16/7@fast"], 2, "is not a method");
    refused(&["--shrink"], 2, "--repro");
    refused(&["--list", "--json", "cases.json"], 2, "cannot be used with");
    refused(&["--repro", "softmax/plain/f32/1", "--html", "case.html"], 2, "cannot be used with");
    refused(&["--quick", "--adapter", "cpu", "--op", "dancing"], 2, "no op \"dancing\"");
    refused(&["--quick", "--adapter", "cpu", "--filter", "no such case"], 1, "no case matches");
    refused(&["--quick", "--time-limit", "0"], 2, "--time-limit");
    refused(&["--quick", crate::kit::cases("torch").to_str().unwrap()], 2, "--quick");
    refused(&["--quick", "--adapter", "no such adapter"], 3, "no adapter answers");
    refused(&["--list", "--op", "dancing"], 2, "no op \"dancing\"");
    refused(&["--quick", "--adapter", "cpu", "--plant", "skipped-key"], 2, "the CPU backend has none");
    // A backend has aliases, and distinguishes adapters of the same name.
    let vulkan = wgpu_attention::Gpu::adapters().into_iter().find(|adapter| adapter.answers_to("vk")).unwrap();
    for which in ["vk".to_string(), format!("vulkan:{}", vulkan.info.name), vulkan.index.to_string()] {
        let repro = ["check", "--repro", "softmax/plain/f32/1"];
        let ran = attn(folder.path(), &[&repro[..], &["--adapter", &which]].concat());
        ran.succeeded();
        assert!(ran.stdout.contains(&format!("{} (Vulkan)", vulkan.info.name)), "{which}: {}", ran.stdout);
    }
    let named = attn_with(folder.path(), &["check", "--quick", "--op", "merge"], &[("WGPU_ADAPTER_NAME", "no such")]);
    named.refused(3, "no adapter answers to \"no such\"");
    let golden = ["check", "--adapter", "cpu", "--repro", "torch/sdpa_dim005", "--shrink"];
    assert!(attn(folder.path(), &golden).stdout.contains("Not shrunk: it does not fail"));
    let none = [("VK_DRIVER_FILES", "/dev/null"), ("WGPU_BACKEND", "vulkan")];
    attn_with(folder.path(), &["check", "--quick"], &none).refused(3, "there is no GPU adapter");
}
