//! The error type. Every variant carries the rule and the values that broke it.

/// What went wrong: the rule and the values that broke it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes, strides or lengths do not fit together.
    #[error("{0}")]
    Shape(String),
    /// An option or operand breaks its rule.
    #[error("{0}")]
    Value(String),
    /// A tensor or buffer is not on the device that the call runs on.
    #[error("{what} lives on {there} but the call runs on {here}; upload it there")]
    Device {
        /// The operand.
        what: String,
        /// Its device.
        there: String,
        /// The call's device.
        here: String,
    },
    /// The output is in a buffer that the same call reads.
    #[error(
        "the output is in the same buffer as {operand} ({}); WebGPU lets no dispatch read and write one buffer, so give \
         the output a buffer of its own", if *overlaps { "the ranges overlap" } else { "the ranges do not overlap" }
    )]
    Aliased {
        /// The operand.
        operand: String,
        /// Whether the operand's range of elements, from first to last, overlaps the output's.
        overlaps: bool,
    },
    /// A size does not fit in 64-bit arithmetic.
    #[error("{what} overflows: {factors} does not fit in 64 bits")]
    Overflow {
        /// The size that was computed.
        what: String,
        /// The factors, as `a × b × c`.
        factors: String,
    },
    /// A call needs more memory than the adapter or the machine allows; reported before allocating.
    #[error("{what} needs {needed} bytes, but {limit_name} is {limit} bytes on {adapter}{}", behind(way_out))]
    TooLarge {
        /// What would have been allocated.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// The limit's name.
        limit_name: &'static str,
        /// The limit in bytes.
        limit: u64,
        /// The adapter's name.
        adapter: String,
        /// A way to get the same result in less memory; empty if none is known.
        way_out: &'static str,
    },
    /// The chosen method cannot compute the call; [`Method::Auto`](crate::Method::Auto) may be able to.
    #[error("the method {method} cannot compute this: {reason}; leave the method on auto")]
    Method {
        /// The method.
        method: String,
        /// Why it cannot.
        reason: String,
    },
    /// The adapter cannot do this.
    #[error("{what} is not supported on {adapter}: it needs {needs}")]
    Unsupported {
        /// What was requested.
        what: String,
        /// The adapter's name.
        adapter: String,
        /// What the adapter would need.
        needs: String,
    },
    /// No adapter matches the request.
    #[error("{}", no_adapter(asked.as_deref(), found))]
    NoAdapter {
        /// The requested name, if any.
        asked: Option<String>,
        /// The adapters found: index, name and backend.
        found: Vec<String>,
    },
    /// The device was lost. Create a new [`Gpu`](crate::Gpu).
    #[error("the device of {adapter} was lost ({reason}); create a new Gpu to continue")]
    DeviceLost {
        /// The adapter's name.
        adapter: String,
        /// wgpu's reason.
        reason: String,
    },
    /// The device did not finish within the timeout. Its work continues, and you can wait again.
    #[error("{adapter} is not done after {after:?}; its work continues, and you can wait again")]
    TimedOut {
        /// The adapter's name.
        adapter: String,
        /// The timeout.
        after: std::time::Duration,
    },
    /// The driver ran out of memory.
    #[error("out of memory on {adapter} during {during}: {message}")]
    OutOfMemory {
        /// The adapter's name.
        adapter: String,
        /// The kernel or allocation that failed.
        during: String,
        /// wgpu's message.
        message: String,
    },
    /// wgpu or the driver refused a call: a bug in this library or in the driver.
    #[error("wgpu error on {adapter} during {during}: {message}")]
    Gpu {
        /// The adapter's name.
        adapter: String,
        /// The kernel or call that failed.
        during: String,
        /// wgpu's message.
        message: String,
    },
    /// A file, or a tensor in it, is missing, unreadable or invalid.
    #[error("{0}")]
    File(String),
}

/// The alternative if the weights of all heads do not fit.
pub(crate) const INSTEAD_OF_WEIGHTS: &str = "Weights::Averaged is one matrix for all heads, and Attention::inspect gives \
                                             weights of chosen heads and queries, column sums and entropies without it";
/// The alternative if the mean over heads, or the matrix that it is computed from, does not fit.
pub(crate) const INSTEAD_OF_AVERAGED: &str =
    "Attention::inspect gives weights of chosen heads and queries, column sums and entropies without the whole matrix";
/// The alternative if an inspection does not fit.
pub(crate) const INSTEAD_OF_INSPECTED: &str = "Inspect::heads and Inspect::queries choose fewer";

fn no_adapter(asked: Option<&str>, found: &[String]) -> String {
    match asked {
        Some(asked) if !found.is_empty() => {
            let hint = if asked.eq_ignore_ascii_case("cpu") { "; the CPU backend is Device::Cpu" } else { "" };
            format!("no adapter answers to \"{asked}\"; there are {}{hint}", found.join(", "))
        }
        _ => "wgpu found none that can compute".into(),
    }
}

fn behind(way_out: &str) -> String {
    if way_out.is_empty() { String::new() } else { format!("; {way_out}") }
}

impl Error {
    /// The same error; [`Error::TooLarge`] with a way out.
    pub(crate) fn or_rather(mut self, text: &'static str) -> Error {
        if let Error::TooLarge { way_out, .. } = &mut self {
            *way_out = text;
        }
        self
    }
}

/// `Result` with this library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! shape_error {
    ($($arg:tt)*) => { $crate::Error::Shape(format!($($arg)*)) };
}
macro_rules! value_error {
    ($($arg:tt)*) => { $crate::Error::Value(format!($($arg)*)) };
}
pub(crate) use {shape_error, value_error};
