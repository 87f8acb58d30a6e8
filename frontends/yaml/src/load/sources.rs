//! The sources of a recipe: which entry of `data` each gets, with which tokenizer, how long its rows may be.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span, nearest};

use crate::expr::Word;
use crate::literal::Constant;
use crate::pipeline::{DataSource, Pipeline, Stage};
use crate::recipe::DataDecl;
use crate::schema::words;

use super::data::{BoundSource, Frame, bind};
use super::documents::{Documents, ScopedRecipe};
use super::models::FoundTokenizer;
use super::roles::BoundRole;
use super::stage::Surroundings;

/// What the rest of the stage says of its sources.
pub(super) struct Asked<'a> {
    pub stage: &'a Stage,
    pub recipe: &'a ScopedRecipe,
    /// Values of the options.
    pub values: &'a BTreeMap<String, Constant>,
    pub roles: &'a [BoundRole],
    pub batch_size: u64,
    pub micro_batch_size: u64,
    /// Where `max_length` was set, if it was.
    pub length: Span,
    /// Where several texts in a row are asked for, if they are.
    pub packing: Option<Span>,
    /// Whether texts of a batch may share rows, if the recipe allows it.
    pub shared_rows: bool,
}

/// Binds all sources of a stage; `None` if one of them is wrong.
pub(super) fn sources(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    named: &[(&DataDecl, &DataSource)],
    asked: &Asked<'_>,
) -> Option<Vec<BoundSource>> {
    let before = documents.errors.len();
    let mut bound = Vec::new();
    for (decl, rows) in named {
        let tokenizer = tokenizer(documents, asked.stage, asked.roles)?;
        let Some((max_length, fixed_width)) = width(documents, decl, asked) else { continue };
        let frame = Frame {
            stage: &asked.stage.name.text,
            stages: around.stage_names,
            recipe: &asked.recipe.name,
            max_length,
            fixed_width,
            batch_size: asked.batch_size as usize,
            micro_batch_size: asked.micro_batch_size as usize,
            packing: asked.packing,
            shared_rows: asked.shared_rows,
            tokenizer: &tokenizer,
        };
        bound.extend(bind(documents, decl, rows, &frame, around.places));
    }
    (documents.errors.len() == before).then_some(bound)
}

/// The sources of the recipe with the entries of `data` that the stage names for them.
pub(super) fn named<'a>(
    documents: &mut Documents<'_>,
    pipeline: &'a Pipeline,
    stage: &Stage,
    recipe: &'a ScopedRecipe,
) -> Vec<(&'a DataDecl, &'a DataSource)> {
    let decls = &recipe.recipe.data;
    for source in stage.data.iter().filter_map(|(source, _)| source.as_ref()) {
        if !decls.iter().any(|d| d.name.text == source.text) {
            let known: Vec<&str> = decls.iter().map(|d| d.name.text.as_str()).collect();
            documents.error(
                Diag::error(format!("recipe `{}` has no source `{}`", recipe.name, source.text))
                    .label(source.span, "")
                    .help(format!("it has {}", words(&known))),
            );
        }
    }
    // `data: chats` without the source's name is enough where there is one only.
    let several = decls.iter().filter(|d| !d.optional).count() > 1;
    let mut named = Vec::new();
    for decl in decls {
        let set = stage.data.iter().find(|(source, _)| match source {
            Some(source) => source.text == decl.name.text,
            None => !several && !decl.optional,
        });
        let Some((_, set)) = set else {
            if !decl.optional {
                unbound(documents, pipeline, stage, &decl.name, several);
            }
            continue;
        };
        match pipeline.data.iter().find(|d| d.name.text == set.text) {
            Some(rows) => named.push((decl, rows)),
            None => unknown_data(documents, &pipeline.data, set),
        }
    }
    named
}

fn unbound(documents: &mut Documents<'_>, pipeline: &Pipeline, stage: &Stage, source: &Word, several: bool) {
    let message = format!("stage `{}` has no `data` for the source `{}`", stage.name.text, source.text);
    let diag = Diag::error(message).label(stage.name.span, "").label(source.span, "the source");
    documents.error(match pipeline.data.first() {
        None => diag.help("write `data: {rows: {path: FILE}}` at the top of the file, and `data: rows` in the stage"),
        Some(rows) if several => diag.help(format!("write `data: {{{}: {}}}`", source.text, rows.name.text)),
        Some(rows) => diag.help(format!("write `data: {}` in the stage", rows.name.text)),
    });
}

fn unknown_data(documents: &mut Documents<'_>, data: &[DataSource], set: &Word) {
    let known: Vec<&str> = data.iter().map(|d| d.name.text.as_str()).collect();
    let diag = Diag::error(format!("found `{}`, expected an entry of `data`", set.text)).label(set.span, "");
    documents.error(match nearest(&set.text, known.iter().copied()) {
        Some(near) => diag.help(format!("write `{near}`")),
        None if known.is_empty() => diag.help("write `data:` at the top of the file, with `NAME: {path: FILE}`"),
        None => diag.help(format!("there are {}", words(&known))),
    });
}

/// The tokenizer of the stage: all roles share it, or their tokens would not mean the same.
fn tokenizer(documents: &mut Documents<'_>, stage: &Stage, roles: &[BoundRole]) -> Option<FoundTokenizer> {
    let found: Vec<(&BoundRole, &FoundTokenizer)> =
        roles.iter().filter_map(|r| r.known.tokenizer.as_ref().ok().map(|t| (r, t))).collect();
    let Some((first, tokenizer)) = found.first() else {
        if let Some(Err(diag)) = roles.first().map(|r| &r.known.tokenizer) {
            documents.error(diag.clone());
        }
        return None;
    };
    if let Some((other, _)) = found.iter().find(|(_, t)| t.facts != tokenizer.facts) {
        documents.error(
            Diag::error(format!("the roles `{}` and `{}` have different tokenizers", first.name, other.name))
                .label(stage.name.span, ""),
        );
        return None;
    }
    Some((*tokenizer).clone())
}

/// The longest row in tokens, and whether every batch is that long: the source's `packed` or `width`, or the option
/// `max_length`.
fn width(documents: &mut Documents<'_>, decl: &DataDecl, asked: &Asked<'_>) -> Option<(usize, bool)> {
    let (value, span) = match decl.packed.as_ref().or(decl.width.as_ref()) {
        Some(expr) => match crate::eval::constant_in(expr, asked.values) {
            Ok(value) => (value, expr.span),
            Err(diag) => {
                documents.error(diag);
                return None;
            }
        },
        None => match asked.values.get("max_length") {
            Some(value) => (value.clone(), asked.length),
            None => {
                documents.error(
                    Diag::error(format!(
                        "source `{}` has no `width`, and the recipe no option `max_length`",
                        decl.name.text
                    ))
                    .label(decl.name.span, ""),
                );
                return None;
            }
        },
    };
    let Some(length) = (match value {
        Constant::Int(n) if n > 0 => usize::try_from(n).ok(),
        _ => None,
    }) else {
        documents.error(Diag::error(format!("found a length of {value}, expected 1 token or more")).label(span, ""));
        return None;
    };
    for role in asked.roles {
        if let Some(positions) = role.known.config.positions().filter(|p| *p < length) {
            let message =
                format!("found rows of up to {length} tokens, but model `{}` has {positions} positions", role.bound_to);
            documents.error(
                Diag::error(message)
                    .label(if span.is_some() { span } else { asked.stage.name.span }, "")
                    .help(format!("set `max_length: {positions}`")),
            );
            return None;
        }
    }
    Some((length, decl.width.is_some()))
}
