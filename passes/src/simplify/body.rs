//! The ops of one region as an e-graph: what is searched, and what is found.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::{self, Write};

use dsgc_ir::cost::time;
use dsgc_ir::{Bindings, Op, Type};
use egg::Id;

use super::extract::{Extracted, canonical, extract};
use super::language::{Data, EGraph, Facts, Node, add, op_and_operands};
use super::matching::Rewrite;
use super::rules::RULES;

/// Rounds of matching and applying. A slice moves one op further in each; few bodies need ten.
const MOST_ROUNDS: usize = 24;

/// Nodes of an e-graph, beyond which nothing is applied.
const MOST_NODES: usize = 20_000;

/// Ops within each other that a reader is shown.
const MOST_DEPTH: usize = 8;

/// Where an operand comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// From outside, by number.
    Leaf(usize),
    /// An op, by number.
    Op(usize),
}

/// The ops of a region, apart from where they stand.
pub struct Body {
    /// Ops in program order.
    pub ops: Vec<(Op, Vec<Operand>)>,
    /// What is known of the values from outside.
    pub leaves: Vec<Data>,
    /// Ops whose results are used outside.
    pub roots: Vec<usize>,
    /// The largest values of all dims.
    pub bounds: Bindings,
}

/// What takes the place of a body.
pub struct Plan {
    /// Ops, operands first.
    pub ops: Vec<(Op, Vec<Operand>)>,
    /// What each op of the body has become, if it is still needed.
    pub values: Vec<Option<Operand>>,
    /// How often each rule was of use.
    pub matched: BTreeMap<&'static str, usize>,
    /// Each changed op, a line each.
    pub changes: String,
}

/// Names of values, for readers.
pub struct Names {
    /// Of the values from outside.
    pub leaves: Vec<String>,
    /// Of the ops' results.
    pub results: Vec<String>,
}

/// Equal bodies have equal texts.
impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (symbol, bound) in &self.bounds {
            writeln!(f, "dim {symbol} {bound}")?;
        }
        for leaf in &self.leaves {
            // The bits: a zero has a sign.
            writeln!(f, "leaf {} {:?}", leaf.ty(), leaf.constant().map(f64::to_bits))?;
        }
        for (op, operands) in &self.ops {
            writeln!(f, "{op} {operands:?}")?;
        }
        write!(f, "roots {:?}", self.roots)
    }
}

impl Body {
    /// The cheapest equal program; `None` if none is cheaper.
    pub fn plan(&self, rewrites: &[Rewrite], names: Option<&Names>) -> Option<Plan> {
        let (mut graph, ids) = self.graph();
        saturate(&mut graph, rewrites);
        if graph.analysis.steps.is_empty() {
            return None;
        }
        let roots: Vec<Id> = self.roots.iter().map(|&r| ids[r]).collect();
        let found = extract(&graph, &ids, &roots, &self.bounds)?;
        if found.time >= self.time(&graph, &ids)? {
            return None;
        }
        let mut values: BTreeMap<Id, Operand> = BTreeMap::new();
        let mut ops = Vec::new();
        for (class, node) in &found.nodes {
            if let Node::Leaf(i) = node {
                values.insert(*class, Operand::Leaf(*i as usize));
                continue;
            }
            let (op, operands) = op_and_operands(&graph, node);
            let operands = operands.iter().map(|&o| values[&graph.find(o)]).collect();
            values.insert(*class, Operand::Op(ops.len()));
            ops.push((op, operands));
        }
        let values = ids.iter().map(|&id| values.get(&graph.find(id)).copied()).collect();
        let (matched, changes) = Proof::new(&graph, &ids, &found).of_all(names);
        Some(Plan { ops, values, matched, changes })
    }

    /// The e-graph of the body as it is, and the class of each op.
    fn graph(&self) -> (EGraph, Vec<Id>) {
        let mut graph = EGraph::new(Facts { leaves: self.leaves.clone(), steps: vec![] });
        let leaves: Vec<Id> = (0..self.leaves.len()).map(|i| graph.add(Node::Leaf(i as u32))).collect();
        let mut ids: Vec<Id> = Vec::new();
        for (op, operands) in &self.ops {
            let of = |operand: &Operand| match *operand {
                Operand::Leaf(i) => leaves[i],
                Operand::Op(i) => ids[i],
            };
            let operands: Vec<Id> = operands.iter().map(of).collect();
            ids.push(add(&mut graph, op, &operands));
        }
        graph.rebuild();
        (graph, ids)
    }

    /// How long the body takes as it is.
    fn time(&self, graph: &EGraph, ids: &[Id]) -> Option<u64> {
        let mut sum = 0u64;
        for ((op, operands), &id) in self.ops.iter().zip(ids) {
            let of = |operand: &Operand| match *operand {
                Operand::Leaf(i) => self.leaves[i].ty(),
                Operand::Op(i) => graph[ids[i]].data.ty(),
            };
            let types: Vec<&Type> = operands.iter().map(of).collect();
            sum = sum.saturating_add(time(op, &types, &[graph[id].data.ty()], &self.bounds).ok()?);
        }
        Some(sum)
    }
}

/// Applies all rewrites until nothing new comes, or a limit is met.
fn saturate(graph: &mut EGraph, rewrites: &[Rewrite]) {
    for _ in 0..MOST_ROUNDS {
        let before = graph.analysis.steps.len();
        let found: Vec<_> = rewrites.iter().map(|r| r.search(graph)).collect();
        for (rewrite, matches) in rewrites.iter().zip(found) {
            for (class, subst) in matches {
                if graph.total_size() > MOST_NODES {
                    graph.rebuild();
                    return;
                }
                rewrite.apply(graph, class, &subst);
            }
        }
        graph.rebuild();
        if graph.analysis.steps.len() == before {
            return;
        }
    }
}

/// Why nodes of an e-graph are equal: its nodes, and steps between them, which are the unions that rules made.
struct Proof<'a> {
    graph: &'a EGraph,
    ops: &'a [Id],
    found: &'a Extracted,
    /// Nodes as they are now -> the ids under which they were added.
    added: BTreeMap<Node, Vec<usize>>,
    /// For each id, the ids that a step leads to, and the number of the step.
    steps: Vec<Vec<(usize, usize)>>,
}

impl<'a> Proof<'a> {
    fn new(graph: &'a EGraph, ops: &'a [Id], found: &'a Extracted) -> Proof<'a> {
        let mut added: BTreeMap<Node, Vec<usize>> = BTreeMap::new();
        for (i, node) in graph.nodes().iter().enumerate() {
            added.entry(canonical(graph, node)).or_default().push(i);
        }
        let mut steps = vec![Vec::new(); graph.nodes().len()];
        for (number, &(a, b, _)) in graph.analysis.steps.iter().enumerate() {
            let (a, b) = (usize::from(a), usize::from(b));
            steps[a].push((b, number));
            steps[b].push((a, number));
        }
        Proof { graph, ops, found, added, steps }
    }

    /// The fewest steps from the node of an id to another node of its class.
    fn between(&self, from: usize, to: &Node) -> Vec<usize> {
        let nodes = self.graph.nodes();
        let mut came: BTreeMap<usize, Option<(usize, Option<usize>)>> = BTreeMap::from([(from, None)]);
        let mut next = VecDeque::from([from]);
        while let Some(at) = next.pop_front() {
            let node = canonical(self.graph, &nodes[at]);
            if node == *to {
                let (mut path, mut back) = (Vec::new(), at);
                while let Some((before, step)) = came[&back] {
                    path.extend(step);
                    back = before;
                }
                path.reverse();
                return path;
            }
            let same = self.added[&node].iter().map(|&i| (i, None));
            for (to, step) in same.chain(self.steps[at].iter().map(|&(i, s)| (i, Some(s)))) {
                came.entry(to).or_insert_with(|| {
                    next.push_back(to);
                    Some((at, step))
                });
            }
        }
        Vec::new()
    }

    fn rule(&self, step: usize) -> &'static str {
        RULES[self.graph.analysis.steps[step].2].name
    }

    /// How often each rule was of use, and, for readers, every changed op in words.
    fn of_all(&self, names: Option<&Names>) -> (BTreeMap<&'static str, usize>, String) {
        let (mut used, mut text) = (BTreeSet::new(), String::new());
        let mut ops_of: BTreeMap<Id, Vec<usize>> = BTreeMap::new();
        for (i, &id) in self.ops.iter().enumerate() {
            ops_of.entry(self.graph.find(id)).or_default().push(i);
        }
        for (class, node) in &self.found.nodes {
            let Some(ops) = ops_of.get(class) else {
                // Made by a rule; it may have become something else since.
                let first = (0..self.graph.nodes().len()).find(|&i| self.graph.find(Id::from(i)) == *class);
                used.extend(first.map(|i| self.between(i, node)).unwrap_or_default());
                continue;
            };
            for &op in ops {
                let path = self.between(usize::from(self.ops[op]), node);
                if let Some(names) = names.filter(|_| !path.is_empty()) {
                    let name = &names.results[op];
                    let rules: Vec<&str> = path.iter().map(|&s| self.rule(s)).collect();
                    let before = self.show(names, self.graph.id_to_node(self.ops[op]), 0);
                    let after = self.show(names, node, 0);
                    writeln!(text, "  %{name} = {before}  =>  {after}   by {}", rules.join(", then "))
                        .expect("a string takes all");
                }
                used.extend(path);
            }
        }
        let mut matched = BTreeMap::new();
        for step in used {
            *matched.entry(self.rule(step)).or_default() += 1;
        }
        (matched, text)
    }

    /// A node as text. An operand that has a name is named; others are shown themselves.
    fn show(&self, names: &Names, node: &Node, depth: usize) -> String {
        if let Node::Leaf(i) = node {
            return format!("%{}", names.leaves[*i as usize]);
        }
        let (op, operands) = op_and_operands(self.graph, node);
        let operands: Vec<String> = operands.iter().map(|&o| self.operand(names, o, depth)).collect();
        let attributes = op.attributes().into_iter().map(|(key, text)| format!("{key}={text}"));
        let parts = [op.name().to_string(), operands.join(", ")].into_iter().chain(attributes);
        parts.filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" ")
    }

    fn operand(&self, names: &Names, id: Id, depth: usize) -> String {
        let class = self.graph.find(id);
        if let Some(i) = self.ops.iter().position(|&op| self.graph.find(op) == class) {
            return format!("%{}", names.results[i]);
        }
        match self.found.nodes.iter().find(|(c, _)| *c == class) {
            Some((_, node @ Node::Leaf(_))) => self.show(names, node, depth),
            Some((_, node)) if depth < MOST_DEPTH => format!("({})", self.show(names, node, depth + 1)),
            _ => "..".into(),
        }
    }
}
