//! Seeded calls with their truth in f64: what the library's tests draw from, and what `attn check` runs.
//! And hostile files for the tests of readers.

mod call;
mod case;
mod draw;
mod hostile;
mod loops;
mod probe;
mod run;

pub use call::{Call, Data, Order, assert_close, bits, narrow, noise, place, rounding, wide, worst};
pub use case::{Case, Op, Rule, Size, cases};
pub use draw::{FORMS, Form, draw};
pub use hostile::refused;
pub use probe::one_workgroup;
pub use run::{Expected, Got};
