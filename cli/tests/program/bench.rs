//! `attn bench`: what it reports, not how fast calls are.

use std::path::Path;

use serde_json::Value;

use crate::kit::{Ran, adapters, attn, folder};

fn bench(folder: &Path, args: &[&str]) -> Ran {
    attn(folder, &[&["bench"], args].concat())
}

fn rows(path: &Path) -> Vec<Value> {
    let rows: Value = serde_json::from_slice(&std::fs::read(path).expect("the file is there")).expect("JSON");
    rows.as_array().expect("an array").clone()
}

#[track_caller]
fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("{name} is {} in {row:#}", row[name]))
}

#[track_caller]
fn near(row: &Value, name: &str, expected: f64) {
    let got = number(row, name);
    assert!((got - expected).abs() <= 1e-9 * expected.abs(), "{name} is {got} instead of {expected}");
}

#[test]
fn every_adapter_is_timed_and_the_figures_agree() {
    for adapter in adapters() {
        let folder = folder();
        let shapes = ["--shape", "2,4,2,17,33,24:causal", "--shape", "1,4,4,1,64,32", "--shape", "P9:x3"];
        let ran = bench(
            folder.path(),
            &[&shapes[..], &["--weights", "--repeat", "4", "--adapter", &adapter, "--json", "times.json"]].concat(),
        );
        ran.succeeded();
        let rows = rows(&folder.path().join("times.json"));
        let of = |text: &str| rows.iter().filter(|row| row["shape"] == text).collect::<Vec<_>>();
        assert_eq!(rows.len(), 6);
        // Queries before the last see fewer of the 33 keys: 17, 18, … 33.
        let causal = 4.0 * 2.0 * 4.0 * (17..=33).sum::<i32>() as f64 * 24.0;
        for (text, operations, bytes) in [
            ("2,4,2,17,33,24:causal", causal, 4.0 * 2.0 * 2.0 * 24.0 * (4.0 * 17.0 + 2.0 * 33.0)),
            ("1,4,4,1,64,32", 4.0 * 4.0 * 64.0 * 32.0, 4.0 * 2.0 * 4.0 * 32.0 * 65.0),
            ("P9:x3", 3.0 * 4.0 * 8.0 * 64.0 * 64.0 * 64.0, 3.0 * 4.0 * 4.0 * 8.0 * 64.0 * 64.0),
        ] {
            assert_eq!(of(text).len(), 2, "with weights and without");
            for row in of(text) {
                let (best, median) = (number(row, "best_ms"), number(row, "median_ms"));
                assert!(0.0 < best && best <= median && number(row, "first_ms") > 0.0, "{row:#}");
                near(row, "operations", operations);
                near(row, "gflops", operations / (median * 1e6));
                near(row, "percent_of_ceiling", 100.0 * number(row, "gflops") / number(row, "ceiling_gflops"));
                near(row, "bytes", bytes);
                near(row, "gb_per_s", bytes / (median * 1e6));
                near(row, "timed_calls", 4.0);
                let kernels: Vec<&str> =
                    row["kernels"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
                assert_eq!(kernels.is_empty(), adapter == "cpu");
                if adapter == "cpu" {
                    assert_eq!([&row["adapter"], &row["kernel"]], ["cpu", "cpu"]);
                } else {
                    assert_eq!(row["kernel"], kernels.join(" + "));
                    assert_eq!(kernels.iter().any(|name| name.starts_with("softmax")), row["weights"] == true);
                }
                assert!(row["error"].is_null());
                let kernel = if adapter == "cpu" { "cpu" } else { kernels[0] };
                assert!(ran.stdout.contains(kernel), "{kernel} is not in\n{}", ran.stdout);
            }
        }
        let timestamps = wgpu_attention::Gpu::adapters()
            .iter()
            .find(|known| known.index.to_string() == adapter)
            .is_some_and(|known| known.features.contains(wgpu_attention::wgpu::Features::TIMESTAMP_QUERY));
        for row in &rows {
            // There is no such time for an encoder with several calls.
            let expected = timestamps && row["calls"] == 1;
            assert_eq!(row["gpu_ms"].as_f64().is_some_and(|ms| ms > 0.0), expected, "{row:#}");
            let idle = row["idle_percent"].as_f64();
            assert_eq!(idle.is_some(), adapter == "cpu" && row["calls"] == 1, "{row:#}");
            assert!(idle.is_none_or(|percent| (0.0..=100.0).contains(&percent)), "{row:#}");
        }
    }
}

#[test]
fn a_layer_has_projections() {
    for adapter in adapters() {
        let folder = folder();
        bench(folder.path(), &["--shape", "p6", "--repeat", "1", "--adapter", &adapter, "--json", "p6.json"])
            .succeeded();
        let rows = rows(&folder.path().join("p6.json"));
        assert_eq!(rows.len(), 1);
        near(&rows[0], "operations", 8.0 * 1024.0 * 512.0 * 512.0 + 4.0 * 8.0 * 8.0 * 128.0 * 128.0 * 64.0);
        assert_eq!(rows[0]["operation"], "layer");
        assert!(adapter == "cpu" || rows[0]["kernel"].as_str().unwrap().starts_with("project/"));
    }
}

#[test]
fn positions_and_masks_are_timed_inside_and_stored() {
    let folder = folder();
    let extras =
        ["rotary", "rotary-interleaved", "alibi", "t5", "shaw", "mask", "rotary:stored", "alibi:stored", "t5:stored"];
    let shapes: Vec<String> = extras.iter().map(|extra| format!("1,4,2,3,40,8:causal:{extra}")).collect();
    let mut args = vec!["--repeat", "1", "--adapter", "all", "--json", "e.json"];
    shapes.iter().for_each(|shape| args.extend(["--shape", shape.as_str()]));
    bench(folder.path(), &args).succeeded();
    let rows = rows(&folder.path().join("e.json"));
    assert_eq!(rows.len(), extras.len() * adapters().len());
    for row in rows.iter().filter(|row| row["backend"] != "cpu") {
        let (shape, kernels) = (row["shape"].as_str().unwrap(), row["kernels"].to_string());
        let inside = match shape.split(':').nth(2).unwrap() {
            _ if shape.ends_with("stored") => "flash",
            "t5" => "/relative4",
            "shaw" => "/relative",
            "rotary-interleaved" => "/rotary8_interleaved",
            "rotary" => "/rotary8",
            "mask" => "/mask/block_mask",
            other => other,
        };
        assert!(kernels.contains(inside), "{shape}: {kernels}");
    }
}

#[test]
fn methods_are_compared_over_lengths_and_drawn() {
    let folder = folder();
    let sweep = ["--lengths", "48,16,24,16", "--heads", "4,2", "--dim", "8", "--batch", "2", "--causal"];
    let ran = bench(
        folder.path(),
        &[
            &sweep[..],
            &["--method", "fused,passes,fused", "--repeat", "1", "--adapter", "all"],
            &["--json", "s.json", "--plot", "s.png"],
        ]
        .concat(),
    );
    ran.succeeded();
    let rows = rows(&folder.path().join("s.json"));
    let gpus = adapters().len() - 1;
    assert_eq!(rows.len(), 3 * (2 * gpus + 1));
    for row in &rows {
        let kernel = row["kernel"].as_str().unwrap();
        match row["method"].as_str() {
            Some("fused") => assert!(kernel.starts_with("flash/"), "{row:#}"),
            Some("passes") => assert!(kernel.starts_with("scores/"), "{row:#}"),
            method => assert_eq!((method, kernel), (None, "cpu")),
        }
    }
    let lengths: Vec<_> = rows.iter().rev().take(3).map(|row| row["shape"].as_str().unwrap()).collect();
    assert_eq!(lengths, ["2,4,2,48,48,8:causal", "2,4,2,24,24,8:causal", "2,4,2,16,16,8:causal"]);

    let picture = image::open(folder.path().join("s.png")).expect("a readable picture").to_rgb8();
    assert!(picture.width() >= 900 && picture.height() >= 560, "{} x {}", picture.width(), picture.height());
    let colours: std::collections::HashSet<_> = picture.pixels().map(|pixel| pixel.0).collect();
    let lines: [[u8; 3]; 5] = [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233]];
    for line in &lines[..(2 * gpus + 1).min(lines.len())] {
        assert!(colours.contains(line), "no line of colour {line:?}");
    }

    bench(folder.path(), &["--lengths", "8,9", "--repeat", "1", "--adapter", "cpu", "--plot", "s.svg"]).succeeded();
    let text = std::fs::read_to_string(folder.path().join("s.svg")).expect("text");
    for part in ["<svg ", "</svg>", "milliseconds per call", "cpu backend", "<polyline"] {
        assert!(text.contains(part), "{part}");
    }
}

#[test]
fn a_wrong_call_is_refused_with_the_rule() {
    let folder = folder();
    for (args, part) in [
        (&["--shape", "P99"][..], "one of P1, P2"),
        (&["--shape", "1,2,2,0,4,8"], "all must be at least 1"),
        (&["--shape", "1,6,4,8,8,8"], "heads_q = 6 is not a multiple of heads_kv = 4"),
        (&["--shape", "99999999999,99999999999,1,1,1,1"], "does not fit in 64 bits"),
        (&["--shape", "1,2,3"], "3 numbers"),
        (&["--shape", "P1:x0"], "x1 to x10000"),
        (&["--lengths", "8,16", "--heads", "6,4"], "heads_q = 6 is not a multiple of heads_kv = 4"),
        (&["--lengths", "8,0"], "at least 1"),
        (&["--heads", "6"], "--lengths"),
        (&["--lengths", "8,8", "--plot", "x.png"], "two different"),
        (&["--lengths", "8,9", "--plot", "x.gif"], ".png or .svg"),
        (&["--repeat", "0"], "at least 1"),
        (&["--seconds", "NaN"], "0 to 3600"),
        (&["--method", "magic"], "magic"),
    ] {
        bench(folder.path(), args).refused(2, part);
    }
    bench(folder.path(), &["--shape", "P9", "--adapter", "no such thing"]).refused(3, "no adapter answers");
    bench(folder.path(), &["--shape", "P9", "--json", "nowhere/x.json"]).refused(1, "there is no folder nowhere");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file of a refused call");
}

#[test]
fn a_row_that_cannot_run_says_why_and_leaves_the_others() {
    let folder = folder();
    let huge = "1,1,1,500000000,500000000,64";
    let ran = bench(
        folder.path(),
        &["--shape", huge, "--shape", "1,1,1,4,4,4", "--repeat", "1", "--adapter", "cpu", "--json", "r.json"],
    );
    assert_eq!(ran.status, Some(1), "{}\n{}", ran.stdout, ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert!(ran.stdout.contains("does not run: "), "{}", ran.stdout);
    let rows = rows(&folder.path().join("r.json"));
    assert!(rows[0]["error"].as_str().unwrap().contains("but this machine has"), "{}", rows[0]);
    assert!(rows[0]["median_ms"].is_null() && rows[0]["gflops"].is_null());
    assert!(number(&rows[1], "median_ms") > 0.0);
}
