//! Random terms of a pattern: operands with types that fit, attributes that fit the operands.

use std::collections::BTreeMap;

use dsgc_ir::fuzz::Rng;
use dsgc_ir::op::{Attribute, ROWS};
use dsgc_ir::{DType, Dim, Op, Type};
use dsgc_passes::simplify::language::{Data, Node, value};
use egg::{ENodeOrVar, Id, PatternAst, RecExpr, Var};

/// A term with what is known of each of its nodes, and the types of the values that it takes from outside.
pub struct Term {
    pub nodes: RecExpr<Node>,
    pub data: Vec<Data>,
    pub leaves: Vec<Type>,
}

/// What is drawn: a type, as far as it is known beforehand.
#[derive(Clone, Default)]
struct Want {
    dtype: Option<DType>,
    dims: Option<Vec<Dim>>,
}

struct Draw<'a> {
    rng: &'a mut Rng,
    pattern: &'a PatternAst<Node>,
    /// Dims to choose from.
    pool: &'a [Dim],
    vars: BTreeMap<Var, Id>,
    term: Term,
}

/// A random term that the pattern matches, of values with these dims; `None` where what was drawn does not fit.
pub fn term(pattern: &PatternAst<Node>, dims: &[Dim], rng: &mut Rng) -> Option<Term> {
    let term = Term { nodes: RecExpr::default(), data: vec![], leaves: vec![] };
    let dtype = rng.choose(&[DType::F32, DType::F32, DType::F32, DType::I32, DType::Bool]);
    let mut draw = Draw { rng, pattern, pool: dims, vars: BTreeMap::new(), term };
    let root = pattern.as_ref().len() - 1;
    draw.node(Id::from(root), Want { dtype: Some(dtype), dims: None })?;
    Some(draw.term)
}

impl Draw<'_> {
    fn push(&mut self, node: Node, data: Data) -> Id {
        self.term.data.push(data);
        self.term.nodes.add(node)
    }

    fn data(&self, id: Id) -> &Data {
        &self.term.data[usize::from(id)]
    }

    fn dims(&self, id: Id) -> Vec<Dim> {
        self.data(id).ty().dims.clone()
    }

    fn op(&mut self, op: &Op, operands: &[Id]) -> Option<Id> {
        let mut children: Vec<Id> = Vec::new();
        for (_, text) in op.attributes() {
            children.push(self.attribute(text));
        }
        children.extend(operands);
        self.made(op.name(), children)
    }

    fn made(&mut self, name: &'static str, children: Vec<Id>) -> Option<Id> {
        let data: Vec<&Data> = children.iter().map(|&c| self.data(c)).collect();
        let data = value(name, &data).ok()?;
        Some(self.push(Node::Op(name, children.into()), data))
    }

    fn attribute(&mut self, text: String) -> Id {
        self.push(Node::Attribute(text.as_str().into()), Data::Attribute(text.as_str().into()))
    }

    fn dim(&mut self) -> Dim {
        self.rng.choose(self.pool)
    }

    fn some_dims(&mut self) -> Vec<Dim> {
        (0..self.rng.below(4)).map(|_| self.dim()).collect()
    }

    /// A value from outside, or one number everywhere.
    fn leaf(&mut self, want: Want) -> Option<Id> {
        let dims = match want.dims {
            Some(dims) if !self.rng.once_in(12) => dims,
            _ => self.some_dims(),
        };
        let dtype = want.dtype.unwrap_or_else(|| self.rng.choose(&[DType::F32, DType::F32, DType::I32, DType::Bool]));
        if self.rng.once_in(3) {
            let value = match dtype {
                DType::Bool => self.rng.choose(&[0.0, 1.0]),
                DType::I32 => self.rng.choose(&[0.0, 1.0, -1.0, 2.0]),
                DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) | DType::Key => {
                    self.rng.choose(&[0.0, -0.0, 1.0, -1.0, 2.0, 0.5])
                }
            };
            let scalar = self.op(&Op::Const { value, dtype }, &[])?;
            return if dims.is_empty() { Some(scalar) } else { self.op(&Op::Broadcast { shape: dims }, &[scalar]) };
        }
        let ty = Type::new(dtype, dims);
        let leaf = Node::Leaf(self.term.leaves.len() as u32);
        self.term.leaves.push(ty.clone());
        Some(self.push(leaf, Data::Value { ty, constant: None }))
    }

    fn node(&mut self, at: Id, want: Want) -> Option<Id> {
        let pattern = self.pattern;
        match &pattern[at] {
            ENodeOrVar::Var(v) => match self.vars.get(v) {
                Some(&id) => Some(id),
                None => {
                    let id = self.leaf(want)?;
                    self.vars.insert(*v, id);
                    Some(id)
                }
            },
            ENodeOrVar::ENode(Node::Op(name, children)) => {
                let attributes = ROWS.iter().find(|r| r.name == *name).expect("a row").attributes;
                let (own, operands) = children.split_at(attributes.len());
                // What outer ops already say about the first attribute.
                let first = own.first().and_then(|&attribute| self.bound(attribute));
                let mut drawn: Vec<Id> = Vec::new();
                for (i, &operand) in operands.iter().enumerate() {
                    let want = self.wanted(name, i, &drawn, &want, first.clone());
                    drawn.push(self.node(operand, want)?);
                }
                let mut all = Vec::new();
                for (i, &attribute) in own.iter().enumerate() {
                    let before: Vec<String> = all.iter().map(|&a| self.data(a).text().to_string()).collect();
                    let id = match (self.bound(attribute), &pattern[attribute]) {
                        (Some(text), _) => self.attribute(text),
                        (None, ENodeOrVar::Var(v)) => {
                            let text = self.fitting(name, attributes[i], &before, &drawn, &want)?;
                            let id = self.attribute(text);
                            self.vars.insert(*v, id);
                            id
                        }
                        (None, ENodeOrVar::ENode(_)) => unreachable!("an attribute is a text or a variable"),
                    };
                    all.push(id);
                }
                self.made(name, [all, drawn].concat())
            }
            ENodeOrVar::ENode(Node::Leaf(_) | Node::Attribute(_)) => unreachable!("no value of its own"),
        }
    }

    /// The text of an attribute that is known already.
    fn bound(&self, attribute: Id) -> Option<String> {
        match &self.pattern[attribute] {
            ENodeOrVar::Var(v) => self.vars.get(v).map(|&id| self.data(id).text().to_string()),
            ENodeOrVar::ENode(Node::Attribute(text)) => Some(text.to_string()),
            ENodeOrVar::ENode(_) => None,
        }
    }

    /// What operand `i` should be, when those before it are drawn.
    fn wanted(&mut self, name: &str, i: usize, drawn: &[Id], want: &Want, first: Option<String>) -> Want {
        let of = |dtype: DType, dims: Option<Vec<Dim>>| Want { dtype: Some(dtype), dims };
        let like_first = drawn.first().map(|&d| self.data(d).ty().clone());
        let first_dims = like_first.as_ref().map(|t| t.dims.clone());
        let number = want.dtype.filter(|d| matches!(d, DType::F32 | DType::I32)).unwrap_or(DType::F32);
        let rows = |n: usize| first_dims.as_ref().filter(|d| d.len() >= n).map(|d| d[..n].to_vec());
        let lead = first_dims.as_ref().and_then(|d| d.split_last()).map(|(_, lead)| lead.to_vec());
        let last = first_dims.as_ref().and_then(|d| d.last()).map(|d| vec![d.clone()]);
        match (name, i) {
            ("token_logp" | "token_logp_grad", 0) | ("layer_norm" | "rms_norm", 0) => {
                let dims = [self.some_dims(), vec![Dim::from(3i64)]].concat();
                of(DType::F32, Some(dims))
            }
            ("token_logp" | "token_logp_grad", 1) => of(DType::I32, lead),
            ("token_logp_grad", 2) => of(DType::F32, lead),
            ("layer_norm" | "rms_norm", _) => of(DType::F32, last),
            ("embed", 0) => of(DType::F32, Some(vec![Dim::from(3i64), Dim::from(2i64)])),
            ("embed", _) => of(DType::I32, None),
            ("rope", 0) => {
                let dims = vec![self.dim(), self.dim(), self.dim(), Dim::from(4i64)];
                of(DType::F32, Some(dims))
            }
            ("rope", 1) => of(DType::I32, rows(2)),
            ("rope", _) => of(DType::F32, Some(vec![Dim::from(2i64)])),
            ("and" | "or" | "not", _) => of(DType::Bool, first_dims.or(want.dims.clone())),
            ("where", 0) => of(DType::Bool, want.dims.clone()),
            ("where", _) => {
                let second = drawn.get(1).map(|&d| self.data(d).ty().dtype);
                Want { dtype: second.or(want.dtype), dims: first_dims }
            }
            ("eq" | "ne" | "lt" | "le", 0) => of(self.rng.choose(&[DType::F32, DType::I32]), want.dims.clone()),
            ("cast", _) => Want { dtype: None, dims: want.dims.clone() },
            ("add" | "sub" | "mul" | "div" | "max" | "min" | "neg" | "abs", 0) => of(number, want.dims.clone()),
            ("contract", 0) => Want { dtype: Some(DType::F32), dims: None },
            ("contract", _) => {
                Want { dtype: Some(DType::F32), dims: self.rng.once_in(2).then_some(first_dims).flatten() }
            }
            ("broadcast", _) => {
                let bound = first.and_then(|text| Vec::<Dim>::read(&text).ok());
                let dims = bound.or(want.dims.clone()).map(|dims| self.shrunk(dims));
                Want { dtype: want.dtype, dims: if self.rng.once_in(4) { Some(vec![]) } else { dims } }
            }
            ("transpose", _) => {
                let order = first.and_then(|text| Vec::<usize>::read(&text).ok());
                let dims = match (order, &want.dims) {
                    (Some(order), Some(dims)) if order.len() == dims.len() => {
                        let mut own = dims.clone();
                        order.iter().zip(dims).for_each(|(&i, d)| own[i] = d.clone());
                        Some(own)
                    }
                    (Some(order), _) => Some(order.iter().map(|_| self.dim()).collect()),
                    (None, dims) => dims.clone(),
                };
                Want { dtype: want.dtype, dims }
            }
            ("reshape", _) if self.rng.once_in(3) => Want { dtype: want.dtype, dims: Some(vec![]) },
            ("slice" | "pad" | "concat" | "reshape", 0) | ("reduce_sum" | "reduce_max" | "reduce_min", _) => {
                Want { dtype: want.dtype, dims: None }
            }
            ("concat", _) => {
                let mut dims = first_dims.unwrap_or_default();
                if !dims.is_empty() {
                    let axis = first.and_then(|t| t.parse().ok()).unwrap_or(self.rng.below(dims.len()));
                    if axis < dims.len() {
                        dims[axis] = self.dim();
                    }
                }
                Want { dtype: like_first.map(|t| t.dtype), dims: Some(dims) }
            }
            // Elementwise with one type for all.
            (_, 0) => Want { dtype: Some(DType::F32), dims: want.dims.clone() },
            _ => Want { dtype: like_first.map(|t| t.dtype), dims: first_dims },
        }
    }

    /// Dims that stretch to these.
    fn shrunk(&mut self, dims: Vec<Dim>) -> Vec<Dim> {
        let from = self.rng.below(dims.len() + 1);
        let kept = dims[from..].to_vec();
        kept.into_iter().map(|d| if self.rng.once_in(3) { Dim::from(1i64) } else { d }).collect()
    }

    /// An attribute that fits the operands, when those before it are drawn.
    fn fitting(&mut self, op: &str, name: &str, before: &[String], operands: &[Id], want: &Want) -> Option<String> {
        let dims = self.dims(operands[0]);
        let rank = dims.len();
        let axis = |text: &str| text.parse::<usize>().ok().filter(|&a| a < rank);
        Some(match (op, name) {
            (_, "axis") => (rank > 0).then(|| self.rng.below(rank))?.show(),
            (_, "axes") => (0..rank).filter(|_| self.rng.once_in(2)).collect::<Vec<_>>().show(),
            ("slice", "start") => {
                let dim = &dims[axis(&before[0])?];
                self.rng.choose(&[Dim::default(), Dim::from(1i64), dim - &Dim::from(1i64)]).show()
            }
            ("slice", "end") => {
                let (dim, start) = (&dims[axis(&before[0])?], Dim::read(&before[1]).ok()?);
                self.rng.choose(&[dim.clone(), &start + &Dim::from(1i64), dim - &Dim::from(1i64)]).show()
            }
            (_, "before" | "after") => Dim::from(self.rng.between(0, 2)).show(),
            (_, "order") => {
                let mut order: Vec<usize> = (0..rank).collect();
                (1..rank).rev().for_each(|i| order.swap(i, self.rng.below(i + 1)));
                order.show()
            }
            ("broadcast", "shape") => match &want.dims {
                Some(dims) if !self.rng.once_in(6) => dims.clone(),
                _ => {
                    let lead: Vec<Dim> = (0..self.rng.below(3)).map(|_| self.dim()).collect();
                    let one = Dim::from(1i64);
                    let own = dims.into_iter().map(|d| if d == one { self.dim() } else { d }).collect::<Vec<_>>();
                    [lead, own].concat()
                }
            }
            .show(),
            ("reshape", "shape") => {
                let mut shape = dims;
                for _ in 0..2 {
                    if shape.len() > 1 && self.rng.once_in(2) {
                        let i = self.rng.below(shape.len() - 1);
                        shape[i] = &shape[i] * &shape[i + 1];
                        shape.remove(i + 1);
                    } else {
                        let at = self.rng.below(shape.len() + 1);
                        shape.insert(at, Dim::from(1i64));
                    }
                }
                shape.show()
            }
            (_, "spec") => self.spec(&dims, &self.dims(operands[1])),
            (_, "dtype") => self.rng.choose(&[DType::F32, DType::I32, DType::Bool]).show(),
            (_, "eps") => 1e-5.show(),
            (_, "inverse") => self.rng.once_in(2).show(),
            _ => panic!("no way to draw `{name}` of `{op}`"),
        })
    }

    /// Letters for two operands: some in common, of which some are summed over.
    fn spec(&mut self, lhs: &[Dim], rhs: &[Dim]) -> String {
        let letter = |i: usize| (b'a' + i as u8) as char;
        let left: Vec<char> = (0..lhs.len()).map(letter).collect();
        let mut right: Vec<char> = Vec::new();
        let mut out = left.clone();
        for (i, dim) in rhs.iter().enumerate() {
            let common: Vec<char> =
                (0..lhs.len()).filter(|&j| lhs[j] == *dim).map(letter).filter(|c| !right.contains(c)).collect();
            if common.is_empty() || self.rng.once_in(3) {
                right.push(letter(lhs.len() + i));
                out.push(letter(lhs.len() + i));
            } else {
                let c = self.rng.choose(&common);
                right.push(c);
                if !self.rng.once_in(3) {
                    out.retain(|&o| o != c);
                }
            }
        }
        (1..out.len()).rev().for_each(|i| out.swap(i, self.rng.below(i + 1)));
        let text = |letters: Vec<char>| letters.into_iter().collect::<String>();
        format!("{},{}->{}", text(left), text(right), text(out))
    }
}
