//! What ranks send to each other: from device to device where there is a way, else through the host, which reads operands and
//! writes results. Parts of a tensor are rows of its first dim, which lie together.

use cubecl::prelude::*;
use dsgc_ir::{Buffer, DType, Op, Type};

use super::Launch;
use crate::ranks::{Number, ops};

/// A way from device to device.
pub(super) trait Direct<R: Runtime> {
    /// Runs a collective and gives the bytes that a rank sends; nothing where it must go through the host, on all ranks alike.
    fn run(&self, launch: &Launch<R>) -> Option<Result<u64, String>>;
}

/// Runs a collective or `shard`.
pub(super) fn run<R: Runtime>(l: &Launch<R>) -> Result<(), String> {
    l.member.note(&l.member.naming(l.graph, l.op));
    if let Some(sent) = l.direct.and_then(|direct| direct.run(l)) {
        l.sent.set(l.sent.get() + sent?);
        return Ok(());
    }
    let (operand, result) = (l.op.args[0], l.op.result());
    let bytes = |value| {
        let ty = Type::new(l.dtype(value), l.graph.ty(value).dims.clone());
        ty.bytes(l.dims).expect("every dim that a value needs is bound")
    };
    let (given, made) = (bytes(operand), bytes(result));
    let mut from = l.memory.bytes(l.client, Buffer { bytes: given, ..l.buffer(operand) })?;
    from.truncate(given);
    let (to, sent) = match (&l.op.op, l.dtype(result)) {
        (op @ (Op::AllGather { .. } | Op::Shard { .. }), _) => {
            let mut to = vec![0; made];
            let sent = ops::move_rows(op, l.member, &l.shape(operand), &from, &mut to)?;
            (to, sent)
        }
        (_, DType::F32) => sum::<f32, R>(l, &from)?,
        (_, DType::I32) => sum::<i32, R>(l, &from)?,
        (op, dtype) => panic!("bug: `{op}` of {dtype}"),
    };
    l.sent.set(l.sent.get() + sent);
    l.memory.set_bytes(l.client, l.buffer(result), &to);
    Ok(())
}

/// `all_reduce` and `reduce_scatter`: the result, and the bytes that were sent.
fn sum<T: Number, R: Runtime>(l: &Launch<R>, from: &[u8]) -> Result<(Vec<u8>, u64), String> {
    let mut from: Vec<T> = bytemuck::pod_collect_to_vec(from);
    let op = &l.op.op;
    let (to, sent) = if let Op::AllReduce { .. } = op {
        let sent = ops::add_up(op, l.member, None, &mut from, &mut [])?;
        (from, sent)
    } else {
        let made = l.len(l.op.result());
        let (mut to, mut work) = (vec![T::zeroed(); made], vec![T::zeroed(); made]);
        let sent = ops::add_up(op, l.member, Some(&from), &mut to, &mut work)?;
        (to, sent)
    };
    Ok((bytemuck::cast_slice(&to).to_vec(), sent))
}
