//! Log-probabilities with the product that makes their logits, and with their gradients where those are known beforehand.
//!
//! The gradients can be taken at once if the log-probabilities' own gradient does not depend on them, as where a loss is a
//! mean of them. The one op stands where the gradient of the logits stood; what needs the log-probabilities before comes
//! after it. Where the loss is another, logits are needed twice, and stay.

use std::collections::BTreeSet;

use dsgc_ir::infer::Contraction;
use dsgc_ir::{DType, Graph, Op, OpData, OpId, Program, Value};

use crate::pipeline::PassContext;
use crate::rebuild::Rebuild;

/// Log-probabilities of a head in a graph.
struct Head {
    x: Value,
    head: Value,
    tokens: Value,
    logp: OpId,
    gradients: Option<Gradients>,
}

/// The gradients of a head.
struct Gradients {
    /// The op that takes those of the logits.
    at: OpId,
    of_logp: Value,
    of_x: OpId,
    of_head: Option<OpId>,
    /// Ops before it that need the log-probabilities.
    late: BTreeSet<OpId>,
}

impl Head {
    /// The op in whose place the one op stands.
    fn at(&self) -> OpId {
        self.gradients.as_ref().map_or(self.logp, |g| g.at)
    }

    /// Ops that the one op replaces.
    fn replaced(&self) -> Vec<OpId> {
        let gradients = self.gradients.iter().flat_map(|g| [Some(g.at), Some(g.of_x), g.of_head]);
        gradients.flatten().chain([self.logp]).collect()
    }

    /// Ops that come after the one op.
    fn late(&self) -> impl Iterator<Item = OpId> {
        self.gradients.iter().flat_map(|g| g.late.iter().copied())
    }
}

/// Merges them; the logits are left without a use.
pub(super) fn merge(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let users = users(graph);
    let mut heads: Vec<Head> = Vec::new();
    // What one head replaces or moves is nothing that another one may.
    let mut taken: BTreeSet<OpId> = BTreeSet::new();
    for (id, op) in graph.ops() {
        let Some(head) = head_of(graph, id, op, &users) else { continue };
        let mut all = head.replaced();
        all.extend(head.late());
        if all.iter().any(|id| taken.contains(id)) {
            continue;
        }
        taken.extend(all);
        let gradients = if head.gradients.is_some() { ", with gradients" } else { "" };
        context.matched(&format!("log-probabilities of a head{gradients}"), 1);
        heads.push(head);
    }
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        if let Some(head) = heads.iter().find(|head| head.at() == id) {
            push(head, graph, &mut rebuild, program);
        } else if !taken.contains(&id) {
            rebuild.copy(op, program);
        }
    }
    rebuild.finish()
}

/// Per value, the ops that use it. The outputs of the graph are one op behind the last.
fn users(graph: &Graph) -> Vec<Vec<OpId>> {
    let mut users: Vec<Vec<OpId>> = vec![Vec::new(); graph.values().len()];
    for (id, op) in graph.ops() {
        op.args.iter().for_each(|arg| users[arg.0 as usize].push(id));
    }
    for (_, output) in &graph.outputs {
        users[output.0 as usize].push(OpId(graph.len() as u32));
    }
    users
}

/// The head whose log-probabilities an op takes, if nothing else needs its logits.
fn head_of(graph: &Graph, id: OpId, op: &OpData, users: &[Vec<OpId>]) -> Option<Head> {
    let Op::TokenLogp {} = op.op else { return None };
    let logits = op.args[0];
    let product = graph.op(graph.def(logits)?);
    let (x, head) = (*product.args.first()?, *product.args.get(1)?);
    // Narrow logits are half as large, and their product takes narrow operands.
    if !is(product, "_d,vd->_v") || graph.ty(x).dtype != DType::F32 {
        return None;
    }
    let gradients = match users[logits.0 as usize][..] {
        [_] => None,
        [_, at] if at.0 < graph.len() as u32 => Some(gradients_of(graph, id, at, [x, head], users)?),
        _ => return None,
    };
    Some(Head { x, head, tokens: op.args[1], logp: id, gradients })
}

/// The gradients that an op begins, if that of the log-probabilities does not depend on them.
fn gradients_of(graph: &Graph, logp: OpId, at: OpId, [x, head]: [Value; 2], users: &[Vec<OpId>]) -> Option<Gradients> {
    let (forward, op) = (graph.op(logp), graph.op(at));
    if op.op != (Op::TokenLogpGrad {}) || op.args[..2] != forward.args[..] || at < logp {
        return None;
    }
    let mut needs: BTreeSet<Value> = forward.results().collect();
    let mut late = BTreeSet::new();
    for id in (logp.0 + 1..at.0).map(OpId) {
        if graph.op(id).args.iter().any(|arg| needs.contains(arg)) {
            needs.extend(graph.op(id).results());
            late.insert(id);
        }
    }
    let products = &users[op.result().0 as usize];
    let of = |spec: &str, other: Value| {
        let found = products.iter().copied().filter(|id| id.0 < graph.len() as u32);
        let mut found = found.filter(|&id| is(graph.op(id), spec) && graph.op(id).args == [op.result(), other]);
        found.next()
    };
    let (of_x, of_head) = (of("_v,vd->_d", head)?, of("_v,_d->vd", x));
    let all = products.len() == 1 + usize::from(of_head.is_some());
    (all && !needs.contains(&op.args[2])).then_some(Gradients { at, of_logp: op.args[2], of_x, of_head, late })
}

/// Whether an op is a product with these labels, where `_` stands for any others, and letters for any.
fn is(op: &OpData, spec: &str) -> bool {
    let Op::Contract { spec: found } = &op.op else { return false };
    let Ok(found) = Contraction::parse(found) else { return false };
    let sides: Vec<&str> = spec.split([',', '>']).map(|side| side.trim_end_matches('-')).collect();
    let all = [&found.lhs, &found.rhs, &found.out];
    // What the letters of the pattern stand for, as they are met.
    let mut known: Vec<(char, &[char])> = Vec::new();
    sides.iter().zip(all).all(|(side, letters)| {
        let own = side.chars().filter(|&c| c != '_').count();
        let Some(rest) = letters.len().checked_sub(own) else { return false };
        let mut at = 0;
        side.chars().all(|c| {
            let len = if c == '_' { rest } else { 1 };
            let part = &letters[at..at + len];
            at += len;
            match known.iter().find(|k| k.0 == c) {
                Some(k) => k.1 == part,
                None => {
                    known.push((c, part));
                    true
                }
            }
        }) && at == letters.len()
    })
}

/// Pushes the one op, and after it what waited for the log-probabilities.
fn push(head: &Head, graph: &Graph, rebuild: &mut Rebuild, program: &Program) {
    let mut args = vec![head.x, head.head, head.tokens];
    let mut places = vec![graph.op(head.logp)];
    let op = match &head.gradients {
        None => Op::HeadLogp {},
        Some(gradients) => {
            args.push(gradients.of_logp);
            places.extend([Some(gradients.of_x), gradients.of_head].into_iter().flatten().map(|id| graph.op(id)));
            Op::HeadLogpGrad { head: gradients.of_head.is_some() }
        }
    };
    let args: Vec<Value> = args.into_iter().map(|arg| rebuild.get(arg)).collect();
    rebuild.push_all(&places, op, &args, program);
    for id in head.late() {
        rebuild.copy(graph.op(id), program);
    }
}
