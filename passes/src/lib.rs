//! The rewrites of dsgc, one file each.
//!
//! A pass maps a whole [`dsgc_ir::Program`]: it reads the old one and builds a new one. [`PIPELINE`] says in which
//! order they run; read it first.

pub mod adapt;
pub mod autodiff;
pub mod canonicalize;
pub mod copies;
pub mod decode;
mod fit;
pub mod fuse;
pub mod infer;
pub mod join_updates;
pub mod merge;
pub mod offload;
pub mod offload_activations;
pub mod order;
pub mod partition;
mod pipeline;
pub mod plan_memory;
pub mod precision;
pub mod prefetch;
pub mod quantize;
mod rebuild;
pub mod rematerialize;
pub mod reshard;
pub mod share_prefix;
pub mod share_rows;
pub mod simplify;
pub mod split_stages;

pub use pipeline::{
    Common, Fact, Notes, Numerics, Observer, PIPELINE, Pass, PassContext, Step, common, compile, run_passes,
};
pub use plan_memory::live_bytes;
