//! Documents that are checked by themselves: models, recipes and functions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dsgc_ir::diag::{Sources, Span};

use crate::document::Document;
use crate::expr::Word;
use crate::literal::Constant;
use crate::recipe::Recipe;

use super::declared::typed;
use super::documents::{Documents, Found, ScopedRecipe};
use super::plan::{Planned, Scope, SourceShape};
use super::{Device, Loaded, stage};

/// Rows of a source whose length no option says.
const LENGTH: i64 = 512;

/// Checks a document as far as that can be done without a pipeline.
pub(super) fn check(documents: &mut Documents<'_>, document: Document, folder: PathBuf) -> Option<Loaded> {
    let found = Found { document, folder };
    let name = |word: &Word| Word { span: Span::NONE, text: word.text.clone() };
    match &found.document {
        Document::Model(model) => drop(documents.scoped_model(&name(&model.name), &found)),
        Document::Recipe(recipe) => {
            let name = name(&recipe.name);
            if let Some(scoped) = documents.scoped_recipe(&name, &found) {
                self::recipe(documents, &scoped);
            }
        }
        Document::Functions(functions) => {
            let scope = documents.functions(&[(&functions.uses, &found.folder)]);
            documents.warn_of_shadows(&functions.graphs, &scope);
        }
        Document::Pipeline(_) => unreachable!("pipelines are loaded whole"),
    }
    let nothing = (Vec::new(), Device::default(), String::new());
    Some(Loaded {
        stages: nothing.0,
        device: nothing.1,
        resolved: nothing.2,
        sources: Sources::default(),
        warnings: Vec::new(),
    })
}

/// A recipe with the defaults of its options, and rows of the first form of each source.
fn recipe(documents: &mut Documents<'_>, scoped: &ScopedRecipe) {
    stage::unsupported(documents, scoped);
    documents.warn_of_shadows(&scoped.recipe.graphs, &scoped.functions);
    let values = defaults(documents, &scoped.recipe);
    let sources = scoped.recipe.data.iter().map(|decl| SourceShape {
        name: decl.name.text.clone(),
        sequences: decl.forms.first().map_or_else(Vec::new, |f| f.sequences.iter().map(|s| s.0.text.clone()).collect()),
        has_eval: true,
        length: (1, LENGTH),
    });
    let scope = Scope {
        values: &values,
        graphs: &scoped.recipe.graphs,
        roles: scoped.recipe.models.iter().map(|r| (r.name.text.clone(), r.trained)).collect(),
        sources: sources.collect(),
    };
    let plan = scoped.recipe.plan.as_deref().unwrap_or_default();
    let mut planned = Planned::read(&scope, plan, &scoped.recipe.evaluate);
    documents.errors.append(&mut planned.errors);
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
