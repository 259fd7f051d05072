//! What drivers and Vulkan's validation layers say while a case runs: wgpu logs it, and here it is heard.

use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};

static HEARD: Mutex<Vec<Message>> = Mutex::new(Vec::new());

/// Layers that are older than this language (Debian 12 has 1.3.239) take a module for a broken one that says, for
/// debuggers, that it comes of WGSL. Without that there are no messages at all: wgpu's `InstanceFlags::DEBUG` brings both.
const UNKNOWN_LANGUAGE: &str = "Invalid source language operand: 10";

pub struct Message {
    /// A rule of Vulkan was broken: more than a warning.
    pub is_error: bool,
    pub text: String,
}

struct Ear {
    /// Says it on stderr too, from where a parent reads the last words of a process that ends.
    repeats: bool,
}

impl Log for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("wgpu")
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        // What begins with a tab goes on about the last one: handles of objects, which are others in every run.
        if !self.enabled(record.metadata()) || text.starts_with('\t') {
            return;
        }
        // Other errors, such as EGL's when there is no display, may come of looking for another adapter.
        let is_error = record.level() == Level::Error
            && record.target().starts_with("wgpu_hal::vulkan")
            && !text.contains(UNKNOWN_LANGUAGE);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if self.repeats {
            eprintln!("{text}");
        }
        HEARD.lock().unwrap_or_else(PoisonError::into_inner).push(Message { is_error, text });
    }

    fn flush(&self) {}
}

/// From now on messages are heard, and repeated on stderr where this process is a worker. Call it before a device opens:
/// wgpu asks layers and drivers for what is listened to.
pub fn listen(is_worker: bool) {
    let ear: &'static Ear = if is_worker { &Ear { repeats: true } } else { &Ear { repeats: false } };
    // Only the first listener of a process is taken.
    if log::set_logger(ear).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// What was said since this was last asked.
pub fn heard() -> Vec<Message> {
    std::mem::take(&mut HEARD.lock().unwrap_or_else(PoisonError::into_inner))
}
