//! One stage: its recipe, what every setting is, and what the recipe's roles and sources are bound to.

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::DType;
use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Bounds, Origin, Role, Stage as HostStage};

use crate::expr::{BinaryOp, Expr, ExprKind, Word};
use crate::graph::{Declaration, RoleDecl};
use crate::literal::Constant;
use crate::pipeline::{Pipeline, ROLE, RUN, SETTINGS, STAGE, Stage, TRAINING};
use crate::schema::{unknown_key, words};

use super::data::BoundSource;
use super::declared::{missing, typed};
use super::documents::{Documents, ScopedRecipe};
use super::graphs;
use super::lora;
use super::models::{Known, Weights};
use super::parallel::Parallel;
use super::plan::{Planned, Planning, SourceShape};
use super::resolved;
use super::roles::{self, BoundRole};
use super::settings::{Decided, Layers, Provenance, RUN_RULES, Range, literal, parsed};
use super::sources::{self, Asked};
use super::{HostSettings, Places};

/// What stages are made from.
pub(super) struct Surroundings<'a> {
    pub pipeline: &'a Pipeline,
    pub places: &'a Places,
    pub models: &'a [(Word, Option<Known>)],
    pub output_dir: &'a str,
    pub stage_names: &'a [String],
    pub parallel: &'a Parallel,
}

/// A stage before its graphs are lowered.
pub(super) struct Prepared {
    pub name: String,
    /// Where the pipeline names it.
    pub span: Span,
    pub recipe: Rc<ScopedRecipe>,
    pub run: Vec<Decided>,
    pub options: Vec<Decided>,
    /// Values of the options, typed as declared.
    pub values: BTreeMap<String, Constant>,
    pub roles: Vec<BoundRole>,
    pub sources: Vec<BoundSource>,
    pub planned: Planned,
    pub require: Vec<Bounds>,
    pub health: Vec<Bounds>,
    pub save: Vec<String>,
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
            let folder = if lora::leaves_adapter_only(&role.training) { format!("{folder}/adapter") } else { folder };
            let adapter = lora::leaves_adapter(&role.training);
            (name, Known { weights: Weights::Stage(folder), adapter, ..role.known.clone() })
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
    let blocks = roles::blocks(documents, stage, &recipe);
    check_keys(documents, stage, &recipe);
    let layers = Layers::new(&around.places.sets).with(&around.pipeline.defaults).with(&stage.settings);
    let run = run_settings(documents, around, &recipe, &layers);
    let (options, values) = options(documents, stage, &recipe, &layers);
    let micro = sizes(documents, &layers, &run).and_then(|sizes| around.parallel.sizes(documents, &run, sizes));
    let named = sources::named(documents, around.pipeline, stage, &recipe);
    let (mut roles, complete) = roles::roles(documents, around, stage, &recipe, &values, earlier, &blocks);
    roles::trainings(documents, around, stage, &recipe, &blocks, &mut roles);
    roles::precisions(documents, around, stage, &blocks, &mut roles);
    // Of a role that could not be bound, graphs would say that there is no such function.
    if documents.errors.len() > before || !complete {
        return None;
    }
    let (batch_size, micro_batch_size) = micro?;
    let run = resolved_sizes(run, batch_size, micro_batch_size);
    let asked = Asked {
        stage,
        recipe: &recipe,
        values: &values,
        roles: &roles,
        batch_size,
        micro_batch_size,
        length: options.iter().find(|d| d.key == "max_length").map_or(Span::NONE, |d| d.node.span),
        packing: run.iter().find(|d| d.key == "packing" && d.constant() == Constant::Bool(true)).map(|d| d.node.span),
        shared_rows: run.iter().any(|d| d.key == "packing" && d.text() == "auto"),
    };
    let mut sources = sources::sources(documents, around, &named, &asked)?;
    let save = save(documents, stage, &recipe, &roles)?;
    let planning = Planning {
        recipe: &recipe,
        values: &values,
        parts: graphs::parts(&roles),
        ids: graphs::token_ids(&roles),
        sources: sources.iter().map(source_shape).collect(),
        micro_batch_size: micro_batch_size as usize,
        at: Some(stage.name.span),
    };
    let planned = planning.plan(documents)?;
    if planned.errors.is_empty() && planned.plan.is_empty() {
        let diag = Diag::error(format!("the plan of recipe `{}` is empty: there is nothing to run", recipe.name));
        documents.error(diag.label(stage.name.span, ""));
    }
    for bound in &mut sources {
        bound.source.batch_size = planned.batch_sizes.get(&bound.source.name).copied().unwrap_or(batch_size as usize);
        bound.source.micro_batch_size = bound.source.micro_batch_size.min(bound.source.batch_size);
    }
    let (require, health) = bounds(documents, &recipe, &values);
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
    let Word { text: name, span } = stage.name.clone();
    Some(Prepared { name, span, recipe, run, options, values, roles, sources, planned, require, health, save })
}

/// The message for what the language has and nothing runs yet.
pub(super) fn not_yet(what: &str, span: Span) -> Diag {
    Diag::error(format!("{what} is not part of this version")).label(span, "")
}

/// Parts of the language of recipes that nothing runs yet.
pub(super) fn unsupported(documents: &mut Documents<'_>, recipe: &ScopedRecipe) {
    let recipe = &recipe.recipe;
    let parts = [recipe.judges.first().map(|j| ("`judges`", j.name.span))];
    documents.errors.extend(parts.into_iter().flatten().map(|(what, span)| not_yet(what, span)));
}

fn source_shape(bound: &BoundSource) -> SourceShape {
    let max = bound.source.max_length as i64;
    SourceShape {
        name: bound.source.name.clone(),
        sequences: bound.source.sequences.iter().map(|s| s.name.clone()).collect(),
        has_eval: bound.source.eval.is_some(),
        length: (if bound.source.pad_to_max { max } else { 1 }, max),
        batch_size: bound.source.batch_size,
    }
}

/// `require` and `health`. A bound that is `none` counts for nothing.
fn bounds(
    documents: &mut Documents<'_>,
    recipe: &ScopedRecipe,
    values: &BTreeMap<String, Constant>,
) -> (Vec<Bounds>, Vec<Bounds>) {
    let mut require = Vec::new();
    for condition in &recipe.recipe.require {
        let ExprKind::Binary(op, metric, bound) = &condition.kind else {
            documents.error(no_condition(condition));
            continue;
        };
        let (Some(metric), Ok(bound)) = (metric.name(), crate::eval::constant_in(bound, values)) else {
            documents.error(no_condition(condition));
            continue;
        };
        let (low, high) = match (op, bound.number()) {
            (BinaryOp::Ge, Some(n)) => (Some(n), None),
            (BinaryOp::Le, Some(n)) => (None, Some(n)),
            _ if bound == Constant::None && matches!(op, BinaryOp::Ge | BinaryOp::Le) => continue,
            _ => {
                documents.error(no_condition(condition));
                continue;
            }
        };
        require.push(Bounds { metric: metric.to_string(), low, high, span: condition.span });
    }
    let health = recipe.recipe.health.iter().map(|h| Bounds {
        metric: h.metric.text.clone(),
        low: Some(h.low),
        high: Some(h.high),
        span: h.metric.span,
    });
    (require, health.collect())
}

fn no_condition(found: &Expr) -> Diag {
    Diag::error(format!("found `{found}`, expected a condition on a metric"))
        .label(found.span, "")
        .help("write `metric >= number` or `metric <= number`; the number may be an option")
}

pub(super) fn role_named<'r>(recipe: &'r ScopedRecipe, name: &str) -> Option<&'r RoleDecl> {
    recipe.recipe.models.iter().find(|role| role.name.text == name)
}

fn option_named<'r>(recipe: &'r ScopedRecipe, name: &str) -> Option<&'r Declaration> {
    recipe.recipe.options.iter().find(|option| option.name.text == name)
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
    let tables = [&STAGE].into_iter().chain(SETTINGS).flat_map(|table| table.keys.iter().map(|k| k.name));
    roles.chain(options).chain(tables)
}

fn run_settings(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    recipe: &ScopedRecipe,
    layers: &Layers<'_>,
) -> Vec<Decided> {
    let mut run: Vec<Decided> = RUN_RULES.iter().map(|rule| layers.decide(rule, &mut documents.errors)).collect();
    for decided in run.iter_mut().filter(|d| d.from == Provenance::Default) {
        if let Some(default) = option_named(recipe, &decided.key).and_then(|option| option.default.as_ref()) {
            decided.node = parsed(&resolved::value(&default.value));
            decided.from = Provenance::Recipe(recipe.name.clone());
        } else if let ("seed", Some(seed)) = (decided.key.as_ref(), &around.pipeline.seed) {
            Range::AtLeast(0.0).check("seed", seed, &mut documents.errors);
            *decided = Decided { key: "seed".into(), node: seed.clone(), from: Provenance::Given(seed.span) };
        }
    }
    for decided in &run {
        let what = match (decided.key.as_ref(), decided.constant()) {
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
        if TRAINING.find(&name).or_else(|| ROLE.find(&name)).is_some() {
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
                (parsed(&resolved::value(&default.value)), default.clone(), Provenance::Recipe(recipe.name.clone()))
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
        let all = rows.checked_mul(steps.count()?);
        if all.is_none() {
            let message = format!("found {} micro-batches of {rows} rows, which nobody can count", steps.text());
            documents.error(Diag::error(message).label(steps.node.span, ""));
        }
        return Some((all?, rows));
    }
    let batch = find("batch_size")?;
    let rows = batch.count()?;
    match micro.count() {
        Some(micro_rows) if micro_rows > rows && rows > 0 => {
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
                Provenance::Derived(format!("{micro} rows x {} micro-batches", steps.count().unwrap_or(1)))
            }
            _ => Provenance::Derived("the whole batch".into()),
        };
        Decided { node: parsed(&value.to_string()), from, ..d }
    });
    out.collect()
}

fn save(
    documents: &mut Documents<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    roles: &[BoundRole],
) -> Option<Vec<String>> {
    let trained = || roles.iter().filter(|r| r.trained).map(|r| r.name.clone()).collect();
    let names = match (&stage.save, &recipe.recipe.save) {
        (Some(names), _) | (None, Some(names)) => names,
        (None, None) => return Some(trained()),
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
pub(super) fn host_side(prepared: &Prepared, output_dir: &str, settings: &HostSettings) -> HostStage {
    let find = |key: &str| prepared.run.iter().find(|d| d.key == key);
    let count = |key: &str| find(key).and_then(Decided::count);
    let in_fp16 = |role: &&BoundRole| role.trained && roles::precision(role) == Some(DType::F16);
    HostStage {
        name: prepared.name.clone(),
        recipe: prepared.recipe.name.clone(),
        seed: count("seed").unwrap_or_default(),
        output_dir: format!("{output_dir}/{}", prepared.name),
        roles: prepared.roles.iter().map(|role| host_role(role, settings)).collect(),
        sources: prepared.sources.iter().map(|bound| bound.source.clone()).collect(),
        trainings: prepared.roles.iter().filter(|r| r.trained).map(roles::training).collect(),
        num_epochs: find("num_epochs").and_then(Decided::float).unwrap_or(1.0),
        max_steps: count("max_steps"),
        eval_steps: count("eval_steps"),
        logging_steps: count("logging_steps").unwrap_or(1),
        plan: prepared.planned.plan.clone(),
        evaluate: prepared.planned.evaluate.clone(),
        init: (!prepared.recipe.recipe.state.is_empty()).then(|| crate::lower::STATE_INIT.into()),
        // Graphs state them: they come with the program.
        asserts: Vec::new(),
        require: prepared.require.clone(),
        health: prepared.health.clone(),
        save: prepared.save.clone(),
        // The pass `share_prefix` says which.
        prefixes: Vec::new(),
        // The pass `split_stages` says which.
        pieces: BTreeMap::new(),
        memory: settings.memory.clone(),
        parallel: settings.parallel.said.clone(),
        checkpoints: settings.checkpoints.clone(),
        align_overflow: prepared.roles.iter().filter(in_fp16).count() > 1
            && find("align_overflow").is_some_and(|d| d.constant() == Constant::Bool(true)),
    }
}

fn host_role(role: &BoundRole, settings: &HostSettings) -> Role {
    Role {
        name: role.name.clone(),
        model: role.known.config.host.clone(),
        origin: match (&role.snapshot, &role.known.weights) {
            (Some(of), _) => Origin::Snapshot(of.clone()),
            (None, Weights::Random | Weights::Small) => Origin::Random,
            (None, Weights::Folder(folder)) => Origin::Folder(folder.clone()),
            (None, Weights::Stage(folder)) => Origin::Stage(folder.clone()),
        },
        init: crate::lower::init_graph(&role.name),
        trained: role.trained,
        precision: roles::precision(role),
        weights: roles::weights(role),
        zero_stage: roles::zero_stage(role).unwrap_or(settings.parallel.zero_stage),
        gather_for_generation: roles::is_on(role, "gather_for_generation"),
        offload_optimizer: roles::is_on(role, "offload_optimizer"),
        offload_param: roles::is_on(role, "offload_param"),
        tokenizer: role.known.tokenizer.as_ref().ok().map(|t| t.folder.clone()),
        // The pass `adapt` says which.
        shared: Vec::new(),
    }
}
