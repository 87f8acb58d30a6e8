//! Programs: what one stage of a pipeline runs.

use std::collections::{BTreeMap, BTreeSet};

use crate::diag::Span;
use crate::dim::{Bindings, Dim};
use crate::graph::{Buffer, Graph, Region, StateId};
use crate::mesh::{Mesh, Placement};
use crate::op::Op;
use crate::stage::{Origin, Stage};
use crate::types::Type;

/// What a state is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// A model's parameter, read from a file or initialised by a graph.
    Param {
        /// Whether an update of the stage trains it.
        trained: bool,
    },
    /// A parameter rounded to a narrow float or quantised, for the graphs that read it so. Whatever changes the parameter writes both:
    /// graphs by ops, devices when the host sets it.
    Copy {
        /// The parameter.
        of: StateId,
    },
    /// Anything else that outlives a call: moments, a recipe's states. Zero when a session begins.
    State,
    /// What calls of one step hand to each other, and no step to the next: accumulators, which are zero between steps. Zero
    /// when a session begins.
    Scratch,
    /// What the calls of one generation hand to each other: keys and values of earlier columns, parameters gathered for
    /// it. While it runs no other graph does, so the values of others may lie in its place: when it begins, nobody knows
    /// what it holds.
    Generation,
}

/// A parameter or state.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `<role>/<Hugging Face name>` for parameters; states of a parameter add a suffix: `model/fc1.weight.m`.
    pub name: String,
    /// Type; its dims are constants. Of a state with a placement, the type of a rank's part.
    pub ty: Type,
    /// What it is for.
    pub kind: StateKind,
    /// Where it was declared.
    pub span: Span,
    /// What each rank holds of it; `None` where that is all of it.
    pub placement: Option<Placement>,
    /// Whether it is at home in the host's memory: then a read copies it to the device, and a write copies it back.
    pub on_host: bool,
    /// Where it lies; `None` before `plan_memory`.
    pub buffer: Option<Buffer>,
}

impl State {
    /// Dims of the whole.
    pub fn whole_dims(&self) -> Vec<Dim> {
        match &self.placement {
            Some(placement) => placement.whole.iter().map(|&extent| Dim::from(extent as i64)).collect(),
            None => self.ty.dims.clone(),
        }
    }

    /// Extents of the whole.
    ///
    /// # Panics
    /// If a dim is not a constant, which the verifier refuses.
    pub fn whole_shape(&self) -> Vec<usize> {
        match &self.placement {
            Some(placement) => placement.whole.clone(),
            None => self.ty.shape(&Bindings::new()).expect("states have constant dims"),
        }
    }

    /// Bytes in memory, of a rank's part where it is in parts.
    ///
    /// # Panics
    /// If a dim is not a constant, which the verifier refuses.
    pub fn bytes(&self) -> usize {
        self.ty.bytes(&Bindings::new()).expect("states have constant dims")
    }
}

/// How far a program has come down; the verifier is stricter each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the frontend makes and most passes rewrite.
    #[default]
    Logical,
    /// What one of several ranks runs.
    Partitioned,
    /// Every value and state has a buffer.
    Planned,
}

impl Level {
    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            Level::Logical => "logical",
            Level::Partitioned => "partitioned",
            Level::Planned => "planned",
        }
    }
}

/// Sizes of the arena's regions in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arena {
    /// Parameters and state.
    pub persistent: usize,
    /// Values of the graph that needs most, with what a generation keeps between its calls.
    pub values: usize,
    /// Workspace of the kernel that needs most.
    pub scratch: usize,
    /// Parameters and state in the host's memory.
    pub host: usize,
    /// Most bytes of values in the host's memory that pieces of a graph have from each other ([`crate::held`]).
    pub held: usize,
    /// Where a region is made of several allocations, the bytes of each but the last: no value lies in two.
    pub allocation: Option<usize>,
}

impl Arena {
    /// Bytes of all regions of the device: the exact peak.
    pub fn total(&self) -> usize {
        self.persistent + self.values + self.scratch
    }

    /// Whether bytes of a region lie in one allocation.
    pub fn is_whole(&self, offset: usize, bytes: usize) -> bool {
        let allocation = self.allocation.unwrap_or(usize::MAX);
        bytes == 0 || offset / allocation == (offset + bytes - 1) / allocation
    }
}

/// Graphs, their states, and the host side of a stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Program {
    /// How far it has come down.
    pub level: Level,
    /// The ranks that run it.
    pub mesh: Mesh,
    /// Where those that run this very program stand along `pipeline`: ranks of another place have other layers, and so
    /// another program, but the same states in the same order, and the same plan.
    pub place: usize,
    /// Names of the files that locations point into; their index is [`Span::source`].
    pub sources: Vec<String>,
    /// Parameters and state; [`StateId`] is the index.
    pub states: Vec<State>,
    /// Graphs by order of definition.
    pub graphs: Vec<Graph>,
    /// The host side.
    pub stage: Stage,
    /// Sizes of the regions; zero before `plan_memory`.
    pub arena: Arena,
}

impl Program {
    /// Declares a parameter or state.
    pub fn declare(&mut self, name: impl Into<String>, ty: Type, kind: StateKind, span: Span) -> StateId {
        self.states.push(State { name: name.into(), ty, kind, span, placement: None, on_host: false, buffer: None });
        StateId(self.states.len() as u32 - 1)
    }

    /// A state by id.
    pub fn state(&self, id: StateId) -> &State {
        &self.states[id.0 as usize]
    }

    /// A state by name.
    pub fn state_named(&self, name: &str) -> Option<StateId> {
        self.states.iter().position(|s| s.name == name).map(|i| StateId(i as u32))
    }

    /// The copies of a parameter.
    pub fn copies_of(&self, id: StateId) -> impl Iterator<Item = StateId> {
        self.state_ids().filter(move |(_, s)| s.kind == StateKind::Copy { of: id }).map(|(id, _)| id)
    }

    /// All states with their ids.
    pub fn state_ids(&self) -> impl Iterator<Item = (StateId, &State)> {
        self.states.iter().enumerate().map(|(i, s)| (StateId(i as u32), s))
    }

    /// The states that a generation which runs this graph keeps between its calls: those of the graph, and of all graphs
    /// that have one in common with it.
    pub fn generation_of(&self, graph: &Graph) -> BTreeSet<StateId> {
        if !self.states.iter().any(|state| state.kind == StateKind::Generation) {
            return BTreeSet::new();
        }
        let of = |graph: &Graph| -> BTreeSet<StateId> {
            let states = graph.ops().filter_map(|(_, op)| match op.op {
                Op::Read { state } | Op::Write { state } => Some(state),
                _ => None,
            });
            states.filter(|&id| self.state(id).kind == StateKind::Generation).collect()
        };
        let mut kept = of(graph);
        let mut others: Vec<BTreeSet<StateId>> = self.graphs.iter().map(of).collect();
        while let Some(at) = others.iter().position(|other| !other.is_disjoint(&kept)) {
            kept.append(&mut others.swap_remove(at));
        }
        kept
    }

    /// The places among a graph's values where such states lie.
    ///
    /// # Panics
    /// If the program is not planned.
    pub fn kept_by_generation(&self, graph: &Graph) -> Vec<Buffer> {
        let placed = |id| self.state(id).buffer.expect("a planned program has a buffer for every state");
        self.generation_of(graph).into_iter().map(placed).filter(|b| b.region == Region::Values).collect()
    }

    /// A graph by name.
    pub fn graph(&self, name: &str) -> Option<&Graph> {
        self.graphs.iter().find(|g| g.name == name)
    }

    /// Parameters of a role that are its own, `(id, Hugging Face name)`, in the order of declaration.
    pub fn params_of<'a>(&'a self, role: &'a str) -> impl Iterator<Item = (StateId, &'a str)> {
        self.state_ids().filter_map(move |(id, s)| {
            let name = s.name.strip_prefix(role)?.strip_prefix('/')?;
            matches!(s.kind, StateKind::Param { .. }).then_some((id, name))
        })
    }

    /// The parameter of a role with this Hugging Face name: its own one, or the one that it shares with the role which it
    /// is a snapshot of.
    pub fn param(&self, role: &str, name: &str) -> Option<StateId> {
        if let Some(own) = self.state_named(&format!("{role}/{name}")) {
            return Some(own);
        }
        let role = self.stage.roles.iter().find(|r| r.name == role)?;
        match &role.origin {
            Origin::Snapshot(of) if role.shared.iter().any(|shared| shared == name) => self.param(of, name),
            _ => None,
        }
    }

    /// All parameters of a role, `(id, Hugging Face name)`: its own ones in the order of declaration, then those that it
    /// shares.
    pub fn all_params_of(&self, role: &str) -> Vec<(StateId, String)> {
        let own = self.params_of(role).map(|(id, name)| (id, name.to_string()));
        let known = self.stage.roles.iter().find(|r| r.name == role);
        let shared = known.map_or(&[][..], |r| &r.shared[..]).iter();
        own.chain(shared.filter_map(|name| Some((self.param(role, name)?, name.clone())))).collect()
    }

    /// How often each op name occurs in all graphs.
    pub fn op_counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for op in self.graphs.iter().flat_map(|g| g.ops()) {
            *counts.entry(op.1.op.name()).or_default() += 1;
        }
        counts
    }
}
