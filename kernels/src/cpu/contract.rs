//! Products: every contraction as matrix products with strides, without copies.
//!
//! The letters of `contract` fall into four groups: in both operands and the result (batch), in the left operand and
//! the result (m), in the right operand and the result (n), in both operands only (k). Letters of a group that lie one
//! behind the other in memory are joined; the largest of each group is the dim of a matrix product, what is left over
//! is a loop around it.

use super::Launch;
use super::gemm::{self, Matrix, Product};
use super::memory::Ptr;
use super::parallel::Threads;
use super::reduce;
use super::skinny;
use super::structure::strides;
use dsgc_ir::infer::Contraction;

/// A letter: its extent, and its strides in the left operand, the right operand and the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Letter {
    extent: usize,
    left: usize,
    right: usize,
    out: usize,
}

/// Independent products from which on every one is a task of its own.
const MANY: usize = 8;

/// Bytes of workspace: of a sum of products, and of products in blocks.
pub(super) fn workspace(spec: &str, left: &[usize], right: &[usize], threads: usize) -> usize {
    let len = |shape: &[usize]| shape.iter().product::<usize>();
    let out = Contraction::parse(spec).map_or(0, |labels| {
        let extent = |x| {
            let left = labels.lhs.iter().position(|&y| y == x).map(|i| left[i]);
            left.or_else(|| labels.rhs.iter().position(|&y| y == x).map(|i| right[i])).unwrap_or(1)
        };
        labels.out.iter().map(|&x| extent(x)).product()
    });
    reduce::workspace(len(left)).max(gemm::workspace(len(left), len(right), out, threads))
}

/// Runs a contraction.
pub(super) fn run(l: &mut Launch, spec: &str) -> Result<(), String> {
    let labels = Contraction::parse(spec)?;
    let (a, b, c) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]), l.shape(l.result()));
    let stride = |side: &[char], shape: &[usize], letter| {
        side.iter().position(|&x| x == letter).map_or(0, |i| strides(shape)[i])
    };
    let extent = |letter| {
        let left = labels.lhs.iter().position(|&x| x == letter).map(|i| a[i]);
        left.or_else(|| labels.rhs.iter().position(|&x| x == letter).map(|i| b[i])).unwrap_or(1)
    };
    let letter = |x: char| Letter {
        extent: extent(x),
        left: stride(&labels.lhs, &a, x),
        right: stride(&labels.rhs, &b, x),
        out: stride(&labels.out, &c, x),
    };
    let group = |all: &[char], keep: &dyn Fn(char) -> bool| {
        join(all.iter().copied().filter(|&x| keep(x)).map(letter).filter(|x| x.extent != 1).collect())
    };
    let (in_left, in_right, in_out) =
        (|x| labels.lhs.contains(&x), |x| labels.rhs.contains(&x), |x| labels.out.contains(&x));
    let mut batch = group(&labels.out, &|x| in_left(x) && in_right(x));
    let (m, more_m) = largest(group(&labels.out, &|x| in_left(x) && !in_right(x)));
    let (n, more_n) = largest(group(&labels.out, &|x| !in_left(x) && in_right(x)));
    let summed = group(&labels.lhs, &|x| !in_out(x));
    // A sum over nothing is one product of matrices without inner dim: zeros.
    let (k, more_k) = if summed.iter().any(|x| x.extent == 0) { Default::default() } else { largest(summed) };
    batch.extend(more_m);
    batch.extend(more_n);

    let (left, right, out): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.out(0));
    if l.len(l.result()) == 0 {
        return Ok(());
    }
    if batch.is_empty() && more_k.is_empty() && (m.extent, n.extent) == (1, 1) && (k.left, k.right) == (1, 1) {
        reduce::dot(l, left, right, out, k.extent);
        return Ok(());
    }
    let dense = (k.left, k.right, n.out) == (1, 1, 1);
    if batch.is_empty() && more_k.is_empty() && dense && skinny::fits(m.extent, n.extent, k.extent) {
        let part = skinny::Part { n: n.extent, w: (right, n.right), out: (out, m.out) };
        // SAFETY: extents and strides are those of the operands and the result.
        unsafe { skinny::run(l.threads, (m.extent, k.extent), (left, m.left), &[part], l.workspace()) };
        return Ok(());
    }
    let loops: usize = batch.iter().map(|x| x.extent).product();
    let sums: usize = more_k.iter().map(|x| x.extent).product();
    let (elements, scratch) = ([l.op.args[0], l.op.args[1], l.result()].map(|v| l.len(v)), l.workspace::<u8>());
    let product = |i: usize, threads: Option<&Threads>, scratch: Ptr<u8>| {
        let at = offsets(&batch, i);
        for s in 0..sums {
            let sum = offsets(&more_k, s);
            // SAFETY: all offsets come from the extents and strides of the operands and the result, which hold their
            // elements; products of different `i` write different elements of the result.
            unsafe {
                let product = Product {
                    threads,
                    size: (m.extent, n.extent, k.extent),
                    left: Matrix { at: left.add(at.left + sum.left), row: m.left, column: k.left },
                    right: Matrix { at: right.add(at.right + sum.right), row: k.right, column: n.right },
                    out: Matrix { at: out.add(at.out), row: m.out, column: n.out },
                    accumulate: s > 0,
                    scratch,
                };
                product.run();
            }
        }
    };
    // Decided by the number of products alone, so that results do not depend on the number of threads.
    if loops >= MANY {
        let weight = 2 * m.extent * n.extent * k.extent * sums;
        let (parts, bytes) =
            (l.threads.count().min(loops), gemm::workspace_alone(elements[0], elements[1], elements[2]));
        l.threads.run(parts, loops.div_ceil(parts) * weight, |r| {
            for part in r {
                // SAFETY: the workspace has so many bytes for every thread.
                let scratch = unsafe { scratch.add(part * bytes) };
                (loops * part / parts..loops * (part + 1) / parts).for_each(|i| product(i, None, scratch));
            }
        });
    } else {
        (0..loops).for_each(|i| product(i, Some(l.threads), scratch));
    }
    Ok(())
}

/// Joins letters that lie one behind the other in all three tensors.
fn join(letters: Vec<Letter>) -> Vec<Letter> {
    let mut joined: Vec<Letter> = Vec::new();
    for next in letters {
        match joined.last_mut() {
            Some(last)
                if last.left == next.left * next.extent
                    && last.right == next.right * next.extent
                    && last.out == next.out * next.extent =>
            {
                *last = Letter { extent: last.extent * next.extent, ..next };
            }
            _ => joined.push(next),
        }
    }
    joined
}

/// The letter with the largest extent, and the others.
fn largest(mut letters: Vec<Letter>) -> (Letter, Vec<Letter>) {
    let Some(at) = (0..letters.len()).max_by_key(|&i| letters[i].extent) else {
        return (Letter { extent: 1, ..Letter::default() }, letters);
    };
    (letters.remove(at), letters)
}

/// Where product `i` of all loops begins in the three tensors.
fn offsets(loops: &[Letter], i: usize) -> Letter {
    let (mut rest, mut at) = (i, Letter::default());
    for x in loops.iter().rev() {
        let here = rest % x.extent;
        rest /= x.extent;
        at.left += here * x.left;
        at.right += here * x.right;
        at.out += here * x.out;
    }
    at
}
