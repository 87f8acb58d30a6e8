//! Ops that belong together become one: fewer launches, and less memory passed over.
//!
//! ```text
//! %q = contract %x, %wq spec=btd,vd->btv
//! %k = contract %x, %wk spec=btd,vd->btv   =>   %q, %k = contract_each %x, %wq, %wk spec=btd,vd->btv common=0
//! ```
//!
//! Products with one operand in common are such: queries, keys and values; gate and up; the gradients of their weights. So
//! are the optimizer's updates of one layer with equal settings, and what is sent between ranks for one layer in one direction, as
//! far as starting a message takes longer than passing over its bytes twice more (`together`). Sums of squares, which make up the
//! gradient's norm, become one op, and the rows that an embedding's gradient has are added to the gradient that the table
//! has already, with no table of zeros in between (`chains`). The log-probabilities of a head are made with its logits,
//! which are then never stored whole, and where the loss lets them, with their gradients (`head`).
//!
//! An op over many operands is exactly those ops: the weights stay where they are, and nothing is copied together or cut
//! apart again. Layers stay equal, because ops of different layers are never merged but for the norm, which has none. The
//! gradient of what products have in common stays a sum of products: one longer product would add in another order.

mod chains;
mod head;
mod together;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Graph, Program};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::without_dead_ops;

/// The pass.
pub const PASS: Pass = Pass {
    name: "merge",
    requires: &[Fact::Typed, Fact::Differentiated],
    provides: &[],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    program.graphs = program.graphs.iter().map(|graph| merge(graph, &program, context)).collect();
    Ok(program)
}

/// A graph with what belongs together as one op.
pub(crate) fn merge(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let graph = without_dead_ops(&chains::merge(graph, program, context), program);
    let graph = without_dead_ops(&head::merge(&graph, program, context), program);
    together::merge(&graph, program, context)
}
