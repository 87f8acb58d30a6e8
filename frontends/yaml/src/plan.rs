//! The plan of a recipe: what is called in which order.

use dsgc_ir::diag::{Diag, Span, nearest};

use crate::expr::{Expr, ExprKind, Word};
use crate::node::{Node, Value};
use crate::reader::Reader;
use crate::schema::{Form, Table, key, words};
use crate::text::Text;

/// A statement of a plan.
#[derive(Clone, Debug)]
pub enum Step {
    /// `for: batch`, `in: source`, `do:`
    For {
        /// The key `for`.
        span: Span,
        /// Name of the batch in the body.
        batch: Word,
        /// A source, or a call that gives batches.
        source: Expr,
        /// The body.
        body: Vec<Step>,
    },
    /// `repeat: times`, `do:`
    Repeat {
        /// The key `repeat`.
        span: Span,
        /// How often.
        times: Expr,
        /// The body.
        body: Vec<Step>,
    },
    /// `if: condition`, `do:`, `else:`
    If {
        /// The key `if`.
        span: Span,
        /// Decides.
        condition: Expr,
        /// If true.
        then: Vec<Step>,
        /// If false; may be empty.
        otherwise: Vec<Step>,
    },
    /// `set: {name: value}`
    Set {
        /// The key `set`.
        span: Span,
        /// State and its new values.
        values: Vec<(Word, Expr)>,
    },
    /// `name: call` or a bare call.
    Call {
        /// Name of the result.
        name: Option<Word>,
        /// The call.
        call: Expr,
    },
}

/// Keys of `for`.
pub const FOR: Table = Table {
    what: "`for`",
    keys: &[
        key("for", Form::Name, "name of the batch in the body"),
        key("in", Form::Expr, "a source, or a call that gives batches"),
        key("do", Form::Plan, "the body"),
    ],
};
/// Keys of `repeat`.
pub const REPEAT: Table =
    Table { what: "`repeat`", keys: &[key("repeat", Form::Expr, "how often"), key("do", Form::Plan, "the body")] };
/// Keys of `if`.
pub const IF: Table = Table {
    what: "`if`",
    keys: &[
        key("if", Form::Expr, "the condition"),
        key("do", Form::Plan, "what happens if it holds"),
        key("else", Form::Plan, "what happens if not"),
    ],
};
/// The key of `set`.
pub const SET: Table = Table { what: "`set`", keys: &[key("set", Form::Map(&Form::Expr), "state and its new values")] };

const STATEMENTS: [&str; 4] = ["for", "repeat", "if", "set"];
const EXPECTED: &str = "`for`, `repeat`, `if`, `set`, `name: call` or a call";

impl Reader {
    pub(crate) fn plan(&mut self, node: &Node) -> Vec<Step> {
        self.items(node, "a list of statements").iter().filter_map(|item| self.step(item)).collect()
    }

    fn step(&mut self, item: &Node) -> Option<Step> {
        let entries = match &item.value {
            Value::Scalar(text) => {
                let call = self.expr_text(text)?;
                self.is_call(&call)?;
                return Some(Step::Call { name: None, call });
            }
            Value::Map(entries) => entries,
            _ => {
                self.wrong(item, EXPECTED);
                return None;
            }
        };
        let (first, value) = entries.first()?;
        match first.text.as_str() {
            "for" => {
                let fields = self.fields(item, &FOR)?;
                let batch = self.word(value, "a name");
                let body = self.body(first, fields.get("do"));
                let Some(source) = fields.get("in") else {
                    self.missing(first, "in", "in: <source>");
                    return None;
                };
                Some(Step::For { span: first.span, batch: batch?, source: self.expr(source)?, body })
            }
            "repeat" => {
                let fields = self.fields(item, &REPEAT)?;
                let times = self.expr(value);
                let body = self.body(first, fields.get("do"));
                Some(Step::Repeat { span: first.span, times: times?, body })
            }
            "if" => {
                let fields = self.fields(item, &IF)?;
                let condition = self.expr(value);
                let then = self.body(first, fields.get("do"));
                let otherwise = fields.get("else").map_or_else(Vec::new, |n| self.plan(n));
                Some(Step::If { span: first.span, condition: condition?, then, otherwise })
            }
            "set" => {
                self.fields(item, &SET)?;
                let values = self.named_exprs(value, "state and its new values");
                Some(Step::Set { span: first.span, values })
            }
            _ => self.named_call(first, value, entries.get(1).map(|(key, _)| key)),
        }
    }

    fn named_call(&mut self, first: &Text, value: &Node, second: Option<&Text>) -> Option<Step> {
        if let Some(second) = second {
            // `do` without its statement in front is a misspelt statement, not a second call.
            let diag = Diag::error(format!("found a second key after `{}`, expected {EXPECTED}", first.text))
                .label(second.span, "");
            let near = nearest(&first.text, STATEMENTS).filter(|_| second.text == "do" || second.text == "in");
            self.error(match near {
                Some(near) => diag.help(format!("write `{near}` for `{}`", first.text)),
                None => diag.help("begin a new statement with `- `"),
            });
            return None;
        }
        if let Value::List(_) | Value::Map(_) = &value.value {
            self.wrong(value, &format!("a call; statements are {}", words(&STATEMENTS)));
            return None;
        }
        let name = self.name(first, false);
        let call = self.expr(value)?;
        self.is_call(&call)?;
        Some(Step::Call { name: Some(name), call })
    }

    pub(crate) fn is_call(&mut self, expr: &Expr) -> Option<()> {
        if let ExprKind::Call { .. } = &expr.kind {
            return Some(());
        }
        self.error(Diag::error(format!("found `{expr}`, expected a call")).label(expr.span, ""));
        None
    }

    fn body(&mut self, statement: &Text, node: Option<&Node>) -> Vec<Step> {
        match node {
            Some(node) => self.plan(node),
            None => {
                self.missing(statement, "do", "do:");
                Vec::new()
            }
        }
    }

    fn missing(&mut self, statement: &Text, key: &str, write: &str) {
        self.error(
            Diag::error(format!("`{}` has no `{key}`", statement.text))
                .label(statement.span, "")
                .help(format!("write `{write}` below it, at the same column")),
        );
    }
}
