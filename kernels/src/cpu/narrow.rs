//! Narrow floats: widening, rounding, and kernels of f32 on narrow operands.
//!
//! Numbers of two bytes are computed in f32 and rounded once per op, to the even one of two that are next. Rounding and
//! widening are bound by memory, or hidden in the first-level cache where a kernel works block by block.

use dsgc_ir::infer::{infer, product_type};
use dsgc_ir::{Bindings, Buffer, Class, DType, Op, Region, Type, Value};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::elementwise::{Row, map1};
use super::memory::{ALIGNMENT, Ptr};
use super::{Launch, kept};

/// The number of 16 bits next to `x`. NaN stays one, and becomes quiet. Without branches.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let bits = if x.is_nan() { bits | 0x0040_0000 } else { rounded };
    (bits >> 16) as u16
}

/// The number that 16 bits stand for.
#[inline(always)]
pub(super) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Writes `n` narrow numbers as f32.
///
/// # Safety
/// Both places hold `n` elements and are apart.
pub(super) unsafe fn widen(dtype: DType, from: *const u8, to: *mut f32, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::Bf16 => map1(from.cast::<u16>(), to, n, from_bf16),
            DType::F16 => {
                let to = std::slice::from_raw_parts_mut(to, n);
                std::slice::from_raw_parts(from.cast::<f16>(), n).convert_to_f32_slice(to);
            }
            DType::F32 | DType::Quantized(_) | DType::I32 | DType::Bool | DType::Key => {
                panic!("bug: {dtype} is no narrow float")
            }
        }
    }
}

/// Rounds `n` numbers.
///
/// # Safety
/// As for [`widen`].
pub(super) unsafe fn round(dtype: DType, from: *const f32, to: *mut u8, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::Bf16 => map1(from, to.cast::<u16>(), n, to_bf16),
            DType::F16 => {
                let to = std::slice::from_raw_parts_mut(to.cast::<f16>(), n);
                to.convert_from_f32_slice(std::slice::from_raw_parts(from, n));
            }
            DType::F32 | DType::Quantized(_) | DType::I32 | DType::Bool | DType::Key => {
                panic!("bug: {dtype} is no narrow float")
            }
        }
    }
}

/// Elements that a kernel of rows takes at a time: its operands and result stay in the first-level cache.
const BLOCK: usize = 256;

/// A kernel of f32 as one of elements of these types. Operands that are no narrow floats go to it as they are.
pub(super) fn through(kernel: Row, operands: &[DType], result: DType) -> Row {
    let operands = operands.to_vec();
    Box::new(move |x, out, n| {
        let mut wide = [[0f32; BLOCK]; 3];
        let mut wide_out = [0f32; BLOCK];
        for from in (0..n).step_by(BLOCK) {
            let n = BLOCK.min(n - from);
            let mut args = [std::ptr::null(); 3];
            for (i, (&dtype, &x)) in operands.iter().zip(x).enumerate() {
                // SAFETY: the promise of `Row`: operands and result hold `n` elements. All operands of a block are read
                // before its results are written, and elements of one place have one size where places are shared.
                unsafe {
                    let x = x.add(from * dtype.bytes());
                    args[i] = x;
                    if dtype.is_narrow() {
                        widen(dtype, x, wide[i].as_mut_ptr(), n);
                        args[i] = wide[i].as_ptr().cast();
                    }
                }
            }
            // SAFETY: as above.
            unsafe {
                let out = out.add(from * result.bytes());
                if result.is_narrow() {
                    kernel(&args[..operands.len()], wide_out.as_mut_ptr().cast(), n);
                    round(result, wide_out.as_ptr(), out, n);
                } else {
                    kernel(&args[..operands.len()], out, n);
                }
            }
        }
    })
}

/// Whether an op on values of these types runs as its kernel of f32 on operands that are widened as a whole.
pub(super) fn is_widened(op: &Op, types: &[DType]) -> bool {
    let own = match op {
        // Their kernels do not care what elements are, or widen row by row.
        Op::Embed {} | Op::Fused { .. } | Op::ContractFused { .. } | Op::TokenLogp {} | Op::TokenLogpGrad {} => true,
        // Products of bf16 have kernels of their own, and what they take beside f32 is kept in fewer bits.
        Op::Contract { .. } | Op::ContractEach { .. } => product_type(types[0], types[1]) != Some(DType::F16),
        Op::Cast { .. } if types.iter().any(|dtype| dtype.is_quantized()) => true,
        Op::AllReduce { .. } | Op::ReduceScatter { .. } => false,
        // These have kernels of their own for bf16.
        Op::Attention { .. } | Op::AttentionGrad { .. } | Op::CachedAttention { .. } | Op::Rope { .. } => {
            types[0] == DType::Bf16
        }
        op => !matches!(op.class(), Class::Contraction | Class::Reduction | Class::Composite),
    };
    !own && types.iter().any(|dtype| dtype.is_narrow())
}

/// Bytes of workspace for an op whose kernel needs `own`: behind that, all narrow operands and results in f32.
pub(super) fn workspace(op: &Op, args: &[Type], bounds: &Bindings, own: usize) -> usize {
    let results = infer(op, args, None).unwrap_or_default();
    let types: Vec<DType> = args.iter().chain(&results).map(|ty| ty.dtype).collect();
    if !is_widened(op, &types) {
        return own;
    }
    let narrow = args.iter().chain(&results).filter(|ty| ty.dtype.is_narrow());
    let wide = narrow.map(|ty| ty.with(DType::F32).bytes(bounds).unwrap_or(usize::MAX));
    wide.fold(own, |sum, bytes| sum.next_multiple_of(ALIGNMENT).saturating_add(bytes))
}

/// Runs an op by its kernel of f32.
pub(super) fn run(l: &mut Launch, program: &dsgc_ir::Planned) -> Result<(), String> {
    let values: Vec<Value> = l.op.args.iter().copied().chain(l.op.results()).collect();
    let types: Vec<Type> = l.op.args.iter().map(|&a| l.graph.ty(a).clone()).collect();
    let mut offset = kept::workspace(&l.op.op, &types, &l.graph.upper_bounds(), l.threads.count());
    l.scratch = offset;
    let mut moved: Vec<(Value, Buffer, DType)> = Vec::new();
    for (i, &value) in values.iter().enumerate() {
        if !l.dtype(value).is_narrow() || moved.iter().any(|m| m.0 == value) {
            continue;
        }
        offset = offset.next_multiple_of(ALIGNMENT);
        let buffer = Buffer { region: Region::Scratch, offset, bytes: l.len(value) * size_of::<f32>() };
        offset += buffer.bytes;
        if i < l.op.args.len() {
            let (dtype, n) = (l.dtype(value), l.len(value));
            let (from, to): (Ptr<u8>, Ptr<f32>) = (l.memory.at(l.buffer(value)), l.memory.at(buffer));
            l.threads.run(n, 1, |r| {
                // SAFETY: both buffers hold `n` elements; ranges of threads are apart.
                unsafe { widen(dtype, from.add(2 * r.start).0, to.add(r.start).0, r.len()) };
            });
        }
        moved.push((value, buffer, DType::F32));
    }
    let narrow: Vec<(Value, DType, Buffer)> =
        l.op.results().map(|r| (r, l.dtype(r), l.buffer(r))).filter(|r| r.1.is_narrow()).collect();
    l.moved = moved;
    l.run(program)?;
    for (result, dtype, buffer) in narrow {
        let n = l.len(result);
        let (from, to): (Ptr<f32>, Ptr<u8>) = (l.memory.at(l.buffer(result)), l.memory.at(buffer));
        l.threads.run(n, 1, |r| {
            // SAFETY: as above.
            unsafe { round(dtype, from.add(r.start).0, to.add(2 * r.start).0, r.len()) };
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_library() {
        // A prime step through all patterns of bits: every exponent, both signs, infinities and NaN.
        for bits in (0..u32::MAX).step_by(9973).chain([0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FFF_FFFF, 0x3F80_8000])
        {
            let x = f32::from_bits(bits);
            assert_eq!(to_bf16(x), half::bf16::from_f32(x).to_bits(), "{bits:#x}");
        }
        for bits in 0..=u16::MAX {
            let (found, expected) = (from_bf16(bits), half::bf16::from_bits(bits).to_f32());
            assert!(found == expected || found.is_nan() && expected.is_nan(), "{bits:#x}");
        }
    }
}
