//! Finding documents: names of the library, and files beside the one that names them (D21).

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Sources, Span, nearest};

use crate::document::{self, Document};
use crate::expr::Word;
use crate::functions::Functions;
use crate::graph::Graph;
use crate::library::{self, ENTRIES};
use crate::model::Model;
use crate::recipe::Recipe;
use crate::schema::words;

use super::Host;

/// A document and the folder that paths in it start from.
pub(super) struct Found<T> {
    pub document: T,
    pub folder: PathBuf,
}

/// A recipe with what it takes over, and the functions in its scope.
pub(super) struct ScopedRecipe {
    pub recipe: Recipe,
    pub functions: Vec<Rc<Functions>>,
    /// How the pipeline names it.
    pub name: String,
}

/// A model with the functions in its scope.
pub(super) struct ScopedModel {
    pub model: Model,
    pub functions: Vec<Rc<Functions>>,
}

/// Reads documents, each once.
pub(super) struct Documents<'h> {
    pub host: &'h dyn Host,
    pub sources: Sources,
    pub errors: Vec<Diag>,
    pub warnings: Vec<Diag>,
    read: BTreeMap<String, Option<Rc<Found<Document>>>>,
    recipes: BTreeMap<String, Option<Rc<ScopedRecipe>>>,
    models: BTreeMap<String, Option<Rc<ScopedModel>>>,
}

/// Whether a value names a file and not an entry of the library.
pub(super) fn is_file(name: &str) -> bool {
    name.contains('/') || name.ends_with(".yaml") || name.ends_with(".yml")
}

/// A path that a file in `folder` names, without `.` parts.
pub(super) fn beside(folder: &Path, name: &str) -> PathBuf {
    folder.join(name).components().filter(|c| !matches!(c, Component::CurDir)).collect()
}

impl<'h> Documents<'h> {
    pub fn new(host: &'h dyn Host) -> Documents<'h> {
        Documents {
            host,
            sources: Sources::default(),
            errors: Vec::new(),
            warnings: Vec::new(),
            read: BTreeMap::new(),
            recipes: BTreeMap::new(),
            models: BTreeMap::new(),
        }
    }

    pub fn error(&mut self, diag: Diag) {
        self.errors.push(diag);
    }

    /// The text of a file, or an error at the place that names it.
    pub fn text(&mut self, path: &Path, named: Span) -> Option<String> {
        match self.host.text(path) {
            Ok(text) => Some(text),
            Err(error) => {
                self.error(Diag::error(format!("cannot read `{}`: {error}", path.display())).label(named, ""));
                None
            }
        }
    }

    /// A document of the library (`kind` is its folder there) or a file.
    fn document(&mut self, kind: &str, name: &Word, folder: &Path) -> Option<Rc<Found<Document>>> {
        let (file, text, folder) = if is_file(&name.text) {
            let path = beside(folder, &name.text);
            let file = path.display().to_string();
            if let Some(done) = self.read.get(&file) {
                return done.clone();
            }
            let text = self.text(&path, name.span);
            (file, text, path.parent().unwrap_or(Path::new("")).to_path_buf())
        } else {
            let Some(entry) = library::find(kind, &name.text) else {
                self.unknown(kind, name);
                return None;
            };
            let file = entry.file();
            if let Some(done) = self.read.get(&file) {
                return done.clone();
            }
            // Paths in the library would have no folder to start from; it names none.
            (file, Some(entry.text.to_string()), PathBuf::new())
        };
        let document = text.and_then(|text| match document::parse(&mut self.sources, &file, &text) {
            Ok(document) => Some(Rc::new(Found { document, folder })),
            Err(mut errors) => {
                self.errors.append(&mut errors);
                None
            }
        });
        self.read.insert(file, document.clone());
        document
    }

    fn unknown(&mut self, kind: &str, name: &Word) {
        let known: Vec<&str> = ENTRIES.iter().filter(|e| e.kind == kind).map(|e| e.name).collect();
        let what = kind.trim_end_matches('s');
        let diag = Diag::error(format!("unknown {what} `{}`", name.text)).label(name.span, "");
        let diag = match nearest(&name.text, known.iter().copied()) {
            Some(near) => diag.help(format!("write `{near}`")),
            None => diag.help(format!("the library has {}; a file of your own is named `./FILE.yaml`", words(&known))),
        };
        self.error(diag);
    }

    fn wrong_kind(&mut self, name: &Word, found: &Document, expected: &str) {
        self.error(Diag::error(format!("found {}, expected {expected}", found.kind())).label(name.span, ""));
    }

    /// A recipe as a stage names it.
    pub fn recipe(&mut self, name: &Word, folder: &Path) -> Option<Rc<ScopedRecipe>> {
        let key = key(name, folder);
        if !self.recipes.contains_key(&key) {
            let recipe = self.document("recipes", name, folder).and_then(|found| self.scoped_recipe(name, &found));
            self.recipes.insert(key.clone(), recipe.map(Rc::new));
        }
        self.recipes[&key].clone()
    }

    /// A recipe with all that it takes over.
    pub fn scoped_recipe(&mut self, name: &Word, found: &Found<Document>) -> Option<ScopedRecipe> {
        let Document::Recipe(own) = &found.document else {
            self.wrong_kind(name, &found.document, "a recipe");
            return None;
        };
        let Some(parent) = &own.extends else {
            let functions = self.functions(&[(&own.uses, &found.folder)]);
            return Some(ScopedRecipe { recipe: (**own).clone(), functions, name: name.text.clone() });
        };
        let base = self.document("recipes", parent, &found.folder)?;
        let Document::Recipe(inherited) = &base.document else {
            self.wrong_kind(parent, &base.document, "a recipe");
            return None;
        };
        if let Some(again) = &inherited.extends {
            self.error(
                Diag::error(format!("recipe `{}` extends another one already", inherited.name.text))
                    .label(parent.span, "")
                    .label(again.span, "here")
                    .help(format!("extend `{}`, or write the entries out: `extends` goes one level deep", again.text)),
            );
            return None;
        }
        let functions = self.functions(&[(&own.uses, &found.folder), (&inherited.uses, &base.folder)]);
        Some(ScopedRecipe { recipe: extended(own, inherited), functions, name: name.text.clone() })
    }

    /// A model document as a pipeline names it.
    pub fn model(&mut self, name: &Word, folder: &Path) -> Option<Rc<ScopedModel>> {
        let key = key(name, folder);
        if !self.models.contains_key(&key) {
            let model = self.document("models", name, folder).and_then(|found| self.scoped_model(name, &found));
            self.models.insert(key.clone(), model.map(Rc::new));
        }
        self.models[&key].clone()
    }

    /// A model with the functions it may call.
    pub fn scoped_model(&mut self, name: &Word, found: &Found<Document>) -> Option<ScopedModel> {
        let Document::Model(model) = &found.document else {
            self.wrong_kind(name, &found.document, "a model");
            return None;
        };
        if let Some(test) = model.tests.first() {
            self.error(Diag::error("`tests` of a model are not part of this version").label(test.span, ""));
        }
        let functions = self.functions(&[(&model.uses, &found.folder)]);
        Some(ScopedModel { model: (**model).clone(), functions })
    }

    /// The model of the library that reads an architecture of Hugging Face.
    pub fn model_of_architecture(&mut self, architecture: &str) -> Option<Rc<ScopedModel>> {
        for entry in ENTRIES.iter().filter(|e| e.kind == "models") {
            let name = Word { span: Span::NONE, text: entry.name.into() };
            let Some(found) = self.model(&name, Path::new("")) else { continue };
            let rules = found.model.from_hf.as_ref();
            if rules.is_some_and(|r| r.architectures.iter().any(|a| a.text == architecture)) {
                return Some(found);
            }
        }
        None
    }

    /// The functions in scope: those of the named files, in order, then the library's.
    pub fn functions(&mut self, uses: &[(&[Word], &Path)]) -> Vec<Rc<Functions>> {
        let mut all = Vec::new();
        let named = uses.iter().flat_map(|(words, folder)| words.iter().map(|u| (u.clone(), folder.to_path_buf())));
        let mut open: Vec<(Word, PathBuf)> = named.collect();
        let mut seen: Vec<String> = Vec::new();
        while !open.is_empty() {
            let (name, folder) = open.remove(0);
            let key = key(&name, &folder);
            if seen.contains(&key) {
                continue;
            }
            seen.push(key);
            let Some(found) = self.document("functions", &name, &folder) else { continue };
            match &found.document {
                Document::Functions(functions) => {
                    open.extend(functions.uses.iter().map(|u| (u.clone(), found.folder.clone())));
                    all.push(Rc::new(functions.clone()));
                }
                other => self.wrong_kind(&name, other, "functions"),
            }
        }
        for entry in ENTRIES.iter().filter(|e| e.kind == "functions") {
            let name = Word { span: Span::NONE, text: entry.name.into() };
            if seen.iter().any(|s| s == entry.name) {
                continue;
            }
            if let Some(found) = self.document("functions", &name, Path::new(""))
                && let Document::Functions(functions) = &found.document
            {
                all.push(Rc::new(functions.clone()));
            }
        }
        all
    }

    /// Says which functions of the library are replaced by one of the user's.
    pub fn warn_of_shadows(&mut self, own: &[Graph], functions: &[Rc<Functions>]) {
        let mut seen: BTreeMap<&str, Span> = own.iter().map(|g| (g.name.text.as_str(), g.name.span)).collect();
        let mut warnings = Vec::new();
        for graph in functions.iter().flat_map(|f| &f.graphs) {
            if let Some(winner) = seen.get(graph.name.text.as_str()) {
                let theirs = self.sources.name(graph.name.span.source).to_string();
                warnings.push(
                    Diag::warning(format!("`{}` stands for this graph, not for that of `{theirs}`", graph.name.text))
                        .label(*winner, ""),
                );
            } else {
                seen.insert(&graph.name.text, graph.name.span);
            }
        }
        for warning in warnings {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }
}

/// What tells documents apart.
fn key(name: &Word, folder: &Path) -> String {
    if is_file(&name.text) { beside(folder, &name.text).display().to_string() } else { name.text.clone() }
}

/// `own` with the entries of `base` that it does not replace. Nothing is merged deeper.
fn extended(own: &Recipe, base: &Recipe) -> Recipe {
    fn merge<T: Clone>(own: &[T], base: &[T], name: impl Fn(&T) -> &str) -> Vec<T> {
        let replaced = |entry: &T| own.iter().find(|o| name(o) == name(entry)).unwrap_or(entry).clone();
        let mut all: Vec<T> = base.iter().map(replaced).collect();
        all.extend(own.iter().filter(|o| !base.iter().any(|b| name(b) == name(o))).cloned());
        all
    }
    fn or<T: Clone>(own: &[T], base: &[T]) -> Vec<T> {
        if own.is_empty() { base.to_vec() } else { own.to_vec() }
    }
    Recipe {
        name: own.name.clone(),
        doc: own.doc.clone(),
        extends: None,
        uses: own.uses.clone(),
        models: merge(&own.models, &base.models, |m| &m.name.text),
        judges: merge(&own.judges, &base.judges, |j| &j.name.text),
        data: merge(&own.data, &base.data, |d| &d.name.text),
        options: merge(&own.options, &base.options, |o| &o.name.text),
        defaults: merge(&own.defaults, &base.defaults, |d| &d.role.text),
        state: merge(&own.state, &base.state, |s| &s.0.text),
        graphs: merge(&own.graphs, &base.graphs, |g| &g.name.text),
        plan: own.plan.clone().or_else(|| base.plan.clone()),
        evaluate: or(&own.evaluate, &base.evaluate),
        require: or(&own.require, &base.require),
        save: own.save.clone().or_else(|| base.save.clone()),
        health: merge(&own.health, &base.health, |h| &h.metric.text),
        // Tests belong to the graphs of the file that they stand in; those of the base run when it is checked.
        tests: own.tests.clone(),
    }
}
