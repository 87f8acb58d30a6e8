//! Keeps what layers keep for their gradients in the host's memory meanwhile.
//!
//! ```text
//! %y = gelu %h      layer h/0                        %y = gelu %h          layer h/0
//! ...                                                %y.host = to_host %y  layer h/0             // %y dies with the layer
//! ...                                           =>   ...
//! %dw = contract %dz, %y  backward_weight            %y.1 = from_host %y.host  backward_weight
//!                                                    %dw = contract %dz, %y.1  backward_weight
//! ```
//!
//! Every layer fetches for itself what it needs for its gradients, before their first op that does. It is decided when regions
//! are made, so what is kept is known: what `rematerialize` computes again is not, and takes no room on the host. Values
//! are the same, bit by bit.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::verify::root;
use dsgc_ir::{Builder, Class, Graph, Op, OpData, Phase, Program, Tag, Value};

use crate::offload::refused;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass = Pass {
    name: "offload_activations",
    requires: &[Fact::Typed, Fact::Differentiated],
    provides: &[],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    if !program.stage.memory.offload_activations {
        return Ok(program);
    }
    if !context.target.offloads() {
        return Err(vec![refused(context.target, "activations", "`offload_activations`")]);
    }
    program.graphs = program.graphs.iter().map(|graph| offload(graph, &program, context)).collect();
    Ok(program)
}

fn is_backward(op: &OpData) -> bool {
    op.site.phase != Phase::Forward
}

/// Per value, whether a layer makes it and gradients need it, or a view of it.
fn kept(graph: &Graph) -> Vec<bool> {
    let mut needed = vec![false; graph.values().len()];
    for (_, op) in graph.ops().filter(|(_, op)| is_backward(op)) {
        op.args.iter().for_each(|&arg| needed[root(graph, arg).0 as usize] = true);
    }
    let is_made_by_a_layer = |value: Value| {
        let def = graph.def(value).map(|def| graph.op(def));
        def.is_some_and(|op| {
            !is_backward(op) && op.site.tag.is_some() && !matches!(op.op.class(), Class::View | Class::State)
        })
    };
    // What is given out, or written, stays where it is.
    let mut stays = vec![false; graph.values().len()];
    let writes = graph.ops().filter(|(_, op)| matches!(op.op, Op::Write { .. })).map(|(_, op)| op.args[0]);
    let given = graph.outputs.iter().map(|(_, value)| *value);
    writes.chain(given).for_each(|value| stays[root(graph, value).0 as usize] = true);
    let is_kept = |value: Value| {
        let at = value.0 as usize;
        needed[at] && !stays[at] && !graph.ty(value).is_scalar() && is_made_by_a_layer(value)
    };
    graph.values().map(is_kept).collect()
}

/// The graph with activations on the host, if the user asks for that.
pub(crate) fn offload(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let kept = kept(graph);
    if !program.stage.memory.offload_activations || !kept.contains(&true) {
        return graph.clone();
    }
    let mut host = Host { graph, kept, there: BTreeMap::new(), fetched: BTreeMap::new() };
    let mut rebuild = Rebuild::same(graph);
    for (_, op) in graph.ops() {
        let args: Vec<Value> = match is_backward(op) {
            true => op.args.iter().map(|&arg| host.fetch(arg, op, &mut rebuild)).collect(),
            false => op.args.iter().map(|&arg| rebuild.get(arg)).collect(),
        };
        rebuild.push(op, op.op.clone(), &args, program);
        for result in op.results().filter(|r| host.kept[r.0 as usize]) {
            let now = rebuild.get(result);
            let there = Builder::new(&mut rebuild.new, op.site.clone()).one(Op::ToHost {}, &[now]);
            host.there.insert(result, there);
            context.matched("activation in the host's memory", 1);
        }
    }
    without_dead_ops(&rebuild.finish(), program)
}

/// What lies in the host's memory.
struct Host<'a> {
    graph: &'a Graph,
    /// Per value, whether it goes there.
    kept: Vec<bool>,
    /// Where it is.
    there: BTreeMap<Value, Value>,
    /// What a layer has fetched, and views of that.
    fetched: BTreeMap<(Value, Option<Tag>), Value>,
}

impl Host<'_> {
    /// What an op of the backward pass takes in the place of an operand.
    fn fetch(&mut self, value: Value, user: &OpData, rebuild: &mut Rebuild) -> Value {
        if !self.kept[root(self.graph, value).0 as usize] {
            return rebuild.get(value);
        }
        let key = (value, user.site.tag.clone());
        if let Some(&fetched) = self.fetched.get(&key) {
            return fetched;
        }
        let (op, arg) = match self.there.get(&value) {
            Some(&there) => (Op::FromHost {}, there),
            None => {
                let view = self.graph.op(self.graph.def(value).expect("a view has an operand"));
                (view.op.clone(), self.fetch(view.args[0], user, rebuild))
            }
        };
        let made = Builder::new(&mut rebuild.new, user.site.clone()).one(op, &[arg]);
        rebuild.new.set_name(made, self.graph.name_of(value));
        self.fetched.insert(key, made);
        made
    }
}
