//! Ops of one kind that do not depend on each other, in one.
//!
//! The one op stands where the first of them stood, if all operands of the others are there already or can be: those that
//! depend on parameters only move up to it. Otherwise it stands where the last of them stood, if nothing needs a result
//! of the others before.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::cost::joins_messages;
use dsgc_ir::{Bindings, Class, DType, Graph, Op, OpData, OpId, Phase, Program, Tag, Target, Type, Value};

use crate::pipeline::PassContext;
use crate::rebuild::Rebuild;

/// What ops must have in common to be merged.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    /// The op as text, with the place of the common operand for products.
    op: (String, usize),
    /// Operands in common.
    common: Vec<Value>,
    /// The type of the others of a product: a device takes weights of one kind together.
    other: Option<DType>,
    phase: Phase,
    layer: Option<(String, u32)>,
}

/// Ops to be merged, in their order.
struct Group {
    kind: Kind,
    members: Vec<OpId>,
}

/// Merges them.
pub(super) fn merge(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let mut plan = Plan::new(graph);
    for (kind, members) in candidates(graph, program, context.target) {
        plan.add(kind, members);
    }
    for group in plan.groups.values() {
        let what = match graph.op(group.members[0]).op {
            Op::Contract { .. } => "products of one operand",
            Op::Adamw { .. } => "updates of one layer",
            _ => "messages of one layer",
        };
        context.matched(what, group.members.len());
    }
    plan.build(program)
}

/// Ops that have a kind in common, the largest groups first.
fn candidates(graph: &Graph, program: &Program, target: &dyn Target) -> Vec<(Kind, Vec<OpId>)> {
    let bounds = graph.upper_bounds();
    let mut groups: BTreeMap<Kind, Vec<OpId>> = BTreeMap::new();
    for (id, op) in graph.ops() {
        for kind in kinds(graph, op, (program, target, &bounds)) {
            groups.entry(kind).or_default().push(id);
        }
    }
    let mut groups: Vec<(Kind, Vec<OpId>)> = groups.into_iter().filter(|(_, members)| members.len() > 1).collect();
    groups.sort_by_key(|(_, members)| (std::cmp::Reverse(members.len()), members[0]));
    groups
}

fn kinds(graph: &Graph, op: &OpData, (program, target, bounds): (&Program, &dyn Target, &Bindings)) -> Vec<Kind> {
    let is_short = || is_short(graph, op, (program, target, bounds));
    let other = |place: usize| op.args.get(1 - place).map(|&arg| graph.ty(arg).dtype);
    let kind = |place: usize, common: &[Value]| Kind {
        other: matches!(op.op, Op::Contract { .. }).then(|| other(place)).flatten(),
        op: (op.op.to_string(), place),
        common: common.to_vec(),
        phase: op.site.phase,
        layer: op.site.tag.as_ref().map(|Tag { block, instance }| (block.to_string(), *instance)),
    };
    match op.op {
        Op::Contract { .. } if op.args[0] != op.args[1] => (0..2).map(|i| kind(i, &op.args[i..=i])).collect(),
        Op::Adamw { .. } => vec![kind(0, &op.args[op.args.len() - 3..])],
        // Messages of whatever type, but sums of one.
        Op::AllGather { over, axis: 0, .. } if is_short() => {
            vec![Kind { op: (format!("all_gather {over}"), 0), ..kind(0, &[]) }]
        }
        Op::AllReduce { .. } | Op::ReduceScatter { axis: 0, .. }
            if graph.ty(op.args[0]).dtype == DType::F32 && is_short() =>
        {
            vec![kind(0, &[])]
        }
        _ => vec![],
    }
}

/// Whether what an op sends is sooner sent together with others, if the device can.
fn is_short(graph: &Graph, op: &OpData, (program, target, bounds): (&Program, &dyn Target, &Bindings)) -> bool {
    let args: Vec<&Type> = op.args.iter().map(|&arg| graph.ty(arg)).collect();
    let results: Vec<&Type> = op.results().map(|result| graph.ty(result)).collect();
    let two: Vec<Type> = args.iter().chain(&args).map(|&ty| ty.clone()).collect();
    let is_there = target.missing_kernel(&sent_together(&[op, op]), &two).is_none();
    is_there && joins_messages(&op.op, &args, &results, bounds, &program.mesh)
}

/// The one op of several that send something.
fn sent_together(members: &[&OpData]) -> Op {
    match &members[0].op {
        Op::AllGather { over, axis, .. } => {
            let lens = members.iter().flat_map(|member| match &member.op {
                Op::AllGather { lens, .. } => lens.clone(),
                op => panic!("bug: `{op}` among gathers"),
            });
            Op::AllGather { over: *over, axis: *axis, lens: lens.collect() }
        }
        op => op.clone(),
    }
}

/// Which ops are merged, and where.
struct Plan<'a> {
    graph: &'a Graph,
    /// Per op, the index of the op in whose place it stands.
    at: Vec<u32>,
    /// Per value, the ops that use it. Outputs are taken after all ops.
    users: Vec<Vec<OpId>>,
    /// By the op in whose place they stand.
    groups: BTreeMap<OpId, Group>,
    merged: BTreeSet<OpId>,
}

impl<'a> Plan<'a> {
    fn new(graph: &'a Graph) -> Plan<'a> {
        let mut users: Vec<Vec<OpId>> = vec![Vec::new(); graph.values().len()];
        for (id, op) in graph.ops() {
            op.args.iter().for_each(|a| users[a.0 as usize].push(id));
        }
        let at = (0..graph.len() as u32).collect();
        Plan { graph, at, users, groups: BTreeMap::new(), merged: BTreeSet::new() }
    }

    /// Merges those of some ops that can be.
    fn add(&mut self, kind: Kind, mut members: Vec<OpId>) {
        members.retain(|id| !self.merged.contains(id));
        let (Some(&first), Some(&last)) = (members.first(), members.last()) else { return };
        for place in [first, last] {
            let fit: Vec<OpId> = members.iter().copied().filter(|&id| self.fits(id, place)).collect();
            if fit.len() > 1 {
                for &id in &fit {
                    self.at[id.0 as usize] = place.0;
                    self.graph.op(id).args.iter().for_each(|&arg| self.move_up(arg, place));
                }
                self.merged.extend(&fit);
                self.groups.insert(place, Group { kind, members: fit });
                return;
            }
        }
    }

    /// Whether an op can stand in the place of another.
    fn fits(&self, id: OpId, place: OpId) -> bool {
        let op = self.graph.op(id);
        let mut users = op.results().flat_map(|r| &self.users[r.0 as usize]);
        op.args.iter().all(|&arg| self.ready(arg, place)) && users.all(|user| self.at[user.0 as usize] > place.0)
    }

    /// Says that a value is there before the op in a place.
    fn move_up(&mut self, value: Value, place: OpId) {
        let Some(def) = self.graph.def(value).filter(|def| self.at[def.0 as usize] > place.0) else { return };
        self.at[def.0 as usize] = place.0;
        self.graph.op(def).args.iter().for_each(|&arg| self.move_up(arg, place));
    }

    /// Whether a value is there before the op in a place, or can be.
    fn ready(&self, value: Value, place: OpId) -> bool {
        let Some(def) = self.graph.def(value) else { return true };
        let op = self.graph.op(def);
        let moves = matches!(op.op, Op::Read { .. } | Op::Reshape { .. } | Op::Transpose { .. });
        self.at[def.0 as usize] < place.0 || (moves && op.args.iter().all(|&arg| self.ready(arg, place)))
    }

    fn build(&self, program: &Program) -> Graph {
        let mut rebuild = Rebuild::same(self.graph);
        let mut done = vec![false; self.graph.len()];
        for (id, op) in self.graph.ops() {
            if let Some(group) = self.groups.get(&id) {
                for &arg in group.members.iter().flat_map(|&m| &self.graph.op(m).args) {
                    self.make(arg, &mut rebuild, &mut done, program);
                }
                self.push(group, &mut rebuild, program);
            } else if !self.merged.contains(&id) && !done[id.0 as usize] {
                rebuild.copy(op, program);
            }
        }
        rebuild.finish()
    }

    /// Makes a value that is needed before its turn.
    fn make(&self, value: Value, rebuild: &mut Rebuild, done: &mut [bool], program: &Program) {
        if rebuild.find(value).is_some() {
            return;
        }
        let def = self.graph.def(value).expect("inputs are there from the beginning");
        let op = self.graph.op(def);
        op.args.iter().for_each(|&arg| self.make(arg, rebuild, done, program));
        rebuild.copy(op, program);
        done[def.0 as usize] = true;
    }

    /// Pushes the one op.
    fn push(&self, group: &Group, rebuild: &mut Rebuild, program: &Program) {
        let members: Vec<&OpData> = group.members.iter().map(|&id| self.graph.op(id)).collect();
        let (op, args) = match &members[0].op {
            Op::Contract { spec } => {
                let common = group.kind.op.1;
                let others = members.iter().map(|m| m.args[1 - common]);
                let args = [group.kind.common.clone(), others.collect()].concat();
                (Op::ContractEach { spec: spec.clone(), common }, args)
            }
            op if op.class() == Class::Collective => {
                (sent_together(&members), members.iter().flat_map(|member| member.args.clone()).collect())
            }
            op => {
                let own = members.iter().flat_map(|m| &m.args[..m.args.len() - group.kind.common.len()]);
                (op.clone(), own.chain(&group.kind.common).copied().collect())
            }
        };
        let args: Vec<Value> = args.into_iter().map(|arg| rebuild.get(arg)).collect();
        rebuild.push_all(&members, op, &args, program);
    }
}
