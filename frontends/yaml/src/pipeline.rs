//! Pipelines, the documents of users: models, data, and the stages that train.

use dsgc_ir::DType;
use dsgc_ir::diag::Diag;

use crate::expr::Word;
use crate::foreign;
use crate::node::{Node, Value};
use crate::reader::Reader;
use crate::schema::{Form, KeyDef, Table, key};
use crate::text::Text;

/// A pipeline document.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// Version of the language; 1.
    pub version: i64,
    /// What it is for.
    pub doc: Option<Word>,
    /// Folder for results.
    pub output_dir: Option<Word>,
    /// Seed of everything random; a whole number.
    pub seed: Option<Node>,
    /// Models by name.
    pub models: Vec<ModelSource>,
    /// Data by name.
    pub data: Vec<DataSource>,
    /// Settings of all stages.
    pub defaults: Vec<Setting>,
    /// Stages in order.
    pub stages: Vec<Stage>,
    /// Devices and what the compiler does; keys of [`COMPILE`], checked.
    pub compile: Vec<Setting>,
    /// The remaining settings of runs; keys of [`PIPELINE`], checked.
    pub settings: Vec<Setting>,
}

/// A key and its value. Where a table knows the key, the value has the form that the table says.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The key.
    pub key: Text,
    /// The value.
    pub value: Node,
}

/// Where a model comes from.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// Its name in the pipeline.
    pub name: Word,
    /// A folder, or `hf://<repository>@<revision>`; without one the weights are random.
    pub path: Option<Word>,
    /// The model document, where the folder's `config.json` does not say it.
    pub model: Option<Word>,
    /// Config entries of that document.
    pub config: Vec<Setting>,
    /// Folder with the `tokenizer.json`, if not `path`.
    pub tokenizer: Option<Word>,
}

/// A set of rows.
#[derive(Clone, Debug)]
pub struct DataSource {
    /// Its name in the pipeline.
    pub name: Word,
    /// File of rows.
    pub path: Word,
    /// Field of the recipe -> column of the file.
    pub fields: Vec<(Word, Word)>,
    /// Stage -> its share of the rows, where several stages share a file.
    pub split: Vec<(Word, f64)>,
    /// The other settings; keys of [`DATA_SOURCE`], checked.
    pub settings: Vec<Setting>,
}

/// A stage of training.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its name; that of the recipe too, unless `recipe` says another.
    pub name: Word,
    /// The recipe, a name of the library or a file.
    pub recipe: Option<Word>,
    /// Source of the recipe (`None`: its only one) -> entry of `data`.
    pub data: Vec<(Option<Word>, Word)>,
    /// Roles whose models are written at the end; every trained one unless given.
    pub save: Option<Vec<Word>>,
    /// Settings, options, roles and judges. Those that [`SETTINGS`] know are checked; the others depend on the
    /// recipe.
    pub settings: Vec<Setting>,
}

const NUMBER_OR_NONE: Form = Form::Either(&[Form::None, Form::Float]);
const COUNT_OR_NONE: Form = Form::Either(&[Form::None, Form::Int]);

/// Keys of a pipeline.
pub const PIPELINE: Table = Table {
    what: "a pipeline",
    keys: &[
        key("dsgc", Form::Int, "version of the language: 1"),
        key("doc", Form::Text, "what it is for"),
        key(
            "output_dir",
            Form::Text,
            "folder for results, from the working directory; a folder per stage is made in it",
        ),
        key("seed", Form::Int, "seed of everything random"),
        key("models", Form::Map(&Form::Either(&[Form::Keys(&MODEL_SOURCE), Form::Text])), "models by name"),
        key("data", Form::Map(&Form::Keys(&DATA_SOURCE)), "data by name"),
        key("defaults", Form::Keys(&RUN), "settings of all stages: run, training, and options of recipes"),
        key("stages", Form::Map(&Form::Keys(&STAGE)), "stages in order"),
        key("compile", Form::Keys(&COMPILE), "devices and what the compiler does"),
        key("save_steps", COUNT_OR_NONE, "write a checkpoint every so many optimizer steps"),
        key("save_total_limit", COUNT_OR_NONE, "checkpoints that are kept per stage, the newest ones"),
        key("metric_for_best_model", Form::Text, "metric of evaluations by which one more is kept, the best"),
        key("greater_is_better", Form::Bool, "whether the best is the greatest, if its name does not say so"),
    ],
};

/// Keys of a model of a pipeline in its long form.
pub const MODEL_SOURCE: Table = Table {
    what: "a model of a pipeline",
    keys: &[
        key(
            "path",
            Form::Text,
            "a folder (from that of this file), or `hf://<repository>@<revision>`; without one the weights are random",
        ),
        key("model", Form::Text, "the model document, a name of the library or a file"),
        key("config", Form::Map(&Form::Literal), "config entries of that document"),
        key("tokenizer", Form::Text, "folder with the tokenizer.json, if not `path`"),
    ],
};

/// Keys of a set of rows.
pub const DATA_SOURCE: Table = Table {
    what: "an entry of `data`",
    keys: &[
        key("path", Form::Text, "file of rows, from the folder of this file"),
        key("fields", Form::Map(&Form::Text), "field of the recipe to column of the file"),
        key("eval", Form::Either(&[Form::Float, Form::Text]), "held-out rows: a share, or another file"),
        key("max_rows", COUNT_OR_NONE, "read only so many rows, from the beginning of the file"),
        key("split", Form::Map(&Form::Float), "stage to its share, where several stages share a file"),
        key("chat_template", Form::Text, "`tokenizer` or a .jinja file"),
        key("shuffle", Form::Choice(&["none", "each_epoch", "deepspeed_chat"]), "order of the rows"),
        key("prefix", Form::Text, "text before the first field"),
        key("separator", Form::Text, "text between two fields"),
        key("train_on_prompt", Form::Bool, "whether tokens of the prompt are training targets"),
        key("longer", Form::Choice(&["truncate", "drop"]), "what happens to rows over the maximum length"),
        key("pad_to_max", Form::Bool, "pad every batch to the maximum length"),
    ],
};

/// Keys of every stage, beside those of [`SETTINGS`] and those that its recipe brings.
pub const STAGE: Table = Table {
    what: "a stage",
    keys: &[
        key("recipe", Form::Text, "the recipe, a name of the library or a file; the stage's name unless given"),
        key(
            "data",
            Form::Either(&[Form::Map(&Form::Name), Form::Name]),
            "an entry of `data`, or one per source of the recipe",
        ),
        key("save", Form::List(&Form::Name), "what is written at the end"),
    ],
};

/// Settings of a stage as a whole.
pub const RUN: Table = Table {
    what: "the settings of a stage",
    keys: &[
        key("seed", Form::Int, "seed of everything random in the stage"),
        key("batch_size", Form::Int, "rows per optimizer step, over all devices"),
        key("micro_batch_size", Form::Int, "rows per graph call on a device; changes speed and memory, never numbers"),
        key("gradient_accumulation_steps", Form::Int, "instead of `batch_size`: micro-batches per optimizer step"),
        key(
            "packing",
            Form::Choice(&["auto", "true", "false"]),
            "several texts in a row, as many as `max_length` takes; `batch_size` counts rows. `auto`, unless given: those of a \
             batch, where no number changes; `batch_size` counts texts",
        ),
        key(
            "align_overflow",
            Form::Bool,
            "in fp16: where gradients of one role overflow, those beside it take no step either",
        ),
        key("loss_normalization", Form::Choice(&["batch", "micro_batch"]), "what a mean in a loss is taken over"),
        key("num_epochs", Form::Float, "passes over the data"),
        key("max_steps", COUNT_OR_NONE, "optimizer steps after which the stage ends"),
        key("eval_steps", COUNT_OR_NONE, "evaluate every so many optimizer steps, besides before and after"),
        key("logging_steps", Form::Int, "print a line every so many optimizer steps"),
    ],
};

/// Settings of a role, trained or not; in a stage they hold for all of them.
pub const ROLE: Table = Table {
    what: "the settings of a role",
    keys: &[
        key("bf16", Form::Bool, "compute products and attention in bf16; what is trained stays f32"),
        key("fp16", Form::Bool, "the same in fp16, with a dynamic loss scale where the role is trained"),
        key(
            "weights",
            Form::Choice(&DType::OF_WEIGHTS),
            "what the weights of layers are kept in; of those that are trained, a copy to generate with",
        ),
        key("weights_group", Form::Int, "weights of a row that have a scale in common in int8 and int4: 32, 64 or 128"),
        key(
            "zero_stage",
            COUNT_OR_NONE,
            "what ranks with different rows share out of it; `compile.zero_stage` unless given",
        ),
        key(
            "offload_optimizer",
            Form::Bool,
            "keep its optimizer's moments, and parameters that only the optimizer reads, in the host's memory",
        ),
        key("offload_param", Form::Bool, "keep its parameters in the host's memory, and copy them where they are used"),
        key(
            "gather_for_generation",
            Form::Bool,
            "where ranks have parts of its parameters: gather them once for a generation, if there is memory for it",
        ),
    ],
};

/// Settings of a trained role; in a stage they hold for all of them.
pub const TRAINING: Table = Table {
    what: "the settings of a trained role",
    keys: &[
        key("learning_rate", Form::Float, "the peak of the learning rate"),
        key("lr_scheduler_type", Form::Choice(&["constant", "linear", "cosine"]), "its course after the warm-up"),
        key("warmup_steps", Form::Int, "optimizer steps of linear rise from 0"),
        key("warmup_ratio", Form::Float, "the same, as a share of all steps"),
        key("optimizer", Form::Choice(&["adamw"]), "the optimizer"),
        key("adam_betas", Form::List(&Form::Float), "decay rates of the two moments"),
        key("adam_eps", Form::Float, "added to the root of the second moment"),
        key("weight_decay", Form::Float, "decoupled decay of the weights"),
        key("no_decay", Form::List(&Form::Text), "parts of names of parameters that are not decayed"),
        key("max_grad_norm", NUMBER_OR_NONE, "norm above which gradients are scaled down"),
        key("freeze", Form::List(&Form::Text), "parameters that are not trained, as globs"),
        key("lora_r", COUNT_OR_NONE, "rank of LoRA; setting it turns LoRA on"),
        key("lora_alpha", Form::Float, "LoRA's products are scaled by `lora_alpha / lora_r`; 8 unless given"),
        key("lora_dropout", Form::Float, "dropout before LoRA's first factor"),
        key(
            "lora_target_modules",
            Form::Either(&[Form::List(&Form::Text), Form::Text]),
            "names of layers, their ends or globs; or, unless given, `all_linear`: all linear layers but the head",
        ),
        key(
            "lora_save",
            Form::Choice(&["adapter", "merged", "both"]),
            "the factors as a folder of PEFT's, the model with them merged in, or both; both unless given",
        ),
        key(
            "lora_continue",
            Form::Bool,
            "train the factors of the adapter that the model is, or that its stage left, in place of new ones",
        ),
    ],
};

/// Keys of `compile`.
pub const COMPILE: Table = Table {
    what: "`compile`",
    keys: &[
        key("device", Form::Choice(&["cpu", "cuda", "wgpu", "interp"]), "kind of device"),
        key("devices", Form::Int, "how many"),
        key(
            "zero_stage",
            Form::Int,
            "what is split over data-parallel ranks: 0 nothing, 1 optimizer, 2 gradients, 3 all",
        ),
        key(
            "gradient_checkpointing",
            Form::Choice(&["true", "false", "auto"]),
            "`true` keeps the least of every layer and recomputes the rest for its gradient, `false` recomputes nothing, \
             `auto`, unless given, what `memory` asks for",
        ),
        key("offload_activations", Form::Bool, "keep what layers keep for their gradients in the host's memory"),
        key(
            "memory",
            Form::Literal,
            "most memory of a stage, such as `2GiB`: as much is recomputed as that takes, and no more",
        ),
        key("parallel", Form::Keys(&PARALLEL), "the axes of the mesh"),
    ],
};

/// Keys of `compile.parallel`.
pub const PARALLEL: Table = Table {
    what: "`parallel`",
    keys: &[
        key("data", Form::Int, "ranks with different rows"),
        key("tensor", Form::Int, "ranks that share each layer"),
        key("zero_stage", Form::Int, "what is split over data-parallel ranks"),
        key("pipeline", Form::Int, "ranks that share the layers out"),
        key(
            "schedule",
            Form::Choice(&["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]),
            "the order in which ranks with different layers work on parts of a batch",
        ),
        key("microbatches", Form::Int, "parts of a batch for them, in place of `micro_batch_size`"),
        key("overlap_comm", Form::Bool, "whether what ranks send goes beside what they compute; true unless given"),
        key("virtual_stages", Form::Int, "runs of layers of each of them in `interleaved_1f1b`; 2 unless given"),
    ],
};

/// The tables of what a stage may set beside its own keys.
pub const SETTINGS: [&Table; 3] = [&RUN, &ROLE, &TRAINING];

/// The key of a setting of stages, whichever table it stands in.
pub fn setting(name: &str) -> Option<&'static KeyDef> {
    SETTINGS.into_iter().find_map(|table| table.find(name))
}

pub(crate) fn read(reader: &mut Reader, node: &Node) -> Option<Pipeline> {
    let fields = reader.fields(node, &PIPELINE)?;
    let version = match fields.get("dsgc") {
        Some(n) => reader.int(n).filter(|version| {
            if *version != 1 {
                let diag = Diag::error(format!("found version {version} of the language, expected 1"));
                reader.error(diag.label(n.span, ""));
            }
            *version == 1
        }),
        None => {
            let diag = Diag::error("a pipeline has no `dsgc`, the version of the language").label(fields.span, "");
            reader.error(diag.help("begin the file with `dsgc: 1`"));
            None
        }
    };
    let doc = fields.get("doc").and_then(|n| reader.word(n, "a text"));
    let output_dir = fields.get("output_dir").and_then(|n| reader.word(n, "a folder"));
    let seed = fields.get("seed").filter(|n| reader.int(n).is_some()).cloned();
    let models = fields.get("models").map_or_else(Vec::new, |n| reader.model_sources(n));
    let data = fields.get("data").map_or_else(Vec::new, |n| reader.data_sources(n));
    let defaults = fields.get("defaults").map_or_else(Vec::new, |n| reader.stage_settings(n));
    let stages = fields.get("stages").map_or_else(Vec::new, |n| reader.stages(n));
    let compile = fields.get("compile").map_or_else(Vec::new, |n| reader.settings(n, &COMPILE));
    let mut settings = Vec::new();
    for name in ["save_steps", "save_total_limit", "metric_for_best_model", "greater_is_better"] {
        if let (Some((key, value)), Some(def)) = (fields.entry(name), PIPELINE.find(name)) {
            reader.check(value, &def.form);
            settings.push(Setting { key: key.clone(), value: value.clone() });
        }
    }
    if fields.get("stages").is_none() {
        let diag = Diag::error("a pipeline has no `stages`").label(fields.span, "");
        reader.error(diag.help("write `stages:`, and below it a stage such as `sft:`"));
    }
    Some(Pipeline { version: version?, doc, output_dir, seed, models, data, defaults, stages, compile, settings })
}

impl Reader {
    /// All entries of a mapping, checked against its table.
    fn settings(&mut self, node: &Node, table: &'static Table) -> Vec<Setting> {
        self.check_keys(node, table);
        match &node.value {
            Value::Map(entries) => entries.iter().map(|(k, v)| Setting { key: k.clone(), value: v.clone() }).collect(),
            _ => Vec::new(),
        }
    }

    fn check_keys(&mut self, node: &Node, table: &'static Table) {
        let Some(fields) = self.fields(node, table) else { return };
        for def in table.keys {
            if let Some(value) = fields.get(def.name) {
                self.check(value, &def.form);
            }
        }
    }

    fn model_sources(&mut self, node: &Node) -> Vec<ModelSource> {
        let mut sources = Vec::new();
        for (name, node) in self.entries(node, "models by name") {
            let name = self.name(name, false);
            let empty = ModelSource { name, path: None, model: None, config: Vec::new(), tokenizer: None };
            if node.scalar().is_some() {
                sources.push(ModelSource { path: self.word(node, "a folder"), ..empty });
            } else if let Some(fields) = self.fields(node, &MODEL_SOURCE) {
                let mut word = |key| fields.get(key).and_then(|n| self.word(n, "a text"));
                let (path, model, tokenizer) = (word("path"), word("model"), word("tokenizer"));
                if path.is_none() && model.is_none() {
                    let diag = Diag::error(format!("model `{}` has neither `path` nor `model`", empty.name.text));
                    self.error(diag.label(empty.name.span, ""));
                }
                let mut config = Vec::new();
                if let Some(node) = fields.get("config") {
                    for (key, value) in self.entries(node, "config entries") {
                        self.check(value, &Form::Literal);
                        config.push(Setting { key: key.clone(), value: value.clone() });
                    }
                }
                sources.push(ModelSource { path, model, config, tokenizer, ..empty });
            }
        }
        sources
    }

    fn data_sources(&mut self, node: &Node) -> Vec<DataSource> {
        let mut sources = Vec::new();
        for (name, node) in self.entries(node, "data by name") {
            let name = self.name(name, false);
            let all = self.settings(node, &DATA_SOURCE);
            let find = |key: &str| all.iter().find(|s| s.key.text == key).map(|s| &s.value);
            // Forms were checked above; what is wrong is left out here without another message.
            let mut quiet = Reader::default();
            let Some(path) = find("path").and_then(|n| quiet.word(n, "a file")) else {
                if matches!(node.value, Value::Map(_)) && find("path").is_none() {
                    let diag = Diag::error(format!("data `{}` has no `path`", name.text)).label(name.span, "");
                    self.error(diag);
                }
                continue;
            };
            let mut fields = Vec::new();
            for (field, column) in find("fields").map_or(&[] as &[_], |n| quiet.entries(n, "")) {
                fields.extend(quiet.word(column, "").map(|column| (crate::model::word(field), column)));
            }
            let mut split = Vec::new();
            for (stage, share) in find("split").map_or(&[] as &[_], |n| quiet.entries(n, "")) {
                split.extend(quiet.float(share).map(|share| (crate::model::word(stage), share)));
            }
            let taken = ["path", "fields", "split"];
            let settings = all.iter().filter(|s| !taken.contains(&s.key.text.as_str())).cloned().collect();
            sources.push(DataSource { name, path, fields, split, settings });
        }
        sources
    }

    fn stages(&mut self, node: &Node) -> Vec<Stage> {
        let mut stages = Vec::new();
        for (name, node) in self.entries(node, "stages by name") {
            let name = self.name(name, false);
            let Some(fields) = self.open_fields(node, &STAGE) else { continue };
            let recipe = fields.get("recipe").and_then(|n| self.word(n, "the name of a recipe or a file"));
            let save = fields.get("save").map(|n| self.words(n, "a list of names"));
            let mut data = Vec::new();
            match fields.get("data") {
                Some(Node { value: Value::Map(entries), .. }) => {
                    for (source, set) in entries {
                        let source = self.name(source, false);
                        data.extend(self.word(set, "an entry of `data`").map(|set| (Some(source), set)));
                    }
                }
                Some(set) => data.extend(self.word(set, "an entry of `data`").map(|set| (None, set))),
                None => {}
            }
            let settings = self.stage_settings(node);
            let settings = settings.into_iter().filter(|s| STAGE.find(&s.key.text).is_none()).collect();
            stages.push(Stage { name, recipe, data, save, settings });
        }
        stages
    }

    /// Settings of a stage or of all. Which options and roles there are is the recipe's matter, so unknown keys are
    /// left to who knows it - except names of other trainers, which no recipe may use.
    fn stage_settings(&mut self, node: &Node) -> Vec<Setting> {
        let mut settings = Vec::new();
        for (key, value) in self.entries(node, "settings by name") {
            if let Some(def) = setting(&key.text) {
                self.check(value, &def.form);
            } else if let (None, Some(theirs)) = (STAGE.find(&key.text), foreign::find(&key.text)) {
                let diag = Diag::error(format!("unknown key `{}` in a stage", key.text)).label(key.span, "");
                self.error(diag.help(theirs.help()));
                continue;
            } else if matches!(value.value, Value::Null) {
                self.wrong(value, "a value");
            }
            settings.push(Setting { key: key.clone(), value: value.clone() });
        }
        settings
    }
}
