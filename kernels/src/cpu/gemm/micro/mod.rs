//! Register tiles: the only code here that knows the machine.

#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod amx;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::bf16;

use crate::cpu::machine::has_matrix_registers;

use super::pack::{self, Pair, Panel, Unit, Wide};
use super::{DEPTH, Element};

/// Sums of one tile: `out[i, j] (+)= sum over units of left[unit, i] * right[unit, j]`, of panels, in registers.
///
/// Arguments: units; both panels, and what a later tile reads, of which a line of the cache per [`AHEAD`] units is asked
/// for, and which may be nobody's; the first result and the stride of rows, in elements; rows and columns that the result
/// has, at most those of the tile; whether sums are added to what is there.
pub(in crate::cpu) type Tile = unsafe fn(usize, [*const u32; 3], *mut f32, usize, (usize, usize), bool);

/// Units in which a tile asks for a line of the cache.
pub(super) const AHEAD: usize = 8;
/// Units of a panel in a line of the cache.
pub(super) const LINE: usize = 16;

/// Packs a panel into so many units as it has lanes times units along `k`.
pub(in crate::cpu) type Pack<T> = unsafe fn(Panel<T>, *mut u32);

/// A register tile for operands of `T`.
pub(in crate::cpu) struct Micro<T> {
    /// Rows and columns: lanes of a panel of the left and of the right operand.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements along `k` in a unit.
    pub(super) depth: usize,
    /// Most units along `k` in a block; at most [`DEPTH`].
    pub(super) block: usize,
    pub(super) tile: Tile,
    /// Of the left and of the right operand.
    pub(super) pack: [Pack<T>; 2],
}

/// A tile of `ROWS` and `COLUMNS` with its panels of units `U`.
fn micro<T: Element, U: Unit<T>, const ROWS: usize, const COLUMNS: usize>(tile: Tile) -> Micro<T> {
    let pack: [Pack<T>; 2] = [pack::panel::<T, U, ROWS>, pack::panel::<T, U, COLUMNS>];
    Micro { rows: ROWS, columns: COLUMNS, depth: U::DEPTH, block: DEPTH, tile, pack }
}

/// Tiles of f32, into which operands are widened when they are packed.
pub(super) fn wide<T: Element>() -> Vec<Micro<T>> {
    let mut tiles = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            tiles.push(micro::<T, Wide, { x86::ROWS }, { x86::COLUMNS }>(x86::avx512));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            tiles.push(micro::<T, Wide, { x86::AVX2_ROWS }, { x86::AVX2_COLUMNS }>(x86::avx2));
        }
    }
    tiles.push(micro::<T, Wide, { portable::ROWS }, { portable::COLUMNS }>(portable::tile));
    tiles
}

/// Tiles of pairs of bf16 in registers of their own, several times as fast as all others.
pub(super) fn matrices() -> Vec<Micro<bf16>> {
    let mut tiles = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if has_matrix_registers() {
        let Micro { pack, .. } = micro::<bf16, Pair, { amx::ROWS }, { amx::COLUMNS }>(amx::tile);
        let (rows, columns) = (amx::ROWS, amx::COLUMNS);
        let pack = [amx::rows as Pack<bf16>, pack[1]];
        tiles.push(Micro { rows, columns, depth: Pair::DEPTH, block: amx::BLOCK, tile: amx::tile, pack });
    }
    tiles
}

/// Tiles of pairs of bf16.
pub(super) fn pairs() -> Vec<Micro<bf16>> {
    let mut tiles = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
        tiles.push(micro::<bf16, Pair, { x86::ROWS }, { x86::COLUMNS }>(x86::avx512_bf16));
    }
    tiles
}
