//! Reports of `attn check`: other forms of a saved report, and the changes between two.

use std::path::Path;

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::kit::{Ran, attn, folder};

/// A hostile name that every form must escape.
const HOSTILE: &str = "<script>window.hit=1</script> \"quoted\", it's | 100% Größe\u{1b}[31m\u{202e}";

fn output(nmse: Value, ok: bool) -> Value {
    json!({
        "name": "output", "against": "f64", "ok": ok, "count": 64, "max_abs": 1e-6, "allowed": 1e-5, "ulps": 8.0,
        "nmse": nmse, "nmse_allowed": 1e-10, "worst": [0, 1, 2, 3], "got": if ok { json!(0.5) } else { json!("NaN") },
        "expected": if ok { json!(0.5) } else { json!("-inf") }, "nans": u8::from(!ok),
    })
}

fn result(adapter: usize, op: &str, variant: &str, storage: &str, n: usize, status: &str) -> Value {
    let mut result = json!({
        "adapter": adapter, "id": format!("{op}-{storage}-{n}@{variant}"), "op": op, "variant": variant,
        "storage": storage, "status": status, "outputs": [output(json!(1e-15), true)], "same_bits": true,
        "kernels": ["flash"], "why": "many keys", "workgroup": 64, "subgroup": 8, "milliseconds": 12.5,
    });
    match status {
        "failed" => {
            result["reason"] = "output is off\nby much, <b>&\u{1b}[2J".into();
            result["outputs"] = json!([output(json!("NaN"), false)]);
            result["messages"] = json!(["VUID-1 <i>\u{1b}[2J"]);
        }
        "skipped" => {
            result["reason"] = "no SHADER_F16".into();
            result.as_object_mut().unwrap().remove("outputs");
        }
        "known" | "mended" => result["issue"] = "mesa-1".into(),
        _ => {}
    }
    result
}

/// Three adapters: on the first all cases pass, the second has every status, and the third hung.
fn report() -> Value {
    let adapter = |name: &str, backend: &str| {
        json!({
            "name": name, "backend": backend, "kind": "Cpu", "vendor": 65541, "device": 0, "driver": "mesa",
            "driver_info": "Mesa 25", "shader_compiler": "naga to SPIR-V", "subgroups": [4, 8],
            "features": ["SHADER_F16", "SUBGROUP"], "limits": { "max_buffer_size": 1073741824 },
            "observed": [{ "workgroup": 64, "invocations": 64, "subgroup": 8 }], "ended": null, "seconds": 2.0,
        })
    };
    let mut hung = adapter(HOSTILE, "GL");
    hung["ended"] = "hung: \u{1b}]0;title\u{7}no answer".into();
    let mut results = Vec::new();
    for n in 0..6 {
        results.push(result(0, "attention", "fused", "f32", n, "passed"));
        results.push(result(0, "attention", "auto", "f16", n, "passed"));
        results.push(result(0, "softmax", "auto", "f32", n, "passed"));
    }
    for (n, status) in ["passed", "failed", "failed", "known", "mended", "skipped"].into_iter().enumerate() {
        results.push(result(1, "attention", "fused", "f32", n, status));
        results.push(result(1, "attention", "auto", "f16", n, "skipped"));
        results.push(result(1, "softmax", "auto", "f32", n, "passed"));
    }
    results.push(result(2, "attention", "fused", "f32", 0, "passed"));
    results.push(result(2, HOSTILE, HOSTILE, "f32", 0, "failed"));
    json!({
        "schema": "attn-check/1", "version": "0.5.0", "wgpu": "30.0.0", "naga": "30.0.0", "suite": "full",
        "seed": 18446744073709551615u64, "date": "2026-01-02T03:04:05Z", "host": "linux x86_64",
        "adapters": [adapter("llvmpipe", "Vulkan"), adapter("llvmpipe", "GL"), hung], "results": results,
    })
}

fn save(folder: &Path, name: &str, report: &Value) {
    std::fs::write(folder.join(name), report.to_string()).unwrap();
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn check(folder: &Path, args: &[&str]) -> Ran {
    let ran = attn(folder, &[&["check"], args].concat());
    let raw = |c: char| c.is_control() && c != '\n' || ('\u{202a}'..='\u{202e}').contains(&c);
    let drivers = |line: &&str| !line.contains("XDG_RUNTIME_DIR");
    assert!(!ran.stdout.contains(raw), "{:?}", ran.stdout);
    assert!(!ran.stderr.lines().filter(drivers).any(|line| line.contains(raw)), "{:?}", ran.stderr);
    ran
}

#[test]
fn a_saved_report_is_read_strictly() {
    let folder = folder();
    let at = folder.path();
    let refused = |edit: &dyn Fn(&mut Value), part: &str| {
        let mut changed = report();
        edit(&mut changed);
        save(at, "a.json", &changed);
        check(at, &["--from", "a.json", "--html", "page.html"]).refused(1, part);
        assert!(!at.join("page.html").exists());
    };
    refused(
        &|report| report["schema"] = "attn-check/2".into(),
        "\"attn-check/2\"; this version of attn knows \"attn-check/1\"",
    );
    refused(&|report| report["schema"] = "\u{1b}[2J".into(), "\\u{1b}");
    refused(&|report| _ = report.as_object_mut().unwrap().remove("schema"), "no \"schema\"");
    refused(&|report| _ = report.as_object_mut().unwrap().remove("seed"), "missing field `seed`");
    refused(&|report| report["results"][3]["adapter"] = 3.into(), "result 3 is of adapter 3, but there are 3 adapters");
    refused(&|report| report["results"][3]["status"] = "\u{1b}odd".into(), "unknown variant");
    refused(&|report| report["results"][3]["id"] = report["results"][0]["id"].clone(), "result 3 repeats the id");
    refused(&|report| report["results"][0]["outputs"][0]["nmse"] = "much".into(), "\"much\" is no number");
    std::fs::write(at.join("a.json"), "{").unwrap();
    check(at, &["--from", "a.json"]).refused(1, "a.json is not a report of attn check");
    check(at, &["--from", "none.json"]).refused(1, "cannot read none.json");
    check(at, &["--diff", "none.json", "a.json"]).refused(2, "cannot read none.json");

    // Members added by a later version are ignored, and nothing is lost in a round trip.
    let mut more = report();
    more["results"][0]["later"] = 1.into();
    save(at, "a.json", &more);
    check(at, &["--from", "a.json", "--json", "b.json"]).succeeded();
    assert_eq!(serde_json::from_str::<Value>(&read(at, "b.json")).unwrap(), report());
}

#[test]
fn incompatible_options_are_refused() {
    let folder = folder();
    let at = folder.path();
    save(at, "a.json", &report());
    for args in [
        &["--from", "a.json", "--quick"][..],
        &["--from", "a.json", "folder"],
        &["--from", "a.json", "--adapter", "cpu"],
        &["--from", "a.json", "--diff", "a.json", "a.json"],
        &["--diff", "a.json"],
        &["--diff", "a.json", "a.json", "--html", "page.html"],
        &["--diff", "a.json", "a.json", "--seed", "3"],
        &["--from", "a.json", "--long"],
        &["--from", "a.json", "--html", "x", "--junit", "x"],
        &["--from", "a.json", "--html", "x", "--junit", "./x"],
    ] {
        check(at, args).refused(2, "");
    }
    check(at, &["--from", "a.json", "--html", "none/page.html"]).refused(1, "there is no folder none");
}

/// A pipe or a device must not be replaced with a file, nor a link with its target.
#[cfg(unix)]
#[test]
fn pipes_devices_and_links_are_written_to_directly() {
    let folder = folder();
    let at = folder.path();
    save(at, "a.json", &report());
    std::fs::write(at.join("there.md"), "old").unwrap();
    for (link, to) in [("link.md", "there.md"), ("nowhere.md", "/dev/null")] {
        std::os::unix::fs::symlink(to, at.join(link)).unwrap();
        check(at, &["--from", "a.json", "--markdown", link]).succeeded();
        assert!(at.join(link).is_symlink(), "{link}");
    }
    assert!(read(at, "there.md").contains("| softmax |"));
    assert_eq!(read(at, "nowhere.md"), "");
}

#[test]
fn the_table_shows_failures_and_how_to_reproduce_them() {
    let folder = folder();
    save(folder.path(), "a.json", &report());
    let ran = check(folder.path(), &["--from", "a.json"]);
    ran.succeeded();
    let out = &ran.stdout;
    for part in [
        "llvmpipe (Vulkan)",
        "ENDED <script>",
        "FAILED attention, fused: 2 cases on llvmpipe (GL), worst NMSE NaN, worst ulp 8.0",
        "attention-f32-1@fused: output is off\\nby much",
        // The name alone would select the Vulkan adapter.
        "  attn check --adapter gl:llvmpipe --repro attention-f32-1@fused\n",
        "MENDED attention, fused: 1 case on",
        "the known issue mesa-1 says that it fails",
        "--repro '<script>window.hit=1</script> \"quoted\", it'\\''s | 100% Größe\\u{1b}[31m",
    ] {
        assert!(out.contains(part), "{part} is not in\n{out}");
    }

    // It fits on a screen or two.
    let mut many = report();
    many["results"] = (0..50).map(|n| result(0, &format!("op{n}"), "auto", "f32", 0, "failed")).collect();
    save(folder.path(), "many.json", &many);
    let ran = check(folder.path(), &["--from", "many.json"]);
    assert_eq!(ran.stdout.matches("FAILED").count(), 20);
    assert!(ran.stdout.contains("and 30 more in 30 more ops and variants"), "{}", ran.stdout);
}

#[test]
fn junit_holds_every_case_and_each_adapters_end() {
    let folder = folder();
    save(folder.path(), "a.json", &report());
    check(folder.path(), &["--from", "a.json", "--junit", "a.xml"]).succeeded();
    let xml = read(folder.path(), "a.xml");
    let read = junit_parser::from_reader(xml.as_bytes()).expect("JUnit XML");
    assert_eq!((read.tests, read.failures, read.errors, read.skipped), (18 + 18 + 3, 4, 1, 8));
    let [first, second, third] = read.suites.as_slice() else { panic!("{} suites", read.suites.len()) };
    assert_eq!((first.name.as_str(), first.tests, first.failures), ("llvmpipe (Vulkan)", 18, 0));
    assert_eq!((second.tests, second.failures, second.errors, second.skipped), (18, 3, 0, 8));
    assert_eq!((third.tests, third.failures, third.errors), (3, 1, 1));
    let property =
        |name: &str| second.properties.vec.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    assert_eq!(property("driver_info"), Some("Mesa 25"));
    assert_eq!(property("limits.max_buffer_size"), Some("1073741824"));
    assert_eq!(property("seed"), Some("18446744073709551615"));
    let case = |suite: &junit_parser::TestSuite, name: &str| {
        suite.cases.iter().find(|case| case.original_name == name).unwrap_or_else(|| panic!("no {name}")).clone()
    };
    let failed = case(second, "attention-f32-1@fused");
    assert_eq!(failed.classname.as_deref(), Some("attention.fused.f32"));
    assert!((failed.time - 0.0125).abs() <= 0.001, "milliseconds are kept: {}", failed.time);
    // This reader drops escaped characters such as `<`.
    let said = failed.system_err.unwrap_or_default();
    assert!(said.starts_with("VUID-1 ") && said.ends_with("\\u{1b}[2J"), "{said}");
    let failure = failed.status.failure_as_ref();
    assert_eq!(failure.message, "output is off\\nby much, <b>&\\u{1b}[2J");
    assert!(failure.text.contains("NaN instead of -inf"), "{}", failure.text);
    assert!(
        failure.text.contains("attn check --adapter gl:llvmpipe --repro attention-f32-1@fused"),
        "{}",
        failure.text
    );
    assert!(case(second, "attention-f32-0@fused").status.is_success());
    assert_eq!(case(second, "attention-f32-5@fused").status.skipped_as_ref().message, "no SHADER_F16");
    assert!(case(second, "attention-f32-3@fused").status.skipped_as_ref().message.contains("known issue mesa-1"));
    assert!(
        case(second, "attention-f32-4@fused").status.failure_as_ref().message.contains("mesa-1 says that it fails")
    );
    assert!(case(third, "all cases run").status.error_as_ref().message.contains("no answer"));
    assert!(third.name.contains("<script>window.hit=1</script>"));
}

#[test]
fn markdown_has_a_row_for_each_op() {
    let folder = folder();
    save(folder.path(), "a.json", &report());
    let table = |args: &[&str]| {
        check(folder.path(), &[&["--from", "a.json", "--markdown", "a.md"], args].concat()).succeeded();
        let text = read(folder.path(), "a.md");
        assert!(!text.contains("<script>") && text.contains("**ended early**"), "{text}");
        text.lines().filter(|line| line.starts_with('|')).map(str::to_string).collect::<Vec<_>>()
    };
    let short = table(&[]);
    assert_eq!(short.len(), 2 + 3, "{short:#?}");
    assert_eq!(&short[1], "| --- | --- | --: | --: | --: |");
    assert_eq!(&short[2], "| attention | f32 f16 | ✓ 12 | ✗ 2 of 5, mended 1, known 1, – 7 | ✓ 1 |");
    assert_eq!(&short[3], "| softmax | f32 | ✓ 6 | ✓ 6 | – |");
    let long = table(&["--long"]);
    assert_eq!(long.len(), 2 + 4, "{long:#?}");
    assert_eq!(&long[2], "| attention | auto | f16 | ✓ 6 | – | – |");
    // The same number of columns in every row, whatever the names contain.
    let columns = |line: &String| line.replace("\\|", "").matches('|').count();
    assert!(long.iter().all(|line| columns(line) == 7), "{long:#?}");
}

#[test]
fn two_reports_are_compared() {
    let folder = folder();
    let at = folder.path();
    let diff = |edit: &dyn Fn(&mut Value)| {
        let mut changed = report();
        edit(&mut changed);
        save(at, "a.json", &report());
        save(at, "b.json", &changed);
        let ran = check(at, &["--diff", "a.json", "b.json"]);
        assert_eq!(ran.errors(), "");
        (ran.status.unwrap(), ran.stdout)
    };
    #[track_caller]
    fn says((status, text): (i32, String), expected: i32, part: &str) {
        assert_eq!(status, expected, "{text}");
        assert!(text.contains(part), "{part} is not in\n{text}");
        assert_eq!(text.contains("REGRESSION"), expected == 1, "{text}");
    }
    assert_eq!(diff(&|_| ()), (0, "nothing changed\n".to_string()));
    // The order of results does not matter.
    assert_eq!(diff(&|b| b["results"].as_array_mut().unwrap().reverse()).1, "nothing changed\n");
    let first = |b: &mut Value, status: &str| b["results"][0] = result(0, "attention", "fused", "f32", 0, status);
    says(
        diff(&|b| first(b, "failed")),
        1,
        "newly failing: 1\n  attention, fused: 1 case, the first attention-f32-0@fused: failed, was passed: output is off",
    );
    says(diff(&|b| first(b, "skipped")), 1, "passed, and skipped now: 1");
    says(diff(&|b| first(b, "known")), 0, "another status: 1");
    says(diff(&|b| _ = b["results"].as_array_mut().unwrap().remove(0)), 1, "passed, and no longer there: 1");
    says(diff(&|b| b["results"][0]["same_bits"] = false.into()), 1, "no longer gives the same bits: 1");
    says(diff(&|b| b["adapters"][0]["ended"] = "crashed".into()), 1, "llvmpipe (Vulkan) ended early: crashed");
    says(diff(&|b| b["adapters"][2]["ended"] = Value::Null), 0, "no longer ends early");
    says(diff(&|b| b["results"][0]["outputs"][0]["nmse"] = 2e-14.into()), 0, "NMSE of output 2.0e-14, was 1.0e-15");
    assert_eq!(diff(&|b| b["results"][0]["outputs"][0]["nmse"] = 0.9e-14.into()).1, "nothing changed\n");
    // The results of the second adapter begin at 18; every third is fused attention.
    says(diff(&|b| b["results"][21]["status"] = "passed".into()), 0, "newly passing: 1");
    says(
        diff(&|b| {
            b["results"].as_array_mut().unwrap().push(result(0, "new", "auto", "f32", 0, "failed"));
            b["results"].as_array_mut().unwrap().push(result(0, "new", "auto", "f32", 1, "passed"));
        }),
        1,
        "new cases that fail: 1",
    );
    // A case that moved to another variant is the same case.
    let moved = |b: &mut Value, status: &str| b["results"][0] = result(0, "attention", "rows4x8", "f32", 0, status);
    assert_eq!(diff(&|b| moved(b, "passed")), (0, "nothing changed\n".to_string()));
    says(diff(&|b| moved(b, "failed")), 1, "attention-f32-0@rows4x8: failed, was passed by fused: output is off");
    says(
        diff(&|b| b["adapters"][0]["driver_info"] = "Mesa 26\u{1b}[1m".into()),
        0,
        "driver: mesa Mesa 26\\u{1b}[1m, was mesa Mesa 25",
    );
    says(diff(&|b| b["adapters"][0]["limits"]["max_buffer_size"] = 5.into()), 0, "max_buffer_size: 5, was 1073741824");
    says(diff(&|b| b["adapters"][0]["features"] = json!(["SUBGROUP"])), 0, "lost features: SHADER_F16");
    says(
        diff(&|b| b["adapters"][0]["observed"][0]["subgroup"] = 4.into()),
        0,
        "workgroup of 64: 64 invocations in subgroups of 4, was",
    );
    says(diff(&|b| b["wgpu"] = "31.0.0".into()), 0, "wgpu: 31.0.0, was 30.0.0");
    says(
        diff(&|b| b["adapters"][0]["seconds"] = 3.0.into()),
        0,
        "nothing changed except the time: llvmpipe (Vulkan) 3.0 s, was 2.0 s",
    );

    // If one adapter is missing, they are paired by name and backend.
    let without = |b: &mut Value| {
        b["adapters"].as_array_mut().unwrap().remove(0);
        let mut results = b["results"].as_array().unwrap().clone();
        results.retain(|result| result["adapter"] != 0);
        for result in &mut results {
            result["adapter"] = (result["adapter"].as_u64().unwrap() - 1).into();
        }
        b["results"] = results.into();
    };
    let (status, text) = diff(&without);
    assert_eq!(
        (status, text.as_str()),
        (1, "REGRESSION: llvmpipe (Vulkan) is no longer there: 18 passed, 0 failed, 0 skipped\n")
    );
    let ran = check(at, &["--diff", "b.json", "a.json"]);
    assert_eq!(ran.status, Some(0));
    assert_eq!(ran.stdout, "llvmpipe (Vulkan) is new: 18 passed, 0 failed, 0 skipped\n");
}

fn count(browser: &mut Browser) -> String {
    browser.text("document.getElementById('count').textContent")
}

#[test]
fn the_page_is_filtered_and_opened() {
    let folder = folder();
    save(folder.path(), "a.json", &report());
    check(folder.path(), &["--from", "a.json", "--html", "page.html"]).succeeded();
    let browser = &mut Browser::open(&folder.path().join("page.html"), 1200, 900);
    let shown = "document.querySelectorAll('#results details').length";
    let first = "document.querySelector('#results details')";
    let chosen = |browser: &mut Browser, part: &str| {
        browser.wait(&format!("document.getElementById('count').textContent === '{part}'"));
    };
    assert_eq!(count(browser), "38 results");
    assert_eq!(browser.value(shown), 38);
    assert_eq!(browser.value("document.querySelectorAll('#adapters .card').length"), 3);
    assert_eq!(
        browser.text("document.querySelectorAll('#adapters h3')[2].textContent"),
        format!("{} (GL)", escaped(HOSTILE))
    );
    assert!(browser.text("document.querySelector('#adapters .ended').textContent").contains("no answer"));
    assert_eq!(browser.text("typeof window.hit"), "undefined");

    // Failures come first; a click shows the details.
    assert_eq!(browser.text(&format!("{first}.querySelector('.id').textContent")), "attention-f32-1@fused");
    browser.click(&format!("{first}.querySelector('summary')"));
    browser.wait(&format!("{first}.querySelector('.inside') !== null"));
    let inside = browser.text(&format!("{first}.querySelector('.inside').innerText"));
    for part in [
        "output is off\nby much, <b>&\\u{1b}[2J",
        "[0, 1, 2, 3]",
        "NaN",
        "−∞",
        "flash",
        "many keys",
        "12.5 ms",
        "VUID-1 <i>\\u{1b}[2J",
    ] {
        assert!(inside.contains(part), "{part} is not in {inside}");
    }
    let repro = browser.text(&format!("{first}.querySelector('code').textContent"));
    assert_eq!(repro, "attn check --adapter gl:llvmpipe --repro attention-f32-1@fused");

    // The matrix: the worst status colours a cell, and marks show it too.
    let cell = |row: usize, column: usize| {
        format!("document.querySelectorAll('#matrix tr')[{row}].querySelectorAll('td')[{column}]")
    };
    assert_eq!(browser.text(&format!("{}.textContent", cell(0, 1))), "✗\u{a0}2 !\u{a0}1 ≈\u{a0}1 ✓\u{a0}1 –\u{a0}7");
    assert_eq!(browser.text(&format!("{}.className", cell(0, 1))), "failed");
    assert_eq!(browser.text(&format!("{}.className", cell(0, 0))), "passed");
    assert_eq!(browser.text(&format!("{}.className", cell(1, 2))), "none");
    browser.click("document.querySelector('#matrix .fold')");
    browser.wait("document.querySelectorAll('#matrix .inner').length === 2");
    browser.click(&format!("{}.firstChild", cell(1, 1)));
    chosen(browser, "6 of 38 results chosen");
    assert_eq!(browser.text("document.getElementById('variant').value"), "=fused");
    browser.click(&format!("{}.firstChild", cell(1, 1)));
    chosen(browser, "38 results");

    // Filters, separately and combined.
    let set = |browser: &mut Browser, id: &str, value: &str, event: &str| {
        browser.value(&format!(
            "(() => {{ const e = document.getElementById('{id}'); e.value = '{value}'; e.dispatchEvent(new Event('{event}')); }})()"
        ));
    };
    set(browser, "op", "=softmax", "change");
    chosen(browser, "12 of 38 results chosen");
    set(browser, "adapter", "=1", "change");
    chosen(browser, "6 of 38 results chosen");
    set(browser, "text", "F32-3", "input");
    chosen(browser, "1 of 38 results chosen");
    browser.click("document.getElementById('clear')");
    chosen(browser, "38 results");
    set(browser, "storage", "=f16", "change");
    chosen(browser, "12 of 38 results chosen");
    browser.click("document.querySelector('input[value=skipped]')");
    chosen(browser, "6 of 38 results chosen");
    browser.click("document.querySelector('input[value=passed]')");
    chosen(browser, "0 of 38 results chosen");
    browser.click("document.getElementById('clear')");
    chosen(browser, "38 results");
    set(browser, "text", "off by nothing", "input");
    chosen(browser, "0 of 38 results chosen");
    set(browser, "text", "by much", "input");
    chosen(browser, "3 of 38 results chosen");

    // The histograms count the selected results; one NaN each, and a limit.
    let charts = "[...document.querySelectorAll('#charts svg')].map((svg) => svg.getAttribute('aria-label')).join(';')";
    assert_eq!(
        browser.text(charts),
        "NMSE: 2 not finite;largest error, ulp: 2 10⁰ to 10¹;NMSE: 1 not finite;largest error, ulp: 1 10⁰ to 10¹"
    );
    assert_eq!(browser.value("document.querySelectorAll('#charts .allowed').length"), 4);

    // With the keyboard only.
    browser.value("document.querySelector('#matrix .fold').focus()");
    browser.key(" ", 32);
    browser.wait("document.querySelectorAll('#matrix .inner').length === 0");
    assert_eq!(browser.value("document.activeElement.className"), "fold", "the focus stays");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    assert!(browser.requests.iter().all(|url| url.starts_with("file:")), "{:?}", browser.requests);
}

fn escaped(text: &str) -> String {
    text.replace('\u{1b}', "\\u{1b}").replace('\u{202e}', "\\u{202e}")
}

#[test]
fn a_page_of_thousands_of_results_draws_some_hundred_and_fits_a_phone() {
    let folder = folder();
    let mut many = report();
    many["results"] = (0..3)
        .flat_map(|adapter| (0..6000).map(move |n| (adapter, n)))
        .map(|(adapter, n)| result(adapter, ["attention", "softmax", "rotate"][n % 3], "auto", "f32", n, "passed"))
        .collect();
    save(folder.path(), "a.json", &many);
    check(folder.path(), &["--from", "a.json", "--html", "page.html"]).succeeded();
    let browser = &mut Browser::open(&folder.path().join("page.html"), 400, 800);
    browser.dark();
    assert_eq!(count(browser), "18000 results");
    let shown = "document.querySelectorAll('#results details').length";
    assert_eq!(browser.value(shown), 200);
    assert_eq!(browser.text("document.getElementById('more').textContent"), "show 200 of 17800 more");
    browser.click("document.getElementById('more')");
    assert_eq!(browser.value(shown), 400);
    let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.value(overflow), 0, "nothing sticks out of a phone");
    browser.wait("getComputedStyle(document.body).backgroundColor === 'rgb(22, 22, 22)'");
    // Text contrast on every background, also in dark mode.
    let contrast = "(() => { const light = (c) => { const [r, g, b] = c.match(/\\d+/g).map((x) => x / 255)\
        .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };\
        return Math.min(...['passed', 'failed', 'known', 'mended', 'skipped'].map((name) => { const e = document.createElement('span');\
        e.className = name; document.body.append(e); const s = getComputedStyle(e); const [a, b] = [light(s.color), light(s.backgroundColor)];\
        e.remove(); return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })); })()";
    let least = browser.value(contrast).as_f64().unwrap();
    assert!(least >= 4.5, "contrast {least}");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}
