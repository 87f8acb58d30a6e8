//! A folder's model under the recipe `score`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Origin, Role, Stage};
use dsgc_ir::{DimRange, Program};

use crate::expr::Word;
use crate::lower::TokenIds;

use super::config::{self, Asked};
use super::documents::Documents;
use super::graphs::{Inputs, Part, lower};
use super::models::folder_model;
use super::plan::types::Entry;
use super::{Failed, Host, Places};

/// The program that scores tokens with the model of a Hugging Face folder.
///
/// Its one graph is `score`: `tokens: i32[B, T]` and `segment: i32[B, T]` (0 on padding, 1 on text) give
/// `logits: f32[B, T, V]` and `logp: f32[B, T - 1]`, the log-probability of each token after the first; `B` goes to
/// `rows`, `T` to `length`. The role is `model`; nothing is trained.
pub fn score(folder: &Path, rows: usize, length: usize, host: &dyn Host) -> Result<Program, Failed> {
    let mut documents = Documents::new(host);
    match program(&mut documents, folder, rows, length) {
        Some(program) if documents.errors.is_empty() => Ok(program),
        _ => Err(Failed { diags: documents.errors, sources: documents.sources }),
    }
}

fn program(documents: &mut Documents<'_>, folder: &Path, rows: usize, length: usize) -> Option<Program> {
    let places = Places { folder: PathBuf::new(), sets: BTreeSet::new() };
    let (document, json) = folder_model(documents, folder, None, Span::NONE, &places)?;
    let name = folder.display().to_string();
    let asked = Asked { name: &name, span: Span::NONE, folder: Some(&name) };
    let config = config::from_folder(&document.model, json, &[], &asked, &mut documents.errors)?;
    if let Some(positions) = config.positions().filter(|p| *p < length) {
        documents.error(Diag::error(format!("found rows of {length} tokens, but `{name}` has {positions} positions")));
        return None;
    }
    let recipe = documents.recipe(&Word { span: Span::NONE, text: "score".into() }, Path::new(""))?;
    let range = DimRange { symbol: "T".into(), min: 1, max: length as i64 };
    let entry = Entry { graph: "score".into(), batch: Some("B".into()), rows, ranges: vec![range] };
    let inputs = Inputs {
        recipe: &recipe,
        values: &BTreeMap::new(),
        parts: vec![Part { name: "model", document: &document, config: &config, trained: false, trunk: None }],
        ids: TokenIds::default(),
        entries: vec![entry],
        sets: Vec::new(),
        averages: Vec::new(),
        at: None,
    };
    let mut program = lower(documents, &inputs)?.program;
    program.sources = documents.sources.names().map(String::from).collect();
    let role = Role {
        name: "model".into(),
        model: config.host,
        origin: Origin::Folder(name),
        init: crate::lower::init_graph("model"),
        trained: false,
        tokenizer: None,
        shared: Vec::new(),
    };
    program.stage = Stage { name: "score".into(), recipe: "score".into(), roles: vec![role], ..Stage::default() };
    Some(program)
}
