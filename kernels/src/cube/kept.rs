//! Weights in few bits ([`dsgc_ir::Quantized`]): products read them as they lie, and casts make them and read them.

use cubecl::prelude::*;
use dsgc_ir::DType;

use super::index::{Store, element, rounded, stored};
use super::region::Operand;
use super::{Launch, math, numbers};

/// How an operand is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kept {
    /// As floats.
    Floats(Store),
    /// As whole numbers of so many bits with a scale for a group ([`dsgc_ir::Quantized`]). What they stand for is rounded.
    /// From a number of the launch on stand the elements of a row, its words, and those of its scales.
    Quantized { bits: u32, group: u32, sizes: usize, rounded: Store },
}

/// An element of an operand as a float's word.
#[cube]
pub(super) fn factor(from: &Array<u32>, numbers: &Sequence<u32>, at: u32, #[comptime] kept: Kept) -> u32 {
    match kept {
        Kept::Floats(store) => element(from, at, store),
        Kept::Quantized { bits, group, sizes, rounded: store } => {
            let width = numbers[sizes];
            let (start, i) = (at / width * numbers[comptime!(sizes + 1)], at % width);
            let scale = f32::reinterpret(from[(start + i / group) as usize]);
            let elements = start + numbers[comptime!(sizes + 2)];
            let whole = if comptime!(bits == 8) {
                let byte = (from[(elements + i / 4u32) as usize] >> (i % 4u32 * 8u32)) & 255u32;
                i32::cast_from(byte ^ 128u32) - 128i32
            } else {
                // Byte `i` of every 16 has the elements `i` and `i + 16` of 32.
                let byte = i / 32u32 * 16u32 + i % 16u32;
                let four = i % 32u32 / 16u32 * 4u32;
                let bits = from[(elements + byte / 4u32) as usize] >> (byte % 4u32 * 8u32 + four);
                i32::cast_from(bits & 15u32) - 8i32
            };
            rounded(u32::reinterpret(f32::cast_from(whole) * scale), store)
        }
    }
}

impl Kept {
    /// An operand of this shape in a product that computes in a type; its sizes are appended to the launch's numbers.
    pub(super) fn of(dtype: DType, shape: &[usize], computed: DType, numbers: &mut Vec<usize>) -> Kept {
        let DType::Quantized(quantized) = dtype else { return Kept::Floats(Store::of(dtype)) };
        let (sizes, width) = (numbers.len(), shape.last().copied().unwrap_or(1));
        numbers.extend([width, quantized.row_bytes(width) / 4, quantized.scale_bytes(width) / 4]);
        let (bits, group) = (quantized.bits() as u32, quantized.group() as u32);
        Kept::Quantized { bits, group, sizes, rounded: Store::of(computed) }
    }
}

/// Elements as floats; a unit makes a word.
#[cube(launch_unchecked)]
fn widen(
    from: &Array<u32>,
    to: &mut Array<u32>,
    numbers: &Sequence<u32>,
    len: u32,
    #[comptime] kept: Kept,
    #[comptime] store: Store,
) {
    let each = comptime!(store.each());
    let first = ABSOLUTE_POS as u32 * each;
    if first < len {
        let mut word = 0u32;
        #[unroll]
        for j in 0..each {
            if first + j < len {
                let bits = stored(factor(from, numbers, first + j, kept), store);
                word |= bits << comptime!(j * (32 / store.each()) % 32);
            }
        }
        to[(first / each) as usize] = word;
    }
}

/// The element `i` of a group as a whole number, of two that are next the even one; 0 behind the row's end, and of a scale
/// that is 0 or NaN.
#[cube]
fn whole(from: &Array<u32>, start: u32, i: u32, end: u32, scale: f32, most: f32, #[comptime] store: Store) -> i32 {
    let mut result = 0i32;
    if i < end && scale > 0.0f32 {
        let x = f32::reinterpret(element(from, start + i, store)) / scale;
        let down = x.floor();
        let rest = x - down;
        let odd = (down * 0.5f32).floor() * 2.0f32 != down;
        let near = select(rest > 0.5f32 || (rest == 0.5f32 && odd), down + 1.0f32, down);
        result = i32::cast_from(min(max(near, -most), most));
    }
    result
}

/// Floats as whole numbers with scales; a unit has a group. Behind the last scale of a row stand zeros.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn quantize(
    from: &Array<u32>,
    to: &mut Array<u32>,
    rows: u32,
    width: u32,
    row_words: u32,
    scale_words: u32,
    #[comptime] bits: u32,
    #[comptime] group: u32,
    #[comptime] store: Store,
) {
    let row = ABSOLUTE_POS as u32 / scale_words;
    let number = ABSOLUTE_POS as u32 % scale_words;
    let first = number * group;
    if row < rows {
        let start = row * width;
        let most = comptime!(if bits == 8 { 127.0f32 } else { 7.0f32 }).runtime();
        let end = min(width, first + group);
        let mut largest = 0.0f32;
        let mut finite = true;
        for i in first..end {
            let size = f32::reinterpret(element(from, start + i, store) & 0x7fff_ffffu32);
            finite = finite && u32::reinterpret(size) < 0x7f80_0000u32;
            largest = math::larger(largest, size);
        }
        let scale = rounded(u32::reinterpret(largest / most), Store::Bf16);
        let scale = select(finite, scale, 0x7fc0_0000u32);
        to[(row * row_words + number) as usize] = scale;
        if first < width {
            let scale = f32::reinterpret(select(finite, scale, 0u32));
            let at = row * row_words + scale_words + number * comptime!(group * bits / 32);
            for w in 0..comptime!(group * bits / 32) {
                let mut word = 0u32;
                #[unroll]
                for j in 0..4u32 {
                    if comptime!(bits == 8) {
                        let i = first + w * 4u32 + j;
                        let byte = u32::cast_from(whole(from, start, i, end, scale, most, store) + 128i32) ^ 128u32;
                        word |= byte << comptime!(8 * j);
                    } else {
                        // Byte `i` of every 16 has the elements `i` and `i + 16` of 32.
                        let byte = w * 4u32 + j;
                        let i = first + byte / 16u32 * 32u32 + byte % 16u32;
                        let low = u32::cast_from(whole(from, start, i, end, scale, most, store) + 8i32);
                        let high = u32::cast_from(whole(from, start, i + 16u32, end, scale, most, store) + 8i32);
                        word |= (low | (high << 4u32)) << comptime!(8 * j);
                    }
                }
                to[(at + w) as usize] = word;
            }
        }
    }
}

/// A cast from or to weights in few bits.
pub(super) fn cast<R: Runtime>(l: &Launch<R>) {
    let (operand, to) = (Operand::of(l, l.op.args[0]), l.dtype(l.op.result()));
    let len: usize = operand.shape.iter().product();
    if len == 0 {
        return;
    }
    match to {
        DType::Quantized(quantized) => {
            let width = operand.shape.last().copied().unwrap_or(1);
            let (rows, words) = (len / width, quantized.scale_bytes(width) / 4);
            let (cubes, cube) = l.units(rows * words);
            // SAFETY: units beyond the last row do nothing; words of a row are those of the type.
            unsafe {
                quantize::launch_unchecked::<R>(
                    l.client,
                    cubes,
                    cube,
                    l.arg(0),
                    l.out(0),
                    rows as u32,
                    width as u32,
                    (quantized.row_bytes(width) / 4) as u32,
                    words as u32,
                    quantized.bits() as u32,
                    quantized.group() as u32,
                    Store::of(operand.dtype),
                );
            }
        }
        _ => {
            let mut given = Vec::new();
            let (kept, store) = (Kept::of(operand.dtype, &operand.shape, DType::F32, &mut given), Store::of(to));
            let (cubes, cube) = l.units(len.div_ceil(store.each() as usize));
            // SAFETY: units beyond the last element do nothing.
            unsafe {
                widen::launch_unchecked::<R>(
                    l.client,
                    cubes,
                    cube,
                    l.arg(0),
                    l.out(0),
                    numbers(&given),
                    len as u32,
                    kept,
                    store,
                );
            }
        }
    }
}
