//! The report of ranks with different layers: what each place along `pipeline` has, and how long they wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use dsgc_ir::cost::{graph_time, handed_on};
use dsgc_ir::schedule::{bubble, order_of_pieces};
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
    /// Most bytes that lie on the host between pieces.
    held: u64,
}

/// A graph of gradients in pieces.
struct Gradient {
    graph: String,
    /// Parts of a full batch.
    parts: usize,
    /// The share of the time that places wait, by the cost formulas.
    bubble: f64,
}

impl PlacesReport {
    /// Reads the report off the programs of all places, and the graphs of gradients with the parts of a full batch.
    pub fn new(programs: &[Planned], gradients: &[(String, usize)]) -> PlacesReport {
        let order = programs[0].stage.parallel.order;
        let mut places: Vec<Place> = programs.iter().map(Place::new).collect();
        let mut reports = Vec::new();
        for (graph, parts) in gradients {
            let Some(pieces) = programs[0].stage.pieces.get(graph) else { continue };
            let actions = order_of_pieces(order, pieces, places.len(), *parts);
            let graph_of = |at: usize| {
                let graph = programs[pieces[at].place].graph(&pieces[at].graph).expect("the pass made it");
                (graph, graph.upper_bounds())
            };
            let time = |at: usize| {
                let (graph, bounds) = graph_of(at);
                graph_time(graph, &bounds).unwrap_or(0)
            };
            let times: Vec<u64> = (0..pieces.len()).map(time).collect();
            let bubble = bubble(&actions, pieces, |at| times[at]);
            let bubble = bubble.unwrap_or_else(|why| panic!("bug: the schedule of @{graph} has no end: {why}"));
            reports.push(Gradient { graph: graph.clone(), parts: *parts, bubble });
            let handed =
                |at: usize| handed_on(&programs[pieces[at].place], pieces, at, &graph_of(at).1).unwrap_or_default();
            let handed: Vec<Vec<u64>> = (0..pieces.len()).map(handed).collect();
            for (at, place) in places.iter_mut().enumerate() {
                place.held = place.held.max(most_held(pieces, &actions[at], at, &handed));
            }
        }
        PlacesReport { order: order.name(), places, gradients: reports }
    }

    /// The report as JSON; sizes in bytes.
    pub fn json(&self) -> Value {
        let place = |place: &Place| json!({"layers": place.layers, "peak": place.peak, "held": place.held});
        let gradient = |g: &Gradient| json!({"graph": g.graph, "parts": g.parts, "bubble": g.bubble});
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
        Place { layers, peak: program.arena.total(), held: 0 }
    }
}

/// Most bytes that pieces of a place have got from each other and from other places, and not yet used up.
fn most_held(pieces: &[Piece], actions: &[(usize, usize)], place: usize, handed: &[Vec<u64>]) -> u64 {
    let (mut held, mut most) = (BTreeMap::<(usize, usize), u64>::new(), 0);
    let takers = |of: usize| {
        let own = pieces.iter().enumerate().filter(move |(_, piece)| piece.place == place);
        own.filter(move |(_, piece)| piece.takes.iter().any(|taken| taken.piece == of)).map(|(at, _)| at)
    };
    for &(part, at) in actions {
        for taken in &pieces[at].takes {
            held.insert((part, taken.piece), handed[taken.piece][place]);
        }
        if takers(at).next().is_some() {
            held.insert((part, at), handed[at][place]);
        }
        most = most.max(held.values().sum());
        held.retain(|&(of_part, of), _| of_part != part || takers(of).max() > Some(at));
    }
    most
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
            write!(f, "\n    place {at:<7} {layers}: {}, {}", size(place.peak), size(place.held as usize))?;
        }
        for Gradient { graph, parts, bubble } in &self.gradients {
            write!(f, "\n    bubble        {:.1} % of the time of {graph} in {parts} parts", 100.0 * bubble)?;
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
