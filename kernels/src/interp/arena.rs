//! The planned arena of the interpreter: every value in its buffer, and poison wherever nothing lives.

use dsgc_ir::{Arena, Buffer, DType, Data, Region, Tensor};
use half::{bf16, f16};

use super::Precision;
use super::real::Real;
use crate::{between, poison};

/// Memory as the plan lays it out. In f64 mode every offset and size is multiplied so that floats which became doubles
/// have the same neighbours: by the most that one grows, a weight in 4 bits. Elements of other types leave the rest of their
/// buffers unused.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    regions: [Vec<u8>; 4],
    precision: Precision,
}

impl Memory {
    /// Zeros for the states, poison for the rest.
    pub(super) fn new(arena: Arena, precision: Precision) -> Memory {
        let mut memory = Memory { regions: Default::default(), precision };
        let scale = memory.scale();
        for (region, bytes) in Region::ALL.into_iter().zip([arena.persistent, arena.values, arena.scratch, arena.host])
        {
            memory.regions[region as usize] = vec![0; bytes * scale];
        }
        memory.poison_but(&[]);
        memory
    }

    fn scale(&self) -> usize {
        match self.precision {
            Precision::F32 => 1,
            Precision::F64 => 2 * size_of::<f64>(),
        }
    }

    /// Bytes of so many elements in rows of `width`.
    fn bytes(&self, dtype: DType, n: usize, width: usize) -> usize {
        match (dtype, self.precision) {
            (dtype, Precision::F64) if dtype.is_real() => n * size_of::<f64>(),
            (DType::Quantized(quantized), Precision::F32) => n / width.max(1) * quantized.row_bytes(width),
            _ => n * dtype.bytes(),
        }
    }

    /// Poisons everything that does not outlive a graph, but for these places among values.
    pub(super) fn poison_but(&mut self, kept: &[Buffer]) {
        poison(&mut self.regions[Region::Scratch as usize]);
        let end = self.regions[Region::Values as usize].len() / self.scale();
        for gap in between(kept, end) {
            self.poison(gap);
        }
    }

    /// Poisons a buffer.
    pub(super) fn poison(&mut self, buffer: Buffer) {
        let scale = self.scale();
        let at = buffer.offset * scale..(buffer.offset + buffer.bytes) * scale;
        if let Some(bytes) = self.regions[buffer.region as usize].get_mut(at) {
            poison(bytes);
        }
    }

    /// What lies in a buffer.
    pub(super) fn read<F: Real>(&self, buffer: Buffer, dtype: DType, shape: &[usize]) -> Result<Tensor, String> {
        let n: usize = shape.iter().product();
        let width = shape.last().copied().unwrap_or(1);
        let at = self.range(buffer, self.bytes(dtype, n, width))?;
        let bytes = &self.regions[buffer.region as usize][at];
        let halves = || bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b));
        let words = || bytes.as_chunks().0.iter().copied();
        let data = match (dtype, self.precision) {
            (DType::F32, Precision::F32) => Data::F32(words().map(f32::from_le_bytes).collect()),
            (DType::Bf16, Precision::F32) => Data::F32(halves().map(|b| bf16::from_bits(b).to_f32()).collect()),
            (DType::F16, Precision::F32) => Data::F32(halves().map(|b| f16::from_bits(b).to_f32()).collect()),
            (DType::Quantized(quantized), Precision::F32) => {
                let mut numbers = vec![0.0; n];
                quantized.unpack(bytes, width, &mut numbers);
                Data::F32(numbers)
            }
            (DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_), Precision::F64) => {
                Data::F64(bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
            }
            (DType::I32, _) => Data::I32(words().map(i32::from_le_bytes).collect()),
            (DType::Bool, _) => {
                if let Some(byte) = bytes.iter().find(|&&b| b > 1) {
                    return Err(format!("bug in the memory plan: read poison ({byte:#04x}) as a truth value"));
                }
                Data::Bool(bytes.iter().map(|&b| b == 1).collect())
            }
            (DType::Key, _) => {
                let all: Vec<u32> = words().map(u32::from_le_bytes).collect();
                Data::Key(all.chunks_exact(2).map(|k| [k[0], k[1]]).collect())
            }
        };
        Ok(Tensor::new(shape, data))
    }

    /// Puts a tensor of a declared type into a buffer; its floats have the width of the arena.
    pub(super) fn write(&mut self, buffer: Buffer, dtype: DType, tensor: &Tensor) -> Result<(), String> {
        let bytes: Vec<u8> = match &tensor.data {
            Data::F32(v) if dtype == DType::Bf16 => flat(v, |x| bf16::from_f32(x).to_le_bytes()),
            Data::F32(v) if dtype == DType::F16 => flat(v, |x| f16::from_f32(x).to_le_bytes()),
            Data::F32(v) if let DType::Quantized(quantized) = dtype => {
                let width = tensor.shape.last().copied().unwrap_or(1);
                let mut bytes = vec![0; self.bytes(dtype, v.len(), width)];
                quantized.pack(v, width, &mut bytes);
                bytes
            }
            Data::F32(v) => flat(v, f32::to_le_bytes),
            Data::F64(v) => flat(v, f64::to_le_bytes),
            Data::I32(v) => flat(v, i32::to_le_bytes),
            Data::Bool(v) => v.iter().map(|&x| u8::from(x)).collect(),
            Data::Key(v) => v.iter().flatten().flat_map(|x| x.to_le_bytes()).collect(),
        };
        let at = self.range(buffer, bytes.len())?;
        self.regions[buffer.region as usize][at].copy_from_slice(&bytes);
        Ok(())
    }

    /// The first `bytes` of a buffer in its region.
    fn range(&self, buffer: Buffer, bytes: usize) -> Result<std::ops::Range<usize>, String> {
        let start = buffer.offset * self.scale();
        let fits = bytes <= buffer.bytes * self.scale() && start + bytes <= self.regions[buffer.region as usize].len();
        if fits { Ok(start..start + bytes) } else { Err(format!("{bytes} bytes do not fit {buffer:?}")) }
    }
}

fn flat<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().map(|&x| bytes(x)).collect::<Vec<_>>().into_flattened()
}

/// Whether two buffers have bytes in common.
pub(super) fn overlap(a: Buffer, b: Buffer) -> bool {
    a.region == b.region && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes
}
