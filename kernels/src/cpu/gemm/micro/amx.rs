//! Tiles of pairs of bf16 in AMX's registers: sixteen rows of sixteen pairs by sixteen columns in one instruction.

use std::arch::asm;

use half::bf16;

use super::super::pack::{Panel, Unit};
use super::pack::{self, Pair};

/// Two registers of rows by two of columns hold sums; four are left for operands.
pub(super) const ROWS: usize = 32;
pub(super) const COLUMNS: usize = 32;

/// Rows, and units along `k`, of a register.
const SIDE: usize = 16;

/// Units along `k` in a block: both panels, of which one is read from the second-level cache, with room in the first.
pub(super) const BLOCK: usize = 128;

/// What the eight registers are: rows of 64 bytes, sixteen of them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = Shapes {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Packs a panel of the left operand: of sixteen units, all of a lane side by side.
///
/// # Safety
/// As for [`pack::panel`].
pub(super) unsafe fn rows(panel: Panel<bf16>, to: *mut u32) {
    let units = panel.k.div_ceil(Pair::DEPTH);
    for first in (0..units).step_by(SIDE) {
        let count = SIDE.min(units - first);
        // SAFETY: the caller's; what is read of the panel are its units from `first` on.
        unsafe {
            let to = to.add(first * ROWS);
            let from = Panel { at: panel.at.add(first * Pair::DEPTH * panel.next), ..panel };
            let k = panel.k - first * Pair::DEPTH;
            if panel.next == 1 && k >= count * Pair::DEPTH && count == SIDE {
                for lane in 0..ROWS {
                    let to = &mut *to.add(lane * SIDE).cast::<[u32; SIDE]>();
                    *to = if lane < panel.lanes {
                        from.at.add(lane * panel.lane).cast::<[u32; SIDE]>().read_unaligned().map(u32::from_le)
                    } else {
                        [0; SIDE]
                    };
                }
                continue;
            }
            let mut across = [0u32; SIDE * ROWS];
            pack::panel::<bf16, Pair, ROWS>(Panel { k: k.min(count * Pair::DEPTH), ..from }, across.as_mut_ptr());
            for lane in 0..ROWS {
                for unit in 0..count {
                    *to.add(lane * count + unit) = across[unit * ROWS + lane];
                }
            }
        }
    }
}

/// A tile; see [`super::Tile`]. Sums go on from what is there where they are added to it.
///
/// # Safety
/// The machine has the registers and lets them be used ([`has_matrix_registers`](crate::cpu::machine::has_matrix_registers)); the panels have so many units, that of the left operand by [`rows`], and the result so many rows and
/// columns.
pub(super) unsafe fn tile(
    units: usize,
    [left, right, _]: [*const u32; 3],
    out: *mut f32,
    stride: usize,
    size: (usize, usize),
    add: bool,
) {
    if size == (ROWS, COLUMNS) {
        // SAFETY: the caller's.
        return unsafe { whole(units, left, right, out, stride, add) };
    }
    let mut sums = [0.0f32; ROWS * COLUMNS];
    // SAFETY: the caller's, but for the result: rows and columns that it has not are here only.
    unsafe {
        if add {
            for row in 0..size.0 {
                sums.as_mut_ptr().add(row * COLUMNS).copy_from_nonoverlapping(out.add(row * stride), size.1);
            }
        }
        whole(units, left, right, sums.as_mut_ptr(), COLUMNS, add);
        for row in 0..size.0 {
            out.add(row * stride).copy_from_nonoverlapping(sums.as_ptr().add(row * COLUMNS), size.1);
        }
    }
}

/// A tile of which the result has all.
///
/// # Safety
/// As for [`tile`].
unsafe fn whole(units: usize, left: *const u32, right: *const u32, out: *mut f32, stride: usize, add: bool) {
    let (blocks, rest) = (units / SIDE, units % SIDE);
    let lower = out.wrapping_add(SIDE * stride);
    // SAFETY: the caller's. Registers of tiles are nobody's but this function's, which ends with all of them free.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, preserves_flags));
        if add {
            asm!(
                "tileloadd tmm0, [{out} + {stride}]",
                "tileloadd tmm1, [{out} + {stride} + 64]",
                "tileloadd tmm2, [{lower} + {stride}]",
                "tileloadd tmm3, [{lower} + {stride} + 64]",
                out = in(reg) out, lower = in(reg) lower, stride = in(reg) stride * 4,
                options(nostack, preserves_flags, readonly)
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        }
        for block in 0..blocks {
            multiply(left.add(block * SIDE * ROWS), right.add(block * SIDE * COLUMNS));
        }
        if rest > 0 {
            // What is missing of a register is zeros.
            let (mut a, mut b) = ([0u32; SIDE * ROWS], [0u32; SIDE * COLUMNS]);
            let (left, right) = (left.add(blocks * SIDE * ROWS), right.add(blocks * SIDE * COLUMNS));
            for lane in 0..ROWS {
                a.as_mut_ptr().add(lane * SIDE).copy_from_nonoverlapping(left.add(lane * rest), rest);
            }
            b.as_mut_ptr().copy_from_nonoverlapping(right, rest * COLUMNS);
            multiply(a.as_ptr(), b.as_ptr());
        }
        asm!(
            "tilestored [{out} + {stride}], tmm0",
            "tilestored [{out} + {stride} + 64], tmm1",
            "tilestored [{lower} + {stride}], tmm2",
            "tilestored [{lower} + {stride} + 64], tmm3",
            "tilerelease",
            out = in(reg) out, lower = in(reg) lower, stride = in(reg) stride * 4,
            options(nostack, preserves_flags)
        );
    }
}

/// Adds the products of sixteen units to all sums.
///
/// # Safety
/// The registers have their shapes; there are so many units of both panels.
#[inline(always)]
unsafe fn multiply(left: *const u32, right: *const u32) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tileloadd tmm6, [{right} + {columns}]",
            "tileloadd tmm4, [{left} + {rows}]",
            "tileloadd tmm7, [{right} + {columns} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{left} + {rows} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            left = in(reg) left, right = in(reg) right,
            rows = in(reg) SIDE * 4, columns = in(reg) COLUMNS * 4,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// Operations of [`window`], per round.
pub(in crate::cpu) const WORK: usize = 4 * SIDE * SIDE * SIDE * 2 * 2;

/// Products that never leave the registers, for the limit of the machine.
///
/// # Safety
/// As for [`tile`].
pub(in crate::cpu) unsafe fn window(rounds: usize) {
    // SAFETY: the caller's; registers of tiles begin as zeros, and are free at the end.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, preserves_flags));
        for _ in 0..rounds {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nomem, nostack, preserves_flags)
            );
        }
        asm!("tilerelease", options(nostack, preserves_flags));
    }
}
