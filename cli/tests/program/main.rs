//! The built program, run as a user runs it: on every adapter of this machine and on the CPU backend.

mod bench;
mod browser;
mod check;
mod hostile;
mod imports;
mod inputs;
mod kit;
mod main_job;
mod plot;
mod report;
mod suite;
mod tensors;
mod tune;
