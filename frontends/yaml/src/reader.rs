//! From nodes to typed values: one function per form, each with its message.
//!
//! A reader never stops at an error. It notes the message and gives `None`, so that all errors of a file come at once.

use dsgc_ir::diag::{Diag, Span};

use crate::expr::{Expr, Word};
use crate::literal::{Constant, Literal, constant};
use crate::node::{Node, Value};
use crate::schema::{Form, Table, words};
use crate::text::Text;

/// Collects the messages of one document.
#[derive(Default)]
pub(crate) struct Reader {
    pub errors: Vec<Diag>,
}

/// A mapping whose keys have been checked against a table.
pub(crate) struct Fields<'n> {
    table: &'static Table,
    pub span: Span,
    entries: &'n [(Text, Node)],
}

impl<'n> Fields<'n> {
    /// The value of a key, if it was given.
    pub fn get(&self, name: &'static str) -> Option<&'n Node> {
        self.entry(name).map(|(_, node)| node)
    }

    /// A key with its value, if it was given.
    pub fn entry(&self, name: &'static str) -> Option<(&'n Text, &'n Node)> {
        debug_assert!(self.table.find(name).is_some(), "`{name}` is missing in the keys of {}", self.table.what);
        self.entries.iter().find(|(key, _)| key.text == name).map(|(key, node)| (key, node))
    }
}

impl Reader {
    pub fn error(&mut self, diag: Diag) {
        self.errors.push(diag);
    }

    /// Notes that something else was expected here.
    pub fn wrong(&mut self, node: &Node, expected: &str) {
        if node.is_bad() {
            return;
        }
        let diag = Diag::error(format!("found {}, expected {expected}", node.describe())).label(node.span, "");
        self.error(if node.flow && matches!(node.value, Value::Null) {
            diag.help(crate::node::FLOW_HELP)
        } else {
            diag
        });
    }

    /// A mapping with the keys of `table` only.
    pub fn fields<'n>(&mut self, node: &'n Node, table: &'static Table) -> Option<Fields<'n>> {
        let fields = self.open_fields(node, table)?;
        for (key, _) in fields.entries {
            if table.find(&key.text).is_none() {
                self.error(table.unknown(key));
            }
        }
        Some(fields)
    }

    /// A mapping with the keys of `table` and others, of which the caller takes care.
    pub fn open_fields<'n>(&mut self, node: &'n Node, table: &'static Table) -> Option<Fields<'n>> {
        match &node.value {
            Value::Map(entries) => Some(Fields { table, span: node.span, entries }),
            _ => {
                self.wrong(node, &format!("the keys of {}", table.what));
                None
            }
        }
    }

    /// A mapping whose keys are the author's names.
    pub fn entries<'n>(&mut self, node: &'n Node, expected: &str) -> &'n [(Text, Node)] {
        match &node.value {
            Value::Map(entries) => entries,
            _ => {
                self.wrong(node, expected);
                &[]
            }
        }
    }

    /// A list.
    pub fn items<'n>(&mut self, node: &'n Node, expected: &str) -> &'n [Node] {
        match &node.value {
            Value::List(items) => items,
            _ => {
                self.wrong(node, expected);
                &[]
            }
        }
    }

    /// Any scalar as text.
    pub fn word(&mut self, node: &Node, expected: &str) -> Option<Word> {
        match &node.value {
            Value::Scalar(text) => Some(Word { span: text.span, text: text.text.clone() }),
            _ => {
                self.wrong(node, expected);
                None
            }
        }
    }

    /// One scalar, or a list of scalars.
    pub fn words(&mut self, node: &Node, expected: &str) -> Vec<Word> {
        match &node.value {
            Value::Scalar(_) => self.word(node, expected).into_iter().collect(),
            _ => self.items(node, expected).iter().filter_map(|n| self.word(n, expected)).collect(),
        }
    }

    /// A name that expressions can use: letters, digits and `_`, with dots where `dotted`.
    pub fn name(&mut self, key: &Text, dotted: bool) -> Word {
        let ok = |part: &str| {
            part.starts_with(|c: char| c.is_alphabetic() || c == '_')
                && part.chars().all(|c| c.is_alphanumeric() || c == '_')
        };
        let good = if dotted {
            let mut parts = key.text.split('.');
            parts.next().is_some_and(ok) && parts.all(|p| ok(p) || (!p.is_empty() && p.chars().all(char::is_numeric)))
        } else {
            ok(&key.text)
        };
        if !good {
            self.error(
                Diag::error(format!("found `{}`, expected a name", key.text))
                    .label(key.span, "")
                    .help("a name is made of letters, digits and `_`, and begins with a letter"),
            );
        }
        Word { span: key.span, text: key.text.clone() }
    }

    pub fn expr(&mut self, node: &Node) -> Option<Expr> {
        match &node.value {
            Value::Scalar(text) => self.expr_text(text),
            _ => {
                self.wrong(node, "an expression");
                None
            }
        }
    }

    pub fn expr_text(&mut self, text: &Text) -> Option<Expr> {
        match Expr::parse(text) {
            Ok(expr) => Some(expr),
            Err(diag) => {
                self.error(diag);
                None
            }
        }
    }

    /// One expression per item of a list.
    pub fn exprs(&mut self, node: &Node, expected: &str) -> Vec<Expr> {
        self.items(node, expected).iter().filter_map(|n| self.expr(n)).collect()
    }

    pub fn literal(&mut self, node: &Node) -> Option<Literal> {
        Literal::read(node, &mut self.errors)
    }

    pub fn bool(&mut self, node: &Node) -> Option<bool> {
        match node.scalar().map(constant) {
            Some(Constant::Bool(b)) => Some(b),
            found => {
                let expected = "`true` or `false`";
                let before = self.errors.len();
                self.wrong(node, expected);
                if let (Some(Constant::Str(s)), Some(diag)) = (found, self.errors.get_mut(before)) {
                    match s.to_lowercase().as_str() {
                        "yes" | "on" | "y" | "true" => diag.help.push("write `true`".into()),
                        "no" | "off" | "n" | "false" => diag.help.push("write `false`".into()),
                        _ => {}
                    }
                }
                None
            }
        }
    }

    pub fn int(&mut self, node: &Node) -> Option<i64> {
        match node.scalar().map(constant) {
            Some(Constant::Int(n)) => Some(n),
            _ => {
                self.wrong(node, "a whole number");
                None
            }
        }
    }

    pub fn float(&mut self, node: &Node) -> Option<f64> {
        let number = node.scalar().and_then(|t| constant(t).number());
        if number.is_none() {
            self.wrong(node, "a number");
        }
        number
    }

    /// One of the words of `values`, by its place in the list.
    pub fn choice<T: Copy>(&mut self, node: &Node, values: &[(&'static str, T)]) -> Option<T> {
        let names: Vec<&str> = values.iter().map(|v| v.0).collect();
        let Some(found) = node.scalar() else {
            self.wrong(node, &format!("one of {}", words(&names)));
            return None;
        };
        let hit = values.iter().find(|v| v.0 == found.text).map(|v| v.1);
        if hit.is_none() {
            self.wrong_choice(node, found, &names);
        }
        hit
    }

    fn wrong_choice(&mut self, node: &Node, found: &Text, names: &[&str]) {
        let before = self.errors.len();
        self.wrong(node, &format!("one of {}", words(names)));
        if let (Some(near), Some(diag)) =
            (dsgc_ir::diag::nearest(&found.text, names.iter().copied()), self.errors.get_mut(before))
        {
            diag.help.push(format!("write `{near}`"));
        }
    }

    /// Checks a value that stays a node against its form.
    pub fn check(&mut self, node: &Node, form: &Form) {
        match form {
            Form::Text | Form::Name => drop(self.word(node, "a text")),
            Form::Int => drop(self.int(node)),
            Form::Float => drop(self.float(node)),
            Form::Bool => drop(self.bool(node)),
            Form::Expr => drop(self.expr(node)),
            Form::Literal => drop(self.literal(node)),
            Form::None => match node.scalar().map(constant) {
                Some(Constant::None) => {}
                _ => self.wrong(node, "`none`"),
            },
            Form::Choice(names) => match node.scalar() {
                Some(text) if names.contains(&text.text.as_str()) => {}
                Some(text) => self.wrong_choice(node, text, names),
                None => self.wrong(node, &format!("one of {}", words(names))),
            },
            Form::List(inner) => {
                for item in self.items(node, "a list") {
                    self.check(item, inner);
                }
            }
            Form::Map(inner) => {
                for (_, value) in self.entries(node, "a mapping") {
                    self.check(value, inner);
                }
            }
            Form::Keys(table) => {
                if let Some(fields) = self.fields(node, table) {
                    for (key, value) in fields.entries {
                        if let Some(def) = table.find(&key.text) {
                            self.check(value, &def.form);
                        }
                    }
                }
            }
            Form::Either(forms) => self.check_either(node, forms),
            // Plans have a reader of their own.
            Form::Plan => {}
        }
    }

    /// Silent if one form fits; else the message of the last one, which by convention is the usual form.
    fn check_either(&mut self, node: &Node, forms: &[Form]) {
        let mut last = Vec::new();
        for form in forms {
            let mut trial = Reader::default();
            trial.check(node, form);
            if trial.errors.is_empty() {
                return;
            }
            last = trial.errors;
        }
        self.errors.append(&mut last);
    }
}
