//! What ranks along `pipeline` hold in the host's memory between the pieces of a graph.

use std::collections::{BTreeMap, BTreeSet};

use crate::dim::Symbol;
use crate::program::Program;
use crate::schedule::order_of_pieces;
use crate::stage::{CallSteps, Piece, Rows, Statement, UpdateSteps};
use crate::types::{DType, Type};

/// In how many parts a full batch goes through each graph, by name; graphs that are called for a whole batch at once are not named.
pub fn parts_of_graphs(program: &Program) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    collect(program, &program.stage.plan, (1, 1), &mut found);
    program.stage.evaluate.iter().for_each(|evaluate| collect(program, &evaluate.body, (1, 1), &mut found));
    found
}

fn collect(program: &Program, plan: &[Statement], of: (usize, usize), found: &mut BTreeMap<String, usize>) {
    let (rows, micro) = of;
    // Ranks with different rows have equal shares of them.
    let parts = rows.div_ceil(program.mesh.data).div_ceil(micro.max(1));
    let add = |found: &mut BTreeMap<String, usize>, graph: &String| {
        let most = found.entry(graph.clone()).or_default();
        *most = parts.max(*most);
    };
    for statement in plan {
        match statement {
            Statement::For { rows: Rows::Source(source), body, .. } => {
                let source = program.stage.sources.iter().find(|s| s.name == *source);
                collect(program, body, source.map_or((1, 1), |s| (s.batch_size, s.micro_batch_size)), found);
            }
            Statement::For { rows: Rows::Minibatches { size, .. }, body, .. } => {
                collect(program, body, (*size, micro), found);
            }
            Statement::Repeat { body, .. } => collect(program, body, of, found),
            Statement::Update(update) => {
                if let Some(UpdateSteps::Split { terms, .. }) = &update.steps {
                    let graphs = terms.iter().flat_map(|term| term.count.iter().chain([&term.grad]));
                    graphs.for_each(|graph| add(found, graph));
                }
            }
            Statement::Call(call) => {
                if let Some(CallSteps::Split { count, rows, .. }) = &call.steps {
                    count.iter().chain([rows]).for_each(|graph| add(found, graph));
                }
            }
            Statement::Generate(_) | Statement::Next { .. } | Statement::Join { .. } | Statement::Recent { .. } => {}
        }
    }
}

/// Most bytes that pieces of a graph have from each other and from other places at the program's place, and have not used up,
/// where a batch goes through in so many parts. In the host's memory narrow floats are f32. An unbound symbol otherwise.
pub fn held(program: &Program, graph: &str, parts: usize) -> Result<u64, Symbol> {
    let Some(pieces) = program.stage.pieces.get(graph) else { return Ok(0) };
    let place = program.place;
    let order = order_of_pieces(program.stage.parallel.order, pieces, program.mesh.pipeline, parts);
    // By piece, what those of this place take from it, and the last one that does.
    let mut taken: BTreeMap<usize, (BTreeSet<&String>, usize)> = BTreeMap::new();
    let mut bytes: BTreeMap<&String, u64> = BTreeMap::new();
    for (at, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.place == place) {
        for of in &piece.takes {
            let (values, last) = taken.entry(of.piece).or_default();
            values.extend(&of.values);
            *last = at;
            for value in &of.values {
                bytes.insert(value, bytes_of_input(program, piece, value)?);
            }
        }
    }
    let size = |of: usize| taken.get(&of).map_or(0, |(values, _)| values.iter().map(|value| bytes[value]).sum());
    let (mut now, mut most) = (BTreeMap::<(usize, usize), u64>::new(), 0);
    for &(part, at) in &order[place] {
        for of in pieces[at].takes.iter().map(|taken| taken.piece).chain([at]) {
            now.insert((part, of), size(of));
        }
        most = most.max(now.values().sum());
        now.retain(|&(of_part, of), _| of_part != part || taken.get(&of).is_some_and(|(_, last)| *last > at));
    }
    Ok(most)
}

fn bytes_of_input(program: &Program, piece: &Piece, value: &str) -> Result<u64, Symbol> {
    let graph = program.graph(&piece.graph).unwrap_or_else(|| panic!("bug: @{} is of another place", piece.graph));
    let input = graph.input_named(value).unwrap_or_else(|| panic!("bug: @{} does not take `{value}`", piece.graph));
    let ty: &Type = graph.ty(input);
    let ty = if ty.dtype.is_narrow() { ty.with(DType::F32) } else { ty.clone() };
    Ok(ty.bytes(&graph.upper_bounds())? as u64)
}
