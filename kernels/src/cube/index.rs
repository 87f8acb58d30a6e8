//! Places of elements: what kernels share that go through tensors by coordinates.
//!
//! Kernels take shapes and strides as a sequence of numbers, which are uniform values of a launch, so that one compiled
//! kernel serves every size.

use cubecl::prelude::*;
use dsgc_ir::DType;

/// The dot product of an index's coordinates with strides: `numbers[dims..dims + rank]` are the extents, of which the
/// last runs fastest, `numbers[strides..strides + rank]` the strides.
#[cube]
pub(super) fn offset(
    index: u32,
    numbers: &Sequence<u32>,
    #[comptime] dims: usize,
    #[comptime] strides: usize,
    #[comptime] rank: usize,
) -> u32 {
    let mut at = 0u32;
    if comptime!(rank == 1) {
        at = index * numbers[strides];
    } else {
        let mut rest = index;
        #[unroll]
        for i in 0..rank {
            let axis = comptime!(rank - 1 - i);
            let extent = numbers[comptime!(dims + axis)];
            at += rest % extent * numbers[comptime!(strides + axis)];
            rest /= extent;
        }
    }
    at
}

/// How elements lie in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Store {
    /// A word each: floats and whole numbers.
    Word,
    /// Two in a word, the upper halves of floats.
    Bf16,
    /// Two in a word.
    F16,
    /// Truth values: four in a word.
    Byte,
}

impl Store {
    /// That of an element type; keys, which have two words, are no elements of arithmetic.
    pub(super) fn of(dtype: DType) -> Store {
        match dtype {
            DType::F32 | DType::I32 => Store::Word,
            DType::Bf16 => Store::Bf16,
            DType::F16 => Store::F16,
            DType::Bool => Store::Byte,
            DType::Key | DType::Quantized(_) => panic!("bug: {dtype} as elements of a kernel"),
        }
    }

    /// Elements of a word.
    pub(super) fn each(self) -> u32 {
        match self {
            Store::Word => 1,
            Store::Bf16 | Store::F16 => 2,
            Store::Byte => 4,
        }
    }
}

/// The bits of an element, of which a word has so many.
#[cube]
pub(super) fn part(from: &Array<u32>, at: u32, #[comptime] each: u32) -> u32 {
    if comptime!(each == 1) {
        from[at as usize]
    } else {
        (from[(at / each) as usize] >> (at % each * comptime!(32 / each))) & comptime!(u32::MAX >> (32 - 32 / each))
    }
}

/// An element as a word: floats in single precision.
#[cube]
pub(super) fn element(from: &Array<u32>, at: u32, #[comptime] store: Store) -> u32 {
    let bits = part(from, at, comptime!(store.each()));
    match store {
        Store::Word | Store::Byte => bits,
        Store::Bf16 => bits << 16u32,
        Store::F16 => float_of_half(bits),
    }
}

/// A word as the bits of an element: floats are rounded to the nearest, of two to the even one.
#[cube]
pub(super) fn stored(word: u32, #[comptime] store: Store) -> u32 {
    match store {
        Store::Word | Store::Byte => word,
        Store::Bf16 => {
            let nan = (word & 0x7fff_ffffu32) > 0x7f80_0000u32;
            let up = 0x7fffu32 + ((word >> 16u32) & 1u32);
            select(nan, (word >> 16u32) | 0x40u32, (word + up) >> 16u32)
        }
        Store::F16 => half_of_float(word),
    }
}

/// A word as it is when it was stored.
#[cube]
pub(super) fn rounded(word: u32, #[comptime] store: Store) -> u32 {
    match store {
        Store::Word | Store::Byte => word,
        Store::Bf16 => stored(word, store) << 16u32,
        Store::F16 => float_of_half(half_of_float(word)),
    }
}

#[cube]
fn float_of_half(bits: u32) -> u32 {
    let sign = (bits & 0x8000u32) << 16u32;
    let size = bits & 0x7fffu32;
    let normal = (size << 13u32) + 0x3800_0000u32;
    let endless = (size << 13u32) | 0x7f80_0000u32;
    // Below 2^-14 it is a whole number of 2^-24.
    let small = u32::reinterpret(f32::cast_from(size) * comptime!(1.0f32 / 16_777_216.0f32));
    sign | select(size >= 0x7c00u32, endless, select(size >= 0x0400u32, normal, small))
}

#[cube]
fn half_of_float(word: u32) -> u32 {
    let sign = (word >> 16u32) & 0x8000u32;
    let size = word & 0x7fff_ffffu32;
    // From 2^-14 on the exponent loses 112, and 13 digits go; what is too large becomes infinite by itself.
    let normal = min((size - 0x3800_0000u32 + 0x0fffu32 + ((size >> 13u32) & 1u32)) >> 13u32, 0x7c00u32);
    // Below it is a whole number of 2^-24: so many digits of the mantissa go, all of them below 2^-25.
    let gone = min(126u32 - min(size >> 23u32, 112u32), 25u32);
    let mantissa = (size & 0x007f_ffffu32) | 0x0080_0000u32;
    let even = (mantissa >> gone) & 1u32;
    let small = (mantissa + (1u32 << (gone - 1u32)) - 1u32 + even) >> gone;
    let nan = 0x7e00u32 | ((size >> 13u32) & 0x03ffu32);
    let finite = select(size >= 0x3880_0000u32, normal, small);
    sign | select(size > 0x7f80_0000u32, nan, select(size >= 0x4780_0000u32, 0x7c00u32, finite))
}

/// Strides of a dense tensor, in elements.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect()
}

/// Joins neighbouring dims that are one dim for every tensor: those of `shape` and each tensor's strides in it. No dim of
/// extent 1 is left.
pub(super) fn joined(shape: &[usize], tensors: &[Vec<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let (mut extents, mut all): (Vec<usize>, Vec<Vec<usize>>) = (Vec::new(), vec![Vec::new(); tensors.len()]);
    for (d, &extent) in shape.iter().enumerate().filter(|&(_, &extent)| extent != 1) {
        let continues = |(own, tensor): (&Vec<usize>, &Vec<usize>)| own.last() == Some(&(tensor[d] * extent));
        match extents.last_mut() {
            Some(last) if all.iter().zip(tensors).all(continues) => {
                *last *= extent;
                for (own, tensor) in all.iter_mut().zip(tensors) {
                    own.pop();
                    own.push(tensor[d]);
                }
            }
            _ => {
                extents.push(extent);
                all.iter_mut().zip(tensors).for_each(|(own, tensor)| own.push(tensor[d]));
            }
        }
    }
    (extents, all)
}
