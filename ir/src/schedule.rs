//! In which order ranks with different layers work on the parts of a batch.
//!
//! A schedule is a list of [`Action`]s for each place along `pipeline`, which reads `F0 F1 B0 F2 B1 ...`; it says nothing of
//! messages, which follow from what the pieces take from each other. One function makes each [`PipelineOrder`];
//! [`timeline`] finds out whether it ends, and how long it takes.
//!
//! With `p` places, `v` runs of layers at each of them, `m >= p` parts, and equal times for work of every kind, places wait
//! this share of the time, their bubble ([`bubble`]), and place `i` has so many parts under way at most, each in one of its
//! runs:
//!
//! | order | bubble | under way at place `i` |
//! |---|---|---|
//! | `gpipe` | `(p - 1) / (m + p - 1)` | `m` |
//! | `1f1b` | `(p - 1) / (m + p - 1)` | `p - i` |
//! | `interleaved_1f1b` | `(p - 1) / (v m + p - 1)` | `2 (p - 1 - i) + (v - 1) r + 1`, and `v m` at most |
//! | `zero_bubble` | `(p - 1) / (3 m + p - 1)` | `p` |
//!
//! Rounds of interleaved runs have `r` parts: `p` where `m` is a multiple of it, as Megatron-LM wants it (Narayanan et al.
//! 2021, whose warm-up this is), else the most of `floor(m / p)` rounds that are as equal as can be.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

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
    /// The same where every place has several runs of layers, each shorter, so that less is waited for (Narayanan et al. 2021).
    #[serde(rename = "interleaved_1f1b")]
    Interleaved,
    /// [`PipelineOrder::OneForwardOneBackward`] with the gradients of weights apart, which fill what would be waiting: ZB-H1 of Qi et al. 2023.
    #[serde(rename = "zero_bubble")]
    ZeroBubble,
}

impl PipelineOrder {
    /// All of them.
    pub const ALL: [PipelineOrder; 4] = [
        PipelineOrder::Gpipe,
        PipelineOrder::OneForwardOneBackward,
        PipelineOrder::Interleaved,
        PipelineOrder::ZeroBubble,
    ];

    /// The name in YAML.
    pub fn name(self) -> &'static str {
        match self {
            PipelineOrder::Gpipe => "gpipe",
            PipelineOrder::OneForwardOneBackward => "1f1b",
            PipelineOrder::Interleaved => "interleaved_1f1b",
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
    /// Which of the rank's runs of layers does it.
    pub chunk: usize,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.work {
            Work::Forward => 'F',
            Work::Backward => 'B',
            Work::Weight => 'W',
        };
        write!(f, "{letter}{}", self.part)?;
        if self.chunk > 0 { write!(f, ".{}", self.chunk) } else { Ok(()) }
    }
}

/// The actions of each of so many places on so many parts, where every place has so many runs of layers (one, but where they
/// are interleaved).
pub fn schedule(order: PipelineOrder, places: usize, chunks: usize, parts: usize) -> Vec<Vec<Action>> {
    let of_place = |at: usize| match order {
        PipelineOrder::Gpipe => gpipe(parts),
        PipelineOrder::Interleaved if chunks > 1 => interleaved(at, places, chunks, parts),
        PipelineOrder::OneForwardOneBackward | PipelineOrder::Interleaved => one_f_one_b(places - at, parts),
        PipelineOrder::ZeroBubble => zero_bubble(at, places - at, parts),
    };
    (0..places).map(of_place).collect()
}

fn action(work: Work) -> impl Fn(usize) -> Action {
    move |part| Action { work, part, chunk: 0 }
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

/// Parts go through all runs of layers in rounds of at least as many as there are places, so that no place waits for the part
/// that it has just handed on. Before its first gradient a place works as many parts ahead as come back to it meanwhile.
fn interleaved(before_it: usize, places: usize, chunks: usize, parts: usize) -> Vec<Action> {
    let rounds = (parts / places).max(1);
    let rounds: Vec<Range<usize>> = (0..rounds).map(|at| parts * at / rounds..parts * (at + 1) / rounds).collect();
    let all = |work: Work| {
        let order = move |at: usize| if work == Work::Forward { at } else { chunks - 1 - at };
        let of_round = move |round: Range<usize>| {
            (0..chunks).flat_map(move |at| round.clone().map(move |part| Action { work, part, chunk: order(at) }))
        };
        rounds.iter().cloned().flat_map(of_round).collect::<Vec<Action>>()
    };
    let (forward, backward) = (all(Work::Forward), all(Work::Backward));
    let longest = rounds.iter().map(Range::len).max().unwrap_or(0).max(places);
    let ahead = (2 * (places - 1 - before_it) + (chunks - 1) * longest).min(forward.len());
    let mut actions = forward[..ahead].to_vec();
    actions.extend(forward[ahead..].iter().zip(&backward).flat_map(|(f, b)| [*f, *b]));
    actions.extend(&backward[forward.len() - ahead..]);
    actions
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
/// Where pieces do not follow each other as a schedule takes it, forward through all runs of layers and back, or only
/// forward, each part goes through all pieces before the next.
pub fn order_of_pieces(
    order: PipelineOrder,
    pieces: &[Piece],
    places: usize,
    parts: usize,
) -> Vec<Vec<(usize, usize)>> {
    scheduled(order, pieces, places, parts).unwrap_or_else(|| {
        let own = |place: usize| (0..pieces.len()).filter(move |&at| pieces[at].place == place);
        let of_part = |place: usize, part: usize| own(place).map(move |piece| (part, piece));
        (0..places).map(|place| (0..parts).flat_map(|part| of_part(place, part)).collect()).collect()
    })
}

/// [`order_of_pieces`] where pieces follow each other as the schedule takes it.
pub fn scheduled(
    order: PipelineOrder,
    pieces: &[Piece],
    places: usize,
    parts: usize,
) -> Option<Vec<Vec<(usize, usize)>>> {
    let of = |place: usize, work: Work| {
        let is_so = move |(_, piece): &(usize, &Piece)| piece.place == place && piece.work == work;
        pieces.iter().enumerate().filter(is_so).map(|(at, _)| at).collect::<Vec<usize>>()
    };
    let chunks = (0..places).map(|place| of(place, Work::Forward).len()).max().unwrap_or(0).max(1);
    let scheduled = schedule(order, places, if order == PipelineOrder::Interleaved { chunks } else { 1 }, parts);
    let run = |(place, actions): (usize, Vec<Action>)| {
        let pieces_of = |action: Action| {
            let all = of(place, action.work);
            match (order, action.work) {
                (PipelineOrder::Interleaved, Work::Forward) => all.get(action.chunk).copied().into_iter().collect(),
                (PipelineOrder::Interleaved, _) => {
                    let last_first = all.len().checked_sub(1 + action.chunk);
                    last_first.map(|at| all[at]).into_iter().collect()
                }
                _ => all,
            }
        };
        actions.into_iter().flat_map(|a| pieces_of(a).into_iter().map(move |piece| (a.part, piece))).collect()
    };
    let all: Vec<Vec<(usize, usize)>> = scheduled.into_iter().enumerate().map(run).collect();
    let is_complete = all.iter().map(Vec::len).sum::<usize>() == pieces.len() * parts;
    (is_complete && timeline(&all, pieces, |_| 1).is_ok()).then_some(all)
}

/// The share of the time that ranks wait for each other, all of them together, if pieces take so long.
///
/// # Errors
/// Those of [`timeline`].
pub fn bubble(ranks: &[Vec<(usize, usize)>], pieces: &[Piece], time: impl Fn(usize) -> u64) -> Result<f64, String> {
    let last = timeline(ranks, pieces, &time)?.into_iter().flatten().max().unwrap_or(0);
    let busy: u64 = ranks.iter().flatten().map(|&(_, piece)| time(piece)).sum();
    Ok(1.0 - busy as f64 / (last * ranks.len() as u64).max(1) as f64)
}

/// When each of the actions of all ranks ends, if pieces take so long and an action begins when those that it needs have
/// ended: an action is a part and a piece, and needs what the piece takes of the same part. Messages are kept until somebody
/// takes them, so nobody waits for a receiver.
///
/// # Errors
/// If some of them wait for each other: the actions, ranks and all.
pub fn timeline(
    ranks: &[Vec<(usize, usize)>],
    pieces: &[Piece],
    time: impl Fn(usize) -> u64,
) -> Result<Vec<Vec<u64>>, String> {
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
        for needed in pieces[piece].takes.iter().map(|taken| taken.piece) {
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
    let mut ends: Vec<Vec<u64>> = ranks.iter().map(|actions| vec![0; actions.len()]).collect();
    for node in sorted {
        let before = graph.neighbors_directed(node, petgraph::Incoming).map(|n| {
            let (rank, at) = graph[n];
            ends[rank][at]
        });
        let begin = before.max().unwrap_or(0);
        let (rank, at) = graph[node];
        ends[rank][at] = begin + time(ranks[rank][at].1);
    }
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::Taken;

    /// The pieces of a model in so many runs of layers, which places take in turn: forward, back, and the gradients of weights.
    fn chain(places: usize, chunks: usize, order: PipelineOrder) -> Vec<Piece> {
        let piece = |run: usize, work, takes: &[usize]| Piece {
            graph: String::new(),
            place: run % places,
            work,
            takes: takes.iter().map(|&piece| Taken { piece, values: vec![] }).collect(),
            gives: vec![],
            writes: vec![],
        };
        let runs = places * chunks;
        let mut pieces: Vec<Piece> = Vec::new();
        for run in 0..runs {
            pieces.push(piece(run, Work::Forward, &Vec::from_iter(run.checked_sub(1))));
        }
        for run in (0..runs).rev() {
            let next = if run + 1 == runs { run } else { 2 * runs - 2 - run };
            pieces.push(piece(run, Work::Backward, &[run, next]));
        }
        if order.splits_backward() {
            pieces.extend((0..runs).map(|run| piece(run, Work::Weight, &[2 * runs - 1 - run])));
        }
        pieces
    }

    /// Most parts that a run of layers at a place has begun and not ended with, added up.
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
        let mut all = Vec::new();
        for (order, places, parts) in
            PipelineOrder::ALL.into_iter().flat_map(|o| (1..6).flat_map(move |p| (1..13).map(move |m| (o, p, m))))
        {
            let chunks = if order == PipelineOrder::Interleaved { 1..4 } else { 1..2 };
            all.extend(chunks.map(|chunks| (order, places, chunks, parts)));
        }
        for (order, places, chunks, parts) in all {
            let what = format!("{} of {places} places, {chunks} runs and {parts} parts", order.name());
            let pieces = chain(places, chunks, order);
            let ranks = order_of_pieces(order, &pieces, places, parts);
            let ends = timeline(&ranks, &pieces, |_| 1);
            let ends = ends.unwrap_or_else(|why| panic!("{what}: {why}"));
            let count: usize = ranks.iter().map(Vec::len).sum();
            assert_eq!(count, pieces.len() * parts, "{what}");
            let actions = schedule(order, places, chunks, parts);
            for (place, actions) in actions.iter().enumerate() {
                let most = match order {
                    PipelineOrder::Gpipe => parts,
                    PipelineOrder::Interleaved if chunks > 1 => {
                        // Rounds are as long as places are many, and longer by what does not fill another one.
                        let round = parts.div_ceil((parts / places).max(1)).max(places);
                        (2 * (places - 1 - place) + (chunks - 1) * round + 1).min(chunks * parts)
                    }
                    PipelineOrder::OneForwardOneBackward | PipelineOrder::Interleaved => (places - place).min(parts),
                    PipelineOrder::ZeroBubble => places.min(parts),
                };
                assert_eq!(under_way(actions), most, "{what}: parts under way at {place}");
            }
            // The bubble is what is left where there are parts enough to fill it.
            let (p, m, v, lacking) = (places, parts, chunks, places.saturating_sub(parts));
            let formula = match order {
                PipelineOrder::Gpipe | PipelineOrder::OneForwardOneBackward => 2 * (m + p - 1),
                PipelineOrder::Interleaved => 2 * (m * v + p - 1) + 2 * (v - 1) * lacking,
                PipelineOrder::ZeroBubble => 3 * m + p - 1 + lacking,
            };
            assert_eq!(ends.into_iter().flatten().max(), Some(formula as u64), "{what}");
            let share = 1.0 - (pieces.len() * m) as f64 / (formula * p) as f64;
            assert_eq!(bubble(&ranks, &pieces, |_| 1), Ok(share), "{what}");
        }
    }

    #[test]
    fn schedules_read_as_text() {
        let text = |order, place: usize, chunks| {
            let actions = &schedule(order, 3, chunks, 4)[place];
            actions.iter().map(Action::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(text(PipelineOrder::Gpipe, 1, 1), "F0 F1 F2 F3 B0 B1 B2 B3");
        assert_eq!(text(PipelineOrder::OneForwardOneBackward, 0, 1), "F0 F1 F2 B0 F3 B1 B2 B3");
        assert_eq!(text(PipelineOrder::OneForwardOneBackward, 2, 1), "F0 B0 F1 B1 F2 B2 F3 B3");
        assert_eq!(text(PipelineOrder::ZeroBubble, 2, 1), "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3");
        assert_eq!(
            text(PipelineOrder::Interleaved, 2, 2),
            "F0 F1 F2 F3 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 B0 B1 B2 B3"
        );
    }

    /// Where something forward needs gradients, a part ends before the next begins.
    #[test]
    fn what_no_schedule_fits_runs_part_by_part() {
        let mut pieces = chain(2, 1, PipelineOrder::Gpipe);
        pieces.push(Piece { takes: vec![Taken { piece: 3, values: vec![] }], ..pieces[0].clone() });
        for order in [PipelineOrder::Gpipe, PipelineOrder::OneForwardOneBackward] {
            let ranks = order_of_pieces(order, &pieces, 2, 2);
            let expected =
                [[(0, 0), (0, 3), (0, 4), (1, 0), (1, 3), (1, 4)].to_vec(), vec![(0, 1), (0, 2), (1, 1), (1, 2)]];
            assert_eq!(ranks, expected);
        }
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_found() {
        let mut pieces = chain(2, 1, PipelineOrder::Gpipe);
        pieces[0].takes = vec![Taken { piece: 1, values: vec![] }];
        let why = timeline(&[vec![(0, 0)], vec![(0, 1)]], &pieces, |_| 1).expect_err("each needs the other first");
        assert!(why.ends_with("waits for itself"), "{why}");
    }
}
