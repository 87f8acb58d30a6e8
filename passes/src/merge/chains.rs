//! Additions whose terms are made for nothing else: sums of squares, and rows of an embedding's gradient.
//!
//! Each takes the place of its last addition, so no op moves.

use dsgc_ir::infer::Contraction;
use dsgc_ir::{DType, Graph, Op, OpData, Program, Value};

use crate::pipeline::PassContext;
use crate::rebuild::Rebuild;

/// Merges them; what they were made of is left without a use.
pub(super) fn merge(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let uses = uses(graph);
    let sums = sums_of_squares(graph, &uses);
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        let (new, args) = if let Some(tensors) = &sums[id.0 as usize] {
            context.matched("sums of squares", tensors.len());
            (Op::SumSquares {}, tensors.clone())
        } else if let Some((x, [indices, rows])) = added_rows(graph, op, &uses) {
            context.matched("rows added to a table", 1);
            (Op::AddRows {}, vec![x, indices, rows])
        } else {
            rebuild.copy(op, program);
            continue;
        };
        let args: Vec<Value> = args.into_iter().map(|arg| rebuild.get(arg)).collect();
        rebuild.push(op, new, &args, program);
    }
    rebuild.finish()
}

/// How often each value is used.
fn uses(graph: &Graph) -> Vec<u32> {
    let mut uses = vec![0; graph.values().len()];
    for value in graph.ops().flat_map(|(_, op)| &op.args).chain(graph.outputs.iter().map(|(_, value)| value)) {
        uses[value.0 as usize] += 1;
    }
    uses
}

/// Per op, the tensors whose squares it sums, if it is the last addition of such a sum; in the order of the sum.
fn sums_of_squares(graph: &Graph, uses: &[u32]) -> Vec<Option<Vec<Value>>> {
    let mut sums: Vec<Option<Vec<Value>>> = vec![None; graph.len()];
    for (id, op) in graph.ops() {
        let Op::Add {} = op.op else { continue };
        // Of each term, what it sums: a product of a tensor with itself, or a sum of some before.
        let term = |value: Value| {
            let def = graph.def(value).filter(|_| uses[value.0 as usize] == 1)?;
            let term = graph.op(def);
            let own = square(graph, term).map(|tensor| vec![tensor]).or_else(|| sums[def.0 as usize].clone())?;
            (term.site.phase == op.site.phase).then_some((def, own))
        };
        let (Some(a), Some(b)) = (term(op.args[0]), term(op.args[1])) else { continue };
        // The sum runs from the first to the last: one of the two terms is a lone one, and comes last.
        let (first, last) = match (a.1.len(), b.1.len()) {
            (_, 1) => (a, b),
            (1, _) => (b, a),
            _ => continue,
        };
        sums[first.0.0 as usize] = None;
        sums[id.0 as usize] = Some([first.1, last.1].concat());
    }
    sums
}

/// The tensor of which an op sums the squares.
fn square(graph: &Graph, op: &OpData) -> Option<Value> {
    let Op::Contract { spec } = &op.op else { return None };
    let labels = Contraction::parse(spec).ok()?;
    let all = labels.out.is_empty() && labels.lhs == labels.rhs;
    let wide = graph.ty(op.args[0]).dtype == DType::F32;
    (all && wide && op.args[0] == op.args[1]).then(|| op.args[0])
}

/// What an addition adds an embedding's gradient to, and indices and rows of the latter.
fn added_rows(graph: &Graph, op: &OpData, uses: &[u32]) -> Option<(Value, [Value; 2])> {
    let Op::Add {} = op.op else { return None };
    [(op.args[0], op.args[1]), (op.args[1], op.args[0])].into_iter().find_map(|(x, added)| {
        let added = graph.op(graph.def(added).filter(|_| uses[added.0 as usize] == 1)?);
        let Op::EmbedGrad { .. } = added.op else { return None };
        Some((x, [added.args[0], added.args[1]]))
    })
}
