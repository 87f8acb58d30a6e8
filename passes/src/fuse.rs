//! Joins elementwise ops to regions that go over memory once.
//!
//! ```text
//! %b = broadcast %bias shape=[B, T, 8]       %z = fused %x, %bias shape=[B, T, 8]
//! %y = add %x, %b                       =>        body={$2 = add $0, $1; $3 = relu $2; return $3}
//! %z = relu %y
//! ```
//!
//! A region has one shape, one phase and one layer, so equal layers stay equal. Broadcasts disappear into it: an
//! operand that is stretched is read as it is, a stretched constant becomes a step. Values that are used inside only
//! have no memory any more; others are results.
//!
//! Ops are taken in program order. Each begins a region and takes in the regions that made its operands, as long as
//! nothing that runs between them needs their values; so no cycle can arise, and a region stands where its last op
//! stood. Every step saves a read, so bytes moved only fall. Where other work lies in between, operands of the older
//! region wait longer and its values need not: it is taken in only if what waits is not larger. A state's old value is
//! never read later than the op that makes the new one, which may lie in its place.
//!
//! Bits do not change: every step of a region rounds as the op did.
//!
//! Then regions finish products (`products`), where the target has a kernel for that.

mod products;

use std::collections::BTreeMap;

use dsgc_ir::body::can_be_step;
use dsgc_ir::diag::Diag;
use dsgc_ir::verify::{last_uses, root};
use dsgc_ir::{Bindings, Body, Class, Graph, Loc, Op, OpData, OpId, Program, Reason, Site, StateId, Step, Type, Value};

use crate::canonicalize::constant;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass = Pass { name: "fuse", requires: &[Fact::Typed], provides: &[], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    // Every value of a region has a use; operands that regions take without a broadcast leave it dead.
    let alive = |g: &Graph| without_dead_ops(g, &program);
    let fused = |g: &Graph| products::finish(&alive(&fuse(&alive(g), &program)), &program, context);
    program.graphs = program.graphs.iter().map(fused).collect();
    Ok(program)
}

/// The graph with its elementwise ops joined.
pub(crate) fn fuse(graph: &Graph, program: &Program) -> Graph {
    let regions = Regions::grow(graph);
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        match regions.of(id).filter(|members| regions.gains(members)) {
            None => rebuild.copy(op, program),
            Some(members) if *members.last().expect("a region has an op") == id => regions.push(members, &mut rebuild),
            // Its region is yet to come.
            Some(_) => {}
        }
    }
    rebuild.finish()
}

/// The regions of a graph while they grow.
struct Regions<'a> {
    graph: &'a Graph,
    bounds: Bindings,
    /// Ops that use each value, ascending; outputs are used by the op after the last.
    users: Vec<Vec<OpId>>,
    last: Vec<u32>,
    /// Per state that the graph writes, the op that makes its new value.
    renewed: BTreeMap<StateId, OpId>,
    /// Per op, the region that it is in.
    region: Vec<Option<usize>>,
    /// Per region, its ops, ascending; empty if another has taken it in.
    members: Vec<Vec<OpId>>,
}

/// What a step of a region takes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Constant(f64),
    Value(Value),
}

impl<'a> Regions<'a> {
    fn grow(graph: &'a Graph) -> Regions<'a> {
        let mut users = vec![Vec::new(); graph.values().len()];
        for (id, op) in graph.ops() {
            op.args.iter().for_each(|a| users[a.0 as usize].push(id));
        }
        for (_, value) in &graph.outputs {
            users[value.0 as usize].push(OpId(graph.len() as u32));
        }
        let mut renewed = BTreeMap::new();
        for (id, op) in graph.ops() {
            if let Op::Write { state } = op.op {
                renewed.insert(state, graph.def(root(graph, op.args[0])).unwrap_or(id));
            }
        }
        let mut regions = Regions {
            graph,
            bounds: graph.upper_bounds(),
            users,
            last: last_uses(graph),
            renewed,
            region: vec![None; graph.len()],
            members: Vec::new(),
        };
        for (id, op) in graph.ops() {
            if is_step(graph, op) {
                regions.region[id.0 as usize] = Some(regions.members.len());
                regions.members.push(vec![id]);
                regions.take_in_producers(id);
            }
        }
        regions
    }

    /// The ops of the region of an op, if it is in one.
    fn of(&self, op: OpId) -> Option<&Vec<OpId>> {
        self.region[op.0 as usize].map(|r| &self.members[r])
    }

    /// Joins the regions of an op's operands with the one that begins with it, the latest first: that one may stand
    /// between the op and an earlier one.
    fn take_in_producers(&mut self, id: OpId) {
        let mut producers: Vec<usize> = self.graph.op(id).args.iter().filter_map(|&a| self.region_of(a)).collect();
        producers.sort_by_key(|&r| std::cmp::Reverse(self.members[r].last().copied()));
        for producer in producers {
            let own = self.region[id.0 as usize].expect("it has just begun one");
            if producer != own && !self.members[producer].is_empty() && self.may_join(producer, own, id) {
                let taken = std::mem::take(&mut self.members[producer]);
                taken.iter().for_each(|op| self.region[op.0 as usize] = Some(own));
                self.members[own].extend(taken);
                self.members[own].sort_unstable();
            }
        }
    }

    fn region_of(&self, value: Value) -> Option<usize> {
        self.region[self.graph.def(value)?.0 as usize]
    }

    /// Whether a region can run at `at`, the end of another, as part of that one.
    fn may_join(&self, older: usize, own: usize, at: OpId) -> bool {
        let members = &self.members[older];
        let (first, next) = (self.graph.op(members[0]), self.graph.op(at));
        let alike = self.shape(members[0]) == self.shape(at)
            && first.site.phase == next.site.phase
            && first.site.tag == next.site.tag;
        if !alike {
            return false;
        }
        let end = *members.last().expect("a region has an op");
        let inside = |op: OpId| self.in_region(op, older) || self.in_region(op, own);
        let values: Vec<Value> = members.iter().flat_map(|&m| self.graph.op(m).results()).collect();
        let needed_between = values.iter().any(|v| self.users[v.0 as usize].iter().any(|&u| u < at && !inside(u)));
        if needed_between {
            return false;
        }
        let operands = self.operands(members);
        if operands.iter().any(|&v| self.renewed_before(v, at)) {
            return false;
        }
        let works = |i: u32| !inside(OpId(i)) && !self.is_free(OpId(i));
        if !(end.0 + 1..at.0).any(works) {
            return true;
        }
        // Other work lies between: it must not find more memory in use than before.
        let here = self.operands(&self.members[own]);
        let waits =
            |v: &&Value| self.last[root(self.graph, **v).0 as usize] < at.0 && !self.is_state(**v) && !here.contains(v);
        let all_bytes = |values: &[Value], counts: &dyn Fn(&&Value) -> bool| {
            values.iter().filter(counts).fold(0usize, |sum, &v| sum.saturating_add(self.bytes(v)))
        };
        let waited_for = |v: &&Value| self.users[v.0 as usize].iter().any(|&u| u >= at || self.in_region(u, own));
        let (kept, freed) = (all_bytes(&operands, &waits), all_bytes(&values, &waited_for));
        kept <= freed
    }

    fn in_region(&self, op: OpId, region: usize) -> bool {
        self.region.get(op.0 as usize).is_some_and(|r| *r == Some(region))
    }

    /// The dims of what an op of a region computes.
    fn shape(&self, op: OpId) -> &[dsgc_ir::Dim] {
        &self.graph.ty(self.graph.op(op).result()).dims
    }

    /// Bytes of a value; a program that no memory holds is refused later.
    fn bytes(&self, value: Value) -> usize {
        self.graph.ty(value).bytes(&self.bounds).expect("the verifier saw that every dim is declared")
    }

    fn is_state(&self, value: Value) -> bool {
        self.read_by(value).is_some()
    }

    /// The state whose bytes a value is.
    fn read_by(&self, value: Value) -> Option<StateId> {
        match self.graph.op(self.graph.def(root(self.graph, value))?).op {
            Op::Read { state } => Some(state),
            _ => None,
        }
    }

    /// Whether a value is that of a state which has its new value when `at` runs.
    fn renewed_before(&self, value: Value, at: OpId) -> bool {
        self.read_by(value).and_then(|state| self.renewed.get(&state)).is_some_and(|&new| new < at)
    }

    /// Whether an op takes no memory or disappears into regions.
    fn is_free(&self, id: OpId) -> bool {
        let op = self.graph.op(id);
        match op.op {
            Op::Const { .. } | Op::Read { .. } => true,
            Op::Broadcast { .. } => self.users[op.result().0 as usize].iter().all(|u| {
                let user = (u.0 as usize) < self.graph.len();
                user && is_step(self.graph, self.graph.op(*u))
            }),
            _ => op.op.class() == Class::View,
        }
    }

    /// What an operand of a region at `at` is without its broadcasts.
    fn source(&self, value: Value, at: OpId) -> Source {
        if let Some(constant) = constant(self.graph, value) {
            return Source::Constant(constant);
        }
        match self.graph.def(value).map(|d| self.graph.op(d)) {
            Some(OpData { op: Op::Broadcast { shape }, args, .. })
                if self.graph.ty(args[0]).dims != *shape && !self.renewed_before(args[0], at) =>
            {
                Source::Value(args[0])
            }
            _ => Source::Value(value),
        }
    }

    /// The values that come from outside of a region, each once, in order of use.
    fn operands(&self, members: &[OpId]) -> Vec<Value> {
        let at = *members.last().expect("a region has an op");
        let mut all = Vec::new();
        for &arg in members.iter().flat_map(|&m| &self.graph.op(m).args) {
            let own = self.graph.def(arg).is_some_and(|d| members.contains(&d));
            if let Source::Value(value) = self.source(arg, at)
                && !own
                && !all.contains(&value)
            {
                all.push(value);
            }
        }
        all
    }

    /// Whether there is less to do in one op: several steps, or a broadcast that disappears. A region has an operand.
    fn gains(&self, members: &[OpId]) -> bool {
        let at = *members.last().expect("a region has an op");
        let stretched = |arg: Value| !self.graph.ty(arg).is_scalar();
        let absorbs = |&arg: &Value| stretched(arg) && self.source(arg, at) != Source::Value(arg);
        let smaller = members.iter().any(|&m| self.graph.op(m).args.iter().any(absorbs));
        (members.len() > 1 || smaller) && !self.operands(members).is_empty()
    }

    /// Pushes the region as one op.
    fn push(&self, members: &[OpId], rebuild: &mut Rebuild) {
        let at = *members.last().expect("a region has an op");
        let operands = self.operands(members);
        let mut numbers: BTreeMap<Value, usize> = operands.iter().enumerate().map(|(i, &v)| (v, i)).collect();
        let mut constants: BTreeMap<String, usize> = BTreeMap::new();
        let (mut steps, mut results) = (Vec::new(), Vec::new());
        for &member in members {
            let op = self.graph.op(member);
            let mut args = Vec::new();
            for &arg in &op.args {
                let own = numbers.get(&arg).filter(|_| self.graph.def(arg).is_some_and(|d| members.contains(&d)));
                args.push(match (own, self.source(arg, at)) {
                    (Some(&number), _) => number,
                    (None, Source::Value(value)) => numbers[&value],
                    (None, Source::Constant(value)) => {
                        let constant = Op::Const { value, dtype: self.graph.ty(arg).dtype };
                        *constants.entry(constant.to_string()).or_insert_with(|| {
                            steps.push(Step { op: constant, args: vec![] });
                            operands.len() + steps.len() - 1
                        })
                    }
                });
            }
            steps.push(Step { op: op.op.clone(), args });
            let number = operands.len() + steps.len() - 1;
            numbers.insert(op.result(), number);
            if self.users[op.result().0 as usize].iter().any(|u| !members.contains(u)) {
                results.push((op.result(), number));
            }
        }
        let last = self.graph.op(at);
        let reason = if members.len() > 1 { Reason::Fused } else { last.site.loc.reason };
        let loc =
            Loc { reason: if last.site.loc.span.is_some() { reason } else { Reason::default() }, ..last.site.loc };
        let op = Op::Fused {
            shape: self.shape(at).to_vec(),
            body: Body::new(operands.len(), steps, results.iter().map(|r| r.1).collect()),
        };
        let args: Vec<Value> = operands.iter().map(|&v| rebuild.get(v)).collect();
        let pushed = rebuild.new.try_push(op, &args, None, Site { loc, ..last.site.clone() });
        let id = pushed.unwrap_or_else(|why| panic!("bug: a region in graph @{}: {why}", self.graph.name));
        let new: Vec<Value> = rebuild.new.op(id).results().collect();
        for ((old, _), new) in results.into_iter().zip(new) {
            rebuild.new.set_name(new, self.graph.name_of(old));
            rebuild.set(old, new);
        }
    }
}

/// Whether an op can be in a region, and somebody wants its value.
pub(crate) fn is_step(graph: &Graph, op: &OpData) -> bool {
    let types: Vec<Type> = op.args.iter().map(|&a| graph.ty(a).clone()).collect();
    op.op.class() == Class::Elementwise && can_be_step(&op.op, &types)
}
