//! A Hugging Face folder's model by itself: what it makes of given tokens, and how it continues them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Generate, Origin, Role, Sampling, Stage, Statement};
use dsgc_ir::{DimRange, Program};

use crate::expr::Word;
use crate::lower::TokenIds;

use super::config::{self, Asked, Config};
use super::documents::{Documents, ScopedModel};
use super::graphs::{Inputs, Part, lower, with_forwards};
use super::models::folder_model;
use super::plan::forward_graph;
use super::plan::types::Entry;
use super::{Failed, Host, Places};

/// The only role of the programs here.
const ROLE: &str = "model";

/// The model of a Hugging Face folder, and the document that reads it.
pub struct FolderModel<'h> {
    documents: Documents<'h>,
    document: Rc<ScopedModel>,
    config: Config,
    name: String,
}

impl<'h> FolderModel<'h> {
    /// Reads the folder's `config.json`.
    pub fn open(folder: &Path, host: &'h dyn Host) -> Result<FolderModel<'h>, Failed> {
        let mut documents = Documents::new(host);
        let places = Places { folder: PathBuf::new(), sets: BTreeSet::new() };
        let name = folder.display().to_string();
        let found = folder_model(&mut documents, folder, None, Span::NONE, &places).and_then(|(document, json)| {
            let asked = Asked { name: &name, span: Span::NONE, folder: Some(&name) };
            let config = config::from_folder(&document.model, json, &[], &asked, &mut documents.errors)?;
            Some((document, config))
        });
        match found {
            Some((document, config)) => Ok(FolderModel { documents, document, config, name }),
            None => Err(failed(documents)),
        }
    }

    /// Longest row in tokens that the model takes, where its `config.json` says so.
    pub fn positions(&self) -> Option<usize> {
        self.config.positions()
    }

    /// The program that scores tokens.
    ///
    /// Its one graph is `score`: `tokens: i32[B, T]` and `segment: i32[B, T]` (0 on padding, 1 on text) give
    /// `logits: f32[B, T, V]` and `logp: f32[B, T - 1]`, the log-probability of each token after the first; `B` goes to
    /// `rows`, `T` to `length`. The role is `model`; nothing is trained.
    pub fn score(self, rows: usize, length: usize) -> Result<Program, Failed> {
        self.program("score", rows, length, Vec::new())
    }

    /// The program that continues one sequence of up to `length` tokens, of which up to `most` are read in one call. Its
    /// plan is one [`Generate`] of the role `model`.
    pub fn generation(self, length: usize, most: usize, sampling: Sampling) -> Result<Program, Failed> {
        let generate = Generate {
            name: "answer".into(),
            role: ROLE.into(),
            prompt: "prompt".into(),
            samples: 1,
            max_new_tokens: length.saturating_sub(most),
            sampling,
            stop: None,
            pad: 0,
            forward: forward_graph(ROLE),
            prompt_width: most,
            rows: 1,
            steps: None,
        };
        self.program(&forward_graph(ROLE), 1, length, vec![Statement::Generate(generate)])
    }

    fn program(mut self, graph: &str, rows: usize, length: usize, plan: Vec<Statement>) -> Result<Program, Failed> {
        if let Some(positions) = self.positions().filter(|p| *p < length) {
            let message = format!("found rows of {length} tokens, but `{}` has {positions} positions", self.name);
            self.documents.error(Diag::error(message));
            return Err(failed(self.documents));
        }
        let range = DimRange { symbol: "T".into(), min: 1, max: length as i64 };
        let entry = Entry { graph: graph.into(), batch: Some("B".into()), rows, ranges: vec![range] };
        let word = Word { span: Span::NONE, text: "score".into() };
        let lowered = self.documents.recipe(&word, Path::new("")).and_then(|recipe| {
            let part = Part { name: ROLE, document: &self.document, config: &self.config, trained: false, trunk: None };
            let inputs = Inputs {
                recipe: &with_forwards(&recipe, &[ROLE.to_string()]),
                values: &BTreeMap::new(),
                parts: vec![part],
                ids: TokenIds::default(),
                entries: vec![entry],
                sets: Vec::new(),
                averages: Vec::new(),
                at: None,
            };
            lower(&mut self.documents, &inputs)
        });
        let Some(lowered) = lowered.filter(|_| self.documents.errors.is_empty()) else {
            return Err(failed(self.documents));
        };
        let mut program = lowered.program;
        program.sources = self.documents.sources.names().map(String::from).collect();
        let role = Role {
            name: ROLE.into(),
            model: self.config.host,
            origin: Origin::Folder(self.name),
            init: crate::lower::init_graph(ROLE),
            trained: false,
            precision: None,
            weights: None,
            zero_stage: 0,
            gather_for_generation: true,
            offload_optimizer: false,
            offload_param: false,
            tokenizer: None,
            shared: Vec::new(),
        };
        let name = if plan.is_empty() { "score" } else { "generate" };
        program.stage =
            Stage { name: name.into(), recipe: "score".into(), roles: vec![role], plan, ..Stage::default() };
        Ok(program)
    }
}

fn failed(documents: Documents<'_>) -> Failed {
    Failed { diags: documents.errors, sources: documents.sources }
}
