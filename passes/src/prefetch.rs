//! Lets collectives run beside other ops, and waits for them where what they give is used.
//!
//! ```text
//! %h = gelu %x                                    %g = all_gather %w over=data axis=0 lens=[8]
//! %g = all_gather %w over=data axis=0 lens=[8] => %h = gelu %x                    // while parts of %g arrive
//! %y = contract %h, %g                            %g.1 = wait %g, %w
//!                                                 %y = contract %h, %g.1
//! ```
//!
//! A collective begins where it stands, and is over at a `wait` before the first op that uses its results. Two moves put ops
//! between the two. A gather of parameters needs nothing but states, so it goes up to where predicted time is enough for it and for
//! those that are sent before it (DeepCompile's walk from the end, `deepspeed/compile/passes/prefetch.py`, with exact bytes
//! in the place of measured ones). What uses a result that has not come yet lets later ops go first that do not depend on
//! it, so sums of gradients are on their way while the gradients of earlier layers are computed.
//!
//! Both take memory for longer. Where it is limited, an order is taken only if the graph's plan is within the limit; elsewhere, if
//! it takes an eighth more than that of the program's largest graph at most. What is on its way uses workspace of its own.
//! Collectives begin in one order on all ranks, since all have one program, and run in that order. Values are the same, bit
//! by bit.

use std::collections::{BTreeMap, VecDeque};

use dsgc_ir::diag::Diag;
use dsgc_ir::{Builder, Class, Graph, Op, OpId, Program, Target, Value, cost};

use crate::order::{dependences, users};
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::plan_memory::{live_by_op, persistent_bytes, planned_bytes, room, scratch_bytes, too_large, workspaces};
use crate::rebuild::Rebuild;

/// The pass.
pub const PASS: Pass = Pass {
    name: "prefetch",
    requires: &[Fact::Typed, Fact::Partitioned],
    provides: &[],
    numerics: Numerics::Exact,
    run,
};

/// The part of the largest graph's plan that all this may take beside it where memory has no limit.
const SPARE: usize = 8;

/// How much longer than predicted sending may take and still be hidden: predictions are of ranks of one machine, and a network is
/// slower. What is early costs nothing but the memory that there is for it.
const SLOWER: f64 = 8.0;

/// How many ops may wait for collectives while later ones go first.
const AHEAD: usize = 64;

/// How many collectives may be on their way while ops that use them wait, from most to least; an order with the first that
/// fits is taken.
const ON_THE_WAY: [usize; 3] = [16, 4, 1];

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let several = program.mesh.ranks() > 1 && program.stage.parallel.overlap_comm;
    if !several || program.graphs.iter().any(|g| too_large(g).is_some()) {
        return Ok(program);
    }
    let target = context.target;
    let largest = program.graphs.iter().map(|g| planned_bytes(g, &program, target)).max().unwrap_or(0);
    // All graphs share the largest workspace. Where the largest graph leaves room for it, it is as large as it can become.
    let scratch = |bytes: &dyn Fn(&Graph) -> usize| program.graphs.iter().map(bytes).max().unwrap_or(0);
    let (least, all) = (scratch(&|g| scratch_bytes(g, target)), scratch(&|g| scratch_beside(g, target)));
    let (scratch, most) = match room(&program, target) {
        Some(limit) => {
            let left = limit.saturating_sub(persistent_bytes(&program, target));
            let scratch = if largest + all <= left { all } else { least };
            (scratch, left.saturating_sub(scratch))
        }
        None => (all, largest + largest / SPARE),
    };
    let fits = |graph: &Graph, program: &Program| {
        scratch_bytes(graph, target) <= scratch && planned_bytes(graph, program, target) <= most
    };
    let mut graphs = Vec::with_capacity(program.graphs.len());
    for graph in &program.graphs {
        let Some(work) = Work::of(graph, &program, most, context) else {
            graphs.push(graph.clone());
            continue;
        };
        let own: Vec<OpId> = graph.ops().map(|(id, _)| id).collect();
        let early = work.early();
        let orders = ON_THE_WAY.iter().map(|&most| work.late(&early, most)).chain([early.clone(), own]);
        let found = orders.map(|order| work.waited(&order, &program)).find(|(graph, _)| fits(graph, &program));
        graphs.push(match found {
            Some((new, hidden)) => {
                for (op, times) in hidden {
                    context.matched(&format!("{op} beside other ops"), times);
                }
                new
            }
            None => graph.clone(),
        });
    }
    program.graphs = graphs;
    Ok(program)
}

/// Bytes of workspace of a graph whose collectives all run beside other ops.
fn scratch_beside(graph: &Graph, target: &dyn Target) -> usize {
    let most = |sends: bool| {
        let own = workspaces(graph, target).into_iter().zip(graph.ops());
        own.filter(|(_, (_, op))| (op.op.class() == Class::Collective) == sends)
            .map(|(bytes, _)| bytes)
            .max()
            .unwrap_or(0)
    };
    most(false) + most(true)
}

/// What is known of the ops of a graph in their own order.
struct Work<'a> {
    graph: &'a Graph,
    /// Per op, whether it can run beside others.
    sends: Vec<bool>,
    /// Predicted seconds: of a kernel, or of what a collective sends.
    seconds: Vec<f64>,
    /// Per op, the ops that must run before it, ascending.
    after: Vec<Vec<OpId>>,
    /// Per value, the ops that use it.
    users: Vec<Vec<OpId>>,
    /// Per op, bytes of values in use.
    live: Vec<usize>,
    /// Most bytes that may be.
    most: usize,
}

impl<'a> Work<'a> {
    /// Nothing where the graph sends nothing.
    fn of(graph: &'a Graph, program: &Program, most: usize, context: &PassContext) -> Option<Work<'a>> {
        let sends: Vec<bool> = graph
            .ops()
            .map(|(_, op)| {
                let types = op.args.iter().map(|&arg| graph.ty(arg).clone()).collect::<Vec<_>>();
                op.op.class() == Class::Collective && context.target.sends_beside(&op.op, &types)
            })
            .collect();
        if !sends.contains(&true) {
            return None;
        }
        let bounds = graph.upper_bounds();
        let seconds = graph.ops().map(|(_, op)| {
            let (args, results) = cost::types(graph, op);
            let seconds = match op.op.class() {
                Class::Collective => {
                    let sending = cost::sending(&op.op, &args, &results, &bounds, &program.mesh);
                    sending.map(|sending| SLOWER * sending.seconds())
                }
                _ => cost::seconds(&op.op, &args, &results, &bounds),
            };
            seconds.expect("the verifier saw that every dim is declared")
        });
        let users = users(graph);
        let after = dependences(graph, &users);
        Some(Work {
            graph,
            sends,
            seconds: seconds.collect(),
            after,
            users,
            live: live_by_op(graph, program, context.target),
            most,
        })
    }

    fn sends(&self, id: OpId) -> bool {
        self.sends[id.0 as usize]
    }

    /// Whether an op costs nothing and needs nothing but states, so that it can stand anywhere before its users.
    fn comes_along(&self, id: OpId) -> bool {
        let op = self.graph.op(id);
        // First, so that nothing goes back through all that a kernel needs.
        matches!(op.op.class(), Class::View | Class::State)
            && op.results().len() > 0
            && self.after[id.0 as usize].iter().all(|&need| self.comes_along(need))
    }

    /// Gathers of parameters as late as what runs beside them takes as long as they do, and later where memory is needed.
    fn early(&self) -> Vec<OpId> {
        struct Pending {
            op: OpId,
            /// When it must begin, in seconds before the end of the graph, and so negative.
            begins: f64,
            bytes: usize,
        }
        let bounds = self.graph.upper_bounds();
        let bytes = |id: OpId| -> usize {
            let of = |v: Value| self.graph.ty(v).bytes(&bounds).expect("the verifier saw that every dim is declared");
            self.graph.op(id).results().map(of).sum()
        };
        let moves = |id: OpId| {
            let op = self.graph.op(id);
            self.sends(id)
                && matches!(op.op, Op::AllGather { .. })
                && op.args.iter().all(|&arg| self.graph.def(arg).is_some_and(|def| self.comes_along(def)))
        };
        let (mut backwards, mut clock) = (Vec::with_capacity(self.graph.len()), 0.0f64);
        let mut starts = vec![0.0f64; self.graph.len()];
        // The one in front is needed last.
        let (mut pending, mut held) = (VecDeque::<Pending>::new(), 0);
        for (id, _) in self.graph.ops().rev() {
            if moves(id) {
                let uses = self.graph.op(id).results().flat_map(|r| &self.users[r.0 as usize]);
                let used = uses.map(|user| starts[user.0 as usize]).fold(0.0, f64::min);
                let next = pending.back().map_or(0.0, |next| next.begins);
                held += bytes(id);
                pending.push_back(Pending {
                    op: id,
                    begins: used.min(next) - self.seconds[id.0 as usize],
                    bytes: bytes(id),
                });
                continue;
            }
            let is_due = |first: &Pending, held: usize| {
                first.begins >= clock || self.live[id.0 as usize].saturating_add(held) > self.most
            };
            while pending.front().is_some_and(|first| is_due(first, held)) {
                let first = pending.pop_front().expect("there is one");
                held -= first.bytes;
                backwards.push(first.op);
            }
            backwards.push(id);
            if !self.sends(id) {
                clock -= self.seconds[id.0 as usize];
            }
            starts[id.0 as usize] = clock;
        }
        backwards.extend(pending.into_iter().map(|pending| pending.op));
        // What comes along stands before the first that needs it.
        let (mut order, mut placed) = (Vec::with_capacity(backwards.len()), vec![false; backwards.len()]);
        for &id in backwards.iter().rev() {
            let mut stack = vec![id];
            while let Some(&top) = stack.last() {
                match self.after[top.0 as usize].iter().find(|need| !placed[need.0 as usize]) {
                    Some(&need) => stack.push(need),
                    None => {
                        stack.pop();
                        if !std::mem::replace(&mut placed[top.0 as usize], true) {
                            order.push(top);
                        }
                    }
                }
            }
        }
        order
    }

    /// Ops that use what has not come yet, by the predicted times, after later ones that do not need them.
    fn late(&self, order: &[OpId], most: usize) -> Vec<OpId> {
        let mut run = Run {
            work: self,
            clock: 0.0,
            line: 0.0,
            comes: vec![0.0; self.graph.len()],
            placed: vec![false; self.graph.len()],
            on_the_way: VecDeque::new(),
            order: Vec::with_capacity(order.len()),
        };
        let mut waiting: Vec<OpId> = Vec::new();
        for &id in order {
            waiting.retain(|&op| !run.place_if_ready(op));
            if self.sends(id) {
                while run.still_on_the_way() >= most {
                    run.clock = run.comes[run.on_the_way[0].0 as usize];
                    waiting.retain(|&op| !run.place_if_ready(op));
                }
            }
            if run.place_if_ready(id) {
                continue;
            }
            waiting.push(id);
            while waiting.len() > AHEAD {
                run.place_first_of(&mut waiting);
            }
        }
        while !waiting.is_empty() {
            run.place_first_of(&mut waiting);
        }
        run.order
    }

    /// The graph in an order, with its waits; and how many collectives of each kind run beside other ops.
    fn waited(&self, order: &[OpId], program: &Program) -> (Graph, BTreeMap<&'static str, usize>) {
        let mut place = vec![0; order.len()];
        order.iter().enumerate().for_each(|(at, op)| place[op.0 as usize] = at);
        // Kernels that begin before each place.
        let mut kernels = vec![0usize; order.len() + 1];
        for (at, &id) in order.iter().enumerate() {
            let is_kernel = !matches!(self.graph.op(id).op.class(), Class::View | Class::State | Class::Collective);
            kernels[at + 1] = kernels[at] + usize::from(is_kernel);
        }
        // What uses a collective's results, or writes over what it reads.
        let mut first = vec![order.len(); order.len()];
        for (id, needs) in self.after.iter().enumerate() {
            needs.iter().for_each(|need| first[need.0 as usize] = first[need.0 as usize].min(place[id]));
        }
        let mut waits: BTreeMap<usize, Vec<OpId>> = BTreeMap::new();
        let mut hidden = BTreeMap::new();
        for &id in order.iter().filter(|&&id| self.sends(id)) {
            let first = first[id.0 as usize];
            if kernels[first] > kernels[place[id.0 as usize] + 1] {
                waits.entry(first).or_default().push(id);
                *hidden.entry(self.graph.op(id).op.name()).or_default() += 1;
            }
        }
        let mut rebuild = Rebuild::same(self.graph);
        for at in 0..=order.len() {
            for &id in waits.get(&at).into_iter().flatten() {
                self.wait(id, &mut rebuild);
            }
            if let Some(&id) = order.get(at) {
                rebuild.copy(self.graph.op(id), program);
            }
        }
        (rebuild.finish(), hidden)
    }

    /// Waits for a collective: every result that is used is there.
    fn wait(&self, id: OpId, rebuild: &mut Rebuild) {
        let op = self.graph.op(id);
        let needed = match op.op {
            // It works in the place of its result from the beginning.
            Op::AllReduce { .. } => &[],
            _ => op.args.as_slice(),
        };
        let needed: Vec<Value> = needed.iter().map(|&arg| rebuild.get(arg)).collect();
        let is_output = |v: Value| self.graph.outputs.iter().any(|(_, output)| *output == v);
        for result in op.results().filter(|&r| !self.users[r.0 as usize].is_empty() || is_output(r)) {
            let args = [&[rebuild.get(result)], needed.as_slice()].concat();
            let name = self.graph.name_of(result).to_string();
            let waited = Builder::new(&mut rebuild.new, op.site.clone()).one(Op::Wait {}, &args);
            rebuild.new.set_name(waited, &name);
            rebuild.set(result, waited);
        }
    }
}

/// A run of the ops by predicted times.
struct Run<'a> {
    work: &'a Work<'a>,
    /// Now.
    clock: f64,
    /// When the line between ranks is free.
    line: f64,
    /// Per collective, when its results are there.
    comes: Vec<f64>,
    placed: Vec<bool>,
    /// Collectives in the order in which they come, those that have come at the front.
    on_the_way: VecDeque<OpId>,
    order: Vec<OpId>,
}

impl Run<'_> {
    fn still_on_the_way(&mut self) -> usize {
        while self.on_the_way.front().is_some_and(|op| self.comes[op.0 as usize] <= self.clock) {
            self.on_the_way.pop_front();
        }
        self.on_the_way.len()
    }

    /// When an op can run; nothing where one that must run before has not.
    fn ready(&self, id: OpId) -> Option<f64> {
        let needs = &self.work.after[id.0 as usize];
        let of = |need: &OpId| self.placed[need.0 as usize].then_some(self.comes[need.0 as usize]);
        needs.iter().map(of).try_fold(0.0, |all, one| Some(f64::max(all, one?)))
    }

    fn place_if_ready(&mut self, id: OpId) -> bool {
        let is_ready = self.ready(id).is_some_and(|at| at <= self.clock);
        if is_ready {
            self.place(id);
        }
        is_ready
    }

    /// Waits for what comes first of what these ops wait for, and runs those that can.
    fn place_first_of(&mut self, waiting: &mut Vec<OpId>) {
        let ready = waiting.iter().filter_map(|&op| self.ready(op)).min_by(f64::total_cmp);
        self.clock = self.clock.max(ready.expect("bug: ops wait for each other"));
        waiting.retain(|&op| !self.place_if_ready(op));
    }

    /// Runs an op, after a wait where it must.
    fn place(&mut self, id: OpId) {
        let at = id.0 as usize;
        let ready = self.ready(id).unwrap_or_else(|| panic!("bug: op {at} is placed before what it needs"));
        self.clock = self.clock.max(ready);
        if self.work.sends(id) {
            self.line = self.line.max(self.clock) + self.work.seconds[at];
            self.comes[at] = self.line;
            self.on_the_way.push_back(id);
        } else {
            self.clock += self.work.seconds[at];
        }
        self.placed[at] = true;
        self.order.push(id);
    }
}
