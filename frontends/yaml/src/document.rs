//! Documents of the four kinds: their first key says which.

use dsgc_ir::diag::{Diag, Sources};

use crate::functions::{self, FUNCTIONS, Functions};
use crate::model::{self, MODEL, Model};
use crate::node::{self, Node, Value};
use crate::pipeline::{self, PIPELINE, Pipeline};
use crate::reader::Reader;
use crate::recipe::{self, RECIPE, Recipe};
use crate::schema::Table;

/// A document as a syntax tree.
#[derive(Clone, Debug)]
pub enum Document {
    /// An architecture.
    Model(Box<Model>),
    /// A training algorithm.
    Recipe(Box<Recipe>),
    /// Shared graphs.
    Functions(Functions),
    /// What a user runs.
    Pipeline(Box<Pipeline>),
}

impl Document {
    /// What it is, for messages: `a model`.
    pub fn kind(&self) -> &'static str {
        match self {
            Document::Model(_) => "a model",
            Document::Recipe(_) => "a recipe",
            Document::Functions(_) => "functions",
            Document::Pipeline(_) => "a pipeline",
        }
    }
}

/// The kinds of documents: their first key, and the table of all keys.
pub const KINDS: [(&str, &Table); 4] =
    [("model", &MODEL), ("recipe", &RECIPE), ("functions", &FUNCTIONS), ("dsgc", &PIPELINE)];

/// Reads a document. `name` is what messages call the file; all errors of the file come at once.
pub fn parse(sources: &mut Sources, name: &str, text: &str) -> Result<Document, Vec<Diag>> {
    parse_with(sources, name, text, |_, _| {})
}

/// [`parse`], with a change to the tree before anything is read from it: what `--set` puts in is checked as if it stood
/// in the file.
pub(crate) fn parse_with(
    sources: &mut Sources,
    name: &str,
    text: &str,
    change: impl FnOnce(&mut Node, &mut Vec<Diag>),
) -> Result<Document, Vec<Diag>> {
    let source = sources.add(name, text);
    let mut reader = Reader::default();
    let tree = node::parse(source, text, &mut reader.errors);
    let document = tree.and_then(|mut node| {
        change(&mut node, &mut reader.errors);
        read(&mut reader, &node)
    });
    match document {
        Some(document) if reader.errors.is_empty() => Ok(document),
        _ => {
            // In the order of the file, whichever step found them.
            reader.errors.sort_by_key(|d| d.labels.first().map(|l| l.span));
            Err(reader.errors)
        }
    }
}

fn read(reader: &mut Reader, node: &Node) -> Option<Document> {
    let Value::Map(entries) = &node.value else {
        reader.wrong(node, "a mapping that begins with `dsgc: 1`, `model:`, `recipe:` or `functions:`");
        return None;
    };
    let first = entries.first().map_or("", |(key, _)| key.text.as_str());
    match first {
        "model" => model::read(reader, node).map(|d| Document::Model(Box::new(d))),
        "recipe" => recipe::read(reader, node).map(|d| Document::Recipe(Box::new(d))),
        "functions" => functions::read(reader, node).map(Document::Functions),
        _ => {
            let ours = entries.iter().any(|(key, _)| key.text == "dsgc" || key.text == "stages");
            let late = entries.iter().find(|(key, _)| ["model", "recipe", "functions"].contains(&key.text.as_str()));
            if let (Some((key, _)), false) = (late, ours) {
                reader.error(
                    Diag::error(format!("found `{}` after other keys, expected it first", key.text))
                        .label(key.span, "")
                        .help("the first key says what kind of document it is"),
                );
                return None;
            }
            let known = PIPELINE.find(first).is_some() || crate::foreign::find(first).is_some();
            if let (Some((key, _)), false, false) = (entries.first(), ours, known) {
                reader.error(
                    Diag::error(format!("found `{first}` as the first key, which begins no kind of document"))
                        .label(key.span, "")
                        .help("begin with `dsgc: 1`, `model: <name>`, `recipe: <name>` or `functions: <name>`"),
                );
                return None;
            }
            pipeline::read(reader, node).map(|d| Document::Pipeline(Box::new(d)))
        }
    }
}
