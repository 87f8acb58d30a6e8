//! The graphs of a stage, by way of [`lower`](crate::lower).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Operands, Stage, Statement};
use dsgc_ir::trained::choose;
use dsgc_ir::{DimRange, Op, Program, Type};

use crate::expr::{Arg, Expr, ExprKind, Item, Word};
use crate::functions::Functions;
use crate::graph::{Graph, Tree};
use crate::literal::Constant;
use crate::lower::{self, Average, DocumentTest, Lowered, Request, Role, Set, TokenIds};
use crate::model::Model;
use crate::recipe::Recipe;

use super::config::Config;
use super::documents::{Documents, ScopedModel, ScopedRecipe};
use super::heads::Trunk;
use super::plan::called::Called;
use super::plan::types::{Entry, unknown};
use super::plan::{Planned, Planning, forward_graph};
use super::roles::BoundRole;
use super::stage::Prepared;

/// A role as graphs see it.
#[derive(Clone)]
pub(super) struct Part<'a> {
    pub name: &'a str,
    pub document: &'a ScopedModel,
    pub config: &'a Config,
    pub trained: bool,
    /// The model that it is built upon.
    pub trunk: Option<&'a Trunk>,
}

/// A model's document, and what it needs of the document's surroundings.
fn in_scope<'a>(
    document: &'a ScopedModel,
    config: &Config,
) -> (&'a Model, Vec<&'a Functions>, BTreeMap<String, Constant>) {
    let functions = document.functions.iter().map(|f| &**f).collect();
    (&document.model, functions, config.entries.iter().map(|e| (e.name.clone(), e.value.clone())).collect())
}

impl<'a> Part<'a> {
    fn role(&self) -> Role<'a> {
        let (model, functions, config) = in_scope(self.document, self.config);
        let slot = model.models.first().map(|slot| slot.name.text.as_str());
        let trunk = self.trunk.zip(slot).map(|(trunk, name)| {
            let (model, functions, config) = in_scope(&trunk.document, &trunk.config);
            lower::Trunk { name, model, functions, config }
        });
        Role { name: self.name, model, functions, config, trained: self.trained, trunk }
    }
}

/// What graphs are lowered from.
pub(super) struct Inputs<'a> {
    pub recipe: &'a ScopedRecipe,
    pub values: &'a BTreeMap<String, Constant>,
    pub parts: Vec<Part<'a>>,
    pub ids: TokenIds,
    pub entries: Vec<Entry>,
    pub sets: Vec<Set>,
    pub averages: Vec<Average>,
    /// The stage that all this is for, if there is one.
    pub at: Option<Span>,
}

/// Lowers the graphs; what is wrong goes to the documents' errors.
pub(super) fn lower(documents: &mut Documents<'_>, inputs: &Inputs<'_>) -> Option<Lowered> {
    let request = Request {
        recipe: &inputs.recipe.recipe,
        functions: inputs.recipe.functions.iter().map(|f| &**f).collect(),
        roles: inputs.parts.iter().map(Part::role).collect(),
        options: inputs.values.clone(),
        ids: inputs.ids,
        entries: inputs.entries.iter().map(entry).collect(),
        states: inputs.recipe.recipe.state.clone(),
        sets: inputs.sets.clone(),
        averages: inputs.averages.clone(),
    };
    match lower::program(&request) {
        Ok(mut lowered) => {
            for entry in &inputs.entries {
                if let Some(graph) = lowered.program.graphs.iter_mut().find(|g| g.name == entry.graph) {
                    graph.batch = entry.batch.clone();
                }
            }
            Some(lowered)
        }
        Err(diags) => {
            for diag in diags {
                report(documents, diag, inputs.at);
            }
            None
        }
    }
}

/// Notes an error of a graph, once for each place: the same graph is lowered for every call of it and every stage.
fn report(documents: &mut Documents<'_>, diag: Diag, at: Option<Span>) {
    let place = |d: &Diag| d.labels.first().map(|label| label.span);
    if documents.errors.iter().any(|known| known.message == diag.message && place(known) == place(&diag)) {
        return;
    }
    // What goes wrong in the library is the doing of somebody's sizes: say who brought it there.
    let in_library = |span: Span| documents.sources.name(span.source).starts_with("std/");
    let whose = at.filter(|_| diag.labels.iter().all(|label| in_library(label.span)));
    documents.errors.push(match whose {
        Some(stage) => diag.label(stage, "in this stage"),
        None => diag,
    });
}

fn entry(entry: &Entry) -> lower::Entry {
    let batch = entry.batch.iter().map(|symbol| DimRange { symbol: symbol.clone(), min: 1, max: entry.rows as i64 });
    lower::Entry { graph: entry.graph.clone(), dims: batch.chain(entry.ranges.iter().cloned()).collect() }
}

pub(super) fn parts(roles: &[BoundRole]) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    for role in roles {
        let BoundRole { name, known, trained, .. } = role;
        let trunk = known.trunk.as_ref();
        parts.push(Part { name, document: &known.document, config: &known.config, trained: *trained, trunk });
    }
    parts
}

/// The tokens that graphs and plans know by name.
pub(super) fn token_ids(roles: &[BoundRole]) -> TokenIds {
    let facts = roles.iter().find_map(|role| role.known.tokenizer.as_ref().ok()).map(|t| &t.facts);
    // Where the tokenizer names no padding, the rows are padded with its end: graphs must mean the same token.
    facts.map_or(TokenIds::default(), |f| TokenIds { pad: f.pad.or(f.eos), eos: f.eos, bos: f.bos })
}

/// The recipe, with a graph `<role>.forward` for each of these roles that calls its model and does nothing else.
pub(super) fn with_forwards(recipe: &Rc<ScopedRecipe>, roles: &[String]) -> Rc<ScopedRecipe> {
    if roles.is_empty() {
        return Rc::clone(recipe);
    }
    let nowhere = |text: &str| Word { span: Span::NONE, text: text.into() };
    let name = |text: &str| Expr { span: Span::NONE, kind: ExprKind::Name(text.into()) };
    let ty = |text: &str| {
        let dims = ["B", "T"].map(|dim| Item::At(name(dim)));
        Expr { span: Span::NONE, kind: ExprKind::Index { base: Box::new(name(text)), items: dims.into() } }
    };
    let forward = |role: &String| {
        let args = ["tokens", "segment"].map(|input| Arg { name: None, value: name(input) });
        let call = Expr { span: Span::NONE, kind: ExprKind::Call { function: nowhere(role), args: args.into() } };
        Graph {
            name: nowhere(&forward_graph(role)),
            doc: None,
            inputs: vec![(nowhere("tokens"), ty("i32")), (nowhere("segment"), ty("i32"))],
            dims: Vec::new(),
            lets: Vec::new(),
            asserts: Vec::new(),
            out: Tree::Record(Span::NONE, vec![(nowhere("logits"), Tree::Expr(call))]),
        }
    };
    let graphs = recipe.recipe.graphs.iter().cloned().chain(roles.iter().map(forward)).collect();
    Rc::new(ScopedRecipe {
        recipe: Recipe { graphs, ..recipe.recipe.clone() },
        functions: recipe.functions.clone(),
        name: recipe.name.clone(),
    })
}

/// The graphs that a plan calls, lowered before their sizes are known: what they take, and what they give.
pub(super) fn signatures(documents: &mut Documents<'_>, planning: &Planning<'_>, called: &Called) -> Option<Program> {
    let Planning { recipe, values, .. } = *planning;
    let entries = recipe.recipe.graphs.iter().filter(|g| called.graphs.contains(&g.name.text));
    let entries = entries.map(|g| Entry { graph: g.name.text.clone(), batch: None, rows: 1, ranges: unknown(g) });
    let inputs = Inputs {
        recipe,
        values,
        parts: planning.parts.clone(),
        ids: planning.ids,
        entries: entries.collect(),
        sets: Vec::new(),
        averages: Vec::new(),
        at: planning.at,
    };
    lower(documents, &inputs).map(|lowered| lowered.program)
}

/// Everything that a plan calls, with the sizes that it has there.
pub(super) fn final_graphs(
    documents: &mut Documents<'_>,
    recipe: &Rc<ScopedRecipe>,
    values: &BTreeMap<String, Constant>,
    parts: Vec<Part<'_>>,
    ids: TokenIds,
    planned: &Planned,
    at: Option<Span>,
) -> Option<Lowered> {
    let mut generates = Vec::new();
    for body in planned.evaluate.iter().map(|e| &e.body).chain([&planned.plan]) {
        each(body, &mut |statement| {
            if let Statement::Generate(generate) = statement
                && !generates.contains(&generate.role)
            {
                generates.push(generate.role.clone());
            }
        });
    }
    let inputs = Inputs {
        recipe: &with_forwards(recipe, &generates),
        values,
        parts,
        ids,
        entries: planned.entries.clone(),
        sets: planned.sets.clone(),
        averages: planned.averages.clone(),
        at,
    };
    lower(documents, &inputs)
}

/// The program of a stage.
pub(super) fn program(documents: &mut Documents<'_>, prepared: &Prepared, mut stage: Stage) -> Option<Program> {
    let planned = &prepared.planned;
    let parts = parts(&prepared.roles);
    let ids = token_ids(&prepared.roles);
    let Lowered { mut program, left } =
        final_graphs(documents, &prepared.recipe, &prepared.values, parts, ids, planned, Some(prepared.span))?;
    stage.asserts = std::mem::take(&mut program.stage.asserts);
    for role in &mut stage.roles {
        role.model.tensors.may_be_left = left.get(&role.name).cloned().unwrap_or_default();
    }
    drop_unused(&mut program, &mut stage);
    program.stage = stage;
    // The pass `adapt` chooses the same; here all that is wrong with a pipeline comes at once.
    let wrong = program.stage.trainings.iter().filter_map(|training| choose(&program, training).err());
    documents.errors.extend(wrong.flatten());
    Some(program)
}

/// Visits all statements.
fn each(body: &[Statement], visit: &mut dyn FnMut(&Statement)) {
    for statement in body {
        visit(statement);
        if let Statement::For { body, .. } | Statement::Repeat { body, .. } = statement {
            each(body, visit);
        }
    }
}

fn each_operands(body: &mut [Statement], visit: &mut dyn FnMut(&str, &mut Operands)) {
    for statement in body {
        match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => each_operands(body, visit),
            Statement::Call(call) => visit(&call.graph, &mut call.args),
            Statement::Update(update) => update.terms.iter_mut().for_each(|t| visit(&t.graph, &mut t.args)),
            Statement::Generate(_) | Statement::Next { .. } | Statement::Join { .. } | Statement::Recent { .. } => {}
        }
    }
}

/// A sequence brings tensors that not every graph reads. Those that some call does not have are taken from the graph;
/// the plan has seen that nothing reads them.
fn drop_unused(program: &mut Program, stage: &mut Stage) {
    let bodies = |stage: &mut Stage, visit: &mut dyn FnMut(&str, &mut Operands)| {
        each_operands(&mut stage.plan, visit);
        stage.evaluate.iter_mut().for_each(|e| each_operands(&mut e.body, visit));
    };
    let mut dropped: BTreeSet<(String, String)> = BTreeSet::new();
    bodies(stage, &mut |graph, args| {
        let Some(graph) = program.graph(graph) else { return };
        let names = graph.inputs().map(|input| graph.name_of(input));
        let absent = names.filter(|name| !args.iter().any(|(input, _)| input == name));
        dropped.extend(absent.map(|name| (graph.name.clone(), name.to_string())));
    });
    bodies(stage, &mut |graph, args| args.retain(|(input, _)| !dropped.contains(&(graph.into(), input.clone()))));
    let states: Vec<Type> = program.states.iter().map(|s| s.ty.clone()).collect();
    for graph in &mut program.graphs {
        if dropped.iter().any(|(name, _)| *name == graph.name) {
            *graph = without_inputs(graph, |name| dropped.contains(&(graph.name.clone(), name.into())), &states);
        }
    }
}

/// The graph without some of its inputs, which nothing reads.
fn without_inputs(old: &dsgc_ir::Graph, drop: impl Fn(&str) -> bool, states: &[Type]) -> dsgc_ir::Graph {
    let mut new = dsgc_ir::Graph::like(old, old.name.clone());
    let mut map: BTreeMap<dsgc_ir::Value, dsgc_ir::Value> = BTreeMap::new();
    for input in old.inputs().filter(|&input| !drop(old.name_of(input))) {
        map.insert(input, new.input(old.name_of(input), old.ty(input).clone()));
    }
    for (_, op) in old.ops() {
        let args: Vec<dsgc_ir::Value> = op.args.iter().map(|a| map[a]).collect();
        let state = match op.op {
            Op::Read { state } | Op::Write { state } => Some(&states[state.0 as usize]),
            _ => None,
        };
        let id = new.try_push(op.op.clone(), &args, state, op.site.clone());
        let id = id.unwrap_or_else(|why| panic!("bug: a copy of graph `{}` is wrong: {why}", old.name));
        let results: Vec<dsgc_ir::Value> = new.op(id).results().collect();
        for (from, to) in op.results().zip(results) {
            new.set_name(to, old.name_of(from));
            map.insert(from, to);
        }
    }
    new.outputs = old.outputs.iter().map(|(name, v)| (name.clone(), map[v])).collect();
    new
}

/// Lowers a model alone: a graph with the model's own inputs that does nothing but call it.
pub(super) fn lower_model(documents: &mut Documents<'_>, part: Part<'_>, rows: u64, length: i64) {
    let nowhere = |text: &str| Word { span: Span::NONE, text: text.into() };
    let Some(score) = documents.recipe(&nowhere("score"), Path::new("")) else { return };
    let graph = &part.document.model.graph;
    let argument = |(name, _): &(Word, Expr)| Arg {
        name: None,
        value: Expr { span: name.span, kind: ExprKind::Name(name.text.clone()) },
    };
    let args = graph.inputs.iter().map(argument).collect();
    let call = ExprKind::Call { function: nowhere(part.name), args };
    let forward = Graph {
        name: nowhere("forward"),
        doc: None,
        inputs: graph.inputs.clone(),
        dims: Vec::new(),
        lets: Vec::new(),
        asserts: Vec::new(),
        out: Tree::Expr(Expr { span: Span::NONE, kind: call }),
    };
    let dims: BTreeSet<&str> = graph.inputs.iter().flat_map(|(_, ty)| dims_of(ty)).collect();
    let batch = graph.inputs.first().and_then(|(_, ty)| dims_of(ty).first().copied());
    let lengths = dims.iter().filter(|dim| Some(**dim) != batch);
    let ranges = lengths.map(|dim| DimRange { symbol: (*dim).into(), min: 1, max: length }).collect();
    let entry = Entry { graph: "forward".into(), batch: batch.map(Into::into), rows: rows as usize, ranges };
    let recipe = ScopedRecipe {
        recipe: Recipe { graphs: vec![forward], tests: Vec::new(), ..score.recipe.clone() },
        functions: score.functions.clone(),
        name: score.name.clone(),
    };
    let inputs = Inputs {
        recipe: &recipe,
        values: &BTreeMap::new(),
        parts: vec![part],
        ids: TokenIds::default(),
        entries: vec![entry],
        sets: Vec::new(),
        averages: Vec::new(),
        at: None,
    };
    lower(documents, &inputs);
}

/// The dims that stand alone in a type.
fn dims_of(ty: &Expr) -> Vec<&str> {
    let ExprKind::Index { items, .. } = &ty.kind else { return Vec::new() };
    let names = items.iter().filter_map(|item| match item {
        Item::At(expr) => expr.name(),
        Item::Slice { .. } | Item::New(_) | Item::Rest(_) => None,
    });
    // Capitals are dims (D6); `hidden` is a size of the model's.
    names.filter(|name| name.starts_with(char::is_uppercase)).collect()
}

/// The tests of a recipe and of all functions in its scope.
pub(super) fn tests_of_recipe(documents: &mut Documents<'_>, scoped: &ScopedRecipe) -> Vec<DocumentTest> {
    let recipe = &scoped.recipe;
    let scope: Vec<&Functions> = scoped.functions.iter().map(|f| &**f).collect();
    let own = lower::document_tests(&recipe.tests, &recipe.options, &recipe.graphs, &scope);
    let mut tests = reported(documents, own);
    for functions in &scoped.functions {
        tests.extend(tests_of_functions(documents, functions, &scoped.functions));
    }
    tests
}

/// The tests of a document of functions. `scope` is what else it may call.
pub(super) fn tests_of_functions(
    documents: &mut Documents<'_>,
    functions: &Functions,
    scope: &[Rc<Functions>],
) -> Vec<DocumentTest> {
    let scope: Vec<&Functions> = [functions].into_iter().chain(scope.iter().map(|f| &**f)).collect();
    let tests = lower::document_tests(&functions.tests, &[], &functions.graphs, &scope);
    reported(documents, tests)
}

fn reported(documents: &mut Documents<'_>, tests: Result<Vec<DocumentTest>, Vec<Diag>>) -> Vec<DocumentTest> {
    tests.unwrap_or_else(|diags| {
        diags.into_iter().for_each(|diag| report(documents, diag, None));
        Vec::new()
    })
}
