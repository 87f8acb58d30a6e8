//! Ops that move elements: copies with other strides, windows, constants.

use dsgc_ir::{Buffer, DType, Op};
use multiversion::multiversion;

use super::Launch;
use super::lanes::{prefetch, prefetch_to_write};
use super::memory::Ptr;

/// Runs an op that only moves elements.
pub(super) fn run(l: &mut Launch) -> Result<(), String> {
    let op = l.op.op.clone();
    match &op {
        Op::Const { value, dtype } => constant(l, *value, *dtype),
        Op::Size { dim, dtype } => {
            let n = l.extent(dim)?;
            constant(l, n as f64, *dtype);
        }
        Op::Iota { .. } => {
            let (n, out): (usize, Ptr<i32>) = (l.len(l.result()), l.out(0));
            // SAFETY: the result holds `n` elements, and nobody else touches them.
            unsafe { out.slice_mut(0, n) }.iter_mut().enumerate().for_each(|(i, x)| *x = i as i32);
        }
        Op::Broadcast { .. } => {
            let (from, to) = (l.shape(l.op.args[0]), l.shape(l.result()));
            let own = strides(&from);
            let lead = to.len() - from.len();
            let with = (0..to.len())
                .map(|i| if i < lead || (from[i - lead] == 1 && to[i] != 1) { 0 } else { own[i - lead] })
                .collect();
            strided(l, &to, with);
        }
        Op::Transpose { order } => {
            let own = strides(&l.shape(l.op.args[0]));
            let to = l.shape(l.result());
            strided(l, &to, order.iter().map(|&o| own[o]).collect());
        }
        Op::Slice { axis, start, end } => {
            let (first, last, own) = (l.extent(start)?, l.extent(end)?, l.shape(l.op.args[0])[*axis]);
            if first > last || last > own {
                return Err(format!("slice {start}:{end} is {first}:{last}, but the dim is {own}"));
            }
            window(l, *axis, first as isize);
        }
        Op::Pad { axis, before, after } => {
            l.extent(after)?;
            let before = l.extent(before)?;
            window(l, *axis, -(before as isize));
        }
        Op::ToHost {} | Op::FromHost {} => {
            let (from, to) = (l.buffer(l.op.args[0]), l.buffer(l.result()));
            let bytes = l.len(l.result()) * l.dtype(l.result()).bytes();
            copy(l, Buffer { bytes, ..from }, to);
        }
        Op::Concat { axis } => concat(l, *axis),
        Op::SliceAt { axis, len } => {
            let len = l.extent(len)?;
            let first = place(l, 1, len, l.shape(l.op.args[0])[*axis])?;
            window(l, *axis, first as isize);
        }
        Op::WriteAt { axis } => {
            let (own, new) = (l.shape(l.op.args[0])[*axis], l.shape(l.op.args[1])[*axis]);
            let first = place(l, 2, new, own)?;
            let (from, to) = (l.buffer(l.op.args[0]), l.buffer(l.result()));
            // A cache lies where it was: only what is new moves.
            if (from.region, from.offset) != (to.region, to.offset) {
                let bytes = l.len(l.result()) * l.dtype(l.result()).bytes();
                copy(l, Buffer { bytes, ..from }, Buffer { bytes, ..to });
            }
            overwrite(l, *axis, first);
        }
        other => panic!("bug: the CPU has no kernel for `{other}`"),
    }
    Ok(())
}

/// Strides of a dense tensor, in elements.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

fn constant(l: &mut Launch, value: f64, dtype: DType) {
    // SAFETY: a scalar's buffer holds one element.
    unsafe {
        match dtype {
            DType::F32 => *l.out::<f32>(0).0 = value as f32,
            DType::I32 => *l.out::<i32>(0).0 = value as i32,
            DType::Bf16 | DType::F16 => super::narrow::round(dtype, &(value as f32), l.out::<u8>(0).0, 1),
            DType::Bool => *l.out::<u8>(0).0 = u8::from(value != 0.0),
            DType::Key | DType::Quantized(_) => panic!("bug: a constant {dtype}"),
        }
    }
}

/// Calls a function with the element type as wide as the op's elements: moves do not care what elements are.
macro_rules! by_width {
    ($l:expr, $f:ident, $($arg:expr),*) => {
        match $l.dtype($l.op.args[0]).bytes() {
            1 => $f::<u8>($l, $($arg),*),
            2 => $f::<u16>($l, $($arg),*),
            4 => $f::<u32>($l, $($arg),*),
            _ => $f::<u64>($l, $($arg),*),
        }
    };
}

/// Copies the bytes of one buffer to another.
pub(super) fn copy(l: &mut Launch, from: Buffer, to: Buffer) {
    let bytes = from.bytes.min(to.bytes);
    let (from, to): (Ptr<u8>, Ptr<u8>) = (l.memory.at(from), l.memory.at(to));
    // SAFETY: both buffers hold `bytes`; the plan keeps values apart that are alive at once.
    l.threads.run(bytes, 1, |r| unsafe {
        to.slice_mut(r.start, r.len()).copy_from_slice(from.slice(r.start, r.len()));
    });
}

/// `out[i, j, ..] = a[i * with[0] + j * with[1] + ..]`.
fn strided(l: &mut Launch, shape: &[usize], with: Vec<usize>) {
    by_width!(l, strided_as, shape, with)
}

fn strided_as<T: Copy + Default + Send>(l: &mut Launch, shape: &[usize], with: Vec<usize>) {
    // Dims that are one dim in both places are joined.
    let mut dims: Vec<(usize, usize)> = Vec::new();
    for (&extent, stride) in shape.iter().zip(with) {
        match dims.last_mut() {
            _ if extent == 1 => {}
            Some(last) if last.1 == stride * extent => *last = (last.0 * extent, stride),
            _ => dims.push((extent, stride)),
        }
    }
    let (inner, step) = dims.pop().unwrap_or((1, 0));
    let rows: usize = dims.iter().map(|d| d.0).product();
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    if step > 1
        && let Some(along) = dims.iter().position(|d| d.1 == 1)
    {
        return turned(l, dims, along, (inner, step), (a, out));
    }
    let start_of = |row: usize| {
        let (mut rest, mut at) = (row, 0);
        for &(extent, stride) in dims.iter().rev() {
            at += rest % extent * stride;
            rest /= extent;
        }
        at
    };
    // SAFETY: offsets stay in the operand, whose dims they come from; threads write ranges of the result that are
    // apart.
    let part = |row: usize, from: usize, to: usize| unsafe {
        let (at, to_row) = (start_of(row), out.slice_mut(row * inner + from, to - from));
        match step {
            0 => to_row.fill(*a.add(at).0),
            1 => to_row.copy_from_slice(a.slice(at + from, to - from)),
            _ => to_row.iter_mut().enumerate().for_each(|(i, x)| *x = *a.add(at + (from + i) * step).0),
        }
    };
    if rows == 1 {
        l.threads.run(inner, 1, |r| part(0, r.start, r.end));
    } else {
        l.threads.run(rows, inner, |r| r.for_each(|row| part(row, 0, inner)));
    }
}

/// Rows and columns of a tile that is turned: a cache line of four-byte elements.
const TILE: usize = 16;

/// Turns a tile: elements of a row of `from` go down a column of `to`. Through a copy that lies dense, since rows that are
/// as far apart as many matrices have them share too few places of a cache.
///
/// # Safety
/// There are [`TILE`] rows of as many elements at both places, `step` and `down` elements apart.
#[allow(clippy::needless_range_loop)] // A column is no slice.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
unsafe fn turn<T: Copy + Default>(from: *const T, step: usize, to: *mut T, down: usize) {
    let mut tile = [[T::default(); TILE]; TILE];
    for (j, row) in tile.iter_mut().enumerate() {
        // The tile after the next one, in both.
        prefetch(from.wrapping_add((2 * TILE + j) * step).cast());
        prefetch_to_write(to.wrapping_add(j * down + 2 * TILE).cast());
        // SAFETY: the caller's.
        *row = unsafe { from.add(j * step).cast::<[T; TILE]>().read_unaligned() };
    }
    for i in 0..TILE {
        let mut row = [T::default(); TILE];
        for j in 0..TILE {
            row[j] = tile[j][i];
        }
        // SAFETY: the caller's.
        unsafe { to.add(i * down).cast::<[T; TILE]>().write_unaligned(row) };
    }
}

/// What [`strided`] does where the operand's elements lie one after the other along another dim of the result, `dims[along]`,
/// than the last: matrices are turned in tiles, of which every cache line is read and written once.
fn turned<T: Copy + Default + Send>(
    l: &mut Launch,
    mut dims: Vec<(usize, usize)>,
    along: usize,
    (inner, step): (usize, usize),
    (a, out): (Ptr<T>, Ptr<T>),
) {
    // Distances in the result, which is dense.
    let mut distance = inner;
    let mut places: Vec<(usize, usize, usize)> = Vec::with_capacity(dims.len());
    while let Some((extent, stride)) = dims.pop() {
        places.push((extent, stride, distance));
        distance *= extent;
    }
    let (height, _, down) = places.remove(places.len() - 1 - along);
    let strips = height.div_ceil(TILE);
    let matrices: usize = places.iter().map(|d| d.0).product();
    l.threads.run(matrices * strips, TILE * inner, |r| {
        for strip in r {
            let (mut rest, mut from, mut to) = (strip / strips, 0, 0);
            for &(extent, stride, distance) in &places {
                from += rest % extent * stride;
                to += rest % extent * distance;
                rest /= extent;
            }
            let first = strip % strips * TILE;
            let last = height.min(first + TILE);
            for column in (0..inner).step_by(TILE) {
                // SAFETY: offsets stay in the operand and the result, whose dims they come from; threads write rows of the
                // result that are apart.
                unsafe {
                    if last - first == TILE && inner - column >= TILE {
                        let (from, to) = (a.add(from + column * step + first), out.add(to + first * down + column));
                        turn(from.0.cast_const(), step, to.0, down);
                        continue;
                    }
                    for i in first..last {
                        for j in column..inner.min(column + TILE) {
                            *out.add(to + i * down + j).0 = *a.add(from + j * step + i).0;
                        }
                    }
                }
            }
        }
    });
}

/// `out[.., i, ..] = a[.., i + first, ..]` along a dim; 0 where there is no such element.
fn window(l: &mut Launch, axis: usize, first: isize) {
    by_width!(l, window_as, axis, first)
}

fn window_as<T: Copy + Default + Send>(l: &mut Launch, axis: usize, first: isize) {
    let (from, to) = (l.shape(l.op.args[0]), l.shape(l.result()));
    let inner: usize = from[axis + 1..].iter().product();
    let rows: usize = from[..axis].iter().product();
    let (own, wide) = (from[axis] as isize, to[axis] as isize);
    // Places of the result that come from the operand.
    let begin = (-first).clamp(0, wide);
    let end = (own - first).clamp(begin, wide);
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    l.threads.run(rows, to[axis] * inner, |r| {
        for row in r {
            // SAFETY: `begin..end` moved by `first` lies in the operand's dim; rows of the result are apart.
            unsafe {
                let to_row = out.slice_mut(row * to[axis] * inner, to[axis] * inner);
                let (begin, end) = (begin as usize * inner, end as usize * inner);
                to_row[..begin].fill(T::default());
                let at = row * from[axis] * inner + (begin as isize + first * inner as isize).max(0) as usize;
                to_row[begin..end].copy_from_slice(a.slice(at, end - begin));
                to_row[end..].fill(T::default());
            }
        }
    });
}

/// The place that operand `i` gives, where `len` places of `extent` begin.
pub(super) fn place(l: &mut Launch, i: usize, len: usize, extent: usize) -> Result<usize, String> {
    // SAFETY: a scalar's buffer holds one element.
    let first = unsafe { *l.arg::<i32>(i).0 };
    usize::try_from(first)
        .ok()
        .filter(|first| first + len <= extent)
        .ok_or_else(|| format!("found place {first} for {len} of {extent} places"))
}

/// `out[.., first + i, ..] = new[.., i, ..]` along a dim.
fn overwrite(l: &mut Launch, axis: usize, first: usize) {
    by_width!(l, overwrite_as, axis, first)
}

fn overwrite_as<T: Copy + Send>(l: &mut Launch, axis: usize, first: usize) {
    let (new, to) = (l.shape(l.op.args[1]), l.shape(l.result()));
    let inner: usize = to[axis + 1..].iter().product();
    let rows: usize = to[..axis].iter().product();
    let width = new[axis] * inner;
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(1), l.out(0));
    l.threads.run(rows, width, |r| {
        // SAFETY: `first` was checked; rows of the result are apart.
        r.for_each(|row| unsafe {
            let at = (row * to[axis] + first) * inner;
            out.slice_mut(at, width).copy_from_slice(a.slice(row * width, width));
        });
    });
}

fn concat(l: &mut Launch, axis: usize) {
    by_width!(l, concat_as, axis)
}

fn concat_as<T: Copy + Send>(l: &mut Launch, axis: usize) {
    let to = l.shape(l.result());
    let inner: usize = to[axis + 1..].iter().product();
    let rows: usize = to[..axis].iter().product();
    let out: Ptr<T> = l.out(0);
    let mut at = 0;
    for i in 0..l.op.args.len() {
        let width = l.shape(l.op.args[i])[axis] * inner;
        let a: Ptr<T> = l.arg(i);
        // SAFETY: operand `i` has `rows * width` elements, which go to places `at` of every row of the result.
        l.threads.run(rows, width, |r| {
            r.for_each(|row| unsafe {
                out.slice_mut(row * to[axis] * inner + at, width).copy_from_slice(a.slice(row * width, width));
            });
        });
        at += width;
    }
}
