//! One error type. Every variant carries the values that broke the rule, and the rule.

/// What went wrong, with the numbers and the rule.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes, strides or lengths that do not fit together.
    #[error("{0}")]
    Shape(String),
    /// An option whose value is outside its rule.
    #[error("{0}")]
    Value(String),
    /// A tensor or buffer of another device than the one that the call runs on.
    #[error("{what} lives on {there} but the call runs on {here}; upload it there")]
    Device {
        /// The operand.
        what: String,
        /// Its device.
        there: String,
        /// The call's device.
        here: String,
    },
    /// An output in a buffer that the same call reads.
    #[error(
        "the output is in the same buffer as {operand} ({}); WebGPU lets no dispatch read and write one buffer, so give \
         the output a buffer of its own", if *overlaps { "the ranges overlap" } else { "the ranges do not overlap" }
    )]
    Aliased {
        /// The operand.
        operand: String,
        /// Whether the range of elements from the first to the last overlaps the output's.
        overlaps: bool,
    },
    /// A size that does not fit in 64-bit arithmetic.
    #[error("{what} overflows: {factors} does not fit in 64 bits")]
    Overflow {
        /// What was being sized.
        what: String,
        /// The factors, as `a × b × c`.
        factors: String,
    },
    /// More memory than the adapter (or the machine) has, said before allocating.
    #[error("{what} needs {needed} bytes, but {limit_name} is {limit} bytes on {adapter}{}", behind(way_out))]
    TooLarge {
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        needed: u64,
        /// The limit's name.
        limit_name: &'static str,
        /// The limit in bytes.
        limit: u64,
        /// The adapter's name.
        adapter: String,
        /// What gives the same in less memory; empty where nothing is known to.
        way_out: &'static str,
    },
    /// A call that the method given cannot compute; [`Method::Auto`](crate::Method::Auto) may.
    #[error("the method {method} cannot compute this: {reason}; leave the method on auto")]
    Method {
        /// The method.
        method: String,
        /// Why not.
        reason: String,
    },
    /// Something this adapter cannot do.
    #[error("{what} is not supported on {adapter}: it needs {needs}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// The adapter's name.
        adapter: String,
        /// What it would need.
        needs: String,
    },
    /// No adapter answers to the request.
    #[error("{}", no_adapter(asked.as_deref(), found))]
    NoAdapter {
        /// The name that was asked for, if any.
        asked: Option<String>,
        /// The adapters that there are: index, name and backend.
        found: Vec<String>,
    },
    /// The device is gone; a new [`Gpu`](crate::Gpu) works again.
    #[error("the device of {adapter} was lost ({reason}); create a new Gpu to go on")]
    DeviceLost {
        /// The adapter's name.
        adapter: String,
        /// wgpu's reason.
        reason: String,
    },
    /// The device did not finish in the time given. It goes on, and waiting again is fine.
    #[error("{adapter} is not done after {after:?}; its work goes on, and waiting again is fine")]
    TimedOut {
        /// The adapter's name.
        adapter: String,
        /// The time given.
        after: std::time::Duration,
    },
    /// The driver ran out of memory.
    #[error("out of memory on {adapter} during {during}: {message}")]
    OutOfMemory {
        /// The adapter's name.
        adapter: String,
        /// The kernel or allocation at work.
        during: String,
        /// wgpu's message.
        message: String,
    },
    /// wgpu or the driver refused a call; a fault of this library or of the driver.
    #[error("wgpu error on {adapter} during {during}: {message}")]
    Gpu {
        /// The adapter's name.
        adapter: String,
        /// The kernel or call at work.
        during: String,
        /// wgpu's message.
        message: String,
    },
    /// A file that is not what it should be.
    #[error("{0}")]
    File(String),
}

/// What to ask for where the weights of all heads do not fit.
pub(crate) const INSTEAD_OF_WEIGHTS: &str = "Weights::Averaged is one matrix for all heads, and Attention::inspect gives \
                                             weights of chosen heads and queries, column sums and entropies without it";
/// And where the mean over heads, or the matrix that it is computed from, does not.
pub(crate) const INSTEAD_OF_AVERAGED: &str =
    "Attention::inspect gives weights of chosen heads and queries, column sums and entropies without the whole matrix";
/// And where an inspection does not.
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
    /// The same, with a way out where memory is what is missing.
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
