//! The ops of the forward pass by layer, and the problem that each layer is.

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::cost::time;
use dsgc_ir::verify::root;
use dsgc_ir::{Bindings, Class, Graph, Op, OpData, OpId, Phase, Tag, Type, Value};

use super::class::{Remat, remat};
use super::cut::{self, Cut, Problem};
use crate::fuse::is_step;

/// Time of an op that takes longer than anybody waits; so that the times of a layer can be added up.
const LONGEST: u64 = 1 << 50;

/// The forward ops of a layer, or those outside of all layers.
pub(super) struct Group {
    pub(super) tag: Option<Tag>,
    /// Its ops in program order, without reads and writes.
    pub(super) ops: Vec<OpId>,
    /// What it may keep, from the least time to the least bytes.
    pub(super) hull: Rc<Vec<Cut>>,
    /// Bytes that its backward pass needs of it, and that are kept if nothing but views runs again.
    pub(super) all: u64,
}

/// The hulls of all bodies so far: equal problems have equal answers, and are solved once.
#[derive(Default)]
pub(super) struct Bodies(BTreeMap<Problem, Rc<Vec<Cut>>>);

impl Bodies {
    /// The groups of a graph, in the order of their first ops.
    pub(super) fn groups(&mut self, graph: &Graph) -> Vec<Group> {
        let mut places: BTreeMap<Option<(&str, u32)>, usize> = BTreeMap::new();
        let mut groups: Vec<(Option<Tag>, Vec<OpId>)> = Vec::new();
        for (id, op) in graph.ops().filter(|(_, op)| op.site.phase == Phase::Forward && op.op.class() != Class::State) {
            let tag = op.site.tag.as_ref().map(|t| (&*t.block, t.instance));
            let place = *places.entry(tag).or_insert(groups.len());
            if place == groups.len() {
                groups.push((op.site.tag.clone(), Vec::new()));
            }
            groups[place].1.push(id);
        }
        let users = Users::of(graph);
        let groups = groups.into_iter().map(|(tag, ops)| {
            let problem = users.problem(&tag, &ops);
            let all = problem.all_kept();
            let hull = self.0.entry(problem).or_insert_with_key(|problem| Rc::new(problem.hull())).clone();
            assert!(hull.iter().all(|cut| cut.bytes <= all), "bug: a cut keeps more than all that is needed");
            Group { tag, ops, hull, all }
        });
        groups.collect()
    }
}

/// Per value, whether it is there in the backward pass whatever its layer keeps: it is an output, or the backward pass of
/// another layer or of the loss needs it, or a view of it.
pub(super) fn needed_elsewhere(graph: &Graph) -> Vec<bool> {
    let mut needed = vec![false; graph.values().len()];
    let mut mark = |value: Value| {
        needed[value.0 as usize] = true;
        needed[root(graph, value).0 as usize] = true;
    };
    for (_, op) in graph.ops().filter(|(_, op)| op.site.phase != Phase::Forward) {
        for &arg in &op.args {
            if graph.def(arg).is_some_and(|d| graph.op(d).site.tag != op.site.tag) {
                mark(arg);
            }
        }
    }
    graph.outputs.iter().for_each(|(_, value)| mark(*value));
    needed
}

/// Who uses the values of a graph.
struct Users<'a> {
    graph: &'a Graph,
    bounds: Bindings,
    users: Vec<Vec<OpId>>,
    elsewhere: Vec<bool>,
}

impl<'a> Users<'a> {
    fn of(graph: &'a Graph) -> Users<'a> {
        let mut users = vec![Vec::new(); graph.values().len()];
        for (id, op) in graph.ops() {
            op.args.iter().for_each(|arg| users[arg.0 as usize].push(id));
        }
        Users { graph, bounds: graph.upper_bounds(), users, elsewhere: needed_elsewhere(graph) }
    }

    /// What a group of ops may keep and compute again.
    fn problem(&self, tag: &Option<Tag>, ops: &[OpId]) -> Problem {
        let mut problem = Problem::default();
        let mut numbers: BTreeMap<Value, usize> = BTreeMap::new();
        for (number, &id) in ops.iter().enumerate() {
            let op = self.graph.op(id);
            let mut args = Vec::new();
            for &arg in &op.args {
                let next = problem.values.len();
                let place = *numbers.entry(arg).or_insert(next);
                if place == next {
                    let keep = Some(self.keep(arg));
                    problem.values.push(cut::Value { made_by: None, keep, needed: self.needed(arg, tag) });
                }
                args.push(place);
            }
            problem.ops.push(cut::Op { args, time: self.time(tag, op) });
            for result in op.results() {
                numbers.insert(result, problem.values.len());
                // A view is its operand's bytes; to have it means to have them.
                let keep = (op.op.class() != Class::View).then(|| self.keep(result));
                let needed = self.needed(result, tag);
                problem.values.push(cut::Value { made_by: Some(number), keep, needed });
            }
        }
        problem
    }

    /// Bytes that it takes to keep a value that a layer makes or gets.
    fn keep(&self, value: Value) -> u64 {
        let base = root(self.graph, value);
        // Inputs are rows of tokens; the value of a state is there anyway.
        let free = match self.graph.def(base) {
            None => true,
            Some(def) => matches!(self.graph.op(def).op, Op::Read { .. }),
        };
        let ty = self.graph.ty(value);
        // A single number is not worth another op.
        if free || self.elsewhere[value.0 as usize] || ty.is_scalar() {
            return 0;
        }
        ty.bytes(&self.bounds).expect("the verifier saw that every dim is declared") as u64
    }

    /// Whether the backward pass of a layer uses a value.
    fn needed(&self, value: Value, tag: &Option<Tag>) -> bool {
        self.users[value.0 as usize].iter().any(|&u| self.is_backward(u, tag))
    }

    fn is_backward(&self, op: OpId, tag: &Option<Tag>) -> bool {
        let site = &self.graph.op(op).site;
        site.phase != Phase::Forward && site.tag == *tag
    }

    /// How long an op takes when it runs again; `None` if it must not.
    fn time(&self, tag: &Option<Tag>, op: &OpData) -> Option<u64> {
        let class = remat(&op.op);
        match class {
            Remat::Never => return None,
            _ if op.op.class() == Class::View => return Some(0),
            Remat::Cheap if self.disappears(tag, op) => return Some(0),
            Remat::Cheap | Remat::Costly => {}
        }
        let args: Vec<&Type> = op.args.iter().map(|&a| self.graph.ty(a)).collect();
        let results: Vec<Value> = op.results().collect();
        let results: Vec<&Type> = results.iter().map(|&r| self.graph.ty(r)).collect();
        let time = time(&op.op, &args, &results, &self.bounds).expect("the verifier saw that every dim is declared");
        Some(time.min(LONGEST))
    }

    /// Whether all that can ask for an op's result is elementwise, so that the op becomes a step of a region: the
    /// backward pass, or, where that does not, ops of the layer that run again.
    fn disappears(&self, tag: &Option<Tag>, op: &OpData) -> bool {
        let users = op.results().flat_map(|r| self.users[r.0 as usize].iter().copied());
        let (back, forth): (Vec<OpId>, Vec<OpId>) = users.partition(|&u| self.is_backward(u, tag));
        let step = |&u: &OpId| {
            let user = self.graph.op(u);
            is_step(self.graph, user) || matches!(user.op, Op::Broadcast { .. })
        };
        if back.is_empty() { forth.iter().all(step) } else { back.iter().all(step) }
    }
}
