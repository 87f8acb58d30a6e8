//! The config of a model: from a Hugging Face `config.json` by the rules of the model's `from_hf`, and back (D26).
//!
//! ```text
//! vocab: vocab_size                                  reads and writes `vocab_size`
//! embed: default(word_embed_proj_dim, hidden_size)   the first that is there; writes `word_embed_proj_dim`
//! final_norm: not default(_remove_final_norm, false) writes the opposite
//! ```
//!
//! A model with random weights has no `config.json` yet. Its given values and declared defaults are written into an
//! empty one; an entry without a value is then read from that, as it would be from a folder. So what is written always
//! reads back as the same model.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::Model as HostModel;
use serde_json::{Map, Value as Json};

use crate::expr::{Arg, Expr, ExprKind, Item, UnaryOp, Word};
use crate::graph::Declaration;
use crate::literal::{Constant, Literal};
use crate::model::{ConfigRule, FromHf, Model};
use crate::schema::words;

use super::TokenizerFacts;
use super::declared::{missing, shown, typed};
use super::settings::Provenance;

/// A value of the config.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    pub value: Constant,
    pub from: Provenance,
}

/// A model's config, and what is written beside its weights.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub entries: Vec<Entry>,
    pub host: HostModel,
}

impl Config {
    /// Longest row in tokens that the model takes, where its config.json says so.
    pub fn positions(&self) -> Option<usize> {
        self.host.config.get("max_position_embeddings")?.as_u64().map(|n| n as usize)
    }

    /// Number of tokens that the model knows, where its config.json says so.
    pub fn vocabulary(&self) -> Option<usize> {
        self.host.config.get("vocab_size")?.as_u64().map(|n| n as usize)
    }
}

/// Keys of a config.json that say what the file is, not how the model computes; kept, and no news to anyone.
const ABOUT: [&str; 10] = [
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "num_labels",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
];

/// Where a config is asked for, for messages.
pub(super) struct Asked<'a> {
    /// The model's name in the pipeline.
    pub name: &'a str,
    /// The place that names the model.
    pub span: Span,
    /// The folder, for messages; `None` for random weights.
    pub folder: Option<&'a str>,
}

/// The config of a folder's model; `given` values of the pipeline win.
pub(super) fn from_folder(
    model: &Model,
    json: Map<String, Json>,
    given: &[(Word, Literal)],
    asked: &Asked<'_>,
    errors: &mut Vec<Diag>,
) -> Option<Config> {
    let before = errors.len();
    if let Some(rules) = &model.from_hf {
        required(rules, &json, asked, errors);
    }
    let mut entries = Vec::new();
    for declared in &model.config {
        let entry = match given.iter().find(|(name, _)| name.text == declared.name.text) {
            Some((name, literal)) => from_given(declared, name, literal),
            None => from_json(model, declared, &json, asked),
        };
        match entry {
            Ok(entry) => entries.push(entry),
            Err(diag) => errors.push(diag),
        }
    }
    if errors.len() > before {
        return None;
    }
    let mut written = json.clone();
    if let Some(rules) = &model.from_hf {
        for entry in entries.iter().filter(|e| given.iter().any(|(name, _)| name.text == e.name)) {
            write(rules, &entry.name, &entry.value, &mut written);
        }
    }
    let used = |key: &str| ABOUT.contains(&key) || model.from_hf.as_ref().is_some_and(|rules| rules.reads(key));
    let unused = json.keys().filter(|key| !used(key)).cloned().collect();
    Some(Config { entries, host: host(model, written, unused) })
}

/// The config of a model with random weights.
pub(super) fn from_scratch(
    model: &Model,
    given: &[(Word, Literal)],
    tokenizer: Option<&TokenizerFacts>,
    asked: &Asked<'_>,
    errors: &mut Vec<Diag>,
) -> Option<Config> {
    let before = errors.len();
    let mut json = Map::new();
    if let Some(rules) = &model.from_hf {
        let architectures: Vec<Json> = rules.architectures.iter().take(1).map(|a| a.text.clone().into()).collect();
        json.insert("architectures".into(), architectures.into());
        json.insert("model_type".into(), model.name.text.clone().into());
        json.insert("dtype".into(), "float32".into());
        for (key, literal) in &rules.require {
            json.insert(key.text.clone(), to_json(&literal.value));
        }
    }
    if let Some(facts) = tokenizer {
        json.insert("vocab_size".into(), facts.vocab.into());
        for (key, id) in [("pad_token_id", facts.pad), ("bos_token_id", facts.bos), ("eos_token_id", facts.eos)] {
            json.insert(key.into(), id.map_or(Json::Null, Json::from));
        }
    }
    let mut entries: Vec<Option<Entry>> = Vec::new();
    for declared in &model.config {
        let entry = match (given.iter().find(|(name, _)| name.text == declared.name.text), &declared.default) {
            (Some((name, literal)), _) => Some(from_given(declared, name, literal)),
            (None, Some(default)) => {
                Some(typed(declared, default).map(|value| entry(declared, value, Provenance::Default)))
            }
            (None, None) => None,
        };
        let entry = match entry.transpose() {
            Ok(entry) => entry,
            Err(diag) => {
                errors.push(diag);
                continue;
            }
        };
        if let (Some(entry), Some(rules)) = (&entry, &model.from_hf) {
            write(rules, &entry.name, &entry.value, &mut json);
        }
        entries.push(entry);
    }
    if errors.len() > before {
        return None;
    }
    let mut whole = Vec::new();
    // Those that follow from others come last: what they follow from may be what is missing.
    let mut open: Vec<(&Declaration, Option<Entry>)> = model.config.iter().zip(entries).collect();
    open.sort_by_key(|(declared, _)| rule_of(model, &declared.name.text).is_some_and(|r| r.from.name().is_none()));
    for (declared, entry) in open {
        match entry.map_or_else(|| from_json(model, declared, &json, asked), Ok) {
            Ok(entry) => {
                if let Some(rules) = &model.from_hf {
                    write(rules, &entry.name, &entry.value, &mut json);
                }
                whole.push(entry);
            }
            Err(diag)
                if errors.len() == before
                    || rule_of(model, &declared.name.text).is_none_or(|r| r.from.name().is_some()) =>
            {
                errors.push(diag);
            }
            Err(_) => {}
        }
    }
    let place = |entry: &Entry| model.config.iter().position(|d| d.name.text == entry.name);
    whole.sort_by_key(place);
    (errors.len() == before).then(|| Config { entries: whole, host: host(model, json, Vec::new()) })
}

fn host(model: &Model, config: Map<String, Json>, unused: Vec<String>) -> HostModel {
    let tensors = model.from_hf.as_ref().map(|rules| rules.tensors.clone()).unwrap_or_default();
    HostModel { family: model.name.text.clone(), config, tensors, unused }
}

fn entry(declared: &Declaration, value: Constant, from: Provenance) -> Entry {
    Entry { name: declared.name.text.clone(), value, from }
}

fn from_given(declared: &Declaration, name: &Word, literal: &Literal) -> Result<Entry, Diag> {
    typed(declared, literal).map(|value| entry(declared, value, Provenance::Given(name.span)))
}

fn rule_of<'m>(model: &'m Model, name: &str) -> Option<&'m ConfigRule> {
    let rules = model.from_hf.as_ref()?;
    rules.config.iter().find(|(n, _)| n.text == name).map(|(_, rule)| rule)
}

fn from_json(
    model: &Model,
    declared: &Declaration,
    json: &Map<String, Json>,
    asked: &Asked<'_>,
) -> Result<Entry, Diag> {
    let what = match asked.folder {
        Some(folder) => format!("`{folder}/config.json`"),
        None => format!("model `{}`", asked.name),
    };
    let read = rule_of(model, &declared.name.text).map(|rule| (rule, resolve(&rule.from, json)));
    let (rule, expr) = match (read, &declared.default) {
        (Some((rule, Ok(expr))), _) => (rule, expr),
        // transformers has defaults for absent keys too; a model document declares them.
        (_, Some(default)) => return typed(declared, default).map(|value| entry(declared, value, Provenance::Default)),
        (Some((rule, Err(key))), None) if asked.folder.is_some() => {
            return Err(Diag::error(format!("found no `{key}` in {what}"))
                .label(asked.span, "")
                .label(rule.from.span, format!("`{}` is read from it", declared.name.text)));
        }
        (_, None) => return Err(missing(declared, &what, asked.span)),
    };
    let value = crate::eval::constant(&expr)?;
    let (value, from) = match &rule.names {
        None => (value, rule.from.to_string()),
        Some(names) => {
            let theirs = match &value {
                Constant::Str(text) => text.clone(),
                other => other.to_string(),
            };
            let Some((_, ours)) = names.iter().find(|(name, _)| name.text == theirs) else {
                let known: Vec<&str> = names.iter().map(|(name, _)| name.text.as_str()).collect();
                return Err(Diag::error(format!(
                    "found {} for `{}` in {what}, expected one of {}",
                    shown(&value),
                    declared.name.text,
                    words(&known)
                ))
                .label(asked.span, "")
                .label(rule.from.span, "what is known"));
            };
            (Constant::Str(ours.text.clone()), rule.from.to_string())
        }
    };
    let literal = Literal { span: asked.span, value };
    let from = Provenance::Derived(if asked.folder.is_some() { format!("config.json: {from}") } else { from });
    typed(declared, &literal).map(|value| entry(declared, value, from))
}

fn required(rules: &FromHf, json: &Map<String, Json>, asked: &Asked<'_>, errors: &mut Vec<Diag>) {
    for (key, wanted) in &rules.require {
        let Some(found) = lookup(json, &key.text) else { continue };
        let found = from_json_value(found);
        let equal = found.equals(&wanted.value);
        if !equal {
            let folder = asked.folder.unwrap_or_default();
            errors.push(
                Diag::error(format!(
                    "found {} for `{}` in `{folder}/config.json`, expected {}",
                    shown(&found),
                    key.text,
                    shown(&wanted.value)
                ))
                .label(asked.span, "")
                .label(key.span, "this model implements nothing else"),
            );
        }
    }
}

impl FromHf {
    /// The config entry that is read from this key of config.json.
    pub(super) fn entry_read_from(&self, key: &str) -> Option<&str> {
        let rule = self
            .config
            .iter()
            .find(|(_, rule)| bare_path(&rule.from, &Constant::Bool(true)).is_some_and(|p| p.0 == key));
        rule.map(|(name, _)| name.text.as_str())
    }

    /// Whether a rule reads this key of config.json.
    fn reads(&self, key: &str) -> bool {
        let names = self.config.iter().any(|(_, rule)| mentions(&rule.from, key));
        names || self.require.iter().any(|(name, _)| first_part(&name.text) == key)
    }
}

fn first_part(path: &str) -> &str {
    path.split('.').next().unwrap_or(path)
}

fn mentions(expr: &Expr, key: &str) -> bool {
    let mut found = false;
    visit(expr, &mut |name| found |= first_part(name) == key);
    found
}

fn visit(expr: &Expr, see: &mut impl FnMut(&str)) {
    match &expr.kind {
        ExprKind::Name(name) => see(name),
        ExprKind::Member(base, _) => visit(base, see),
        ExprKind::Call { args, .. } => args.iter().for_each(|arg| visit(&arg.value, see)),
        ExprKind::Index { base, items } => {
            visit(base, see);
            for item in items {
                if let Item::At(at) = item {
                    visit(at, see);
                }
            }
        }
        ExprKind::Unary(_, x) => visit(x, see),
        ExprKind::Binary(_, a, b) => [a, b].into_iter().for_each(|x| visit(x, see)),
        ExprKind::If { condition, then, otherwise } => {
            [condition, then, otherwise].into_iter().for_each(|x| visit(x, see));
        }
        ExprKind::List(items) => items.iter().for_each(|x| visit(x, see)),
        ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) | ExprKind::Bool(_) | ExprKind::None => {}
    }
}

/// A rule with the values of config.json in place of its paths; the path that is absent otherwise.
fn resolve(expr: &Expr, json: &Map<String, Json>) -> Result<Expr, String> {
    let go = |x: &Expr| resolve(x, json);
    let boxed = |x: &Expr| resolve(x, json).map(Box::new);
    let kind = match &expr.kind {
        ExprKind::Name(path) => constant_expr(from_json_value(lookup(json, path).ok_or(path)?)),
        ExprKind::Call { function, args } if function.text == "default" => {
            let mut absent = String::from("default()");
            for arg in args {
                match go(&arg.value) {
                    Ok(found) => return Ok(Expr { span: expr.span, ..found }),
                    Err(path) => absent = path,
                }
            }
            return Err(absent);
        }
        ExprKind::Call { function, args } => {
            let args: Result<Vec<Arg>, String> =
                args.iter().map(|arg| go(&arg.value).map(|value| Arg { name: arg.name.clone(), value })).collect();
            ExprKind::Call { function: function.clone(), args: args? }
        }
        ExprKind::Unary(op, x) => ExprKind::Unary(*op, boxed(x)?),
        ExprKind::Binary(op, a, b) => ExprKind::Binary(*op, boxed(a)?, boxed(b)?),
        ExprKind::If { condition, then, otherwise } => {
            ExprKind::If { condition: boxed(condition)?, then: boxed(then)?, otherwise: boxed(otherwise)? }
        }
        ExprKind::List(items) => ExprKind::List(items.iter().map(go).collect::<Result<_, _>>()?),
        other => other.clone(),
    };
    Ok(Expr { span: expr.span, kind })
}

/// The value at a path with dots; `null` is as good as absent.
fn lookup<'j>(json: &'j Map<String, Json>, path: &str) -> Option<&'j Json> {
    let mut parts = path.split('.');
    let mut at = json.get(parts.next()?)?;
    for part in parts {
        at = at.as_object()?.get(part)?;
    }
    (!at.is_null()).then_some(at)
}

/// Writes an entry to where its rule would read it first.
fn write(rules: &FromHf, name: &str, value: &Constant, json: &mut Map<String, Json>) {
    let Some((_, rule)) = rules.config.iter().find(|(n, _)| n.text == name) else { return };
    let theirs =
        rule.names.as_ref().and_then(|names| names.iter().find(|(_, ours)| *value == Constant::Str(ours.text.clone())));
    let value = theirs.map_or_else(|| value.clone(), |(theirs, _)| Constant::Str(theirs.text.clone()));
    if let Some((path, value)) = bare_path(&rule.from, &value) {
        put(json, &path, to_json(&value));
    }
}

/// The first bare path of a rule, and the value there under which the rule gives `value`.
fn bare_path(expr: &Expr, value: &Constant) -> Option<(String, Constant)> {
    match (&expr.kind, value) {
        (ExprKind::Name(path), _) => Some((path.clone(), value.clone())),
        (ExprKind::Call { function, args }, _) if function.text == "default" => bare_path(&args.first()?.value, value),
        (ExprKind::Unary(UnaryOp::Not, inner), Constant::Bool(b)) => bare_path(inner, &Constant::Bool(!b)),
        _ => None,
    }
}

fn put(json: &mut Map<String, Json>, path: &str, value: Json) {
    match path.split_once('.') {
        None => drop(json.insert(path.into(), value)),
        Some((first, rest)) => {
            let inner = json.entry(first).or_insert_with(|| Json::Object(Map::new()));
            if !inner.is_object() {
                *inner = Json::Object(Map::new());
            }
            if let Json::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

fn to_json(value: &Constant) -> Json {
    match value {
        Constant::Int(n) => (*n).into(),
        Constant::Float(x) => (*x).into(),
        Constant::Bool(b) => (*b).into(),
        Constant::Str(s) => s.clone().into(),
        Constant::None => Json::Null,
        Constant::List(items) => items.iter().map(|x| to_json(&x.value)).collect::<Vec<_>>().into(),
    }
}

fn from_json_value(json: &Json) -> Constant {
    match json {
        Json::Number(n) => n.as_i64().map_or_else(|| Constant::Float(n.as_f64().unwrap_or(f64::NAN)), Constant::Int),
        Json::Bool(b) => Constant::Bool(*b),
        Json::String(s) => Constant::Str(s.clone()),
        Json::Array(items) => {
            Constant::List(items.iter().map(|x| Literal { span: Span::NONE, value: from_json_value(x) }).collect())
        }
        // What is no value of the language cannot be compared to one; an object equals nothing.
        Json::Null | Json::Object(_) => Constant::None,
    }
}

fn constant_expr(value: Constant) -> ExprKind {
    match value {
        Constant::Int(n) => ExprKind::Int(n),
        Constant::Float(x) => ExprKind::Float(x),
        Constant::Bool(b) => ExprKind::Bool(b),
        Constant::Str(s) => ExprKind::Str(s),
        Constant::None => ExprKind::None,
        Constant::List(items) => {
            ExprKind::List(items.into_iter().map(|x| Expr { span: x.span, kind: constant_expr(x.value) }).collect())
        }
    }
}
