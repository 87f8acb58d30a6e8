//! The graphs of a stage, by way of [`lower`](crate::lower).

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Stage, Statement};
use dsgc_ir::{DimRange, Graph, Program};

use crate::expr::{Expr, ExprKind, Item};
use crate::literal::Constant;
use crate::lower::{self, Request, Role, TokenIds};

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
    };
    match lower::program(&request) {
        Ok(program) => Some(program),
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
        spread_args(&mut evaluate.args, &evaluate.graph, &program.graphs);
    }
    program.stage = stage;
    Some(program)
}

fn spread(statement: &mut Statement, graphs: &[Graph]) {
    match statement {
        Statement::For { body, .. } | Statement::Repeat { body, .. } => {
            body.iter_mut().for_each(|statement| spread(statement, graphs));
        }
        Statement::Update(update) => spread_args(&mut update.args, &update.graph, graphs),
    }
}

/// From `text: batch.text` to an argument for each tensor: `text.tokens: batch.text.tokens`.
fn spread_args(args: &mut Vec<(String, String)>, graph: &str, graphs: &[Graph]) {
    let Some(graph) = graphs.iter().find(|g| g.name == graph) else {
        panic!("bug: the plan calls graph `{graph}`, which was not lowered");
    };
    let spread = graph.inputs().map(|input| {
        let name = graph.name_of(input);
        let (first, rest) = name.split_once('.').unwrap_or((name, ""));
        let Some((_, path)) = args.iter().find(|(input, _)| input == first) else {
            panic!("bug: nobody gives `{name}` to graph `{}`", graph.name);
        };
        (name.to_string(), if rest.is_empty() { path.clone() } else { format!("{path}.{rest}") })
    });
    *args = spread.collect();
}

/// Lowers a model alone, with rows of up to `length` tokens.
pub(super) fn lower_model(documents: &mut Documents<'_>, part: &Part<'_>, rows: u64, length: i64) {
    let inputs = part.document.model.graph.inputs.iter();
    let mut dims: Vec<DimRange> = Vec::new();
    for (i, name) in inputs.flat_map(|(_, ty)| dims_of(ty)).enumerate() {
        if !dims.iter().any(|d| *d.symbol == *name) {
            dims.push(DimRange { symbol: name.into(), min: 1, max: if i == 0 { rows as i64 } else { length } });
        }
    }
    if let Err(mut diags) = lower::model(&part.role(), &dims) {
        documents.errors.append(&mut diags);
    }
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
