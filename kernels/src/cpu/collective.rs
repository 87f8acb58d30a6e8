//! What ranks send to each other. Parts of a tensor are rows of its first dim, which lie together.

use dsgc_ir::{Bindings, DType, Op, Type, Value};

use super::Launch;
use super::memory::Ptr;
use crate::ranks::{Number, ops};

/// Why there is no kernel, if there is none.
pub(super) fn missing(op: &Op) -> Option<String> {
    match op {
        Op::AllGather { axis, .. } | Op::ReduceScatter { axis, .. } if *axis > 0 => {
            Some("parts along other dims than the first".into())
        }
        _ => None,
    }
}

/// Bytes of workspace: a part of a sum on its way to its owner; of several operands, two messages of parts of all of them.
pub(super) fn workspace(op: &Op, args: &[Type], bounds: &Bindings) -> usize {
    let bytes = |ty: &Type| ty.bytes(bounds).unwrap_or(usize::MAX);
    let part = |ty: &Type| match op {
        Op::ReduceScatter { ranks, .. } => {
            let rows = ty.dims[0].eval(bounds).unwrap_or_default().max(0) as usize;
            bytes(ty).checked_div(rows).unwrap_or(0).saturating_mul(rows.div_ceil((*ranks).max(1)))
        }
        // Of a sum that all ranks want, nobody here knows how many there are.
        _ => bytes(ty),
    };
    let parts = args.iter().map(part).fold(0, usize::saturating_add);
    match op {
        Op::AllGather { .. } | Op::AllReduce { .. } if args.len() == 1 => 0,
        Op::ReduceScatter { .. } if args.len() == 1 => parts,
        _ => parts.saturating_mul(2),
    }
}

/// Runs a collective or `shard`.
pub(super) fn run(l: &mut Launch) -> Result<(), String> {
    l.member.note(l.graph, l.op);
    if l.op.args.len() > 1 {
        return match (&l.op.op, l.dtype(l.op.args[0])) {
            (Op::AllGather { .. }, _) => gather_each(l),
            (_, DType::F32) => sum_each::<f32>(l),
            (_, DType::I32) => sum_each::<i32>(l),
            (op, dtype) => panic!("bug: `{op}` of {dtype}"),
        };
    }
    match (&l.op.op, l.dtype(l.result())) {
        (Op::AllGather { .. } | Op::Shard { .. }, _) => rows(l),
        (_, DType::F32) => sum::<f32>(l),
        (_, DType::I32) => sum::<i32>(l),
        (op, dtype) => panic!("bug: `{op}` of {dtype}"),
    }
}

/// Bytes of a value as it lies.
fn bytes(l: &Launch, value: Value) -> usize {
    let ty = Type::new(l.dtype(value), l.graph.ty(value).dims.clone());
    ty.bytes(l.dims).expect("every dim that a value needs is bound")
}

/// `all_gather` of several operands: bytes as they lie.
fn gather_each(l: &mut Launch) -> Result<(), String> {
    let Op::AllGather { over, .. } = l.op.op else { panic!("bug: `{}` gathers nothing", l.op.op) };
    let lens: Vec<usize> = l.op.args.iter().map(|&arg| bytes(l, arg)).collect();
    let results: Vec<Value> = l.op.results().collect();
    let work: Ptr<u8> = l.workspace();
    let group = l.member.group(over);
    let mut arrays = Vec::with_capacity(results.len());
    for (i, (&result, &len)) in results.iter().zip(&lens).enumerate() {
        let made = bytes(l, result);
        let (from, to): (Ptr<u8>, Ptr<u8>) = (l.arg(i), l.out(i));
        // SAFETY: the buffers hold the values; operands and results are apart, as none of these ops works in place.
        let (from, to) = unsafe { (from.slice(0, len), to.slice_mut(0, made)) };
        let first = (group.at() * len).min(made);
        let own = len.min(made - first);
        to[first..first + own].copy_from_slice(&from[..own]);
        arrays.push(to);
    }
    // SAFETY: `workspace` says so many bytes.
    let work = unsafe { work.slice_mut(0, 2 * lens.iter().sum::<usize>()) };
    let done = group.all_gather_each(&mut arrays, &lens, work).map_err(|ended| ended.message);
    *l.sent += group.sent();
    done
}

/// `all_reduce` and `reduce_scatter` of several operands.
fn sum_each<T: Number>(l: &mut Launch) -> Result<(), String> {
    let results: Vec<Value> = l.op.results().collect();
    let len = results.iter().map(|&result| l.len(result)).sum::<usize>();
    let work: Ptr<T> = l.workspace();
    // SAFETY: `workspace` says so many elements.
    let work = unsafe { work.slice_mut(0, 2 * len) };
    let (mut wholes, mut made) = (Vec::new(), Vec::new());
    for (i, (&arg, &result)) in l.op.args.iter().zip(&results).enumerate() {
        let (given, len) = (l.len(arg), l.len(result));
        let (from, to): (Ptr<T>, Ptr<T>) = (l.arg(i), l.out(i));
        // SAFETY: the buffers hold the values; a result of a sum on all ranks is in its operand's place or apart from all
        // operands, and any other is apart from them.
        unsafe {
            match l.op.op {
                Op::AllReduce { .. } if from.0 == to.0 => {}
                Op::AllReduce { .. } => to.slice_mut(0, len).copy_from_slice(from.slice(0, given)),
                _ => wholes.push(from.slice(0, given)),
            }
            made.push(to.slice_mut(0, len));
        }
    }
    let over = match l.op.op {
        Op::AllReduce { over } | Op::ReduceScatter { over, .. } => over,
        _ => panic!("bug: `{}` adds nothing up", l.op.op),
    };
    let group = l.member.group(over);
    let done = match l.op.op {
        Op::AllReduce { .. } => group.all_reduce_each(&mut made, work),
        _ => group.reduce_scatter_each(&wholes, &mut made, work),
    };
    *l.sent += group.sent();
    done.map_err(|ended| ended.message)
}

/// `all_gather` and `shard`: bytes as they lie.
fn rows(l: &mut Launch) -> Result<(), String> {
    let (operand, result) = (l.op.args[0], l.result());
    let (given, made, shape) = (bytes(l, operand), bytes(l, result), l.shape(operand));
    let (from, to): (Ptr<u8>, Ptr<u8>) = (l.arg(0), l.out(0));
    // SAFETY: the buffers hold the values and are apart, as none of these ops works in place.
    let (from, to) = unsafe { (from.slice(0, given), to.slice_mut(0, made)) };
    *l.sent += ops::move_rows(&l.op.op, l.member, &shape, from, to)?;
    Ok(())
}

/// `all_reduce` and `reduce_scatter`.
fn sum<T: Number>(l: &mut Launch) -> Result<(), String> {
    let (given, made) = (l.len(l.op.args[0]), l.len(l.result()));
    let (from, to): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    let in_place = from.0 == to.0;
    let work: Ptr<T> = l.workspace();
    let needed = if let Op::ReduceScatter { .. } = l.op.op { made } else { 0 };
    // SAFETY: the buffers hold the values, and the workspace a part of a sum; the result is in the operand's place or apart from it.
    let (from, to, work) = unsafe {
        let from = if in_place { None } else { Some(from.slice(0, given)) };
        (from, to.slice_mut(0, made), work.slice_mut(0, needed))
    };
    *l.sent += ops::add_up(&l.op.op, l.member, from, to, work)?;
    Ok(())
}
