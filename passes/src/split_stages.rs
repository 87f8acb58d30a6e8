//! Cuts the layers of models, and with them every graph, into pieces for the ranks along `pipeline`.
//!
//! ```text
//! mesh pipeline=2                                  at place 0            at place 1
//! graph @g(%x) {                              =>   graph @g.piece.0(%x)  graph @g.piece.1(%x, %piece.4)
//!   %h = ... # layer 0     return y=%y               return piece.4=%h      %y = ... return y=%y
//!   %y = ... # layer 1
//! ```
//!
//! An op belongs to the place of its layer, and one that belongs to no layer to that of what it uses: so what comes before the
//! first layer is at the first place, what comes after the last layer at the last. Ops that share a place and the number
//! of times that values have come from other places are a piece; gradients are pieces of their own. Every rank has
//! all inputs of a graph, so what is cheaply made of inputs alone, or of parameters alone, is made anew in each piece that uses it.
//! What else a piece uses of others becomes an input of it; the host hands it on ([`dsgc_ir::stage::Piece`]).
//!
//! A state is where it is used. Where gradients of a parameter come from several places, as those of a tied head do, each adds
//! up its own, and their sum is taken where the accumulators are read, by all places that have the parameter. One piece
//! reads, adds to and writes an accumulator. Everything else that a graph writes at a place is written by the last piece
//! there, so no piece reads what another one has written.

mod cut;
mod homes;
mod pieces;
mod places;

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::cost::time;
use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{Class, Dim, Op, Phase, Placement, Program, StateKind, Symbol, Type};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use cut::Layer;
use places::Places;

/// The pass.
pub const PASS: Pass = Pass {
    name: "split_stages",
    requires: &[Fact::Typed, Fact::Differentiated, Fact::Partitioned],
    provides: &[],
    // What adds to a gradient at several places is added up at each of them first.
    numerics: Numerics::Reassociating,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    if program.mesh.pipeline == 1 {
        return Ok(program);
    }
    let layers = layers(&program).map_err(|e| vec![e])?;
    for (block, places) in &layers {
        let counts: Vec<String> = (0..program.mesh.pipeline)
            .map(|place| places.iter().filter(|&&of| of == place).count().to_string())
            .collect();
        if context.explain {
            context.changed(format!("layers of `{block}` at each place: {}", counts.join(", ")));
        }
    }
    let all: Places = (0..program.mesh.pipeline).collect();
    let (graphs, homes) = homes::find(&program, &layers);
    let mut own = Vec::new();
    for prepared in &graphs {
        let name = prepared.graph.name.clone();
        match pieces::cut(&program, prepared, &layers, &homes) {
            None => own.push(prepared.graph.clone()),
            Some(cut) => {
                context.matched("piece", cut.pieces.len());
                own.push(cut.inputs);
                let here = cut.graphs.into_iter().zip(&cut.pieces).filter(|(_, piece)| piece.place == program.place);
                own.extend(here.map(|(graph, _)| graph));
                program.stage.pieces.insert(name, cut.pieces);
            }
        }
    }
    program.graphs = own;
    let partial = homes::added_up(&graphs, &homes);
    for (id, homes) in homes.into_iter().filter(|(_, homes)| *homes != all) {
        let state = &mut program.states[id.0 as usize];
        let extents =
            || state.ty.dims.iter().map(|d| d.constant().expect("states have constant dims") as usize).collect();
        let mut placement = state.placement.clone().unwrap_or_else(|| Placement::of_whole(extents()));
        placement.places = homes.into_iter().collect();
        let local = placement.local_at(&program.mesh, program.place);
        state.ty.dims = local.into_iter().map(|extent| Dim::from(extent as i64)).collect();
        state.placement = Some(placement);
    }
    for id in partial {
        let state = &mut program.states[id.0 as usize];
        if let Some(placement) = &mut state.placement {
            placement.partial.get_or_insert(dsgc_ir::Axis::Pipeline);
        }
    }
    Ok(program)
}

/// The place of each layer of every block that repeats.
type Layers = BTreeMap<Symbol, Vec<usize>>;

/// Cuts the layers of all blocks.
fn layers(program: &Program) -> Result<Layers, Diag> {
    let mut blocks: BTreeMap<Symbol, (Vec<Layer>, Layer, Layer, Span)> = BTreeMap::new();
    let mut counted = BTreeSet::new();
    for graph in &program.graphs {
        let bounds = graph.upper_bounds();
        let mut current: Option<Symbol> = None;
        let mut before = Layer::default();
        for (_, op) in graph.ops().filter(|(_, op)| op.site.phase != Phase::Update) {
            let types = |values: Vec<dsgc_ir::Value>| values.into_iter().map(|v| graph.ty(v)).collect::<Vec<&Type>>();
            let time = time(&op.op, &types(op.args.clone()), &types(op.results().collect()), &bounds).unwrap_or(0);
            let mut taken = Layer { time, bytes: 0 };
            if let Op::Read { state } = op.op
                && counted.insert(state)
            {
                let state = program.state(state);
                // Beside a parameter that is trained lie its gradient and two moments.
                let copies = if state.kind == (StateKind::Param { trained: true }) { 4 } else { 1 };
                taken.bytes = copies * state.bytes() as u64;
            }
            let Some(tag) = &op.site.tag else {
                match &current {
                    None => {
                        before.time += taken.time;
                        before.bytes += taken.bytes;
                    }
                    Some(block) => {
                        let after = &mut blocks.get_mut(block).expect("it was met").2;
                        after.time = after.time.saturating_add(taken.time);
                        after.bytes += taken.bytes;
                    }
                }
                continue;
            };
            let block = blocks
                .entry(tag.block.clone())
                .or_insert_with(|| (Vec::new(), Layer::default(), Layer::default(), op.site.loc.span));
            let at = tag.instance as usize;
            if block.0.len() <= at {
                block.0.resize(at + 1, Layer::default());
            }
            block.0[at].time = block.0[at].time.saturating_add(taken.time);
            block.0[at].bytes += taken.bytes;
            block.1.time = block.1.time.saturating_add(before.time);
            block.1.bytes += before.bytes;
            before = Layer::default();
            current = Some(tag.block.clone());
        }
    }
    // Where places have several runs of layers each, they take them in turn.
    let (places, chunks) = (program.mesh.pipeline, program.stage.parallel.virtual_stages);
    if blocks.is_empty() {
        return Err(Diag::error("no model of this stage has layers that repeat, which ranks could share out")
            .label(program.stage.parallel.pipeline, "asked for here")
            .help("leave `pipeline` out"));
    }
    // Of what is in one run of several the plan of memory knows more.
    let most = program.stage.memory.max.filter(|_| chunks == 1).map_or(u64::MAX, |most| most as u64);
    let parallel = &program.stage.parallel;
    let mut all = Layers::new();
    for (name, (layers, before, after, span)) in blocks {
        let (count, runs) = (layers.len(), places * chunks);
        let Some(cut) = cut::cut(&layers, before, after, runs, most) else {
            if count < runs {
                let of = if chunks > 1 { format!(" with {chunks} runs of layers each") } else { String::new() };
                let message = format!("found {places} ranks as `pipeline`{of}, and `{name}` has {count} layers");
                let help = match count / chunks {
                    0 | 1 => "leave `pipeline` out".to_string(),
                    most => format!("write `pipeline: {most}` or less"),
                };
                let diag = Diag::error(message).label(parallel.pipeline, "asked for here");
                return Err(diag.label(span, "layers begin here").help(help));
            }
            let message = format!("no cut of the {count} layers of `{name}` fits into the memory of {places} ranks");
            return Err(Diag::error(message)
                .label(program.stage.memory.span, "the limit is asked for here")
                .help("more ranks along `pipeline` have fewer layers each"));
        };
        let of = cut.iter().enumerate().flat_map(|(run, &own)| std::iter::repeat_n(run % places, own));
        all.insert(name, of.collect());
    }
    Ok(all)
}

/// Whether an op is made anew in each piece that uses it, if its operands are: it is cheap.
fn is_cheap(op: &Op, of_inputs: bool, of_states: bool) -> bool {
    match op.class() {
        Class::Contraction | Class::Collective | Class::Update => false,
        _ if matches!(op, Op::Write { .. }) => false,
        Class::Elementwise | Class::View | Class::Structure => !(of_inputs && of_states),
        _ => !of_states || matches!(op, Op::Read { .. }),
    }
}
