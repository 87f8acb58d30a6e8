//! What ranks send to each other. Parts of a tensor are rows of its first dim, which lie together.

use dsgc_ir::{Bindings, DType, Op, Type};

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
    let bytes = |value| {
        let ty = Type::new(l.dtype(value), l.graph.ty(value).dims.clone());
        ty.bytes(l.dims).expect("every dim that a value needs is bound")
    };
    let (given, made, shape) = (bytes(operand), bytes(result), l.shape(operand));
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
