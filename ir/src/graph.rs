//! Graphs: SSA values in an arena, in program order.

use std::ops::Range;

use crate::diag::Span;
use crate::dim::{Bindings, Dim, Symbol};
use crate::infer::infer;
use crate::op::{Class, Op};
use crate::types::{DType, Type};

/// A value of a graph: dense, in the order of definition, inputs first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub u32);

/// An op of a graph: dense, in program order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u32);

/// A parameter or state of the program: an index into [`crate::Program::states`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateId(pub u32);

/// What an op is computed for; the splitters and zero-bubble schedules need it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// What the user wrote.
    #[default]
    Forward,
    /// Gradients that flow on to earlier ops.
    BackwardInput,
    /// Gradients of parameters.
    BackwardWeight,
    /// The optimizer.
    Update,
}

impl Phase {
    /// All of them, in the order in which they run.
    pub const ALL: [Phase; 4] = [Phase::Forward, Phase::BackwardInput, Phase::BackwardWeight, Phase::Update];

    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Forward => "forward",
            Phase::BackwardInput => "backward_input",
            Phase::BackwardWeight => "backward_weight",
            Phase::Update => "update",
        }
    }
}

/// Why an op exists, if not because the user wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The user wrote it.
    #[default]
    Written,
    /// It computes a gradient of what stands there.
    Grad,
    /// It belongs to the optimizer of a parameter declared there.
    Update,
    /// It computes what stands there together with what stands elsewhere.
    Fused,
}

/// The place in a user's file that an op comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Loc {
    /// The place; [`Span::NONE`] for what nobody wrote.
    pub span: Span,
    /// How the op comes from there.
    pub reason: Reason,
}

/// Which instance of a repeated block an op belongs to; derived ops inherit it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag {
    /// The repeat's name, e.g. `model.decoder.layers`.
    pub block: Symbol,
    /// Number of the layer, from 0.
    pub instance: u32,
}

/// What an op inherits from what it is derived from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Site {
    /// What it is computed for.
    pub phase: Phase,
    /// The user's line.
    pub loc: Loc,
    /// The layer.
    pub tag: Option<Tag>,
}

/// An op in a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct OpData {
    /// Op and attributes.
    pub op: Op,
    /// Operands, defined earlier.
    pub args: Vec<Value>,
    /// Ids of the results, dense.
    results: Range<u32>,
    /// Phase, place and layer.
    pub site: Site,
}

impl OpData {
    /// A part of an op, of which it has some operands and some neighbouring results: what a kernel of merged ops runs.
    pub fn part(&self, op: Op, args: Vec<Value>, results: Range<usize>) -> OpData {
        let at = |i: usize| self.results.start + i as u32;
        OpData { op, args, results: at(results.start)..at(results.end), site: self.site.clone() }
    }

    /// The values that the op defines.
    pub fn results(&self) -> impl ExactSizeIterator<Item = Value> + use<> {
        self.results.clone().map(Value)
    }

    /// The only value that the op defines.
    ///
    /// # Panics
    /// If it does not define exactly one.
    pub fn result(&self) -> Value {
        assert_eq!(self.results.len(), 1, "`{}` has {} results", self.op.name(), self.results.len());
        Value(self.results.start)
    }
}

/// Where a planned value lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer {
    /// Which region of the arena.
    pub region: Region,
    /// Bytes from the region's start.
    pub offset: usize,
    /// Bytes at the upper bounds of all dims.
    pub bytes: usize,
}

/// The regions of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Region {
    /// Parameters and state: lives as long as the session.
    Persistent,
    /// Values of the running graph.
    Values,
    /// Workspace of the running kernel.
    Scratch,
    /// Parameters and state in the host's memory, which no kernel sees.
    Host,
}

impl Region {
    /// All of them.
    pub const ALL: [Region; 4] = [Region::Persistent, Region::Values, Region::Scratch, Region::Host];

    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            Region::Persistent => "persistent",
            Region::Values => "values",
            Region::Scratch => "scratch",
            Region::Host => "host",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct ValueData {
    ty: Type,
    name: String,
    /// `None` for inputs.
    def: Option<OpId>,
    buffer: Option<Buffer>,
}

/// A dim symbol of a graph with its range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DimRange {
    /// The symbol.
    pub symbol: Symbol,
    /// Smallest value.
    pub min: i64,
    /// Largest value; memory is planned for it.
    pub max: i64,
}

/// A graph: pure but for its writes to state.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Graph {
    /// Name, unique in the program.
    pub name: String,
    /// Symbols that the graph's types may use.
    pub dims: Vec<DimRange>,
    /// The symbol that counts rows of the batch, along which calls may be cut into micro-batches (D1).
    pub batch: Option<Symbol>,
    /// Named results.
    pub outputs: Vec<(String, Value)>,
    /// Workspace that each op's kernel needs, in the scratch region; filled in by `plan_memory`.
    pub scratch: Vec<usize>,
    inputs: u32,
    ops: Vec<OpData>,
    values: Vec<ValueData>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    /// An empty graph with the name, dims and batch symbol of another.
    pub fn like(other: &Graph, name: impl Into<String>) -> Graph {
        Graph { name: name.into(), dims: other.dims.clone(), batch: other.batch.clone(), ..Graph::default() }
    }

    /// Adds an input. Inputs come before all ops.
    ///
    /// # Panics
    /// If an op was pushed already.
    pub fn input(&mut self, name: impl Into<String>, ty: Type) -> Value {
        assert!(self.ops.is_empty(), "input after ops in graph {}", self.name);
        self.inputs += 1;
        self.values.push(ValueData { ty, name: name.into(), def: None, buffer: None });
        Value(self.values.len() as u32 - 1)
    }

    /// Adds an op; its result types are inferred. `state` is the type of the state that a read or write names.
    pub fn try_push(&mut self, op: Op, args: &[Value], state: Option<&Type>, site: Site) -> Result<OpId, String> {
        let types: Vec<Type> = args.iter().map(|&a| self.ty(a).clone()).collect();
        let results = infer(&op, &types, state)?;
        Ok(self.push_typed(op, args, results, site))
    }

    /// Pushes an op of another graph on other operands. It has the types that it has there if all of these have, and those of
    /// states are the same.
    pub fn try_copy(
        &mut self,
        from: &Graph,
        op: &OpData,
        args: &[Value],
        state: Option<&Type>,
    ) -> Result<OpId, String> {
        let is_same = state.is_none() && op.args.iter().zip(args).all(|(&old, &new)| from.ty(old) == self.ty(new));
        if !is_same {
            return self.try_push(op.op.clone(), args, state, op.site.clone());
        }
        let types = op.results().map(|result| from.ty(result).clone());
        Ok(self.push_typed(op.op.clone(), args, types, op.site.clone()))
    }

    fn push_typed(&mut self, op: Op, args: &[Value], types: impl IntoIterator<Item = Type>, site: Site) -> OpId {
        let id = OpId(self.ops.len() as u32);
        let first = self.values.len() as u32;
        let value = |ty| ValueData { ty, name: String::new(), def: Some(id), buffer: None };
        self.values.extend(types.into_iter().map(value));
        let results = first..self.values.len() as u32;
        self.ops.push(OpData { op, args: args.to_vec(), results, site });
        id
    }

    /// Number of ops.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is no op.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// All ops in program order.
    pub fn ops(&self) -> impl DoubleEndedIterator<Item = (OpId, &OpData)> + ExactSizeIterator {
        self.ops.iter().enumerate().map(|(i, op)| (OpId(i as u32), op))
    }

    /// An op.
    pub fn op(&self, id: OpId) -> &OpData {
        &self.ops[id.0 as usize]
    }

    /// All inputs.
    pub fn inputs(&self) -> impl ExactSizeIterator<Item = Value> + use<> {
        (0..self.inputs).map(Value)
    }

    /// All values: inputs, then results in program order.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Value> + use<> {
        (0..self.values.len() as u32).map(Value)
    }

    /// Per op, whether it is a collective that runs beside other ops until a [`Op::Wait`].
    pub fn beside(&self) -> Vec<bool> {
        let mut beside = vec![false; self.len()];
        for op in self.ops.iter().filter(|op| matches!(op.op, Op::Wait {})) {
            if let Some(sends) = self.def(op.args[0]) {
                beside[sends.0 as usize] = self.op(sends).op.class() == Class::Collective;
            }
        }
        beside
    }

    /// Bytes of the largest workspace of ops one after the other, and of those that run beside them, also one after the
    /// other, which lies behind it; `scratch` has that of each op.
    pub fn workspace(&self, scratch: &[usize]) -> [usize; 2] {
        let mut most = [0; 2];
        for (&bytes, beside) in scratch.iter().zip(self.beside()) {
            most[usize::from(beside)] = most[usize::from(beside)].max(bytes);
        }
        most
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> &Type {
        &self.values[value.0 as usize].ty
    }

    /// The op that defines a value; `None` for inputs.
    pub fn def(&self, value: Value) -> Option<OpId> {
        self.values[value.0 as usize].def
    }

    /// The name of a value; empty if it has none. Inputs have names.
    pub fn name_of(&self, value: Value) -> &str {
        &self.values[value.0 as usize].name
    }

    /// Names a value, for readers; names need not be unique.
    pub fn set_name(&mut self, value: Value, name: impl Into<String>) {
        self.values[value.0 as usize].name = name.into();
    }

    /// Where a value lies; `None` before `plan_memory`.
    pub fn buffer(&self, value: Value) -> Option<Buffer> {
        self.values[value.0 as usize].buffer
    }

    /// Places a value.
    pub fn set_buffer(&mut self, value: Value, buffer: Buffer) {
        self.values[value.0 as usize].buffer = Some(buffer);
    }

    /// The input of this name.
    pub fn input_named(&self, name: &str) -> Option<Value> {
        self.inputs().find(|&v| self.name_of(v) == name)
    }

    /// The output of this name.
    pub fn output_named(&self, name: &str) -> Option<Value> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// The largest values of all dims.
    pub fn upper_bounds(&self) -> Bindings {
        self.dims.iter().map(|d| (d.symbol.clone(), d.max)).collect()
    }

    /// Rows of the inputs for each of the batch: 1, or where rows come in groups, those of a group.
    pub fn rows_of_batch(&self) -> usize {
        let rows = self.inputs().filter_map(|input| {
            let (factor, symbol) = self.ty(input).dims.first()?.as_scaled_symbol()?;
            usize::try_from(factor).ok().filter(|_| Some(symbol) == self.batch.as_ref())
        });
        rows.max().unwrap_or(1)
    }

    /// The range of a symbol.
    pub fn dim_range(&self, symbol: &str) -> Option<&DimRange> {
        self.dims.iter().find(|d| &*d.symbol == symbol)
    }
}

/// Pushes ops that are known to fit: what passes use. Every op inherits the current [`Site`].
pub struct Builder<'a> {
    /// The graph that grows.
    pub graph: &'a mut Graph,
    /// What the next ops inherit.
    pub site: Site,
}

impl<'a> Builder<'a> {
    /// A builder that appends to a graph.
    pub fn new(graph: &'a mut Graph, site: Site) -> Builder<'a> {
        Builder { graph, site }
    }

    /// Adds an op with any number of results.
    ///
    /// # Panics
    /// If the operands do not fit: a bug of the pass that calls it. The message names op and graph.
    pub fn push(&mut self, op: Op, args: &[Value]) -> Vec<Value> {
        let name = op.name();
        match self.graph.try_push(op, args, None, self.site.clone()) {
            Ok(id) => self.graph.op(id).results().collect(),
            Err(why) => panic!("bug: `{name}` in graph @{}: {why}", self.graph.name),
        }
    }

    /// Adds an op with one result; panics as [`Builder::push`].
    pub fn one(&mut self, op: Op, args: &[Value]) -> Value {
        self.push(op, args)[0]
    }

    /// Reads a state of the given type.
    pub fn read(&mut self, state: StateId, ty: &Type) -> Value {
        let pushed = self.graph.try_push(Op::Read { state }, &[], Some(ty), self.site.clone());
        let id = pushed.expect("a read of a typed state fits");
        self.graph.op(id).result()
    }

    /// Writes a state of the given type; panics if the value's type is another.
    pub fn write(&mut self, state: StateId, ty: &Type, value: Value) {
        if let Err(why) = self.graph.try_push(Op::Write { state }, &[value], Some(ty), self.site.clone()) {
            panic!("bug: write in graph @{}: {why}", self.graph.name);
        }
    }

    /// A float constant stretched to dims.
    pub fn fill(&mut self, value: f64, dims: &[Dim]) -> Value {
        let scalar = self.one(Op::Const { value, dtype: DType::F32 }, &[]);
        self.stretch(scalar, dims)
    }

    /// A value as elements of another type; the value itself if it has them already.
    pub fn cast(&mut self, value: Value, dtype: DType) -> Value {
        if self.graph.ty(value).dtype == dtype {
            return value;
        }
        self.one(Op::Cast { dtype }, &[value])
    }

    /// A value stretched to dims; the value itself if it has them already.
    pub fn stretch(&mut self, value: Value, dims: &[Dim]) -> Value {
        if self.graph.ty(value).dims == dims {
            return value;
        }
        self.one(Op::Broadcast { shape: dims.to_vec() }, &[value])
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> Type {
        self.graph.ty(value).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::Program;
    use crate::verify::verify;

    /// What only this module can break: the verifier's rules about the arena itself.
    #[test]
    fn ops_use_what_is_defined_before_them() {
        let mut graph = Graph::new("g");
        let x = graph.input("x", Type::scalar(DType::F32));
        for _ in 0..2 {
            graph.try_push(Op::Exp {}, &[x], None, Site::default()).expect("it fits");
        }
        let message = |graph: &Graph| {
            let program = Program { graphs: vec![graph.clone()], ..Program::default() };
            verify(&program).map_err(|fault| fault.to_string())
        };
        assert_eq!(message(&graph), Ok(()));
        let mut late = graph.clone();
        late.ops[0].args[0] = Value(2);
        assert_eq!(message(&late), Err("graph @g, op 0: %2 is used before it is defined".into()));
        let mut other = graph.clone();
        other.values[2].ty = Type::scalar(DType::I32);
        assert_eq!(message(&other), Err("graph @g, op 1: `exp` has other results than inferred".into()));
        let mut wrong = graph;
        wrong.values[0].ty = Type::scalar(DType::I32);
        assert_eq!(message(&wrong), Err("graph @g, op 0: `exp` of i32[], expected f32".into()));
    }
}
