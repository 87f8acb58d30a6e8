//! What an expression stands for while graphs are lowered.

use std::rc::Rc;

use dsgc_ir::diag::Span;
use dsgc_ir::{Dim, Value};

use crate::literal::Constant;

/// The value of an expression.
#[derive(Clone, Debug)]
pub(super) enum Val {
    /// Known when the file is read.
    Static(Constant),
    /// A size that is known at launch; never a constant, which is a [`Val::Static`].
    Dim(Dim),
    /// Computed by the graph.
    Tensor(Value),
    /// Named values.
    Record(Rc<Record>),
    /// `[B, T, 2]`, where not all items are static.
    List(Vec<Val>),
    /// A parameter by its whole name.
    Param(ParamRef),
    /// What the names of several parameters begin with.
    Group(ParamRef),
    /// A model, by the number of its role.
    Model(usize),
    /// Something that was reported already.
    Bad,
}

/// Named values.
#[derive(Debug)]
pub(super) struct Record {
    /// The values in order.
    pub fields: Vec<(String, Val)>,
    /// Whether these are outputs of a graph: then the first stands for the whole.
    pub outputs: bool,
}

/// A declared parameter, or the first part of the names of some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ParamRef {
    /// Number of the role that it belongs to.
    pub role: usize,
    /// Hugging Face's name.
    pub name: String,
}

/// A value with the place that it was written at.
#[derive(Clone, Debug)]
pub(super) struct Arg {
    pub span: Span,
    pub value: Val,
}

impl Val {
    /// A dim, or the number that it is.
    pub fn dim(dim: Dim) -> Val {
        match dim.constant() {
            Some(n) => Val::int(n),
            None => Val::Dim(dim),
        }
    }

    pub fn int(n: i64) -> Val {
        Val::Static(Constant::Int(n))
    }

    pub fn float(x: f64) -> Val {
        Val::Static(Constant::Float(x))
    }

    pub fn bool(b: bool) -> Val {
        Val::Static(Constant::Bool(b))
    }

    pub fn record(fields: Vec<(String, Val)>, outputs: bool) -> Val {
        Val::Record(Rc::new(Record { fields, outputs }))
    }

    /// A size: a whole number or a dim.
    pub fn as_dim(&self) -> Option<Dim> {
        match self {
            Val::Static(Constant::Int(n)) => Some(Dim::from(*n)),
            Val::Dim(dim) => Some(dim.clone()),
            _ => None,
        }
    }

    /// The value that stands for this one where one value is needed: of outputs, the first.
    pub fn single(self) -> Val {
        match &self {
            Val::Record(record) if record.outputs => match record.fields.first() {
                Some((_, first)) => first.clone().single(),
                None => self,
            },
            _ => self,
        }
    }
}

impl Record {
    /// A field by name.
    pub fn get(&self, name: &str) -> Option<&Val> {
        self.fields.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }
}
