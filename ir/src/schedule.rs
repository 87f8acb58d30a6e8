//! In which order ranks with different layers work on the parts of a batch.
//!
//! A schedule is a list of [`Action`]s for each place along `pipeline`, which reads `F0 F1 B0 F2 B1 ...`; it says nothing of
//! messages, which follow from what the pieces take from each other. One function makes each [`PipelineOrder`];
//! [`timeline`] finds out whether it ends, and how long it takes.

use std::collections::BTreeMap;
use std::fmt;

use petgraph::algo::toposort;
use petgraph::graph::DiGraph;
use serde::{Deserialize, Serialize};

use crate::stage::Piece;

/// The kinds of schedules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PipelineOrder {
    /// All parts forward, then all backward (Huang et al. 2019).
    #[default]
    #[serde(rename = "gpipe")]
    Gpipe,
    /// Backward as early as can be, so a place has no more parts under way than there are places from it on (Narayanan et al.
    /// 2019, PipeDream-Flush).
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// The same with the gradients of weights apart, which fill what would be waiting: ZB-H1 of Qi et al. 2023.
    #[serde(rename = "zero_bubble")]
    ZeroBubble,
}

impl PipelineOrder {
    /// All of them.
    pub const ALL: [PipelineOrder; 3] =
        [PipelineOrder::Gpipe, PipelineOrder::OneForwardOneBackward, PipelineOrder::ZeroBubble];

    /// The name in YAML.
    pub fn name(self) -> &'static str {
        match self {
            PipelineOrder::Gpipe => "gpipe",
            PipelineOrder::OneForwardOneBackward => "1f1b",
            PipelineOrder::ZeroBubble => "zero_bubble",
        }
    }

    /// Whether gradients of weights are computed apart from those that flow on.
    pub fn splits_backward(self) -> bool {
        self == PipelineOrder::ZeroBubble
    }

    /// Whether it is left out of the text form.
    pub(crate) fn is_default(&self) -> bool {
        *self == PipelineOrder::default()
    }
}

/// What a piece of a graph does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// The graph itself.
    Forward,
    /// Gradients; where those of weights are apart, the ones that flow on.
    Backward,
    /// Gradients of weights.
    Weight,
}

/// What a rank does next: this work on this part of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Action {
    /// What is done.
    pub work: Work,
    /// The number of the part.
    pub part: usize,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.work {
            Work::Forward => 'F',
            Work::Backward => 'B',
            Work::Weight => 'W',
        };
        write!(f, "{letter}{}", self.part)
    }
}

/// The actions of each of so many places on so many parts.
pub fn schedule(order: PipelineOrder, places: usize, parts: usize) -> Vec<Vec<Action>> {
    match order {
        PipelineOrder::Gpipe => (0..places).map(|_| gpipe(parts)).collect(),
        PipelineOrder::OneForwardOneBackward => (0..places).map(|at| one_f_one_b(places - at, parts)).collect(),
        PipelineOrder::ZeroBubble => (0..places).map(|at| zero_bubble(at, places - at, parts)).collect(),
    }
}

fn action(work: Work) -> impl Fn(usize) -> Action {
    move |part| Action { work, part }
}

fn gpipe(parts: usize) -> Vec<Action> {
    (0..parts).map(action(Work::Forward)).chain((0..parts).map(action(Work::Backward))).collect()
}

/// For a place with so many places from it on.
fn one_f_one_b(from_it_on: usize, parts: usize) -> Vec<Action> {
    let ahead = (from_it_on - 1).min(parts);
    let mut all: Vec<Action> = (0..ahead).map(action(Work::Forward)).collect();
    for part in ahead..parts {
        all.extend([action(Work::Forward)(part), action(Work::Backward)(part - ahead)]);
    }
    all.extend((parts - ahead..parts).map(action(Work::Backward)));
    all
}

/// As [`one_f_one_b`], and the gradients of weights as many parts later as there are places before it: so every place has as
/// many parts under way as there are places, and none waits between its first gradient and its last.
fn zero_bubble(before_it: usize, from_it_on: usize, parts: usize) -> Vec<Action> {
    let mut all = Vec::new();
    let (mut backward, mut weight) = (0, 0);
    for next in one_f_one_b(from_it_on, parts) {
        all.push(next);
        backward += usize::from(next.work == Work::Backward);
        if next.work == Work::Backward && backward > before_it {
            all.push(action(Work::Weight)(weight));
            weight += 1;
        }
    }
    all.extend((weight..parts).map(action(Work::Weight)));
    all
}

/// Which pieces each place runs on which part, in its order: `(part, piece)`.
///
/// Where pieces do not follow each other as a schedule takes it, forward through all places and back, or only forward,
/// each part goes through all pieces before the next.
pub fn order_of_pieces(
    order: PipelineOrder,
    pieces: &[Piece],
    places: usize,
    parts: usize,
) -> Vec<Vec<(usize, usize)>> {
    let of = |place: usize, work: Work| {
        pieces.iter().enumerate().filter(move |(_, p)| p.place == place && p.work == work).map(|(at, _)| at)
    };
    if pieces.iter().any(|piece| piece.work != Work::Forward) {
        let scheduled = schedule(order, places, parts).into_iter().enumerate();
        let run = |(place, actions): (usize, Vec<Action>)| {
            actions.into_iter().flat_map(|a| of(place, a.work).map(move |piece| (a.part, piece))).collect()
        };
        let all: Vec<Vec<(usize, usize)>> = scheduled.map(run).collect();
        if timeline(&all, |piece| pieces[piece].takes.iter().map(|t| t.piece).collect()).is_ok() {
            return all;
        }
    }
    let own = |place: usize| (0..pieces.len()).filter(move |&at| pieces[at].place == place);
    (0..places).map(|place| (0..parts).flat_map(|part| own(place).map(move |piece| (part, piece))).collect()).collect()
}

/// When each of the actions of all ranks ends, if each takes one unit of time and begins when those that it needs have
/// ended: an action is a part and a piece, and needs some pieces on the same part. Messages are kept until somebody takes them,
/// so nobody waits for a receiver.
///
/// # Errors
/// If some of them wait for each other: the actions, ranks and all.
pub fn timeline(ranks: &[Vec<(usize, usize)>], needs: impl Fn(usize) -> Vec<usize>) -> Result<Vec<Vec<usize>>, String> {
    let mut graph = DiGraph::<(usize, usize), ()>::new();
    let mut nodes = BTreeMap::new();
    for (rank, actions) in ranks.iter().enumerate() {
        for (at, action) in actions.iter().enumerate() {
            let node = graph.add_node((rank, at));
            if nodes.insert(*action, node).is_some() {
                return Err(format!("piece {} on part {} stands twice", action.1, action.0));
            }
            if at > 0 {
                graph.add_edge(nodes[&actions[at - 1]], node, ());
            }
        }
    }
    for (&(part, piece), &node) in &nodes {
        for needed in needs(piece) {
            let Some(&before) = nodes.get(&(part, needed)) else {
                return Err(format!("piece {piece} on part {part} needs piece {needed}, which nobody runs"));
            };
            graph.add_edge(before, node, ());
        }
    }
    let sorted = toposort(&graph, None).map_err(|cycle| {
        let (rank, at) = graph[cycle.node_id()];
        let (part, piece) = ranks[rank][at];
        format!("piece {piece} on part {part} of rank {rank} waits for itself")
    })?;
    let mut ends: Vec<Vec<usize>> = ranks.iter().map(|actions| vec![0; actions.len()]).collect();
    for node in sorted {
        let before = graph.neighbors_directed(node, petgraph::Incoming).map(|n| {
            let (rank, at) = graph[n];
            ends[rank][at]
        });
        let begin = before.max().unwrap_or(0);
        let (rank, at) = graph[node];
        ends[rank][at] = begin + 1;
    }
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::Taken;

    /// The pieces of a model in so many places: forward, back, and the gradients of weights.
    fn chain(places: usize, order: PipelineOrder) -> Vec<Piece> {
        let piece = |place: usize, work, takes: &[usize]| Piece {
            graph: String::new(),
            place,
            work,
            takes: takes.iter().map(|&piece| Taken { piece, values: vec![] }).collect(),
            gives: vec![],
        };
        let mut pieces: Vec<Piece> = Vec::new();
        for place in 0..places {
            pieces.push(piece(place, Work::Forward, &Vec::from_iter(place.checked_sub(1))));
        }
        for place in (0..places).rev() {
            let next = if place + 1 == places { place } else { 2 * places - 2 - place };
            pieces.push(piece(place, Work::Backward, &[place, next]));
        }
        if order.splits_backward() {
            pieces.extend((0..places).map(|place| piece(place, Work::Weight, &[2 * places - 1 - place])));
        }
        pieces
    }

    /// Most parts that a place has begun and not ended with.
    fn under_way(actions: &[Action]) -> usize {
        let last = if actions.iter().any(|a| a.work == Work::Weight) { Work::Weight } else { Work::Backward };
        let mut now = 0usize;
        let count = |action: &Action| {
            now += usize::from(action.work == Work::Forward);
            let all = now;
            now -= usize::from(action.work == last);
            all
        };
        actions.iter().map(count).max().unwrap_or(0)
    }

    #[test]
    fn schedules_are_complete_end_and_take_as_long_as_their_formulas_say() {
        for (order, places, parts) in
            PipelineOrder::ALL.into_iter().flat_map(|o| (1..6).flat_map(move |p| (1..13).map(move |m| (o, p, m))))
        {
            let what = format!("{} of {places} places and {parts} parts", order.name());
            let pieces = chain(places, order);
            let ranks = order_of_pieces(order, &pieces, places, parts);
            let ends = timeline(&ranks, |piece| pieces[piece].takes.iter().map(|t| t.piece).collect());
            let ends = ends.unwrap_or_else(|why| panic!("{what}: {why}"));
            let count: usize = ranks.iter().map(Vec::len).sum();
            assert_eq!(count, pieces.len() * parts, "{what}");
            let actions = schedule(order, places, parts);
            for (place, actions) in actions.iter().enumerate() {
                let most = match order {
                    PipelineOrder::Gpipe => parts,
                    PipelineOrder::OneForwardOneBackward => (places - place).min(parts),
                    PipelineOrder::ZeroBubble => places.min(parts),
                };
                assert!(under_way(actions) <= most, "{what}: {} under way at {place}", under_way(actions));
            }
            let span = ends.into_iter().flatten().max().expect("there are actions");
            match order {
                PipelineOrder::Gpipe | PipelineOrder::OneForwardOneBackward => {
                    assert_eq!(span, 2 * (parts + places - 1), "{what}");
                }
                // The bubble is (p - 1)(F + B - W) where there are parts enough to fill it.
                PipelineOrder::ZeroBubble => {
                    assert_eq!(span, 3 * parts + places - 1 + places.saturating_sub(parts), "{what}");
                }
            }
        }
    }

    #[test]
    fn schedules_read_as_text() {
        let text = |order, place: usize| {
            let actions = &schedule(order, 3, 4)[place];
            actions.iter().map(Action::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(text(PipelineOrder::Gpipe, 1), "F0 F1 F2 F3 B0 B1 B2 B3");
        assert_eq!(text(PipelineOrder::OneForwardOneBackward, 0), "F0 F1 F2 B0 F3 B1 B2 B3");
        assert_eq!(text(PipelineOrder::OneForwardOneBackward, 2), "F0 B0 F1 B1 F2 B2 F3 B3");
        assert_eq!(text(PipelineOrder::ZeroBubble, 2), "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3");
    }

    /// Of a graph that goes through all places twice, a part ends before the next begins.
    #[test]
    fn what_no_schedule_fits_runs_part_by_part() {
        let order = PipelineOrder::OneForwardOneBackward;
        let mut pieces = chain(2, order);
        pieces.insert(2, Piece { takes: vec![Taken { piece: 1, values: vec![] }], ..pieces[0].clone() });
        pieces.insert(3, Piece { takes: vec![Taken { piece: 2, values: vec![] }], ..pieces[1].clone() });
        for (at, piece) in pieces.iter_mut().enumerate().skip(4) {
            piece.takes = vec![Taken { piece: at - 1, values: vec![] }];
        }
        let ranks = order_of_pieces(order, &pieces, 2, 2);
        assert_eq!(
            ranks,
            [
                vec![(0, 0), (0, 2), (0, 5), (1, 0), (1, 2), (1, 5)],
                vec![(0, 1), (0, 3), (0, 4), (1, 1), (1, 3), (1, 4)]
            ]
        );
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_found() {
        let needs = |piece: usize| vec![1 - piece];
        let why = timeline(&[vec![(0, 0)], vec![(0, 1)]], needs).expect_err("each needs the other first");
        assert!(why.ends_with("waits for itself"), "{why}");
    }
}
