//! The rewrites of dsgc, one file each.
//!
//! A pass maps a whole [`dsgc_ir::Program`]: it reads the old one and builds a new one. [`PIPELINE`] says in which
//! order they run; read it first.

pub mod autodiff;
pub mod canonicalize;
pub mod decode;
pub mod fuse;
pub mod infer;
mod pipeline;
pub mod plan_memory;
mod rebuild;

pub use pipeline::{Fact, Numerics, PIPELINE, Pass, PassContext, compile, run_passes};
