//! One stage: its recipe, what every setting is, and what the recipe's roles and sources are bound to.

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span, nearest};
use dsgc_ir::stage::{Optimizer, Origin, Role, Schedule, ScheduleKind, Stage as HostStage, Training};

use crate::expr::Word;
use crate::graph::{Declaration, RoleDecl};
use crate::literal::Constant;
use crate::node::{Node, Value};
use crate::pipeline::{DataSource, Pipeline, RUN, STAGE, Setting, Stage, TRAINING};
use crate::reader::Reader;
use crate::schema::{unknown_key, words};

use super::Places;
use super::data::{BoundSource, Frame, bind};
use super::declared::{missing, shown, typed};
use super::documents::{Documents, ScopedRecipe};
use super::models::{FoundTokenizer, Known, Weights, looks_like_path};
use super::plan::{Planned, Scope, SourceShape};
use super::settings::{Decided, From, Layers, RUN_RULES, Range, TRAINING_RULES, literal, parsed};

/// What stages are made from.
pub(super) struct Surroundings<'a> {
    pub pipeline: &'a Pipeline,
    pub places: &'a Places,
    pub models: &'a [(Word, Option<Known>)],
    pub output_dir: &'a str,
    pub stage_names: &'a [String],
}

/// A stage before its graphs are lowered.
pub(super) struct Prepared {
    pub name: String,
    pub recipe: Rc<ScopedRecipe>,
    pub run: Vec<Decided>,
    pub options: Vec<Decided>,
    /// Values of the options, typed as declared.
    pub values: BTreeMap<String, Constant>,
    pub roles: Vec<BoundRole>,
    pub sources: Vec<BoundSource>,
    pub planned: Planned,
    pub save: Vec<String>,
    pub micro_batch_size: u64,
}

/// A role with its model.
pub(super) struct BoundRole {
    pub name: String,
    /// What the stage binds it to.
    pub bound_to: String,
    pub known: Known,
    pub trained: bool,
    /// The settings of its training, if it is trained.
    pub training: Vec<Decided>,
}

/// The models that a stage leaves to later ones: `stage`, or `stage.role` where it saves several.
pub(super) fn results(prepared: &Prepared, output_dir: &str) -> Vec<(String, Known)> {
    let folder = format!("{output_dir}/{}", prepared.name);
    let one = prepared.save.len() == 1;
    let saved = prepared.roles.iter().filter(|role| prepared.save.contains(&role.name));
    saved
        .map(|role| {
            let (name, folder) = match one {
                true => (prepared.name.clone(), folder.clone()),
                false => (format!("{}.{}", prepared.name, role.name), format!("{folder}/{}", role.name)),
            };
            (name, Known { weights: Weights::Stage(folder), ..role.known.clone() })
        })
        .collect()
}

/// A setting of a stage that none of its recipe's roles and options explain, and the like, have been reported if `None`.
pub(super) fn prepare(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    earlier: &[(String, Known)],
) -> Option<Prepared> {
    let recipe =
        documents.recipe(stage.recipe.as_ref().unwrap_or(&stage.name), around.places.folder(stage.name.span))?;
    documents.warn_of_shadows(&recipe.recipe.graphs, &recipe.functions);
    let before = documents.errors.len();
    unsupported(documents, &recipe);
    let blocks = blocks(documents, stage, &recipe);
    check_keys(documents, stage, &recipe);
    let layers = Layers::new(&around.places.sets).with(&around.pipeline.defaults).with(&stage.settings);
    let run = run_settings(documents, around, &recipe, &layers);
    let (options, values) = options(documents, stage, &recipe, &layers);
    let micro = sizes(documents, &layers, &run);
    let mut roles = roles(documents, around, stage, &recipe, &values, earlier, &blocks);
    trainings(documents, around, stage, &recipe, &blocks, &mut roles);
    if documents.errors.len() > before {
        return None;
    }
    let (batch_size, micro_batch_size) = micro?;
    let run = resolved_sizes(run, batch_size, micro_batch_size);
    let sources = sources(documents, around, stage, &recipe, &values, &roles, (batch_size, micro_batch_size))?;
    let save = save(documents, stage, &recipe, &roles)?;
    let shape = |bound: &BoundSource| {
        let max = bound.source.max_length as i64;
        SourceShape {
            name: bound.source.name.clone(),
            sequences: bound.source.sequences.iter().map(|s| s.name.clone()).collect(),
            has_eval: bound.source.eval.is_some(),
            length: (if bound.source.pad_to_max { max } else { 1 }, max),
        }
    };
    let scope = Scope {
        values: &values,
        graphs: &recipe.recipe.graphs,
        roles: roles.iter().map(|r| (r.name.clone(), r.trained)).collect(),
        sources: sources.iter().map(shape).collect(),
    };
    let mut planned = Planned::read(&scope, recipe.recipe.plan.as_deref().unwrap_or_default(), &recipe.recipe.evaluate);
    documents.errors.append(&mut planned.errors);
    let evaluates = run.iter().find(|d| d.key == "eval_steps").filter(|d| d.constant() != Constant::None);
    if let (Some(eval_steps), true) = (evaluates, planned.evaluate.is_empty()) {
        documents.warnings.push(
            Diag::warning("found `eval_steps`, but no rows are held out")
                .label(eval_steps.node.span, "")
                .help("write `eval: 0.1` in an entry of `data`"),
        );
    }
    if documents.errors.len() > before {
        return None;
    }
    let name = stage.name.text.clone();
    Some(Prepared { name, recipe, run, options, values, roles, sources, planned, save, micro_batch_size })
}

fn not_yet(what: &str, span: Span) -> Diag {
    Diag::error(format!("{what} is not part of this version")).label(span, "")
}

/// Parts of the language of recipes that nothing runs yet.
fn unsupported(documents: &mut Documents<'_>, recipe: &ScopedRecipe) {
    let recipe = &recipe.recipe;
    let parts = [
        recipe.judges.first().map(|j| ("`judges`", j.name.span)),
        recipe.state.first().map(|s| ("`state`", s.0.span)),
        recipe.require.first().map(|r| ("`require`", r.span)),
        recipe.health.first().map(|h| ("`health`", h.metric.span)),
    ];
    documents.errors.extend(parts.into_iter().flatten().map(|(what, span)| not_yet(what, span)));
}

/// Settings by role: `actor: {model: sft, learning_rate: 1e-6}`.
type Blocks = BTreeMap<String, Vec<Setting>>;

fn role_named<'r>(recipe: &'r ScopedRecipe, name: &str) -> Option<&'r RoleDecl> {
    recipe.recipe.models.iter().find(|role| role.name.text == name)
}

fn option_named<'r>(recipe: &'r ScopedRecipe, name: &str) -> Option<&'r Declaration> {
    recipe.recipe.options.iter().find(|option| option.name.text == name)
}

fn blocks(documents: &mut Documents<'_>, stage: &Stage, recipe: &ScopedRecipe) -> Blocks {
    let mut blocks = Blocks::new();
    for setting in &stage.settings {
        let (Some(role), Value::Map(entries)) = (role_named(recipe, &setting.key.text), &setting.value.value) else {
            continue;
        };
        let mut settings = Vec::new();
        for (key, value) in entries {
            if let Some(def) = TRAINING.find(&key.text) {
                let mut reader = Reader::default();
                reader.check(value, &def.form);
                documents.errors.append(&mut reader.errors);
                if !role.trained {
                    let diag = Diag::error(format!(
                        "found `{}` for role `{}`, which is not trained",
                        key.text, role.name.text
                    ));
                    documents.error(diag.label(key.span, "").label(role.name.span, "the role"));
                }
                settings.push(Setting { key: key.clone(), value: value.clone() });
            } else if key.text == "model" {
                settings.push(Setting { key: key.clone(), value: value.clone() });
            } else {
                let known = TRAINING.keys.iter().map(|k| k.name).chain(["model"]);
                documents.error(unknown_key(key, &format!("the settings of role `{}`", role.name.text), known));
            }
        }
        blocks.insert(setting.key.text.clone(), settings);
    }
    blocks
}

/// Every key of a stage is one of all stages, or the recipe explains it.
fn check_keys(documents: &mut Documents<'_>, stage: &Stage, recipe: &ScopedRecipe) {
    for setting in &stage.settings {
        let name = setting.key.text.as_str();
        let ours = crate::pipeline::setting(name).is_some();
        if !ours && option_named(recipe, name).is_none() && role_named(recipe, name).is_none() {
            let what = format!("a stage of recipe `{}`", recipe.recipe.name.text);
            documents.error(unknown_key(&setting.key, &what, known_keys(recipe)));
        }
    }
}

/// All keys that a stage of this recipe may have: first those of the recipe.
pub(super) fn known_keys(recipe: &ScopedRecipe) -> impl Iterator<Item = &str> {
    let roles = recipe.recipe.models.iter().map(|r| r.name.text.as_str());
    let options = recipe.recipe.options.iter().map(|o| o.name.text.as_str());
    let tables = [&STAGE, &RUN, &TRAINING].into_iter().flat_map(|table| table.keys.iter().map(|k| k.name));
    roles.chain(options).chain(tables)
}

fn run_settings(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    recipe: &ScopedRecipe,
    layers: &Layers<'_>,
) -> Vec<Decided> {
    let mut run: Vec<Decided> = RUN_RULES.iter().map(|rule| layers.decide(rule, &mut documents.errors)).collect();
    for decided in run.iter_mut().filter(|d| d.from == From::Default) {
        if let Some(default) = option_named(recipe, &decided.key).and_then(|option| option.default.as_ref()) {
            decided.node = parsed(&default.value.to_string());
            decided.from = From::Recipe(recipe.name.clone());
        } else if let ("seed", Some(seed)) = (decided.key.as_ref(), &around.pipeline.seed) {
            Range::From(0.0).check("seed", seed, &mut documents.errors);
            *decided = Decided { key: "seed".into(), node: seed.clone(), from: From::Given(seed.span) };
        }
    }
    for decided in &run {
        let what = match (decided.key.as_ref(), decided.constant()) {
            ("bf16", Constant::Bool(true)) => "`bf16: true`",
            ("loss_normalization", Constant::Str(how)) if how == "micro_batch" => "`loss_normalization: micro_batch`",
            _ => continue,
        };
        documents.error(not_yet(what, decided.node.span));
    }
    run
}

fn options(
    documents: &mut Documents<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    layers: &Layers<'_>,
) -> (Vec<Decided>, BTreeMap<String, Constant>) {
    let (mut decided, mut values) = (Vec::new(), BTreeMap::new());
    for option in &recipe.recipe.options {
        let name = option.name.text.clone();
        if TRAINING.find(&name).is_some() {
            let diag = Diag::error(format!("found the option `{name}`, which every trained role has already"));
            documents.error(
                diag.label(option.name.span, "")
                    .help(format!("suggest a value under `defaults`: `ROLE: {{{name}: ...}}`")),
            );
            continue;
        }
        let (node, given, from) = match (layers.find(&name), &option.default) {
            (Some((_, setting, from)), _) => (setting.value.clone(), literal(&setting.value), from),
            (None, Some(default)) => {
                (parsed(&default.value.to_string()), default.clone(), From::Recipe(recipe.name.clone()))
            }
            (None, None) => {
                documents.error(missing(option, &format!("stage `{}`", stage.name.text), stage.name.span));
                continue;
            }
        };
        match typed(option, &given) {
            Ok(value) => {
                values.insert(name.clone(), value);
                if RUN.find(&name).is_none() {
                    decided.push(Decided { key: name.into(), node, from });
                }
            }
            Err(diag) => documents.error(diag),
        }
    }
    (decided, values)
}

/// Rows per optimizer step and per call (D14).
fn sizes(documents: &mut Documents<'_>, layers: &Layers<'_>, run: &[Decided]) -> Option<(u64, u64)> {
    let find = |key: &str| run.iter().find(|d| d.key == key);
    let by_accumulation = layers.second_counts("batch_size", "gradient_accumulation_steps", &mut documents.errors);
    let micro = find("micro_batch_size")?;
    if by_accumulation {
        let steps = find("gradient_accumulation_steps")?;
        let Some(rows) = micro.count() else {
            documents.error(
                Diag::error("found `gradient_accumulation_steps` without `micro_batch_size`, whose number it is")
                    .label(steps.node.span, "")
                    .help("write `micro_batch_size` too, or `batch_size` instead"),
            );
            return None;
        };
        return Some((rows.checked_mul(steps.count()?)?, rows));
    }
    let batch = find("batch_size")?;
    let rows = batch.count()?;
    match micro.count() {
        Some(micro_rows) if micro_rows > rows => {
            documents.error(
                Diag::error(format!("found a micro_batch_size of {micro_rows}, expected {rows} or less"))
                    .label(micro.node.span, "")
                    .label(batch.node.span, "`batch_size`, the rows of all micro-batches"),
            );
            None
        }
        micro_rows => Some((rows, micro_rows.unwrap_or(rows))),
    }
}

/// The sizes as they came out, so that `--resolved` says one thing only.
fn resolved_sizes(run: Vec<Decided>, batch: u64, micro: u64) -> Vec<Decided> {
    let steps = run.iter().find(|d| d.key == "gradient_accumulation_steps").cloned();
    let accumulates = steps.as_ref().is_some_and(|s| s.constant() != Constant::None);
    let out = run.into_iter().filter(|d| d.key != "gradient_accumulation_steps").map(|d| {
        let value = match d.key.as_ref() {
            "batch_size" => batch,
            "micro_batch_size" => micro,
            _ => return d,
        };
        if d.count() == Some(value) {
            return d;
        }
        let from = match (d.key.as_ref(), &steps) {
            ("batch_size", Some(steps)) if accumulates => {
                From::Derived(format!("{micro} rows x {} micro-batches", steps.count().unwrap_or(1)))
            }
            _ => From::Derived("the whole batch".into()),
        };
        Decided { node: parsed(&value.to_string()), from, ..d }
    });
    out.collect()
}

fn roles(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    values: &BTreeMap<String, Constant>,
    earlier: &[(String, Known)],
    blocks: &Blocks,
) -> Vec<BoundRole> {
    let mut bound: Vec<BoundRole> = Vec::new();
    for role in &recipe.recipe.models {
        if let Some(when) = &role.when {
            match crate::eval::constant_in(when, values) {
                Ok(Constant::Bool(true)) => {}
                Ok(Constant::Bool(false)) => continue,
                Ok(found) => {
                    documents.error(
                        Diag::error(format!("found {}, expected a condition", shown(&found))).label(when.span, ""),
                    );
                    continue;
                }
                Err(diag) => {
                    documents.error(diag);
                    continue;
                }
            }
        }
        if let Some(average) = &role.average {
            documents.error(not_yet("`average`", average.span));
            continue;
        }
        let setting = stage.settings.iter().find(|s| s.key.text == role.name.text);
        let named: Option<&Node> = match setting.map(|s| &s.value) {
            Some(Node { value: Value::Map(_), .. }) => {
                blocks.get(&role.name.text).and_then(|b| b.iter().find(|s| s.key.text == "model")).map(|s| &s.value)
            }
            other => other,
        };
        let (bound_to, known) = match (named, &role.snapshot) {
            (Some(node), _) => match find_model(documents, around, stage, node, earlier) {
                Some((name, known)) => (Some(name), known),
                None => continue,
            },
            (None, Some(of)) => match bound.iter().find(|b| b.name == of.text) {
                Some(original) if original.known.weights != Weights::Random => (None, original.known.clone()),
                Some(_) => {
                    documents.error(not_yet("a snapshot of a model with random weights", of.span));
                    continue;
                }
                None => {
                    // Of a role that could not be bound nothing more needs to be said.
                    if role_named(recipe, &of.text).is_none() {
                        documents.error(Diag::error(format!("unknown role `{}`", of.text)).label(of.span, ""));
                    }
                    continue;
                }
            },
            (None, None) => {
                unbound(documents, around, stage, role, earlier);
                continue;
            }
        };
        if let Some(output) = role.ty.as_ref().and_then(|ty| match ty.text.as_str() {
            "causal_lm" => Some("logits"),
            "value" => Some("value"),
            _ => None,
        }) && !has_output(&known, output)
        {
            documents.error(
                Diag::error(format!("role `{}` needs a model with the output `{output}`", role.name.text))
                    .label(named.map_or(role.name.span, |n| n.span), format!("`{}` has none", known.config.host.family))
                    .label(role.name.span, "the role"),
            );
            continue;
        }
        bound.push(BoundRole {
            name: role.name.text.clone(),
            bound_to: bound_to.unwrap_or_default(),
            known,
            trained: role.trained,
            training: Vec::new(),
        });
    }
    bound
}

fn has_output(known: &Known, name: &str) -> bool {
    match &known.document.model.graph.out {
        crate::graph::Tree::Expr(_) => false,
        crate::graph::Tree::Record(_, entries) => entries.iter().any(|(n, _)| n.text == name),
    }
}

/// Models of the pipeline and results of earlier stages, for messages.
fn model_names(around: &Surroundings<'_>, earlier: &[(String, Known)]) -> Vec<String> {
    let models = around.models.iter().map(|(name, _)| name.text.clone());
    models.chain(earlier.iter().map(|(name, _)| name.clone())).collect()
}

fn unbound(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    role: &RoleDecl,
    earlier: &[(String, Known)],
) {
    let names = model_names(around, earlier);
    let diag = Diag::error(format!("stage `{}` binds no model to the role `{}`", stage.name.text, role.name.text))
        .label(stage.name.span, "")
        .label(role.name.span, "the role");
    documents.error(match names.first() {
        Some(name) => diag.help(format!("write `{}: {name}` in the stage", role.name.text)),
        None => diag.help(format!("write `models: {{base: FOLDER}}`, and `{}: base` in the stage", role.name.text)),
    });
}

fn find_model(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    node: &Node,
    earlier: &[(String, Known)],
) -> Option<(String, Known)> {
    let Some(text) = node.scalar() else {
        documents.error(
            Diag::error(format!("found {}, expected the name of a model", node.describe())).label(node.span, ""),
        );
        return None;
    };
    let name = text.text.as_str();
    if let Some((_, known)) = around.models.iter().find(|(n, _)| n.text == name) {
        // What is wrong with it has been said where it stands.
        return known.clone().map(|known| (name.to_string(), known));
    }
    if let Some((_, known)) = earlier.iter().find(|(n, _)| n == name) {
        return Some((name.to_string(), known.clone()));
    }
    let names = model_names(around, earlier);
    let diag = Diag::error(format!("found `{name}`, expected a model or an earlier stage")).label(node.span, "");
    let roles: Vec<&str> =
        earlier.iter().map(|(n, _)| n.as_str()).filter(|n| n.split('.').next() == Some(name)).collect();
    documents.error(if name == stage.name.text {
        diag.help("a stage cannot begin with its own result")
    } else if !roles.is_empty() {
        diag.help(format!("stage `{name}` saves several models: {}", words(&roles)))
    } else if around.stage_names.iter().any(|s| s == name) {
        // A stage that failed is in nobody's list, but its own messages say enough.
        let at = |n: &str| around.stage_names.iter().position(|s| s == n);
        if at(name) < at(&stage.name.text) {
            return None;
        }
        diag.help(format!("stage `{name}` comes later: move it before `{}`", stage.name.text))
    } else if let Some(near) = nearest(name, names.iter().map(String::as_str)) {
        diag.help(format!("write `{near}`"))
    } else if looks_like_path(name) {
        diag.help("name it first: `models: {base: FOLDER}`")
    } else if names.is_empty() {
        diag.help(format!("write `models: {{{name}: FOLDER}}`"))
    } else {
        diag.help(format!("there are {}", words(&names)))
    });
    None
}

fn trainings(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    blocks: &Blocks,
    roles: &mut [BoundRole],
) {
    for suggested in &recipe.recipe.defaults {
        if role_named(recipe, &suggested.role.text).is_none() {
            let diag = Diag::error(format!("unknown role `{}`", suggested.role.text)).label(suggested.role.span, "");
            documents.error(diag);
        }
    }
    for role in roles.iter_mut().filter(|r| r.trained) {
        let suggested = recipe.recipe.defaults.iter().find(|d| d.role.text == role.name);
        let layers = Layers::new(&around.places.sets)
            .with_recipe(&recipe.name, suggested.map_or(&[], |d| &d.settings))
            .with(&around.pipeline.defaults)
            .with(&stage.settings)
            .with(blocks.get(&role.name).map_or(&[], |b| b));
        role.training = TRAINING_RULES.iter().map(|rule| layers.decide(rule, &mut documents.errors)).collect();
        // The one that does not count is as if it did not exist.
        let by_ratio = layers.second_counts("warmup_steps", "warmup_ratio", &mut documents.errors);
        let lost = if by_ratio { "warmup_steps" } else { "warmup_ratio" };
        role.training.retain(|d| d.key != lost);
        for decided in &role.training {
            let lora = decided.key.starts_with("lora_") && decided.from != From::Default;
            if lora || (decided.key == "freeze" && !decided.words().is_empty()) {
                documents.error(not_yet(&format!("`{}`", decided.key), decided.node.span));
            }
            if decided.key == "adam_betas" && decided.floats().len() != 2 {
                documents.error(
                    Diag::error(format!("found {} values for `adam_betas`, expected 2", decided.floats().len()))
                        .label(decided.node.span, ""),
                );
            }
        }
    }
}

/// The host side of a role's training.
pub(super) fn training(role: &BoundRole) -> Training {
    let given = |key: &str| role.training.iter().find(|d| d.key == key);
    let find = |key: &str| given(key).unwrap_or_else(|| panic!("bug: no rule for `{key}`"));
    let float = |key: &str| find(key).float().unwrap_or_default();
    let betas = find("adam_betas").floats();
    Training {
        role: role.name.clone(),
        optimizer: Optimizer {
            betas: (betas[0], betas[1]),
            eps: float("adam_eps"),
            weight_decay: float("weight_decay"),
            no_decay: find("no_decay").words().iter().map(|name| name.to_lowercase()).collect(),
        },
        schedule: Schedule {
            learning_rate: float("learning_rate"),
            kind: match find("lr_scheduler_type").text() {
                "constant" => ScheduleKind::Constant,
                "cosine" => ScheduleKind::Cosine,
                _ => ScheduleKind::Linear,
            },
            warmup_steps: given("warmup_steps").and_then(Decided::count).unwrap_or_default(),
            warmup_ratio: given("warmup_ratio").and_then(Decided::float).unwrap_or_default(),
            // DeepSpeed-Chat's cosine rises again after the last step that it counted; ours counts all of them.
            clamp: true,
        },
        max_grad_norm: find("max_grad_norm").float(),
    }
}

fn sources(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    values: &BTreeMap<String, Constant>,
    roles: &[BoundRole],
    (batch_size, micro_batch_size): (u64, u64),
) -> Option<Vec<BoundSource>> {
    let decls = &recipe.recipe.data;
    let before = documents.errors.len();
    for (source, _) in &stage.data {
        match source {
            Some(source) if !decls.iter().any(|d| d.name.text == source.text) => {
                let known: Vec<&str> = decls.iter().map(|d| d.name.text.as_str()).collect();
                documents.error(
                    Diag::error(format!("recipe `{}` has no source `{}`", recipe.name, source.text))
                        .label(source.span, "")
                        .help(format!("it has {}", words(&known))),
                );
            }
            _ => {}
        }
    }
    let mut bound = Vec::new();
    for decl in decls {
        let named = stage.data.iter().find(|(source, _)| match source {
            Some(source) => source.text == decl.name.text,
            None => decls.iter().filter(|d| !d.optional).count() <= 1 && !decl.optional,
        });
        let Some((_, set)) = named else {
            if !decl.optional {
                unbound_source(documents, around.pipeline, stage, &decl.name, decls.len() > 1);
            }
            continue;
        };
        let Some(rows) = around.pipeline.data.iter().find(|d| d.name.text == set.text) else {
            unknown_data(documents, &around.pipeline.data, set);
            continue;
        };
        let Some(tokenizer) = tokenizer(documents, stage, roles) else { break };
        let Some((max_length, fixed_width)) = width(documents, recipe, decl, values, roles) else { continue };
        let frame = Frame {
            stage: &stage.name.text,
            stages: around.stage_names,
            recipe: &recipe.name,
            max_length,
            fixed_width,
            batch_size: batch_size as usize,
            micro_batch_size: micro_batch_size as usize,
            tokenizer: &tokenizer,
        };
        bound.extend(bind(documents, decl, rows, &frame, around.places));
    }
    (documents.errors.len() == before).then_some(bound)
}

fn unbound_source(documents: &mut Documents<'_>, pipeline: &Pipeline, stage: &Stage, source: &Word, several: bool) {
    let message = format!("stage `{}` has no `data` for the source `{}`", stage.name.text, source.text);
    let diag = Diag::error(message).label(stage.name.span, "").label(source.span, "the source");
    let name = pipeline.data.first().map_or("NAME", |d| d.name.text.as_str());
    documents.error(if several {
        diag.help(format!("write `data: {{{}: {name}}}`", source.text))
    } else {
        diag.help(format!("write `data: {name}` in the stage"))
    });
}

fn unknown_data(documents: &mut Documents<'_>, data: &[DataSource], set: &Word) {
    let known: Vec<&str> = data.iter().map(|d| d.name.text.as_str()).collect();
    let diag = Diag::error(format!("found `{}`, expected an entry of `data`", set.text)).label(set.span, "");
    documents.error(match nearest(&set.text, known.iter().copied()) {
        Some(near) => diag.help(format!("write `{near}`")),
        None if known.is_empty() => diag.help("write `data:` at the top of the file, with `NAME: {path: FILE}`"),
        None => diag.help(format!("there are {}", words(&known))),
    });
}

/// The tokenizer of the stage: all roles share it, or their tokens would not mean the same.
fn tokenizer(documents: &mut Documents<'_>, stage: &Stage, roles: &[BoundRole]) -> Option<FoundTokenizer> {
    let found: Vec<(&BoundRole, &FoundTokenizer)> =
        roles.iter().filter_map(|r| r.known.tokenizer.as_ref().ok().map(|t| (r, t))).collect();
    let Some((first, tokenizer)) = found.first() else {
        if let Some(Err(diag)) = roles.first().map(|r| &r.known.tokenizer) {
            documents.error(diag.clone());
        }
        return None;
    };
    if let Some((other, _)) = found.iter().find(|(_, t)| t.facts != tokenizer.facts) {
        documents.error(
            Diag::error(format!("the roles `{}` and `{}` have different tokenizers", first.name, other.name))
                .label(stage.name.span, ""),
        );
        return None;
    }
    Some((*tokenizer).clone())
}

/// The longest row in tokens, and whether every batch is that long: the source's `width`, or the option `max_length`.
fn width(
    documents: &mut Documents<'_>,
    recipe: &ScopedRecipe,
    decl: &crate::recipe::DataDecl,
    values: &BTreeMap<String, Constant>,
    roles: &[BoundRole],
) -> Option<(usize, bool)> {
    let (value, span) = match &decl.width {
        Some(expr) => match crate::eval::constant_in(expr, values) {
            Ok(value) => (value, expr.span),
            Err(diag) => {
                documents.error(diag);
                return None;
            }
        },
        None => match values.get("max_length") {
            Some(value) => (value.clone(), option_named(recipe, "max_length").map_or(Span::NONE, |o| o.name.span)),
            None => {
                documents.error(
                    Diag::error(format!(
                        "source `{}` has no `width`, and the recipe no option `max_length`",
                        decl.name.text
                    ))
                    .label(decl.name.span, ""),
                );
                return None;
            }
        },
    };
    let Some(length) = (match value {
        Constant::Int(n) if n > 0 => usize::try_from(n).ok(),
        _ => None,
    }) else {
        documents.error(Diag::error(format!("found a length of {value}, expected 1 or more")).label(span, ""));
        return None;
    };
    for role in roles {
        let positions = role.known.config.host.config.get("max_position_embeddings").and_then(|v| v.as_u64());
        if let Some(positions) = positions.filter(|p| (*p as usize) < length) {
            documents.error(
                Diag::error(format!(
                    "found rows of up to {length} tokens, but model `{}` has {positions} positions",
                    role.bound_to
                ))
                .label(span, "")
                .help(format!("set the length to {positions} or less")),
            );
            return None;
        }
    }
    Some((length, decl.width.is_some()))
}

fn save(
    documents: &mut Documents<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    roles: &[BoundRole],
) -> Option<Vec<String>> {
    let trained = || roles.iter().filter(|r| r.trained).map(|r| r.name.clone()).collect();
    let names = match (stage.save.is_empty(), &recipe.recipe.save) {
        (false, _) => &stage.save,
        (true, Some(names)) => names,
        (true, None) => return Some(trained()),
    };
    let mut save = Vec::new();
    for name in names {
        if roles.iter().any(|r| r.name == name.text) {
            save.push(name.text.clone());
        } else if role_named(recipe, &name.text).is_none() {
            let known: Vec<&str> = roles.iter().map(|r| r.name.as_str()).collect();
            let diag = Diag::error(format!("unknown role `{}`", name.text)).label(name.span, "");
            documents.error(diag.help(format!("this stage has {}", words(&known))));
            return None;
        }
    }
    Some(save)
}

/// The host side of a stage.
pub(super) fn host_side(prepared: &Prepared, output_dir: &str) -> HostStage {
    let find = |key: &str| prepared.run.iter().find(|d| d.key == key);
    let count = |key: &str| find(key).and_then(Decided::count);
    HostStage {
        name: prepared.name.clone(),
        recipe: prepared.recipe.name.clone(),
        seed: count("seed").unwrap_or_default(),
        output_dir: format!("{output_dir}/{}", prepared.name),
        roles: prepared.roles.iter().map(host_role).collect(),
        sources: prepared.sources.iter().map(|bound| bound.source.clone()).collect(),
        trainings: prepared.roles.iter().filter(|r| r.trained).map(training).collect(),
        num_epochs: find("num_epochs").and_then(Decided::float).unwrap_or(1.0),
        max_steps: count("max_steps"),
        eval_steps: count("eval_steps"),
        logging_steps: count("logging_steps").unwrap_or(1),
        plan: prepared.planned.plan.clone(),
        evaluate: prepared.planned.evaluate.clone(),
        save: prepared.save.clone(),
    }
}

fn host_role(role: &BoundRole) -> Role {
    Role {
        name: role.name.clone(),
        model: role.known.config.host.clone(),
        origin: match &role.known.weights {
            Weights::Random => Origin::Random { init: init_graph(&role.name) },
            Weights::Folder(folder) => Origin::Folder(folder.clone()),
            Weights::Stage(folder) => Origin::Stage(folder.clone()),
        },
        trained: role.trained,
        tokenizer: role.known.tokenizer.as_ref().ok().map(|t| t.folder.clone()),
    }
}

/// Name of the graph that gives a role its first values. A graph of the user's cannot be called so.
pub(super) fn init_graph(role: &str) -> String {
    format!("{role}.init")
}
