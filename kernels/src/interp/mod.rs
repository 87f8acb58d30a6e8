//! The interpreter: the meaning of every op in plain loops, and the oracle of every test.
//!
//! It runs programs of any level, in f32 or, for tight tolerances, in f64, where every float is a double whatever its
//! declared type. A planned program can also run *inside* its arena ([`Interp::planned`]): every value lies where the
//! plan says, and bytes that hold nothing are poisoned, so that a wrong plan shows as NaN.
//!
//! It is never made clever.

use std::collections::BTreeMap;
use std::sync::Arc;

use dsgc_ir::diag::Diag;
use dsgc_ir::op::Class;
use dsgc_ir::verify::{last_uses, verify};
use dsgc_ir::{Bindings, Buffer, DType, Graph, Op, OpData, Planned, Program, Region, StateId, Tensor, Value};

use crate::ranks::Member;
use crate::{Device, bind};

pub mod apart;
mod arena;
mod attention;
mod composite;
mod eval;
mod ranks;
pub(crate) mod real;
mod structure;
mod target;

use arena::{Memory, overlap};
pub use ranks::{Given, eval_ranks};
use real::Real;
pub use target::InterpTarget;

/// Width of floats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As declared: narrow floats are computed in f32, and every result is rounded to its type.
    #[default]
    F32,
    /// Every float is a double, whatever its type.
    F64,
}

/// A program with its state.
#[derive(Clone, Debug)]
pub struct Interp {
    program: Program,
    precision: Precision,
    store: Store,
    member: Member,
}

#[derive(Clone, Debug)]
enum Store {
    /// A tensor per value; these are the states.
    Tensors(Vec<Arc<Tensor>>),
    /// The planned arena.
    Arena(Memory),
}

/// Named tensors, in the order of declaration.
pub type Outputs = Vec<(String, Tensor)>;

/// What a graph gave.
#[derive(Clone, Debug, Default)]
pub struct Evaluated {
    /// Its outputs.
    pub outputs: Outputs,
    /// The states that it wrote.
    pub written: BTreeMap<StateId, Tensor>,
}

impl Interp {
    /// A session of a program of any level with a tensor per value; all states are zero.
    ///
    /// # Panics
    /// If the verifier refuses the program, which is a bug of who made it.
    pub fn new(program: Program, precision: Precision) -> Interp {
        if let Err(fault) = verify(&program) {
            panic!("bug: the interpreter was given a wrong program: {fault}");
        }
        let states = program.state_ids().map(|(id, _)| Arc::new(zero_state(&program, id, precision))).collect();
        Interp { program, precision, store: Store::Tensors(states), member: Member::alone() }
    }

    /// A session of a planned program inside its arena; all states are zero.
    pub fn planned(planned: Planned, precision: Precision) -> Interp {
        let program = Program::clone(&planned);
        let memory = Memory::new(program.arena, precision);
        Interp { program, precision, store: Store::Arena(memory), member: Member::alone() }
    }

    /// The same as one rank of several.
    pub fn as_member(self, member: Member) -> Interp {
        Interp { member, ..self }
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The current values of all states.
    pub fn states(&self) -> BTreeMap<StateId, Tensor> {
        self.program.state_ids().map(|(id, _)| (id, self.state(id))).collect()
    }

    fn set_one(&mut self, id: StateId, value: &Tensor) {
        let state = self.program.state(id);
        let value = match self.precision {
            Precision::F32 => value.clone().rounded(state.ty.dtype),
            Precision::F64 => value.clone().double(),
        };
        assert!(
            value.fits(state.ty.dtype) && value.shape == state_shape(&self.program, id),
            "bug: `@{}` is {}, not {}{:?}",
            state.name,
            state.ty,
            value.dtype(),
            value.shape
        );
        match &mut self.store {
            Store::Tensors(states) => states[id.0 as usize] = Arc::new(value),
            Store::Arena(memory) => {
                let buffer = state.buffer.expect("a planned program has a buffer for every state");
                let written = memory.write(buffer, state.ty.dtype, &value);
                written.expect("the verifier saw that every state fits its buffer");
            }
        }
    }

    fn run_as<F: Real>(&mut self, name: &str, inputs: &[(&str, &Tensor)]) -> Result<Outputs, Diag> {
        let graph = self.program.graph(name).ok_or_else(|| no_graph(&self.program, name))?;
        match &mut self.store {
            Store::Tensors(states) => {
                let (outputs, written) =
                    run_loose::<F>(graph, inputs, |id| states[id.0 as usize].clone(), &self.member)?;
                for (id, value) in written {
                    states[id.0 as usize] = value;
                }
                Ok(outputs)
            }
            Store::Arena(memory) => run_planned::<F>(&self.program, graph, memory, inputs, &self.member),
        }
    }
}

impl Device for Interp {
    fn name(&self) -> &str {
        match self.precision {
            Precision::F32 => "interp",
            Precision::F64 => "interp-f64",
        }
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        let copies: Vec<StateId> = self.program.copies_of(id).collect();
        for id in [id].into_iter().chain(copies) {
            self.set_one(id, value);
        }
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.set_one(id, value);
    }

    fn state(&self, id: StateId) -> Tensor {
        let state = self.program.state(id);
        match &self.store {
            Store::Tensors(states) => Tensor::clone(&states[id.0 as usize]),
            Store::Arena(memory) => {
                let buffer = state.buffer.expect("a planned program has a buffer for every state");
                let shape = state_shape(&self.program, id);
                let read = match self.precision {
                    Precision::F32 => memory.read::<f32>(buffer, state.ty.dtype, &shape),
                    Precision::F64 => memory.read::<f64>(buffer, state.ty.dtype, &shape),
                };
                read.unwrap_or_else(|why| panic!("bug: `@{}`: {why}", state.name))
            }
        }
    }

    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Outputs, Diag> {
        match self.precision {
            Precision::F32 => self.run_as::<f32>(graph, inputs),
            Precision::F64 => self.run_as::<f64>(graph, inputs),
        }
    }
}

/// Runs one graph of a program on given states, without a session; states that are not given are zero.
pub fn eval_graph(
    program: &Program,
    graph: &str,
    inputs: &[(&str, &Tensor)],
    states: &BTreeMap<StateId, Tensor>,
    precision: Precision,
) -> Result<Evaluated, Diag> {
    let found = program.graph(graph).ok_or_else(|| no_graph(program, graph))?;
    let given = |id: StateId| states.get(&id).cloned().unwrap_or_else(|| zero_state(program, id, precision));
    let rounded = |id: StateId| given(id).rounded(program.state(id).ty.dtype);
    let alone = Member::alone();
    let (outputs, written) = match precision {
        Precision::F32 => run_loose::<f32>(found, inputs, |id| Arc::new(rounded(id)), &alone)?,
        Precision::F64 => run_loose::<f64>(found, inputs, |id| Arc::new(given(id).double()), &alone)?,
    };
    let written = written.into_iter().map(|(id, value)| (id, Arc::unwrap_or_clone(value))).collect();
    Ok(Evaluated { outputs, written })
}

type Written = BTreeMap<StateId, Arc<Tensor>>;

/// Runs a graph with a tensor per value. States change only if the whole graph succeeds.
fn run_loose<F: Real>(
    graph: &Graph,
    inputs: &[(&str, &Tensor)],
    state: impl Fn(StateId) -> Arc<Tensor>,
    member: &Member,
) -> Result<(Outputs, Written), Diag> {
    let dims = bind(graph, inputs)?;
    let last = last_uses(graph);
    let mut values: Vec<Option<Arc<Tensor>>> = vec![None; graph.values().len()];
    let mut written = Written::new();
    for value in graph.inputs() {
        values[value.0 as usize] = Some(Arc::new(input::<F>(graph, value, inputs)?));
    }
    let get = |values: &[Option<Arc<Tensor>>], v: Value| {
        values[v.0 as usize].clone().unwrap_or_else(|| panic!("bug: %{} of @{} has no value", v.0, graph.name))
    };
    for (id, op) in graph.ops() {
        let args: Vec<Arc<Tensor>> = match op.op {
            Op::Read { state: id } => vec![state(id)],
            _ => op.args.iter().map(|&a| get(&values, a)).collect(),
        };
        if let Op::Write { state: id } = op.op {
            written.insert(id, args[0].clone());
        }
        for (result, tensor) in op.results().zip(on_rank::<F>(graph, op, &args, &dims, member)?) {
            values[result.0 as usize] = Some(Arc::new(tensor));
        }
        // Only to save memory; results that nobody uses die here as well.
        for &value in op.args.iter().chain(&op.results().collect::<Vec<_>>()) {
            if last[value.0 as usize] <= id.0 {
                values[value.0 as usize] = None;
            }
        }
    }
    let outputs = graph.outputs.iter().map(|(n, v)| (n.clone(), Tensor::clone(&get(&values, *v)))).collect();
    Ok((outputs, written))
}

/// Runs a graph inside the arena. After an error, states may be half written.
fn run_planned<F: Real>(
    program: &Program,
    graph: &Graph,
    memory: &mut Memory,
    inputs: &[(&str, &Tensor)],
    member: &Member,
) -> Result<Outputs, Diag> {
    let dims = bind(graph, inputs)?;
    let last = last_uses(graph);
    let buffer = |v: Value| graph.buffer(v).expect("a planned program has a buffer for every value");
    let wrong = |why: String| Diag::error(format!("graph @{}: {why}", graph.name));
    let read = |memory: &Memory, v: Value| -> Result<Arc<Tensor>, Diag> {
        let shape = shape(graph, v, &dims).map_err(wrong)?;
        memory.read::<F>(buffer(v), graph.ty(v).dtype, &shape).map(Arc::new).map_err(wrong)
    };
    let kept = program.kept_by_generation(graph);
    memory.poison_but(&kept);
    let mut live: Vec<Value> = graph.inputs().collect();
    for &value in &live {
        memory.write(buffer(value), graph.ty(value).dtype, &input::<F>(graph, value, inputs)?).map_err(wrong)?;
    }
    for (id, op) in graph.ops() {
        // Reads and views compute nothing: the bytes must be there already.
        let computes = !matches!(op.op, Op::Read { .. }) && op.op.class() != Class::View;
        if let Op::Read { state } = op.op
            && program.state(state).on_host
        {
            let home = program.state(state).buffer.expect("a planned program has a buffer for every state");
            let (result, dtype) = (op.result(), program.state(state).ty.dtype);
            let loaded = memory.read::<F>(home, dtype, &state_shape(program, state)).map_err(wrong)?;
            memory.write(buffer(result), dtype, &loaded).map_err(wrong)?;
        }
        if computes {
            let args = op.args.iter().map(|&a| read(memory, a)).collect::<Result<Vec<_>, _>>()?;
            if let Op::Write { state } = op.op {
                let target = program.state(state).buffer.expect("a planned program has a buffer for every state");
                memory.write(target, graph.ty(op.args[0]).dtype, &args[0]).map_err(wrong)?;
            }
            for (result, tensor) in op.results().zip(on_rank::<F>(graph, op, &args, &dims, member)?) {
                memory.write(buffer(result), graph.ty(result).dtype, &tensor).map_err(wrong)?;
            }
        }
        live.extend(op.results());
        let die: Vec<Value> = live.extract_if(.., |v| last[v.0 as usize] <= id.0).collect();
        for dead in die.into_iter().map(buffer) {
            // A value in place of a dead one, or a view of it, still needs the bytes. States are never dead.
            let needed = |b: Buffer| live.iter().map(|&v| buffer(v)).chain(kept.iter().copied()).any(|l| overlap(l, b));
            if dead.region == Region::Values && !needed(dead) {
                memory.poison(dead);
            }
        }
    }
    graph.outputs.iter().map(|(name, v)| Ok((name.clone(), Arc::unwrap_or_clone(read(memory, *v)?)))).collect()
}

/// One op as a rank of several.
fn on_rank<F: Real>(
    graph: &Graph,
    op: &OpData,
    args: &[Arc<Tensor>],
    dims: &Bindings,
    member: &Member,
) -> Result<Vec<Tensor>, Diag> {
    if op.op.class() == Class::Collective {
        member.note(&member.naming(graph, op));
    }
    if let Some(results) = ranks::as_member::<F>(member, &op.op, args)? {
        let rounded = |(value, result)| F::rounded(result, graph.ty(value).dtype);
        return Ok(op.results().zip(results).map(rounded).collect());
    }
    step::<F>(graph, op, args, dims)
}

/// One op: its results from its operands. An error points at the op's place.
fn step<F: Real>(graph: &Graph, op: &OpData, args: &[Arc<Tensor>], dims: &Bindings) -> Result<Vec<Tensor>, Diag> {
    let wrong = |why: String| {
        Diag::error(format!("`{}` in graph @{}: {why}", op.op.name(), graph.name)).label(op.site.loc.span, "")
    };
    let shapes = op.results().map(|v| shape(graph, v, dims)).collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let args: Vec<&Tensor> = args.iter().map(|a| &**a).collect();
    let types: Vec<DType> = op.args.iter().map(|&a| graph.ty(a).dtype).collect();
    let results = eval::eval::<F>(&op.op, (&args, &types), &shapes, dims).map_err(wrong)?;
    debug_assert!(
        results.len() == shapes.len() && results.iter().zip(&shapes).all(|(r, s)| r.shape == *s),
        "bug: `{}` does not give the inferred shapes {shapes:?}",
        op.op
    );
    Ok(op.results().zip(results).map(|(v, result)| F::rounded(result, graph.ty(v).dtype)).collect())
}

fn shape(graph: &Graph, value: Value, dims: &Bindings) -> Result<Vec<usize>, String> {
    graph.ty(value).dims.iter().map(|d| eval::extent(d, dims)).collect()
}

fn input<F: Real>(graph: &Graph, value: Value, inputs: &[(&str, &Tensor)]) -> Result<Tensor, Diag> {
    let name = graph.name_of(value);
    let found = inputs.iter().find(|(n, _)| *n == name).map(|(_, t)| (*t).clone());
    let found = found.ok_or_else(|| Diag::error(format!("graph @{}: input `{name}` is missing", graph.name)))?;
    Ok(F::rounded(F::convert(found), graph.ty(value).dtype))
}

fn no_graph(program: &Program, name: &str) -> Diag {
    let names: Vec<&str> = program.graphs.iter().map(|g| g.name.as_str()).collect();
    Diag::error(format!("no graph is called `{name}`, only {}", names.join(", ")))
}

fn state_shape(program: &Program, id: StateId) -> Vec<usize> {
    program.state(id).ty.shape(&Bindings::new()).expect("states have constant dims")
}

fn zero_state(program: &Program, id: StateId, precision: Precision) -> Tensor {
    let (dtype, shape) = (program.state(id).ty.dtype, state_shape(program, id));
    match precision {
        Precision::F32 => structure::zeros::<f32>(dtype, &shape),
        Precision::F64 => structure::zeros::<f64>(dtype, &shape),
    }
}
