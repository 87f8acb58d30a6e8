//! The verifier: what every program must satisfy, stricter at each level.
//!
//! It runs after every pass in debug builds and in all tests. A failure is always a bug of ours.

use std::collections::BTreeSet;
use std::ops::Deref;

use crate::dim::{Dim, Symbol};
use crate::graph::{Buffer, Graph, OpData, OpId, Region, Value};
use crate::infer::infer;
use crate::op::{Class, Op};
use crate::print::value_names;
use crate::program::{Level, Program, StateKind};
use crate::types::{DType, Type};

/// What is wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The graph; empty for the program itself.
    pub graph: String,
    /// The op at fault, if one is.
    pub op: Option<OpId>,
    /// What is wrong.
    pub message: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.op {
            Some(op) => write!(f, "graph @{}, op {}: {}", self.graph, op.0, self.message),
            None => write!(f, "graph @{}: {}", self.graph, self.message),
        }
    }
}

impl std::error::Error for Fault {}

/// Checks a program at its own level; the first fault found.
pub fn verify(program: &Program) -> Result<(), Fault> {
    let fault = |message: String| Fault { graph: String::new(), op: None, message };
    let mut names = BTreeSet::new();
    for state in &program.states {
        if !names.insert(&state.name) {
            return Err(fault(format!("`@{}` is declared twice", state.name)));
        }
        if state.ty.dims.iter().any(|d| d.constant().is_none_or(|n| n < 0)) {
            return Err(fault(format!("`@{}` has the type {}; its dims must be numbers", state.name, state.ty)));
        }
    }
    copies_fit(program).map_err(fault)?;
    placements_fit(program).map_err(fault)?;
    let mut names = BTreeSet::new();
    for graph in &program.graphs {
        if !names.insert(&graph.name) {
            return Err(fault(format!("graph `@{}` is defined twice", graph.name)));
        }
        logical(program, graph)?;
        collectives_fit(program, graph)?;
        waits_fit(graph)?;
        if program.level == Level::Planned {
            planned(program, graph)?;
        }
    }
    pieces_fit(program)?;
    if program.level == Level::Planned {
        states_are_placed(program)?;
    }
    Ok(())
}

/// Pieces of this place are graphs, which take and give what pieces say.
fn pieces_fit(program: &Program) -> Result<(), Fault> {
    for (name, pieces) in &program.stage.pieces {
        let fault = |message: String| Err(Fault { graph: name.clone(), op: None, message });
        for (at, piece) in pieces.iter().enumerate() {
            if piece.place >= program.mesh.pipeline {
                return fault(format!("piece {at} is at place {} of {}", piece.place, program.mesh.pipeline));
            }
            if let Some(odd) = piece.takes.iter().find(|taken| taken.piece >= pieces.len() || taken.piece == at) {
                return fault(format!("piece {at} takes something from piece {}", odd.piece));
            }
            if piece.place != program.place {
                continue;
            }
            let Some(graph) = program.graph(&piece.graph) else {
                return fault(format!("its piece @{} does not exist", piece.graph));
            };
            let mut taken = piece.takes.iter().flat_map(|taken| &taken.values);
            if let Some(value) = taken.find(|value| graph.input_named(value).is_none()) {
                return fault(format!("piece @{} has no input `{value}`", piece.graph));
            }
            let others = pieces.iter().flat_map(|other| &other.takes).filter(|taken| taken.piece == at);
            let mut given = others.flat_map(|taken| &taken.values).chain(&piece.gives);
            if let Some(value) = given.find(|value| graph.output_named(value).is_none()) {
                return fault(format!("piece @{} has no output `{value}`", piece.graph));
            }
        }
    }
    Ok(())
}

fn logical(program: &Program, graph: &Graph) -> Result<(), Fault> {
    let fault = |op, message: String| Err(Fault { graph: graph.name.clone(), op, message });
    let declared: BTreeSet<&Symbol> = graph.dims.iter().map(|d| &d.symbol).collect();
    let undeclared = |dim: &Dim| dim.symbols().into_iter().find(|s| !declared.contains(s));
    if let Some(twice) = first_twice(graph.dims.iter().map(|d| &d.symbol)) {
        return fault(None, format!("dim `{twice}` is declared twice"));
    }
    if let Some(d) = graph.dims.iter().find(|d| d.min < 0 || d.min > d.max) {
        return fault(None, format!("the range of dim `{}` is empty", d.symbol));
    }
    if let Some(batch) = graph.batch.as_ref().filter(|b| !declared.contains(b)) {
        return fault(None, format!("the batch dim `{batch}` is not declared"));
    }
    if let Some(twice) = first_twice(graph.inputs().map(|v| graph.name_of(v))) {
        return fault(None, format!("two inputs are called `{twice}`"));
    }
    if let Some(twice) = first_twice(graph.outputs.iter().map(|(name, _)| name)) {
        return fault(None, format!("two outputs are called `{twice}`"));
    }
    for value in graph.values() {
        for dim in &graph.ty(value).dims {
            if let Some(symbol) = undeclared(dim) {
                return fault(graph.def(value), format!("dim `{symbol}` is not declared"));
            }
            if dim.constant().is_some_and(|n| n < 0) {
                return fault(graph.def(value), format!("a dim is {dim}"));
            }
        }
    }
    let (mut defined, mut written) = (graph.inputs().len() as u32, BTreeSet::new());
    for (id, op) in graph.ops() {
        if let Some(late) = op.args.iter().find(|a| a.0 >= defined) {
            return fault(Some(id), format!("%{} is used before it is defined", late.0));
        }
        if let Some(symbol) = op.op.dims().into_iter().find_map(undeclared) {
            return fault(Some(id), format!("dim `{symbol}` is not declared"));
        }
        let types: Vec<Type> = op.args.iter().map(|&a| graph.ty(a).clone()).collect();
        let state = match op.op {
            Op::Read { state } | Op::Write { state } => match program.states.get(state.0 as usize) {
                Some(s) => Some((state, &s.ty)),
                None => return fault(Some(id), format!("state {} does not exist", state.0)),
            },
            _ => None,
        };
        match infer(&op.op, &types, state.map(|s| s.1)) {
            Err(why) => return fault(Some(id), why),
            Ok(results) => {
                if !results.iter().eq(op.results().map(|v| graph.ty(v))) {
                    return fault(Some(id), format!("`{}` has other results than inferred", op.op.name()));
                }
            }
        }
        match (&op.op, state) {
            (Op::Write { .. }, Some((state, _))) if !written.insert(state) => {
                return fault(Some(id), format!("`@{}` is written twice", program.state(state).name));
            }
            (Op::Read { .. }, Some((state, _))) if written.contains(&state) => {
                return fault(Some(id), format!("`@{}` is read after it was written", program.state(state).name));
            }
            _ => {}
        }
        defined += op.results().len() as u32;
    }
    let behind = program.state_ids().find(|(id, state)| match state.kind {
        StateKind::Copy { of } => written.contains(&of) != written.contains(id),
        StateKind::Param { .. } | StateKind::State | StateKind::Scratch | StateKind::Generation => false,
    });
    if let Some((_, copy)) = behind {
        return fault(None, format!("`@{}` and what it copies are not written together", copy.name));
    }
    match graph.outputs.iter().find(|(_, v)| v.0 >= defined) {
        Some((name, _)) => fault(None, format!("output `{name}` is not defined")),
        None => Ok(()),
    }
}

/// A copy is a parameter as narrow floats, or quantised.
fn copies_fit(program: &Program) -> Result<(), String> {
    for copy in &program.states {
        let StateKind::Copy { of } = copy.kind else { continue };
        let fits = program.states.get(of.0 as usize).is_some_and(|of| {
            matches!(of.kind, StateKind::Param { .. })
                && (of.ty.dtype, of.whole_dims()) == (DType::F32, copy.whole_dims())
                && (copy.ty.dtype.is_narrow() || copy.ty.dtype.is_quantized())
        });
        if !fits {
            return Err(format!("`@{}` is {}, which is no copy of a parameter in f32", copy.name, copy.ty));
        }
    }
    Ok(())
}

/// What a rank holds of a state is what the mesh leaves of the whole.
fn placements_fit(program: &Program) -> Result<(), String> {
    for state in &program.states {
        let Some(placement) = &state.placement else { continue };
        if program.level == Level::Logical {
            return Err(format!("`@{}` is in parts, and nothing is yet", state.name));
        }
        if placement.cuts.iter().any(|cut| cut.dim >= placement.whole.len()) {
            return Err(format!("a cut of `@{}` is along no dim of it", state.name));
        }
        if !placement.places.is_empty() && placement.whole.is_empty() {
            return Err(format!("`@{}` is one number, which every rank has", state.name));
        }
        if placement.places.iter().any(|&place| place >= program.mesh.pipeline) {
            return Err(format!("`@{}` is at {:?} of {} ranks", state.name, placement.places, program.mesh.pipeline));
        }
        let local = placement.local_at(&program.mesh, program.place);
        if state.ty.dims.iter().map(Dim::constant).ne(local.iter().map(|&n| Some(n as i64))) {
            return Err(format!("`@{}` is {}, and a rank's part of it is {local:?}", state.name, state.ty));
        }
    }
    Ok(())
}

/// Ranks send each other something only where there are several, and as many as the mesh has.
fn collectives_fit(program: &Program, graph: &Graph) -> Result<(), Fault> {
    for (id, op) in graph.ops() {
        let fault = |message: String| Err(Fault { graph: graph.name.clone(), op: Some(id), message });
        let extent = |arg: Value, axis: usize| graph.ty(arg).dims[axis].constant().unwrap_or_default() as usize;
        let fits = match &op.op {
            Op::AllReduce { .. } => true,
            Op::AllGather { over, axis, lens } => {
                let part = |len: &usize| len.div_ceil(program.mesh.size(*over));
                op.args.iter().zip(lens).all(|(&arg, len)| extent(arg, *axis) == part(len))
            }
            Op::ReduceScatter { over, ranks, .. } | Op::Shard { over, ranks, .. } => *ranks == program.mesh.size(*over),
            _ => continue,
        };
        if program.level == Level::Logical {
            return fault(format!("`{}`, and nothing is in parts yet", op.op.name()));
        }
        if !fits {
            return fault(format!("`{}` does not fit the mesh {}", op.op, program.mesh));
        }
    }
    Ok(())
}

/// Waits are for collectives, once for each result, and keep what the collective needs; nothing else uses the result.
fn waits_fit(graph: &Graph) -> Result<(), Fault> {
    let beside = graph.beside();
    let is_sent = |v: &Value| graph.def(*v).is_some_and(|def| beside[def.0 as usize]);
    let mut waited = BTreeSet::new();
    for (id, op) in graph.ops() {
        let fault = |message: &str| Err(Fault { graph: graph.name.clone(), op: Some(id), message: message.into() });
        let Op::Wait {} = op.op else {
            if op.args.iter().any(is_sent) {
                return fault("what is on its way is used");
            }
            continue;
        };
        let sends = graph.def(op.args[0]).map(|def| graph.op(def));
        let Some(sends) = sends.filter(|sends| sends.op.class() == Class::Collective) else {
            return fault("`wait` for what no rank sends");
        };
        let needed: &[Value] = if let Op::AllReduce { .. } = sends.op { &[] } else { &sends.args };
        if op.args[1..] != *needed {
            return fault("`wait` does not keep what is sent");
        }
        if !waited.insert(op.args[0]) {
            return fault("`wait` for what has come");
        }
    }
    match graph.outputs.iter().find(|(_, value)| is_sent(value)) {
        Some((name, _)) => {
            let message = format!("output `{name}` is on its way");
            Err(Fault { graph: graph.name.clone(), op: None, message })
        }
        None => Ok(()),
    }
}

/// The first of some names that came before.
fn first_twice<T: Ord>(names: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = BTreeSet::new();
    for name in names {
        if seen.contains(&name) {
            return Some(name);
        }
        seen.insert(name);
    }
    None
}

fn states_are_placed(program: &Program) -> Result<(), Fault> {
    let fault = |message: String| Err(Fault { graph: String::new(), op: None, message });
    let mut placed: Vec<(Buffer, &str)> = Vec::new();
    for state in &program.states {
        let Some(buffer) = state.buffer else {
            return fault(format!("`@{}` has no buffer", state.name));
        };
        let among_values = buffer.region == Region::Values && state.kind == StateKind::Generation;
        let home = if state.on_host { Region::Host } else { Region::Persistent };
        if !(buffer.region == home || among_values) || buffer.bytes < state.bytes() {
            return fault(format!("`@{}` does not fit its buffer", state.name));
        }
        if among_values {
            continue;
        }
        let end = if state.on_host { program.arena.host } else { program.arena.persistent };
        if buffer.offset + buffer.bytes > end {
            return fault(format!("`@{}` leaves the arena", state.name));
        }
        if !program.arena.is_whole(buffer.offset, buffer.bytes) {
            return fault(format!("`@{}` lies in two allocations", state.name));
        }
        placed.push((buffer, &state.name));
    }
    placed.sort_by_key(|(b, _)| (b.region, b.offset));
    let overlap = |a: Buffer, b: Buffer| a.region == b.region && a.offset + a.bytes > b.offset;
    match placed.windows(2).find(|w| overlap(w[0].0, w[1].0)) {
        Some(w) => fault(format!("`@{}` and `@{}` overlap", w[0].1, w[1].1)),
        None => Ok(()),
    }
}

/// The last op that uses each value, by operand; outputs live to the end. A view keeps its operand alive: the last
/// use of a view is a use of everything it looks at.
pub fn last_uses(graph: &Graph) -> Vec<u32> {
    let mut last: Vec<u32> = graph.values().map(|v| graph.def(v).map_or(0, |d| d.0)).collect();
    for (id, op) in graph.ops() {
        for arg in &op.args {
            last[arg.0 as usize] = last[arg.0 as usize].max(id.0);
        }
    }
    for (_, value) in &graph.outputs {
        last[value.0 as usize] = graph.len() as u32;
    }
    for (_, op) in graph.ops().rev() {
        if op.op.class() == Class::View {
            let view = last[op.result().0 as usize];
            let base = &mut last[op.args[0].0 as usize];
            *base = (*base).max(view);
        }
    }
    last
}

/// Runs through the graph and checks that no op writes over bytes that are read later.
fn planned(program: &Program, graph: &Graph) -> Result<(), Fault> {
    let names = value_names(graph);
    let fault = |op, message: String| Err(Fault { graph: graph.name.clone(), op, message });
    let bounds = graph.upper_bounds();
    let last = last_uses(graph);
    let size_of = |region| match region {
        Region::Persistent => program.arena.persistent,
        Region::Values => program.arena.values,
        Region::Scratch => program.arena.scratch,
        Region::Host => program.arena.host,
    };
    let is_on_host = |value: Value| graph.def(value).is_some_and(|def| matches!(graph.op(def).op, Op::ToHost {}));
    let states_on_host: Vec<Buffer> = program.states.iter().filter(|s| s.on_host).filter_map(|s| s.buffer).collect();
    for value in graph.values() {
        let Some(b) = graph.buffer(value) else {
            return fault(graph.def(value), format!("%{} has no buffer", names[value.0 as usize]));
        };
        let bytes = graph.ty(value).bytes(&bounds).unwrap_or(usize::MAX);
        if bytes > b.bytes
            || b.offset + b.bytes > size_of(b.region)
            || b.region == Region::Scratch
            || (b.region == Region::Host) != is_on_host(value)
        {
            return fault(graph.def(value), format!("%{} does not fit its buffer", names[value.0 as usize]));
        }
        if !program.arena.is_whole(b.offset, b.bytes) {
            return fault(graph.def(value), format!("%{} lies in two allocations", names[value.0 as usize]));
        }
    }
    for (id, op) in graph.ops() {
        if !matches!(op.op, Op::FromHost {}) && op.args.iter().any(|&arg| is_on_host(arg)) {
            return fault(Some(id), "an op works in the host's memory".into());
        }
    }
    let has_workspace = |&bytes: &usize| bytes <= program.arena.scratch && program.arena.is_whole(0, bytes);
    let planned = graph.scratch.len() == graph.len() && graph.scratch.iter().all(has_workspace);
    if !planned || graph.workspace(&graph.scratch).iter().sum::<usize>() > program.arena.scratch {
        return fault(None, "workspace is not planned".into());
    }
    let overlap = |a: Buffer, b: Buffer| {
        a.region == b.region
            && a.bytes > 0
            && b.bytes > 0
            && a.offset < b.offset + b.bytes
            && b.offset < a.offset + a.bytes
    };
    let buffer = |v: Value| graph.buffer(v).expect("checked above");
    let among_states = |v: &Value| is_on_host(*v) && states_on_host.iter().any(|&state| overlap(buffer(*v), state));
    if let Some(v) = graph.values().find(among_states) {
        return fault(graph.def(v), format!("%{} overlaps a state", names[v.0 as usize]));
    }
    let kept = program.kept_by_generation(graph);
    for (i, &place) in kept.iter().enumerate() {
        let apart = kept[..i].iter().all(|&other| !overlap(place, other));
        if !apart || place.offset + place.bytes > program.arena.values {
            return fault(None, "what a generation keeps overlaps, or leaves the arena".into());
        }
        let wrong =
            |v: Value| overlap(buffer(v), place) && (buffer(v).offset, buffer(v).bytes) != (place.offset, place.bytes);
        if let Some(v) = graph.values().find(|&v| wrong(v)) {
            return fault(graph.def(v), format!("%{} lies in what a generation keeps", names[v.0 as usize]));
        }
    }
    // Values whose bytes are still needed after the op in hand.
    let mut live: Vec<Value> = graph.inputs().collect();
    if let Some((a, b)) = pairs(&live).find(|&(a, b)| overlap(buffer(a), buffer(b))) {
        return fault(None, format!("inputs %{} and %{} overlap", names[a.0 as usize], names[b.0 as usize]));
    }
    for (id, op) in graph.ops() {
        // A read looks at the state's own bytes, if the device has them, and a view at its operand's.
        match op.op {
            Op::Read { state } if !program.state(state).on_host => {
                if Some(buffer(op.result())) != program.state(state).buffer {
                    return fault(Some(id), "a read must be its state's buffer".into());
                }
            }
            _ if op.op.class() == Class::View => {
                let (view, base) = (buffer(op.result()), buffer(op.args[0]));
                if (view.region, view.offset) != (base.region, base.offset) {
                    return fault(Some(id), "a view must be its operand's buffer".into());
                }
            }
            _ => {
                let in_place = op.op.in_place(op.args.len());
                for (r, result) in op.results().enumerate() {
                    for &other in &live {
                        let may = last[other.0 as usize] <= id.0
                            && buffer(other).offset == buffer(result).offset
                            && graph.ty(other).dtype.bytes() == graph.ty(result).dtype.bytes()
                            && graph.ty(other).bytes(&bounds) == graph.ty(result).bytes(&bounds)
                            && in_place.iter().any(|&(res, arg)| res == r && shares(graph, op.args[arg], other))
                            && may_be_overwritten(graph, op, other, result);
                        if overlap(buffer(result), buffer(other)) && !may {
                            let (a, b) = (&names[result.0 as usize], &names[other.0 as usize]);
                            return fault(Some(id), format!("%{a} overwrites %{b}, which is still needed"));
                        }
                    }
                }
                let results: Vec<Value> = op.results().collect();
                if let Some((a, b)) = pairs(&results).find(|&(a, b)| overlap(buffer(a), buffer(b))) {
                    return fault(Some(id), format!("results %{} and %{} overlap", a.0, b.0));
                }
            }
        }
        if let Op::Write { state } = op.op {
            // The write ends the old value: nothing may look at the state's bytes afterwards but the new value.
            let target = program.state(state).buffer.unwrap_or(buffer(op.args[0]));
            let late = live
                .iter()
                .find(|&&v| overlap(buffer(v), target) && last[v.0 as usize] > id.0 && buffer(v) != buffer(op.args[0]));
            if let Some(v) = late {
                return fault(Some(id), format!("%{} is read after its state was written", names[v.0 as usize]));
            }
        }
        live.extend(op.results());
        live.retain(|v| last[v.0 as usize] > id.0);
    }
    Ok(())
}

/// Whether two values are the same bytes by way of views.
fn shares(graph: &Graph, a: Value, b: Value) -> bool {
    root(graph, a) == root(graph, b)
}

/// Whether an op that works in place may make this result over this operand. One that stands for several operands at once may be
/// overwritten only where all operands of an element are read before its results are written. A result of a region that
/// reduces may be as large as an operand that later rows read again; only one of the region's dims is read once. And what is
/// reduced, where that is one element of each row, is there before the operands of the elements are read.
pub fn may_be_overwritten(graph: &Graph, op: &OpData, operand: Value, result: Value) -> bool {
    if let Op::Fused { shape, body } = &op.op
        && body.reduction().is_some()
        && (graph.ty(operand).len() != Dim::product(shape) || graph.ty(result).dims != *shape)
    {
        return false;
    }
    let by_element = matches!(op.op.class(), Class::Elementwise | Class::Fused);
    by_element || op.args.iter().filter(|&&arg| shares(graph, arg, operand)).count() == 1
}

/// The value whose bytes a value looks at, through any number of views.
pub fn root(graph: &Graph, mut value: Value) -> Value {
    while let Some(def) = graph.def(value) {
        let op = graph.op(def);
        if op.op.class() != Class::View {
            break;
        }
        value = op.args[0];
    }
    value
}

fn pairs(values: &[Value]) -> impl Iterator<Item = (Value, Value)> + '_ {
    values.iter().enumerate().flat_map(|(i, &a)| values[i + 1..].iter().map(move |&b| (a, b)))
}

/// A program that every level of the verifier has accepted: all that `runtime` takes.
#[derive(Clone, Debug)]
pub struct Planned(Program);

impl Planned {
    /// Verifies a program at the planned level.
    pub fn new(program: Program) -> Result<Planned, Fault> {
        if program.level != Level::Planned {
            return Err(Fault { graph: String::new(), op: None, message: "the program is not planned".into() });
        }
        verify(&program)?;
        Ok(Planned(program))
    }
}

impl Deref for Planned {
    type Target = Program;
    fn deref(&self) -> &Program {
        &self.0
    }
}
