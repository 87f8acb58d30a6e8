//! From the file of a pipeline to a program per stage.
//!
//! ```text
//! pipeline.yaml --sets--> tree --document--> syntax tree
//!   models   --config-->  document, config, weights, tokenizer of each model
//!   stage    --settings--> every value and where it came from
//!            --data, plan--> sources and statements
//!            --lower-->   graphs
//! ```
//!
//! Paths in a file start from the folder of that file, paths in `--set` and `output_dir` from the working directory.
//! Nothing here touches a disk: a [`Host`] does.

mod best;
mod config;
mod data;
mod declared;
mod documents;
mod folder;
mod graphs;
mod heads;
mod lone;
mod lora;
mod models;
mod parallel;
mod plan;
mod resolved;
mod roles;
mod sets;
mod settings;
mod smoke;
mod sources;
mod stage;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use dsgc_ir::Program;
use dsgc_ir::diag::{Diag, Sources, Span, nearest};
use dsgc_ir::stage::{Checkpoints, Memory};

use crate::document::{self, Document};
use crate::expr::Word;
use crate::literal::Constant;
use crate::lower::DocumentTest;
use crate::node::Node;
use crate::pipeline::{Pipeline, SETTINGS, Setting};
use crate::schema::{unknown_key, words};

use declared::shown;
use documents::{Documents, beside};
use parallel::Parallel;
use settings::Provenance;
use stage::Surroundings;

pub use folder::FolderModel;

/// The machine around a pipeline: files and Hugging Face folders.
pub trait Host {
    /// The text of a file.
    fn text(&self, path: &Path) -> io::Result<String>;
    /// The `config.json` of a folder.
    fn hf_config(&self, folder: &Path) -> Result<serde_json::Map<String, serde_json::Value>, Diag>;
    /// What is to be known of a folder's tokenizer.
    fn tokenizer(&self, folder: &Path) -> Result<TokenizerFacts, Diag>;
    /// The columns of a file of rows, as far as its first row has them.
    fn columns(&self, file: &Path) -> Result<Vec<String>, Diag>;
}

/// What is to be known of a tokenizer before anything is tokenised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFacts {
    /// Number of rows that an embedding of all tokens needs.
    pub vocab: usize,
    /// Id of the padding token.
    pub pad: Option<i32>,
    /// Id of the token that ends a text.
    pub eos: Option<i32>,
    /// Id of the token that begins a text.
    pub bos: Option<i32>,
}

/// What the command line says of a pipeline.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Arguments of `--set`: `a.b=c`.
    pub sets: Vec<String>,
    /// Only this stage; all of them otherwise.
    pub stage: Option<String>,
    /// Make the pipeline small: two steps of every stage, a few rows, small models with random weights.
    pub smoke: bool,
}

/// Where a pipeline runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// All cores of this machine.
    #[default]
    Cpu,
    /// A GPU through Vulkan.
    Wgpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The interpreter: slow, and what everything else is tested against.
    Interp,
}

/// A pipeline that may be compiled.
#[derive(Debug)]
pub struct Loaded {
    /// A program per stage, in order.
    pub stages: Vec<Program>,
    /// `compile.device`.
    pub device: Device,
    /// The files that spans point into.
    pub sources: Sources,
    /// What is probably not as meant.
    pub warnings: Vec<Diag>,
    /// The pipeline with every default filled in and each value's origin beside it; loads to the same stages.
    pub resolved: String,
    /// The tests of all documents in use; `check` runs them.
    pub tests: Vec<DocumentTest>,
}

/// What is wrong.
#[derive(Debug)]
pub struct Failed {
    /// The messages: errors, and the warnings before them.
    pub diags: Vec<Diag>,
    /// The files that they point into.
    pub sources: Sources,
}

/// From which folder a path starts.
struct Places {
    /// That of the pipeline.
    folder: PathBuf,
    /// Sources that are arguments of `--set`.
    sets: BTreeSet<u32>,
}

impl Places {
    /// The folder that a path at this place starts from.
    fn folder(&self, span: Span) -> &Path {
        if self.sets.contains(&span.source) { Path::new("") } else { &self.folder }
    }

    /// The path that a word names.
    fn path(&self, word: &Word) -> PathBuf {
        beside(self.folder(word.span), &word.text)
    }
}

/// Loads a pipeline.
pub fn load(path: &Path, options: &Options, host: &dyn Host) -> Result<Loaded, Failed> {
    let mut documents = Documents::new(host);
    let loaded = read(&mut documents, path, options).and_then(|(document, places)| match document {
        Document::Pipeline(pipeline) => self::pipeline(&mut documents, &pipeline, &places, path, options),
        other => {
            documents.error(
                Diag::error(format!("found {} in `{}`, expected a pipeline", other.kind(), path.display()))
                    .help("only pipelines run; `dsgc check` takes every kind of document"),
            );
            None
        }
    });
    finish(documents, loaded)
}

/// Checks a document of any kind. Of one that is no pipeline, nothing can be run; its tests can.
pub fn check(path: &Path, options: &Options, host: &dyn Host) -> Result<Loaded, Failed> {
    let mut documents = Documents::new(host);
    let loaded = read(&mut documents, path, options).and_then(|(document, places)| match document {
        Document::Pipeline(pipeline) => self::pipeline(&mut documents, &pipeline, &places, path, options),
        other => lone::check(&mut documents, other, places.folder),
    });
    finish(documents, loaded)
}

/// The document of a file, with what `--set` changes in it.
fn read(documents: &mut Documents<'_>, path: &Path, options: &Options) -> Option<(Document, Places)> {
    let text = documents.text(path, Span::NONE)?;
    let name = path.display().to_string();
    // The file first, so that it is the first source.
    documents.sources.add(&name, &text);
    let small = if options.smoke { smoke::sets(&text) } else { Vec::new() };
    let arguments: Vec<String> = small.into_iter().chain(options.sets.iter().cloned()).collect();
    let changes = sets::parse(&arguments, &mut documents.sources, &mut documents.errors);
    let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
    let places = Places { folder, sets: sets::sources(&changes) };
    let change = |tree: &mut Node, errors: &mut Vec<Diag>| sets::apply(changes, tree, errors);
    match document::parse_with(&mut documents.sources, &name, &text, change) {
        Ok(document) => Some((document, places)),
        Err(mut errors) => {
            documents.errors.append(&mut errors);
            None
        }
    }
}

/// `loaded` unless there is an error.
fn finish(documents: Documents<'_>, loaded: Option<Loaded>) -> Result<Loaded, Failed> {
    let Documents { sources, mut errors, warnings, .. } = documents;
    // In the order of the file, whichever step found them.
    errors.sort_by_key(|diag| diag.labels.first().map(|label| label.span));
    match loaded {
        Some(loaded) if errors.is_empty() => Ok(Loaded { sources, warnings, ..loaded }),
        _ => {
            debug_assert!(!errors.is_empty(), "nothing is loaded, and nobody says why");
            Err(Failed { diags: warnings.into_iter().chain(errors).collect(), sources })
        }
    }
}

fn pipeline(
    documents: &mut Documents<'_>,
    pipeline: &Pipeline,
    places: &Places,
    path: &Path,
    options: &Options,
) -> Option<Loaded> {
    let (device, settings) = compile(documents, pipeline);
    let models = models::known(documents, &pipeline.models, places, options.smoke);
    let (output_dir, output_from) = output_dir(documents, pipeline, path);
    let stage_names: Vec<String> = pipeline.stages.iter().map(|s| s.name.text.clone()).collect();
    if let Some(wanted) = options.stage.as_ref().filter(|wanted| !stage_names.contains(wanted)) {
        let diag = Diag::error(format!("unknown stage `{wanted}`"));
        documents.error(match nearest(wanted, stage_names.iter().map(String::as_str)) {
            Some(near) => diag.help(format!("write `{near}`")),
            None => diag.help(format!("`{}` has {}", path.display(), words(&stage_names))),
        });
    }
    for stage in &pipeline.stages {
        if let Some((model, _)) = models.iter().find(|(model, _)| model.text == stage.name.text) {
            documents.error(
                Diag::error(format!("found `{}` as the name of a model and of a stage", model.text))
                    .label(stage.name.span, "the stage")
                    .label(model.span, "the model")
                    .help("a role is bound by name to a model or to the result of a stage: rename one of them"),
            );
        }
    }
    let around = Surroundings {
        pipeline,
        places,
        models: &models,
        output_dir: &output_dir,
        stage_names: &stage_names,
        parallel: &settings.parallel,
    };
    let (mut earlier, mut prepared) = (Vec::new(), Vec::new());
    for stage in &pipeline.stages {
        if let Some(stage) = stage::prepare(documents, &around, stage, &earlier) {
            earlier.extend(stage::results(&stage, &output_dir));
            prepared.push(stage);
        }
    }
    check_defaults(documents, pipeline, places);
    assert!(
        prepared.len() == pipeline.stages.len() || !documents.errors.is_empty(),
        "bug: a stage is missing, and nobody says why"
    );
    let (mut stages, mut tests) = (Vec::new(), Vec::<DocumentTest>::new());
    for stage in prepared.iter().filter(|s| options.stage.as_ref().is_none_or(|wanted| *wanted == s.name)) {
        stages.extend(graphs::program(documents, stage, stage::host_side(stage, &output_dir, &settings)));
        for test in graphs::tests_of_recipe(documents, &stage.recipe) {
            if !tests.iter().any(|known| known.span == test.span) {
                tests.push(test);
            }
        }
    }
    best::of_stages(documents, pipeline, &mut stages, options.stage.is_some());
    if !documents.errors.is_empty() {
        return None;
    }
    let resolved = resolved::text(&documents.sources, &around, &output_from, &prepared);
    // Once all documents are read: every stage may point into each of them.
    for program in &mut stages {
        program.sources = documents.sources.names().map(String::from).collect();
        program.mesh = settings.parallel.mesh;
    }
    Some(Loaded { stages, device, resolved, tests, sources: Sources::default(), warnings: Vec::new() })
}

/// Settings of all stages that stand beside them in the pipeline.
struct HostSettings {
    memory: Memory,
    checkpoints: Checkpoints,
    parallel: Parallel,
}

/// `compile:`, as far as this version has it, and what stands beside the stages.
fn compile(documents: &mut Documents<'_>, pipeline: &Pipeline) -> (Device, HostSettings) {
    let (mut device, mut memory, mut checkpoints) = (Device::Cpu, Memory::default(), Checkpoints::default());
    for Setting { key, value } in pipeline.compile.iter().chain(&pipeline.settings) {
        let given = settings::literal(value).value;
        match (key.text.as_str(), &given) {
            ("device", Constant::Str(name)) if name == "cpu" => device = Device::Cpu,
            ("device", Constant::Str(name)) if name == "wgpu" => device = Device::Wgpu,
            ("device", Constant::Str(name)) if name == "cuda" => device = Device::Cuda,
            ("device", Constant::Str(name)) if name == "interp" => device = Device::Interp,
            ("devices" | "zero_stage" | "parallel" | "metric_for_best_model" | "greater_is_better", _) => {}
            ("gradient_checkpointing", Constant::Bool(on)) => {
                (memory.gradient_checkpointing, memory.keep_all) = (*on, !*on);
            }
            // A word in quotes, or `auto`.
            ("gradient_checkpointing", Constant::Str(word)) => {
                (memory.gradient_checkpointing, memory.keep_all) = (word == "true", word == "false");
            }
            ("offload_activations", Constant::Bool(on)) => memory.offload_activations = *on,
            ("memory", Constant::None) => memory.max = None,
            ("memory", given) => match settings::bytes(given) {
                Some(bytes) => (memory.max, memory.span) = (Some(bytes), value.span),
                None => {
                    let diag = Diag::error(format!("found {} as `memory`, expected a size", shown(given)));
                    documents.error(diag.label(value.span, "").help("write a number and its unit, such as `2GiB`"));
                }
            },
            ("save_steps" | "save_total_limit", Constant::None) => {}
            ("save_steps", Constant::Int(every @ 1..)) => checkpoints.every = Some(*every as u64),
            ("save_total_limit", Constant::Int(keep @ 1..)) => checkpoints.keep = Some(*keep as u64),
            ("save_steps" | "save_total_limit", given) => {
                let message = format!("found {} as `{}`, expected at least 1", shown(given), key.text);
                documents.error(Diag::error(message).label(value.span, "").help("`none` turns it off"));
            }
            (name, given) => {
                let what = shown(given).replace('`', "");
                documents
                    .error(Diag::error(format!("`{name}: {what}` is not part of this version")).label(value.span, ""));
            }
        }
    }
    checkpoints.best = best::read(documents, &pipeline.settings);
    let parallel = parallel::read(documents, &pipeline.compile);
    (device, HostSettings { memory, checkpoints, parallel })
}

/// `output_dir`, by default named after the file.
fn output_dir(documents: &mut Documents<'_>, pipeline: &Pipeline, path: &Path) -> (String, Provenance) {
    match &pipeline.output_dir {
        Some(word) if word.text.is_empty() => {
            documents.error(Diag::error("found an empty `output_dir`, expected a folder").label(word.span, ""));
            (String::new(), Provenance::Default)
        }
        Some(word) => (word.text.trim_end_matches('/').to_string(), Provenance::Given(word.span)),
        None => {
            let stem = path.file_stem().map_or("pipeline".into(), |stem| stem.to_string_lossy());
            (format!("runs/{stem}"), Provenance::Default)
        }
    }
}

/// Every key of `defaults` is a setting of all stages, or an option of the recipe of one.
fn check_defaults(documents: &mut Documents<'_>, pipeline: &Pipeline, places: &Places) {
    let recipes: Vec<_> = pipeline
        .stages
        .iter()
        .filter_map(|s| documents.recipe(s.recipe.as_ref().unwrap_or(&s.name), places.folder(s.name.span)))
        .collect();
    for setting in &pipeline.defaults {
        let name = setting.key.text.as_str();
        let options = || recipes.iter().flat_map(|r| &r.recipe.options).map(|o| o.name.text.as_str());
        if crate::pipeline::setting(name).is_none() && !options().any(|o| o == name) {
            let tables = SETTINGS.into_iter().flat_map(|table| table.keys.iter().map(|k| k.name));
            documents.errors.push(unknown_key(&setting.key, "`defaults`", options().chain(tables)));
        }
    }
}
