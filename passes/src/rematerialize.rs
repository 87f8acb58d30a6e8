//! Keeps less of the forward pass for the backward pass, and computes again what is not kept.
//!
//! ```text
//! %s = silu %g                                 %s = silu %g
//! %h = mul %s, %u                              %h = mul %s, %u           // %s dies here
//! ...                                   =>     ...
//! %du = mul %dh, %s   phase=backward_input     %s.1 = silu %g            phase=backward_input
//!                                              %du = mul %dh, %s.1       phase=backward_input
//! ```
//!
//! Inside of a layer a minimum cut says what is kept: bytes against the time of running again, where an
//! elementwise op takes none if it becomes part of a region with what uses it. Layers with equal ops have equal cuts. What
//! other layers or the loss need is kept always, so what runs again lives for one layer's gradients only.
//!
//! What costs nothing is computed again always. `gradient_checkpointing: true` takes the smallest cut of every layer, `false` no
//! other cut than that. Elsewhere, where the memory is limited, by `compile: {memory: ...}` or by the device, and a graph does not fit,
//! layers go over to smaller cuts one by one, the cheapest step by bytes that it saves first and the earliest layer first,
//! until the plan of the graph fits; so as much is kept as there is room for. If it never fits, `plan_memory` says so.
//!
//! Parameters of which ranks have parts (ZeRO 3) take part in this: gradients gather them again, and where memory has a limit,
//! and there is room, they use what the forward pass has gathered. The time of a gather is that of what it sends.
//!
//! Values are the same bit by bit: random ops have their keys as operands, and a state's old value is still there.

mod body;
mod class;
mod cut;
mod gathers;

use std::cell::RefCell;
use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Builder, Class, Graph, OpId, Phase, Program, Site, Target, Value};

use crate::fuse::fused;
use crate::merge::merge;
use crate::offload::with_reads;
use crate::offload_activations::offload;
use crate::order::order;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::plan_memory::{limit, most_held, persistent_bytes, planned_bytes, scratch_bytes, too_large};
use crate::rebuild::{Rebuild, without_dead_ops};
use crate::split_stages::Split;
use body::{Bodies, Group};
use gathers::{Gather, gathers};

/// The pass.
pub const PASS: Pass = Pass {
    name: "rematerialize",
    requires: &[Fact::Typed, Fact::Differentiated],
    provides: &[],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut bodies = Bodies::default();
    let graphs: Vec<Graph> = program.graphs.iter().map(|g| rematerialize(g, &program, context, &mut bodies)).collect();
    program.graphs = graphs;
    Ok(program)
}

fn rematerialize(graph: &Graph, program: &Program, context: &PassContext, bodies: &mut Bodies) -> Graph {
    if graph.ops().all(|(_, op)| op.site.phase == Phase::Forward) || too_large(graph).is_some() {
        return graph.clone();
    }
    let groups = bodies.groups(graph);
    let gathers = gathers(graph, program);
    let checkpoints = program.stage.memory.gradient_checkpointing;
    let first = |g: &Group| if checkpoints && g.tag.is_some() { g.hull.len() - 1 } else { 0 };
    let mut choice = Choice { cuts: groups.iter().map(first).collect(), again: vec![true; gathers.len()] };
    let made = |choice: &Choice| {
        let kept = gathers.iter().zip(&choice.again).filter(|(_, again)| !**again).map(|(gather, _)| gather.state);
        gathers::keep(with_cuts(graph, program, &groups, &choice.cuts), program, &kept.collect())
    };
    let mut chosen = made(&choice);
    if let Some(limit) = limit(program, context.target).filter(|_| !program.stage.memory.keep_all) {
        let others = Workspaces::default();
        let fits = |graph: &Graph| arenas(graph, program, context.target, &others).all(|bytes| bytes <= limit);
        choice.again.fill(false);
        chosen = made(&choice);
        if !fits(&chosen) {
            let steps = steps(&groups, &gathers, &choice);
            let taken = |n: usize| {
                let mut choice = choice.clone();
                steps[..n].iter().for_each(|step| choice.take(*step));
                choice
            };
            // The fewest steps with which it fits; all, where it never does.
            let (mut few, mut enough) = (0, steps.len());
            while few + 1 < enough {
                let middle = few.midpoint(enough);
                match fits(&made(&taken(middle))) {
                    true => enough = middle,
                    false => few = middle,
                }
            }
            choice = taken(enough);
            chosen = made(&choice);
        }
    }
    note(graph, &groups, &choice.cuts, context);
    let kept = choice.again.iter().filter(|again| !**again).count();
    if kept > 0 {
        context.matched("all_gather kept for gradients", kept);
    }
    chosen
}

/// What is kept and what is not.
#[derive(Clone)]
struct Choice {
    /// Per group, the cut of its hull.
    cuts: Vec<usize>,
    /// Per parameter that is gathered, whether gradients gather it again.
    again: Vec<bool>,
}

/// From one choice to another that keeps less.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Less {
    /// Another cut of a group.
    Cut(usize, usize),
    /// A parameter is gathered again.
    Gather(usize),
}

impl Choice {
    fn take(&mut self, step: Less) {
        match step {
            Less::Cut(group, to) => self.cuts[group] = to,
            Less::Gather(at) => self.again[at] = true,
        }
    }
}

/// Bytes of memory that this graph takes after the passes that follow, at the place along `pipeline` that needs most.
pub(crate) fn arena(graph: &Graph, program: &Program, target: &dyn Target) -> usize {
    arenas(graph, program, target, &Workspaces::default()).max().unwrap_or(0)
}

/// Bytes of the workspaces of graphs, by their names: they are the same as long as a graph is.
type Workspaces = RefCell<BTreeMap<String, (Graph, usize)>>;

/// The same at each place. What passes choose is the same at all of them, which have pieces of one graph.
fn arenas(graph: &Graph, program: &Program, target: &dyn Target, others: &Workspaces) -> impl Iterator<Item = usize> {
    let mut whole = program.clone();
    let same = whole.graphs.iter_mut().find(|same| same.name == graph.name).expect("it is a graph of the program");
    *same = without_dead_ops(graph, program);
    let name = graph.name.clone();
    let split = Split::of(whole, &PassContext::new(target));
    (0..program.mesh.pipeline).map(move |place| {
        // The fewer values lie between pieces, the sooner there is room.
        let Ok(split) = &split else { return usize::MAX };
        let at = split.at(place);
        let pieces = at.stage.pieces.get(&name).into_iter().flatten().map(|piece| &piece.graph);
        let own: Vec<&Graph> = pieces.chain([&name]).filter_map(|name| at.graph(name)).collect();
        most_held(&at) + arena_of(&own, &at, target, others)
    })
}

/// Bytes of the arena that the one of these graphs takes that needs most, after fusion and what follows it. Its workspace is that
/// of the graph of the program that needs most.
fn arena_of(graphs: &[&Graph], program: &Program, target: &dyn Target, known: &Workspaces) -> usize {
    let quiet = PassContext::new(target);
    let fused = |graph: &Graph| fused(&merge(&without_dead_ops(graph, program), program, &quiet), program, &quiet);
    let others = program.graphs.iter().filter(|other| graphs.iter().all(|graph| graph.name != other.name));
    let workspace = |other: &Graph| {
        if let Some((_, bytes)) = known.borrow().get(&other.name).filter(|(same, _)| same == other) {
            return *bytes;
        }
        let bytes = scratch_bytes(&fused(other), target);
        known.borrow_mut().insert(other.name.clone(), (other.clone(), bytes));
        bytes
    };
    let mut scratch = others.map(workspace).max().unwrap_or(0);
    let mut values = 0;
    for graph in graphs {
        let graph = offload(&fused(graph), program, &quiet);
        let graph = order(&graph, program, target).map_or(graph, |better| better.graph);
        scratch = scratch.max(scratch_bytes(&graph, target));
        values = values.max(planned_bytes(&graph, program, target));
    }
    persistent_bytes(program, target) + scratch + values
}

/// All steps from a choice to what keeps least, those that save most bytes for their time first. Of equal ones the first
/// layer's comes first: what it keeps is kept longest.
fn steps(groups: &[Group], gathers: &[Gather], choice: &Choice) -> Vec<Less> {
    let mut steps: Vec<((u128, u128), Less)> = Vec::new();
    for (i, group) in groups.iter().enumerate().filter(|(_, g)| g.tag.is_some()) {
        for (from, pair) in group.hull.windows(2).enumerate().skip(choice.cuts[i]) {
            let (saved, spent) = (pair[0].bytes - pair[1].bytes, pair[1].time - pair[0].time);
            steps.push(((u128::from(saved), u128::from(spent)), Less::Cut(i, from + 1)));
        }
    }
    let again = gathers.iter().enumerate().map(|(at, gather)| {
        let by = (u128::from(gather.bytes), u128::from(gather.time));
        (by, Less::Gather(at))
    });
    steps.extend(again);
    // On a hull, steps save less and less for their time: those of a group stay in their order.
    steps.sort_by(|((a_saved, a_spent), a), ((b_saved, b_spent), b)| {
        (b_saved * a_spent).cmp(&(a_saved * b_spent)).then(a.cmp(b))
    });
    steps.into_iter().map(|(_, step)| step).collect()
}

/// The graph that keeps what these cuts of the groups keep.
fn with_cuts(graph: &Graph, program: &Program, groups: &[Group], choice: &[usize]) -> Graph {
    let mut again = vec![false; graph.len()];
    for (group, &cut) in groups.iter().zip(choice) {
        for (&op, _) in group.ops.iter().zip(&group.hull[cut].again).filter(|(_, again)| **again) {
            again[op.0 as usize] = true;
        }
    }
    if !again.contains(&true) {
        return graph.clone();
    }
    let foreign = body::needed_elsewhere(graph);
    // A view of what is kept is there already.
    for (id, op) in graph.ops().filter(|(_, op)| op.op.class() == Class::View) {
        let base = graph.def(op.args[0]).filter(|_| !foreign[op.args[0].0 as usize]);
        again[id.0 as usize] &= base.is_some_and(|d| again[d.0 as usize]);
    }
    // What runs again belongs to the gradients that flow on if any of them needs it: those of weights may come later.
    let mut flows_on = vec![false; graph.len()];
    for (id, op) in graph.ops().rev() {
        let needs_it = match op.site.phase {
            Phase::Forward => again[id.0 as usize] && flows_on[id.0 as usize],
            phase => phase == Phase::BackwardInput,
        };
        let needed = op.args.iter().filter(|_| needs_it).filter_map(|&arg| graph.def(arg));
        needed.for_each(|def| flows_on[def.0 as usize] = true);
    }
    let mut rebuild = Rebuild::same(graph);
    // What was computed again so far, by the old value.
    let mut second: BTreeMap<Value, Value> = BTreeMap::new();
    let twice = |v: Value| graph.def(v).filter(|d| again[d.0 as usize] && !foreign[v.0 as usize]);
    for (_, op) in graph.ops() {
        if op.site.phase == Phase::Forward {
            rebuild.copy(op, program);
            continue;
        }
        // Operands before what needs them; a stack, as a chain can be long.
        let mut stack: Vec<OpId> = op.args.iter().rev().filter_map(|&arg| twice(arg)).collect();
        while let Some(&top) = stack.last() {
            let first = graph.op(top);
            if first.results().all(|r| second.contains_key(&r)) {
                stack.pop();
                continue;
            }
            let missing = first.args.iter().filter(|arg| !second.contains_key(arg)).find_map(|&arg| twice(arg));
            if let Some(missing) = missing {
                stack.push(missing);
                continue;
            }
            let args: Vec<Value> =
                first.args.iter().map(|&a| second.get(&a).copied().unwrap_or_else(|| rebuild.get(a))).collect();
            let phase = if flows_on[top.0 as usize] { Phase::BackwardInput } else { op.site.phase };
            let site = Site { phase, ..first.site.clone() };
            let results = Builder::new(&mut rebuild.new, site).push(first.op.clone(), &args);
            for (old, new) in first.results().zip(results) {
                rebuild.new.set_name(new, graph.name_of(old));
                second.insert(old, new);
            }
            stack.pop();
        }
        let args: Vec<Value> = op
            .args
            .iter()
            .map(|&arg| match twice(arg) {
                Some(_) => second[&arg],
                None => rebuild.get(arg),
            })
            .collect();
        rebuild.push(op, op.op.clone(), &args, program);
    }
    // What runs again reads what the host has again.
    with_reads(&without_dead_ops(&rebuild.finish(), program), program)
}

/// Says what runs again.
fn note(graph: &Graph, groups: &[Group], choice: &[usize], context: &PassContext) {
    for (group, &cut) in groups.iter().zip(choice) {
        let cut = &group.hull[cut];
        let again = group.ops.iter().zip(&cut.again).filter(|(_, again)| **again).map(|(&op, _)| &graph.op(op).op);
        for op in again.filter(|op| op.class() != Class::View) {
            context.matched(&format!("{} computed again", op.name()), 1);
        }
        if context.explain && cut.again.contains(&true) {
            let what = group.tag.as_ref().map_or("outside of layers".into(), |t| format!("{} {}", t.block, t.instance));
            let of = group.all;
            context.changed(format!(
                "@{}, {what}: keeps {} of {of} bytes for the gradient, and takes the time of moving {} bytes",
                graph.name, cut.bytes, cut.time
            ));
        }
    }
}
