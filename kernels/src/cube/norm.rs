//! Layer norm and RMS norm over the last dim, and their gradients. A cube has a row; the gradients of weight and bias have
//! a cube per column, whose units add up rows in a fixed order.

use cubecl::prelude::*;

use super::reduce::{TOGETHER, With, together};
use super::{Launch, cubes};

/// Mean, which RMS norm leaves out, and `1 / sqrt(var + eps)` of a row that the units of a cube share.
#[cube]
fn moments(x: &Array<f32>, start: u32, width: u32, eps: f32, #[comptime] centred: bool) -> (f32, f32) {
    let n = f32::cast_from(width);
    let mut mean = 0.0f32;
    if comptime!(centred) {
        let mut own = 0.0f32;
        let mut i = UNIT_POS;
        while i < width {
            own += x[(start + i) as usize];
            i += TOGETHER;
        }
        mean = together(own, With::Sum) / n;
    }
    let mut own = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let apart = x[(start + i) as usize] - mean;
        own += apart * apart;
        i += TOGETHER;
    }
    let variance = together(own, With::Sum) / n;
    (mean, 1.0f32 / (variance + eps).sqrt())
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward(
    x: &Array<f32>,
    weight: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<f32>,
    rows: u32,
    width: u32,
    eps: f32,
    #[comptime] centred: bool,
) {
    // Cubes beyond the last row do it again, so that all units of a cube come to the same places.
    let start = min(CUBE_POS as u32, rows - 1u32) * width;
    let (mean, inverse) = moments(x, start, width, eps, centred);
    let mut i = UNIT_POS;
    while i < width {
        let at = (start + i) as usize;
        let scaled = (x[at] - mean) * inverse * weight[i as usize];
        if comptime!(centred) {
            out[at] = scaled + bias[i as usize];
        } else {
            out[at] = scaled;
        }
        i += TOGETHER;
    }
}

/// With `n = (x - mean) inverse` and `h = grad weight`: `dx = inverse (h - mean(h) - n mean(h n))`, where RMS norm has no
/// `mean(h)`. Mean and inverse of each row are kept.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn backward(
    x: &Array<f32>,
    weight: &Array<f32>,
    grad: &Array<f32>,
    dx: &mut Array<f32>,
    kept: &mut Array<f32>,
    rows: u32,
    width: u32,
    eps: f32,
    #[comptime] centred: bool,
) {
    let row = min(CUBE_POS as u32, rows - 1u32);
    let start = row * width;
    let n = f32::cast_from(width);
    let (mean, inverse) = moments(x, start, width, eps, centred);
    let mut sum = 0.0f32;
    let mut product = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        let at = (start + i) as usize;
        let h = grad[at] * weight[i as usize];
        sum += h;
        product += h * ((x[at] - mean) * inverse);
        i += TOGETHER;
    }
    let mut mean_h = 0.0f32;
    if comptime!(centred) {
        mean_h = together(sum, With::Sum) / n;
    }
    let mean_hn = together(product, With::Sum) / n;
    let mut i = UNIT_POS;
    while i < width {
        let at = (start + i) as usize;
        let normal = (x[at] - mean) * inverse;
        dx[at] = inverse * (grad[at] * weight[i as usize] - mean_h - normal * mean_hn);
        i += TOGETHER;
    }
    if UNIT_POS == 0u32 {
        kept[(2u32 * row) as usize] = mean;
        kept[(2u32 * row + 1u32) as usize] = inverse;
    }
}

/// `dw = sum grad n` and `db = sum grad` of a column.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn columns(
    x: &Array<f32>,
    grad: &Array<f32>,
    kept: &Array<f32>,
    dweight: &mut Array<f32>,
    dbias: &mut Array<f32>,
    rows: u32,
    width: u32,
    #[comptime] centred: bool,
) {
    let column = min(CUBE_POS as u32, width - 1u32);
    let mut weight = 0.0f32;
    let mut bias = 0.0f32;
    let mut row = UNIT_POS;
    while row < rows {
        let at = (row * width + column) as usize;
        let normal = (x[at] - kept[(2u32 * row) as usize]) * kept[(2u32 * row + 1u32) as usize];
        weight += grad[at] * normal;
        bias += grad[at];
        row += TOGETHER;
    }
    let weight = together(weight, With::Sum);
    if UNIT_POS == 0u32 {
        dweight[column as usize] = weight;
    }
    if comptime!(centred) {
        let bias = together(bias, With::Sum);
        if UNIT_POS == 0u32 {
            dbias[column as usize] = bias;
        }
    }
}

/// Bytes of workspace of a gradient for `x` of this shape.
pub(super) fn workspace(shape: &[usize]) -> usize {
    let rows: usize = shape.iter().rev().skip(1).product();
    2 * rows * 4
}

fn sizes<R: Runtime>(l: &Launch<R>) -> (usize, usize) {
    let shape = l.shape(l.op.args[0]);
    let width = shape.last().copied().unwrap_or(1);
    (shape.iter().rev().skip(1).product(), width)
}

/// Either norm.
pub(super) fn run<R: Runtime>(l: &Launch<R>, eps: f64, centred: bool) {
    let (rows, width) = sizes(l);
    if rows * width == 0 {
        return;
    }
    let bias = l.arg(if centred { 2 } else { 1 });
    let (cubes, cube) = (cubes(rows), CubeDim::new_1d(TOGETHER));
    let (rows, width, eps) = (rows as u32, width as u32, eps as f32);
    // SAFETY: rows and columns are those of the operands.
    unsafe {
        forward::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(0),
            l.arg(1),
            bias,
            l.out(0),
            rows,
            width,
            eps,
            centred,
        );
    }
}

/// The gradients of either norm.
pub(super) fn gradient<R: Runtime>(l: &Launch<R>, eps: f64, centred: bool) {
    let (rows, width) = sizes(l);
    if width == 0 {
        return;
    }
    let cube = CubeDim::new_1d(TOGETHER);
    let dbias = l.out(if centred { 2 } else { 1 });
    let (n, w, eps) = (rows as u32, width as u32, eps as f32);
    // SAFETY: rows and columns are those of the operands; the workspace has two numbers for each row.
    unsafe {
        if rows > 0 {
            backward::launch_unchecked::<R>(
                l.client,
                cubes(rows),
                cube,
                l.arg(0),
                l.arg(1),
                l.arg(2),
                l.out(0),
                l.workspace(),
                n,
                w,
                eps,
                centred,
            );
        }
        let kept = if rows > 0 { l.workspace() } else { l.arg(1) };
        columns::launch_unchecked::<R>(
            l.client,
            cubes(width),
            cube,
            l.arg(0),
            l.arg(2),
            kept,
            l.out(1),
            dbias,
            n,
            w,
            centred,
        );
    }
}
