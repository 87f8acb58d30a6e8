//! The keys of each kind of mapping: their names, what they hold, and what they mean.
//!
//! A reader opens a mapping with its [`Table`]; unknown keys are found here, and a JSON Schema can be printed from the
//! same tables. So a key exists in one place only.

use dsgc_ir::diag::{Diag, nearest};

use crate::foreign;
use crate::text::Text;

/// All keys that a kind of mapping may have.
#[derive(Debug)]
pub struct Table {
    /// What the mapping is, for messages: `a recipe`.
    pub what: &'static str,
    /// Its keys.
    pub keys: &'static [KeyDef],
}

/// One key.
#[derive(Debug)]
pub struct KeyDef {
    /// As it is written.
    pub name: &'static str,
    /// What stands behind it.
    pub form: Form,
    /// What it means, in a sentence.
    pub doc: &'static str,
}

/// What a value looks like.
#[derive(Debug)]
pub enum Form {
    /// Any text.
    Text,
    /// The name of something.
    Name,
    /// A whole number.
    Int,
    /// A number.
    Float,
    /// `true` or `false`.
    Bool,
    /// `none`, beside another form.
    None,
    /// An expression.
    Expr,
    /// A number, a truth value, a text, `none`, or a list of these.
    Literal,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A list.
    List(&'static Form),
    /// A mapping whose keys are names given by the author.
    Map(&'static Form),
    /// A mapping with these keys.
    Keys(&'static Table),
    /// One of several forms.
    Either(&'static [Form]),
    /// A plan: a list of statements.
    Plan,
}

/// A key, for the tables.
pub(crate) const fn key(name: &'static str, form: Form, doc: &'static str) -> KeyDef {
    KeyDef { name, form, doc }
}

impl Table {
    /// The key of this name.
    pub fn find(&self, name: &str) -> Option<&'static KeyDef> {
        self.keys.iter().find(|k| k.name == name)
    }

    /// The message for a key that is not in this table.
    pub(crate) fn unknown(&self, found: &Text) -> Diag {
        unknown_key(found, self.what, self.keys.iter().map(|k| k.name))
    }
}

/// The message for a key that is none of `known` in `what`: with its translation if another trainer calls something
/// so, else with the nearest known key, else with all of them.
pub fn unknown_key<'a>(found: &Text, what: &str, known: impl IntoIterator<Item = &'a str>) -> Diag {
    let known: Vec<&str> = known.into_iter().collect();
    let diag = Diag::error(format!("unknown key `{}` in {what}", found.text)).label(found.span, "");
    if let Some(near) = nearest(&found.text, known.iter().copied()) {
        diag.help(format!("write `{near}`"))
    } else if let Some(theirs) = foreign::find(&found.text) {
        diag.help(theirs.help())
    } else {
        diag.help(format!("its keys are {}", words(&known)))
    }
}

/// `a`, `b` and `c`.
pub(crate) fn words<T: AsRef<str>>(names: &[T]) -> String {
    let quoted: Vec<String> = names.iter().map(|n| format!("`{}`", n.as_ref())).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => "none".into(),
    }
}
