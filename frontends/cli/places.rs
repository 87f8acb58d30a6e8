//! The report of ranks with different layers: what each place along `pipeline` has, and how long they wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use dsgc_ir::cost::graph_time;
use dsgc_ir::held::parts_of_graphs;
use dsgc_ir::schedule::{Work, bubble, order_of_pieces, scheduled};
use dsgc_ir::stage::Piece;
use dsgc_ir::{Op, Phase, Planned};
use serde_json::{Value, json};

use crate::report::size;

/// What places along `pipeline` have and do.
pub struct PlacesReport {
    /// Name of the schedule.
    order: &'static str,
    places: Vec<Place>,
    gradients: Vec<Gradient>,
}

/// What the ranks of a place have.
struct Place {
    /// Numbers of layers, by the name of what repeats.
    layers: BTreeMap<String, BTreeSet<u32>>,
    /// Bytes of the arena.
    peak: usize,
    /// Most bytes that lie in the host's memory between pieces.
    held: usize,
}

/// A graph of gradients in pieces.
struct Gradient {
    graph: String,
    /// Parts of a full batch.
    parts: usize,
    /// The share of the time that places wait, by the cost formulas.
    bubble: f64,
    /// Whether its pieces are such that places follow the schedule.
    is_scheduled: bool,
}

impl PlacesReport {
    /// Reads the report off the programs of all places.
    pub fn new(programs: &[Planned]) -> PlacesReport {
        let order = programs[0].stage.parallel.order;
        let parts = parts_of_graphs(&programs[0]);
        let mut gradients = Vec::new();
        for (graph, pieces) in &programs[0].stage.pieces {
            if pieces.iter().all(|piece| piece.work == Work::Forward) {
                continue;
            }
            let parts = parts.get(graph).copied().unwrap_or(1);
            let actions = order_of_pieces(order, pieces, programs.len(), parts);
            let time = |piece: &Piece| {
                let graph = programs[piece.place].graph(&piece.graph).expect("the pass made it");
                graph_time(graph, &graph.upper_bounds()).unwrap_or(0)
            };
            let times: Vec<u64> = pieces.iter().map(time).collect();
            let bubble = bubble(&actions, pieces, |at| times[at]);
            let bubble = bubble.unwrap_or_else(|why| panic!("bug: the schedule of @{graph} has no end: {why}"));
            let is_scheduled = scheduled(order, pieces, programs.len(), parts).is_some();
            gradients.push(Gradient { graph: graph.clone(), parts, bubble, is_scheduled });
        }
        PlacesReport { order: order.name(), places: programs.iter().map(Place::new).collect(), gradients }
    }

    /// The report as JSON; sizes in bytes.
    pub fn json(&self) -> Value {
        let place = |place: &Place| json!({"layers": place.layers, "peak": place.peak, "held": place.held});
        let gradient = |g: &Gradient| {
            json!({
                "graph": g.graph, "parts": g.parts, "bubble": g.bubble, "scheduled": g.is_scheduled,
            })
        };
        json!({
            "schedule": self.order,
            "places": self.places.iter().map(place).collect::<Vec<_>>(),
            "gradients": self.gradients.iter().map(gradient).collect::<Vec<_>>(),
        })
    }
}

impl Place {
    fn new(program: &Planned) -> Place {
        let mut layers: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        // What is cheap may run at other places too: a layer is where its weights are read.
        for (_, op) in program.graphs.iter().flat_map(|graph| graph.ops()) {
            if let (Op::Read { state }, Phase::Forward, Some(tag)) = (&op.op, op.site.phase, &op.site.tag)
                && program.state(*state).ty.rank() > 0
            {
                layers.entry(tag.block.to_string()).or_default().insert(tag.instance);
            }
        }
        Place { layers, peak: program.arena.total(), held: program.arena.held }
    }
}

impl fmt::Display for PlacesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "  pipeline        {}: layers of each place, memory, most beside it for values between pieces",
            self.order
        )?;
        for (at, place) in self.places.iter().enumerate() {
            let layers = place.layers.iter().map(|(block, numbers)| format!("{} of {block}", ranges(numbers)));
            let layers = layers.collect::<Vec<_>>().join(", ");
            write!(f, "\n    place {at:<7} {layers}: {}, {}", size(place.peak), size(place.held))?;
        }
        for Gradient { graph, parts, bubble, is_scheduled } in &self.gradients {
            write!(f, "\n    bubble        {:.1} % of the time of {graph} in {parts} parts", 100.0 * bubble)?;
            if !is_scheduled {
                write!(f, ", one after the other: its pieces do not follow each other as {} has them", self.order)?;
            }
        }
        Ok(())
    }
}

/// `0-3, 8-11`.
fn ranges(numbers: &BTreeSet<u32>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let run = |(first, last): (u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.into_iter().map(run).collect::<Vec<_>>().join(", ")
}
