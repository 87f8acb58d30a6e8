//! Values that are given, not computed: defaults, settings, the numbers of a test.

use std::fmt;

use dsgc_ir::diag::{Diag, Span};

use crate::node::{Node, Value};
use crate::text::Text;

/// A value with its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Literal {
    /// Where it stands.
    pub span: Span,
    /// The value.
    pub value: Constant,
}

/// A given value.
#[derive(Clone, Debug, PartialEq)]
pub enum Constant {
    /// `12`.
    Int(i64),
    /// `3e-4`.
    Float(f64),
    /// `true`.
    Bool(bool),
    /// A text.
    Str(String),
    /// `none`.
    None,
    /// `[1, 2]`.
    List(Vec<Literal>),
}

/// What YAML 1.2's core schema makes of a scalar, except that only `true`, `false` and `none` are words.
pub fn constant(text: &Text) -> Constant {
    if text.is_quoted() {
        return Constant::Str(text.text.clone());
    }
    match text.text.as_str() {
        "true" => Constant::Bool(true),
        "false" => Constant::Bool(false),
        "none" => Constant::None,
        ".inf" | "+.inf" => Constant::Float(f64::INFINITY),
        "-.inf" => Constant::Float(f64::NEG_INFINITY),
        ".nan" => Constant::Float(f64::NAN),
        raw => match (raw.parse(), float(raw)) {
            (Ok(int), _) => Constant::Int(int),
            (_, Some(x)) => Constant::Float(x),
            _ => Constant::Str(raw.to_string()),
        },
    }
}

/// `1`, `.5`, `3.`, `3e-4`; not Rust's `inf` and `nan`.
fn float(raw: &str) -> Option<f64> {
    let digits = raw.strip_prefix(['-', '+']).unwrap_or(raw);
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    raw.parse().ok().filter(|x: &f64| x.is_finite())
}

impl Literal {
    /// Reads a node as a value; lists may nest.
    pub fn read(node: &Node, errors: &mut Vec<Diag>) -> Option<Literal> {
        let value = match &node.value {
            Value::Scalar(text) => constant(text),
            Value::List(items) => {
                let read: Vec<_> = items.iter().filter_map(|item| Literal::read(item, errors)).collect();
                Constant::List(read)
            }
            Value::Null => {
                errors.push(
                    Diag::error("found no value, expected one").label(node.span, "").help("no value is written `none`"),
                );
                return None;
            }
            Value::Map(_) => {
                errors.push(Diag::error("found a mapping, expected a value").label(node.span, ""));
                return None;
            }
            Value::Bad => return None,
        };
        Some(Literal { span: node.span, value })
    }
}

impl Constant {
    /// The number, if it is one.
    pub fn number(&self) -> Option<f64> {
        match self {
            Constant::Int(n) => Some(*n as f64),
            Constant::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// Whether `==` holds of the two: of numbers by value, of lists by their elements, wherever these stand.
    pub fn equals(&self, other: &Constant) -> bool {
        match (self, other) {
            // Not by way of doubles, which large whole numbers share.
            (Constant::Int(a), Constant::Int(b)) => a == b,
            (Constant::List(a), Constant::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.value.equals(&b.value))
            }
            _ => match (self.number(), other.number()) {
                (Some(a), Some(b)) => a == b,
                _ => self == other,
            },
        }
    }
}

/// As it would be written.
impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Constant::Int(n) => write!(f, "{n}"),
            Constant::Float(x) => write!(f, "{x:?}"),
            Constant::Bool(b) => write!(f, "{b}"),
            Constant::Str(s) => write!(f, "{s:?}"),
            Constant::None => f.write_str("none"),
            Constant::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{}", if i > 0 { ", " } else { "" }, item.value)?;
                }
                f.write_str("]")
            }
        }
    }
}
