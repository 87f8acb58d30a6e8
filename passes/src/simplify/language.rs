//! Ops as nodes of an e-graph, and what is known of a class of equal nodes.
//!
//! The children of a node are the op's attributes, in the order of the table and in their text form, and then its
//! operands. So a pattern can hold an attribute as it holds an operand: `(transpose ?p (transpose ?q ?x))`.

use std::sync::Arc;

use dsgc_ir::infer::infer;
use dsgc_ir::op::{Attribute, ROWS, Row};
use dsgc_ir::{Class, Op, Type};
use egg::{Analysis, DidMerge, FromOp, Id, Language};

use crate::canonicalize::{cast, fold_scalar};

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// A value from outside, by number.
    Leaf(u32),
    /// An attribute in its text form.
    Attribute(Arc<str>),
    /// An op by name; its attributes and operands.
    Op(&'static str, Box<[Id]>),
}

/// The graph of equal nodes.
pub type EGraph = egg::EGraph<Node, Facts>;

impl Language for Node {
    type Discriminant = &'static str;

    fn discriminant(&self) -> &'static str {
        match self {
            Node::Leaf(_) => "leaf",
            Node::Attribute(_) => "attribute",
            Node::Op(name, _) => name,
        }
    }

    fn matches(&self, other: &Node) -> bool {
        match (self, other) {
            (Node::Op(a, x), Node::Op(b, y)) => a == b && x.len() == y.len(),
            _ => self == other,
        }
    }

    fn children(&self) -> &[Id] {
        match self {
            Node::Op(_, children) => children,
            Node::Leaf(_) | Node::Attribute(_) => &[],
        }
    }

    fn children_mut(&mut self) -> &mut [Id] {
        match self {
            Node::Op(_, children) => children,
            Node::Leaf(_) | Node::Attribute(_) => &mut [],
        }
    }
}

impl FromOp for Node {
    type Error = String;

    /// Reads a node of a pattern: the name of an op, or an attribute.
    fn from_op(text: &str, children: Vec<Id>) -> Result<Node, String> {
        match row(text) {
            Some(row) => Ok(Node::Op(row.name, children.into())),
            None if children.is_empty() => Ok(Node::Attribute(text.into())),
            None => Err(format!("no op is called `{text}`")),
        }
    }
}

fn row(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|r| r.name == name)
}

/// What is known of a class.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// An attribute in its text form.
    Attribute(Arc<str>),
    /// A value.
    Value {
        /// Its type.
        ty: Type,
        /// The number that each of its elements is, if they are known to be one.
        constant: Option<f64>,
    },
}

impl Data {
    /// The type of a value.
    ///
    /// # Panics
    /// If it is an attribute: a pattern has them mixed up.
    pub fn ty(&self) -> &Type {
        match self {
            Data::Value { ty, .. } => ty,
            Data::Attribute(text) => panic!("bug: the attribute `{text}` stands for a value"),
        }
    }

    /// The number that each element is, if it is known.
    pub fn constant(&self) -> Option<f64> {
        match self {
            Data::Value { constant, .. } => *constant,
            Data::Attribute(_) => None,
        }
    }

    /// The text of an attribute.
    ///
    /// # Panics
    /// If it is a value: a pattern has them mixed up.
    pub fn text(&self) -> &str {
        match self {
            Data::Attribute(text) => text,
            Data::Value { ty, .. } => panic!("bug: a value {ty} stands for an attribute"),
        }
    }
}

/// What the e-graph knows beside its nodes.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The values from outside.
    pub leaves: Vec<Data>,
    /// Unions by rules: the class that matched, the class that it is equal to, and the rule.
    pub steps: Vec<(Id, Id, usize)>,
}

impl Analysis<Node> for Facts {
    type Data = Data;

    fn make(graph: &mut EGraph, node: &Node, _: Id) -> Data {
        match node {
            Node::Leaf(i) => graph.analysis.leaves[*i as usize].clone(),
            Node::Attribute(text) => Data::Attribute(text.clone()),
            Node::Op(name, children) => {
                let data: Vec<&Data> = children.iter().map(|&c| &graph[c].data).collect();
                value(name, &data).unwrap_or_else(|why| panic!("bug: in an e-graph, {why}"))
            }
        }
    }

    fn merge(&mut self, a: &mut Data, b: Data) -> DidMerge {
        match (&mut *a, &b) {
            (Data::Value { ty, constant: None }, Data::Value { ty: other, constant }) if ty == other => {
                let better = constant.is_some();
                *a = b;
                DidMerge(better, false)
            }
            (Data::Value { ty, .. }, Data::Value { ty: other, constant }) if ty == other => {
                DidMerge(false, constant.is_none())
            }
            (a, b) => panic!("bug: {a:?} and {b:?} are not equal"),
        }
    }

    /// A scalar whose value is known is a constant.
    fn modify(graph: &mut EGraph, id: Id) {
        if let Data::Value { ty, constant: Some(value) } = graph[id].data.clone()
            && ty.is_scalar()
        {
            let attributes = [value.show(), ty.dtype.show()].map(|text| graph.add(Node::Attribute(text.into())));
            let constant = graph.add(Node::Op("const", attributes.into()));
            graph.union(id, constant);
        }
    }
}

/// What is known of the result of an op, or why its operands do not fit.
pub fn value(name: &'static str, children: &[&Data]) -> Result<Data, String> {
    let row = row(name).expect("nodes have names of the table");
    let (attributes, operands) = children.split_at(row.attributes.len());
    let op = op_of(row, attributes.iter().map(|a| a.text()))?;
    let types: Vec<Type> = operands.iter().map(|o| o.ty().clone()).collect();
    let [ty] = <[Type; 1]>::try_from(infer(&op, &types, None)?).map_err(|_| format!("`{name}` has many results"))?;
    let constants: Option<Vec<f64>> = operands.iter().map(|o| o.constant()).collect();
    let constant = match (&op, constants.as_deref()) {
        (Op::Const { value, dtype }, _) => Some(cast(*value, *dtype)),
        (Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Slice { .. }, Some([x])) => Some(*x),
        // Another number could round to one side of a whole number in f32 and to the other in f64.
        (Op::Cast { dtype }, Some([x])) if x.fract() == 0.0 => Some(cast(*x, *dtype)),
        (op, Some(numbers)) => fold_scalar(op, numbers, ty.dtype),
        (_, None) => None,
    };
    Ok(Data::Value { ty, constant })
}

/// The op of a row with attributes in their text form.
pub fn op_of<'a>(row: &Row, attributes: impl Iterator<Item = &'a str>) -> Result<Op, String> {
    let named: Vec<(String, String)> =
        row.attributes.iter().map(|k| (*k).to_string()).zip(attributes.map(str::to_string)).collect();
    Op::from_text(row.name, &named)
}

/// Whether an op can stand in an e-graph: one result, which depends on its operands only.
pub fn is_known(op: &Op, results: usize) -> bool {
    results == 1 && !matches!(op.class(), Class::Random | Class::Update | Class::State)
}

/// Adds an op.
pub fn add(graph: &mut EGraph, op: &Op, operands: &[Id]) -> Id {
    let mut children: Vec<Id> =
        op.attributes().into_iter().map(|(_, text)| graph.add(Node::Attribute(text.into()))).collect();
    children.extend(operands);
    graph.add(Node::Op(op.name(), children.into()))
}

/// The op of a node and its operands.
///
/// # Panics
/// If it is none, which the caller has seen.
pub fn op_and_operands(graph: &EGraph, node: &Node) -> (Op, Vec<Id>) {
    let Node::Op(name, children) = node else { panic!("bug: {node:?} is no op") };
    let row = row(name).expect("nodes have names of the table");
    let (attributes, operands) = children.split_at(row.attributes.len());
    let op = op_of(row, attributes.iter().map(|&a| graph[a].data.text()));
    (op.expect("it was an op when it was added"), operands.to_vec())
}
