//! Settings: which of several places decides, and where the value came from.
//!
//! From weak to strong (D20): the built-in default, the recipe's, the pipeline's `defaults`, the stage, the role's block
//! in the stage, `--set`. Of keys that exclude each other (`batch_size` and `gradient_accumulation_steps`), the one that
//! was given at the stronger place counts; both at one place are an error.

use std::borrow::Cow;
use std::collections::BTreeSet;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::Pattern;

use crate::literal::{Constant, Literal, constant};
use crate::node::{self, Node, Value};
use crate::pipeline::Setting;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Provenance {
    /// Nobody set it.
    Default,
    /// A recipe suggests it.
    Recipe(String),
    /// It stands in a file, or in an argument of `--set`.
    Given(Span),
    /// It follows from others; says from which.
    Derived(String),
}

/// A setting that is decided.
#[derive(Clone, Debug)]
pub(super) struct Decided {
    pub key: Cow<'static, str>,
    pub node: Node,
    pub from: Provenance,
}

/// A built-in default, and the range of a number.
pub(super) struct Rule {
    pub key: &'static str,
    pub default: &'static str,
    pub range: Range,
}

/// What a number must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Range {
    /// Anything.
    Any,
    /// `low` or more.
    AtLeast(f64),
    /// More than `low`.
    Above(f64),
    /// At least the first, less than the second.
    Share,
}

impl Range {
    fn holds(self, x: f64) -> bool {
        x.is_finite()
            && match self {
                Range::Any => true,
                Range::AtLeast(low) => x >= low,
                Range::Above(low) => x > low,
                Range::Share => (0.0..1.0).contains(&x),
            }
    }

    fn expected(self) -> String {
        match self {
            Range::Any => "a number".into(),
            Range::AtLeast(low) => format!("{low} or more"),
            Range::Above(low) => format!("more than {low}"),
            Range::Share => "at least 0 and less than 1".into(),
        }
    }

    /// Notes a number outside of the range; lists are checked item by item.
    pub fn check(self, key: &str, node: &Node, errors: &mut Vec<Diag>) {
        match &node.value {
            Value::List(items) => items.iter().for_each(|item| self.check(key, item, errors)),
            Value::Scalar(text) => {
                if let Some(x) = constant(text).number().filter(|x| !self.holds(*x)) {
                    let found = if text.text.is_empty() { x.to_string() } else { text.text.clone() };
                    let expected = if x.is_finite() { self.expected() } else { "a finite number".into() };
                    errors.push(
                        Diag::error(format!("found {found} for `{key}`, expected {expected}")).label(node.span, ""),
                    );
                }
            }
            Value::Map(_) | Value::Null | Value::Bad => {}
        }
    }
}

const fn rule(key: &'static str, default: &'static str, range: Range) -> Rule {
    Rule { key, default, range }
}

/// Defaults of [`crate::pipeline::RUN`]; the others follow from these.
pub(super) const RUN_RULES: &[Rule] = &[
    // As in Hugging Face's trainer.
    rule("seed", "42", Range::AtLeast(0.0)),
    rule("batch_size", "16", Range::AtLeast(1.0)),
    rule("micro_batch_size", "none", Range::AtLeast(1.0)),
    rule("gradient_accumulation_steps", "none", Range::AtLeast(1.0)),
    rule("packing", "auto", Range::Any),
    rule("align_overflow", "true", Range::Any),
    rule("loss_normalization", "batch", Range::Any),
    rule("num_epochs", "1", Range::Above(0.0)),
    rule("max_steps", "none", Range::AtLeast(1.0)),
    rule("eval_steps", "none", Range::AtLeast(1.0)),
    rule("logging_steps", "10", Range::AtLeast(1.0)),
];

/// Defaults of [`crate::pipeline::ROLE`].
pub(super) const ROLE_RULES: &[Rule] = &[
    rule("bf16", "false", Range::Any),
    rule("fp16", "false", Range::Any),
    rule("weights", "f32", Range::Any),
    rule("weights_group", "64", Range::Any),
    // What stands in `compile`.
    rule("zero_stage", "none", Range::AtLeast(0.0)),
    rule("offload_optimizer", "false", Range::Any),
    rule("offload_param", "false", Range::Any),
    // As in TRL.
    rule("gather_for_generation", "true", Range::Any),
];

/// Defaults of [`crate::pipeline::TRAINING`].
pub(super) const TRAINING_RULES: &[Rule] = &[
    // As in Hugging Face's trainer.
    rule("learning_rate", "5e-5", Range::AtLeast(0.0)),
    rule("lr_scheduler_type", "linear", Range::Any),
    rule("warmup_steps", "0", Range::AtLeast(0.0)),
    rule("warmup_ratio", "0.0", Range::Share),
    rule("optimizer", "adamw", Range::Any),
    // As in DeepSpeed-Chat; the longer memory of 0.999 is for longer runs.
    rule("adam_betas", "[0.9, 0.95]", Range::Share),
    rule("adam_eps", "1e-8", Range::Above(0.0)),
    rule("weight_decay", "0.0", Range::AtLeast(0.0)),
    // Biases and all norms, by the names that models of Hugging Face give them. DeepSpeed-Chat's list lacks GPT-2's `ln_1`
    // and `ln_2`.
    rule("no_decay", "[bias, norm.weight, ln_1.weight, ln_2.weight, ln_f.weight]", Range::Any),
    rule("max_grad_norm", "1.0", Range::Above(0.0)),
    rule("freeze", "[]", Range::Any),
    rule("lora_r", "none", Range::AtLeast(1.0)),
    // What these are without a value follows from `lora_r`.
    rule("lora_alpha", "none", Range::Above(0.0)),
    rule("lora_dropout", "none", Range::Share),
    rule("lora_target_modules", "none", Range::Any),
    rule("lora_save", "none", Range::Any),
    rule("lora_continue", "none", Range::Any),
];

/// Places that set something, from weak to strong.
pub(super) struct Layers<'a> {
    layers: Vec<Layer<'a>>,
    /// Sources that are arguments of `--set`.
    sets: &'a BTreeSet<u32>,
}

struct Layer<'a> {
    /// The recipe, if the settings are its suggestions.
    recipe: Option<String>,
    settings: &'a [Setting],
}

impl<'a> Layers<'a> {
    pub fn new(sets: &'a BTreeSet<u32>) -> Layers<'a> {
        Layers { layers: Vec::new(), sets }
    }

    /// The suggestions of a recipe.
    pub fn with_recipe(mut self, recipe: &str, settings: &'a [Setting]) -> Layers<'a> {
        self.layers.push(Layer { recipe: Some(recipe.into()), settings });
        self
    }

    /// Something stronger than all before.
    pub fn with(mut self, settings: &'a [Setting]) -> Layers<'a> {
        self.layers.push(Layer { recipe: None, settings });
        self
    }

    /// The strongest setting of a key, how strong it is, and where it comes from.
    pub fn find(&self, key: &str) -> Option<(usize, &'a Setting, Provenance)> {
        let hits = self.layers.iter().enumerate().filter_map(|(at, layer)| {
            let setting = layer.settings.iter().find(|s| s.key.text == key)?;
            let from = match &layer.recipe {
                Some(recipe) => Provenance::Recipe(recipe.clone()),
                None => Provenance::Given(setting.value.span),
            };
            let set = self.sets.contains(&setting.key.span.source);
            Some((if set { self.layers.len() } else { at }, setting, from))
        });
        hits.max_by_key(|hit| hit.0)
    }

    /// What counts for a rule's key, in the rule's range.
    pub fn decide(&self, rule: &'static Rule, errors: &mut Vec<Diag>) -> Decided {
        match self.find(rule.key) {
            Some((_, setting, from)) => {
                rule.range.check(rule.key, &setting.value, errors);
                Decided { key: rule.key.into(), node: setting.value.clone(), from }
            }
            None => Decided { key: rule.key.into(), node: parsed(rule.default), from: Provenance::Default },
        }
    }

    /// Of two keys that exclude each other, whether the second counts.
    pub fn second_counts(&self, first: &str, second: &str, errors: &mut Vec<Diag>) -> bool {
        match (self.find(first), self.find(second)) {
            (Some((a, first, _)), Some((b, second, _))) if a == b => {
                errors.push(
                    Diag::error(format!(
                        "found `{}` beside `{}`, expected one of them",
                        second.key.text, first.key.text
                    ))
                    .label(second.key.span, "")
                    .label(first.key.span, "the other one"),
                );
                false
            }
            (first, Some((b, ..))) => first.is_none_or(|(a, ..)| a < b),
            _ => false,
        }
    }
}

/// A text of ours as a node without a place.
pub(super) fn parsed(text: &str) -> Node {
    let mut errors = Vec::new();
    let node = node::parse(0, text, &mut errors);
    let mut node = node.filter(|_| errors.is_empty()).unwrap_or_else(|| panic!("bug: `{text}` is no YAML value"));
    place_nowhere(&mut node);
    node
}

fn place_nowhere(node: &mut Node) {
    node.span = Span::NONE;
    if let Value::List(items) = &mut node.value {
        items.iter_mut().for_each(place_nowhere);
    }
}

/// Reading what has the right form already: the readers of pipelines check every known key.
impl Decided {
    pub fn constant(&self) -> Constant {
        literal(&self.node).value
    }

    pub fn float(&self) -> Option<f64> {
        self.constant().number()
    }

    pub fn count(&self) -> Option<u64> {
        match self.constant() {
            Constant::Int(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    pub fn text(&self) -> &str {
        self.node.scalar().map_or("", |t| &t.text)
    }

    pub fn words(&self) -> Vec<String> {
        match &self.node.value {
            Value::List(items) => items.iter().filter_map(|n| n.scalar()).map(|t| t.text.clone()).collect(),
            _ => self.node.scalar().map(|t| t.text.clone()).into_iter().collect(),
        }
    }

    /// The words with their places.
    pub fn patterns(&self) -> Vec<Pattern> {
        let nodes = match &self.node.value {
            Value::List(items) => &items[..],
            _ => std::slice::from_ref(&self.node),
        };
        let words = nodes.iter().filter_map(|node| Some((node.scalar()?, node.span)));
        words.map(|(text, span)| Pattern { glob: text.text.clone(), span }).collect()
    }

    pub fn floats(&self) -> Vec<f64> {
        match self.constant() {
            Constant::List(items) => items.iter().filter_map(|x| x.value.number()).collect(),
            _ => Vec::new(),
        }
    }
}

/// A node as a value; `none` where it is none, which the readers have reported.
pub(super) fn literal(node: &Node) -> Literal {
    Literal::read(node, &mut Vec::new()).unwrap_or(Literal { span: node.span, value: Constant::None })
}

/// Bytes of a size with its unit: `512 MiB`, `1.5GiB`, `2GB`.
pub(super) fn bytes(given: &Constant) -> Option<usize> {
    const UNITS: [(&str, f64); 6] = [
        ("KiB", 1024.0),
        ("MiB", 1024.0 * 1024.0),
        ("GiB", 1024.0 * 1024.0 * 1024.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
    ];
    let Constant::Str(text) = given else { return None };
    let (number, unit) = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)))?;
    let size = number.trim_end().parse::<f64>().ok()? * unit;
    (size >= 1.0 && size <= 2f64.powi(60)).then_some(size as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{ROLE, RUN, TRAINING};
    use crate::schema::Table;

    fn assert_covers(rules: &[Rule], table: &Table) {
        let ruled: Vec<&str> = rules.iter().map(|r| r.key).collect();
        let known: Vec<&str> = table.keys.iter().map(|k| k.name).collect();
        assert_eq!(ruled, known);
    }

    #[test]
    fn sizes_have_a_unit() {
        let read = |text: &str| bytes(&Constant::Str(text.into()));
        assert_eq!(read("2GiB"), Some(2 << 30));
        assert_eq!(read("1.5 KiB"), Some(1536));
        assert_eq!(read("2GB"), Some(2_000_000_000));
        assert_eq!(
            (read("2"), read("GiB"), read("-1GiB"), read("infGiB"), read("2 gib")),
            (None, None, None, None, None)
        );
        assert_eq!(bytes(&Constant::Int(2)), None);
    }

    #[test]
    fn every_setting_has_a_default() {
        assert_covers(RUN_RULES, &RUN);
        assert_covers(TRAINING_RULES, &TRAINING);
        assert_covers(ROLE_RULES, &ROLE);
    }
}
