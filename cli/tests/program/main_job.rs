//! `attn` without arguments, and the messages for wrong usage.

use crate::kit::{adapters, attn, folder};

#[test]
fn the_example_is_right_on_every_adapter() {
    for adapter in adapters() {
        let folder = folder();
        let ran = attn(folder.path(), &["--adapter", &adapter]);
        ran.succeeded();
        for part in
            ["what \"it\" attends to in head 1", "animal  0.68", "output   ok", "first call", "attn-heatmap.png"]
        {
            assert!(ran.stdout.contains(part), "{adapter}: \"{part}\" is not in\n{}", ran.stdout);
        }
        assert!(!ran.stdout.contains('\u{1b}'), "colours where there is no terminal");
        let picture = image::open(folder.path().join("attn-heatmap.png")).expect("a readable picture").to_rgb8();
        assert!(picture.width() > 600 && picture.height() > 600);
        let colours: std::collections::HashSet<_> = picture.pixels().map(|pixel| pixel.0).collect();
        assert!(colours.len() > 100, "the colour bar alone has more colours than {}", colours.len());
    }
}

#[test]
fn an_unknown_adapter_has_a_status_of_its_own_and_names_the_others() {
    let ran = attn(folder().path(), &["--adapter", "no such thing"]);
    ran.refused(3, "no adapter answers to \"no such thing\"");
    assert!(ran.stderr.contains("cpu"));
}

#[test]
fn devices_end_with_the_cpu_backend() {
    let ran = attn(folder().path(), &["devices"]);
    ran.succeeded();
    assert!(ran.stdout.contains("the CPU backend"));
    let ran = attn(folder().path(), &["devices", "--json"]);
    ran.succeeded();
    let rows: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let rows = rows.as_array().expect("a list");
    assert_eq!(rows.len(), adapters().len());
    assert_eq!(rows.last().unwrap()["name"], "cpu");
    for row in &rows[..rows.len() - 1] {
        assert!(row["error"].is_null(), "{row}");
        assert!(!row["kernels"].as_array().unwrap().is_empty());
    }
}

#[test]
fn shaders_are_printed_and_completions_made() {
    let list = attn(folder().path(), &["shader"]);
    list.succeeded();
    for name in list.stdout.lines().step_by(17) {
        let ran = attn(folder().path(), &["shader", name]);
        ran.succeeded();
        assert!(ran.stdout.contains("@compute"), "{name}");
    }
    attn(folder().path(), &["shader", "no such kernel"]).refused(2, "no kernel variant");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let ran = attn(folder().path(), &["completions", shell]);
        ran.succeeded();
        assert!(["attn", "positions", "interleaved"].iter().all(|word| ran.stdout.contains(word)), "{shell}");
    }
}
