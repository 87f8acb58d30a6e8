//! Log-probabilities of a linear head in blocks of rows: the logits of a block are made, used and forgotten.
//!
//! With gradients, a block's logits become their own gradient where they lie, which then goes into both products; so what
//! a whole tensor of logits would take from memory six times stays in the cache, and its divisors are taken once.

use super::gemm::{self, Matrix, Product};
use super::logp::{logp_and_grad_row, logp_row};
use super::memory::{ALIGNMENT, Ptr};
use super::tokens::check;
use super::{Launch, parallel::Threads};

/// Rows of a block. The head's gradient is read and written once for each, so per byte of it there are half as many
/// operations as rows: enough that memory does not bind.
const ROWS: usize = 1024;

/// Bytes for the logits of a block, and for products with them.
pub(super) fn workspace(rows: usize, head: &[usize], threads: usize) -> usize {
    let (rows, vocabulary, width) = (rows.min(ROWS), head[0], head[1]);
    let products = [(rows, vocabulary, width), (rows, width, vocabulary), (vocabulary, width, rows)];
    let products = products.map(|size| gemm::workspace(size, threads));
    logits_bytes(rows, vocabulary) + products.into_iter().max().unwrap_or(0)
}

fn logits_bytes(rows: usize, vocabulary: usize) -> usize {
    (rows.min(ROWS) * vocabulary * size_of::<f32>()).next_multiple_of(ALIGNMENT)
}

/// What all blocks work on.
struct Head<'a> {
    threads: &'a Threads,
    width: usize,
    vocabulary: usize,
    x: Ptr<f32>,
    head: Ptr<f32>,
    tokens: &'a [i32],
    logits: Ptr<f32>,
    /// Workspace of products.
    scratch: Ptr<u8>,
    logp: Ptr<f32>,
}

/// Where gradients come from and go.
struct Gradients {
    of_logp: Ptr<f32>,
    of_x: Ptr<f32>,
    of_head: Option<Ptr<f32>>,
}

/// Runs `head_logp`, or `head_logp_grad` if `head` says whether the head's gradient is wanted.
pub(super) fn run(l: &mut Launch, head: Option<bool>) -> Result<(), String> {
    let n = l.len(l.op.args[2]);
    let (vocabulary, width) = l.rows(l.op.args[1]);
    let gradients = head.map(|head| Gradients {
        of_logp: l.arg(3),
        of_x: l.out(1),
        of_head: if head { Some(l.out(2)) } else { None },
    });
    let tokens: Ptr<i32> = l.arg(2);
    // SAFETY: the operand holds a token per row.
    let tokens = unsafe { tokens.slice(0, n) };
    check(tokens, vocabulary, "token")?;
    let (x, weights, logits, logp) = (l.arg(0), l.arg(1), l.workspace(), l.out(0));
    // SAFETY: behind the logits, the workspace has what products need.
    let scratch = unsafe { l.workspace::<u8>().add(logits_bytes(n, vocabulary)) };
    let head = Head { threads: l.threads, width, vocabulary, x, head: weights, tokens, logits, scratch, logp };
    if let Some(Gradients { of_head: Some(of_head), .. }) = &gradients
        && n == 0
    {
        // SAFETY: the result has an element for each of the head's.
        unsafe { of_head.slice_mut(0, vocabulary * width) }.fill(0.0);
    }
    for first in (0..n).step_by(ROWS) {
        let rows = ROWS.min(n - first);
        // SAFETY: the rows lie in all operands and results, and the workspace holds their logits.
        unsafe { head.block(first, rows, gradients.as_ref()) };
    }
    Ok(())
}

impl Head<'_> {
    /// # Safety
    /// There are so many rows from `first` on.
    unsafe fn block(&self, first: usize, rows: usize, gradients: Option<&Gradients>) {
        let (d, v) = (self.width, self.vocabulary);
        let matrix = |at: Ptr<f32>, row: usize| Matrix { at, row, column: 1 };
        let turned = |m: Matrix<f32>| Matrix { row: m.column, column: m.row, ..m };
        let product = |size, [left, right, out]: [Matrix<f32>; 3], accumulate| Product {
            threads: Some(self.threads),
            size,
            left,
            right,
            out,
            accumulate,
            finish: None,
            scratch: self.scratch,
        };
        // SAFETY: extents and strides are those of the operands; the caller says that the rows are there.
        unsafe {
            let x = matrix(self.x.add(first * d), d);
            let (head, logits) = (matrix(self.head, d), matrix(self.logits, v));
            product((rows, v, d), [x, turned(head), logits], false).run();
            self.threads.run(rows, 8 * v, |r| {
                for i in r {
                    let (row, token) = (self.logits.add(i * v).0, self.tokens[first + i] as usize);
                    let gradient = gradients.map(|g| *g.of_logp.add(first + i).0);
                    *self.logp.add(first + i).0 = match gradient {
                        Some(gradient) => logp_and_grad_row(row, v, token, gradient, row),
                        None => logp_row(self.logits.slice(i * v, v), token),
                    };
                }
            });
            let Some(gradients) = gradients else { return };
            let of_x = matrix(gradients.of_x.add(first * d), d);
            product((rows, d, v), [logits, head, of_x], false).run();
            if let Some(of_head) = gradients.of_head {
                product((v, d, rows), [turned(logits), x, matrix(of_head, d)], first > 0).run();
            }
        }
    }
}
