//! The collective ops of graphs over memory of the host. Parts of a tensor are rows of its first dim, which lie together; of a
//! `shard`, of any dim.

use dsgc_ir::Op;

use super::{Member, Number};

/// `all_gather` and `shard` of an operand of this shape: bytes as they lie. Gives the bytes that were sent.
pub(crate) fn move_rows(op: &Op, member: &Member, shape: &[usize], from: &[u8], to: &mut [u8]) -> Result<u64, String> {
    match *op {
        Op::Shard { over, axis, ranks } => {
            let outer: usize = shape[..axis].iter().product();
            if from.is_empty() || outer == 0 {
                to.fill(0);
                return Ok(0);
            }
            // Bytes of all places, and of a rank's.
            let all = from.len() / outer;
            let part = all / shape[axis] * shape[axis].div_ceil(ranks);
            let at = member.group(over).at();
            let (first, last) = ((at * part).min(all), ((at + 1) * part).min(all));
            for (from, to) in from.chunks(all).zip(to.chunks_mut(part)) {
                to[..last - first].copy_from_slice(&from[first..last]);
                to[last - first..].fill(0);
            }
            Ok(0)
        }
        Op::AllGather { over, .. } => {
            let group = member.group(over);
            let first = (group.at() * from.len()).min(to.len());
            let own = from.len().min(to.len() - first);
            to[first..first + own].copy_from_slice(&from[..own]);
            group.all_gather(to, from.len()).map_err(|ended| ended.message)?;
            Ok(group.sent())
        }
        _ => panic!("bug: `{op}` moves no rows"),
    }
}

/// `all_reduce` and `reduce_scatter`; without an operand, it is in the result's place. The workspace of `reduce_scatter` is as
/// long as its result. Gives the bytes that were sent.
pub(crate) fn add_up<T: Number>(
    op: &Op,
    member: &Member,
    from: Option<&[T]>,
    to: &mut [T],
    work: &mut [T],
) -> Result<u64, String> {
    let (done, sent) = match *op {
        Op::AllReduce { over } => {
            if let Some(from) = from {
                to.copy_from_slice(from);
            }
            let group = member.group(over);
            (group.all_reduce(to), group.sent())
        }
        Op::ReduceScatter { over, .. } => {
            let group = member.group(over);
            let from = from.expect("bug: `reduce_scatter` in its operand's place");
            (group.reduce_scatter(from, to, work), group.sent())
        }
        _ => panic!("bug: `{op}` adds nothing up"),
    };
    done.map_err(|ended| ended.message)?;
    Ok(sent)
}
