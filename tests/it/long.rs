//! Rows longer than the loop limits of some drivers, and longer than naive sums stay accurate.

use crate::kit::{self, Call, devices, wide};
use wgpu_attention::kernels::Variant;
use wgpu_attention::problem::{Align, MaskMeaning, Positions};
use wgpu_attention::{Attention, Device, Error, Gpu, GpuOptions, Inspect, Method, Tensor, Weights, project, softmax};

/// The iteration limit of [`counting`].
const TURNS: u32 = 2000;

/// A kernel whose loops end after [`TURNS`] iterations in total, as Mesa's software drivers end them after 65,535. The
/// check that ends a loop counts as an iteration.
fn counting(_: &Variant, text: &str) -> Option<String> {
    let mut counted = format!("var<private> turns_left: u32 = {TURNS}u;\n");
    for line in text.lines() {
        let head = line.trim_start();
        let is_loop = (head.starts_with("for (") || head.starts_with("while (")) && head.ends_with('{');
        if is_loop {
            counted.push_str("turns_left -= min(turns_left, 1u);\n");
        }
        counted.push_str(line);
        counted.push('\n');
        if is_loop {
            counted.push_str("if (turns_left == 0u) { break; }\nturns_left -= 1u;\n");
        }
    }
    Some(counted)
}

/// Every adapter with such kernels; `max_loop_turns` is the limit that planning assumes.
fn counters(max_loop_turns: u32) -> Vec<(String, Device)> {
    let open = |adapter: wgpu_attention::AdapterSummary| {
        let options = GpuOptions::adapter(adapter.index.to_string()).max_loop_turns(max_loop_turns).rewrite(counting);
        let name = format!("{} ({}), loops of {TURNS} iterations", adapter.info.name, adapter.info.backend);
        (name, Device::Gpu(Gpu::with_options(&options).unwrap()))
    };
    Gpu::adapters().into_iter().map(open).collect()
}

fn sines(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

#[test]
fn loops_are_split_before_a_driver_ends_them() {
    let (q, k, v) = ([2, 4, 9, 16], [2, 2, 1500, 16], [2, 2, 1500, 24]);
    let masks = vec![(vec![2, 1, 1, 1500], MaskMeaning::Hide)];
    let positions = Positions {
        causal: true,
        align: Align::PerBatch(vec![1490, 900]),
        key_lengths: Some(vec![1500, 1400]),
        ..Positions::default()
    };
    let ruled = Call { masks, biases: vec![vec![4, 9, 1500]], positions, ..Call::plain(q, k, v) };
    for (n, (name, device)) in counters(TURNS).into_iter().enumerate() {
        // Output, LSE, weights and scores, also in three passes.
        ruled.check(&name, &device, 3e-6);
        let gpu = device.gpu().unwrap();
        // Each compiles its own kernels.
        let mut methods = Method::every(gpu.capabilities());
        methods.truncate(if n == 0 { usize::MAX } else { 2 });
        for &method in &methods {
            Call::plain(q, k, v).check_output(&name, &device, method, 3e-6);
        }
        // Wider than the fused kernels take.
        Call::plain([1, 1, 3, 600], [1, 1, 700, 600], [1, 1, 700, 8]).check_output(&name, &device, Method::Auto, 3e-6);

        let mut odd = ruled.data();
        for (column, value) in [(5, f32::NAN), (7, f32::INFINITY), (23, f32::NEG_INFINITY)] {
            [1380, 1490, 1493, 1496].iter().for_each(|key| odd.v[key * 24 + column] = value);
        }
        let (truth, _) = ruled.truth(&odd);
        assert!(truth.output.iter().any(|x| x.is_nan()) && truth.output.iter().any(|x| x.is_infinite()));
        for &method in &methods {
            let attended = ruled.run(&device, &odd, ruled.attention().method(method)).unwrap();
            let what = format!("values that are not finite, {method}, {name}");
            truth.hold_output(&what, &attended.output, 3e-6);
        }

        let data = ruled.data();
        let attended = ruled.run(&device, &data, ruled.attention().lse(true)).unwrap();
        let operands = ruled.operands(&device, &data, wgpu_attention::Dtype::F32).unwrap();
        let attention = ruled.ruled(&device, &data, ruled.attention()).unwrap();
        let wanted = Inspect::new().weights().column_sums().entropy();
        let seen = attention.inspect(&operands[0], &operands[1], &attended.lse.unwrap(), &wanted).unwrap();
        let truth = ruled.inspected(&data, &[0, 1, 2, 3], 0..9);
        for (what, got, truth) in [
            ("weights", seen.weights, truth.weights),
            ("column sums", seen.column_sums, truth.column_sums),
            ("entropy", seen.entropy, truth.entropy),
        ] {
            let (what, got) = (format!("{what}, {name}"), got.unwrap());
            if got.shape().len() == 3 && what.starts_with("entropy") {
                kit::assert_logs_close(&what, &got, &truth, 3e-5);
            } else {
                kit::assert_close(&what, &got, &truth, 3e-5);
            }
        }

        for width in [3000, 20_001, 200_000] {
            let x = Tensor::from_slice(&device, &[2, width], &sines(2 * width)).unwrap();
            let on_cpu = Tensor::from_slice(Device::Cpu, &[2, width], &sines(2 * width)).unwrap();
            let [got, truth] = [x, on_cpu].map(|x| softmax(&x, -1).unwrap());
            kit::assert_close(&format!("softmax of {width}, {name}"), &got, &wide(&truth.download().unwrap()), 3e-6);
        }

        // Many outputs, a deep input, many rows; few rows.
        for (rows, dim_in, dim_out) in [(70, 40, 3000), (9, 70_000, 4), (600, 500, 300), (1, 20_000, 70)] {
            let run = |device: &Device| {
                let x = Tensor::from_slice(device, &[1, rows, dim_in], &sines(rows * dim_in)).unwrap();
                let w = Tensor::from_slice(device, &[dim_out, dim_in], &sines(dim_out * dim_in)).unwrap();
                project(&x, &w, None).unwrap()
            };
            let what = format!("{rows} rows of {dim_in} to {dim_out}, {name}");
            kit::assert_close(&what, &run(&device), &wide(&run(&Device::Cpu).download().unwrap()), 2e-5);
        }
        gpu.multiply_add_ceiling().unwrap();
    }
    // If planning does not know the limit, rows are wrong: the checks above can fail.
    let plain = Call::plain(q, [2, 2, 4000, 16], [2, 2, 4000, 24]);
    for (name, device) in counters(u32::MAX) {
        let (truth, _) = plain.truth(&plain.data());
        let one = Attention::new().method("rows1x8/keys4".parse().unwrap());
        let attended = plain.run(&device, &plain.data(), one).unwrap();
        assert!(kit::worst(&attended.output.download().unwrap(), &truth.output).0 > 1e-3, "{name}");
    }
}

#[test]
fn loops_that_cannot_be_split_are_refused_with_the_numbers() {
    let options = GpuOptions::new().max_loop_turns(20);
    let device = Device::Gpu(Gpu::with_options(&options).unwrap());
    let x = Tensor::from_slice(&device, &[1, 1, 300, 64], &vec![0.5f32; 300 * 64]).unwrap();
    for method in [Method::Fused, Method::ThreePasses] {
        match Attention::new().method(method).forward(&x, &x, &x) {
            Err(Error::Unsupported { needs, .. }) => assert!(needs.contains("at most 20 iterations"), "{needs}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn rows_over_a_vocabulary_sum_to_one() {
    for (name, device) in devices() {
        // Equal logits, and one that takes all the weight at either end.
        for width in [128_256, 1_000_003] {
            let mut x = vec![0.0f32; 3 * width];
            x[width] = 200.0;
            x[3 * width - 1] = 200.0;
            let x = Tensor::from_slice(&device, &[3, width], &x).unwrap();
            let p = softmax(&x, -1).unwrap();
            let mut wanted = vec![1.0 / width as f64; width];
            wanted.extend((0..2 * width).map(|at| f64::from(u8::from(at == 0 || at == 2 * width - 1))));
            kit::assert_close(&format!("{width}, {name}"), &p, &wanted, 3e-6);
        }
    }
}

#[test]
fn long_rows_meet_their_closed_forms() {
    const KEYS: usize = 131_072;
    let value = |j: usize, d: usize| ((j * 7 + d * 3) % 11) as f32 - 4.0;
    let v: Vec<f32> = (0..KEYS * 8).map(|at| value(at / 8, at % 8)).collect();
    let mean: Vec<f64> = (0..8).map(|d| (0..KEYS).map(|j| f64::from(value(j, d))).sum::<f64>() / KEYS as f64).collect();
    // Query 0 weighs all keys equally, 1 only the first, 2 only the last.
    let q: Vec<f32> = (0..3 * 8).map(|at| f32::from(u8::from(at / 8 > 0 && at % 8 == at / 8))).collect();
    let mut k = vec![0.0f32; KEYS * 8];
    (k[1], k[KEYS * 8 - 6]) = (200.0, 200.0);
    for (name, device) in devices() {
        let tensor = |rows: usize, data: &[f32]| Tensor::from_slice(&device, &[1, 1, rows, 8], data).unwrap();
        let (q, k, v) = (tensor(3, &q), tensor(KEYS, &k), tensor(KEYS, &v));
        let row = |j: usize| (0..8).map(move |d| f64::from(value(j, d)));
        let output: Vec<f64> = mean.iter().copied().chain(row(0)).chain(row(KEYS - 1)).collect();
        let lse = [(KEYS as f64).ln(), 200.0, 200.0];
        let attention = Attention::new().scale(1.0).lse(true);
        for method in [Method::Fused, Method::ThreePasses] {
            let what = format!("{method}, {name}");
            let attended = attention.clone().method(method).weights(Weights::PerHead).forward(&q, &k, &v).unwrap();
            kit::assert_close(&what, &attended.output, &output, 3e-6);
            kit::assert_logs_close(&what, &attended.lse.unwrap(), &lse, 1e-6);
            let mut wanted = vec![1.0 / KEYS as f64; KEYS];
            wanted.extend((0..2 * KEYS).map(|at| f64::from(u8::from(at == 0 || at == 2 * KEYS - 1))));
            kit::assert_close(&format!("weights, {what}"), &attended.weights.unwrap(), &wanted, 3e-6);
        }
        let lse = attention.forward(&q, &k, &v).unwrap().lse.unwrap();
        let seen = attention.inspect(&q, &k, &lse, &Inspect::new().entropy()).unwrap();
        kit::assert_logs_close(&name, &seen.entropy.unwrap(), &[(KEYS as f64).ln(), 0.0, 0.0], 5e-6);
    }
}

#[test]
fn a_non_finite_value_at_the_end_of_a_long_row_is_found() {
    const KEYS: usize = 70_000;
    let mut v = vec![1.0f32; KEYS * 16];
    (v[(KEYS - 1) * 16 + 3], v[(KEYS - 2) * 16 + 9]) = (f32::NAN, f32::NEG_INFINITY);
    for (name, device) in devices() {
        let q = Tensor::from_slice(&device, &[1, 1, 40, 16], &[0.1f32; 40 * 16]).unwrap();
        let k = Tensor::from_slice(&device, &[1, 1, KEYS, 16], &vec![0.1f32; KEYS * 16]).unwrap();
        let v = Tensor::from_slice(&device, &[1, 1, KEYS, 16], &v).unwrap();
        for method in [Method::Fused, Method::ThreePasses] {
            // The last query sees both, the one before it only −∞.
            let attention = Attention::new().causal(Align::BottomRight).method(method);
            let got = attention.forward(&q, &k, &v).unwrap().output;
            let wanted: Vec<f64> = (0..40 * 16)
                .map(|at| match (at / 16, at % 16) {
                    (39, 3) => f64::NAN,
                    (38.., 9) => f64::NEG_INFINITY,
                    _ => 1.0,
                })
                .collect();
            kit::assert_close(&format!("{method}, {name}"), &got, &wanted, 5e-6);
        }
    }
}
