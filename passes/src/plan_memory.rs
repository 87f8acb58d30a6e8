//! Gives every value and state its place in one arena.
//!
//! ```text
//! %a = exp %x : f32[64]                %a = exp %x : f32[64] in values+0:256
//! %b = neg %a : f32[64]           =>   %b = neg %a : f32[64] in values+0:256
//! write @w %b                          write @w %b
//! ```
//!
//! States lie one after the other in the persistent region; what a generation keeps between its calls, at the beginning of
//! the values region, because nothing else runs meanwhile: the values of its graphs follow, those of others lie over it.
//! What is at home in the host's memory has a region there, and is a value of the graph while it is read. Else a read is its state's own bytes, a view its operand's; a
//! value that is written to a state is made in the state's place where nobody reads the old value any more (an old value
//! that is used after the write is copied before it); an elementwise result takes the place of an operand that dies. What is left is packed by live range: best fit in four
//! orders, of which the smallest plan is kept. Sizes are those at the upper bounds of all dims. The peak is exact, as
//! the device has no other memory. Where the device bounds its allocations, a region is a row of them, and nothing lies in
//! two.

use std::borrow::Cow;
use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::held::{held, parts_of_graphs};
use dsgc_ir::schedule::PipelineOrder;
use dsgc_ir::verify::{last_uses, may_be_overwritten, root};
use dsgc_ir::{
    Arena, Bindings, Buffer, Builder, Class, Graph, Level, Op, OpData, OpId, Program, Region, State, StateId,
    StateKind, Target, Type, Value,
};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::Rebuild;

/// The pass.
pub const PASS: Pass = Pass {
    name: "plan_memory",
    requires: &[Fact::Typed, Fact::Differentiated],
    provides: &[Fact::Planned],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass. Errors are limits: a missing kernel, or more memory than the device has.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let target = context.target;
    let large: Vec<Diag> = program.graphs.iter().filter_map(too_large).collect();
    if !large.is_empty() {
        return Err(large);
    }
    let large = larger_than_device(&program, target);
    if !large.is_empty() {
        return Err(large);
    }
    let missing = missing_kernels(&program, target);
    if !missing.is_empty() {
        return Err(missing);
    }
    let allocation = target.allocation();
    let mut arena = Arena { allocation, ..Arena::default() };
    for state in program.states.iter_mut().filter(|state| state.kind != StateKind::Generation) {
        place_state(state, &mut arena, target);
    }
    // Those of all graphs of a generation are the same.
    for graph in 0..program.graphs.len() {
        for (id, offset) in kept_by_generation(&program.graphs[graph], &program, target).0 {
            let state = &mut program.states[id.0 as usize];
            state.buffer = Some(Buffer { region: Region::Values, offset, bytes: state.bytes() });
        }
    }
    // One that no graph uses any more.
    for state in program.states.iter_mut().filter(|state| state.buffer.is_none()) {
        place_state(state, &mut arena, target);
    }
    let mut graphs: Vec<Graph> = program.graphs.iter().map(|g| with_copies(g, &program).into_owned()).collect();
    let limit = limit(&program, target);
    arena.held = most_held(&program);
    let states_on_host = arena.host;
    for graph in &mut graphs {
        graph.scratch = workspaces(graph, target);
        arena.scratch = arena.scratch.max(graph.workspace(&graph.scratch).iter().sum());
    }
    let mut missed = Vec::new();
    for graph in &mut graphs {
        let storages = Storages::new(graph, &program, target);
        let begin = kept_by_generation(graph, &program, target).1;
        let (offsets, used, by) = pack(&storages.all, begin, allocation);
        let (on_host, end, _) = pack(&storages.on_host, states_on_host, None);
        arena.host = arena.host.max(end);
        storages.place(graph, &program, &offsets, &on_host);
        let (in_operands, in_states) = storages.shared(graph);
        context.matched("value in the place of an operand", in_operands);
        context.matched("value in the place of a state", in_states);
        context.matched(&format!("graph packed by {by}"), usize::from(!storages.all.is_empty()));
        if let Some(memory) = limit
            && arena.persistent + used + arena.scratch + arena.held > memory
        {
            missed.push(does_not_fit(graph, &program, &storages, Arena { values: used, ..arena }, memory));
        }
        arena.values = arena.values.max(used);
    }
    if !missed.is_empty() {
        return Err(missed);
    }
    Ok(Program { graphs, arena, level: Level::Planned, ..program })
}

/// Most bytes that pieces of a graph have from each other in the host's memory, beside the arena, which is there all the time.
pub(crate) fn most_held(program: &Program) -> usize {
    let parts = parts_of_graphs(program);
    let of = |name: &String| held(program, name, parts.get(name).copied().unwrap_or(1));
    let all = program.stage.pieces.keys().map(|name| of(name).expect("the verifier saw that every dim is declared"));
    all.max().unwrap_or(0) as usize
}

/// What a limit leaves to the arena: what lies between pieces takes of it too.
pub(crate) fn room(program: &Program, target: &dyn Target) -> Option<usize> {
    limit(program, target).map(|limit| limit.saturating_sub(most_held(program)))
}

/// Most bytes that the arena, and what lies between pieces, may have, if there is a limit: the user's or the device's.
pub(crate) fn limit(program: &Program, target: &dyn Target) -> Option<usize> {
    [program.stage.memory.max, target.memory()].into_iter().flatten().min()
}

/// Bytes of parameters and state on the device.
pub(crate) fn persistent_bytes(program: &Program, target: &dyn Target) -> usize {
    let states = program.states.iter().filter(|state| state.kind != StateKind::Generation && !state.on_host);
    states.map(|state| state.bytes().next_multiple_of(target.alignment())).sum()
}

/// Places what the device or the host keeps of a program's whole life behind what it keeps so far.
fn place_state(state: &mut State, arena: &mut Arena, target: &dyn Target) {
    let bytes = state.bytes();
    let (region, used, allocation) = match state.on_host {
        true => (Region::Host, &mut arena.host, None),
        false => (Region::Persistent, &mut arena.persistent, arena.allocation),
    };
    let offset = whole(*used, bytes, allocation);
    state.buffer = Some(Buffer { region, offset, bytes });
    *used = offset + bytes.next_multiple_of(target.alignment());
}

/// Where the states of the generation that a graph belongs to lie among values, and where its values begin.
fn kept_by_generation(graph: &Graph, program: &Program, target: &dyn Target) -> (Vec<(StateId, usize)>, usize) {
    let mut end = 0;
    let place = |id: StateId| {
        let bytes = program.state(id).bytes();
        let offset = whole(end, bytes, target.allocation());
        end = offset + bytes.next_multiple_of(target.alignment());
        (id, offset)
    };
    let places = program.generation_of(graph).into_iter().map(place).collect();
    (places, end)
}

/// Bytes of workspace of a graph: the largest of an op, and the largest of what runs beside.
pub(crate) fn scratch_bytes(graph: &Graph, target: &dyn Target) -> usize {
    graph.workspace(&workspaces(graph, target)).iter().sum()
}

/// Bytes of workspace that each op's kernel needs.
pub(crate) fn workspaces(graph: &Graph, target: &dyn Target) -> Vec<usize> {
    let bounds = graph.upper_bounds();
    let of = |op: &OpData| target.workspace(&op.op, &types(graph, &op.args), &bounds);
    graph.ops().map(|(_, op)| of(op).next_multiple_of(target.alignment())).collect()
}

/// Most bytes of values that are in use during one op, as [`run`] counts them: what lies in the place of something else
/// counts once. No plan is smaller. Of a graph that no plan can have it is the most that a number holds.
pub fn live_bytes(graph: &Graph, program: &Program, target: &dyn Target) -> usize {
    if too_large(graph).is_some() {
        return usize::MAX;
    }
    let graph = with_copies(graph, program);
    kept_by_generation(&graph, program, target).1 + peak(&Storages::new(&graph, program, target).all).0
}

/// Bytes of values that are in use during each op, counted likewise.
pub(crate) fn live_by_op(graph: &Graph, program: &Program, target: &dyn Target) -> Vec<usize> {
    let mut changes = vec![0i64; graph.len() + 2];
    for storage in Storages::new(graph, program, target).all {
        changes[storage.live.0.max(0) as usize] += storage.bytes as i64;
        changes[storage.live.1 as usize + 1] -= storage.bytes as i64;
    }
    let mut now = kept_by_generation(graph, program, target).1 as i64;
    let live = changes[..graph.len()].iter().map(|change| {
        now += change;
        now as usize
    });
    live.collect()
}

/// Bytes of the values region that a plan of the graph takes.
pub(crate) fn planned_bytes(graph: &Graph, program: &Program, target: &dyn Target) -> usize {
    let graph = with_copies(graph, program);
    let begin = kept_by_generation(&graph, program, target).1;
    pack(&Storages::new(&graph, program, target).all, begin, target.allocation()).1
}

fn types(graph: &Graph, values: &[Value]) -> Vec<Type> {
    values.iter().map(|&v| graph.ty(v).clone()).collect()
}

/// Bytes of the largest value that a plan can have: with more, offsets and costs could not be counted any more.
const LARGEST: usize = 1 << 42;

/// The first value of a graph that is larger than any plan can have it.
pub(crate) fn too_large(graph: &Graph) -> Option<Diag> {
    let bounds = graph.upper_bounds();
    let bytes = |v: Value| graph.ty(v).bytes(&bounds).expect("the verifier saw that every dim is declared");
    let value = graph.values().find(|&v| bytes(v) > LARGEST)?;
    let span = graph.def(value).map_or(Span::NONE, |d| graph.op(d).site.loc.span);
    let message = format!("found a value of type {} in graph @{}, which no memory holds", graph.ty(value), graph.name);
    let bounds: Vec<String> = bounds.iter().map(|(symbol, max)| format!("`{symbol}` up to {max}")).collect();
    let diag = Diag::error(message).label(span, "made here");
    Some(if bounds.is_empty() { diag } else { diag.help(format!("it has {}", bounds.join(", "))) })
}

/// The first state that the device's allocations or kernels cannot have, and the first value and workspace of each graph.
fn larger_than_device(program: &Program, target: &dyn Target) -> Vec<Diag> {
    let name = target.name();
    let why = |what: String, bytes: usize, elements: Option<usize>| {
        let most = target.most_elements().filter(|most| elements.is_some_and(|n| n > *most));
        let counted = most.map(|most| format!("{what}, and kernels of {name} count {most} elements at most"));
        let at_once = target.allocation().filter(|most| bytes > *most);
        let held = at_once.map(|most| format!("{what}, {}, and {name} gives {} at once", size(bytes), size(most)));
        counted.or(held)
    };
    let elements = |ty: &Type, bounds: &Bindings| ty.shape(bounds).map(|shape| shape.iter().product::<usize>()).ok();
    let help = "a smaller `micro_batch_size` or `max_length` needs less of what grows with the batch";
    let state = program.states.iter().find_map(|state| {
        let what = format!("found `@{}` of type {}", state.name, state.ty);
        Some(Diag::error(why(what, state.bytes(), elements(&state.ty, &Bindings::new()))?).label(state.span, ""))
    });
    let of_graph = |graph: &Graph| {
        let bounds = graph.upper_bounds();
        let value = graph.values().find_map(|value| {
            let ty = graph.ty(value);
            let what = format!("found a value of type {ty} in graph @{}", graph.name);
            let bytes = ty.bytes(&bounds).expect("the verifier saw that every dim is declared");
            let span = graph.def(value).map_or(Span::NONE, |d| graph.op(d).site.loc.span);
            Some(Diag::error(why(what, bytes, elements(ty, &bounds))?).label(span, "made here").help(help))
        });
        value.or_else(|| {
            graph.ops().zip(workspaces(graph, target)).find_map(|((_, op), bytes)| {
                let what = format!("found workspace of `{}` in graph @{}", op.op.name(), graph.name);
                Some(Diag::error(why(what, bytes, None)?).label(op.site.loc.span, "used here").help(help))
            })
        })
    };
    state.into_iter().chain(program.graphs.iter().filter_map(of_graph)).collect()
}

/// One message per op and operand types for which the device has no kernel.
fn missing_kernels(program: &Program, target: &dyn Target) -> Vec<Diag> {
    let mut all: Vec<Diag> = Vec::new();
    for (graph, op) in program.graphs.iter().flat_map(|graph| graph.ops().map(move |(_, op)| (graph, op))) {
        if let Some(why) = target.missing_kernel(&op.op, &types(graph, &op.args)) {
            let diag = Diag::error(format!("{} has no kernel for `{}`: {why}", target.name(), op.op.name()));
            if !all.iter().any(|d| d.message == diag.message) {
                all.push(diag.label(op.site.loc.span, "used here"));
            }
        }
    }
    all
}

/// The graph with copies of old values of states that are used after their state is written.
fn with_copies<'a>(graph: &'a Graph, program: &Program) -> Cow<'a, Graph> {
    let mut direct: Vec<u32> = vec![0; graph.values().len()];
    for (id, op) in graph.ops() {
        for arg in &op.args {
            direct[arg.0 as usize] = id.0;
        }
    }
    for (_, output) in &graph.outputs {
        direct[output.0 as usize] = graph.len() as u32;
    }
    // Values that are a state's old value or views of it, per state.
    let mut old: BTreeMap<StateId, Vec<Value>> = BTreeMap::new();
    for value in graph.values() {
        if let Some(def) = graph.def(root(graph, value))
            && let Op::Read { state } = graph.op(def).op
            // What is copied from the host stays what it was.
            && !program.state(state).on_host
        {
            old.entry(state).or_default().push(value);
        }
    }
    let used_after = |state: StateId, write: OpId| {
        let direct = &direct;
        old.get(&state).into_iter().flatten().filter(move |v| direct[v.0 as usize] > write.0)
    };
    let needed = |(id, op): (OpId, &OpData)| match op.op {
        Op::Write { state } => used_after(state, id).next().is_some(),
        _ => false,
    };
    if !graph.ops().any(needed) {
        return Cow::Borrowed(graph);
    }
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        if let Op::Write { state } = op.op {
            for &old in used_after(state, id) {
                let Some(now) = rebuild.find(old) else { continue };
                let mut b = Builder::new(&mut rebuild.new, op.site.clone());
                let shape = b.ty(now).dims;
                let copy = b.one(Op::Broadcast { shape }, &[now]);
                rebuild.set(old, copy);
            }
        }
        rebuild.copy(op, program);
    }
    Cow::Owned(rebuild.finish())
}

/// Bytes that one or more values share, from the first one's definition to the last one's last use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Storage {
    /// Aligned size.
    bytes: usize,
    /// First and last op during which the bytes are in use; inputs are there before op 0.
    live: (i64, i64),
}

impl Storage {
    fn meets(&self, other: &Storage) -> bool {
        self.live.0 <= other.live.1 && other.live.0 <= self.live.1
    }
}

/// Which values share bytes.
struct Storages {
    all: Vec<Storage>,
    /// Those in the host's memory.
    on_host: Vec<Storage>,
    /// Per value, what its bytes are.
    of: Vec<Home>,
    bounds: Bindings,
}

/// Where a value's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    /// In the place of the state with this index.
    State(usize),
    /// In the values region, in this storage.
    Storage(usize),
    /// In the host's memory, in this storage.
    Host(usize),
}

impl Storages {
    fn new(graph: &Graph, program: &Program, target: &dyn Target) -> Storages {
        let bounds = graph.upper_bounds();
        let bytes = |v: Value| graph.ty(v).bytes(&bounds).expect("the verifier saw that every dim is declared");
        let last = last_uses(graph);
        let end = |v: Value| i64::from(last[v.0 as usize]);
        let written = written_in_place(graph, program, &last);
        let spare = Spare::of(graph, &written, &last);
        let mut storages = Storages { all: Vec::new(), on_host: Vec::new(), of: Vec::new(), bounds: bounds.clone() };
        let fresh = |all: &mut Vec<Storage>, v: Value, start: i64| {
            all.push(Storage { bytes: bytes(v).next_multiple_of(target.alignment()), live: (start, end(v)) });
            Home::Storage(all.len() - 1)
        };
        for input in graph.inputs() {
            let home = fresh(&mut storages.all, input, -1);
            storages.of.push(home);
        }
        for (id, op) in graph.ops() {
            let mut taken: Vec<usize> = Vec::new();
            for (r, result) in op.results().enumerate() {
                let home = match op.op {
                    Op::Read { state } if !program.state(state).on_host => Home::State(state.0 as usize),
                    Op::ToHost {} => {
                        fresh(&mut storages.on_host, result, i64::from(id.0));
                        Home::Host(storages.on_host.len() - 1)
                    }
                    _ if op.op.class() == Class::View => storages.of[op.args[0].0 as usize],
                    _ => match written[result.0 as usize] {
                        Some(state) => Home::State(state),
                        None => {
                            // The place of an operand that dies here.
                            let dying = op.op.in_place(op.args.len()).into_iter().find_map(|(res, arg)| {
                                let arg = op.args[arg];
                                let home = storages.of[arg.0 as usize];
                                let dies = match home {
                                    Home::Storage(s) => {
                                        storages.all[s].live.1 == i64::from(id.0) && !taken.contains(&s)
                                    }
                                    Home::State(state) => spare.has(state, id, last[result.0 as usize]),
                                    Home::Host(_) => false,
                                };
                                let fits = res == r
                                    && dies
                                    && graph.ty(arg).dtype.bytes() == graph.ty(result).dtype.bytes()
                                    && bytes(arg) == bytes(result)
                                    && may_be_overwritten(graph, op, arg, result);
                                fits.then_some(home)
                            });
                            match dying {
                                Some(Home::State(state)) => Home::State(state),
                                Some(Home::Storage(s)) => {
                                    taken.push(s);
                                    storages.all[s].live.1 = end(result);
                                    Home::Storage(s)
                                }
                                Some(Home::Host(_)) | None => fresh(&mut storages.all, result, i64::from(id.0)),
                            }
                        }
                    },
                };
                storages.of.push(home);
            }
        }
        storages
    }

    /// How many results are made in the place of an operand, and in that of a state.
    fn shared(&self, graph: &Graph) -> (usize, usize) {
        let (mut stored, mut in_states) = (0, 0);
        for (_, op) in graph.ops().filter(|(_, op)| op.op.class() != Class::View) {
            for result in op.results() {
                match self.of[result.0 as usize] {
                    Home::Storage(_) => stored += 1,
                    Home::State(_) => in_states += usize::from(!matches!(op.op, Op::Read { .. })),
                    Home::Host(_) => {}
                }
            }
        }
        (stored - (self.all.len() - graph.inputs().count()), in_states)
    }

    /// Writes the offsets into the graph, on the device and in the host's memory.
    fn place(&self, graph: &mut Graph, program: &Program, offsets: &[usize], on_host: &[usize]) {
        for value in graph.values() {
            let bytes = graph.ty(value).bytes(&self.bounds).expect("the verifier saw every dim");
            let buffer = match self.of[value.0 as usize] {
                Home::State(state) => program.states[state].buffer.expect("states are placed first"),
                Home::Storage(s) => Buffer { region: Region::Values, offset: offsets[s], bytes },
                Home::Host(s) => Buffer { region: Region::Host, offset: on_host[s], bytes },
            };
            graph.set_buffer(value, buffer);
        }
    }
}

/// The places of states between the last use of the old value and the new one's coming: what works in place of the old value
/// may stay there meanwhile, as the sum over ranks of a gradient that was added up.
struct Spare {
    /// Per state that is written: the last op that uses its old value, and the first that uses the place again.
    from_to: BTreeMap<usize, (u32, u32)>,
}

impl Spare {
    fn of(graph: &Graph, written: &[Option<usize>], last: &[u32]) -> Spare {
        let mut from_to = BTreeMap::new();
        for (id, op) in graph.ops() {
            if let Op::Write { state } = op.op {
                from_to.insert(state.0 as usize, (0, id.0));
            }
        }
        for (id, op) in graph.ops() {
            if let Op::Read { state } = op.op
                && let Some((from, _)) = from_to.get_mut(&(state.0 as usize))
            {
                *from = (*from).max(last[op.result().0 as usize]);
            }
            for result in op.results() {
                if let Some((_, to)) = written[result.0 as usize].and_then(|state| from_to.get_mut(&state)) {
                    *to = (*to).min(id.0);
                }
            }
        }
        Spare { from_to }
    }

    /// Whether the place of a state is free for what an op makes, which is needed until another one.
    fn has(&self, state: usize, op: OpId, until: u32) -> bool {
        self.from_to.get(&state).is_some_and(|&(from, to)| from == op.0 && until < to)
    }
}

/// Per value, the state whose place it is made in: the value is written to it, and when it is made, the state's old
/// value has been read for the last time, at the latest by the very op that may work in place.
fn written_in_place(graph: &Graph, program: &Program, last: &[u32]) -> Vec<Option<usize>> {
    let mut places: Vec<Option<usize>> = vec![None; graph.values().len()];
    let mut reads: BTreeMap<StateId, Vec<Value>> = BTreeMap::new();
    for (_, op) in graph.ops() {
        if let Op::Read { state } = op.op {
            reads.entry(state).or_default().push(op.result());
        }
    }
    for (_, write) in graph.ops() {
        let Op::Write { state } = write.op else { continue };
        if program.state(state).on_host {
            continue;
        }
        let made = root(graph, write.args[0]);
        let Some(def) = graph.def(made) else { continue };
        let op = graph.op(def);
        let is_read = matches!(op.op, Op::Read { .. });
        let one_size =
            *graph.ty(made) == program.state(state).ty || graph.ty(made).len() == program.state(state).ty.len();
        if is_read || !one_size || places[made.0 as usize].is_some() {
            continue;
        }
        let result = op.results().position(|r| r == made).expect("the op defines it");
        let in_place = op.op.in_place(op.args.len());
        let free = reads.get(&state).into_iter().flatten().all(|&old| {
            let works_in_place = in_place.iter().any(|&(res, arg)| res == result && root(graph, op.args[arg]) == old);
            let until = OpId(last[old.0 as usize]);
            let may = works_in_place && may_be_overwritten(graph, op, old, made);
            until < def || (until == def && may && uses(op.args.as_slice(), graph, old) == 1)
        });
        if free {
            places[made.0 as usize] = Some(state.0 as usize);
        }
    }
    places
}

/// How many of these operands are a value or a view of it.
fn uses(args: &[Value], graph: &Graph, value: Value) -> usize {
    args.iter().filter(|&&a| root(graph, a) == value).count()
}

/// An order of storages, by the numbers that sort them.
type Key<'a> = &'a dyn Fn(usize) -> (i64, i64);

/// Offsets of all storages, the size of the region, and the best of four orders, which gave them.
fn pack(storages: &[Storage], begin: usize, allocation: Option<usize>) -> (Vec<usize>, usize, &'static str) {
    let span = |s: &Storage| s.live.1 - s.live.0;
    let area = |s: &Storage| s.bytes as i64 * (span(s) + 1);
    let orders: [(&str, Key); 4] = [
        ("size", &|i| (-(storages[i].bytes as i64), storages[i].live.0)),
        ("size times life", &|i| (-area(&storages[i]), storages[i].live.0)),
        ("life", &|i| (-span(&storages[i]), -(storages[i].bytes as i64))),
        ("birth", &|i| (storages[i].live.0, -(storages[i].bytes as i64))),
    ];
    let bound = begin + peak(storages).0;
    let mut best: Option<(Vec<usize>, usize, &'static str)> = None;
    for (name, key) in orders {
        let mut order: Vec<usize> = (0..storages.len()).collect();
        order.sort_by_key(|&i| (key(i), i));
        let (offsets, used) = best_fit(storages, &order, begin, allocation);
        if best.as_ref().is_none_or(|b| used < b.1) {
            best = Some((offsets, used, name));
        }
        if best.as_ref().is_some_and(|b| b.1 == bound) {
            break;
        }
    }
    best.unwrap_or((Vec::new(), begin, orders[0].0))
}

/// Places storages in this order, each in the smallest gap between those that it meets, or behind them.
fn best_fit(storages: &[Storage], order: &[usize], begin: usize, allocation: Option<usize>) -> (Vec<usize>, usize) {
    let mut offsets = vec![begin; storages.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(storages.len());
    let mut total = begin;
    for &i in order {
        let storage = &storages[i];
        // `placed` is sorted by offset.
        let (mut end, mut gap): (usize, Option<(usize, usize)>) = (begin, None);
        for &j in placed.iter().filter(|&&j| storages[j].meets(storage) && storages[j].bytes > 0) {
            let start = whole(end, storage.bytes, allocation);
            let room = offsets[j].saturating_sub(start);
            if room >= storage.bytes && gap.is_none_or(|g| room < g.0) {
                gap = Some((room, start));
            }
            end = end.max(offsets[j] + storages[j].bytes);
        }
        offsets[i] = gap.map_or_else(|| whole(end, storage.bytes, allocation), |g| g.1);
        total = total.max(offsets[i] + storage.bytes);
        let at = placed.partition_point(|&j| offsets[j] <= offsets[i]);
        placed.insert(at, i);
    }
    (offsets, total)
}

/// The first place from an offset on where so many bytes lie in one allocation.
fn whole(offset: usize, bytes: usize, allocation: Option<usize>) -> usize {
    match allocation {
        Some(each) if offset % each + bytes > each => offset.next_multiple_of(each),
        _ => offset,
    }
}

/// Most bytes that are in use during one op, and the op; no plan is smaller.
fn peak(storages: &[Storage]) -> (usize, i64) {
    let mut changes: Vec<(i64, i64)> = Vec::new();
    for s in storages {
        changes.extend([(s.live.0, s.bytes as i64), (s.live.1 + 1, -(s.bytes as i64))]);
    }
    changes.sort_unstable();
    let (mut now, mut most) = (0i64, (0i64, -1i64));
    for (i, &(at, change)) in changes.iter().enumerate() {
        now += change;
        let complete = changes.get(i + 1).is_none_or(|next| next.0 != at);
        if complete && now > most.0 {
            most = (now, at);
        }
    }
    (most.0 as usize, most.1)
}

/// The limit, with the values that take most of the memory when most is in use.
fn does_not_fit(graph: &Graph, program: &Program, storages: &Storages, arena: Arena, memory: usize) -> Diag {
    let needed = arena.total() + arena.held;
    let asked = &program.stage.memory;
    let who = if asked.max == Some(memory) { "`memory` allows" } else { "the device has" };
    let between = if arena.held > 0 { format!(", between pieces {}", size(arena.held)) } else { String::new() };
    let mut diag = Diag::error(format!(
        "graph @{} needs at least {} of memory, {who} {}: parameters and state {}, values {}, workspace {}{between}",
        graph.name,
        size(needed),
        size(memory),
        size(arena.persistent),
        size(arena.values),
        size(arena.scratch),
    ));
    if asked.max == Some(memory) {
        diag = diag.label(asked.span, "the limit");
    }
    if arena.held > 0 && program.stage.parallel.order == PipelineOrder::Gpipe {
        diag = diag.help("`schedule: 1f1b` has fewer parts under way, so less lies between pieces");
    }
    let (_, at) = peak(&storages.all);
    let mut largest: Vec<(usize, Value)> = graph
        .values()
        .filter_map(|v| match storages.of[v.0 as usize] {
            Home::Storage(s) if storages.all[s].live.0 <= at && at <= storages.all[s].live.1 => {
                Some((storages.all[s].bytes, v))
            }
            _ => None,
        })
        .collect();
    largest.sort_by_key(|&(bytes, v)| (std::cmp::Reverse(bytes), v));
    for (bytes, value) in largest.into_iter().take(3) {
        let span = graph.def(value).map_or(Span::NONE, |d| graph.op(d).site.loc.span);
        diag = diag.label(span, format!("{}, {}", graph.ty(value), size(bytes)));
    }
    diag
}

/// `1.5 MiB`.
pub(crate) fn size(bytes: usize) -> String {
    let units = [("GiB", 1usize << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random and are the same everywhere (Marsaglia's xorshift).
    fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move |below| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x % below
        }
    }

    #[test]
    fn plans_never_overlap_and_are_near_the_bound() {
        let (mut planned, mut bounds) = (0, 0);
        for seed in 1..=200 {
            let mut next = numbers(seed);
            let count = 1 + next(80) as usize;
            let storages: Vec<Storage> = (0..count)
                .map(|_| {
                    let start = next(60) as i64;
                    Storage { bytes: 64 * (1 + next(40)) as usize, live: (start, start + next(15) as i64) }
                })
                .collect();
            let (offsets, total, _) = pack(&storages, 0, None);
            let apart = |offsets: &[usize], i: usize, j: usize| {
                let (a, b) = (offsets[i], offsets[j]);
                a + storages[i].bytes <= b || b + storages[j].bytes <= a
            };
            // The largest storage fills an allocation.
            let each = 64 * 40;
            let (cut, most, _) = pack(&storages, 0, Some(each));
            for i in 0..count {
                assert!(cut[i] / each == (cut[i] + storages[i].bytes - 1) / each, "seed {seed}: storage {i} is cut");
                assert!(cut[i] + storages[i].bytes <= most);
                assert!(offsets[i] + storages[i].bytes <= total);
                for j in (0..i).filter(|&j| storages[i].meets(&storages[j])) {
                    assert!(apart(&offsets, i, j), "seed {seed}: storages {i} and {j} overlap");
                    assert!(apart(&cut, i, j), "seed {seed}: storages {i} and {j} overlap in allocations");
                }
            }
            let bound = peak(&storages).0;
            assert!(bound <= total, "seed {seed}: the bound {bound} is above the plan {total}");
            (planned, bounds) = (planned + total, bounds + bound);
        }
        assert!(planned * 100 <= bounds * 105, "plans take {planned}, the bounds are {bounds}");
    }

    #[test]
    fn the_peak_is_the_fullest_moment() {
        let storage = |bytes, from, to| Storage { bytes, live: (from, to) };
        assert_eq!(peak(&[storage(64, 0, 2), storage(128, 2, 3), storage(64, 3, 5)]), (192, 2));
        assert_eq!(peak(&[]).0, 0);
    }
}
