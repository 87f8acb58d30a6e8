//! From the graphs of the language to those of the IR.
//!
//! ```text
//! recipe, models, functions --scope--> what a name means
//!   expression --eval, builtins, emit--> ops
//!   call       --call, shape-->         the graph of the other, inlined; its dims bound anew
//!   params     --params-->              states, and a graph that gives them their first values
//! ```
//!
//! An expression is evaluated once, over static values, sizes and tensors alike (`value::Val`); only tensors leave
//! ops behind. Calls are inlined: there is no call op. Errors are collected: a name whose value is wrong is silent
//! from then on, so that every mistake is told once.

mod builtins;
mod call;
mod document_test;
mod emit;
mod eval;
mod layers;
mod params;
mod rules;
mod scope;
mod shape;
mod state;
mod sweep;
mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::Assert;
use dsgc_ir::{DType, Dim, DimRange, Graph, Program, StateId, Symbol, Tag, Type, Value};

use crate::expr::{Expr, Word};
use crate::functions::Functions;
use crate::graph::{Graph as Source, Tree};
use crate::literal::Constant;
use crate::model::Model;
use crate::recipe::Recipe;

use scope::{Home, Scope, Static};
use sweep::Sweep;
use value::Val;

pub use builtins::{BUILTINS, Builtin};
pub use document_test::{DocumentTest, document_tests};
pub use shape::binders;
pub use state::{Average, STATE_INIT, Set, average_graph, set_graph, state_name};

/// A model in its role.
#[derive(Clone, Debug)]
pub struct Role<'a> {
    /// Name of the role.
    pub name: &'a str,
    /// The model document.
    pub model: &'a Model,
    /// The functions in its scope: an earlier document wins.
    pub functions: Vec<&'a Functions>,
    /// A value for every entry of the model's `config`.
    pub config: BTreeMap<String, Constant>,
    /// Whether an update trains it.
    pub trained: bool,
    /// The model that it is built upon, if its document has `models`.
    pub trunk: Option<Trunk<'a>>,
}

/// The model that another is built upon. Its parameters are parameters of the same role, as far as anything reads
/// them.
#[derive(Clone, Debug)]
pub struct Trunk<'a> {
    /// What the other's document calls it.
    pub name: &'a str,
    /// The model document.
    pub model: &'a Model,
    /// The functions in its scope: an earlier document wins.
    pub functions: Vec<&'a Functions>,
    /// A value for every entry of the model's `config`.
    pub config: BTreeMap<String, Constant>,
}

/// Ids of the tokenizer's special tokens, as far as it has them; they are names in every recipe and function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenIds {
    /// Padding.
    pub pad: Option<i32>,
    /// End of a text.
    pub eos: Option<i32>,
    /// Beginning of a text.
    pub bos: Option<i32>,
}

/// A graph that the plan calls.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name in the recipe.
    pub graph: String,
    /// The range of every dim of its inputs.
    pub dims: Vec<DimRange>,
}

/// What the graphs of a stage are made from.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The recipe, with what it takes over.
    pub recipe: &'a Recipe,
    /// The functions in its scope: an earlier document wins.
    pub functions: Vec<&'a Functions>,
    /// The models.
    pub roles: Vec<Role<'a>>,
    /// A value for every option of the recipe.
    pub options: BTreeMap<String, Constant>,
    /// Token ids.
    pub ids: TokenIds,
    /// The graphs that the plan calls.
    pub entries: Vec<Entry>,
    /// States of the recipe and how they begin: a number that is known, or a tensor such as `zeros([8])`.
    pub states: Vec<(Word, Expr)>,
    /// `set` statements.
    pub sets: Vec<Set>,
    /// Moving averages.
    pub averages: Vec<Average>,
}

/// What a stage's graphs have become.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// States and graphs. Of the host side only what graphs demand of their inputs.
    pub program: Program,
    /// By role, the parameters of the model it is built upon that nothing reads: they have no state, and files may
    /// have them all the same.
    pub left: BTreeMap<String, Vec<String>>,
}

/// Name of the graph that gives a role's parameters their first values. No graph of a user can be called so.
pub fn init_graph(role: &str) -> String {
    format!("{role}.init")
}

/// Lowers the graphs of a stage: its states, the graphs that the plan calls, a graph `<role>.init` per role, and those
/// that change states. Graphs hold only what their outputs need. All errors come at once.
pub fn program(request: &Request<'_>) -> Result<Lowered, Vec<Diag>> {
    let mut lowering = Lowering::new(&request.functions, &request.roles, request.ids);
    lowering.models();
    let options = lowering.statics(&request.recipe.options, &request.options);
    for entry in &request.entries {
        let Some(graph) = request.recipe.graphs.iter().find(|g| g.name.text == entry.graph) else {
            panic!("bug: the plan calls graph `{}`, which recipe `{}` lacks", entry.graph, request.recipe.name.text);
        };
        let home = Home {
            statics: options.clone(),
            graphs: &request.recipe.graphs,
            functions: lowering.functions.clone(),
            first: 0,
            role: None,
            calls_models: true,
        };
        lowering.entry(&home, graph, &entry.graph, &entry.dims);
    }
    let home = Home {
        statics: options,
        graphs: &request.recipe.graphs,
        functions: lowering.functions.clone(),
        first: 0,
        role: None,
        calls_models: false,
    };
    lowering.recipe_states(&home, &request.states);
    for (number, set) in request.sets.iter().enumerate() {
        lowering.set(&home, number, set);
    }
    lowering.finish(&request.averages)
}

/// An error that has been noted. Whoever gets it goes on with what does not depend on it.
#[derive(Clone, Copy, Debug)]
struct Reported;

type R<T> = Result<T, Reported>;

/// A role while graphs are lowered.
struct RoleState<'a> {
    name: String,
    model: &'a Model,
    functions: Rc<[&'a Functions]>,
    statics: Rc<[Static]>,
    trained: bool,
    /// Whether its document is wrong; calls of it are silent then.
    broken: bool,
    /// Every declared parameter; those whose `when` is false have no state.
    params: BTreeMap<String, params::Declared<'a>>,
    /// Parameters with a state, in the order of declaration.
    own: Vec<params::Own>,
    /// The model it is built upon: what its document calls that one, and its number among the roles.
    trunk: Option<(&'a str, usize)>,
    /// Whether it is such a model, which nobody but the other one calls.
    is_trunk: bool,
    /// The outputs of its graph, once that has been checked.
    outputs: Vec<(String, Type)>,
    /// The states that its graph needs, once that has been checked.
    needs: BTreeSet<StateId>,
}

impl<'a> RoleState<'a> {
    fn new(
        name: &str,
        trained: bool,
        model: &'a Model,
        functions: &[&'a Functions],
        config: &BTreeMap<String, Constant>,
    ) -> RoleState<'a> {
        let statics = model.config.iter().map(|d| Static {
            name: d.name.text.clone(),
            span: d.name.span,
            value: config.get(&d.name.text).cloned(),
        });
        RoleState {
            name: name.into(),
            model,
            functions: functions.into(),
            statics: statics.collect(),
            trained,
            broken: false,
            params: BTreeMap::new(),
            own: Vec::new(),
            trunk: None,
            is_trunk: false,
            outputs: Vec::new(),
            needs: BTreeSet::new(),
        }
    }
}

/// A condition that is known when the graph runs.
struct Asserted {
    /// 1 where it holds, `f32[]`.
    holds: Value,
    message: String,
    span: Span,
}

/// What graphs are lowered into.
struct Lowering<'a> {
    program: Program,
    roles: Vec<RoleState<'a>>,
    functions: Rc<[&'a Functions]>,
    ids: Rc<[Static]>,
    errors: Vec<Diag>,
    /// The graph in hand.
    graph: Graph,
    /// Parameters that it has read.
    reads: BTreeMap<StateId, Value>,
    /// What it demands.
    asserted: Vec<Asserted>,
    /// The layer in hand.
    tag: Option<Tag>,
    /// The role whose model is computed here.
    computing: Option<usize>,
    /// The calls in hand, to tell those that never end.
    calls: Vec<String>,
    /// Whether calls have come to their limit: no more are made then.
    exhausted: bool,
}

impl<'a> Lowering<'a> {
    fn new(functions: &[&'a Functions], roles: &[Role<'a>], ids: TokenIds) -> Lowering<'a> {
        let ids = [("pad", ids.pad), ("eos", ids.eos), ("bos", ids.bos)].into_iter().map(|(name, id)| Static {
            name: name.into(),
            span: Span::NONE,
            value: id.map(|id| Constant::Int(id.into())),
        });
        let mut lowering = Lowering {
            program: Program::default(),
            roles: Vec::new(),
            functions: functions.into(),
            ids: ids.collect(),
            errors: Vec::new(),
            graph: Graph::default(),
            reads: BTreeMap::new(),
            asserted: Vec::new(),
            tag: None,
            computing: None,
            calls: Vec::new(),
            exhausted: false,
        };
        for role in roles {
            let mut own = RoleState::new(role.name, role.trained, role.model, &role.functions, &role.config);
            // A trunk stands before what is built upon it, and is checked before it.
            if let Some(trunk) = &role.trunk {
                own.trunk = Some((trunk.name, lowering.roles.len()));
                let state = RoleState::new(role.name, role.trained, trunk.model, &trunk.functions, &trunk.config);
                lowering.roles.push(RoleState { is_trunk: true, ..state });
            }
            lowering.roles.push(own);
        }
        lowering
    }

    /// Notes an error.
    fn fail<T>(&mut self, diag: Diag) -> R<T> {
        // The layers of a model, or two calls of one function, make the same mistake.
        if !self.errors.contains(&diag) {
            self.errors.push(diag);
        }
        Err(Reported)
    }

    /// Options and token ids as a document sees them.
    fn statics(&self, declared: &[crate::graph::Declaration], values: &BTreeMap<String, Constant>) -> Rc<[Static]> {
        let own = declared.iter().map(|d| Static {
            name: d.name.text.clone(),
            span: d.name.span,
            value: values.get(&d.name.text).cloned(),
        });
        own.chain(self.ids.iter().cloned()).collect()
    }

    /// Begins a graph.
    fn begin(&mut self, name: &str, dims: &[DimRange]) {
        self.graph = Graph::new(name);
        self.graph.dims = dims.to_vec();
        self.reads.clear();
        self.asserted.clear();
    }

    /// Lowers a graph that is called from outside.
    fn entry(&mut self, home: &Home<'a>, source: &'a Source, name: &str, dims: &[DimRange]) {
        self.begin(name, dims);
        let before = self.errors.len();
        let mut scope = Scope::new(home.clone());
        let size = |symbol: &str| dims.iter().find(|d| &*d.symbol == symbol).map(|d| Dim::symbol(&d.symbol));
        self.symbols(&mut scope, source, size, "let it be a dim of a sequence that the plan passes");
        self.host_inputs(&mut scope, source);
        self.body(&mut scope, source);
        if let Ok(out) = self.out(&mut scope, &source.out)
            && self.outputs(source, out).is_ok()
            && self.errors.len() == before
        {
            for (k, assert) in std::mem::take(&mut self.asserted).into_iter().enumerate() {
                let output = format!("assert.{k}");
                self.graph.outputs.push((output.clone(), assert.holds));
                let Asserted { message, span, .. } = assert;
                self.program.stage.asserts.push(Assert { graph: name.into(), output, message, span });
            }
            self.graph.batch = batch(source, dims);
            self.program.graphs.push(std::mem::take(&mut self.graph));
        }
    }

    /// Names the results of a graph that is called from outside.
    fn outputs(&mut self, source: &Source, out: Val) -> R<()> {
        let mut outputs = Vec::new();
        let span = match &source.out {
            Tree::Expr(expr) => expr.span,
            Tree::Record(span, _) => *span,
        };
        self.flatten(span, String::new(), out, &mut outputs)?;
        self.graph.outputs = outputs;
        Ok(())
    }

    fn flatten(&mut self, span: Span, name: String, value: Val, outputs: &mut Vec<(String, Value)>) -> R<()> {
        if let Val::Record(record) = &value {
            for (field, value) in &record.fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                // Of a called graph's outputs, the first stands for all (D8).
                self.flatten(span, name, value.clone().single(), outputs)?;
            }
            return Ok(());
        }
        let arg = value::Arg { span, value };
        let values = self.one_dtype(span, &[&arg])?;
        outputs.push((if name.is_empty() { "out".into() } else { name }, values[0]));
        Ok(())
    }

    fn finish(mut self, averages: &[Average]) -> Result<Lowered, Vec<Diag>> {
        if !self.errors.is_empty() {
            return Err(self.errors);
        }
        let (gone, left) = self.unneeded();
        let sweep = Sweep { gone };
        self.program = sweep.program(std::mem::take(&mut self.program));
        for role in &mut self.roles {
            role.own.retain(|own| !sweep.gone.contains(&own.state));
            role.own.iter_mut().for_each(|own| own.state = sweep.number(own.state));
        }
        for role in (0..self.roles.len()).filter(|&role| !self.roles[role].is_trunk).collect::<Vec<_>>() {
            self.init(role);
        }
        for average in averages {
            self.average(average);
        }
        Ok(Lowered { program: self.program, left })
    }

    /// Parameters of trunks that the models upon them do not need, and their names by role.
    fn unneeded(&self) -> (BTreeSet<StateId>, BTreeMap<String, Vec<String>>) {
        let (mut gone, mut left) = (BTreeSet::new(), BTreeMap::new());
        for role in &self.roles {
            let Some((_, trunk)) = role.trunk else { continue };
            let mut names = Vec::new();
            for (name, declared) in &self.roles[trunk].params {
                if let Ok(Some(state)) = declared.state
                    && !role.needs.contains(&state)
                {
                    gone.insert(state);
                    names.push(name.clone());
                }
            }
            left.insert(role.name.clone(), names);
        }
        (gone, left)
    }
}

/// The dim that counts rows: the first of the graph's sequences, or of its tokens (D1).
fn batch(source: &Source, dims: &[DimRange]) -> Option<Symbol> {
    let sequences = source.inputs.iter().filter_map(|(name, ty)| {
        let (base, items) = shape::parts(ty)?;
        (base == "sequence" || name.text == "tokens").then(|| items.first().cloned()).flatten()
    });
    let first: BTreeSet<String> = sequences.filter_map(|dim: &Expr| dim.name().map(String::from)).collect();
    dims.iter().find(|d| first.contains(&*d.symbol)).map(|d| d.symbol.clone())
}

/// The type of a member of a sequence.
fn sequence_field(name: &str) -> Option<DType> {
    SEQUENCE.iter().find(|f| f.0 == name).map(|f| f.1)
}

/// Members of a `sequence[B, T]` (D9).
const SEQUENCE: [(&str, DType); 3] = [("tokens", DType::I32), ("segment", DType::I32), ("trained", DType::Bool)];

/// A type of whatever a dtype and dims say.
fn ty(dtype: DType, dims: &[Dim]) -> Type {
    Type::new(dtype, dims)
}
