//! `attn tune`: what it keeps, and that later runs of the program use it.

use std::path::Path;
use std::process::Command;

use crate::kit::{Ran, adapters, folder};

/// Runs `attn` with its own cache folder.
fn attn(folder: &Path, cache: &Path, args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_attn"))
        .args(args)
        .current_dir(folder)
        .env_remove("WGPU_ADAPTER_NAME")
        .env("WGPU_ATTENTION_CACHE", cache)
        .output()
        .expect("the program starts");
    Ran {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

const SHAPE: &str = "1,2,1,9,17,8:causal";

#[test]
fn results_are_kept_for_the_next_run() {
    for adapter in adapters().iter().filter(|adapter| *adapter != "cpu") {
        let folder = folder();
        let cache = folder.path().join("cache");
        let tune = |more: &[&str]| attn(folder.path(), &cache, &[&["tune", "--adapter", adapter], more].concat());
        let file = cache.join("tuning.json");

        let ran = tune(&["--shape", SHAPE, "--dry-run"]);
        ran.succeeded();
        assert!(ran.stdout.contains("nothing is kept") && !file.exists(), "{}", ran.stdout);

        let ran = tune(&["--shape", SHAPE]);
        ran.succeeded();
        for part in ["the default", "three passes", "wins", "tuning.json"] {
            assert!(ran.stdout.contains(part), "{part} is not in\n{}", ran.stdout);
        }
        assert!(!ran.stdout.contains("known already"));

        // Another batch and slightly shorter: the same key.
        let ran = tune(&["--shape", "3,2,1,9,20,8:causal"]);
        ran.succeeded();
        assert!(ran.stdout.contains("known already"), "{}", ran.stdout);

        // The kept method is the one that runs.
        let text = std::fs::read_to_string(&file).expect("the file is there");
        let mut kept: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        kept["entries"][0]["method"] = "three passes".into();
        std::fs::write(&file, kept.to_string()).expect("written");
        let bench = ["bench", "--adapter", adapter, "--shape", SHAPE, "--repeat", "1"];
        let ran = attn(folder.path(), &cache, &bench);
        ran.succeeded();
        assert!(ran.stdout.contains("weighted_sum"), "{}", ran.stdout);

        tune(&["--clear"]).succeeded();
        let ran = attn(folder.path(), &cache, &bench);
        ran.succeeded();
        assert!(ran.stdout.contains("flash"), "{}", ran.stdout);

        // An invalid file has no effect.
        std::fs::write(&file, "no JSON").expect("written");
        attn(folder.path(), &cache, &bench).succeeded();
    }
}

#[test]
fn an_empty_variable_keeps_nothing() {
    let folder = folder();
    let ran = attn(folder.path(), Path::new(""), &["tune", "--adapter", "0", "--shape", SHAPE]);
    ran.succeeded();
    assert!(ran.stdout.contains("nothing is kept"), "{}", ran.stdout);
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0);
}

#[test]
fn wrong_calls_are_refused() {
    let folder = folder();
    let cache = folder.path().join("cache");
    for (args, status, part) in [
        (&["--adapter", "cpu"][..], 2, "one method only"),
        (&["--shape", "P9:x3"], 2, "xN"),
        (&["--shape", "1,2"], 2, "b,hq,hkv,sq,skv,d"),
        (&["--clear", "--dry-run"], 2, "cannot be used with"),
        (&["--shape", "1,1,1,4,1000000000,64"], 2, "too long"),
    ] {
        attn(folder.path(), &cache, &[&["tune"], args].concat()).refused(status, part);
    }
    assert!(!cache.exists());
}
