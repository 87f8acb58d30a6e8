//! The models of a pipeline: which document, which config, which weights, which tokenizer.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span};

use crate::expr::Word;
use crate::literal::Literal;
use crate::pipeline::ModelSource;

use super::config::{self, Asked, Config};
use super::declared::typed;
use super::documents::{Documents, ScopedModel, is_file};
use super::heads::Trunk;
use super::settings::literal;
use super::smoke;
use super::{Host, Places, TokenizerFacts};

/// Where a model's weights are.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Weights {
    /// Nowhere yet.
    Random,
    /// Nowhere: the folder's do not fit the small model in its place.
    Small,
    /// In this folder.
    Folder(String),
    /// In this folder, once an earlier stage has written it.
    Stage(String),
}

/// A tokenizer that was found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FoundTokenizer {
    pub folder: String,
    pub facts: TokenizerFacts,
}

/// A model that roles can be bound to.
#[derive(Clone)]
pub(super) struct Known {
    pub document: Rc<ScopedModel>,
    pub config: Config,
    /// The model that it is built upon.
    pub trunk: Option<Trunk>,
    pub weights: Weights,
    /// Whether the folder of its weights is that of an adapter, or has one beside them.
    pub adapter: bool,
    /// What is wrong with the tokenizer, if there is none: said only where one is needed.
    pub tokenizer: Result<FoundTokenizer, Diag>,
}

/// The models of a pipeline in its order; those that are wrong have been reported and are `None`.
pub(super) fn known(
    documents: &mut Documents<'_>,
    sources: &[ModelSource],
    places: &Places,
    smoke: bool,
) -> Vec<(Word, Option<Known>)> {
    sources.iter().map(|source| (source.name.clone(), one(documents, source, places, smoke))).collect()
}

fn one(documents: &mut Documents<'_>, source: &ModelSource, places: &Places, smoke: bool) -> Option<Known> {
    let given: Vec<(Word, Literal)> =
        source.config.iter().map(|s| (crate::model::word(&s.key), literal(&s.value))).collect();
    let folder = match &source.path {
        Some(path) => Some((path.span, local(documents, path, places)?)),
        None => None,
    };
    let tokenizer_folder = match &source.tokenizer {
        Some(path) => Some(local(documents, path, places)?),
        None => folder.as_ref().map(|f| f.1.clone()),
    };
    let tokenizer = match &tokenizer_folder {
        Some(folder) => documents
            .host
            .tokenizer(folder)
            .map(|facts| FoundTokenizer { folder: folder.display().to_string(), facts })
            .map_err(|diag| {
                let at = source.tokenizer.as_ref().or(source.path.as_ref()).map_or(Span::NONE, |p| p.span);
                diag.label(at, "")
            }),
        None => Err(Diag::error(format!("model `{}` has no tokenizer", source.name.text))
            .label(source.name.span, "")
            .help("write `tokenizer: FOLDER`, the folder of a `tokenizer.json`")),
    };
    // A tokenizer that was asked for must be there; that of a model's folder only if something is tokenised.
    if let (Some(_), Err(diag)) = (&source.tokenizer, &tokenizer) {
        documents.error(diag.clone());
        return None;
    }
    let (document, config, weights) = match folder {
        Some((span, folder)) => {
            let name = folder.display().to_string();
            let asked = Asked { name: &source.name.text, span, folder: Some(&name) };
            let (document, json) = folder_model(documents, &folder, source.model.as_ref(), span, places)?;
            check_names(documents, &document, &given)?;
            let small = if smoke { smoke::small(documents, &document.model, &given) } else { None };
            let weights = if small.is_some() { Weights::Small } else { Weights::Folder(name.clone()) };
            let given = small.unwrap_or(given);
            let config = config::from_folder(&document.model, json, &given, &asked, &mut documents.errors)?;
            (document, config, weights)
        }
        None => {
            let name = source.model.as_ref()?;
            let document = documents.model(name, places.folder(name.span))?;
            check_names(documents, &document, &given)?;
            let small = if smoke { smoke::small(documents, &document.model, &given) } else { None };
            let given = small.unwrap_or(given);
            let asked = Asked { name: &source.name.text, span: source.name.span, folder: None };
            let facts = tokenizer.as_ref().ok().map(|t| &t.facts);
            let config = config::from_scratch(&document.model, &given, facts, &asked, &mut documents.errors)?;
            (document, config, Weights::Random)
        }
    };
    if let Ok(found) = &tokenizer
        && let Some(rows) = config.vocabulary()
        && found.facts.vocab > rows
    {
        let at = source.tokenizer.as_ref().map_or(source.name.span, |t| t.span);
        documents.error(
            Diag::error(format!("the tokenizer has {} tokens, the model only {rows}", found.facts.vocab))
                .label(at, format!("`{}`", found.folder))
                .help(format!("a `vocab` of {} or more, or another tokenizer", found.facts.vocab)),
        );
        return None;
    }
    let has = |host: &dyn Host, file: &str| match &weights {
        Weights::Folder(folder) => host.text(&Path::new(folder).join(file)).is_ok(),
        _ => false,
    };
    let adapter = ["adapter_config.json", "adapter/adapter_config.json"].iter().any(|file| has(documents.host, file));
    Some(Known { document, config, trunk: None, weights, adapter, tokenizer })
}

type Json = serde_json::Map<String, serde_json::Value>;

/// The document that reads a folder, and the folder's config.json.
pub(super) fn folder_model(
    documents: &mut Documents<'_>,
    folder: &Path,
    named: Option<&Word>,
    span: Span,
    places: &Places,
) -> Option<(Rc<ScopedModel>, Json)> {
    let json = match documents.host.hf_config(folder) {
        Ok(json) => json,
        Err(diag) => {
            documents.error(diag.label(span, ""));
            return None;
        }
    };
    if let Some(name) = named {
        return Some((documents.model(name, places.folder(name.span))?, json));
    }
    let architectures = json.get("architectures").and_then(|a| a.as_array());
    let architecture = architectures.and_then(|a| a.first()).and_then(|a| a.as_str());
    let Some(architecture) = architecture else {
        documents.error(
            Diag::error(format!("found no `architectures` in `{}/config.json`", folder.display()))
                .label(span, "")
                .help("name the model: `{path: FOLDER, model: opt}`"),
        );
        return None;
    };
    let Some(document) = documents.model_of_architecture(architecture) else {
        documents.error(
            Diag::error(format!("no model of the library reads the architecture `{architecture}`"))
                .label(span, "")
                .help("name a model document: `{path: FOLDER, model: ./my_model.yaml}`")
                .help("`dsgc std list` prints the library"),
        );
        return None;
    };
    Some((document, json))
}

/// The folder that a path names; downloads are nobody's business here.
fn local(documents: &mut Documents<'_>, path: &Word, places: &Places) -> Option<PathBuf> {
    let Some(repository) = path.text.strip_prefix("hf://") else {
        return Some(places.path(path));
    };
    let (repository, revision) = repository.split_once('@').unwrap_or((repository, ""));
    let revision = if revision.is_empty() { String::new() } else { format!(" --revision {revision}") };
    documents.error(
        Diag::error(format!("found `{}`, expected a local folder; this version downloads nothing", path.text))
            .label(path.span, "")
            .help(format!(
                "download it with `huggingface-cli download {repository}{revision} --local-dir FOLDER`, and name FOLDER"
            )),
    );
    None
}

/// That every given config entry is one of the model's.
fn check_names(documents: &mut Documents<'_>, document: &ScopedModel, given: &[(Word, Literal)]) -> Option<()> {
    let declared = &document.model.config;
    let mut good = Some(());
    for (name, _) in given.iter().filter(|(name, _)| !declared.iter().any(|d| d.name.text == name.text)) {
        let what = format!("the config of model `{}`", document.model.name.text);
        // A key of config.json in place of ours.
        let ours = document.model.from_hf.as_ref().and_then(|rules| rules.entry_read_from(&name.text));
        let diag = Diag::error(format!("unknown key `{}` in {what}", name.text)).label(name.span, "");
        let known: Vec<&str> = declared.iter().map(|d| d.name.text.as_str()).collect();
        let near = dsgc_ir::diag::nearest(&name.text, known.iter().copied());
        documents.error(match (ours, near) {
            (Some(ours), _) => diag.help(format!("`{}` is Hugging Face's name: here it is `{ours}`", name.text)),
            (None, Some(near)) => diag.help(format!("write `{near}`")),
            (None, None) => diag.help(format!("its keys are {}", crate::schema::words(&known))),
        });
        good = None;
    }
    // Beside an unknown name the values of the others are checked too; otherwise they are where they are used.
    for (name, literal) in given.iter().filter(|_| good.is_none()) {
        if let Some(declared) = declared.iter().find(|d| d.name.text == name.text)
            && let Err(diag) = typed(declared, literal)
        {
            documents.error(diag);
        }
    }
    good
}

/// Whether a model of a pipeline is named by a library name, for messages.
pub(super) fn looks_like_path(name: &str) -> bool {
    is_file(name) || name.starts_with("hf:")
}
