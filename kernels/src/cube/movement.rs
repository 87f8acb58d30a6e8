//! Ops that move elements without arithmetic, and sequences and scalars that come from nowhere.

use cubecl::prelude::*;
use dsgc_ir::{DType, Op};

use super::index::{Store, part, strides};
use super::{Launch, numbers, steps};

/// All that a compiled kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    rank: usize,
    /// The dim along which the elements begin elsewhere.
    axis: usize,
    /// Elements of a word.
    each: u32,
    /// Whether the place where they begin is an operand.
    dynamic: bool,
}

/// The first place that an operand gives: `len` places from there on must be among `extent`. 0 where they are not, with a
/// word for the user.
#[cube]
fn place(at: &Array<u32>, faults: &mut Array<u32>, len: u32, extent: u32, code: u32) -> u32 {
    let first = at[0];
    let fits = first <= extent && len <= extent - min(first, extent);
    if !fits {
        faults[0] = code;
        faults[1] = first;
    }
    select(fits, first, 0u32)
}

/// Elements of a result by its coordinates: `numbers` are its extents, then strides in the operand. Along the axis the
/// operand begins `shift` places earlier, and has `extent`; what is outside of it is zero.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn gather(
    from: &Array<u32>,
    at: &Array<u32>,
    to: &mut Array<u32>,
    faults: &mut Array<u32>,
    numbers: &Sequence<u32>,
    len: u32,
    shift: u32,
    extent: u32,
    code: u32,
    #[comptime] plan: Plan,
) {
    let each = comptime!(plan.each);
    let first = ABSOLUTE_POS as u32 * each;
    if first < len {
        let mut begin = shift;
        if comptime!(plan.dynamic) {
            begin = place(at, faults, numbers[plan.axis], extent, code);
        }
        let mut word = 0u32;
        #[unroll]
        for j in 0..each {
            let i = first + j;
            if i < len {
                let mut rest = i;
                let mut offset = 0u32;
                let mut inside = true;
                #[unroll]
                for d in 0..comptime!(plan.rank) {
                    let axis = comptime!(plan.rank - 1 - d);
                    let own = numbers[axis];
                    let stride = numbers[comptime!(plan.rank + axis)];
                    if comptime!(axis == plan.axis) {
                        // A place before the first one wraps to one that is far behind the last.
                        let there = rest % own + begin;
                        inside = there < extent;
                        offset += there * stride;
                    } else {
                        offset += rest % own * stride;
                    }
                    rest /= own;
                }
                if inside {
                    word |= part(from, offset, each) << comptime!(j * (32 / plan.each) % 32);
                }
            }
        }
        to[(first / each) as usize] = word;
    }
}

/// Elements of an operand into a part of a result: `outer` times `len` places with `inner` elements each, which begin at
/// the place `first` of `extent`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn scatter(
    from: &Array<u32>,
    at: &Array<u32>,
    to: &mut Array<u32>,
    faults: &mut Array<u32>,
    outer: u32,
    len: u32,
    inner: u32,
    first: u32,
    extent: u32,
    code: u32,
    #[comptime] each: u32,
    #[comptime] dynamic: bool,
) {
    let i = ABSOLUTE_POS as u32;
    let mut begin = first;
    if comptime!(dynamic) {
        begin = place(at, faults, len, extent, code);
    }
    if comptime!(each > 1) {
        // Elements share words: each unit has a word of the result, and keeps what is not replaced.
        let total = outer * extent * inner;
        if i * each < total {
            let mut word = to[i as usize];
            #[unroll]
            for j in 0..each {
                let e = i * each + j;
                let there = e / inner % extent;
                if e < total && there >= begin && there < begin + len {
                    let source = (e / inner / extent * len + there - begin) * inner + e % inner;
                    let place = comptime!(j * (32 / each));
                    let others = comptime!(!((u32::MAX >> (32 - 32 / each)) << (j * (32 / each))));
                    word = (word & others) | (part(from, source, each) << place);
                }
            }
            to[i as usize] = word;
        }
    } else if i < outer * len * inner {
        let block = len * inner;
        to[(i / block * extent * inner + begin * inner + i % block) as usize] = from[i as usize];
    }
}

#[cube(launch_unchecked)]
fn iota(to: &mut Array<u32>, len: u32) {
    if (ABSOLUTE_POS as u32) < len {
        to[ABSOLUTE_POS] = ABSOLUTE_POS as u32;
    }
}

#[cube(launch_unchecked)]
fn scalar(to: &mut Array<u32>, value: u32) {
    if ABSOLUTE_POS == 0 {
        to[0] = value;
    }
}

/// Runs an op of this family.
pub(super) fn run<R: Runtime>(l: &Launch<R>) -> Result<(), String> {
    let result = l.op.result();
    let shape = l.shape(result);
    match &l.op.op {
        Op::Const { value, dtype } => constant(l, steps::element_bits(*value, *dtype)),
        Op::Size { dim, dtype } => constant(l, steps::element_bits(l.extent(dim)? as f64, *dtype)),
        Op::Iota { .. } if shape[0] > 0 => {
            let (cubes, cube) = l.units(shape[0]);
            // SAFETY: units beyond the last element do nothing.
            unsafe { iota::launch_unchecked::<R>(l.client, cubes, cube, l.out(0), shape[0] as u32) }
        }
        Op::Iota { .. } => {}
        Op::Broadcast { .. } => {
            let own = l.shape(l.op.args[0]);
            let (lead, dense) = (shape.len() - own.len(), strides(&own));
            let along = |d: usize| if d < lead || own[d - lead] == 1 { 0 } else { dense[d - lead] };
            gathered(l, &(0..shape.len()).map(along).collect::<Vec<_>>(), None);
        }
        Op::Transpose { order } => {
            let dense = strides(&l.shape(l.op.args[0]));
            gathered(l, &order.iter().map(|&i| dense[i]).collect::<Vec<_>>(), None);
        }
        Op::Slice { axis, start, end } => {
            let (first, last, own) = (l.extent(start)?, l.extent(end)?, l.shape(l.op.args[0])[*axis]);
            if first > last || last > own {
                return Err(format!("slice {start}:{end} is {first}:{last}, but the dim is {own}"));
            }
            gathered(l, &strides(&l.shape(l.op.args[0])), Some((*axis, first as i64)));
        }
        Op::Pad { axis, before, after } => {
            l.extent(after)?;
            let before = l.extent(before)? as i64;
            gathered(l, &strides(&l.shape(l.op.args[0])), Some((*axis, -before)));
        }
        Op::SliceAt { axis, len } => {
            l.extent(len)?;
            gathered(l, &strides(&l.shape(l.op.args[0])), Some((*axis, 0)));
        }
        Op::Concat { axis } => {
            let mut first = 0;
            for (i, &arg) in l.op.args.iter().enumerate() {
                scattered(l, i, *axis, first);
                first += l.shape(arg)[*axis];
            }
        }
        Op::WriteAt { axis } => {
            let (from, to) = (l.buffer(l.op.args[0]), l.buffer(result));
            // A cache lies where it was: only what is new moves.
            if (from.region, from.offset) != (to.region, to.offset) {
                l.memory.copy(l.client, from, to);
            }
            scattered(l, 1, *axis, 0);
        }
        other => panic!("bug: no GPU has a kernel for `{other}`"),
    }
    Ok(())
}

/// Writes a scalar.
fn constant<R: Runtime>(l: &Launch<R>, value: u32) {
    // SAFETY: a scalar's buffer has a word.
    unsafe { scalar::launch_unchecked::<R>(l.client, CubeCount::new_single(), CubeDim::new_1d(1), l.out(0), value) }
}

/// Words of an element, and elements of a word.
fn width(dtype: DType) -> (usize, u32) {
    match dtype {
        DType::Key => (2, 1),
        dtype => (1, Store::of(dtype).each()),
    }
}

/// The result by strides of the operand; along an axis from a place on, which may be before the first one.
fn gathered<R: Runtime>(l: &Launch<R>, along: &[usize], from: Option<(usize, i64)>) {
    let (arg, result) = (l.op.args[0], l.op.result());
    let (words, each) = width(l.dtype(arg));
    let mut extents = l.shape(result);
    let mut steps: Vec<usize> = along.iter().map(|stride| stride * words).collect();
    extents.push(words);
    steps.push(1);
    let len: usize = extents.iter().product();
    if len == 0 {
        return;
    }
    let rank = extents.len();
    // Without an axis that begins elsewhere, it is the one of words.
    let (axis, begin) = from.unwrap_or((rank - 1, 0));
    let extent = if axis == rank - 1 { words } else { l.shape(arg)[axis] };
    let dynamic = matches!(l.op.op, Op::SliceAt { .. });
    let (cubes, cube) = l.units(len.div_ceil(each as usize));
    // SAFETY: what is read lies in the operand, whose shape the strides come from; units beyond the result do nothing.
    unsafe {
        gather::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(0),
            l.arg(usize::from(dynamic)),
            l.out(0),
            l.faults(),
            numbers(&[extents, steps].concat()),
            len as u32,
            (begin as i32).cast_unsigned(),
            extent as u32,
            l.code,
            Plan { rank, axis, each, dynamic },
        );
    }
}

/// Operand `i` into the result, from a place along an axis on: this one, or that of the third operand of `write_at`.
fn scattered<R: Runtime>(l: &Launch<R>, i: usize, axis: usize, first: usize) {
    let arg = l.op.args[i];
    let (words, mut each) = width(l.dtype(arg));
    let (own, whole) = (l.shape(arg), l.shape(l.op.result()));
    let outer = own[..axis].iter().product::<usize>();
    let mut inner = own[axis + 1..].iter().product::<usize>() * words;
    if inner % each as usize == 0 {
        // Whole words move.
        (inner, each) = (inner / each as usize, 1);
    }
    let (len, extent) = (own[axis], whole[axis]);
    let units = if each > 1 { (outer * extent * inner).div_ceil(each as usize) } else { outer * len * inner };
    if outer * len * inner == 0 {
        return;
    }
    let dynamic = matches!(l.op.op, Op::WriteAt { .. });
    let (cubes, cube) = l.units(units);
    // SAFETY: the part lies in the result; units beyond it do nothing.
    unsafe {
        scatter::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(i),
            l.arg(if dynamic { 2 } else { i }),
            l.out(0),
            l.faults(),
            outer as u32,
            len as u32,
            inner as u32,
            first as u32,
            extent as u32,
            l.code,
            each,
            dynamic,
        );
    }
}
