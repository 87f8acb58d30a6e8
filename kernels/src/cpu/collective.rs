//! What ranks send to each other. Parts of a tensor are rows of its first dim, which lie together.

use dsgc_ir::{Axis, Bindings, Class, DType, Op, Type, Value};

use super::Launch;
use super::beside::Job;
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

/// Whether a collective can run beside other ops: one of numbers as they lie.
pub(super) fn runs_beside(op: &Op, args: &[Type]) -> bool {
    let sums = matches!(op, Op::AllReduce { .. } | Op::ReduceScatter { .. });
    op.class() == Class::Collective && !(sums && args.iter().any(|ty| ty.dtype.is_narrow()))
}

/// Runs a collective or `shard`, behind those that are on their way.
pub(super) fn run(l: &mut Launch) -> Result<(), String> {
    if let Op::Shard { .. } = l.op.op {
        return rows(l)().map(drop);
    }
    let job = job(l);
    if l.beside.is_idle() {
        *l.sent += job()?;
        return Ok(());
    }
    let number = l.beside.begin(job)?;
    l.beside.wait(number)
}

/// Begins a collective that is waited for later, and gives its number; an error if the system refuses to start a thread.
pub(super) fn begin(l: &mut Launch) -> Result<u64, String> {
    let job = job(l);
    l.beside.begin(job)
}

/// A collective as what can run on another thread.
fn job(l: &mut Launch) -> Job {
    let job = match (&l.op.op, l.dtype(l.op.args[0]), l.op.args.len()) {
        (Op::AllGather { .. }, _, 1) => rows(l),
        (Op::AllGather { .. }, ..) => gather_each(l),
        (_, DType::F32, 1) => sum::<f32>(l),
        (_, DType::I32, 1) => sum::<i32>(l),
        (_, DType::F32, _) => sum_each::<f32>(l),
        (_, DType::I32, _) => sum_each::<i32>(l),
        (op, dtype, _) => panic!("bug: `{op}` of {dtype}"),
    };
    let (member, what, arena) = (l.member.clone(), l.member.naming(l.graph, l.op), l.memory.keep());
    Box::new(move || {
        member.note(&what);
        let sent = job();
        // Until here, whoever gives up waiting.
        drop(arena);
        sent
    })
}

/// Bytes of a value as it lies.
fn bytes(l: &Launch, value: Value) -> usize {
    let ty = Type::new(l.dtype(value), l.graph.ty(value).dims.clone());
    ty.bytes(l.dims).expect("every dim that a value needs is bound")
}

/// The axis of the mesh along which a collective sends.
fn over(op: &Op) -> Axis {
    match op {
        Op::AllReduce { over } | Op::AllGather { over, .. } | Op::ReduceScatter { over, .. } => *over,
        _ => panic!("bug: `{op}` sends nothing"),
    }
}

/// `all_gather` of several operands: bytes as they lie.
fn gather_each(l: &mut Launch) -> Job {
    let lens: Vec<usize> = l.op.args.iter().map(|&arg| bytes(l, arg)).collect();
    let made: Vec<usize> = l.op.results().map(|result| bytes(l, result)).collect();
    let parts: Vec<Ptr<u8>> = (0..lens.len()).map(|i| l.arg(i)).collect();
    let wholes: Vec<Ptr<u8>> = (0..lens.len()).map(|i| l.out(i)).collect();
    let (work, member, over): (Ptr<u8>, _, _) = (l.workspace(), l.member.clone(), over(&l.op.op));
    Box::new(move || {
        let group = member.group(over);
        let mut arrays = Vec::with_capacity(lens.len());
        for (i, &len) in lens.iter().enumerate() {
            // SAFETY: the buffers hold the values; operands and results are apart, as none of these ops works in place.
            let (from, to) = unsafe { (parts[i].slice(0, len), wholes[i].slice_mut(0, made[i])) };
            let first = (group.at() * len).min(made[i]);
            let own = len.min(made[i] - first);
            to[first..first + own].copy_from_slice(&from[..own]);
            arrays.push(to);
        }
        // SAFETY: `workspace` says so many bytes.
        let work = unsafe { work.slice_mut(0, 2 * lens.iter().sum::<usize>()) };
        group.all_gather_each(&mut arrays, &lens, work).map_err(|ended| ended.message)?;
        Ok(group.sent())
    })
}

/// `all_reduce` and `reduce_scatter` of several operands.
fn sum_each<T: Number + Send>(l: &mut Launch) -> Job {
    let (args, results): (Vec<Value>, Vec<Value>) = (l.op.args.clone(), l.op.results().collect());
    let is_all = matches!(l.op.op, Op::AllReduce { .. });
    let given: Vec<usize> = args.iter().map(|&arg| l.len(arg)).collect();
    let lens: Vec<usize> = results.iter().map(|&result| l.len(result)).collect();
    if is_all {
        (0..args.len()).for_each(|i| into_place::<T>(l, i));
    }
    let wholes: Vec<Ptr<T>> = (0..args.len()).map(|i| l.arg(i)).collect();
    let made: Vec<Ptr<T>> = (0..args.len()).map(|i| l.out(i)).collect();
    let (work, member, over): (Ptr<T>, _, _) = (l.workspace(), l.member.clone(), over(&l.op.op));
    Box::new(move || {
        let group = member.group(over);
        // SAFETY: the buffers hold the values, and the workspace two messages of parts of all of them. What is summed on all
        // ranks lies in the results already; other results are apart from the operands.
        let (mut made, work) = unsafe {
            let made: Vec<&mut [T]> = made.iter().zip(&lens).map(|(to, &len)| to.slice_mut(0, len)).collect();
            (made, work.slice_mut(0, 2 * lens.iter().sum::<usize>()))
        };
        let done = if is_all {
            group.all_reduce_each(&mut made, work)
        } else {
            // SAFETY: as above.
            let wholes: Vec<&[T]> = wholes.iter().zip(&given).map(|(x, &len)| unsafe { x.slice(0, len) }).collect();
            group.reduce_scatter_each(&wholes, &mut made, work)
        };
        done.map_err(|ended| ended.message)?;
        Ok(group.sent())
    })
}

/// `all_gather` and `shard`: bytes as they lie.
fn rows(l: &mut Launch) -> Job {
    let (operand, result) = (l.op.args[0], l.result());
    let (given, made, shape) = (bytes(l, operand), bytes(l, result), l.shape(operand));
    let (from, to): (Ptr<u8>, Ptr<u8>) = (l.arg(0), l.out(0));
    let (op, member) = (l.op.op.clone(), l.member.clone());
    Box::new(move || {
        // SAFETY: the buffers hold the values and are apart, as none of these ops works in place.
        let (from, to) = unsafe { (from.slice(0, given), to.slice_mut(0, made)) };
        ops::move_rows(&op, &member, &shape, from, to)
    })
}

/// `all_reduce` and `reduce_scatter`.
fn sum<T: Number + Send>(l: &mut Launch) -> Job {
    let (given, made) = (l.len(l.op.args[0]), l.len(l.result()));
    let is_all = matches!(l.op.op, Op::AllReduce { .. });
    if is_all {
        into_place::<T>(l, 0);
    }
    let (from, to, work): (Ptr<T>, Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0), l.workspace());
    let (op, member) = (l.op.op.clone(), l.member.clone());
    Box::new(move || {
        // SAFETY: the buffers hold the values, and the workspace a part of a sum. What is summed on all ranks lies in the
        // result already; another result is apart from the operand.
        let (from, to, work) = unsafe {
            let from = if is_all { None } else { Some(from.slice(0, given)) };
            (from, to.slice_mut(0, made), work.slice_mut(0, if is_all { 0 } else { made }))
        };
        ops::add_up(&op, &member, from, to, work)
    })
}

/// Copies an operand into the place of its result, if it is not there.
fn into_place<T: Number + Send>(l: &mut Launch, i: usize) {
    let len = l.len(l.op.args[i]);
    let (from, to): (Ptr<T>, Ptr<T>) = (l.arg(i), l.out(i));
    if from.0 != to.0 {
        // SAFETY: both buffers hold the value; the result is in the operand's place or apart from it.
        l.threads.run(len, 1, |r| unsafe {
            to.slice_mut(r.start, r.len()).copy_from_slice(from.slice(r.start, r.len()));
        });
    }
}
