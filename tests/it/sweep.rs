//! A seeded sweep of every op, form and storage type by every way there is to compute it, against the f64 truth.
//! `attn check` runs the same cases in other numbers.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::kit::{self, all_devices, worst};
use wgpu_attention::{Device, Dtype, Method};
use wgpu_attention_conformance::{cases, rounding};

/// The ways to run a call on a device that are worth telling apart.
fn methods(device: &Device) -> Vec<Method> {
    device.gpu().map_or(vec![Method::Auto], |gpu| Method::every(gpu.capabilities()))
}

/// Runs every case on a device; how many there were.
fn sweep(name: &str, device: &Device) -> usize {
    let start = Instant::now();
    let mut ways: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    // Seed 1 is the quick suite's, which the program's tests run.
    let all = cases(&methods(device), 2, true);
    for (case, method) in &all {
        let what = format!("{case} by {method} on {name}");
        let got = case.run(device, *method).unwrap_or_else(|error| panic!("{what}: {error}"));
        let truth = case.truth();
        assert_eq!(got.len(), truth.len(), "{what}");
        let (cases, most) = ways.entry(method.to_string()).or_default();
        *cases += 1;
        for (got, truth) in got.iter().zip(&truth) {
            assert_eq!((got.name, &got.shape), (truth.name, &truth.shape), "{what}");
            kit::assert_close(
                &format!("{} of {what}", got.name),
                &got.values,
                &truth.values,
                truth.tolerance + f64::from(truth.roundings) * rounding(got.dtype),
            );
            if case.storage == Dtype::F32 {
                *most = most.max(worst(&got.values, &truth.values).0);
            }
        }
    }
    let mut table = format!("{name}: {:.1?}\n", start.elapsed());
    for (way, (cases, most)) in ways {
        table += &format!("  {way:<26} {cases:>5} cases, f32 at most {most:.1e} off\n");
    }
    print!("{table}");
    all.len()
}

#[test]
fn hundreds_of_calls_through_every_way() {
    // Side by side: most of it is drivers that compile, each on one core.
    let total: usize = std::thread::scope(|scope| {
        let runs: Vec<_> =
            all_devices().into_iter().map(|(name, device)| scope.spawn(move || sweep(&name, &device))).collect();
        runs.into_iter().map(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
    });
    println!("{total} cases in all");
    assert!(total >= 500, "{total} cases");
}
