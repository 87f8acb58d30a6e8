//! What launches cost: how many there were, how long they took, and the work that the cost formulas give them.

use std::collections::BTreeMap;
use std::time::Duration;

use dsgc_ir::cost::{Cost, cost};
use dsgc_ir::{Bindings, Class, Graph, Op, OpData, Type};

/// Launches of one op of a graph, by its name and the types of its operands.
#[derive(Clone, Debug)]
pub struct Launches {
    /// Name of the graph.
    pub graph: String,
    /// The op, or what else takes time in a run of the graph.
    pub what: String,
    /// How many.
    pub count: u64,
    /// Of all together.
    pub time: Duration,
    /// Of all together, by formula.
    pub cost: Cost,
}

/// What all but launches is called in a run of a graph.
const AROUND: &str = "inputs, outputs and the rest of a run";

/// Counters of a device, by the number of the graph and what was launched.
#[derive(Clone, Debug, Default)]
pub(crate) struct Profile {
    ops: BTreeMap<(usize, u32), (u64, Duration, Cost)>,
    runs: BTreeMap<usize, (u64, Duration)>,
}

impl Profile {
    /// A launch of an op, or a wait. What only names a state or another view of bytes is none.
    pub(crate) fn launched(&mut self, at: (usize, u32), graph: &Graph, op: &OpData, dims: &Bindings, time: Duration) {
        if matches!(op.op.class(), Class::View | Class::State) && !matches!(op.op, Op::Wait {}) {
            return;
        }
        let types =
            |values: &mut dyn Iterator<Item = dsgc_ir::Value>| -> Vec<&Type> { values.map(|v| graph.ty(v)).collect() };
        let (args, results) = (types(&mut op.args.iter().copied()), types(&mut op.results()));
        let work = cost(&op.op, &args, &results, dims).expect("every dim that a value needs is bound");
        let entry = self.ops.entry(at).or_default();
        *entry = (entry.0 + 1, entry.1 + time, entry.2 + work);
    }

    /// A run of a graph, its launches included.
    pub(crate) fn ran(&mut self, graph: usize, time: Duration) {
        let entry = self.runs.entry(graph).or_default();
        *entry = (entry.0 + 1, entry.1 + time);
    }

    /// All counters, equal ops of a graph in one.
    pub(crate) fn launches(&self, graphs: &[Graph]) -> Vec<Launches> {
        let mut all: BTreeMap<(usize, String), (u64, Duration, Cost)> = BTreeMap::new();
        let mut around = self.runs.clone();
        for (&(at, id), &(count, time, work)) in &self.ops {
            let (graph, id) = (&graphs[at], dsgc_ir::OpId(id));
            let types: Vec<String> = graph.op(id).args.iter().map(|&a| graph.ty(a).to_string()).collect();
            let what = format!("{} {}", graph.op(id).op.name(), types.join(", "));
            let entry = all.entry((at, what)).or_default();
            *entry = (entry.0 + count, entry.1 + time, entry.2 + work);
            if let Some((_, rest)) = around.get_mut(&at) {
                *rest = rest.saturating_sub(time);
            }
        }
        let name = |at: usize| graphs[at].name.clone();
        let ops = all.into_iter().map(|((at, what), (count, time, cost))| Launches {
            graph: name(at),
            what,
            count,
            time,
            cost,
        });
        let rest = around.into_iter().map(|(at, (count, time))| Launches {
            graph: name(at),
            what: AROUND.into(),
            count,
            time,
            cost: Cost::default(),
        });
        ops.chain(rest).collect()
    }
}
