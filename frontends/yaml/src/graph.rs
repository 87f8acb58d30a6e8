//! What models, recipes and functions share: graphs, declared values, roles, tests.

use dsgc_ir::diag::{Diag, Span};

use crate::expr::{Expr, Word};
use crate::foreign;
use crate::literal::{Constant, Literal};
use crate::node::{Node, Value};
use crate::reader::Reader;
use crate::schema::{Form, Table, key};
use crate::text::Text;

/// A pure function of tensors and models.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Its name; `graph` for a model's only one.
    pub name: Word,
    /// What it computes.
    pub doc: Option<Word>,
    /// Inputs in order, with their types.
    pub inputs: Vec<(Word, Expr)>,
    /// Dims that follow from those of the inputs.
    pub dims: Vec<(Word, Expr)>,
    /// Values in order, each seeing those before it.
    pub lets: Vec<(Word, Tree)>,
    /// What must hold.
    pub asserts: Vec<Assert>,
    /// The result.
    pub out: Tree,
}

/// An expression, or a record of such.
#[derive(Clone, Debug)]
pub enum Tree {
    /// One value.
    Expr(Expr),
    /// Named values.
    Record(Span, Vec<(Word, Tree)>),
}

/// A condition and what to say where it does not hold.
#[derive(Clone, Debug)]
pub struct Assert {
    /// The condition.
    pub condition: Expr,
    /// The message.
    pub message: Word,
}

/// A value that is set from outside: a config entry of a model, an option of a recipe.
#[derive(Clone, Debug)]
pub struct Declaration {
    /// Its name.
    pub name: Word,
    /// What it is; given, or that of the default.
    pub ty: Type,
    /// Its value if nobody sets it; without one it is required.
    pub default: Option<Literal>,
    /// The only values it may have; empty if any will do.
    pub choices: Vec<Word>,
    /// What it means.
    pub doc: Option<Word>,
}

/// Type of a declared value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A whole number.
    Int,
    /// A number.
    Float,
    /// `true` or `false`.
    Bool,
    /// A text.
    Str,
    /// A list, such as a type per layer.
    List,
}

/// A model in its role.
#[derive(Clone, Debug)]
pub struct RoleDecl {
    /// Name of the role.
    pub name: Word,
    /// What it must be: `causal_lm`, `value`, `any`.
    pub ty: Option<Word>,
    /// Whether an update trains it.
    pub trained: bool,
    /// The role whose state at the beginning of the stage it is.
    pub snapshot: Option<Word>,
    /// The role whose moving average it is.
    pub average: Option<Word>,
    /// Whether it exists.
    pub when: Option<Expr>,
    /// What it is for.
    pub doc: Option<Word>,
}

/// Given values and expected ones, run by `dsgc check`.
#[derive(Clone, Debug)]
pub struct Test {
    /// Where it stands.
    pub span: Span,
    /// The graph it calls.
    pub graph: Word,
    /// Options and token ids.
    pub with: Vec<(Word, Literal)>,
    /// Inputs, and lets that are pinned.
    pub given: Vec<(Word, Literal)>,
    /// Lets and outputs.
    pub expect: Vec<(Word, Literal)>,
    /// Largest absolute difference.
    pub tolerance: Option<f64>,
}

const TYPE_FORM: Form = Form::Choice(&["int", "float", "bool", "str", "list"]);
const TREE: Form = Form::Either(&[Form::Map(&Form::Expr), Form::Expr]);

/// Keys of a graph.
pub const GRAPH: Table = Table {
    what: "a graph",
    keys: &[
        key("doc", Form::Text, "what it computes"),
        key("in", Form::Map(&Form::Expr), "inputs and their types, such as `f32[B, T]`"),
        key("dims", Form::Map(&Form::Expr), "dims that follow from those of the inputs"),
        key("let", Form::List(&Form::Map(&TREE)), "values in order: `- name: expression`"),
        key("assert", Form::List(&Form::Map(&Form::Text)), "what must hold: `- condition: message`"),
        key("out", TREE, "the result: an expression, or named ones; the first stands for the whole"),
    ],
};

/// Keys of a config entry or an option, in its long form.
pub const DECLARATION: Table = Table {
    what: "a declared value",
    keys: &[
        key("default", Form::Literal, "its value if nobody sets it"),
        key("type", TYPE_FORM, "its type, where the default does not say it"),
        key("choices", Form::List(&Form::Name), "the only values it may have"),
        key("doc", Form::Text, "what it means"),
    ],
};

/// Keys of a role.
pub const ROLE: Table = Table {
    what: "a role",
    keys: &[
        key("type", Form::Name, "what model it must be: `causal_lm`, `value` or `any`"),
        key("trained", Form::Bool, "whether an update trains it"),
        key("snapshot", Form::Name, "the role whose state at the beginning of the stage it is"),
        key("average", Form::Name, "the role whose moving average it is"),
        key("when", Form::Expr, "whether it exists; decided when the file is read"),
        key("doc", Form::Text, "what it is for"),
    ],
};

/// Keys of a test.
pub const TEST: Table = Table {
    what: "a test",
    keys: &[
        key("graph", Form::Name, "the graph that is called"),
        key("with", Form::Map(&Form::Literal), "options and token ids"),
        key(
            "given",
            Form::Map(&Form::Literal),
            "inputs, and lets that are pinned so that no model is needed; whole numbers alone make an i32 of a let",
        ),
        key("expect", Form::Map(&Form::Literal), "lets and outputs"),
        key("tolerance", Form::Float, "largest absolute difference, 1e-6 unless given"),
    ],
};

impl Reader {
    /// `graphs:` or `blocks:`.
    pub(crate) fn graphs(&mut self, node: &Node) -> Vec<Graph> {
        let entries = self.entries(node, "graphs by name");
        entries.iter().filter_map(|(name, node)| self.graph(name, node)).collect()
    }

    pub(crate) fn graph(&mut self, name: &Text, node: &Node) -> Option<Graph> {
        let name = self.name(name, false);
        let fields = self.fields(node, &GRAPH)?;
        self.graph_body(name, &fields)
    }

    /// The part of a graph that a block has too.
    pub(crate) fn graph_body(&mut self, name: Word, fields: &crate::reader::Fields<'_>) -> Option<Graph> {
        let inputs = fields.get("in").map_or_else(Vec::new, |n| self.named_exprs(n, "inputs: `name: type`"));
        let dims = fields.get("dims").map_or_else(Vec::new, |n| self.named_exprs(n, "dims: `NAME: expression`"));
        let lets = fields.get("let").map_or_else(Vec::new, |n| self.lets(n));
        let asserts = fields.get("assert").map_or_else(Vec::new, |n| self.asserts(n));
        let doc = fields.get("doc").and_then(|n| self.word(n, "a text"));
        let Some(out) = fields.get("out") else {
            self.error(Diag::error(format!("graph `{}` has no `out`", name.text)).label(name.span, ""));
            return None;
        };
        let out = self.tree(out)?;
        Some(Graph { name, doc, inputs, dims, lets, asserts, out })
    }

    pub(crate) fn named_exprs(&mut self, node: &Node, expected: &str) -> Vec<(Word, Expr)> {
        let mut read = Vec::new();
        for (name, value) in self.entries(node, expected) {
            let name = self.name(name, false);
            if let Some(value) = self.expr(value) {
                read.push((name, value));
            }
        }
        read
    }

    fn tree(&mut self, node: &Node) -> Option<Tree> {
        let Value::Map(entries) = &node.value else {
            return self.expr(node).map(Tree::Expr);
        };
        let mut record = Vec::new();
        for (name, value) in entries {
            let name = self.name(name, false);
            if let Some(value) = self.tree(value) {
                record.push((name, value));
            }
        }
        Some(Tree::Record(node.span, record))
    }

    /// The key and value of each item of a list such as `- name: expression`.
    pub(crate) fn pairs<'n>(&mut self, node: &'n Node, expected: &str) -> Vec<(&'n Text, &'n Node)> {
        let mut pairs = Vec::new();
        for item in self.items(node, &format!("a list of {expected}")) {
            match &item.value {
                Value::Map(entries) => match entries.as_slice() {
                    [(key, value)] => pairs.push((key, value)),
                    [_, (second, _), ..] => self.error(
                        Diag::error(format!("found a second key in one list item, expected {expected}"))
                            .label(second.span, "")
                            .help("begin a new item with `- `"),
                    ),
                    // An entry that is gone was reported where it was read.
                    [] => {}
                },
                _ => self.wrong(item, expected),
            }
        }
        pairs
    }

    fn lets(&mut self, node: &Node) -> Vec<(Word, Tree)> {
        let mut lets = Vec::new();
        for (name, value) in self.pairs(node, "`- name: expression`") {
            let name = self.name(name, false);
            if let Some(value) = self.tree(value) {
                lets.push((name, value));
            }
        }
        lets
    }

    fn asserts(&mut self, node: &Node) -> Vec<Assert> {
        let mut asserts = Vec::new();
        for (condition, message) in self.pairs(node, "`- condition: message`") {
            let condition = self.expr_text(condition);
            let message = self.word(message, "a message");
            if let (Some(condition), Some(message)) = (condition, message) {
                asserts.push(Assert { condition, message });
            }
        }
        asserts
    }

    /// `config:` or `options:`.
    pub(crate) fn declarations(&mut self, node: &Node) -> Vec<Declaration> {
        let entries = self.entries(node, "declared values: `name: default`");
        entries.iter().filter_map(|(name, node)| self.declaration(name, node)).collect()
    }

    fn declaration(&mut self, name: &Text, node: &Node) -> Option<Declaration> {
        if let Some(theirs) = foreign::find(&name.text) {
            self.error(
                Diag::error(format!("found `{}`, which other trainers use for something we have", name.text))
                    .label(name.span, "")
                    .help(theirs.help()),
            );
        }
        let name = self.name(name, false);
        let bare = |ty| Declaration { name: name.clone(), ty, default: None, choices: Vec::new(), doc: None };
        let Value::Map(_) = &node.value else {
            if let Some(ty) = node.scalar().and_then(type_name) {
                return Some(bare(ty));
            }
            let default = self.literal(node)?;
            let Some(ty) = type_of(&default.value) else {
                self.error(
                    Diag::error(format!(
                        "found `none` as the default of `{}`, which says nothing of its type",
                        name.text
                    ))
                    .label(node.span, "")
                    .help("write `{default: none, type: float}`"),
                );
                return None;
            };
            return Some(Declaration { default: Some(default), ..bare(ty) });
        };
        let fields = self.fields(node, &DECLARATION)?;
        let choices = fields.get("choices").map_or_else(Vec::new, |n| self.words(n, "a list of names"));
        let default = match fields.get("default") {
            Some(n) => Some(self.literal(n)?),
            None => None,
        };
        let given = match fields.get("type") {
            Some(n) => Some(self.choice(n, &TYPES)?),
            None => None,
        };
        let doc = fields.get("doc").and_then(|n| self.word(n, "a text"));
        let implied = default.as_ref().and_then(|d| type_of(&d.value));
        let ty = given.or(if choices.is_empty() { implied } else { Some(Type::Str) });
        let Some(ty) = ty else {
            self.error(
                Diag::error(format!("`{}` has neither a type nor a default that says it", name.text))
                    .label(name.span, "")
                    .help("write `type: int`, `float`, `bool` or `str`"),
            );
            return None;
        };
        if let (Some(default), Some(implied)) = (&default, implied)
            && implied != ty
            && choices.is_empty()
            && (implied, ty) != (Type::Int, Type::Float)
        {
            self.error(
                Diag::error(format!("found the default {}, expected a value of type `{}`", default.value, ty.name()))
                    .label(default.span, ""),
            );
        }
        // `none` in `choices: [group, none]` is a choice like the others, not the absence of a value.
        if let (Some(default), false) = (&default, choices.is_empty()) {
            let text = match &default.value {
                Constant::Str(s) => s.clone(),
                other => other.to_string(),
            };
            if !choices.iter().any(|c| c.text == text) {
                let names: Vec<&str> = choices.iter().map(|c| c.text.as_str()).collect();
                self.error(
                    Diag::error(format!(
                        "found the default `{text}`, expected one of {}",
                        crate::schema::words(&names)
                    ))
                    .label(default.span, ""),
                );
            }
        }
        Some(Declaration { name, ty, default, choices, doc })
    }

    /// `models:` of a model or a recipe.
    pub(crate) fn roles(&mut self, node: &Node) -> Vec<RoleDecl> {
        let mut roles = Vec::new();
        for (name, node) in self.entries(node, "models by role") {
            let name = self.name(name, false);
            let empty =
                RoleDecl { name, ty: None, trained: false, snapshot: None, average: None, when: None, doc: None };
            if node.scalar().is_some() {
                roles.push(RoleDecl { ty: self.word(node, "a type"), ..empty });
            } else if let Some(fields) = self.fields(node, &ROLE) {
                let mut word = |name| fields.get(name).and_then(|n| self.word(n, "a name"));
                let (ty, snapshot, average, doc) = (word("type"), word("snapshot"), word("average"), word("doc"));
                if let (Some(a), Some(b)) = (&snapshot, &average) {
                    self.error(
                        Diag::error(format!("role `{}` is both a snapshot and an average", empty.name.text))
                            .label(b.span, "")
                            .label(a.span, "the snapshot"),
                    );
                }
                let trained = fields.get("trained").and_then(|n| self.bool(n)).unwrap_or(false);
                let when = fields.get("when").and_then(|n| self.expr(n));
                roles.push(RoleDecl { ty, trained, snapshot, average, when, doc, ..empty });
            }
        }
        roles
    }

    /// `tests:`.
    pub(crate) fn tests(&mut self, node: &Node) -> Vec<Test> {
        let mut tests = Vec::new();
        for item in self.items(node, "a list of tests") {
            let Some(fields) = self.fields(item, &TEST) else { continue };
            let mut values = |name| fields.get(name).map_or_else(Vec::new, |n| self.named_literals(n));
            let (with, given, expect) = (values("with"), values("given"), values("expect"));
            let tolerance = fields.get("tolerance").and_then(|n| self.float(n));
            match fields.get("graph") {
                Some(n) => tests.extend(self.word(n, "the name of a graph").map(|graph| Test {
                    span: item.span,
                    graph,
                    with,
                    given,
                    expect,
                    tolerance,
                })),
                None => {
                    self.error(Diag::error("a test has no `graph`").label(item.span, "").help("write `graph: <name>`"))
                }
            }
        }
        tests
    }

    pub(crate) fn named_literals(&mut self, node: &Node) -> Vec<(Word, Literal)> {
        let mut read = Vec::new();
        for (name, value) in self.entries(node, "values by name") {
            let name = self.name(name, true);
            if let Some(value) = self.literal(value) {
                read.push((name, value));
            }
        }
        read
    }
}

const TYPES: [(&str, Type); 5] =
    [("int", Type::Int), ("float", Type::Float), ("bool", Type::Bool), ("str", Type::Str), ("list", Type::List)];

impl Type {
    /// As it is written.
    pub fn name(self) -> &'static str {
        TYPES.iter().find(|t| t.1 == self).map_or("list", |t| t.0)
    }
}

fn type_name(text: &Text) -> Option<Type> {
    if text.is_quoted() { None } else { TYPES.iter().find(|t| t.0 == text.text).map(|t| t.1) }
}

fn type_of(value: &Constant) -> Option<Type> {
    Some(match value {
        Constant::Int(_) => Type::Int,
        Constant::Float(_) => Type::Float,
        Constant::Bool(_) => Type::Bool,
        Constant::Str(_) => Type::Str,
        Constant::List(_) => Type::List,
        Constant::None => return None,
    })
}
