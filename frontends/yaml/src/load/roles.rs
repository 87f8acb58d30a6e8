//! The roles of a recipe: which model each is bound to, and how it is trained.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, nearest};
use dsgc_ir::stage::{Optimizer, Schedule, ScheduleKind, Training};
use dsgc_ir::{DType, Quantized};

use crate::expr::Word;
use crate::graph::RoleDecl;
use crate::literal::Constant;
use crate::node::{Node, Value};
use crate::pipeline::{ROLE, Setting, Stage, TRAINING};
use crate::reader::Reader;
use crate::schema::{unknown_key, words};

use super::declared::shown;
use super::documents::{Documents, ScopedRecipe};
use super::heads::{self, Trunk};
use super::lora;
use super::models::{Known, looks_like_path};
use super::settings::{Decided, Layers, ROLE_RULES, TRAINING_RULES};
use super::stage::{Surroundings, role_named};

/// A role with its model.
pub(super) struct BoundRole {
    pub name: String,
    /// What the stage binds it to.
    pub bound_to: String,
    pub known: Known,
    /// The role whose parameters it begins with, if it is bound to no model of its own.
    pub snapshot: Option<String>,
    pub trained: bool,
    /// The settings of every role.
    pub settings: Vec<Decided>,
    /// The settings of its training, if it is trained.
    pub training: Vec<Decided>,
}

/// Settings by role: `actor: {model: sft, learning_rate: 1e-6}`.
pub(super) type Blocks = BTreeMap<String, Vec<Setting>>;

pub(super) fn blocks(documents: &mut Documents<'_>, stage: &Stage, recipe: &ScopedRecipe) -> Blocks {
    let mut blocks = Blocks::new();
    for setting in &stage.settings {
        let (Some(role), Value::Map(entries)) = (role_named(recipe, &setting.key.text), &setting.value.value) else {
            continue;
        };
        let mut settings = Vec::new();
        for (key, value) in entries {
            if let Some(def) = TRAINING.find(&key.text).or_else(|| ROLE.find(&key.text)) {
                let mut reader = Reader::default();
                reader.check(value, &def.form);
                documents.errors.append(&mut reader.errors);
                if !role.trained && ROLE.find(&key.text).is_none() {
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
                let known = ROLE.keys.iter().chain(TRAINING.keys).map(|k| k.name).chain(["model"]);
                documents.error(unknown_key(key, &format!("the settings of role `{}`", role.name.text), known));
            }
        }
        blocks.insert(setting.key.text.clone(), settings);
    }
    blocks
}

/// The roles of a stage with their models, and whether none is missing.
pub(super) fn roles(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    recipe: &ScopedRecipe,
    values: &BTreeMap<String, Constant>,
    earlier: &[(String, Known)],
    blocks: &Blocks,
) -> (Vec<BoundRole>, bool) {
    let (mut bound, mut complete) = (Vec::<BoundRole>::new(), true);
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
        let setting = stage.settings.iter().find(|s| s.key.text == role.name.text);
        let named: Option<&Node> = match setting.map(|s| &s.value) {
            Some(Node { value: Value::Map(_), .. }) => {
                blocks.get(&role.name.text).and_then(|b| b.iter().find(|s| s.key.text == "model")).map(|s| &s.value)
            }
            other => other,
        };
        if let (Some(average), Some(node)) = (&role.average, named) {
            let message = format!("found a model for `{}`, which is the average of `{}`", role.name.text, average.text);
            documents.error(Diag::error(message).label(node.span, "").label(role.name.span, "the role"));
            continue;
        }
        let (bound_to, known, snapshot) = match (named, role.snapshot.as_ref().or(role.average.as_ref())) {
            (Some(node), _) => match find_model(documents, around, stage, node, earlier) {
                Some((name, known)) => (name, known, None),
                None => {
                    complete = false;
                    continue;
                }
            },
            (None, Some(of)) => match bound.iter().find(|b| b.name == of.text) {
                Some(original) => (original.bound_to.clone(), original.known.clone(), Some(of.text.clone())),
                None => {
                    complete = false;
                    // Of a role that could not be bound nothing more needs to be said.
                    if role_named(recipe, &of.text).is_none() {
                        documents.error(Diag::error(format!("unknown role `{}`", of.text)).label(of.span, ""));
                    } else if bound_later(recipe, &role.name, of) {
                        let message = format!("found `{}` before `{}`, whose copy it is", role.name.text, of.text);
                        documents.error(Diag::error(message).label(of.span, "").help("name it after that role"));
                    }
                    continue;
                }
            },
            (None, None) => {
                unbound(documents, around, stage, role, earlier);
                continue;
            }
        };
        let Some(known) = as_typed(documents, role, named, known) else { continue };
        bound.push(BoundRole {
            name: role.name.text.clone(),
            bound_to,
            known,
            snapshot,
            trained: role.trained,
            settings: Vec::new(),
            training: Vec::new(),
        });
    }
    (bound, complete)
}

/// Whether a role stands before the one that it copies.
fn bound_later(recipe: &ScopedRecipe, role: &Word, of: &Word) -> bool {
    let at = |name: &str| recipe.recipe.models.iter().position(|r| r.name.text == name);
    at(&role.text) <= at(&of.text)
}

/// The model as the role's type wants it: with a head of that name over it, unless it has the outputs of one.
fn as_typed(documents: &mut Documents<'_>, role: &RoleDecl, named: Option<&Node>, known: Known) -> Option<Known> {
    let Some(ty) = role.ty.as_ref().filter(|ty| ty.text != "any") else { return Some(known) };
    let head = if ty.text == "causal_lm" { None } else { Some(heads::head(documents, ty)?) };
    let found = heads::outputs(&known.document.model);
    let wanted = head.as_ref().map_or(vec!["logits"], |head| heads::outputs(&head.model));
    let Some(missing) = wanted.into_iter().find(|output| !found.contains(output)) else { return Some(known) };
    match head {
        Some(head) if known.trunk.is_none() => {
            let Known { document, config, weights, adapter, tokenizer, .. } = known;
            let trunk = Trunk { document, config };
            let pad = tokenizer.as_ref().ok().and_then(|t| t.facts.pad.or(t.facts.eos));
            let config = heads::config_over(documents, &head, &trunk, &role.name, pad)?;
            Some(Known { document: head, config, trunk: Some(trunk), weights, adapter, tokenizer })
        }
        _ => {
            documents.error(
                Diag::error(format!("role `{}` needs a model with the output `{missing}`", role.name.text))
                    .label(named.map_or(role.name.span, |n| n.span), format!("`{}` has none", known.config.host.family))
                    .label(role.name.span, "the role"),
            );
            None
        }
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
        match at(name) < at(&stage.name.text) {
            true if documents.errors.is_empty() => diag.help(format!("stage `{name}` saves no model: see its `save`")),
            true => return None,
            false => diag.help(format!("stage `{name}` comes later: move it before `{}`", stage.name.text)),
        }
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

pub(super) fn trainings(
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
        lora::settle(&mut role.training, &role.known, &mut documents.errors);
        for decided in &role.training {
            if decided.key == "adam_betas" && decided.floats().len() != 2 {
                documents.error(
                    Diag::error(format!("found {} values for `adam_betas`, expected 2", decided.floats().len()))
                        .label(decided.node.span, ""),
                );
            }
        }
    }
}

/// What holds for every role, trained or not.
pub(super) fn precisions(
    documents: &mut Documents<'_>,
    around: &Surroundings<'_>,
    stage: &Stage,
    blocks: &Blocks,
    roles: &mut [BoundRole],
) {
    for role in roles {
        let layers = Layers::new(&around.places.sets)
            .with(&around.pipeline.defaults)
            .with(&stage.settings)
            .with(blocks.get(&role.name).map_or(&[], |b| b));
        role.settings = ROLE_RULES.iter().map(|rule| layers.decide(rule, &mut documents.errors)).collect();
        let on =
            |key: &str| role.settings.iter().find(|d| d.key == key).filter(|d| d.constant() == Constant::Bool(true));
        if let (Some(bf16), Some(fp16)) = (on("bf16"), on("fp16")) {
            let diag =
                Diag::error(format!("found `bf16` beside `fp16` for role `{}`, expected one of them", role.name));
            documents.error(diag.label(fp16.node.span, "").label(bf16.node.span, "the other one"));
        }
        let find = |key: &str| role.settings.iter().find(|d| d.key == key).expect("every rule decides");
        let zero = find("zero_stage");
        if zero.count().is_some_and(|stage| stage > 3) {
            let message = format!("found {} as `zero_stage` of role `{}`, expected 0 to 3", zero.text(), role.name);
            documents.error(Diag::error(message).label(zero.node.span, ""));
        }
        let (weights, group) = (find("weights"), find("weights_group"));
        let size = group.count().unwrap_or_default() as usize;
        if Quantized::new(8, size).is_none() {
            let message = format!("found {} for `weights_group`, expected 32, 64 or 128", group.text());
            documents.error(Diag::error(message).label(group.node.span, ""));
            continue;
        }
        // A product takes weights in fewer bits than it computes in.
        let other = match DType::of_weights(weights.text(), size) {
            Some(DType::F16) => on("bf16"),
            Some(DType::Bf16) => on("fp16"),
            _ => None,
        };
        if let Some(other) = other {
            let message = format!(
                "found weights in {} for role `{}`, which computes in {}",
                weights.text(),
                role.name,
                other.key
            );
            let diag = Diag::error(message).label(weights.node.span, "").label(other.node.span, "here");
            documents
                .error(diag.help("write `int8` or `int4`, or leave it: its weights are as narrow where they can be"));
        }
    }
}

/// What a role's weights are kept in, if not in f32.
pub(super) fn weights(role: &BoundRole) -> Option<DType> {
    let find = |key: &str| role.settings.iter().find(|d| d.key == key).expect("every rule decides");
    let group = find("weights_group").count().unwrap_or_default() as usize;
    DType::of_weights(find("weights").text(), group).filter(|dtype| *dtype != DType::F32)
}

/// The narrow float that a role computes in.
pub(super) fn precision(role: &BoundRole) -> Option<DType> {
    [("bf16", DType::Bf16), ("fp16", DType::F16)].into_iter().find(|(key, _)| is_on(role, key)).map(|(_, dtype)| dtype)
}

/// Whether a setting of a role is `true`.
pub(super) fn is_on(role: &BoundRole, key: &str) -> bool {
    role.settings.iter().any(|d| d.key == key && d.constant() == Constant::Bool(true))
}

/// What ranks with different rows share out of a role, if it says so itself.
pub(super) fn zero_stage(role: &BoundRole) -> Option<u8> {
    role.settings.iter().find(|d| d.key == "zero_stage")?.count().and_then(|stage| u8::try_from(stage).ok())
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
        freeze: find("freeze").patterns(),
        lora: lora::lora(&role.training),
    }
}
