//! The graph of dsgc.
pub mod diag;
pub mod stage;
mod tensor;
pub use tensor::{Data, Tensor};
/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// Single precision (double in the interpreter's f64 mode).
    F32,
    /// 32-bit integers.
    I32,
    /// Truth values.
    Bool,
    /// Random keys.
    Key,
}
