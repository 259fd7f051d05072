//! The truth: plain f64 loops, one readable function per shader. Tests and checks only.
