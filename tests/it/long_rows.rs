//! Rows of many keys on the CPU backend: the rounding error of a sum of n numbers must not grow with n.
//!
//! The bounds are twice the errors of PyTorch 2.15's f32 `scaled_dot_product_attention` at 65,536 keys
//! (`docs/performance.md`), relative to the largest value of a result.

use crate::kit;
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::{Align, Attention, Device, Inspect, Tensor, Weights, softmax};

/// Twice PyTorch's error if all scores of a row are equal and all its values are the same number.
const EQUAL: f64 = 3.8e-6;
/// Twice PyTorch's error on random scores and positive values.
const RANDOM: f64 = 1.6e-6;

const LENGTHS: [usize; 4] = [4096, 16_384, 65_536, 262_144];

fn tensor(shape: &[usize], data: &[f32]) -> Tensor {
    Tensor::from_slice(&Device::Cpu, shape, data).unwrap()
}

fn noise(len: usize, seed: u64) -> Vec<f32> {
    kit::noise(&mut Pcg64::seed_from_u64(seed), len)
}

/// The largest error of a row relative to its largest value.
fn largest_error(got: &[f32], want: impl Fn(usize) -> f64) -> f64 {
    kit::worst(got, &(0..got.len()).map(want).collect::<Vec<_>>()).0
}

#[test]
fn equal_scores_give_the_mean_of_the_values() {
    // The mean of one number is that number, LSE = ln n, P = 1 / n.
    for len_k in LENGTHS {
        for len_q in [1, 4, 128] {
            let values = [0.1, 1.0 / 3.0, 0.7, -1.1, 1e-3, 5.3e7f32];
            let width = values.len();
            let q = tensor(&[1, 1, len_q, 2], &vec![0.0; len_q * 2]);
            let k = tensor(&[1, 1, len_k, 2], &noise(len_k * 2, 1));
            let v: Vec<f32> = (0..len_k * width).map(|at| values[at % width]).collect();
            let weights = if len_q == 4 { Weights::PerHead } else { Weights::None };
            let attended = Attention::new()
                .lse(true)
                .weights(weights)
                .forward(&q, &k, &tensor(&[1, 1, len_k, width], &v))
                .unwrap();
            let out = attended.output.download().unwrap();
            for (d, &value) in values.iter().enumerate() {
                let column: Vec<f32> = out.iter().skip(d).step_by(width).copied().collect();
                let off = largest_error(&column, |_| f64::from(value));
                assert!(off <= EQUAL, "{len_k} keys, {len_q} queries, {value}: {off:.1e}");
            }
            let lse = attended.lse.unwrap().download().unwrap();
            let off = largest_error(&lse, |_| (len_k as f64).ln());
            assert!(off <= 6e-8, "the LSE of {len_k} keys: {off:.1e}");
            if let Some(weights) = attended.weights {
                let off = largest_error(&weights.download().unwrap(), |_| 1.0 / len_k as f64);
                assert!(off <= 2e-7, "the weights of {len_k} keys: {off:.1e}");
            }
        }
    }
}

#[test]
fn random_scores_keep_their_digits() {
    for (len_k, len_q, width, causal) in
        [(65_536, 3, 16, false), (65_536, 130, 16, false), (65_536, 130, 64, true), (262_144, 2, 64, false)]
    {
        let scores = noise(len_q * width, 1);
        let keys = noise(len_k * width, 2);
        let values: Vec<f32> = noise(len_k * width, 3).iter().map(|x| x.abs()).collect();
        let shape = |len| [1, 1, len, width];
        let mut attention = Attention::new().lse(true);
        if causal {
            attention = attention.causal(Align::BottomRight);
        }
        let attended = attention
            .forward(&tensor(&shape(len_q), &scores), &tensor(&shape(len_k), &keys), &tensor(&shape(len_k), &values))
            .unwrap();
        // Three rows in f64: first, middle, last.
        let (out, lses) = (attended.output.download().unwrap(), attended.lse.unwrap().download().unwrap());
        for i in [0, len_q / 2, len_q - 1] {
            let seen = if causal { len_k - len_q + i + 1 } else { len_k };
            let dot = |j: usize| -> f64 {
                let products = (0..width).map(|d| f64::from(scores[i * width + d]) * f64::from(keys[j * width + d]));
                products.sum::<f64>() / (width as f64).sqrt()
            };
            let row: Vec<f64> = (0..seen).map(dot).collect();
            let peak = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|x| (x - peak).exp()).sum();
            let mut want = vec![0.0; width];
            for (j, x) in row.iter().enumerate() {
                let p = (x - peak).exp() / sum;
                want.iter_mut().zip(&values[j * width..]).for_each(|(want, &v)| *want += p * f64::from(v));
            }
            let off = largest_error(&out[i * width..][..width], |d| want[d]);
            assert!(off <= RANDOM, "{len_k} keys, row {i} of {len_q}: {off:.1e}");
            let off = largest_error(&lses[i..=i], |_| peak + sum.ln());
            assert!(off <= 2e-7, "{len_k} keys, the LSE of row {i}: {off:.1e}");
        }
    }
}

#[test]
fn scores_that_rise_form_a_geometric_series() {
    // Score j·a: P_j = r^j (1 − r) / (1 − r^n) for r = e^a. The maximum rises with every block.
    for len_k in LENGTHS {
        // a is a power of two, so that every score is exact.
        let (a, n) = (2f64.powi(4) / len_k as f64, len_k as f64);
        let keys: Vec<f32> = (0..len_k).map(|j| (j as f64 * a) as f32).collect();
        let values = vec![0.1f32; len_k];
        let attended = Attention::new()
            .scale(1.0)
            .lse(true)
            .forward(
                &tensor(&[1, 1, 1, 1], &[1.0]),
                &tensor(&[1, 1, len_k, 1], &keys),
                &tensor(&[1, 1, len_k, 1], &values),
            )
            .unwrap();
        let off = largest_error(&attended.output.download().unwrap(), |_| f64::from(0.1f32));
        assert!(off <= EQUAL, "{len_k} keys: {off:.1e}");
        let want = ((n * a).exp_m1() / a.exp_m1()).ln();
        let off = largest_error(&attended.lse.unwrap().download().unwrap(), |_| want);
        assert!(off <= 2e-7, "the LSE of {len_k} keys: {off:.1e}");
    }
}

#[test]
fn softmax_over_a_long_row() {
    for len in LENGTHS {
        for step in [1, 3] {
            // Along the last axis, and along the first.
            let x: Vec<f32> = noise(len * step, 5);
            let got = softmax(&tensor(&[len, step], &x), 0).unwrap().download().unwrap();
            for column in 0..step {
                let of = |row: &[f32]| row.iter().skip(column).step_by(step).copied().collect::<Vec<f32>>();
                let (got, x) = (of(&got), of(&x));
                let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
                // Two ulp of exp, two roundings, and the rounding of the shift.
                let off = largest_error(&got, |at| f64::from(x[at]).exp() / sum);
                assert!(off <= 5e-7, "{len}: {off:.1e}");
                let total: f64 = got.iter().map(|&p| f64::from(p)).sum();
                assert!((total - 1.0).abs() <= 1e-7, "{len}: the weights sum to {total}");
            }
        }
        // exp of −1 is a number whose f32 sum is off by more the longer it is.
        let mut x = vec![-1.0; len];
        x[len / 2] = 0.0;
        let got = softmax(&tensor(&[len], &x), 0).unwrap().download().unwrap();
        let sum = 1.0 + (len - 1) as f64 * (-1f64).exp();
        let off = largest_error(&got, |at| f64::from(x[at]).exp() / sum);
        assert!(off <= 3e-7, "{len}: {off:.1e}");
    }
}

#[test]
fn entropies_and_column_sums_of_long_rows() {
    // All P are 1 / n: the entropy is ln n, and each key gets len_q / n.
    for (len_q, len_k) in [(3, 65_536), (3, 262_144), (16_384, 96)] {
        let q = tensor(&[1, 1, len_q, 1], &vec![0.0; len_q]);
        let k = tensor(&[1, 1, len_k, 1], &noise(len_k, 1));
        let attention = Attention::new().lse(true);
        let lse = attention.forward(&q, &k, &k).unwrap().lse.unwrap();
        let seen = attention.inspect(&q, &k, &lse, &Inspect::new().column_sums().entropy()).unwrap();
        // An LSE of 12 is rounded by up to 5e-7, which P = exp(S − LSE) and the entropy inherit.
        let off = largest_error(&seen.entropy.unwrap().download().unwrap(), |_| (len_k as f64).ln());
        assert!(off <= 7e-7, "the entropy of {len_k} keys: {off:.1e}");
        let sums = seen.column_sums.unwrap().download().unwrap();
        let off = largest_error(&sums, |_| len_q as f64 / len_k as f64);
        assert!(off <= 7e-7, "what {len_q} queries give a key: {off:.1e}");
    }
}

#[test]
fn weights_averaged_over_many_heads() {
    let (heads, len_k) = (1000, 600);
    let q = tensor(&[1, heads, 1, 1], &vec![0.0; heads]);
    let k = tensor(&[1, heads, len_k, 1], &noise(heads * len_k, 1));
    let attended = Attention::new().weights(Weights::Averaged).forward(&q, &k, &k).unwrap();
    let off = largest_error(&attended.weights.unwrap().download().unwrap(), |_| 1.0 / len_k as f64);
    assert!(off <= 1.2e-7, "{off:.1e}");
}

#[test]
fn sums_that_leave_the_range_of_f32_do_not_matter() {
    // The sum of 65,536 values of 1e35 is beyond f32, that of 2048 is not; the mean is 1e35.
    let len_k = 65_536;
    let q = tensor(&[1, 1, 2, 1], &[0.0; 2]);
    let v = tensor(&[1, 1, len_k, 1], &vec![1e35; len_k]);
    let out = Attention::new().forward(&q, &v, &v).unwrap().output.download().unwrap();
    let off = largest_error(&out, |_| f64::from(1e35f32));
    assert!(off <= EQUAL, "{out:?}");
}
