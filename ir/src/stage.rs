//! The host side of a program: which models play which role, what is read from where, what is trained how, and
//! the plan that says in which order graphs are called.
//!
//! A [`crate::Program`] is what one stage of a pipeline runs; this is the part of it that stays on the host. In the
//! text form it stands as one block of JSON, so that every setting a run depends on is printed with the graphs.

mod plan;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::diag::Span;
use crate::schedule::PipelineOrder;
use crate::types::DType;

pub use plan::*;

/// One stage of a pipeline.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stage {
    /// The stage's name in the pipeline, e.g. `sft`.
    pub name: String,
    /// The recipe it follows.
    pub recipe: String,
    /// Seed of everything random in the stage.
    pub seed: u64,
    /// Folder for this stage's results: `<output_dir>/<stage>`.
    pub output_dir: String,
    /// Models by role.
    pub roles: Vec<Role>,
    /// Data by name.
    pub sources: Vec<Source>,
    /// One per trained role.
    pub trainings: Vec<Training>,
    /// Passes over the outermost source; may be a fraction.
    pub num_epochs: f64,
    /// Optimizer steps after which the stage ends, whatever the epochs say.
    pub max_steps: Option<u64>,
    /// Evaluate every so many optimizer steps, besides before and after.
    pub eval_steps: Option<u64>,
    /// Print a line every so many optimizer steps.
    pub logging_steps: u64,
    /// What is called in which order.
    pub plan: Vec<Statement>,
    /// What is called on held-out data, before, every `eval_steps` and after.
    pub evaluate: Vec<Evaluate>,
    /// The graph that gives the recipe's states their first values.
    pub init: Option<String>,
    /// What graphs demand of their inputs.
    pub asserts: Vec<Assert>,
    /// What the last evaluation must reach, or the stage fails.
    pub require: Vec<Bounds>,
    /// Ranges of metrics outside of which the user is warned.
    pub health: Vec<Bounds>,
    /// Roles whose models are written to `output_dir` at the end.
    pub save: Vec<String>,
    /// What rows of sequences have in common, for graphs that compute it once; filled in by the pass `share_prefix`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<Prefix>,
    /// Graphs that ranks with different layers run piece by piece, by their names; filled in by the pass `split_stages`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pieces: BTreeMap<String, Vec<Piece>>,
    /// What may be computed twice to need less memory.
    #[serde(skip_serializing_if = "Memory::is_default")]
    pub memory: Memory,
    /// What the user says of the ranks that run the stage.
    #[serde(skip_serializing_if = "Parallel::is_default")]
    pub parallel: Parallel,
    /// When the stage writes down where it stands.
    #[serde(skip_serializing_if = "Checkpoints::is_default")]
    pub checkpoints: Checkpoints,
    /// Whether roles in fp16 whose updates follow each other step together: where the gradients of one overflow, no role
    /// takes its step.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub align_overflow: bool,
}

/// The columns with which some sequences of a batch begin alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prefix {
    /// The sequences, inputs `<name>.tokens` and `<name>.segment` of one shape `[N, T]`.
    pub sequences: Vec<String>,
    /// Rows that stand together and begin alike: the answers to a prompt. 1 where it is the sequences that do, row by row.
    #[serde(skip_serializing_if = "is_one", default = "one")]
    pub samples: usize,
    /// A graph's input `i32[S]` that says how many columns follow, `0 < S <= T`: in every row of the call, or in all rows of
    /// a group, the first `T - S` columns of these sequences are equal. What stands in it does not matter.
    pub input: String,
}

fn yes() -> bool {
    true
}

fn is_yes(on: &bool) -> bool {
    *on
}

fn one() -> usize {
    1
}

fn is_zero(stage: &u8) -> bool {
    *stage == 0
}

fn is_false(given: &bool) -> bool {
    !given
}

fn is_true(given: &bool) -> bool {
    *given
}

fn is_one(samples: &usize) -> bool {
    *samples == 1
}

/// When a stage writes down where it stands, so that it can go on from there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoints {
    /// After every so many optimizer steps.
    pub every: Option<u64>,
    /// How many are kept, the newest ones; all where nothing is said.
    pub keep: Option<u64>,
    /// By what one more is kept: the best one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// Which checkpoint is the best one: the first whose last evaluation has the best number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// The metric.
    pub metric: String,
    /// Whether greater numbers are better.
    pub greater: bool,
}

impl Checkpoints {
    /// Whether nothing is asked for.
    fn is_default(&self) -> bool {
        *self == Checkpoints::default()
    }
}

/// What the user says of the ranks that run a stage, beside how many there are ([`crate::Mesh`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Parallel {
    /// Where it stands how many share every layer.
    pub tensor: Span,
    /// Where it stands how many share the layers out.
    pub pipeline: Span,
    /// The order in which ranks with different layers work on the parts of a batch.
    #[serde(skip_serializing_if = "PipelineOrder::is_default")]
    pub order: PipelineOrder,
    /// How many runs of layers each of those ranks has, at least 1.
    #[serde(skip_serializing_if = "is_one")]
    pub virtual_stages: usize,
    /// Whether what ranks send may go beside what they compute.
    #[serde(skip_serializing_if = "is_true")]
    pub overlap_comm: bool,
}

impl Default for Parallel {
    fn default() -> Parallel {
        Parallel {
            tensor: Span::NONE,
            pipeline: Span::NONE,
            order: PipelineOrder::default(),
            virtual_stages: 1,
            overlap_comm: true,
        }
    }
}

impl Parallel {
    /// Whether nothing is said.
    fn is_default(&self) -> bool {
        *self == Parallel::default()
    }
}

/// How much memory a stage may take, and what it may compute twice to need no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Keep as little of every layer as there can be, and recompute the rest for its gradient.
    pub gradient_checkpointing: bool,
    /// Recompute nothing that costs time, also where the memory is limited.
    #[serde(skip_serializing_if = "is_false")]
    pub keep_all: bool,
    /// Keep what layers keep for their gradients in the host's memory.
    #[serde(skip_serializing_if = "is_false")]
    pub offload_activations: bool,
    /// Most bytes of the arena; as much is recomputed as that takes, and no more.
    pub max: Option<usize>,
    /// Where the user asks for the limit.
    pub span: Span,
}

impl Memory {
    /// Whether nothing is asked for.
    fn is_default(&self) -> bool {
        *self == Memory::default()
    }
}

/// A model in the part it plays in a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Role {
    /// Name of the role; its parameters are `@<role>/<Hugging Face name>`.
    pub name: String,
    /// What model it is.
    pub model: Model,
    /// Where its weights come from.
    pub origin: Origin,
    /// The graph that writes initial values to every parameter of the role; its only input is a random key. It runs
    /// where the origin is random, and where a folder lacks parameters of [`TensorRules::may_be_new`].
    pub init: String,
    /// Whether an update trains it.
    pub trained: bool,
    /// The narrow float in which it computes, if it does not compute in f32; the pass `precision` says what that means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<DType>,
    /// What the weights of its layers are kept in, if not in f32; the pass `quantize` says what that means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<DType>,
    /// What ranks with different rows share out of it (ZeRO): 0 nothing, 1 the optimizer's moments, 2 gradients too, 3 parameters too.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub zero_stage: u8,
    /// Whether parameters in parts are gathered once for a generation, where there is memory for it, and not in every call.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub gather_for_generation: bool,
    /// Whether its optimizer's moments, and parameters that only the optimizer reads, are at home in the host's memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offload_optimizer: bool,
    /// Whether its parameters and their copies are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offload_param: bool,
    /// Folder with its `tokenizer.json`, as the user gave it.
    pub tokenizer: Option<String>,
    /// Parameters of a snapshot that are those of the role it is taken of, by their Hugging Face names: nothing changes
    /// them. Filled in by the pass `adapt`.
    #[serde(default)]
    pub shared: Vec<String>,
}

/// Where weights come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The role's graph `init`.
    Random,
    /// A Hugging Face folder.
    Folder(String),
    /// The result of an earlier stage of the same pipeline: `<output_dir>/<stage>` or a folder in it.
    Stage(String),
    /// What the parameters of this role are when the stage begins.
    Snapshot(String),
}

/// What is known of a model beyond its graph: enough to read and write it as a Hugging Face folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Name of the model document, e.g. `opt`.
    pub family: String,
    /// The `config.json` to write beside the weights.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// How tensor names and layouts in files differ from ours.
    pub tensors: TensorRules,
    /// Keys of the `config.json` that was read which the model document does not use; kept and listed.
    pub unused: Vec<String>,
}

/// How the tensors of a Hugging Face file map to parameters. Patterns are globs where `*` is any run of characters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TensorRules {
    /// Prefixes that a file may put before every name; tried in order, the empty one matches as is.
    pub strip_prefixes: Vec<String>,
    /// A prefix to put before every name when `config.json` says this architecture.
    pub add_prefix: BTreeMap<String, String>,
    /// Parameters stored transposed in files.
    pub transpose: Vec<String>,
    /// Tensors of files that are not read and not written.
    pub skip: Vec<String>,
    /// File tensor -> parameter that it repeats (a tied head): may be absent, must be equal, is not written.
    pub may_repeat: BTreeMap<String, String>,
    /// Parameter -> further names under which files may have it; read only.
    pub also_called: BTreeMap<String, Vec<String>>,
    /// Parameters that files may lack, such as the head of a reward model; they begin as `init` says, and the user is
    /// told.
    pub may_be_new: Vec<String>,
    /// Tensors that files may have and the model does not, such as the head of a language model under another one.
    pub may_be_left: Vec<String>,
}

/// A set of rows, and how they become tensors.
///
/// Each sequence `s` of source `d` gives a batch the tensors `s.tokens: i32[B, T]`, `s.segment: i32[B, T]` (1 where
/// there is text, 0 on padding) and `s.trained: bool[B, T]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Source {
    /// Name in the recipe, e.g. `text` or `pairs`.
    pub name: String,
    /// File of rows, `.jsonl` or a `.json` list, relative to where `dsgc` runs.
    pub path: String,
    /// Where the user named it, for messages.
    pub span: Span,
    /// Held-out rows.
    pub eval: Option<Held>,
    /// Only so many rows of each file, from its beginning.
    pub max_rows: Option<usize>,
    /// Field -> column of the file.
    pub fields: BTreeMap<String, String>,
    /// The sequences that a row is made into, in order.
    pub sequences: Vec<Sequence>,
    /// Folder whose `tokenizer.json` is used.
    pub tokenizer: String,
    /// Side of the padding.
    pub pad: Side,
    /// The padding's token id.
    pub pad_id: i32,
    /// Id of the token that ends a conversation (`eoc`).
    pub eoc_id: i32,
    /// Longest sequence in tokens.
    pub max_length: usize,
    /// What happens to longer ones.
    pub longer: Longer,
    /// Whether several texts share a row: segments 1, 2, ... The first token of each is no training target, as nothing in its
    /// text comes before it. Of sources with one sequence, padded on the right.
    #[serde(skip_serializing_if = "Packing::is_none")]
    pub packing: Packing,
    /// Pad every batch to `max_length` instead of its longest row (DeepSpeed-Chat's way).
    pub pad_to_max: bool,
    /// All sequences of a row are padded to one length.
    pub same_length: bool,
    /// The part of the rows that this stage takes, where several stages share a file.
    pub split: Option<Split>,
    /// Order of the rows.
    pub shuffle: Shuffle,
    /// Text put before the first field (DeepSpeed-Chat's local files: one space).
    pub prefix: String,
    /// Text between two fields.
    pub separator: String,
    /// Whether tokens of the first field of a sequence of several are training targets.
    pub train_on_prompt: bool,
    /// Rows per optimizer step over all devices.
    pub batch_size: usize,
    /// Rows per graph call; changes speed and memory, never the numbers.
    pub micro_batch_size: usize,
}

/// A sequence of tokens made from a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// Its name in the batch.
    pub name: String,
    /// What it is put together from.
    pub parts: Vec<Part>,
}

/// A part of a sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Text of a field of the row.
    Field(String),
    /// The end-of-conversation token.
    Eoc,
}

/// Held-out rows of a source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// This share of the rows, taken after a shuffle with the stage's seed.
    Share(f64),
    /// Rows of another file.
    Path(String),
}

/// Side of the padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Text first.
    #[default]
    Right,
    /// Padding first.
    Left,
}

/// What happens to sequences over the maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Longer {
    /// The end is cut off.
    #[default]
    Truncate,
    /// The row is left out, and counted in the report.
    Drop,
}

/// How texts share rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// One text in a row.
    #[default]
    None,
    /// Whole texts, as many as `max_length` takes.
    Texts,
    /// Texts one after the other, cut into rows of `max_length` tokens.
    Blocks,
    /// Texts of a batch, as many as a row of its longest text's length takes. `batch_size` counts texts. Asked for where a
    /// recipe allows it; the pass `share_rows` takes it back where it would change numbers.
    Batch,
}

impl Packing {
    /// Whether every text has a row for itself.
    pub fn is_none(&self) -> bool {
        *self == Packing::None
    }
}

/// A stage's part of a file that several stages share (DeepSpeed-Chat's `--data_split 2,4,4`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Split {
    /// Proportions of all parts.
    pub parts: Vec<f64>,
    /// Which one is this stage's.
    pub part: usize,
}

/// The order in which rows are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shuffle {
    /// As in the file.
    None,
    /// A new permutation each epoch, from the stage's seed.
    #[default]
    EachEpoch,
    /// DeepSpeed-Chat's: one permutation from seed 0 for all epochs (torch's `DistributedSampler` without `set_epoch`).
    DeepspeedChat,
}

/// How a role is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// The role.
    pub role: String,
    /// AdamW's settings.
    pub optimizer: Optimizer,
    /// The learning rate over steps.
    pub schedule: Schedule,
    /// Global L2 norm above which gradients are scaled down.
    pub max_grad_norm: Option<f64>,
    /// Parameters that are not trained, by their Hugging Face names.
    #[serde(default)]
    pub freeze: Vec<Pattern>,
    /// Low-rank factors that are trained in the place of the model's own weights.
    #[serde(default)]
    pub lora: Option<Lora>,
}

/// LoRA (Hu et al. 2021) in PEFT's meaning: where a weight `W: [out, in]` is a target, `x W^T` becomes
/// `x W^T + (alpha / r) * (dropout(x) A^T) B^T`. The factors `A: [r, in]` and `B: [out, r]` are trained, and of the model's own
/// parameters only those of [`TensorRules::may_be_new`]: the head of a model over a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lora {
    /// Rank of the factors.
    pub r: usize,
    /// `r` times the factor on their product.
    pub alpha: f64,
    /// Share of the elements of `x` that are left out before `A`, in updates only.
    pub dropout: f64,
    /// Weights that get factors.
    pub targets: Targets,
    /// What a stage writes at its end.
    pub save: LoraSave,
    /// Whether the model's folder is an adapter whose factors are trained further, in place of new ones.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
    /// Where the user asks for it.
    pub span: Span,
    /// What has become of it; filled in by the pass `adapt`.
    pub adapter: Option<Adapter>,
}

/// Weights that get low-rank factors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Targets {
    /// All weights of linear layers but the head's.
    AllLinear,
    /// Linear layers whose name is one of these, ends with a dot and one of these, or matches one that is a glob.
    Named(Vec<Pattern>),
}

/// What is written of a role that is trained by LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraSave {
    /// The factors, as a folder of PEFT's in the folder `adapter`.
    Adapter,
    /// The model with `W + (alpha / r) B A` in the place of `W`.
    Merged,
    /// The merged model, and the factors in the folder `adapter` of its folder.
    Both,
}

/// The factors of a role.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    /// Names of the layers that have some; the parameters are those of [`Adapter::factors`].
    pub modules: Vec<String>,
    /// The model's own parameters that are trained beside them.
    pub whole: Vec<String>,
    /// The graph that gives `A` its first values; its only input is a random key. `B` begins as zeros.
    pub init: String,
}

impl Adapter {
    /// Names of the parameters `A` and `B` of a layer.
    pub fn factors(module: &str) -> [String; 2] {
        ["A", "B"].map(|factor| format!("{module}.lora_{factor}.weight"))
    }
}

/// A glob over names, as the user wrote it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pattern {
    /// The glob, in which `*` is any run of characters.
    pub glob: String,
    /// Where it stands.
    pub span: Span,
}

/// AdamW (Loshchilov and Hutter 2019), decoupled decay, bias correction on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of parameters that no name in `no_decay` exempts.
    pub weight_decay: f64,
    /// A parameter whose Hugging Face name, in lower case, contains one of these is not decayed.
    pub no_decay: Vec<String>,
}

/// The learning rate over optimizer steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The peak.
    pub learning_rate: f64,
    /// Its course after the warm-up.
    pub kind: ScheduleKind,
    /// Steps of linear rise from 0; the first step then uses 0.
    pub warmup_steps: u64,
    /// Share of all steps instead of a number; used where `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// Stay at 0 after the last step. Without it the cosine rises again, as in Hugging Face's.
    pub clamp: bool,
}

/// Course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays.
    Constant,
    /// Falls to 0 in a straight line.
    Linear,
    /// `0.5 * (1 + cos(pi * t))`.
    Cosine,
}

/// A condition on inputs that a graph states: its output `assert.<k>` is 1 where it holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assert {
    /// The graph.
    pub graph: String,
    /// The output, `f32[]`.
    pub output: String,
    /// What to say where it does not hold.
    pub message: String,
    /// Where it is stated.
    pub span: Span,
}

/// A range of a metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// The metric.
    pub metric: String,
    /// Smallest value.
    pub low: Option<f64>,
    /// Largest value.
    pub high: Option<f64>,
    /// Where it is stated.
    pub span: Span,
}

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters.
pub fn glob(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => {
            name.starts_with(head)
                && name[head.len()..]
                    .char_indices()
                    .map(|(i, _)| head.len() + i)
                    .chain([name.len()])
                    .any(|i| glob(rest, &name[i..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn globs_match_whole_names() {
        assert!(glob("h.*.attn.bias", "h.11.attn.bias"));
        assert!(glob("*.inv_freq", "layers.0.inv_freq"));
        assert!(!glob("h.*.attn.bias", "h.11.attn.bias.x"));
        assert!(glob("exact", "exact"));
    }
}
