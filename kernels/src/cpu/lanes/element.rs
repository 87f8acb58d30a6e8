//! Numbers in memory: f32 or bf16; in registers all are f32.

use half::bf16;

use super::super::narrow::{from_bf16, to_bf16};
use super::{LANES, Lanes};

/// What numbers are in memory: f32 or bf16.
///
/// # Safety
/// Of all functions: the machine has the registers, and addresses hold as many numbers as are read or written.
pub(in crate::cpu) trait Element: Copy + Send + Sync + 'static {
    /// Zero.
    const ZERO: Self;
    /// The numbers at an address.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
    /// Puts the nearest numbers to an address.
    unsafe fn store<L: Lanes>(lanes: L, to: *mut Self);

    /// The first `n` numbers at an address, and zeros; all if there are more than lanes.
    #[inline(always)]
    unsafe fn load_some<L: Lanes>(from: *const Self, n: usize) -> L {
        // SAFETY: the caller's.
        unsafe {
            if n >= LANES {
                return Self::load(from);
            }
            let mut numbers = [Self::ZERO; LANES];
            std::ptr::copy_nonoverlapping(from, numbers.as_mut_ptr(), n);
            Self::load(numbers.as_ptr())
        }
    }

    /// Puts the first `n` numbers to an address; all if there are more than lanes.
    #[inline(always)]
    unsafe fn store_some<L: Lanes>(lanes: L, to: *mut Self, n: usize) {
        // SAFETY: as above.
        unsafe {
            if n >= LANES {
                return Self::store(lanes, to);
            }
            let mut numbers = [Self::ZERO; LANES];
            Self::store(lanes, numbers.as_mut_ptr());
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), to, n);
        }
    }
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { lanes.store(to) }
    }
}

impl Element for bf16 {
    const ZERO: bf16 = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const bf16) -> L {
        // SAFETY: the caller's.
        unsafe {
            let numbers = from.cast::<[u16; LANES]>().read_unaligned().map(from_bf16);
            L::load(numbers.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut bf16) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(lanes.to_array().map(to_bf16)) }
    }
}

/// Calls a function for the element type of a launch's first operand. What is neither f32 nor bf16 is f32 here, as it
/// runs on widened copies.
macro_rules! by_element {
    ($l:expr, $f:ident($($arg:expr),*)) => {
        match $l.dtype($l.op.args[0]) {
            dsgc_ir::DType::Bf16 => $f::<half::bf16>($($arg),*),
            _ => $f::<f32>($($arg),*),
        }
    };
}
pub(in crate::cpu) use by_element;

#[cfg(test)]
mod tests {
    use super::super::{Kernel, every};
    use super::*;

    /// Numbers through bf16, of which the first eleven come back.
    struct Through([f32; LANES]);

    impl Kernel for Through {
        type Output = [f32; LANES];
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> [f32; LANES] {
            let mut narrow = [bf16::ONE; LANES];
            // SAFETY: there are as many numbers as lanes.
            unsafe {
                bf16::store(L::load(self.0.as_ptr()), narrow.as_mut_ptr());
                let some: L = bf16::load_some(narrow.as_ptr(), 11);
                bf16::store_some(some, narrow.as_mut_ptr(), 12);
                bf16::load::<L>(narrow.as_ptr()).to_array()
            }
        }
    }

    #[test]
    fn every_kind_of_registers_rounds_alike() {
        let numbers: [f32; LANES] = std::array::from_fn(|j| (j as f32 - 5.3) / 7.0);
        let near = |j: usize| if j == 11 { 0.0 } else { bf16::from_f32(numbers[j]).to_f32() };
        let expected: [f32; LANES] = std::array::from_fn(near);
        assert!(every(|| Through(numbers)).iter().all(|found| *found == expected));
    }
}
