//! Async calls on a single-threaded executor: it keeps ticking while drivers compile and wait.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::kit::{devices, noise};
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::{
    Attended, Attention, Device, EncodeSlices, Gpu, Inspected, KvCache, KvCacheConfig, Method, MultiHeadAttention,
    MultiHeadConfig, MultiHeadOutput, Result, StateDict, Tensor,
};

/// The duration of `work`, the number of ticks of a millisecond clock in the meantime, and its longest pause.
fn beside_a_ticker<T>(work: impl Future<Output = T>) -> (T, Duration, u32, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (ticks, longest) = (Cell::new(0), Cell::new(Duration::ZERO));
    let ticker = async {
        let mut last = Instant::now();
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            ticks.set(ticks.get() + 1);
            longest.set(longest.get().max(last.elapsed()));
            last = Instant::now();
        }
    };
    let began = Instant::now();
    let done = runtime.block_on(async {
        let work = std::pin::pin!(work);
        let ticker = std::pin::pin!(ticker);
        // The ticker never ends.
        let both = std::future::poll_fn({
            let (mut work, mut ticker) = (work, ticker);
            move |context| {
                let _: std::task::Poll<()> = ticker.as_mut().poll(context);
                work.as_mut().poll(context)
            }
        });
        both.await
    });
    (done, began.elapsed(), ticks.get(), longest.get())
}

/// The clock must tick during most of the long work. The longest pause is only printed, because it depends on the
/// machine (`cargo test --test it -- executor --nocapture`).
fn check<T>(what: &str, work: impl Future<Output = Result<T>>) -> T {
    let (done, took, ticks, longest) = beside_a_ticker(work);
    println!("{what}: {:.1} ms, longest pause {:.1} ms", took.as_secs_f64() * 1e3, longest.as_secs_f64() * 1e3);
    if took > Duration::from_millis(100) {
        assert!(ticks >= 5 && longest < took / 2, "{what}: {took:?}, {ticks} ticks, a pause of {longest:?}");
    }
    done.unwrap()
}

#[test]
fn the_executor_is_not_blocked() {
    let values = noise(&mut Pcg64::seed_from_u64(1), 8 * 700 * 40);
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[1, 8, 700, 40], &values).unwrap();
        // A width that no other test compiles for.
        let forward = Attention::new().method(Method::Auto).softcap(37.0).lse(true);
        let attended = check(&format!("a first forward on {name}"), forward.forward_async(&x, &x, &x));
        check(&format!("its download on {name}"), attended.output.download_async());
        let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(40, 4).unwrap(), 1).unwrap();
        let tokens = x.select(0, 0).unwrap();
        check(&format!("a first layer on {name}"), layer.forward_async(&tokens, &tokens, &tokens, &Attention::new()));
        if device.gpu().is_some() {
            let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 8, 1024, 40)).unwrap();
            check(&format!("a step of many tokens on {name}"), cache.step_async(&Attention::new(), &x, &x, &x));
            let one = x.narrow(2, 0, 1).unwrap();
            let attention = Attention::new();
            check(&format!("50 steps on {name}"), async {
                for _ in 0..50 {
                    cache.step_async(&attention, &one, &one, &one).await?.output.download_async().await?;
                }
                Ok(())
            });
        }
    }
}

#[test]
fn types_and_futures_can_move_to_other_threads() {
    fn sent<T: Send + Sync>() {}
    fn future<F: Future + Send>(_: F) {}
    sent::<Device>();
    sent::<Gpu>();
    sent::<Tensor>();
    sent::<Attention>();
    sent::<Attended>();
    sent::<Inspected>();
    sent::<MultiHeadAttention>();
    sent::<MultiHeadOutput>();
    sent::<KvCache>();
    sent::<StateDict>();
    sent::<EncodeSlices>();
    sent::<wgpu_attention::Error>();
    let device = Device::Cpu;
    let x = Tensor::from_slice(&device, &[1, 1, 2, 4], &[0.5f32; 8]).unwrap();
    let attention = Attention::new();
    let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(4, 1).unwrap(), 1).unwrap();
    let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 1, 8, 4)).unwrap();
    future(attention.forward_async(&x, &x, &x));
    future(attention.forward_profiled_async(&x, &x, &x));
    future(attention.forward_packed_async(&x, &x, &x, &[0, 2], &[0, 2]));
    future(attention.inspect_async(&x, &x, &x, &wgpu_attention::Inspect::new().weights()));
    future(attention.warm_up_async(&x, &x, &x));
    future(layer.forward_async(&x, &x, &x, &attention));
    future(cache.step_async(&attention, &x, &x, &x));
    future(x.download_async());
    future(x.contiguous_async());
    future(wgpu_attention::project_async(&x, &x, None));
    future(wgpu_attention::softmax_async(&x, 0));
    future(wgpu_attention::merge_async(&x, &x, &x, &x));
    future(Gpu::request(&wgpu_attention::GpuOptions::default()));
}
