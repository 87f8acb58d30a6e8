//! Where states are: at every place that uses them.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::{Builder, Graph, Op, OpId, Program, StateId, StateKind, Value};

use super::Layers;
use super::places::{Homes, Placed, Places, Prepared, has_layers};
use crate::rebuild::Rebuild;

/// Finds the places of all states, and tells apart in all graphs what several places add up.
pub(super) fn find(program: &Program, layers: &Layers) -> (Vec<Prepared>, Homes) {
    let mut homes: Homes = Homes::new();
    let add = |homes: &mut Homes, state: StateId, places: &Places| {
        if program.state(state).ty.rank() > 0 {
            homes.entry(state).or_default().extend(places);
        }
    };
    let plain = |graph: &Graph| Prepared { graph: graph.clone(), pinned: BTreeMap::new(), sums: BTreeSet::new() };
    let mut graphs: Vec<Prepared> = Vec::new();
    for graph in &program.graphs {
        if !has_layers(graph) {
            graphs.push(plain(graph));
            continue;
        }
        let mut prepared = plain(graph);
        let placed = Placed::of(program, &prepared, layers, &Homes::new());
        let sums = sums(graph, &placed);
        for (state, places) in uses(graph, &placed) {
            add(&mut homes, state, &places);
        }
        for (id, op) in graph.ops() {
            let Op::Write { state } = op.op else { continue };
            match sums.get(&id) {
                Some(sum) => add(&mut homes, state, &sum.keys().copied().collect()),
                None if !placed.is_anywhere(op.args[0]) => add(&mut homes, state, placed.on(op.args[0])),
                None => {}
            }
        }
        if !sums.is_empty() {
            prepared = apart(program, graph, &sums);
        }
        graphs.push(prepared);
    }
    loop {
        let before = homes.clone();
        for (id, state) in program.state_ids() {
            if let StateKind::Copy { of } = state.kind {
                let both: Places = [id, of].iter().filter_map(|s| homes.get(s)).flatten().copied().collect();
                if !both.is_empty() {
                    add(&mut homes, id, &both);
                    add(&mut homes, of, &both);
                }
            }
        }
        for prepared in graphs.iter().filter(|prepared| !has_layers(&prepared.graph)) {
            let graph = &prepared.graph;
            let placed = Placed::of(program, prepared, layers, &homes);
            for (state, places) in uses(graph, &placed) {
                if !homes.contains_key(&state) {
                    add(&mut homes, state, &places);
                }
            }
            for (_, op) in graph.ops() {
                if let Op::Write { state } = op.op
                    && !homes.contains_key(&state)
                    && !placed.is_anywhere(op.args[0])
                {
                    add(&mut homes, state, placed.on(op.args[0]));
                }
            }
        }
        if homes == before {
            break;
        }
    }
    for (id, state) in program.state_ids() {
        // Nothing says where: one place is enough, but of single numbers, which all have.
        let places = if state.ty.rank() > 0 { Places::from([0]) } else { (0..program.mesh.pipeline).collect() };
        homes.entry(id).or_insert(places);
    }
    let partial = added_up(&graphs, &homes);
    for prepared in graphs.iter_mut().filter(|prepared| !has_layers(&prepared.graph)) {
        *prepared = finished(program, &prepared.graph, &partial, &homes);
    }
    (graphs, homes)
}

/// States of which several places have summands.
pub(super) fn added_up(graphs: &[Prepared], homes: &Homes) -> BTreeSet<StateId> {
    let written = graphs.iter().flat_map(|prepared| {
        prepared.pinned.keys().filter_map(|&id| match prepared.graph.op(id).op {
            Op::Write { state } => Some(state),
            _ => None,
        })
    });
    written.filter(|state| homes[state].len() > 1).collect()
}

/// States and the places of ops that use them as they are, or what is made anew of them.
fn uses(graph: &Graph, placed: &Placed) -> Vec<(StateId, Places)> {
    let mut found = Vec::new();
    for (id, op) in graph.ops() {
        let levels = &placed.level[id.0 as usize];
        if matches!(op.op, Op::Write { .. }) || levels.is_empty() || op.results().any(|r| placed.is_anywhere(r)) {
            continue;
        }
        let places: Places = levels.keys().copied().collect();
        for state in op.args.iter().flat_map(|&arg| placed.states_of(graph, arg)) {
            found.push((state, places.clone()));
        }
    }
    found
}

/// By place, what is added to an accumulator there: values, and the collective that adds up each of them over ranks, if the sum
/// of all places goes through one. What different places add up would be sent to one of them otherwise, in every part.
type Sum = BTreeMap<usize, BTreeMap<Option<OpId>, Vec<Value>>>;

/// The writes that add to what their state was.
fn sums(graph: &Graph, placed: &Placed) -> BTreeMap<OpId, Sum> {
    let mut users = vec![0usize; graph.values().len()];
    graph.ops().flat_map(|(_, op)| &op.args).for_each(|arg| users[arg.0 as usize] += 1);
    graph.outputs.iter().for_each(|(_, value)| users[value.0 as usize] += 1);
    let mut sums = BTreeMap::new();
    for (id, op) in graph.ops() {
        let Op::Write { state } = op.op else { continue };
        let (mut terms, mut open, mut adds_to_it) = (Vec::new(), vec![(None, op.args[0])], false);
        while let Some((through, value)) = open.pop() {
            let used_once = users[value.0 as usize] == 1;
            let def = graph.def(value).map(|def| (def, graph.op(def)));
            match def.map(|(id, def)| (&def.op, id, &def.args)) {
                Some((Op::Read { state: read }, ..)) if *read == state => adds_to_it = true,
                Some((Op::Add {}, _, args)) if used_once => open.extend(args.iter().rev().map(|&arg| (through, arg))),
                Some((Op::AllReduce { .. } | Op::ReduceScatter { .. }, id, args)) if used_once && through.is_none() => {
                    open.push((Some(id), args[0]));
                }
                _ => terms.push((through, value)),
            }
        }
        if adds_to_it && !terms.is_empty() {
            let mut sum = Sum::new();
            for (through, term) in terms {
                let of_place = sum.entry(placed.source(graph, term)).or_default();
                of_place.entry(through).or_default().push(term);
            }
            sums.insert(id, sum);
        }
    }
    sums
}

/// The graph in which each place adds to an accumulator of its own.
fn apart(program: &Program, graph: &Graph, sums: &BTreeMap<OpId, Sum>) -> Prepared {
    let mut rebuild = Rebuild::same(graph);
    let (mut pinned, mut adds) = (BTreeMap::new(), BTreeSet::new());
    for (id, op) in graph.ops() {
        let (Some(sum), Op::Write { state }) = (sums.get(&id), &op.op) else {
            rebuild.copy(op, program);
            continue;
        };
        for (&place, terms) in sum {
            let ty = &program.state(*state).ty;
            let mut sum = Builder::new(&mut rebuild.new, op.site.clone()).read(*state, ty);
            let first = rebuild.new.len() as u32;
            for (through, terms) in terms {
                let terms: Vec<Value> = terms.iter().map(|&term| rebuild.get(term)).collect();
                let mut b = Builder::new(&mut rebuild.new, op.site.clone());
                let Some(through) = through else {
                    sum = terms.into_iter().fold(sum, |sum, term| b.one(Op::Add {}, &[sum, term]));
                    continue;
                };
                let own = terms.into_iter().reduce(|own, term| b.one(Op::Add {}, &[own, term]));
                let own = own.expect("a collective adds up something");
                let through = graph.op(*through);
                let own = Builder::new(&mut rebuild.new, through.site.clone()).one(through.op.clone(), &[own]);
                sum = Builder::new(&mut rebuild.new, op.site.clone()).one(Op::Add {}, &[sum, own]);
            }
            adds.extend((first..rebuild.new.len() as u32).map(OpId));
            Builder::new(&mut rebuild.new, op.site.clone()).write(*state, ty, sum);
            pinned.insert(OpId(rebuild.new.len() as u32 - 1), Places::from([place]));
        }
    }
    // What only made the sums of all places is of no use any more.
    let graph = rebuild.finish();
    without_dead(program, Prepared { graph, pinned, sums: adds })
}

/// The graph in which what several places have added up is added up.
fn finished(program: &Program, graph: &Graph, partial: &BTreeSet<StateId>, homes: &Homes) -> Prepared {
    let mut rebuild = Rebuild::same(graph);
    let mut pinned = BTreeMap::new();
    for (_, op) in graph.ops() {
        let state = match op.op {
            Op::Read { state } if partial.contains(&state) => state,
            _ => {
                rebuild.copy(op, program);
                continue;
            }
        };
        let mut summands = Vec::new();
        for &home in &homes[&state] {
            let mut b = Builder::new(&mut rebuild.new, op.site.clone());
            summands.push(b.read(state, &program.state(state).ty));
            pinned.insert(OpId(rebuild.new.len() as u32 - 1), Places::from([home]));
        }
        let mut sum = summands[0];
        for &summand in &summands[1..] {
            sum = Builder::new(&mut rebuild.new, op.site.clone()).one(Op::Add {}, &[sum, summand]);
            pinned.insert(OpId(rebuild.new.len() as u32 - 1), homes[&state].clone());
        }
        rebuild.set(op.result(), sum);
    }
    Prepared { graph: rebuild.finish(), pinned, sums: BTreeSet::new() }
}

/// The same without ops that nothing uses.
fn without_dead(program: &Program, prepared: Prepared) -> Prepared {
    let graph = &prepared.graph;
    let mut used: Vec<bool> = vec![false; graph.values().len()];
    graph.outputs.iter().for_each(|(_, value)| used[value.0 as usize] = true);
    let mut kept = vec![false; graph.len()];
    for (id, op) in graph.ops().rev() {
        if matches!(op.op, Op::Write { .. }) || op.results().any(|r| used[r.0 as usize]) {
            kept[id.0 as usize] = true;
            op.args.iter().for_each(|arg| used[arg.0 as usize] = true);
        }
    }
    let mut rebuild = Rebuild::same(graph);
    let (mut pinned, mut adds) = (BTreeMap::new(), BTreeSet::new());
    for (id, op) in graph.ops().filter(|(id, _)| kept[id.0 as usize]) {
        if let Some(places) = prepared.pinned.get(&id) {
            pinned.insert(OpId(rebuild.new.len() as u32), places.clone());
        }
        if prepared.sums.contains(&id) {
            adds.insert(OpId(rebuild.new.len() as u32));
        }
        rebuild.copy(op, program);
    }
    Prepared { graph: rebuild.finish(), pinned, sums: adds }
}
