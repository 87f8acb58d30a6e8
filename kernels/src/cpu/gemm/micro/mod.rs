//! Register tiles: the only code here that knows the machine.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::bf16;

use super::Element;
use super::pack::{self, Panel, Wide};

/// Sums of one tile: `out[i, j] (+)= sum over units of left[unit, i] * right[unit, j]`, of panels, in registers.
///
/// Arguments: units; both panels; the first result and the stride of rows, in elements; rows and columns that the result
/// has, at most those of the tile; whether sums are added to what is there.
pub(super) type Tile = unsafe fn(usize, *const u32, *const u32, *mut f32, usize, (usize, usize), bool);

/// A register tile for operands of `T`.
pub(in crate::cpu) struct Micro<T> {
    /// What it needs of the machine.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(super) name: &'static str,
    /// Rows and columns: lanes of a panel of the left and of the right operand.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements along `k` in a unit.
    pub(super) depth: usize,
    pub(super) tile: Tile,
    pub(super) pack: unsafe fn(Panel<T>, *mut u32),
}

/// Tiles of f32, into which operands are widened when they are packed.
pub(super) fn wide<T: Element>() -> Vec<Micro<T>> {
    let micro =
        |name, (rows, columns), tile| Micro { name, rows, columns, depth: 1, tile, pack: pack::panel::<T, Wide> };
    let mut tiles = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            tiles.push(micro("avx512f", (x86::ROWS, x86::COLUMNS), x86::avx512 as Tile));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            tiles.push(micro("avx2", (x86::AVX2_ROWS, x86::AVX2_COLUMNS), x86::avx2 as Tile));
        }
    }
    tiles.push(micro("any", (portable::ROWS, portable::COLUMNS), portable::tile as Tile));
    tiles
}

/// Tiles of pairs of bf16.
pub(super) fn pairs() -> Vec<Micro<bf16>> {
    let mut tiles = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
        tiles.push(Micro {
            name: "avx512bf16",
            rows: x86::ROWS,
            columns: x86::COLUMNS,
            depth: 2,
            tile: x86::avx512_bf16 as Tile,
            pack: pack::panel::<bf16, pack::Pair>,
        });
    }
    tiles
}
