//! Profiles of the library's own calls: kernels, the adapter's clock, and the adapter's ceiling.

use crate::kit;
use std::time::{Duration, Instant};

use wgpu_attention::{Attention, Method, MultiHeadAttention, MultiHeadConfig, Tensor, Weights, wgpu};

#[test]
fn a_profile_names_what_ran_and_changes_nothing() {
    for (_, device) in kit::devices() {
        let data: Vec<f32> = (0..2 * 4 * 40 * 16).map(|n| (n as f32).sin()).collect();
        let q = Tensor::from_slice(&device, &[2, 4, 40, 16], &data).unwrap();
        for (method, kernels) in
            [(Method::Fused, &["flash"][..]), (Method::ThreePasses, &["scores", "softmax", "weighted_sum"])]
        {
            let attention = Attention::new().method(method);
            let start = Instant::now();
            let (attended, profile) = attention.forward_profiled(&q, &q, &q).unwrap();
            let wall = start.elapsed();
            let plain = attention.forward(&q, &q, &q).unwrap();
            assert_eq!(attended.output.download().unwrap(), plain.output.download().unwrap());
            let Some(gpu) = device.gpu() else {
                assert!(profile.kernels.is_empty() && profile.gpu_time.is_none());
                let computed = profile.cpu_time.expect("the CPU backend measures it");
                assert!(!computed.is_zero() && computed <= wall, "{computed:?} of {wall:?}");
                continue;
            };
            let heads: Vec<&str> = profile.kernels.iter().map(|name| name.split('/').next().unwrap()).collect();
            assert_eq!(heads, kernels, "{gpu:?}");
            assert_eq!(profile.cpu_time, None);
            let counts = gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY);
            match profile.gpu_time {
                Some(time) => assert!(counts && !time.is_zero() && time <= wall, "{gpu:?}: {time:?} of {wall:?}"),
                None => assert!(!counts, "{gpu:?}"),
            }
        }
    }
}

#[test]
fn a_profile_of_a_layer_has_its_projections() {
    for (_, device) in kit::devices() {
        let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(32, 4).unwrap(), 7).unwrap();
        let x = Tensor::from_slice(&device, &[2, 9, 32], &[0.25; 2 * 9 * 32]).unwrap();
        let attention = Attention::new().weights(Weights::Averaged);
        let (output, profile) = layer.forward_profiled(&x, &x, &x, &attention).unwrap();
        assert_eq!(output.weights.unwrap().shape(), [2, 9, 9]);
        let has = |kernel: &str| profile.kernels.iter().any(|name| name.split('/').next() == Some(kernel));
        assert_eq!([has("project"), has("mean_heads")], [device.gpu().is_some(); 2], "{:?}", profile.kernels);
        let mut once = profile.kernels.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), profile.kernels.len(), "{:?}", profile.kernels);
    }
}

#[test]
fn a_call_without_work_has_an_empty_profile() {
    for (_, device) in kit::devices() {
        let q = Tensor::from_slice(&device, &[1, 1, 0, 8], &[0f32; 0]).unwrap();
        let (attended, profile) = Attention::new().forward_profiled(&q, &q, &q).unwrap();
        assert_eq!(attended.output.shape(), [1, 1, 0, 8]);
        assert!(profile.kernels.is_empty() && profile.gpu_time.is_none());
        assert_eq!(profile.cpu_time.unwrap_or_default(), Duration::ZERO);
    }
}

#[test]
fn the_ceiling_is_measured_once() {
    for (_, device) in kit::devices() {
        let ceiling = device.multiply_add_ceiling().unwrap();
        assert!(ceiling.is_finite() && ceiling > 1e7, "{ceiling} operations per second on {device:?}");
        assert_eq!(device.multiply_add_ceiling().unwrap(), ceiling);
        println!("{device:?}: {:.1} GFLOP/s", ceiling / 1e9);
        assert_eq!(device.clone().multiply_add_ceiling().unwrap(), ceiling);
    }
}
