//! A pipeline made small enough to be tried: two steps of every stage, a few rows, models of the sizes that their
//! documents call `small`, with random weights.

use dsgc_ir::diag::Diag;

use crate::expr::Word;
use crate::literal::Literal;
use crate::model::Model;
use crate::node::{self, Node, Value};

use super::documents::Documents;

/// Settings of every stage: two steps, however few rows are left, on a batch of several micro-batches.
const STAGE: [&str; 5] = ["max_steps=2", "num_epochs=2", "logging_steps=1", "batch_size=4", "micro_batch_size=2"];
/// Rows that are read of every file.
const ROWS: &str = "max_rows=32";

/// What `--set` would have to say to make a pipeline small.
pub(super) fn sets(pipeline: &str) -> Vec<String> {
    // What is wrong with the file is told when it is read.
    let Some(tree) = node::parse(0, pipeline, &mut Vec::new()) else { return Vec::new() };
    let stages = names(&tree, "stages").flat_map(|name| STAGE.map(|set| format!("stages.{name}.{set}")));
    let data = names(&tree, "data").map(|name| format!("data.{name}.{ROWS}"));
    stages.chain(data).collect()
}

/// Names under a key, of those entries that are mappings.
fn names<'t>(tree: &'t Node, key: &str) -> impl Iterator<Item = &'t str> {
    let entries = |node: &'t Node| match &node.value {
        Value::Map(entries) => entries.as_slice(),
        _ => &[],
    };
    let found = entries(tree).iter().find(|(k, _)| k.text == key).map_or(&[][..], |(_, node)| entries(node));
    found.iter().filter(|(_, node)| matches!(node.value, Value::Map(_))).map(|(name, _)| name.text.as_str())
}

/// The config of a model that is tried: its document's small sizes before what is given. `None` where the document has
/// none: then the model is tried whole.
pub(super) fn small(
    documents: &mut Documents<'_>,
    model: &Model,
    given: &[(Word, Literal)],
) -> Option<Vec<(Word, Literal)>> {
    if model.small.is_empty() {
        let message = format!("model `{}` is tried whole: it names no `small` sizes", model.name.text);
        documents.warnings.push(Diag::warning(message).label(model.name.span, ""));
        return None;
    }
    let others = given.iter().filter(|(name, _)| !model.small.iter().any(|(small, _)| small.text == name.text));
    Some(model.small.iter().chain(others).cloned().collect())
}
