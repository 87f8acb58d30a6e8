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
//! all inputs of a graph, so what is cheaply made of inputs alone, or of parameters alone, is made anew in each piece that uses
//! it; so are parameters gathered. A state that is a single number, as a scale of losses, counts as no state here.
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
use dsgc_ir::held::parts_of_graphs;
use dsgc_ir::schedule::PipelineOrder;
use dsgc_ir::{Class, DType, Dim, Graph, Op, Phase, Placement, Program, StateKind, Symbol, Type, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use cut::{Layer, Room};
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
pub fn run(program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let place = program.place;
    Ok(Split::of(program, context)?.at(place))
}

/// A program in pieces.
pub(crate) struct Split {
    /// With all that is the same at every place, and the graphs of none.
    program: Program,
    /// The graphs of all places, in their order, and the place of each that is a piece.
    graphs: Vec<(Option<usize>, Graph)>,
}

impl Split {
    /// Cuts a program for ranks along `pipeline`; where there is one place, it has all.
    pub(crate) fn of(mut program: Program, context: &PassContext) -> Result<Split, Vec<Diag>> {
        if program.mesh.pipeline == 1 {
            let graphs = std::mem::take(&mut program.graphs);
            return Ok(Split { program, graphs: graphs.into_iter().map(|graph| (None, graph)).collect() });
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
                None => own.push((None, prepared.graph.clone())),
                Some(cut) => {
                    context.matched("piece", cut.pieces.len());
                    own.push((None, cut.inputs));
                    own.extend(cut.pieces.iter().map(|piece| Some(piece.place)).zip(cut.graphs));
                    program.stage.pieces.insert(name, cut.pieces);
                }
            }
        }
        let partial = homes::added_up(&graphs, &homes);
        for (id, homes) in homes.into_iter().filter(|(_, homes)| *homes != all) {
            let state = &mut program.states[id.0 as usize];
            let extents =
                || state.ty.dims.iter().map(|d| d.constant().expect("states have constant dims") as usize).collect();
            let mut placement = state.placement.clone().unwrap_or_else(|| Placement::of_whole(extents()));
            placement.places = homes.into_iter().collect();
            state.placement = Some(placement);
        }
        for id in partial {
            let state = &mut program.states[id.0 as usize];
            if let Some(placement) = &mut state.placement {
                placement.partial.get_or_insert(dsgc_ir::Axis::Pipeline);
            }
        }
        program.graphs.clear();
        Ok(Split { program, graphs: own })
    }

    /// What ranks of a place have of it.
    pub(crate) fn at(&self, place: usize) -> Program {
        let mut program = Program { place, ..self.program.clone() };
        let here = self.graphs.iter().filter(|(of, _)| of.is_none_or(|of| of == place));
        program.graphs = here.map(|(_, graph)| graph.clone()).collect();
        for state in &mut program.states {
            if let Some(placement) = state.placement.as_ref().filter(|placement| !placement.is_at(place)) {
                let local = placement.local_at(&program.mesh, place);
                state.ty.dims = local.into_iter().map(|extent| Dim::from(extent as i64)).collect();
            }
        }
        program
    }
}

/// The place of each layer of every block that repeats.
type Layers = BTreeMap<Symbol, Vec<usize>>;

/// Cuts the layers of all blocks.
fn layers(program: &Program) -> Result<Layers, Diag> {
    let blocks = blocks(program);
    // Where places have several runs of layers each, they take them in turn.
    let (places, chunks) = (program.mesh.pipeline, program.stage.parallel.virtual_stages);
    if blocks.is_empty() {
        return Err(Diag::error("no model of this stage has layers that repeat, which ranks could share out")
            .label(program.stage.parallel.pipeline, "asked for here")
            .help("leave `pipeline` out"));
    }
    let parallel = &program.stage.parallel;
    let parts = parts_of_graphs(program).into_values().max().unwrap_or(1);
    let under_way = |place: usize| match parallel.order {
        PipelineOrder::Gpipe => parts as u64,
        PipelineOrder::ZeroBubble => places.min(parts) as u64,
        PipelineOrder::OneForwardOneBackward | PipelineOrder::Interleaved => (places - place).min(parts) as u64,
    };
    // Of what is in one run of several the plan of memory knows more.
    let most = program.stage.memory.max.filter(|_| chunks == 1);
    let room = most.map(|most| Room { most: most as u64, under_way: &under_way });
    let mut all = Layers::new();
    for (name, Block { layers, before, after, span }) in blocks {
        let (count, runs) = (layers.len(), places * chunks);
        let Some(cut) = cut::cut(&layers, before, after, runs, room.as_ref()) else {
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

/// Layers that repeat.
struct Block {
    layers: Vec<Layer>,
    /// What stands before the first one, and after the last.
    before: Layer,
    after: Layer,
    /// Where they begin.
    span: Span,
}

/// What the layers of all blocks take. It is at most what they do: a cut that has room is never refused.
fn blocks(program: &Program) -> BTreeMap<Symbol, Block> {
    // Bytes of what belongs to a parameter: its gradient, its moments, what it is copied to.
    let mut beside: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, state) in program.state_ids().filter(|(_, state)| !state.on_host) {
        if !matches!(state.kind, StateKind::Param { .. }) {
            let owner = state.name.rsplit_once('.').map_or("", |(owner, _)| owner);
            *beside.entry(owner).or_default() += state.bytes() as u64;
        }
    }
    let mut blocks: BTreeMap<Symbol, Block> = BTreeMap::new();
    let mut counted = BTreeSet::new();
    for graph in &program.graphs {
        let bounds = graph.upper_bounds();
        let kept = places::kept(program, graph);
        let bytes = |value: Value| {
            let ty = graph.ty(value);
            // Between pieces narrow floats are f32.
            let ty = if ty.dtype.is_narrow() { ty.with(DType::F32) } else { ty.clone() };
            ty.bytes(&bounds).unwrap_or(0) as u64
        };
        let mut current: Option<Symbol> = None;
        let mut before = Layer::default();
        for (_, op) in graph.ops().filter(|(_, op)| op.site.phase != Phase::Update) {
            let types = |values: Vec<Value>| values.into_iter().map(|v| graph.ty(v)).collect::<Vec<&Type>>();
            let time = time(&op.op, &types(op.args.clone()), &types(op.results().collect()), &bounds).unwrap_or(0);
            let kept = op.results().filter(|result| kept.contains(result)).map(bytes).fold(0, u64::saturating_add);
            let mut taken = Layer { time, bytes: 0, kept };
            if let Op::Read { state } = op.op
                && counted.insert(state)
                && matches!(program.state(state).kind, StateKind::Param { .. })
            {
                let state = program.state(state);
                let own = if state.on_host { 0 } else { state.bytes() as u64 };
                taken.bytes = own + beside.get(state.name.as_str()).copied().unwrap_or(0);
            }
            let Some(tag) = &op.site.tag else {
                match current.as_ref().and_then(|block| blocks.get_mut(block)) {
                    None => before = before + taken,
                    Some(block) => block.after = block.after + taken,
                }
                continue;
            };
            let block = blocks.entry(tag.block.clone()).or_insert_with(|| Block {
                layers: Vec::new(),
                before: Layer::default(),
                after: Layer::default(),
                span: op.site.loc.span,
            });
            let at = tag.instance as usize;
            if block.layers.len() <= at {
                block.layers.resize(at + 1, Layer::default());
            }
            block.layers[at] = block.layers[at] + taken;
            block.before = block.before + std::mem::take(&mut before);
            current = Some(tag.block.clone());
        }
    }
    blocks
}

/// Whether an op is made anew in each piece that uses it, if its operands are: it is cheap.
fn is_cheap(op: &Op, of_inputs: bool, of_states: bool) -> bool {
    match op.class() {
        Class::Contraction | Class::Update => false,
        // Parameters of which ranks have parts are gathered where they are used: all ranks of a place run the same pieces.
        Class::Collective => of_states && !of_inputs,
        _ if matches!(op, Op::Write { .. }) => false,
        Class::Elementwise | Class::View | Class::Structure => !(of_inputs && of_states),
        _ => !of_states || matches!(op, Op::Read { .. }),
    }
}
