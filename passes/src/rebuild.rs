//! Rebuilding: how passes rewrite a graph.
//!
//! A pass reads the old graph and pushes into a new one; a map says what became of every old value.

use dsgc_ir::{Graph, Op, OpData, OpId, Program, Type, Value};

/// A new graph that grows beside an old one.
pub struct Rebuild<'a> {
    /// The graph that is read.
    pub old: &'a Graph,
    /// The graph that grows.
    pub new: Graph,
    /// What became of each old value.
    map: Vec<Option<Value>>,
}

impl<'a> Rebuild<'a> {
    /// Starts a new graph with the old one's dims; inputs are the caller's.
    pub fn new(old: &'a Graph, name: impl Into<String>) -> Rebuild<'a> {
        Rebuild { old, new: Graph::like(old, name), map: vec![None; old.values().len()] }
    }

    /// Starts a new graph with the old one's name, dims and inputs.
    pub fn same(old: &'a Graph) -> Rebuild<'a> {
        let mut rebuild = Rebuild::new(old, old.name.clone());
        for input in old.inputs() {
            rebuild.keep_input(input);
        }
        rebuild
    }

    /// Gives the new graph an input of the old one.
    pub fn keep_input(&mut self, input: Value) {
        let new = self.new.input(self.old.name_of(input), self.old.ty(input).clone());
        self.set(input, new);
    }

    /// Says what became of an old value.
    pub fn set(&mut self, old: Value, new: Value) {
        self.map[old.0 as usize] = Some(new);
    }

    /// What became of an old value, if anything did.
    pub fn find(&self, old: Value) -> Option<Value> {
        self.map[old.0 as usize]
    }

    /// What became of an old value.
    ///
    /// # Panics
    /// If the pass has not said so: a bug of the pass.
    pub fn get(&self, old: Value) -> Value {
        match self.find(old) {
            Some(new) => new,
            None => panic!("bug: %{} of graph @{} has no successor", old.0, self.old.name),
        }
    }

    /// Pushes an op of the old graph unchanged, on the new operands.
    pub fn copy(&mut self, op: &OpData, program: &Program) {
        let args: Vec<Value> = op.args.iter().map(|&a| self.get(a)).collect();
        let pushed = self.new.try_copy(self.old, op, &args, of_state(&op.op, program));
        self.replace(&[op], op.op.name(), pushed);
    }

    /// Pushes an op in the place of an old one: its results take the place of the old results.
    ///
    /// # Panics
    /// If the new op does not fit: a bug of the pass.
    pub fn push(&mut self, place_of: &OpData, op: Op, args: &[Value], program: &Program) {
        self.push_all(&[place_of], op, args, program);
    }

    /// Pushes an op in the place of some old ones, whose results its own are, one after the other. It inherits the site of
    /// the first.
    ///
    /// # Panics
    /// If the new op does not fit: a bug of the pass.
    pub fn push_all(&mut self, places: &[&OpData], op: Op, args: &[Value], program: &Program) {
        let name = op.name();
        let state = of_state(&op, program);
        let pushed = self.new.try_push(op, args, state, places[0].site.clone());
        self.replace(places, name, pushed);
    }

    /// Says what became of the results of some old ops.
    fn replace(&mut self, places: &[&OpData], name: &str, pushed: Result<OpId, String>) {
        let id = pushed.unwrap_or_else(|why| panic!("bug: `{name}` in graph @{}: {why}", self.old.name));
        let results = self.new.op(id).results();
        for (old, new) in places.iter().flat_map(|place| place.results()).zip(results) {
            self.new.set_name(new, self.old.name_of(old));
            self.set(old, new);
        }
    }

    /// Ends the rebuild with the old graph's outputs.
    pub fn finish(mut self) -> Graph {
        self.new.outputs = self.old.outputs.iter().map(|(n, v)| (n.clone(), self.get(*v))).collect();
        self.new
    }
}

/// The type of the state that an op reads or writes.
fn of_state<'a>(op: &Op, program: &'a Program) -> Option<&'a Type> {
    match op {
        Op::Read { state } | Op::Write { state } => Some(&program.state(*state).ty),
        _ => None,
    }
}

/// The graph without ops that nothing uses. Writes and outputs are uses.
pub fn without_dead_ops(graph: &Graph, program: &Program) -> Graph {
    let mut used = vec![false; graph.values().len()];
    for (_, value) in &graph.outputs {
        used[value.0 as usize] = true;
    }
    let mut kept = vec![false; graph.len()];
    for (id, op) in graph.ops().rev() {
        if matches!(op.op, Op::Write { .. }) || op.results().any(|r| used[r.0 as usize]) {
            kept[id.0 as usize] = true;
            for arg in &op.args {
                used[arg.0 as usize] = true;
            }
        }
    }
    let mut rebuild = Rebuild::same(graph);
    for (id, op) in graph.ops() {
        if kept[id.0 as usize] {
            rebuild.copy(op, program);
        }
    }
    rebuild.finish()
}
