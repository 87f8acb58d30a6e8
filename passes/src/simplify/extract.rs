//! The cheapest program in an e-graph, where what is used twice is paid once.
//!
//! To find it is NP-hard (as set cover), so this climbs: from the program that came in, and from the one that is
//! cheapest where sharing does not count, it changes the node of one class at a time as long as the sum of all nodes that
//! are needed falls, and takes the better of both ends. The first start makes the result never worse than what came in;
//! the second knows of gains that need several changes at once. Counting trees alone is a trap: it computes again
//! what is there already, and made a model of 8 layers a third worse.
//!
//! Cost: classes times other nodes per sweep; a body of some hundred ops takes milliseconds.

use std::collections::BTreeMap;

use dsgc_ir::cost::time;
use dsgc_ir::{Bindings, Type};
use egg::{Id, Language};

use super::language::{Data, EGraph, Node, op_and_operands};

/// Sweeps over all classes; three are the most that any program of the examples has used.
const MOST_SWEEPS: usize = 8;

/// A program: a node for each class that it needs, operands first.
pub struct Extracted {
    /// Classes and their nodes.
    pub nodes: Vec<(Id, Node)>,
    /// Its [`time`].
    pub time: u64,
}

/// A way to compute a class.
struct Choice {
    node: Node,
    /// Numbers of the classes of its operands.
    operands: Vec<usize>,
    time: u64,
}

/// The classes of values by number.
struct Classes {
    ids: Vec<Id>,
    choices: Vec<Vec<Choice>>,
    roots: Vec<usize>,
}

/// Which choice of each class is taken.
type Selection = Vec<usize>;

/// The cheapest program that computes `roots`, no worse than the one whose ops are `given`, in program order; `None` if
/// a dim has no bound.
pub fn extract(graph: &EGraph, given: &[Id], roots: &[Id], bounds: &Bindings) -> Option<Extracted> {
    let classes = Classes::new(graph, roots, bounds)?;
    let trees = classes.trees();
    let mut original = trees.clone();
    // Of equal ops the first one: its operands come before it, so the selection has no cycle.
    for &id in given.iter().rev() {
        let class = classes.number(graph, id);
        let node = canonical(graph, graph.id_to_node(id));
        let choice = |wanted: &dyn Fn(&Node) -> bool| classes.choices[class].iter().position(|c| wanted(&c.node));
        let leaf = choice(&|n| matches!(n, Node::Leaf(_)));
        original[class] = leaf.or_else(|| choice(&|n| *n == node)).expect("the class of an op has its node");
    }
    let ends = [original, trees].map(|start| classes.climb(start));
    let (time, best) = ends.into_iter().flatten().min_by_key(|end| end.0)?;
    let (_, order) = classes.total(&best).expect("an end of a climb has no cycle");
    let nodes = order.into_iter().map(|c| (classes.ids[c], classes.choices[c][best[c]].node.clone())).collect();
    Some(Extracted { nodes, time })
}

/// The node with the classes that its operands have now.
pub fn canonical(graph: &EGraph, node: &Node) -> Node {
    node.clone().map_children(|c| graph.find(c))
}

impl Classes {
    fn new(graph: &EGraph, roots: &[Id], bounds: &Bindings) -> Option<Classes> {
        let mut ids: Vec<Id> = graph.classes().filter(|c| matches!(c.data, Data::Value { .. })).map(|c| c.id).collect();
        ids.sort();
        let numbers: BTreeMap<Id, usize> = ids.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        let choice = |id: Id, node: &Node| -> Option<Choice> {
            let node = canonical(graph, node);
            if matches!(node, Node::Leaf(_)) {
                return Some(Choice { node, operands: vec![], time: 0 });
            }
            let (op, operands) = op_and_operands(graph, &node);
            let types: Vec<&Type> = operands.iter().map(|&o| graph[o].data.ty()).collect();
            let time = time(&op, &types, &[graph[id].data.ty()], bounds).ok()?;
            let operands = operands.iter().map(|&o| numbers[&graph.find(o)]).collect();
            Some(Choice { node, operands, time })
        };
        let choices = ids.iter().map(|&id| graph[id].nodes.iter().map(|n| choice(id, n)).collect());
        let choices = choices.collect::<Option<Vec<Vec<Choice>>>>()?;
        let roots = roots.iter().map(|&r| numbers[&graph.find(r)]).collect();
        Some(Classes { ids, choices, roots })
    }

    fn number(&self, graph: &EGraph, id: Id) -> usize {
        self.ids.binary_search(&graph.find(id)).expect("every value has a class")
    }

    /// The choices of the cheapest trees.
    fn trees(&self) -> Selection {
        let mut best = vec![(u64::MAX, 0); self.ids.len()];
        loop {
            let mut changed = false;
            for (class, choices) in self.choices.iter().enumerate() {
                for (i, choice) in choices.iter().enumerate() {
                    let operands = choice.operands.iter().map(|&o| best[o].0);
                    let sum = operands.fold(choice.time, u64::saturating_add);
                    if sum < best[class].0 {
                        (best[class], changed) = ((sum, i), true);
                    }
                }
            }
            if !changed {
                return best.into_iter().map(|b| b.1).collect();
            }
        }
    }

    /// Sum of all nodes that the roots need, and their classes, operands first; `None` if one needs itself.
    fn total(&self, selection: &Selection) -> Option<(u64, Vec<usize>)> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; self.ids.len()];
        let (mut sum, mut order) = (0u64, Vec::new());
        let mut stack: Vec<(usize, usize)> = Vec::new();
        for &root in &self.roots {
            stack.push((root, 0));
            while let Some((class, next)) = stack.pop() {
                let choice = &self.choices[class][selection[class]];
                match marks[class] {
                    Mark::Done => continue,
                    Mark::Open if next == 0 => return None,
                    Mark::New | Mark::Open => marks[class] = Mark::Open,
                }
                if let Some(&operand) = choice.operands.get(next) {
                    stack.push((class, next + 1));
                    stack.push((operand, 0));
                } else {
                    marks[class] = Mark::Done;
                    sum = sum.saturating_add(choice.time);
                    order.push(class);
                }
            }
        }
        Some((sum, order))
    }

    /// Changes the choice of one class at a time for as long as that makes the sum smaller.
    fn climb(&self, mut selection: Selection) -> Option<(u64, Selection)> {
        let (mut best, mut order) = self.total(&selection)?;
        for _ in 0..MOST_SWEEPS {
            let mut changed = false;
            // What is computed last first: its gains make those of its operands superfluous.
            for class in order.into_iter().rev() {
                for other in 0..self.choices[class].len() {
                    let kept = std::mem::replace(&mut selection[class], other);
                    match self.total(&selection) {
                        Some((sum, _)) if sum < best => (best, changed) = (sum, true),
                        _ => selection[class] = kept,
                    }
                }
            }
            (_, order) = self.total(&selection)?;
            if !changed {
                break;
            }
        }
        Some((best, selection))
    }
}
