//! Collects what drivers and Vulkan's validation layers report while a case runs; wgpu logs it.

use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};

static HEARD: Mutex<Vec<Message>> = Mutex::new(Vec::new());

/// wgpu's `InstanceFlags::DEBUG` enables messages, and also records in each module, for debuggers, that its source is
/// WGSL. Validation layers older than that language id (Debian 12 has 1.3.239) reject such modules with this message.
const UNKNOWN_LANGUAGE: &str = "Invalid source language operand: 10";

pub struct Message {
    /// A Vulkan rule was broken: more than a warning.
    pub is_error: bool,
    pub text: String,
}

struct Ear {
    /// Whether to repeat messages on stderr, where the parent reads the last output of a process that ends.
    repeats: bool,
}

impl Log for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("wgpu")
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        // A leading tab continues the previous message with object handles, which differ in every run.
        if !self.enabled(record.metadata()) || text.starts_with('\t') {
            return;
        }
        // Other errors, such as EGL's if there is no display, may come from enumerating another adapter.
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

/// Starts to collect messages, and in a worker to repeat them on stderr. Call it before a device opens, because wgpu
/// requests only the messages that the logger accepts.
pub fn listen(is_worker: bool) {
    let ear: &'static Ear = if is_worker { &Ear { repeats: true } } else { &Ear { repeats: false } };
    // A process accepts only one logger.
    if log::set_logger(ear).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Takes the messages collected since the last call.
pub fn heard() -> Vec<Message> {
    std::mem::take(&mut HEARD.lock().unwrap_or_else(PoisonError::into_inner))
}
