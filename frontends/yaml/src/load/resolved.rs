//! What `check --resolved` prints: the pipeline with every default filled in, and beside each value where it came from.
//!
//! The text is a pipeline again. Saved beside the original it loads to the same stages.

use std::fmt::Write;
use std::path::Path;

use dsgc_ir::diag::Sources;

use crate::expr::Word;
use crate::literal::{Constant, constant};
use crate::node::{Node, Value};
use crate::text::{Style, Text};

use super::config::Entry;
use super::settings::{Decided, Provenance, parsed};
use super::stage::{Prepared, Surroundings};
use super::{Places, sets};

/// The column of the comments, where the line is not longer.
const COMMENTS: usize = 48;

struct Printer<'a> {
    sources: &'a Sources,
    places: &'a Places,
    text: String,
}

/// The text of the whole pipeline.
pub(super) fn text(
    sources: &Sources,
    around: &Surroundings<'_>,
    output_dir: &Provenance,
    stages: &[Prepared],
) -> String {
    let mut p = Printer { sources, places: around.places, text: String::new() };
    p.line(0, "dsgc", "1", None);
    if let Some(doc) = &around.pipeline.doc {
        p.line(0, "doc", &quoted(&doc.text), None);
    }
    p.line(0, "output_dir", &quoted(around.output_dir), Some(output_dir));
    p.models(around);
    p.data(around, stages);
    p.open(0, "stages");
    for stage in stages {
        p.stage(stage);
    }
    if !around.pipeline.compile.is_empty() {
        p.open(0, "compile");
        for setting in &around.pipeline.compile {
            p.line(2, &setting.key.text, &flow(&setting.value), Some(&Provenance::Given(setting.value.span)));
        }
    }
    p.text
}

impl Printer<'_> {
    fn open(&mut self, indent: usize, key: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{:indent$}{key}:", "");
    }

    fn line(&mut self, indent: usize, key: &str, value: &str, from: Option<&Provenance>) {
        let line = format!("{:indent$}{key}: {value}", "");
        let _ = match from.map(|from| self.origin(from)) {
            None => writeln!(self.text, "{line}"),
            Some(origin) => writeln!(self.text, "{line:COMMENTS$} # {origin}"),
        };
    }

    fn origin(&self, from: &Provenance) -> String {
        match from {
            Provenance::Default => "default".into(),
            Provenance::Recipe(recipe) => format!("default of recipe {recipe}"),
            Provenance::Derived(what) => what.replace('\n', " "),
            Provenance::Given(span) if self.places.sets.contains(&span.source) => {
                format!("{} {}", sets::SOURCE, self.sources.text(span.source).replace('\n', " "))
            }
            Provenance::Given(span) => format!("{}:{}", self.sources.name(span.source), span.line),
        }
    }

    /// A path as it is to be written in the file: as it was, unless it came from `--set` and starts elsewhere.
    fn path(&self, word: &Word) -> String {
        let elsewhere = self.places.sets.contains(&word.span.source);
        match std::path::absolute(Path::new(&word.text)) {
            Ok(path) if elsewhere => quoted(&path.display().to_string()),
            _ => quoted(&word.text),
        }
    }

    fn word(&mut self, indent: usize, key: &str, word: &Word, is_path: bool) {
        let value = if is_path { self.path(word) } else { quoted(&word.text) };
        self.line(indent, key, &value, Some(&Provenance::Given(word.span)));
    }

    fn models(&mut self, around: &Surroundings<'_>) {
        if !around.models.is_empty() {
            self.open(0, "models");
        }
        for (source, (name, known)) in around.pipeline.models.iter().zip(around.models) {
            let Some(known) = known else { continue };
            self.open(2, &name.text);
            if let Some(path) = &source.path {
                self.word(4, "path", path, true);
            }
            match &source.model {
                Some(model) => self.word(4, "model", model, super::documents::is_file(&model.text)),
                None => self.line(
                    4,
                    "model",
                    &quoted(&known.config.host.family),
                    Some(&Provenance::Derived("config.json: architectures".into())),
                ),
            }
            if let Some(tokenizer) = &source.tokenizer {
                self.word(4, "tokenizer", tokenizer, true);
            }
            let given = |entry: &Entry| source.path.is_none() || matches!(entry.from, Provenance::Given(_));
            self.open(4, if known.config.entries.iter().any(given) { "config" } else { "# config" });
            for entry in &known.config.entries {
                // A folder says these itself; written out they would change the config.json that is saved.
                let name = if given(entry) { entry.name.clone() } else { format!("# {}", entry.name) };
                self.line(6, &name, &value(&entry.value), Some(&entry.from));
            }
            let unused = &known.config.host.unused;
            if !unused.is_empty() {
                self.line(4, "# in config.json, kept and not used", &unused.join(", "), None);
            }
        }
    }

    fn data(&mut self, around: &Surroundings<'_>, stages: &[Prepared]) {
        if !around.pipeline.data.is_empty() {
            self.open(0, "data");
        }
        for set in &around.pipeline.data {
            self.open(2, &set.name.text);
            self.word(4, "path", &set.path, true);
            if !set.fields.is_empty() {
                self.open(4, "fields");
                for (field, column) in &set.fields {
                    self.word(6, &field.text, column, false);
                }
            }
            if !set.split.is_empty() {
                self.open(4, "split");
                for (stage, share) in &set.split {
                    self.line(6, &stage.text, &value(&Constant::Float(*share)), Some(&Provenance::Given(stage.span)));
                }
            }
            let bound = stages.iter().flat_map(|s| &s.sources).find(|b| b.set == set.name.text);
            match bound {
                Some(bound) => {
                    for decided in &bound.decided {
                        if let ("eval", Some(text)) = (decided.key.as_ref(), decided.node.scalar())
                            && let Constant::Str(path) = constant(text)
                        {
                            self.word(4, "eval", &Word { span: text.span, text: path }, true);
                        } else {
                            self.decided(4, decided);
                        }
                    }
                }
                // No stage uses it: only what was said of it.
                None => {
                    for setting in &set.settings {
                        self.line(
                            4,
                            &setting.key.text,
                            &flow(&setting.value),
                            Some(&Provenance::Given(setting.value.span)),
                        );
                    }
                }
            }
        }
    }

    fn decided(&mut self, indent: usize, decided: &Decided) {
        // What nobody set and has no value is said by leaving it out; not every key may be `none`.
        if decided.from != Provenance::Default || decided.constant() != Constant::None {
            self.line(indent, &decided.key, &flow(&decided.node), Some(&decided.from));
        }
    }

    fn stage(&mut self, stage: &Prepared) {
        self.open(2, &stage.name);
        self.line(4, "recipe", &quoted(&stage.recipe.name), None);
        match &stage.sources[..] {
            [] => {}
            [one] => self.line(4, "data", &quoted(&one.set), None),
            several => {
                self.open(4, "data");
                for bound in several {
                    self.line(6, &bound.source.name, &quoted(&bound.set), None);
                }
            }
        }
        for decided in stage.run.iter().chain(&stage.options) {
            self.decided(4, decided);
        }
        for role in &stage.roles {
            self.open(4, &role.name);
            if !role.bound_to.is_empty() {
                self.line(6, "model", &quoted(&role.bound_to), None);
            }
            for decided in role.settings.iter().chain(&role.training) {
                self.decided(6, decided);
            }
        }
        let save: Vec<String> = stage.save.iter().map(|role| quoted(role)).collect();
        self.line(4, "save", &format!("[{}]", save.join(", ")), None);
    }
}

/// A node on one line.
fn flow(node: &Node) -> String {
    match &node.value {
        Value::Scalar(text) => scalar(text),
        Value::List(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::Map(entries) => {
            let entries: Vec<String> = entries.iter().map(|(k, v)| format!("{}: {}", scalar(k), flow(v))).collect();
            format!("{{{}}}", entries.join(", "))
        }
        Value::Null | Value::Bad => "~".into(),
    }
}

fn scalar(text: &Text) -> String {
    if text.style == Style::Plain && constant(text) != Constant::Str(text.text.clone()) {
        return text.text.clone();
    }
    quoted(&text.text)
}

/// A value as YAML.
pub(super) fn value(value: &Constant) -> String {
    match value {
        Constant::Float(x) if x.is_nan() => ".nan".into(),
        Constant::Float(x) if x.is_infinite() => if *x > 0.0 { ".inf" } else { "-.inf" }.into(),
        Constant::Str(text) => quoted(text),
        Constant::List(items) => {
            format!("[{}]", items.iter().map(|x| self::value(&x.value)).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// A text as YAML, in quotes where it could be read as something else.
fn quoted(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_alphanumeric() || "_./".contains(c))
        && text.chars().all(|c| c.is_alphanumeric() || "_./-".contains(c));
    if plain && parsed(text).scalar().is_some_and(|t| constant(t) == Constant::Str(text.into())) {
        return text.into();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            // What else is not printed stands as its code, so that the text stays one line.
            c if c.is_control() => drop(write!(out, "\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out + "\""
}
