//! Places of elements: what kernels share that go through tensors by coordinates.
//!
//! Kernels take shapes and strides as a sequence of numbers, which are uniform values of a launch, so that one compiled
//! kernel serves every size.

use cubecl::prelude::*;

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

/// An element as a word: four bytes, or one of truth values.
#[cube]
pub(super) fn element(from: &Array<u32>, at: u32, #[comptime] bytes: bool) -> u32 {
    if comptime!(bytes) { (from[(at / 4u32) as usize] >> (at % 4u32 * 8u32)) & 255u32 } else { from[at as usize] }
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
