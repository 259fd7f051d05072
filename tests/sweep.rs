//! A seeded sweep of every op, form and storage type by every way there is to compute it, against the f64 truth.
//! `attn check` runs the same cases in other numbers.

mod kit;

use std::collections::BTreeMap;
use std::time::Instant;

use kit::{devices, worst};
use wgpu_attention::{Device, Dtype, Method};
use wgpu_attention_conformance::{cases, rounding};

/// The ways to run a call on a device that are worth telling apart.
fn methods(device: &Device) -> Vec<Method> {
    device.gpu().map_or(vec![Method::Auto], |gpu| Method::every(gpu.capabilities()))
}

#[test]
fn a_thousand_calls_through_every_way() {
    let mut total = 0;
    for (name, device) in devices() {
        let start = Instant::now();
        let mut ways: BTreeMap<String, (usize, f64)> = BTreeMap::new();
        for (case, method) in (2..4).flat_map(|seed| cases(&methods(&device), seed, true)) {
            let what = format!("{case} by {method} on {name}");
            let got = case.run(&device, method).unwrap_or_else(|error| panic!("{what}: {error}"));
            let truth = case.truth();
            assert_eq!(got.len(), truth.len(), "{what}");
            for (got, truth) in got.iter().zip(&truth) {
                assert_eq!((got.name, &got.shape), (truth.name, &truth.shape), "{what}");
                kit::assert_close(
                    &format!("{} of {what}", got.name),
                    &got.values,
                    &truth.values,
                    truth.tolerance + f64::from(truth.roundings) * rounding(got.dtype),
                );
                if case.storage == Dtype::F32 {
                    let (_, most) = ways.entry(method.to_string()).or_default();
                    *most = most.max(worst(&got.values, &truth.values).0);
                }
            }
            ways.entry(method.to_string()).or_default().0 += 1;
            total += 1;
        }
        println!("{name}: {:.1?}", start.elapsed());
        for (way, (cases, most)) in ways {
            println!("  {way:<26} {cases:>5} cases, f32 at most {most:.1e} off");
        }
    }
    println!("{total} cases in all");
    assert!(total >= 1000, "{total} cases");
}
