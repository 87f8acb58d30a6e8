//! `recipe:` documents: a training algorithm as roles, data, options, graphs and a plan.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Longer, Side};

use crate::expr::{Expr, Word};
use crate::graph::{DECLARATION, Declaration, GRAPH, Graph, ROLE, RoleDecl, TEST, Test};
use crate::model::word;
use crate::node::{Node, Value};
use crate::pipeline::{Setting, TRAINING};
use crate::plan::Step;
use crate::reader::Reader;
use crate::schema::{Form, Table, key};

/// A recipe document. With `extends`, anything may be missing; its entries replace whole entries of the other recipe.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Its name.
    pub name: Word,
    /// What it does.
    pub doc: Option<Word>,
    /// The recipe whose entries it takes over.
    pub extends: Option<Word>,
    /// Files of functions it uses besides the library's.
    pub uses: Vec<Word>,
    /// Roles.
    pub models: Vec<RoleDecl>,
    /// Roles that give a number per answer and are bound in the pipeline.
    pub judges: Vec<Judge>,
    /// Sources of rows.
    pub data: Vec<DataDecl>,
    /// What a pipeline may set.
    pub options: Vec<Declaration>,
    /// Training settings per role.
    pub defaults: Vec<RoleDefaults>,
    /// Values that live over steps.
    pub state: Vec<(Word, Expr)>,
    /// Losses and what they call.
    pub graphs: Vec<Graph>,
    /// What is called in which order; `None` if inherited.
    pub plan: Option<Vec<Step>>,
    /// Calls on held-out rows.
    pub evaluate: Vec<Expr>,
    /// Conditions on the last evaluation under which the stage passes.
    pub require: Vec<Expr>,
    /// Roles whose models are written at the end; `None` for all trained ones.
    pub save: Option<Vec<Word>>,
    /// Ranges in which metrics should stay.
    pub health: Vec<Health>,
    /// Given and expected values.
    pub tests: Vec<Test>,
}

/// A role that gives a number per answer.
#[derive(Clone, Debug)]
pub struct Judge {
    /// Its name.
    pub name: Word,
    /// What it should be.
    pub doc: Option<Word>,
}

/// Settings that a recipe suggests for a role.
#[derive(Clone, Debug)]
pub struct RoleDefaults {
    /// The role.
    pub role: Word,
    /// Its settings.
    pub settings: Vec<Setting>,
}

/// The range in which a metric should stay.
#[derive(Clone, Debug)]
pub struct Health {
    /// The metric.
    pub metric: Word,
    /// Lowest value.
    pub low: f64,
    /// Highest value.
    pub high: f64,
}

/// Rows, and how they become sequences of tokens.
#[derive(Clone, Debug)]
pub struct DataDecl {
    /// Its name.
    pub name: Word,
    /// What it is.
    pub doc: Option<Word>,
    /// Whether a pipeline may leave it out.
    pub optional: bool,
    /// One form, or several of which the first that fits the file's columns is taken.
    pub forms: Vec<DataForm>,
    /// Side of the padding.
    pub pad: Option<Side>,
    /// Width of every batch, instead of that of its longest row.
    pub width: Option<Expr>,
    /// What happens to longer rows.
    pub longer: Option<Longer>,
    /// Whether all sequences of a row are padded to one length.
    pub same_length: bool,
    /// Length of the blocks that texts are packed into.
    pub packed: Option<Expr>,
    /// Whether texts of a batch may share rows: what the recipe makes of a token depends on its own text only.
    pub shared_rows: bool,
}

/// Columns of a file, and the sequences made of them.
#[derive(Clone, Debug)]
pub struct DataForm {
    /// Where it stands.
    pub span: Span,
    /// Fields and what they hold, such as `text`.
    pub fields: Vec<(Word, Word)>,
    /// Sequences and the parts they are put together from: fields, or `eoc`.
    pub sequences: Vec<(Word, Vec<Word>)>,
}

const FIELDS: Form = Form::Map(&Form::Choice(&["text", "chat"]));
const SEQUENCES: Form = Form::Map(&Form::List(&Form::Name));

/// Keys of a recipe document.
pub const RECIPE: Table = Table {
    what: "a recipe",
    keys: &[
        key("recipe", Form::Name, "its name"),
        key("doc", Form::Text, "what it does"),
        key("extends", Form::Text, "the recipe whose entries it takes over; entries here replace whole entries"),
        key("use", Form::List(&Form::Text), "files of functions, besides the library's"),
        key("models", Form::Map(&Form::Either(&[Form::Keys(&ROLE), Form::Name])), "models by role"),
        key("judges", Form::Map(&Form::Keys(&JUDGE)), "roles that give a number per answer, bound in the pipeline"),
        key("data", Form::Map(&Form::Keys(&DATA)), "sources of rows"),
        key(
            "options",
            Form::Map(&Form::Either(&[Form::Keys(&DECLARATION), Form::Literal])),
            "what a pipeline may set: `name: default`",
        ),
        key("defaults", Form::Map(&Form::Keys(&TRAINING)), "training settings per role"),
        key("state", Form::Map(&Form::Keys(&STATE)), "values that live over steps and are saved with checkpoints"),
        key("graphs", Form::Map(&Form::Keys(&GRAPH)), "losses and what they call"),
        key("plan", Form::Plan, "what is called in which order"),
        key("evaluate", Form::List(&Form::Expr), "calls on held-out rows: before, every `eval_steps`, after"),
        key("require", Form::List(&Form::Expr), "conditions on the last evaluation under which the stage passes"),
        key(
            "save",
            Form::List(&Form::Name),
            "roles whose models are written at the end, all trained ones unless given",
        ),
        key("health", Form::Map(&Form::List(&Form::Float)), "ranges of metrics: `metric: [low, high]`"),
        key("tests", Form::List(&Form::Keys(&TEST)), "given and expected values, run by `dsgc check`"),
    ],
};

/// Keys of a judge.
pub const JUDGE: Table = Table { what: "a judge", keys: &[key("doc", Form::Text, "what it should be")] };

/// Keys of a value that lives over steps.
pub const STATE: Table = Table { what: "a state", keys: &[key("init", Form::Expr, "its first value")] };

/// Keys of a source of rows.
pub const DATA: Table = Table {
    what: "a source of rows",
    keys: &[
        key("doc", Form::Text, "what it is"),
        key("optional", Form::Bool, "whether a pipeline may leave it out; `given(name)` tells"),
        key("fields", FIELDS, "columns of the file and what they hold: `text` or `chat`"),
        key("sequences", SEQUENCES, "sequences of tokens and the fields they are put together from; `eoc` ends a text"),
        key(
            "either",
            Form::List(&Form::Keys(&DATA_FORM)),
            "several forms of rows; the first that fits the file is taken",
        ),
        key("pad", Form::Choice(&["left", "right"]), "side of the padding"),
        key("width", Form::Expr, "width of every batch, instead of that of its longest row"),
        key("longer", Form::Choice(&["truncate", "drop"]), "what happens to longer rows"),
        key("same_length", Form::Bool, "pad all sequences of a row to one length"),
        key("packed", Form::Expr, "length of the blocks that texts are packed into"),
        key(
            "shared_rows",
            Form::Bool,
            "texts of a batch may share rows: what the graphs make of a token depends on its own text only",
        ),
    ],
};

/// Keys of one form of rows.
pub const DATA_FORM: Table = Table {
    what: "a form of rows",
    keys: &[
        key("fields", FIELDS, "columns of the file and what they hold: `text` or `chat`"),
        key("sequences", SEQUENCES, "sequences of tokens and the fields they are put together from; `eoc` ends a text"),
    ],
};

pub(crate) fn read(reader: &mut Reader, node: &Node) -> Option<Recipe> {
    let fields = reader.fields(node, &RECIPE)?;
    let name = fields.get("recipe").and_then(|n| reader.word(n, "the recipe's name"));
    let extends = fields.get("extends").and_then(|n| reader.word(n, "the name of a recipe or a file"));
    let recipe = Recipe {
        doc: fields.get("doc").and_then(|n| reader.word(n, "a text")),
        uses: fields.get("use").map_or_else(Vec::new, |n| reader.words(n, "a list of files")),
        models: fields.get("models").map_or_else(Vec::new, |n| reader.roles(n)),
        judges: fields.get("judges").map_or_else(Vec::new, |n| reader.judges(n)),
        data: fields.get("data").map_or_else(Vec::new, |n| reader.data_decls(n)),
        options: fields.get("options").map_or_else(Vec::new, |n| reader.declarations(n)),
        defaults: fields.get("defaults").map_or_else(Vec::new, |n| reader.role_defaults(n)),
        state: fields.get("state").map_or_else(Vec::new, |n| reader.states(n)),
        graphs: fields.get("graphs").map_or_else(Vec::new, |n| reader.graphs(n)),
        plan: fields.get("plan").map(|n| reader.plan(n)),
        evaluate: fields.get("evaluate").map_or_else(Vec::new, |n| reader.calls(n)),
        require: fields.get("require").map_or_else(Vec::new, |n| reader.exprs(n, "a list of conditions")),
        save: fields.get("save").map(|n| reader.words(n, "a list of roles")),
        health: fields.get("health").map_or_else(Vec::new, |n| reader.health(n)),
        tests: fields.get("tests").map_or_else(Vec::new, |n| reader.tests(n)),
        name: name?,
        extends,
    };
    if recipe.extends.is_none() {
        for needed in ["models", "data", "graphs", "plan"] {
            if fields.get(needed).is_none() {
                reader.error(
                    Diag::error(format!("recipe `{}` has no `{needed}`", recipe.name.text))
                        .label(recipe.name.span, "")
                        .help("write it, or take it over with `extends: <recipe>`"),
                );
            }
        }
    }
    Some(recipe)
}

impl Reader {
    fn judges(&mut self, node: &Node) -> Vec<Judge> {
        let mut judges = Vec::new();
        for (name, node) in self.entries(node, "judges by name") {
            let name = self.name(name, false);
            if let Some(fields) = self.fields(node, &JUDGE) {
                judges.push(Judge { name, doc: fields.get("doc").and_then(|n| self.word(n, "a text")) });
            }
        }
        judges
    }

    fn calls(&mut self, node: &Node) -> Vec<Expr> {
        let mut calls = self.exprs(node, "a list of calls");
        calls.retain(|call| self.is_call(call).is_some());
        calls
    }

    fn states(&mut self, node: &Node) -> Vec<(Word, Expr)> {
        let mut states = Vec::new();
        for (name, node) in self.entries(node, "states: `name: {init: value}`") {
            let name = self.name(name, false);
            let Some(fields) = self.fields(node, &STATE) else { continue };
            match fields.get("init") {
                Some(init) => states.extend(self.expr(init).map(|init| (name, init))),
                None => self.error(Diag::error(format!("state `{}` has no `init`", name.text)).label(name.span, "")),
            }
        }
        states
    }

    fn role_defaults(&mut self, node: &Node) -> Vec<RoleDefaults> {
        let mut defaults = Vec::new();
        for (role, node) in self.entries(node, "settings by role") {
            let role = self.name(role, false);
            let before = self.errors.len();
            self.check(node, &Form::Keys(&TRAINING));
            if let (Value::Map(entries), true) = (&node.value, before == self.errors.len()) {
                let settings =
                    entries.iter().map(|(key, value)| Setting { key: key.clone(), value: value.clone() }).collect();
                defaults.push(RoleDefaults { role, settings });
            }
        }
        defaults
    }

    fn health(&mut self, node: &Node) -> Vec<Health> {
        let mut health = Vec::new();
        for (metric, node) in self.entries(node, "ranges by metric") {
            let expected = "a range: `[low, high]`";
            match self.items(node, expected) {
                [low, high] => {
                    if let (Some(low), Some(high)) = (self.float(low), self.float(high)) {
                        health.push(Health { metric: word(metric), low, high });
                    }
                }
                [] => {}
                items => {
                    let diag = Diag::error(format!("found {} values, expected {expected}", items.len()));
                    self.error(diag.label(node.span, ""));
                }
            }
        }
        health
    }

    fn data_decls(&mut self, node: &Node) -> Vec<DataDecl> {
        let mut decls = Vec::new();
        for (name, node) in self.entries(node, "sources by name") {
            let name = self.name(name, false);
            decls.extend(self.data_decl(name, node));
        }
        decls
    }

    fn data_decl(&mut self, name: Word, node: &Node) -> Option<DataDecl> {
        let fields = self.fields(node, &DATA)?;
        let own = match (fields.get("fields"), fields.get("sequences")) {
            (None, None) => None,
            (columns, sequences) => Some(self.data_form(&name, fields.span, columns, sequences)),
        };
        let forms = match (own, fields.entry("either")) {
            (Some(form), None) => form.into_iter().collect(),
            (None, Some((_, list))) => {
                let items = self.items(list, "a list of forms");
                items.iter().filter_map(|item| self.data_form_item(&name, item)).collect()
            }
            (Some(_), Some((key, _))) => {
                let diag = Diag::error(format!("source `{}` has `either` and a form of its own", name.text));
                self.error(diag.label(key.span, "").help("move `fields` and `sequences` into the list"));
                Vec::new()
            }
            (None, None) => {
                self.error(
                    Diag::error(format!("source `{}` has no `fields` and no `sequences`", name.text))
                        .label(name.span, ""),
                );
                Vec::new()
            }
        };
        let doc = fields.get("doc").and_then(|n| self.word(n, "a text"));
        let mut flag = |key| fields.get(key).and_then(|n| self.bool(n)).unwrap_or(false);
        let (optional, same_length, shared_rows) = (flag("optional"), flag("same_length"), flag("shared_rows"));
        let pad = fields.get("pad").and_then(|n| self.choice(n, &[("left", Side::Left), ("right", Side::Right)]));
        let longer = fields
            .get("longer")
            .and_then(|n| self.choice(n, &[("truncate", Longer::Truncate), ("drop", Longer::Drop)]));
        let width = fields.get("width").and_then(|n| self.expr(n));
        let packed = fields.get("packed").and_then(|n| self.expr(n));
        if packed.is_some() {
            for key in ["width", "longer"] {
                if let Some((found, _)) = fields.entry(key) {
                    let diag = Diag::error(format!("found `{key}` beside `packed` for source `{}`", name.text));
                    self.error(diag.label(found.span, "").help("leave it out: texts are cut into rows of that length"));
                }
            }
        }
        if shared_rows && (pad == Some(Side::Left) || forms.iter().any(|form| form.sequences.len() > 1)) {
            let diag = Diag::error(format!("texts of source `{}` cannot share rows", name.text)).label(name.span, "");
            self.error(diag.help("that takes one sequence, padded on the right: leave `shared_rows` out"));
        }
        Some(DataDecl { name, doc, optional, forms, pad, width, longer, same_length, packed, shared_rows })
    }

    fn data_form_item(&mut self, name: &Word, node: &Node) -> Option<DataForm> {
        let fields = self.fields(node, &DATA_FORM)?;
        self.data_form(name, fields.span, fields.get("fields"), fields.get("sequences"))
    }

    fn data_form(
        &mut self,
        name: &Word,
        span: Span,
        columns: Option<&Node>,
        sequences: Option<&Node>,
    ) -> Option<DataForm> {
        let (Some(columns), Some(sequences)) = (columns, sequences) else {
            let missing = if columns.is_none() { "fields" } else { "sequences" };
            self.error(Diag::error(format!("source `{}` has no `{missing}`", name.text)).label(span, ""));
            return None;
        };
        let mut form = DataForm { span, fields: Vec::new(), sequences: Vec::new() };
        for (field, node) in self.entries(columns, "fields: `name: text`") {
            let field = self.name(field, false);
            if self.choice(node, &[("text", ()), ("chat", ())]).is_some() {
                form.fields.extend(self.word(node, "`text` or `chat`").map(|kind| (field, kind)));
            }
        }
        for (sequence, node) in self.entries(sequences, "sequences: `name: [fields]`") {
            let sequence = self.name(sequence, false);
            let parts = self.words(node, "a list of fields");
            for part in &parts {
                if part.text != "eoc" && !form.fields.iter().any(|f| f.0.text == part.text) {
                    let known: Vec<&str> = form.fields.iter().map(|f| f.0.text.as_str()).chain(["eoc"]).collect();
                    let expected = crate::schema::words(&known);
                    let diag = Diag::error(format!("found the part `{}`, expected one of {expected}", part.text));
                    self.error(diag.label(part.span, ""));
                }
            }
            form.sequences.push((sequence, parts));
        }
        Some(form)
    }
}
