//! Documents that are checked by themselves: models, recipes and functions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Sources, Span};

use crate::document::Document;
use crate::expr::Word;
use crate::graph::RoleDecl;
use crate::literal::{Constant, Literal};
use crate::lower::TokenIds;
use crate::recipe::Recipe;
use crate::schema::words;

use super::config::{self, Asked, Config};
use super::declared::typed;
use super::documents::{Documents, Found, ScopedModel, ScopedRecipe};
use super::graphs::{self, Part};
use super::heads::{self, Trunk};
use super::plan::{Planning, SourceShape};
use super::{Device, Loaded, TokenizerFacts, stage};

/// Rows of a batch, and their length, where no pipeline says them: any would do.
const ROWS: u64 = 4;
const LENGTH: i64 = 512;

/// Checks a document as far as that can be done without a pipeline.
pub(super) fn check(documents: &mut Documents<'_>, document: Document, folder: PathBuf) -> Option<Loaded> {
    let found = Found { document, folder };
    // The document itself needs no place: nobody names it.
    let name = |word: &Word| Word { span: Span::NONE, text: word.text.clone() };
    let tests = match &found.document {
        Document::Model(model) => {
            let scoped = Rc::new(documents.scoped_model(&name(&model.name), &found)?);
            self::model(documents, &scoped);
            Vec::new()
        }
        Document::Recipe(recipe) => {
            let scoped = Rc::new(documents.scoped_recipe(&name(&recipe.name), &found)?);
            self::recipe(documents, &scoped);
            graphs::tests_of_recipe(documents, &scoped)
        }
        Document::Functions(functions) => {
            let scope = documents.functions(&[(&functions.uses, &found.folder)]);
            documents.warn_of_shadows(&functions.graphs, &scope);
            graphs::tests_of_functions(documents, functions, &scope)
        }
        Document::Pipeline(_) => unreachable!("pipelines are loaded whole"),
    };
    Some(Loaded {
        stages: Vec::new(),
        device: Device::default(),
        sources: Sources::default(),
        warnings: Vec::new(),
        resolved: String::new(),
        tests,
    })
}

/// A model with its small sizes, or else the defaults of its config, if all entries have a value.
fn model(documents: &mut Documents<'_>, scoped: &Rc<ScopedModel>) {
    let open: Vec<&str> =
        scoped.model.config.iter().filter(|d| d.default.is_none()).map(|d| d.name.text.as_str()).collect();
    if scoped.model.small.is_empty() && !open.is_empty() {
        documents.warnings.push(
            Diag::warning(format!(
                "the shapes of model `{}` were not checked: there is no default for {}",
                scoped.model.name.text,
                words(&open)
            ))
            .label(scoped.model.name.span, "")
            .help("give sizes to try it with, `small: {hidden: 16}`, or check a pipeline that uses it"),
        );
        return;
    }
    if let Some(config) = scratch(documents, scoped, &scoped.model.small) {
        // A model over another one is checked over a small model of the library.
        let trunk = if scoped.model.models.is_empty() {
            None
        } else {
            let Some(trunk) = stand_in(documents) else { return };
            Some(trunk)
        };
        let part = Part { name: "model", document: scoped, config: &config, trained: true, trunk: trunk.as_ref() };
        graphs::lower_model(documents, part, ROWS, LENGTH);
    }
}

/// A config with these values, over the vocabulary of a small tokenizer.
fn scratch(documents: &mut Documents<'_>, scoped: &ScopedModel, given: &[(Word, Literal)]) -> Option<Config> {
    let asked = Asked { name: &scoped.model.name.text, span: scoped.model.name.span, folder: None };
    let tokenizer = TokenizerFacts { vocab: 32, pad: Some(1), eos: Some(2), bos: Some(2) };
    config::from_scratch(&scoped.model, given, Some(&tokenizer), &asked, &mut documents.errors)
}

/// A recipe with the defaults of its options, rows of the first form of each source, and a small model of the library
/// in each role.
fn recipe(documents: &mut Documents<'_>, scoped: &Rc<ScopedRecipe>) {
    stage::unsupported(documents, scoped);
    documents.warn_of_shadows(&scoped.recipe.graphs, &scoped.functions);
    let values = defaults(documents, &scoped.recipe);
    let sources = scoped.recipe.data.iter().map(|decl| {
        let width = decl.width.as_ref().and_then(|width| crate::eval::constant_in(width, &values).ok());
        SourceShape {
            name: decl.name.text.clone(),
            sequences: decl
                .forms
                .first()
                .map_or_else(Vec::new, |f| f.sequences.iter().map(|s| s.0.text.clone()).collect()),
            has_eval: true,
            length: match width {
                Some(Constant::Int(n)) if (1..=LENGTH).contains(&n) => (n, n),
                _ => (1, LENGTH),
            },
            batch_size: ROWS as usize,
        }
    });
    let Some(small) = stand_in(documents) else { return };
    let mut heads = Vec::new();
    for role in &scoped.recipe.models {
        let Some(ty) = type_of(&scoped.recipe, role).filter(|ty| !["causal_lm", "any"].contains(&&*ty.text)) else {
            heads.push(None);
            continue;
        };
        let Some(head) = heads::head(documents, ty) else { return };
        let Some(config) = heads::config_over(documents, &head, &small, &role.name, None) else { return };
        heads.push(Some((head, config)));
    }
    let mut parts = Vec::new();
    for (role, head) in scoped.recipe.models.iter().zip(&heads) {
        let (document, config, trunk) = match head {
            Some((document, config)) => (document, config, Some(&small)),
            None => (&small.document, &small.config, None),
        };
        parts.push(Part { name: &role.name.text, document, config, trained: role.trained, trunk });
    }
    let ids = TokenIds { pad: Some(1), eos: Some(2), bos: Some(2) };
    let planning = Planning {
        recipe: scoped,
        values: &values,
        parts: parts.clone(),
        ids,
        sources: sources.collect(),
        micro_batch_size: ROWS as usize,
        at: None,
    };
    if let Some(planned) = planning.plan(documents) {
        graphs::final_graphs(documents, scoped, &values, parts, ids, &planned, None);
    }
}

/// The type of a role, or of the one that it copies.
fn type_of<'r>(recipe: &'r Recipe, role: &'r RoleDecl) -> Option<&'r Word> {
    let of = role.snapshot.as_ref().or(role.average.as_ref());
    let copied = || recipe.models.iter().find(|other| of.is_some_and(|of| of.text == other.name.text));
    role.ty.as_ref().or_else(|| copied()?.ty.as_ref())
}

/// A language model that a recipe, or a model over models, can be checked with.
fn stand_in(documents: &mut Documents<'_>) -> Option<Trunk> {
    let document = documents.model(&Word { span: Span::NONE, text: "opt".into() }, Path::new(""))?;
    let config = scratch(documents, &document, &document.model.small)?;
    Some(Trunk { document, config })
}

fn defaults(documents: &mut Documents<'_>, recipe: &Recipe) -> BTreeMap<String, Constant> {
    let mut values = BTreeMap::new();
    for option in &recipe.options {
        match option.default.as_ref().map(|default| typed(option, default)) {
            Some(Ok(value)) => drop(values.insert(option.name.text.clone(), value)),
            Some(Err(diag)) => documents.error(diag),
            None => {}
        }
    }
    values
}
