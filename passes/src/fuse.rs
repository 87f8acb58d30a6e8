//! Joins elementwise ops to regions that go over memory once.
//!
//! ```text
//! %b = broadcast %bias shape=[B, T, 8]       %z = fused %x, %bias shape=[B, T, 8]
//! %y = add %x, %b                       =>        body={$2 = add $0, $1; $3 = relu $2; return $3}
//! %z = relu %y
//! ```
//!
//! A region has one shape and one layer, so equal layers stay equal, and is part of the forward pass, of the backward pass or of
//! the update. Broadcasts disappear into it: an
//! operand that is stretched is read as it is, a stretched constant becomes a step. Values that are used inside only
//! have no memory any more; others are results.
//!
//! Around a reduction over the last dims, a region takes in what is reduced, what is computed of the row's values, and what
//! takes those values stretched along the row again:
//!
//! ```text
//! %s = mul %x, %x                            %y = fused %x, %n shape=[B, 8]
//! %t = reduce_sum %s axes=[1]           =>       body={$2 = mul $0, $0; $3 = reduce_sum $2 axes=[1];
//! %r = sqrt %t                                         $4 = sqrt $3; $5 = div $0, $4; return $5}
//! %k = reshape %r shape=[B, 1]
//! %b = broadcast %k shape=[B, 8]
//! %y = div %x, %b
//! ```
//!
//! A reduction over the first dims or over all, as that of a bias' gradient, is a region's end: nothing in it takes the
//! result. It goes behind the op that makes its operand, before others take that. A region has one reduction. Of two in a row, what takes the first one's value goes to the second one if that moves
//! no more bytes: a softmax is its largest element and the rest, and stores no `exp`. A region that finishes a product
//! (below) has none, because a product that is neither written nor read saves more.
//!
//! Ops are taken in program order. Each begins a region and takes in the regions that made its operands, as long as
//! nothing that runs between them needs their values; so no cycle can arise, and a region stands where its last op
//! stood. Every step saves a read, so bytes moved only fall. Where other work lies in between, operands of the older
//! region wait longer and its values need not: it is taken in only if what waits is not larger. A state's old value is
//! never read later than the op that makes the new one, which may lie in its place.
//!
//! Bits do not change: every step of a region rounds as the op did, and a device adds in the op's order.
//!
//! Then regions finish products (`products`), where the target has a kernel for that.

mod products;
mod regions;

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Graph, Op, OpData, OpId, Program, Target, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};
pub(crate) use regions::is_step;
use regions::{Regions, ends_region, has_reductions, stretches};

/// The pass.
pub const PASS: Pass = Pass { name: "fuse", requires: &[Fact::Typed], provides: &[], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    program.graphs = program.graphs.iter().map(|graph| fused(graph, &program, context)).collect();
    for (_, op) in program.graphs.iter().flat_map(|g| g.ops()) {
        if let Op::Fused { body, .. } = &op.op {
            let reduces = body.reduction().is_some();
            context.matched(if reduces { "regions around a reduction" } else { "regions of elementwise ops" }, 1);
        }
    }
    Ok(program)
}

/// A graph with its regions, of which some finish products.
pub(crate) fn fused(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    // Every value of a region has a use; operands that regions take without a broadcast leave it dead.
    let alive = |graph: &Graph| without_dead_ops(graph, program);
    products::finish(&alive(&fuse(&sums_early(&alive(graph), program), program, context.target)), program, context)
}

/// The graph where every reduction with which a region may end stands behind the elementwise op that makes its operand.
fn sums_early(graph: &Graph, program: &Program) -> Graph {
    let mut behind: BTreeMap<OpId, Vec<&OpData>> = BTreeMap::new();
    for (_, op) in graph.ops().filter(|(_, op)| ends_region(graph, op)) {
        if let Some(def) = graph.def(op.args[0]).filter(|&def| is_step(graph, graph.op(def))) {
            behind.entry(def).or_default().push(op);
        }
    }
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        let is_made = op.results().next().is_some_and(|result| rebuild.find(result).is_some());
        if !is_made {
            rebuild.copy(op, program);
        }
        behind.get(&id).into_iter().flatten().for_each(|sum| rebuild.copy(sum, program));
    }
    rebuild.finish()
}

/// The graph with its elementwise ops and reductions joined.
fn fuse(graph: &Graph, program: &Program, target: &dyn Target) -> Graph {
    let regions = Regions::grow(graph, has_reductions(target));
    let pays = |members: &Vec<OpId>| {
        !members.is_empty() && regions.gains(members) && regions.op(members).has_kernel(graph, target)
    };
    let pays: Vec<bool> = regions.members.iter().map(pays).collect();
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        let region = regions.region[id.0 as usize].filter(|&region| pays[region]);
        match region.map(|region| &regions.members[region]) {
            // What it looks at is yet to come; it is made when it is needed, if it is.
            None if stretches(op) && rebuild.find(op.args[0]).is_none() => {}
            None => {
                op.args.iter().for_each(|&arg| make(arg, &mut rebuild, program));
                rebuild.copy(op, program);
            }
            Some(members) if *members.last().expect("a region has an op") == id => {
                regions.operands(members).iter().for_each(|operand| make(operand.0, &mut rebuild, program));
                regions.push(members, &mut rebuild);
            }
            // Its region is yet to come.
            Some(_) => {}
        }
    }
    graph.outputs.iter().for_each(|&(_, value)| make(value, &mut rebuild, program));
    rebuild.finish()
}

/// Makes a view of a region's result, or a broadcast, that stood before the region.
fn make(value: Value, rebuild: &mut Rebuild, program: &Program) {
    let graph = rebuild.old;
    if rebuild.find(value).is_none()
        && let Some(def) = graph.def(value)
    {
        let op = graph.op(def);
        op.args.iter().for_each(|&arg| make(arg, rebuild, program));
        rebuild.copy(op, program);
    }
}
