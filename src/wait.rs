//! Blocking and async calls share their futures: a blocking call runs them where it is called, an async one on a thread
//! that may block. Drivers compile pipelines and wait for results on the calling thread, for seconds.

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::cell::Cell;

    thread_local! {
        static MAY_BLOCK: Cell<bool> = const { Cell::new(false) };
    }

    /// Whether a future that is polled here may block the thread.
    pub fn may_block() -> bool {
        MAY_BLOCK.get()
    }

    /// Runs a future to its end on this thread.
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

    /// Runs a future where it may block: here, or on a thread of a pool while the caller's executor goes on.
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
