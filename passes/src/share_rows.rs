//! Texts of a batch share rows where a recipe says that they may, so that no row is filled up with padding: a batch of `n` texts is
//! as few rows of its longest text's length as the host finds ([`Packing::Batch`]).
//!
//! ```text
//! a b c d .                a b c d .
//! e f . . .        =>      e f g h i
//! g h i . .
//! ```
//!
//! The recipe says what no graph shows: that a token counts by its own text only. What is seen here would make other numbers of
//! rows: outputs that have some, a count of them, dropout, whose numbers belong to places of rows, and several ranks, which share the rows out. There
//! every text keeps a row for itself.

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Operand, Operands, Packing, Rows, Statement};
use dsgc_ir::{Dim, Graph, Op, Program};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};

/// The pass. No row is longer than before, and there are not more, so it never costs anything.
pub const PASS: Pass = Pass {
    name: "share_rows",
    requires: &[Fact::Typed, Fact::Adapted],
    provides: &[],
    numerics: Numerics::Reassociating,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let drops = program.graphs.iter().any(|g| g.ops().any(|(_, op)| matches!(op.op, Op::Dropout { .. })));
    let names: Vec<String> = program.stage.sources.iter().map(|source| source.name.clone()).collect();
    let counted: Vec<bool> = names.iter().map(|name| rows_are_counted(&program, name)).collect();
    let alone = program.mesh.ranks() == 1;
    for (source, counted) in program.stage.sources.iter_mut().zip(counted) {
        if source.packing != Packing::Batch {
            continue;
        }
        if drops || counted || !alone {
            source.packing = Packing::None;
            continue;
        }
        context.matched("source whose texts share rows", 1);
        context.changed(format!("texts of a batch of `{}` share rows", source.name));
    }
    Ok(program)
}

/// Whether something depends on the rows of a source's batches as such.
fn rows_are_counted(program: &Program, source: &str) -> bool {
    let stage = &program.stage;
    let mut batches = vec![format!("{source}.eval")];
    named(&stage.plan, source, &mut batches);
    let mut counted = false;
    let mut look = |graph: &str, args: &Operands| {
        let takes = |name: &String| {
            let inside = |path: &String| path.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with('.'));
            args.iter().any(|(_, operand)| matches!(operand, Operand::Path(path) if inside(path)))
        };
        counted |= batches.iter().any(takes) && program.graph(graph).is_none_or(counts_rows);
    };
    let bodies = stage.evaluate.iter().map(|evaluate| &evaluate.body).chain([&stage.plan]);
    bodies.for_each(|body| calls(body, &mut look));
    counted || whole_batches(&stage.plan, &batches)
}

/// The names under which a plan has batches of a source.
fn named(body: &[Statement], source: &str, names: &mut Vec<String>) {
    for statement in body {
        match statement {
            Statement::For { batch, rows: Rows::Source(of), .. } if of == source => names.push(batch.clone()),
            Statement::Next { name, source: of } if of == source => names.push(name.clone()),
            _ => {}
        }
        if let Statement::For { body, .. } | Statement::Repeat { body, .. } = statement {
            named(body, source, names);
        }
    }
}

/// All calls and terms of updates.
fn calls(body: &[Statement], look: &mut impl FnMut(&str, &Operands)) {
    for statement in body {
        match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => calls(body, look),
            Statement::Call(call) => look(&call.graph, &call.args),
            Statement::Update(update) => update.terms.iter().for_each(|term| look(&term.graph, &term.args)),
            _ => {}
        }
    }
}

/// Whether a plan does anything else with a batch than to call graphs with it.
fn whole_batches(body: &[Statement], batches: &[String]) -> bool {
    let is_of = |path: &String| {
        batches.iter().any(|name| path.strip_prefix(name.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('.')))
    };
    body.iter().any(|statement| match statement {
        Statement::For { rows: Rows::Minibatches { table, .. }, body, .. } => {
            is_of(table) || whole_batches(body, batches)
        }
        Statement::For { body, .. } | Statement::Repeat { body, .. } => whole_batches(body, batches),
        Statement::Generate(generate) => is_of(&generate.prompt),
        Statement::Join { parts, .. } => parts.iter().any(is_of),
        Statement::Recent { table, .. } => is_of(table),
        Statement::Call(_) | Statement::Next { .. } | Statement::Update(_) => false,
    })
}

/// Whether an output of a graph has rows of its batch, or the graph asks how many there are.
fn counts_rows(graph: &Graph) -> bool {
    let of_batch = |dim: &Dim| dim.symbols().iter().any(|symbol| Some(symbol) == graph.batch.as_ref());
    graph.outputs.iter().any(|(_, value)| graph.ty(*value).dims.iter().any(of_batch))
        || graph.ops().any(|(_, op)| matches!(&op.op, Op::Size { dim, .. } if of_batch(dim)))
}
