//! Tests of the public API, on every adapter of this machine and on the CPU backend. They are one program, so that
//! tests share the cores and everything is linked once.

mod attention;
mod backward;
mod cache;
mod cache_rules;
mod distance;
mod encode;
mod executor;
mod export;
mod gradcheck;
mod guide;
mod half;
mod inspect;
mod kit;
mod limits;
mod long;
mod long_rows;
mod multi_head;
mod names;
mod packages;
mod packed;
mod plans;
mod position;
mod profile;
mod project;
mod public_api;
mod reliability;
mod rooms;
mod rotary;
mod shaders;
mod shapes;
mod sink;
mod stored_gradients;
mod tune;
