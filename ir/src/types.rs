//! Types of values.

use std::fmt;

use crate::dim::{Bindings, Dim, Symbol};
use crate::quantized::Quantized;

/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "&str", try_from = "String")]
pub enum DType {
    /// Single precision; double in the interpreter's f64 mode.
    F32,
    /// The upper half of single precision: its range, with 8 bits of precision. A narrow float.
    Bf16,
    /// IEEE's half precision: 11 bits of precision up to 65504. A narrow float.
    F16,
    /// Whole numbers of few bits, with scales. Weights are kept in them: they are numbers of a product, and nothing else.
    Quantized(Quantized),
    /// 32-bit integers.
    I32,
    /// Truth values, a byte each.
    Bool,
    /// Random keys, two 32-bit words each.
    Key,
}

impl DType {
    /// All of them.
    pub const ALL: [DType; 12] = [
        DType::F32,
        DType::Bf16,
        DType::F16,
        DType::I32,
        DType::Bool,
        DType::Key,
        DType::Quantized(Quantized::ALL[0]),
        DType::Quantized(Quantized::ALL[1]),
        DType::Quantized(Quantized::ALL[2]),
        DType::Quantized(Quantized::ALL[3]),
        DType::Quantized(Quantized::ALL[4]),
        DType::Quantized(Quantized::ALL[5]),
    ];

    /// What weights are kept in, by a name of [`DType::OF_WEIGHTS`]; quantised ones have a scale for each `group`, which is
    /// 32, 64 or 128.
    pub fn of_weights(name: &str, group: usize) -> Option<DType> {
        match name {
            "f32" => Some(DType::F32),
            "bf16" => Some(DType::Bf16),
            "f16" => Some(DType::F16),
            "int8" => Quantized::new(8, group).map(DType::Quantized),
            "int4" => Quantized::new(4, group).map(DType::Quantized),
            _ => None,
        }
    }

    /// What weights can be kept in.
    pub const OF_WEIGHTS: [&'static str; 5] = ["f32", "bf16", "f16", "int8", "int4"];

    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::Quantized(quantized) => quantized.name(),
            DType::I32 => "i32",
            DType::Bool => "bool",
            DType::Key => "key",
        }
    }

    /// Bytes of one element in memory; for quantised ones a byte, and [`Type::bytes`] knows how much they take together.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Bool | DType::Quantized(_) => 1,
            DType::Key => 8,
        }
    }

    /// Whether gradients can flow through values of this type.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::Bf16 | DType::F16)
    }

    /// Whether this is a float of two bytes.
    pub fn is_narrow(self) -> bool {
        matches!(self, DType::Bf16 | DType::F16)
    }

    /// Whether elements are whole numbers with scales.
    pub fn is_quantized(self) -> bool {
        matches!(self, DType::Quantized(_))
    }

    /// Whether elements are floats, or stand for such.
    pub fn is_real(self) -> bool {
        self.is_float() || self.is_quantized()
    }

    /// The number of this type next to `x`, of two the even one, beyond the largest infinity; `x` if this is no narrow float.
    pub fn round(self, x: f32) -> f32 {
        match self {
            DType::Bf16 => half::bf16::from_f32(x).to_f32(),
            DType::F16 => half::f16::from_f32(x).to_f32(),
            DType::F32 | DType::Quantized(_) | DType::I32 | DType::Bool | DType::Key => x,
        }
    }
}

impl From<DType> for &'static str {
    fn from(dtype: DType) -> &'static str {
        dtype.name()
    }
}

impl TryFrom<String> for DType {
    type Error = String;
    fn try_from(name: String) -> Result<DType, String> {
        DType::ALL.into_iter().find(|d| d.name() == name).ok_or_else(|| format!("`{name}` is no element type"))
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The type of a value: `f32[B, T, 768]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; empty for a scalar.
    pub dims: Vec<Dim>,
}

impl Type {
    /// A type from its parts.
    pub fn new(dtype: DType, dims: impl Into<Vec<Dim>>) -> Type {
        Type { dtype, dims: dims.into() }
    }

    /// A scalar.
    pub fn scalar(dtype: DType) -> Type {
        Type { dtype, dims: vec![] }
    }

    /// The same dims with another element type.
    pub fn with(&self, dtype: DType) -> Type {
        Type { dtype, dims: self.dims.clone() }
    }

    /// Number of dims.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Number of elements.
    pub fn len(&self) -> Dim {
        Dim::product(&self.dims)
    }

    /// Whether the type is a scalar's.
    pub fn is_scalar(&self) -> bool {
        self.dims.is_empty()
    }

    /// The extents under bindings; an unbound symbol otherwise.
    pub fn shape(&self, bindings: &Bindings) -> Result<Vec<usize>, Symbol> {
        self.dims.iter().map(|d| d.eval(bindings).map(|n| n.max(0) as usize)).collect()
    }

    /// Bytes in memory under bindings, `usize::MAX` where they cannot be counted; an unbound symbol otherwise.
    pub fn bytes(&self, bindings: &Bindings) -> Result<usize, Symbol> {
        let (mut elements, mut is_empty, mut width) = (1usize, false, None);
        for dim in &self.dims {
            let extent = dim.eval(bindings)?.max(0) as usize;
            is_empty |= extent == 0;
            // Rows of the last dim are counted apart: quantised ones have scales.
            elements = elements.saturating_mul(width.replace(extent).unwrap_or(1));
        }
        // A dim of 0 makes everything nothing, however large the others are.
        if is_empty {
            return Ok(0);
        }
        let row = match (self.dtype, width) {
            (DType::Quantized(quantized), Some(width)) => quantized.row_bytes(width),
            (dtype, width) => dtype.bytes().saturating_mul(width.unwrap_or(1)),
        };
        Ok(elements.saturating_mul(row))
    }
}

/// Dims as they are printed: `[B, T, 768]`.
pub struct DimList<'a>(pub &'a [Dim]);

impl fmt::Display for DimList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(Dim::to_string).collect();
        write!(f, "[{}]", all.join(", "))
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, DimList(&self.dims))
    }
}
