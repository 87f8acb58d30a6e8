//! The graphs of a stage, by way of [`lower`](crate::lower).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Stage, Statement};
use dsgc_ir::{DimRange, Program};

use crate::expr::{Arg, Expr, ExprKind, Item, Word};
use crate::functions::Functions;
use crate::graph::{Graph, Tree};
use crate::literal::Constant;
use crate::lower::{self, DocumentTest, Request, Role, TokenIds};
use crate::recipe::Recipe;

use super::config::Config;
use super::documents::{Documents, ScopedModel, ScopedRecipe};
use super::plan::Entry;
use super::stage::Prepared;

/// A role as graphs see it.
pub(super) struct Part<'a> {
    pub name: &'a str,
    pub document: &'a ScopedModel,
    pub config: &'a Config,
    pub trained: bool,
}

impl<'a> Part<'a> {
    fn role(&self) -> Role<'a> {
        Role {
            name: self.name,
            model: &self.document.model,
            functions: self.document.functions.iter().map(|f| &**f).collect(),
            config: self.config.entries.iter().map(|e| (e.name.clone(), e.value.clone())).collect(),
            trained: self.trained,
            trunk: None,
        }
    }
}

/// What graphs are lowered from.
pub(super) struct Inputs<'a> {
    pub recipe: &'a ScopedRecipe,
    pub values: &'a BTreeMap<String, Constant>,
    pub parts: Vec<Part<'a>>,
    pub ids: TokenIds,
    pub entries: &'a [Entry],
    /// Most rows of a call.
    pub rows: u64,
    /// The stage that all this is for, if there is one.
    pub at: Option<Span>,
}

/// Lowers the graphs; what is wrong goes to the documents' errors.
pub(super) fn lower(documents: &mut Documents<'_>, inputs: &Inputs<'_>) -> Option<Program> {
    let request = Request {
        recipe: &inputs.recipe.recipe,
        functions: inputs.recipe.functions.iter().map(|f| &**f).collect(),
        roles: inputs.parts.iter().map(Part::role).collect(),
        options: inputs.values.clone(),
        ids: inputs.ids,
        entries: inputs.entries.iter().map(|entry| self::entry(entry, inputs.rows)).collect(),
        states: &[],
        sets: Vec::new(),
        averages: Vec::new(),
    };
    match lower::program(&request) {
        Ok(lowered) => Some(lowered.program),
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

fn entry(entry: &Entry, rows: u64) -> lower::Entry {
    let batch = entry.batch.iter().map(|dim| (dim.as_str(), 1, rows as i64));
    let lengths = entry.lengths.iter().map(|(dim, min, max)| (dim.as_str(), *min, *max));
    let dims = batch.chain(lengths).map(|(dim, min, max)| DimRange { symbol: dim.into(), min, max });
    lower::Entry { graph: entry.graph.clone(), dims: dims.collect() }
}

/// The program of a stage.
pub(super) fn program(documents: &mut Documents<'_>, prepared: &Prepared, mut stage: Stage) -> Option<Program> {
    let parts = prepared.roles.iter().map(|role| Part {
        name: &role.name,
        document: &role.known.document,
        config: &role.known.config,
        trained: role.trained,
    });
    let facts = prepared.roles.iter().find_map(|role| role.known.tokenizer.as_ref().ok()).map(|t| &t.facts);
    // Where the tokenizer names no padding, the rows are padded with its end: graphs must mean the same token.
    let ids = facts.map_or(TokenIds::default(), |f| TokenIds { pad: f.pad.or(f.eos), eos: f.eos, bos: f.bos });
    let inputs = Inputs {
        recipe: &prepared.recipe,
        values: &prepared.values,
        parts: parts.collect(),
        ids,
        entries: &prepared.planned.entries,
        rows: prepared.micro_batch_size,
        at: Some(prepared.span),
    };
    let mut program = lower(documents, &inputs)?;
    stage.plan.iter_mut().for_each(|statement| spread(statement, &program.graphs));
    for evaluate in &mut stage.evaluate {
        evaluate.body.iter_mut().for_each(|statement| spread(statement, &program.graphs));
    }
    program.stage = stage;
    Some(program)
}

fn spread(statement: &mut Statement, graphs: &[dsgc_ir::Graph]) {
    match statement {
        Statement::For { body, .. } | Statement::Repeat { body, .. } => {
            body.iter_mut().for_each(|statement| spread(statement, graphs));
        }
        Statement::Update(update) => {
            update.terms.iter_mut().for_each(|t| spread_args(&mut t.args, &t.graph, graphs));
        }
        Statement::Call(call) => spread_args(&mut call.args, &call.graph, graphs),
        _ => {}
    }
}

/// From `text: batch.text` to an argument for each tensor: `text.tokens: batch.text.tokens`.
fn spread_args(args: &mut dsgc_ir::stage::Operands, graph: &str, graphs: &[dsgc_ir::Graph]) {
    let Some(graph) = graphs.iter().find(|g| g.name == graph) else {
        panic!("bug: the plan calls graph `{graph}`, which was not lowered");
    };
    let spread = graph.inputs().map(|input| {
        let name = graph.name_of(input);
        let (first, rest) = name.split_once('.').unwrap_or((name, ""));
        let Some((_, path)) = args.iter().find(|(input, _)| input == first) else {
            panic!("bug: nobody gives `{name}` to graph `{}`", graph.name);
        };
        let dsgc_ir::stage::Operand::Path(path) = path else { panic!("bug: `{first}` is no path") };
        let whole = if rest.is_empty() { path.clone() } else { format!("{path}.{rest}") };
        (name.to_string(), dsgc_ir::stage::Operand::Path(whole))
    });
    *args = spread.collect();
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
    let lengths = dims.iter().filter(|dim| Some(**dim) != batch).map(|dim| (dim.to_string(), 1, length));
    let entry = Entry { graph: "forward".into(), batch: batch.map(String::from), lengths: lengths.collect() };
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
        entries: &[entry],
        rows,
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
