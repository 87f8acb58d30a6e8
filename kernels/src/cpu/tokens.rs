//! Tokens: embeddings, log-probabilities, positions, and choosing one.

use std::sync::{Mutex, PoisonError};

use dsgc_ir::DType;
use dsgc_ir::segment::counts;
use dsgc_ir::stage::Sampling;

use super::lanes::{fence, stream_zeros, streams};
use super::logp::{logp_and_grad_row, logp_row};
use super::memory::{ALIGNMENT, Ptr};
use super::narrow::{round, widen};
use super::{Launch, structure};
use crate::random::Key;
use crate::sample::choose;

/// Checks that all indices are rows of a table.
pub(super) fn check(indices: &[i32], rows: usize, what: &str) -> Result<(), String> {
    match indices.iter().find(|&&i| usize::try_from(i).map_or(true, |i| i >= rows)) {
        Some(odd) => Err(format!("found {what} {odd}, expected one of 0 to {} ({rows} rows)", rows as i64 - 1)),
        None => Ok(()),
    }
}

/// Runs `embed`: rows are copied, whatever their elements are.
pub(super) fn embed(l: &mut Launch) -> Result<(), String> {
    match l.dtype(l.op.args[0]).bytes() {
        2 => embed_as::<u16>(l),
        _ => embed_as::<u32>(l),
    }
}

fn embed_as<T: Copy + Send>(l: &mut Launch) -> Result<(), String> {
    let (rows, width) = l.rows(l.op.args[0]);
    let n = l.len(l.op.args[1]);
    let (table, indices, out): (Ptr<T>, Ptr<i32>, Ptr<T>) = (l.arg(0), l.arg(1), l.out(0));
    // SAFETY: the operand holds `n` indices.
    let indices = unsafe { indices.slice(0, n) };
    check(indices, rows, "index")?;
    l.threads.run(n, width, |r| {
        for i in r {
            // SAFETY: the index was checked; rows of the result are apart.
            unsafe { out.slice_mut(i * width, width).copy_from_slice(table.slice(indices[i] as usize * width, width)) };
        }
    });
    Ok(())
}

/// Runs `embed_grad`: every thread adds up the rows of its own part of the table, in the order of the indices.
pub(super) fn embed_grad(l: &mut Launch) -> Result<(), String> {
    let (rows, width) = l.rows(l.result());
    let n = l.len(l.op.args[0]);
    let (indices, grad, out): (Ptr<i32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.out(0));
    // SAFETY: the operand holds `n` indices.
    let indices = unsafe { indices.slice(0, n) };
    check(indices, rows, "index")?;
    l.threads.run(rows, width, |r| {
        // SAFETY: rows `r` of the table belong to this thread.
        let part = unsafe { out.slice_mut(r.start * width, r.len() * width) };
        let (to, bytes) = (part.as_mut_ptr(), size_of_val(part));
        if streams(to, bytes, width * size_of::<f32>()) {
            // SAFETY: the part holds so many bytes; `streams` was asked.
            unsafe { stream_zeros(to.cast(), bytes) };
            fence();
        } else {
            part.fill(0.0);
        }
        for (i, &index) in indices.iter().enumerate() {
            if r.contains(&(index as usize)) {
                let row = &mut part[(index as usize - r.start) * width..][..width];
                // SAFETY: the gradient has a row per index.
                let from = unsafe { grad.slice(i * width, width) };
                row.iter_mut().zip(from).for_each(|(a, b)| *a += b);
            }
        }
    });
    Ok(())
}

/// Bytes of workspace of `add_rows`: a row for each thread, in whole cache lines.
pub(super) fn rows_workspace(width: usize, threads: usize) -> usize {
    threads.max(1) * padded(width) * size_of::<f32>()
}

/// A width in whole cache lines.
fn padded(width: usize) -> usize {
    width.next_multiple_of(ALIGNMENT / size_of::<f32>())
}

/// Runs `add_rows`: of each row that indices name, all that is added to it is summed first, in the order of the indices,
/// as `embed_grad` sums it. Other rows are not touched where the result lies in the place of the operand.
pub(super) fn add_rows(l: &mut Launch) -> Result<(), String> {
    let (rows, width) = l.rows(l.result());
    let n = l.len(l.op.args[1]);
    let (from, to) = (l.buffer(l.op.args[0]), l.buffer(l.result()));
    if (from.region, from.offset) != (to.region, to.offset) {
        structure::copy(l, from, to);
    }
    let (indices, grad, out): (Ptr<i32>, Ptr<f32>, Ptr<f32>) = (l.arg(1), l.arg(2), l.out(0));
    // SAFETY: the operand holds `n` indices.
    let indices = unsafe { indices.slice(0, n) };
    check(indices, rows, "index")?;
    // Places by the row that they name; of one row in their order.
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&i| indices[i]);
    let groups: Vec<&[usize]> = order.chunk_by(|&a, &b| indices[a] == indices[b]).collect();
    let (sums, parts): (Ptr<f32>, usize) = (l.workspace(), l.threads.count());
    let groups_of = |part: usize| groups.len() * part / parts..groups.len() * (part + 1) / parts;
    l.threads.run(parts, n * width / parts.max(1), |r| {
        for part in r {
            // SAFETY: every part has a row of the workspace.
            let sum = unsafe { sums.slice_mut(part * padded(width), width) };
            for group in &groups[groups_of(part)] {
                sum.fill(0.0);
                for &i in *group {
                    // SAFETY: the gradient has a row per index.
                    sum.iter_mut().zip(unsafe { grad.slice(i * width, width) }).for_each(|(a, b)| *a += b);
                }
                // SAFETY: the index was checked; rows of different groups are apart.
                let row = unsafe { out.slice_mut(indices[group[0]] as usize * width, width) };
                row.iter_mut().zip(&*sum).for_each(|(a, b)| *a += b);
            }
        }
    });
    Ok(())
}

/// Bytes of workspace to widen a row of narrow logits in each thread.
pub(super) fn workspace(logits: DType, width: usize, threads: usize) -> usize {
    if logits.is_narrow() { threads.max(1) * width * size_of::<f32>() } else { 0 }
}

/// Calls a function with the number of every row of the logits and the row in f32: as it lies, or widened.
fn for_rows(l: &mut Launch, each: impl Fn(usize, *mut f32) + Sync) {
    let (rows, width) = l.rows(l.op.args[0]);
    let (dtype, logits, wide): (DType, Ptr<u8>, Ptr<f32>) = (l.dtype(l.op.args[0]), l.arg(0), l.workspace());
    if rows == 0 {
        return;
    }
    let parts = l.threads.count().min(rows);
    l.threads.run(parts, 8 * width * rows.div_ceil(parts), |range| {
        for part in range {
            for i in rows * part / parts..rows * (part + 1) / parts {
                // SAFETY: there are so many rows, and the workspace has one for every thread.
                unsafe {
                    let row = logits.add(i * width * dtype.bytes()).0;
                    if dtype.is_narrow() {
                        let wide = wide.add(part * width).0;
                        widen(dtype, row, wide, width);
                        each(i, wide);
                    } else {
                        each(i, row.cast());
                    }
                }
            }
        }
    });
}

/// Runs `token_logp`.
pub(super) fn logp(l: &mut Launch) -> Result<(), String> {
    let (rows, width) = l.rows(l.op.args[0]);
    let (tokens, out): (Ptr<i32>, Ptr<f32>) = (l.arg(1), l.out(0));
    // SAFETY: there is a token per row.
    let tokens = unsafe { tokens.slice(0, rows) };
    check(tokens, width, "token")?;
    for_rows(l, |i, row| {
        // SAFETY: a row of the logits, element `i` of the result.
        unsafe { *out.add(i).0 = logp_row(std::slice::from_raw_parts(row, width), tokens[i] as usize) };
    });
    Ok(())
}

/// Runs `token_logp_grad`.
pub(super) fn logp_grad(l: &mut Launch) -> Result<(), String> {
    let (rows, width) = l.rows(l.op.args[0]);
    let dtype = l.dtype(l.result());
    let (tokens, grad, out): (Ptr<i32>, Ptr<f32>, Ptr<u8>) = (l.arg(1), l.arg(2), l.out(0));
    // SAFETY: there is a token per row.
    let tokens = unsafe { tokens.slice(0, rows) };
    check(tokens, width, "token")?;
    for_rows(l, |i, row| {
        // SAFETY: row `i` of logits and result, which the plan lays over each other or apart.
        unsafe {
            let (bytes, g) = (width * dtype.bytes(), *grad.add(i).0);
            let out = out.add(i * bytes);
            if g == 0.0 {
                // A row that no loss looks at, such as padding; its gradient is 0 whatever the logits are.
                out.slice_mut(0, bytes).fill(0);
            } else if dtype.is_narrow() {
                logp_and_grad_row(row, width, tokens[i] as usize, g, row);
                round(dtype, row, out.0, width);
            } else {
                logp_and_grad_row(row, width, tokens[i] as usize, g, out.0.cast());
            }
        }
    });
    Ok(())
}

/// Runs `position_in`.
pub(super) fn position_in(l: &mut Launch) {
    let (rows, places) = l.rows(l.result());
    let (segments, out): (Ptr<i32>, Ptr<i32>) = (l.arg(0), l.out(0));
    l.threads.run(rows, places * places / 2, |r| {
        for row in r {
            // SAFETY: rows of operand and result; rows are apart.
            let (segments, out) =
                unsafe { (segments.slice(row * places, places), out.slice_mut(row * places, places)) };
            for t in 0..places {
                out[t] = segments[..t].iter().filter(|&&earlier| counts(segments[t], earlier)).count() as i32;
            }
        }
    });
}

/// Runs `sample`.
pub(super) fn sample(l: &mut Launch, how: &Sampling) -> Result<(), String> {
    let (rows, width) = l.rows(l.op.args[0]);
    let (logits, numbers, out): (Ptr<f32>, Ptr<i32>, Ptr<i32>) = (l.arg(0), l.arg(2), l.out(0));
    // SAFETY: scalars' buffers hold one element.
    let (key, place) = unsafe { (*l.arg::<Key>(1).0, *l.arg::<i32>(3).0) };
    let wrong = Mutex::new(None);
    l.threads.run(rows, 20 * width, |r| {
        for i in r {
            // SAFETY: row `i` of the logits, elements `i` of row numbers and result.
            let (row, number) = unsafe { (logits.slice(i * width, width), *numbers.add(i).0) };
            match choose(row.iter().map(|&x| f64::from(x)), how, key, number, place) {
                // SAFETY: as above.
                Ok(token) => unsafe { *out.add(i).0 = token },
                Err(why) => *wrong.lock().unwrap_or_else(PoisonError::into_inner) = Some(why),
            }
        }
    });
    wrong.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
