//! A head's log-probabilities and their gradients, by blocks of rows: logits lie in the workspace, never in a value.

use cubecl::prelude::*;
use dsgc_ir::{Buffer, Op};

use super::index::Store;
use super::target::ALIGNMENT;
use super::{Launch, contract, tokens};

/// Logits of a block, where the vocabulary allows.
const BLOCK: usize = 1 << 24;

/// Rows of a block are so many or a multiple, so that each block of every tensor begins at an aligned place.
const ROWS: usize = ALIGNMENT / 4;

/// Rows of a block of `n` with a vocabulary of `width`.
pub(super) fn rows(n: usize, width: usize) -> usize {
    (BLOCK / width.max(1) / ROWS * ROWS).clamp(ROWS, n.next_multiple_of(ROWS).max(ROWS))
}

/// Bytes of workspace for `n` rows and a head of this shape.
pub(super) fn workspace(n: usize, head: &[usize]) -> usize {
    rows(n, head[0]).min(n) * head[0] * 4
}

/// Either op: operands x, head, tokens, and with gradients that of the log-probabilities.
pub(super) fn run<R: Runtime>(l: &Launch<R>) {
    let head = l.shape(l.op.args[1]);
    let (n, width, depth) = (l.len(l.op.args[2]), head[0], head[1]);
    let results: Vec<Buffer> = l.op.results().map(|value| l.buffer(value)).collect();
    let operands: Vec<Buffer> = l.op.args.iter().map(|&value| l.buffer(value)).collect();
    let of_head = matches!(l.op.op, Op::HeadLogpGrad { head: true }).then(|| results[2]);
    if let (0, Some(of_head)) = (n, of_head) {
        l.memory.clear(l.client, of_head);
    }
    let block = rows(n, width);
    for first in (0..n).step_by(block) {
        let count = block.min(n - first);
        let part =
            |of: Buffer, each: usize| Buffer { offset: of.offset + first * each * 4, bytes: count * each * 4, ..of };
        let logits = Buffer { bytes: count * width * 4, ..l.scratch() };
        let matrix = |of: Buffer, columns: usize| (of, vec![count, columns]);
        let x = part(operands[0], depth);
        let table = (operands[1], head.clone());
        let product = [matrix(x, depth), table.clone(), matrix(logits, width)];
        contract::multiply(l, "nd,vd->nv", product, false);
        let chosen = part(operands[2], 1);
        tokens::token_logp(l, [logits, chosen, part(results[0], 1)], (count, width), Store::Word);
        if let Op::HeadLogpGrad { .. } = l.op.op {
            tokens::token_logp_grad(l, [logits, chosen, part(operands[3], 1), logits], (count, width), Store::Word);
            let of_x = matrix(part(results[1], depth), depth);
            contract::multiply(l, "nv,vd->nd", [matrix(logits, width), table, of_x], false);
            if let Some(of_head) = of_head {
                let operands = [matrix(logits, width), matrix(x, depth), (of_head, head.clone())];
                contract::multiply(l, "nv,nd->vd", operands, first > 0);
            }
        }
    }
}
