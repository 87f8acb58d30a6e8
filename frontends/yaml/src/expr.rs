//! The expressions of the language: what stands in `let`, `out`, shapes, types, conditions and the plan.
//!
//! Precedence is Python's, from loose to tight: `a if c else b`, `or`, `and`, `not`, one comparison, `+ -`, `* /`,
//! unary `-`, `**`, then calls, indexing and members. Types such as `f32[B, 2 * N]` are expressions too: a name,
//! indexed. Every node carries its place in the file; what names mean is decided later.

mod lex;
mod parse;

use std::fmt;

use dsgc_ir::diag::{Diag, Span};

use crate::text::Text;

/// An expression with its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Expr {
    /// Where it stands; of several lines, the first.
    pub span: Span,
    /// What it is.
    pub kind: ExprKind,
}

/// What an expression is.
#[derive(Clone, Debug, PartialEq)]
pub enum ExprKind {
    /// `12`.
    Int(i64),
    /// `1e-6`, `.5`.
    Float(f64),
    /// `"relu"`.
    Str(String),
    /// `true`, `false`.
    Bool(bool),
    /// `none`.
    None,
    /// A name with its dots: `x`, `self_attn.q_proj`, `batch.prompt`.
    Name(String),
    /// A member of something that is no plain name: `trunk(tokens).hidden`.
    Member(Box<Expr>, Word),
    /// `f(x, axis=1)`. Functions are a namespace of their own, so what is called is a name.
    Call {
        /// What is called.
        function: Word,
        /// Arguments, positional ones first.
        args: Vec<Arg>,
    },
    /// `x[:, None]`, and types: `f32[B, T]`, `f32[]`.
    Index {
        /// What is indexed.
        base: Box<Expr>,
        /// One per dimension.
        items: Vec<Item>,
    },
    /// `-x`, `not x`.
    Unary(UnaryOp, Box<Expr>),
    /// `a + b`.
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    /// `then if condition else otherwise`.
    If {
        /// Decides.
        condition: Box<Expr>,
        /// If true.
        then: Box<Expr>,
        /// If false.
        otherwise: Box<Expr>,
    },
    /// `[B, T, heads * head_dim]`.
    List(Vec<Expr>),
}

/// A name with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// Where it stands.
    pub span: Span,
    /// The name.
    pub text: String,
}

/// An argument of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Arg {
    /// Its name, if it was given by name.
    pub name: Option<Word>,
    /// Its value.
    pub value: Expr,
}

/// What stands between the commas of `[]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// `0`, `2 * N`.
    At(Expr),
    /// `:`, `1:`, `:-1`, `a:b`.
    Slice {
        /// Where the slice begins, if not at the start; the place of the colon.
        start: Option<Expr>,
        /// Where it ends, if not at the end.
        stop: Option<Expr>,
        /// The colon.
        span: Span,
    },
    /// `None`: a new dimension of extent 1.
    New(Span),
    /// `...`: all dimensions that are not named.
    Rest(Span),
}

/// An operator before its operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnaryOp {
    /// `-`
    Neg,
    /// `not`
    Not,
}

/// An operator between its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The symbols say it.
pub enum BinaryOp {
    Or,
    And,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Add,
    Sub,
    Mul,
    Div,
    Pow,
}

impl BinaryOp {
    /// As it is written.
    pub fn symbol(self) -> &'static str {
        match self {
            BinaryOp::Or => "or",
            BinaryOp::And => "and",
            BinaryOp::Eq => "==",
            BinaryOp::Ne => "!=",
            BinaryOp::Lt => "<",
            BinaryOp::Le => "<=",
            BinaryOp::Gt => ">",
            BinaryOp::Ge => ">=",
            BinaryOp::Add => "+",
            BinaryOp::Sub => "-",
            BinaryOp::Mul => "*",
            BinaryOp::Div => "/",
            BinaryOp::Pow => "**",
        }
    }
}

impl Expr {
    /// Reads a scalar as an expression.
    pub fn parse(text: &Text) -> Result<Expr, Diag> {
        parse::parse(text)
    }

    /// The name, if it is nothing else.
    pub fn name(&self) -> Option<&str> {
        match &self.kind {
            ExprKind::Name(name) => Some(name),
            _ => None,
        }
    }

    /// The names in it, with their dots and places; not those of functions and arguments.
    pub fn names(&self) -> Vec<(&str, Span)> {
        let mut names = Vec::new();
        self.add_names(&mut names);
        names
    }

    fn add_names<'e>(&'e self, names: &mut Vec<(&'e str, Span)>) {
        match &self.kind {
            ExprKind::Name(name) => names.push((name, self.span)),
            ExprKind::Member(base, _) | ExprKind::Unary(_, base) => base.add_names(names),
            ExprKind::Call { args, .. } => args.iter().for_each(|arg| arg.value.add_names(names)),
            ExprKind::Index { base, items } => {
                base.add_names(names);
                for item in items {
                    match item {
                        Item::At(x) => x.add_names(names),
                        Item::Slice { start, stop, .. } => {
                            start.iter().chain(stop).for_each(|x| x.add_names(names));
                        }
                        Item::New(_) | Item::Rest(_) => {}
                    }
                }
            }
            ExprKind::Binary(_, a, b) => [a, b].into_iter().for_each(|x| x.add_names(names)),
            ExprKind::If { condition, then, otherwise } => {
                [condition, then, otherwise].into_iter().for_each(|x| x.add_names(names));
            }
            ExprKind::List(items) => items.iter().for_each(|x| x.add_names(names)),
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) | ExprKind::Bool(_) | ExprKind::None => {}
        }
    }
}

/// With all parentheses, so that a test shows what binds to what.
impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ExprKind::Int(n) => write!(f, "{n}"),
            ExprKind::Float(x) => write!(f, "{x:?}"),
            ExprKind::Str(s) => write!(f, "{s:?}"),
            ExprKind::Bool(b) => write!(f, "{b}"),
            ExprKind::None => f.write_str("none"),
            ExprKind::Name(name) => f.write_str(name),
            ExprKind::Member(base, name) => write!(f, "{base}.{}", name.text),
            ExprKind::Call { function, args } => {
                write!(f, "{}(", function.text)?;
                list(f, args, |f, arg| {
                    if let Some(name) = &arg.name {
                        write!(f, "{}=", name.text)?;
                    }
                    write!(f, "{}", arg.value)
                })?;
                f.write_str(")")
            }
            ExprKind::Index { base, items } => {
                write!(f, "{base}[")?;
                list(f, items, |f, item| write!(f, "{item}"))?;
                f.write_str("]")
            }
            ExprKind::Unary(UnaryOp::Neg, x) => write!(f, "(-{x})"),
            ExprKind::Unary(UnaryOp::Not, x) => write!(f, "(not {x})"),
            ExprKind::Binary(op, a, b) => write!(f, "({a} {} {b})", op.symbol()),
            ExprKind::If { condition, then, otherwise } => write!(f, "({then} if {condition} else {otherwise})"),
            ExprKind::List(items) => {
                f.write_str("[")?;
                list(f, items, |f, x| write!(f, "{x}"))?;
                f.write_str("]")
            }
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Item::At(x) => write!(f, "{x}"),
            Item::Slice { start, stop, .. } => {
                for (separator, bound) in [("", start), (":", stop)] {
                    f.write_str(separator)?;
                    if let Some(x) = bound {
                        write!(f, "{x}")?;
                    }
                }
                Ok(())
            }
            Item::New(_) => f.write_str("None"),
            Item::Rest(_) => f.write_str("..."),
        }
    }
}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    each: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            f.write_str(", ")?;
        }
        each(f, item)?;
    }
    Ok(())
}
