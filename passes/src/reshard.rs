//! Gathers parameters that ranks have in parts once for a generation, and not in every call of its graphs.
//!
//! ```text
//! graph @actor.step { ... }                       state @actor/w.gathered : f32[8, 4] generation
//! %p = read @actor/w : f32[4, 4]                  graph @actor.gather { %p = read @actor/w; %w = all_gather %p ...;
//! %w = all_gather %p over=data axis=0 lens=[8]  =>       write @actor/w.gathered %w }
//! %y = contract %x, %w spec=bt,vt->bv             graph @actor.step { ...; %w = read @actor/w.gathered; %y = ... }
//! ```
//!
//! Between two updates parameters do not change, and a generation calls its graphs once for every token: DeepSpeed's hybrid
//! engine. What is gathered lies where other graphs have their values (`plan_memory`), so it takes memory only where a
//! generation needs more than they do. Where memory is limited, and the graphs do not fit with it, they go on to gather in
//! every call. A copy in fewer bits is gathered as it is. What the host keeps for the device (`offload`) is copied once likewise.

use std::collections::BTreeMap;

use dsgc_ir::cost::{Sending, graph_sending};
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Generate, GenerateSteps, Stage, Statement};
use dsgc_ir::trained::reads;
use dsgc_ir::{Axis, Builder, Graph, Mesh, Op, OpData, Program, StateId, StateKind, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::plan_memory::{limit, size};
use crate::rebuild::{Rebuild, without_dead_ops};
use crate::rematerialize::arena;

/// The pass.
pub const PASS: Pass = Pass {
    name: "reshard",
    requires: &[Fact::Typed, Fact::Differentiated],
    provides: &[],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    if program.mesh.data == 1 && !program.states.iter().any(|state| state.on_host) {
        return Ok(program);
    }
    let mut stage = std::mem::take(&mut program.stage);
    let mut found: Vec<Generate> = Vec::new();
    let bodies = |stage: &mut Stage, each: &mut dyn FnMut(&mut Generate)| {
        generations(&mut stage.plan, each);
        stage.evaluate.iter_mut().for_each(|evaluate| generations(&mut evaluate.body, each));
    };
    bodies(&mut stage, &mut |generate| {
        if !found.iter().any(|other| other.steps == generate.steps) {
            found.push(generate.clone());
        }
    });
    program.stage = stage;
    for generate in found {
        let steps = generate.steps.as_ref().unwrap_or_else(|| panic!("bug: `decode` left a generation as it was"));
        let wanted = program.stage.roles.iter().any(|role| role.name == generate.role && role.gather_for_generation);
        let Some((gathered, gather)) = wanted.then(|| gathered(&program, steps)).flatten() else { continue };
        if !is_chosen(&gathered, &program, &generate, &gather, context) {
            continue;
        }
        program = gathered;
        bodies(&mut program.stage, &mut |other| {
            if let Some(own) = other.steps.as_mut().filter(|own| *own == steps) {
                own.gather = Some(gather.clone());
            }
        });
    }
    Ok(program)
}

/// Does something with every generation of a plan.
fn generations(plan: &mut [Statement], each: &mut dyn FnMut(&mut Generate)) {
    for statement in plan {
        match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => generations(body, each),
            Statement::Generate(generate) => each(generate),
            Statement::Call(_)
            | Statement::Next { .. }
            | Statement::Join { .. }
            | Statement::Recent { .. }
            | Statement::Update(_) => {}
        }
    }
}

/// The program whose generation gathers once, and the graph that does; `None` where it gathers no parameter.
fn gathered(program: &Program, steps: &GenerateSteps) -> Option<(Program, String)> {
    let mut new = program.clone();
    let name = match steps.prefill.rsplit_once("prefill") {
        Some((role, number)) => format!("{role}gather{number}"),
        None => format!("{}.gather", steps.prefill),
    };
    let mut gather = Graph::new(&name);
    let mut wholes: BTreeMap<StateId, StateId> = BTreeMap::new();
    for graph in new.graphs.clone().iter().filter(|graph| [&steps.prefill, &steps.step].contains(&&graph.name)) {
        for (op, part) in gathers(graph, program) {
            if wholes.contains_key(&part) {
                continue;
            }
            let (held, ty) = (new.state(part).clone(), graph.ty(op.result()).clone());
            let whole = new.declare(unused(&new, &held.name), ty.clone(), StateKind::Generation, held.span);
            // Ranks that share layers have other parts of it still.
            new.states[whole.0 as usize].placement = held.placement.clone().and_then(|mut placement| {
                placement.cuts.retain(|cut| cut.over != Axis::Data);
                (!placement.cuts.is_empty()).then_some(placement)
            });
            let mut b = Builder::new(&mut gather, op.site.clone());
            let read = b.read(part, &held.ty);
            let value = if op.args.is_empty() { read } else { b.one(op.op.clone(), &[read]) };
            b.write(whole, &ty, value);
            wholes.insert(part, whole);
        }
    }
    if wholes.is_empty() {
        return None;
    }
    for at in 0..new.graphs.len() {
        if [&steps.prefill, &steps.step].contains(&&new.graphs[at].name) {
            new.graphs[at] = with_wholes(&new.graphs[at], &new, &wholes);
        }
    }
    new.graphs.push(gather);
    Some((new, name))
}

/// Where a graph gathers a parameter of which ranks with different rows have parts, or copies one from the host, and the parameter.
fn gathers<'a>(graph: &'a Graph, program: &Program) -> Vec<(&'a OpData, StateId)> {
    let reads = reads(graph);
    let gather = |op: &OpData| matches!(op.op, Op::AllGather { over: Axis::Data, .. });
    let mut found: Vec<(&OpData, StateId)> = Vec::new();
    for (_, op) in graph.ops() {
        for arg in &op.args {
            let Some(&part) = reads.get(arg) else { continue };
            let is_param = matches!(program.state(part).kind, StateKind::Param { .. } | StateKind::Copy { .. });
            if gather(op) {
                found.push((op, part));
            } else if is_param && program.state(part).on_host {
                let read = graph.op(graph.def(*arg).expect("it is a read"));
                found.push((read, part));
            }
        }
    }
    found
}

/// A name that no state has.
fn unused(program: &Program, part: &str) -> String {
    let name = |n: usize| if n == 0 { format!("{part}.gathered") } else { format!("{part}.gathered.{n}") };
    (0..).map(name).find(|name| program.state_named(name).is_none()).expect("there are fewer states than numbers")
}

/// The graph that finds whole states where it gathered parts.
fn with_wholes(graph: &Graph, program: &Program, wholes: &BTreeMap<StateId, StateId>) -> Graph {
    let gathers: BTreeMap<Value, StateId> =
        gathers(graph, program).iter().map(|(op, part)| (op.result(), *part)).collect();
    let mut rebuild = Rebuild::same(graph);
    for (_, op) in graph.ops() {
        match op.results().next().and_then(|result| gathers.get(&result)) {
            Some(part) => rebuild.push(op, Op::Read { state: wholes[part] }, &[], program),
            None => rebuild.copy(op, program),
        }
    }
    without_dead_ops(&rebuild.finish(), program)
}

/// Whether the program with the graph that gathers is taken, and says why.
fn is_chosen(gathered: &Program, before: &Program, generate: &Generate, gather: &str, context: &PassContext) -> bool {
    let steps = generate.steps.as_ref().unwrap_or_else(|| panic!("bug: `decode` left a generation as it was"));
    let named = |name: &str| gathered.graph(name).unwrap_or_else(|| panic!("bug: there is no @{name}"));
    let graphs = [gather, &steps.prefill, &steps.step].map(named);
    let bytes: usize = graphs[0]
        .ops()
        .map(|(_, op)| match op.op {
            Op::Write { state } => gathered.state(state).bytes(),
            _ => 0,
        })
        .sum();
    let needed = limit(gathered, context.target)
        .map(|limit| (limit, graphs.iter().map(|graph| arena(graph, gathered, context.target)).max().unwrap_or(0)));
    let once = sending(graphs[0], &before.mesh);
    let step = before.graph(&steps.step).map_or_else(Sending::default, |graph| sending(graph, &before.mesh));
    let calls = generate.samples.max(1) * generate.max_new_tokens;
    let every = format!(
        "{} and {:.1} ms of sending in each of up to {calls} calls for {} rows",
        size(step.bytes as usize),
        step.seconds() * 1e3,
        generate.rows
    );
    let fits = needed.is_none_or(|(limit, needed)| needed <= limit);
    let text = match needed {
        Some((limit, needed)) if !fits => format!(
            "`{}` gathers its parameters in every call, {every}: with {} of whole ones it needs {}, and has {}",
            generate.role,
            size(bytes),
            size(needed),
            size(limit)
        ),
        _ => format!(
            "`{}` gathers its parameters once for a generation, {} and {:.1} ms of sending, not {every}; {} whole",
            generate.role,
            size(once.bytes as usize),
            once.seconds() * 1e3,
            size(bytes)
        ),
    };
    context.matched(&text, 1);
    fits
}

/// What a graph sends, at most.
fn sending(graph: &Graph, mesh: &Mesh) -> Sending {
    graph_sending(graph, &graph.upper_bounds(), mesh).expect("the verifier saw that every dim is declared")
}
