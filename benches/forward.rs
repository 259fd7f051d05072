//! Times the forward pass on an adapter: `cargo bench --bench forward -- [ADAPTER] [SHAPE …]`.
//!
//! Prints one row per shape: the first call (with compilation) apart, then the best and the median of calls
//! after a warm-up, each waited for; GFLOP/s is of the median. Not a test: numbers on a shared machine are to be compared within one run.

use std::time::Instant;

use wgpu_attention::{Align, Attention, Device, GpuOptions, MultiHeadAttention, MultiHeadConfig, Tensor, Weights};

/// Name, batch, query heads, key/value heads, queries, keys, width, causal.
const SHAPES: [(&str, [usize; 6], bool); 6] = [
    ("P1", [1, 12, 12, 512, 512, 64], false),
    ("P2", [1, 12, 12, 1024, 1024, 64], true),
    ("P3", [1, 32, 8, 512, 512, 128], true),
    ("P4", [1, 32, 8, 1, 4096, 128], false),
    ("P7", [4, 8, 8, 128, 512, 64], false),
    ("P9", [1, 8, 8, 64, 64, 64], false),
];

fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 * 2.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Milliseconds: the first call, the best and the median of those after a warm-up.
fn time(mut run: impl FnMut()) -> [f64; 3] {
    let once = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e3
    };
    let first = once(&mut run);
    let second = once(&mut run);
    let repeats = ((1500.0 / second.max(0.01)) as usize).clamp(5, 50);
    let mut times: Vec<f64> = (0..repeats).map(|_| once(&mut run)).collect();
    times.sort_by(f64::total_cmp);
    [first, times[0], times[repeats / 2]]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let (own, words): (Vec<_>, Vec<_>) = words.into_iter().partition(|w| w.contains(','));
    let (shapes, adapters): (Vec<_>, Vec<_>) = words.into_iter().partition(|w| w.starts_with('P') && w.len() == 2);
    let device = match adapters.first().map(String::as_str) {
        Some("cpu") => Device::Cpu,
        Some(name) => Device::with_options(&GpuOptions::adapter(name))?,
        None => Device::new()?,
    };
    let wait = |device: &Device| device.gpu().map_or(Ok(()), |gpu| gpu.wait());
    println!("{} {}", device.name(), device.gpu().map_or(String::new(), |gpu| gpu.info().driver_info.clone()));
    println!("{:<12} {:>12} {:>12} {:>12} {:>10}", "shape", "first ms", "best ms", "median ms", "GFLOP/s");
    let wanted = |name: &str| shapes.is_empty() && own.is_empty() || shapes.iter().any(|shape| shape == name);
    let own_shapes = own.iter().map(|word| {
        let mut numbers = word.split(',').map(|n| n.parse().expect("b,hq,hkv,sq,skv,d"));
        let shape = std::array::from_fn(|_| numbers.next().expect("six numbers"));
        (word.as_str(), shape, numbers.next().is_some_and(|n| n == 1))
    });
    for (name, [b, hq, hkv, sq, skv, d], causal) in
        SHAPES.into_iter().filter(|&(name, ..)| wanted(name)).chain(own_shapes)
    {
        let q = Tensor::from_slice(&device, &[b, hq, sq, d], &noise(b * hq * sq * d, 1))?;
        let k = Tensor::from_slice(&device, &[b, hkv, skv, d], &noise(b * hkv * skv * d, 2))?;
        let v = Tensor::from_slice(&device, &[b, hkv, skv, d], &noise(b * hkv * skv * d, 3))?;
        let visible: usize = if causal { (0..sq).map(|i| (i + 1).min(skv)).sum() } else { sq * skv };
        let flops = 4.0 * (b * hq * visible * d) as f64;
        for (what, weights) in [("", Weights::None), ("+weights", Weights::PerHead)] {
            let mut attention = Attention::new().weights(weights);
            if causal {
                attention = attention.causal(Align::TopLeft);
            }
            let [first, best, ms] = time(|| {
                attention.forward(&q, &k, &v).expect("a valid call");
                wait(&device).expect("a healthy device");
            });
            println!(
                "{:<12} {first:>12.1} {best:>12.2} {ms:>12.2} {:>10.1}",
                format!("{name} {what}"),
                flops / ms / 1e6
            );
        }
    }
    if wanted("P6") {
        let (batch, len, dim) = (8, 128, 512);
        let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(dim, 8)?, 1)?;
        let x = Tensor::from_slice(&device, &[batch, len, dim], &noise(batch * len * dim, 4))?;
        let flops = 8.0 * (batch * len * dim * dim) as f64 + 4.0 * (batch * len * len * dim) as f64;
        let [first, best, ms] = time(|| {
            layer.forward(&x, &x, &x, &Attention::new()).expect("a valid call");
            wait(&device).expect("a healthy device");
        });
        println!("{:<12} {first:>12.1} {best:>12.2} {ms:>12.2} {:>10.1}", "P6 layer", flops / ms / 1e6);
    }
    Ok(())
}
