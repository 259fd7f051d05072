//! Errors that end the program.

/// An error with its exit status: 2 for wrong usage, 3 if there is no adapter, 1 for everything else.
#[derive(Debug)]
pub enum Error {
    /// The command line is wrong.
    Usage(String),
    /// The work failed.
    Failed(String),
    /// No adapter answers.
    NoAdapter(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn exit_status(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Failed(_) => 1,
            Error::NoAdapter(_) => 3,
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Error::Usage(message) | Error::Failed(message) | Error::NoAdapter(message)) = self;
        f.write_str(message)
    }
}

impl From<wgpu_attention::Error> for Error {
    fn from(error: wgpu_attention::Error) -> Error {
        match error {
            wgpu_attention::Error::NoAdapter { .. } => Error::NoAdapter(error.to_string()),
            _ => Error::Failed(error.to_string()),
        }
    }
}

/// Returns a formatted [`Error::Failed`].
macro_rules! fail {
    ($($arg:tt)*) => { return Err($crate::error::Error::Failed(format!($($arg)*)).into()) };
}
/// Returns a formatted [`Error::Usage`].
macro_rules! usage {
    ($($arg:tt)*) => { return Err($crate::error::Error::Usage(format!($($arg)*))) };
}
pub(crate) use {fail, usage};
