//! Without anything beyond the least of the architecture.

pub(super) const ROWS: usize = 4;
pub(super) const COLUMNS: usize = 8;

/// A tile of f32; see [`super::Tile`].
///
/// # Safety
/// The panels have so many units, and the result so many rows and columns.
pub(super) unsafe fn tile(
    units: usize,
    [left, right, _]: [*const u32; 3],
    out: *mut f32,
    stride: usize,
    (rows, columns): (usize, usize),
    add: bool,
) {
    let mut sums = [[0.0f32; COLUMNS]; ROWS];
    for unit in 0..units {
        // SAFETY: the caller's.
        let (left, right) =
            unsafe { (left.cast::<[f32; ROWS]>().add(unit).read(), right.cast::<[f32; COLUMNS]>().add(unit).read()) };
        for (sums, left) in sums.iter_mut().zip(left) {
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum += left * right;
            }
        }
    }
    for (i, sums) in sums.iter().enumerate().take(rows) {
        for (j, sum) in sums.iter().enumerate().take(columns) {
            // SAFETY: the caller's.
            unsafe {
                let to = out.add(i * stride + j);
                *to = if add { *to + sum } else { *sum };
            }
        }
    }
}
