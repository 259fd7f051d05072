//! Seeded calls with their truth in f64 and answers of other implementations, for the library's tests and for
//! `attn check`, and corrupted files for the tests of readers.
#![forbid(unsafe_code)]

mod call;
mod case;
mod compare;
mod draw;
mod golden;
mod hostile;
mod loops;
mod probe;
mod run;
mod stored;
mod truth;

pub use call::{Call, Data, Order, bits, narrow, noise, place, upload, wide};
pub use case::{Case, Op, Rule, Size, cases};
pub use compare::{
    Rows, assert_close, assert_close_to, assert_logs_close, difference, half_ulp, largest, rounding, worst, worst_of,
};
pub use draw::{FORMS, Form, draw};
pub use golden::{SOURCES, case_folder, golden, golden_names};
pub use hostile::refused;
pub use probe::one_workgroup;
pub use run::{Expected, Got};
pub use stored::{Stored, Wide};
pub use truth::Truth;
