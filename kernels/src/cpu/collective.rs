//! What ranks send to each other. Parts of a tensor are rows of its first dim, which lie together.

use dsgc_ir::{Bindings, DType, Op, Type};

use super::Launch;
use super::memory::Ptr;
use crate::ranks::Number;

/// Why there is no kernel, if there is none.
pub(super) fn missing(op: &Op) -> Option<String> {
    match op {
        Op::AllGather { axis, .. } | Op::ReduceScatter { axis, .. } if *axis > 0 => {
            Some("parts along other dims than the first".into())
        }
        _ => None,
    }
}

/// Bytes of workspace: a part of a sum on its way to its owner.
pub(super) fn workspace(op: &Op, args: &[Type], bounds: &Bindings) -> usize {
    match op {
        Op::ReduceScatter { ranks, .. } => {
            let bytes = args[0].bytes(bounds).unwrap_or(usize::MAX);
            let rows = args[0].dims[0].eval(bounds).unwrap_or_default().max(0) as usize;
            bytes.checked_div(rows).unwrap_or(0).saturating_mul(rows.div_ceil((*ranks).max(1)))
        }
        _ => 0,
    }
}

/// Runs a collective or `shard`.
pub(super) fn run(l: &mut Launch) -> Result<(), String> {
    l.member.note(l.graph, l.op);
    match (&l.op.op, l.dtype(l.result())) {
        (Op::AllGather { .. } | Op::Shard { .. }, _) => rows(l),
        (_, DType::F32) => sum::<f32>(l),
        (_, DType::I32) => sum::<i32>(l),
        (op, dtype) => panic!("bug: `{op}` of {dtype}"),
    }
}

/// `all_gather` and `shard`: bytes as they lie.
fn rows(l: &mut Launch) -> Result<(), String> {
    let (operand, result) = (l.op.args[0], l.result());
    let bytes = |l: &Launch, value| {
        let ty = Type::new(l.dtype(value), l.graph.ty(value).dims.clone());
        ty.bytes(l.dims).expect("every dim that a value needs is bound")
    };
    let (given, made) = (bytes(l, operand), bytes(l, result));
    let shape = l.shape(operand);
    let (from, to): (Ptr<u8>, Ptr<u8>) = (l.arg(0), l.out(0));
    // SAFETY: the buffers hold the values and are apart, as none of these ops works in place.
    let (from, to) = unsafe { (from.slice(0, given), to.slice_mut(0, made)) };
    match l.op.op {
        Op::Shard { over, axis, ranks } => {
            let outer: usize = shape[..axis].iter().product();
            if given == 0 || outer == 0 {
                to.fill(0);
                return Ok(());
            }
            // Bytes of all places, and of a rank's.
            let all = given / outer;
            let part = all / shape[axis] * shape[axis].div_ceil(ranks);
            let at = l.member.group(over).at();
            let (first, last) = ((at * part).min(all), ((at + 1) * part).min(all));
            for (from, to) in from.chunks(all).zip(to.chunks_mut(part)) {
                to[..last - first].copy_from_slice(&from[first..last]);
                to[last - first..].fill(0);
            }
            Ok(())
        }
        Op::AllGather { over, .. } => {
            let group = l.member.group(over);
            let first = (group.at() * given).min(made);
            let own = given.min(made - first);
            to[first..first + own].copy_from_slice(&from[..own]);
            let done = group.all_gather(to, given).map_err(|ended| ended.message);
            *l.sent += group.sent();
            done
        }
        _ => panic!("bug: `{}` moves no rows", l.op.op),
    }
}

/// `all_reduce` and `reduce_scatter`.
fn sum<T: Number>(l: &mut Launch) -> Result<(), String> {
    let (given, made) = (l.len(l.op.args[0]), l.len(l.result()));
    let (from, to): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    let in_place = from.0 == to.0;
    let member = l.member;
    let done = match l.op.op {
        Op::AllReduce { over } => {
            // SAFETY: the buffers hold the values; the result is in the operand's place or apart from it.
            let to = unsafe { to.slice_mut(0, made) };
            if !in_place {
                // SAFETY: as above.
                to.copy_from_slice(unsafe { from.slice(0, given) });
            }
            let group = member.group(over);
            let done = group.all_reduce(to);
            *l.sent += group.sent();
            done
        }
        Op::ReduceScatter { over, .. } => {
            let work: Ptr<T> = l.workspace();
            // SAFETY: the buffers hold the values and are apart.
            let (from, to, work) = unsafe { (from.slice(0, given), to.slice_mut(0, made), work.slice_mut(0, made)) };
            let group = member.group(over);
            let done = group.reduce_scatter(from, to, work);
            *l.sent += group.sent();
            done
        }
        _ => panic!("bug: `{}` adds nothing up", l.op.op),
    };
    done.map_err(|ended| ended.message)
}
