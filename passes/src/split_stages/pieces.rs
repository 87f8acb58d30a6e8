//! From the places of ops to graphs of pieces.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::schedule::Work;
use dsgc_ir::stage::{Piece, Taken};
use dsgc_ir::{Class, Graph, Op, OpId, Program, Value};

use super::Layers;
use super::places::{Homes, Placed, Places, Prepared};
use crate::rebuild::Rebuild;

/// A graph in pieces.
pub(super) struct Cut {
    /// The graph with its inputs alone.
    pub inputs: Graph,
    pub pieces: Vec<Piece>,
    /// Their graphs.
    pub graphs: Vec<Graph>,
}

/// What makes ops one piece, in the order in which pieces run: level, work, place.
type Key = (usize, u8, usize);

/// Cuts a graph; `None` if every rank can run all of it.
pub(super) fn cut(program: &Program, prepared: &Prepared, layers: &Layers, homes: &Homes) -> Option<Cut> {
    let graph = &prepared.graph;
    let all: Places = (0..program.mesh.pipeline).collect();
    let of_one_place = |op: &Op| match op {
        Op::Read { state } | Op::Write { state } => homes[state] != all,
        _ => op.class() == Class::Collective,
    };
    if prepared.pinned.is_empty() && !graph.ops().any(|(_, op)| of_one_place(&op.op)) {
        return None;
    }
    let placed = Placed::of(program, prepared, layers, homes);
    let (needed, keys, adds) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut cutting = Cutting { program, prepared, homes, placed, needed, keys, adds };
    cutting.need();
    cutting.join();
    cutting.add_up();
    Some(cutting.finish())
}

struct Cutting<'a> {
    program: &'a Program,
    prepared: &'a Prepared,
    homes: &'a Homes,
    placed: Placed,
    /// Ops that are not made anew, with the places whose pieces need their results.
    needed: BTreeMap<OpId, Places>,
    /// The piece of such an op at a place.
    keys: BTreeMap<(OpId, usize), Key>,
    /// The piece that adds to an accumulator, by the write; other writes are in the last piece of a place.
    adds: BTreeMap<OpId, Key>,
}

/// Where a piece has a value from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// An input of the graph.
    Host,
    /// It is made anew by this op.
    Anew(OpId),
    /// This op makes it at this place.
    Op(OpId, usize),
    /// It could be made anew at this place only.
    Elsewhere(usize),
}

impl Cutting<'_> {
    fn graph(&self) -> &Graph {
        &self.prepared.graph
    }

    fn from(&self, value: Value, place: usize) -> From {
        let Some(def) = self.graph().def(value) else { return From::Host };
        let here = self.placed.on(value).contains(&place);
        match (self.placed.is_light(value), here) {
            (true, true) => From::Anew(def),
            (true, false) => From::Elsewhere(self.placed.source(self.graph(), value)),
            (false, true) => From::Op(def, place),
            (false, false) => From::Op(def, self.placed.source(self.graph(), value)),
        }
    }

    /// The places that write a state.
    fn writers(&self, id: OpId) -> &Places {
        match (self.prepared.pinned.get(&id), &self.graph().op(id).op) {
            (Some(places), _) => places,
            (None, Op::Write { state }) => &self.homes[state],
            (None, op) => panic!("bug: `{}` writes nothing", op.name()),
        }
    }

    /// Finds out what is needed where, from the end.
    fn need(&mut self) {
        let graph = &self.prepared.graph;
        let outputs = graph.outputs.iter().map(|(_, value)| (*value, self.placed.source(graph, *value)));
        let mut open: Vec<(Value, usize)> = outputs.collect();
        for (id, op) in graph.ops().filter(|(_, op)| matches!(op.op, Op::Write { .. })) {
            open.extend(self.writers(id).iter().map(|&place| (op.args[0], place)));
        }
        let mut seen: BTreeSet<(Value, usize)> = BTreeSet::new();
        while let Some((value, place)) = open.pop() {
            if !seen.insert((value, place)) {
                continue;
            }
            match self.from(value, place) {
                From::Host => {}
                From::Anew(def) => open.extend(graph.op(def).args.iter().map(|&arg| (arg, place))),
                From::Elsewhere(source) => open.push((value, source)),
                From::Op(def, source) => {
                    if self.needed.entry(def).or_default().insert(source) {
                        let (level, work) =
                            (self.placed.level[def.0 as usize][&source], self.placed.work[def.0 as usize]);
                        self.keys.insert((def, source), (level, work, source));
                    }
                    open.extend(graph.op(def).args.iter().map(|&arg| (arg, source)));
                }
            }
        }
    }

    /// Joins pieces of one place and one work where none of another place or work comes between them, so that there are few:
    /// an earlier one waits for the next.
    fn join(&mut self) {
        loop {
            let keys: BTreeSet<Key> = self.keys.values().copied().collect();
            let next =
                |key: &Key| keys.iter().find(|other| other.0 > key.0 && (other.1, other.2) == (key.1, key.2)).copied();
            let mut earliest: BTreeMap<Key, usize> = BTreeMap::new();
            for (&(id, place), &user) in &self.keys {
                for &arg in &self.graph().op(id).args {
                    if let From::Op(def, source) = self.from(arg, place) {
                        let of = self.keys[&(def, source)];
                        if (of.1, of.2) != (user.1, user.2) {
                            let level = earliest.entry(of).or_insert(user.0);
                            *level = user.0.min(*level);
                        }
                    }
                }
            }
            // What crosses to another place, or to another work, is there one level before.
            let joined = keys.iter().find_map(|key| {
                let next = next(key)?;
                earliest.get(key).is_none_or(|&level| level > next.0).then_some((*key, next))
            });
            let Some((key, next)) = joined else { break };
            self.keys.values_mut().filter(|of| **of == key).for_each(|of| *of = next);
        }
    }

    /// Accumulators are read, added to and written in one piece: between two of them those of other parts may run.
    fn add_up(&mut self) {
        for (&id, places) in &self.prepared.pinned {
            let op = self.prepared.graph.op(id);
            let Some(sum) = op.args.first().and_then(|&arg| self.prepared.graph.def(arg)) else { continue };
            if !matches!(op.op, Op::Write { .. }) || !self.prepared.sums.contains(&sum) {
                continue;
            }
            let &place = places.first().expect("it is somewhere");
            let key = self.keys[&(sum, place)];
            self.adds.insert(id, key);
            let mut open = vec![sum];
            while let Some(sum) = open.pop() {
                self.keys.insert((sum, place), key);
                let args = self.prepared.graph.op(sum).args.iter().filter_map(|&arg| self.prepared.graph.def(arg));
                open.extend(args.filter(|def| self.prepared.sums.contains(def)));
            }
        }
    }

    /// Whether a piece writes this.
    fn is_written(&self, id: OpId, key: Key, last: bool) -> bool {
        match self.adds.get(&id) {
            Some(of) => *of == key,
            None => last && self.writers(id).contains(&key.2),
        }
    }

    fn finish(self) -> Cut {
        let graph = self.graph();
        let mut keys: BTreeSet<Key> = self.keys.values().copied().collect();
        // Places that only write what is made anew, or give it to others.
        let mut alone: BTreeSet<usize> = BTreeSet::new();
        for (id, _) in graph.ops().filter(|(_, op)| matches!(op.op, Op::Write { .. })) {
            alone.extend(self.writers(id).iter().filter(|&&place| keys.iter().all(|key| key.2 != place)));
        }
        for (_, value) in &graph.outputs {
            let source = self.placed.source(graph, *value);
            alone.extend(Some(source).filter(|&place| keys.iter().all(|key| key.2 != place)));
        }
        keys.extend(alone.into_iter().map(|place| (0, 0, place)));
        // What is written where others have made it is written after they have.
        for (id, op) in graph.ops().filter(|(_, op)| matches!(op.op, Op::Write { .. })) {
            for &place in self.writers(id) {
                let made = match self.from(op.args[0], place) {
                    From::Op(def, source) if source != place => self.keys[&(def, source)].0,
                    From::Elsewhere(_) => 0,
                    _ => continue,
                };
                let last = *keys.iter().rfind(|key| key.2 == place).expect("it writes");
                if last.0 <= made {
                    keys.insert((made + 1, last.1, place));
                }
            }
        }
        let mut elsewhere: BTreeSet<(Value, usize)> = BTreeSet::new();
        for key in keys.clone() {
            let last = keys.iter().rfind(|other| other.2 == key.2) == Some(&key);
            for (value, source) in self.crossing(key, last) {
                if matches!(self.from(value, key.2), From::Elsewhere(_)) {
                    elsewhere.insert((value, source.2));
                }
            }
        }
        keys.extend(elsewhere.iter().map(|&(_, place)| (0, 0, place)));
        let keys: Vec<Key> = keys.into_iter().collect();
        let number: BTreeMap<Key, usize> = keys.iter().enumerate().map(|(at, &key)| (key, at)).collect();
        let is_last = |key: &Key| keys.iter().rfind(|other| other.2 == key.2) == Some(key);
        let mut pieces: Vec<Piece> = Vec::new();
        // Per piece, values that later ones take.
        let mut taken: Vec<BTreeSet<Value>> = vec![BTreeSet::new(); keys.len()];
        for &key in &keys {
            let mut takes: BTreeMap<usize, BTreeSet<Value>> = BTreeMap::new();
            for (value, source) in self.crossing(key, is_last(&key)) {
                takes.entry(number[&source]).or_default().insert(value);
                taken[number[&source]].insert(value);
            }
            let takes =
                takes.into_iter().map(|(piece, values)| Taken { piece, values: values.iter().map(name).collect() });
            let work = match key.1 {
                0 => Work::Forward,
                1 => Work::Backward,
                _ => Work::Weight,
            };
            let gives = graph.outputs.iter().filter(|(_, value)| self.gives(*value, key, is_last(&key)));
            pieces.push(Piece {
                graph: format!("{}.piece.{}", graph.name, pieces.len()),
                place: key.2,
                work,
                takes: takes.collect(),
                gives: gives.map(|(name, _)| name.clone()).collect(),
                writes: Vec::new(),
            });
        }
        let graphs = pieces.iter().zip(&keys).zip(&taken);
        let graphs: Vec<Graph> =
            graphs.map(|((piece, key), taken)| self.piece(piece, *key, is_last(key), taken)).collect();
        for (piece, graph) in pieces.iter_mut().zip(&graphs) {
            let written = graph.ops().filter_map(|(_, op)| match op.op {
                Op::Write { state } => Some(self.program.state(state).name.clone()),
                _ => None,
            });
            piece.writes = written.collect();
        }
        let mut inputs = Graph::like(graph, graph.name.clone());
        for input in graph.inputs() {
            inputs.input(graph.name_of(input), graph.ty(input).clone());
        }
        Cut { inputs, pieces, graphs }
    }

    /// Whether a piece gives an output of the graph.
    fn gives(&self, value: Value, key: Key, last: bool) -> bool {
        let source = self.placed.source(self.graph(), value);
        match self.from(value, source) {
            From::Op(def, place) => self.keys[&(def, place)] == key,
            _ => last && source == key.2,
        }
    }

    /// The values that a piece uses in the end.
    fn roots(&self, key: Key, last: bool) -> Vec<Value> {
        let graph = self.graph();
        let own = self.keys.iter().filter(|(_, of)| **of == key).map(|((id, _), _)| *id);
        let mut roots: Vec<Value> = own.flat_map(|id| graph.op(id).args.clone()).collect();
        roots.extend(graph.outputs.iter().map(|(_, value)| *value).filter(|&value| self.gives(value, key, last)));
        let writes = graph.ops().filter(|(_, op)| matches!(op.op, Op::Write { .. }));
        roots.extend(writes.filter(|(id, _)| self.is_written(*id, key, last)).map(|(_, op)| op.args[0]));
        roots
    }

    /// The values that a piece takes, and from where.
    fn crossing(&self, key: Key, last: bool) -> Vec<(Value, Key)> {
        let mut found = BTreeMap::new();
        let mut open = self.roots(key, last);
        let mut seen = BTreeSet::new();
        while let Some(value) = open.pop() {
            if !seen.insert(value) {
                continue;
            }
            match self.from(value, key.2) {
                From::Host => {}
                From::Anew(def) => open.extend(&self.graph().op(def).args),
                From::Elsewhere(place) => drop(found.insert(value, (0, 0, place))),
                From::Op(def, place) => {
                    let of = self.keys[&(def, place)];
                    if of != key {
                        found.insert(value, of);
                    }
                }
            }
        }
        found.into_iter().collect()
    }

    /// The graph of a piece.
    fn piece(&self, piece: &Piece, key: Key, last: bool, taken: &BTreeSet<Value>) -> Graph {
        let graph = self.graph();
        let mut roots = self.roots(key, last);
        roots.extend(taken);
        let mut anew = BTreeSet::new();
        let mut open = roots;
        while let Some(value) = open.pop() {
            if let From::Anew(def) = self.from(value, key.2)
                && anew.insert(def)
            {
                open.extend(&graph.op(def).args);
            }
        }
        let mut rebuild = Rebuild::new(graph, piece.graph.clone());
        graph.inputs().for_each(|input| rebuild.keep_input(input));
        for (value, _) in self.crossing(key, last) {
            let input = rebuild.new.input(name(&value), graph.ty(value).clone());
            rebuild.set(value, input);
        }
        for (id, op) in graph.ops() {
            let own = match op.op {
                Op::Write { .. } => self.is_written(id, key, last),
                _ => anew.contains(&id) || self.keys.get(&(id, key.2)) == Some(&key),
            };
            if own {
                rebuild.copy(op, self.program);
            }
        }
        let outputs = graph.outputs.iter().filter(|(_, value)| self.gives(*value, key, last));
        let mut outputs: Vec<(String, Value)> =
            outputs.map(|(name, value)| (name.clone(), rebuild.get(*value))).collect();
        outputs.extend(taken.iter().map(|value| (name(value), rebuild.get(*value))));
        rebuild.new.outputs = outputs;
        rebuild.new
    }
}

/// The name of a value between pieces.
fn name(value: &Value) -> String {
    format!("piece.{}", value.0)
}
