//! Blocking and async calls share their futures. A blocking call runs them on the calling thread, an async one on a
//! thread that may block, because drivers compile pipelines and wait for results on the calling thread, for seconds.

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::cell::Cell;

    thread_local! {
        static MAY_BLOCK: Cell<bool> = const { Cell::new(false) };
    }

    /// Whether a future polled on this thread may block it.
    pub fn may_block() -> bool {
        MAY_BLOCK.get()
    }

    /// Runs a future to completion on this thread.
    pub fn wait_for<F: Future>(future: F) -> F::Output {
        struct Restore(bool);
        impl Drop for Restore {
            fn drop(&mut self) {
                MAY_BLOCK.set(self.0);
            }
        }
        let _restore = Restore(MAY_BLOCK.replace(true));
        pollster::block_on(future)
    }

    /// Runs a future where it may block: on this thread, or on a pool thread while the caller's executor continues.
    pub async fn apart<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> T {
        match may_block() {
            true => future.await,
            false => blocking::unblock(move || wait_for(future)).await,
        }
    }
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use native::{apart, may_block, wait_for};

/// A browser never blocks.
#[cfg(target_arch = "wasm32")]
pub(crate) async fn apart<T>(future: impl Future<Output = T>) -> T {
    future.await
}
