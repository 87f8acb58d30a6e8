//! `--set a.b=c`: changes to a pipeline from the command line.
//!
//! Each change goes into the tree of the file before anything is read from it, so that it is checked like any other
//! line; its places point into the argument.

use std::collections::BTreeSet;

use dsgc_ir::diag::{Diag, Sources, Span};

use crate::node::{self, Node, Value};
use crate::pipeline::PIPELINE;
use crate::text::{Style, Text};

/// What messages call an argument of `--set`.
pub(super) const SOURCE: &str = "--set";

/// A change, and the place that it is for.
pub(super) struct Change {
    path: Vec<Text>,
    value: Node,
}

/// Reads the arguments.
pub(super) fn parse(arguments: &[String], sources: &mut Sources, errors: &mut Vec<Diag>) -> Vec<Change> {
    arguments.iter().filter_map(|argument| one(argument, sources, errors)).collect()
}

fn one(argument: &str, sources: &mut Sources, errors: &mut Vec<Diag>) -> Option<Change> {
    let source = sources.add(SOURCE, argument);
    let place = |column: usize, len: usize| Span { source, line: 1, column: column as u32, len: len.max(1) as u32 };
    let form = "write `--set stages.sft.learning_rate=1e-4`, or shorter `--set sft.learning_rate=1e-4`";
    let mut wrong = |message: String, span: Span| errors.push(Diag::error(message).label(span, "").help(form));
    let Some((keys, value)) = argument.split_once('=') else {
        wrong(format!("found `{argument}`, expected `key=value`"), place(1, argument.chars().count()));
        return None;
    };
    let (mut path, mut column) = (Vec::new(), 1);
    for key in keys.split('.') {
        let len = key.chars().count();
        if key.is_empty() || key.contains(char::is_whitespace) {
            let found = if key.is_empty() { "an empty key".into() } else { format!("`{key}`") };
            wrong(format!("found {found} in `{keys}`, expected keys with dots between them"), place(column, len));
            return None;
        }
        path.push(Text::new(key.into(), key, place(column, len), Style::Plain, false));
        column += len + 1;
    }
    if value.trim().is_empty() {
        wrong(format!("found no value for `{keys}`"), place(column, 1));
        return None;
    }
    // The keys as spaces, so that every place in the value is one in the argument.
    let padded = " ".repeat(keys.chars().count() + 1) + value;
    node::parse(source, &padded, errors).map(|value| Change { path, value })
}

/// The sources of the arguments.
pub(super) fn sources(changes: &[Change]) -> BTreeSet<u32> {
    changes.iter().flat_map(|change| change.path.first()).map(|key| key.span.source).collect()
}

/// Makes the changes to a pipeline's tree.
pub(super) fn apply(changes: Vec<Change>, tree: &mut Node, errors: &mut Vec<Diag>) {
    for Change { path, value } in changes {
        if let Err(diag) = insert(tree, &within(tree, path), value) {
            errors.push(diag);
        }
    }
}

/// The path from the top; `stages.` may be left out before a stage's name.
fn within(tree: &Node, path: Vec<Text>) -> Vec<Text> {
    let is_stage = |name: &str| get(tree, "stages").is_some_and(|stages| get(stages, name).is_some());
    match path.first() {
        Some(first) if PIPELINE.find(&first.text).is_none() && is_stage(&first.text) => {
            let stages = Text::new("stages".into(), "stages", first.span, Style::Plain, false);
            [vec![stages], path].concat()
        }
        _ => path,
    }
}

fn get<'n>(node: &'n Node, key: &str) -> Option<&'n Node> {
    match &node.value {
        Value::Map(entries) => entries.iter().find(|(k, _)| k.text == key).map(|(_, v)| v),
        _ => None,
    }
}

fn insert(node: &mut Node, path: &[Text], value: Node) -> Result<(), Diag> {
    let Some((key, rest)) = path.split_first() else {
        *node = value;
        return Ok(());
    };
    let found = node.describe();
    let Value::Map(entries) = &mut node.value else {
        return Err(Diag::error(format!("found {found} where `{}` should be set, expected a mapping", key.text))
            .label(key.span, "")
            .label(node.span, "what it would be set in"));
    };
    let at = entries.iter().position(|(k, _)| k.text == key.text).unwrap_or_else(|| {
        let empty = Node { span: key.span, flow: false, value: Value::Map(Vec::new()) };
        entries.push((key.clone(), empty));
        entries.len() - 1
    });
    let (entry, child) = &mut entries[at];
    if rest.is_empty() {
        *entry = key.clone();
    }
    insert(child, rest, value)
}
