//! How a rule of the table becomes rewrites of the e-graph, and what its condition sees.

use dsgc_ir::infer::Contraction;
use dsgc_ir::op::{Arity, Attribute, ROWS};
use dsgc_ir::{Class, DType, Dim, Type};
use egg::{ENodeOrVar, Id, Language, Pattern, PatternAst, Searcher, Subst, Var};

use crate::pipeline::Numerics;

use super::language::{Data, EGraph, Node, value};
use super::rules::{RULES, Rule};

/// A rule for one op of the family that its patterns name.
pub struct Rewrite {
    /// The rule.
    pub rule: &'static Rule,
    /// Its number in the table.
    number: usize,
    /// The left side.
    pub from: Pattern<Node>,
    /// The right side.
    pub to: PatternAst<Node>,
}

/// All rewrites of the rules that do at most this to numbers.
///
/// # Panics
/// If a pattern of the table cannot be read.
pub fn rewrites(most: Numerics) -> Vec<Rewrite> {
    let rules = RULES.iter().enumerate().filter(|(_, rule)| rule.numerics <= most);
    rules.flat_map(|(number, rule)| expanded(number, rule)).collect()
}

fn expanded(number: usize, rule: &'static Rule) -> Vec<Rewrite> {
    let families = [
        ("@unary", Class::Elementwise, Arity::Exactly(1), 0),
        ("@binary", Class::Elementwise, Arity::Exactly(2), 0),
        ("@reduce", Class::Reduction, Arity::Exactly(1), 1),
    ];
    let read = |text: &str| {
        let pattern: Result<Pattern<Node>, _> = text.parse();
        pattern.unwrap_or_else(|e| panic!("bug: the rule `{}`: {e}", rule.name))
    };
    let rewrite = |name: &str, op: &str| Rewrite {
        rule,
        number,
        from: read(&rule.from.replace(name, op)),
        to: read(&rule.to.replace(name, op)).ast,
    };
    match families.into_iter().find(|f| rule.from.contains(f.0)) {
        None => vec![rewrite("@", "")],
        Some((name, class, arity, attributes)) => {
            let rows = ROWS.iter().filter(|r| (r.class, r.arity, r.attributes.len()) == (class, arity, attributes));
            rows.map(|row| rewrite(name, row.name)).collect()
        }
    }
}

impl Rewrite {
    /// Everything that the left side matches: the class, and what the variables are.
    pub fn search(&self, graph: &EGraph) -> Vec<(Id, Subst)> {
        let matches = self.from.search(graph);
        matches.into_iter().flat_map(|m| m.substs.into_iter().map(move |s| (m.eclass, s))).collect()
    }

    /// All variables, if the condition holds and the right side has the type of the left one.
    pub fn bind(&self, graph: &mut EGraph, class: Id, subst: &Subst) -> Option<Subst> {
        let mut subst = subst.clone();
        (self.rule.when)(&mut Match { graph, subst: &mut subst })?;
        let mut data: Vec<Data> = Vec::with_capacity(self.to.as_ref().len());
        for node in self.to.as_ref() {
            let next = match node {
                ENodeOrVar::Var(v) => graph[subst[*v]].data.clone(),
                ENodeOrVar::ENode(Node::Attribute(text)) => Data::Attribute(text.clone()),
                ENodeOrVar::ENode(Node::Op(name, children)) => {
                    let children: Vec<&Data> = children.iter().map(|&c| &data[usize::from(c)]).collect();
                    let made = value(name, &children).ok()?;
                    // Division by a whole zero is an error, which must not come where it was not.
                    (*name != "div" || made.ty().dtype.is_float()).then_some(())?;
                    made
                }
                ENodeOrVar::ENode(Node::Leaf(_)) => unreachable!("bug: a pattern holds a value"),
            };
            data.push(next);
        }
        (data.last()?.ty() == graph[class].data.ty()).then_some(subst)
    }

    /// Makes a match equal to the right side.
    pub fn apply(&self, graph: &mut EGraph, class: Id, subst: &Subst) {
        let Some(subst) = self.bind(graph, class, subst) else { return };
        let mut ids: Vec<Id> = Vec::with_capacity(self.to.as_ref().len());
        for node in self.to.as_ref() {
            let id = match node {
                ENodeOrVar::Var(v) => subst[*v],
                ENodeOrVar::ENode(node) => graph.add(node.clone().map_children(|c| ids[usize::from(c)])),
            };
            ids.push(id);
        }
        let to = *ids.last().expect("a right side is not empty");
        if graph.union(class, to) {
            graph.analysis.steps.push((class, to, self.number));
        }
    }
}

/// What a condition sees of a match. Conditions are sentences: they hold or are `None`.
pub struct Match<'a> {
    graph: &'a mut EGraph,
    subst: &'a mut Subst,
}

impl Match<'_> {
    fn data(&self, var: &str) -> &Data {
        let var: Var = var.parse().expect("variables begin with `?`");
        &self.graph[self.subst[var]].data
    }

    /// The type of a value.
    pub fn ty(&self, var: &str) -> &Type {
        self.data(var).ty()
    }

    /// An attribute.
    ///
    /// # Panics
    /// If it is of another kind.
    pub fn get<T: Attribute>(&self, var: &str) -> T {
        T::read(self.data(var).text()).unwrap_or_else(|e| panic!("bug: the attribute {var}: {e}"))
    }

    /// Sets an attribute of the right side.
    pub fn set<T: Attribute>(&mut self, var: &str, attribute: &T) -> Option<()> {
        let id = self.graph.add(Node::Attribute(attribute.show().into()));
        self.subst.insert(var.parse().expect("variables begin with `?`"), id);
        Some(())
    }

    /// The value has this type of elements.
    pub fn dtype(&self, var: &str, dtype: DType) -> Option<()> {
        (self.ty(var).dtype == dtype).then_some(())
    }

    /// The value is a scalar.
    pub fn scalar(&self, var: &str) -> Option<()> {
        self.ty(var).is_scalar().then_some(())
    }

    /// Every element is this number, to the bit.
    pub fn is(&self, var: &str, number: f64) -> Option<()> {
        (self.data(var).constant()?.to_bits() == number.to_bits()).then_some(())
    }

    /// Every element is zero of either sign.
    pub fn is_zero(&self, var: &str) -> Option<()> {
        (self.data(var).constant()? == 0.0).then_some(())
    }

    /// Adding the value changes no bit: x + 0.0 is 0.0 for -0.0, but x + -0.0 is x.
    pub fn is_neutral(&self, var: &str) -> Option<()> {
        self.is(var, if self.ty(var).dtype.is_float() { -0.0 } else { 0.0 })
    }

    /// Both are known, and the first is less.
    pub fn less(&self, a: &str, b: &str) -> Option<()> {
        (self.data(a).constant()? < self.data(b).constant()?).then_some(())
    }

    /// Sets a shape to the dims of a value.
    pub fn dims_of(&mut self, var: &str, shape: &str) -> Option<()> {
        let dims = self.ty(var).dims.clone();
        self.set(shape, &dims)
    }

    /// Sets `?m` to the dims that all these values stretch to, if they are not `?s` already.
    pub fn join(&mut self, vars: &[&str]) -> Option<()> {
        let one = Dim::from(1i64);
        let mut joined: Vec<Dim> = Vec::new();
        for var in vars {
            let dims = &self.ty(var).dims;
            let longer = dims.len().max(joined.len());
            let padded = |d: &[Dim]| [vec![one.clone(); longer - d.len()], d.to_vec()].concat();
            let pairs = padded(&joined).into_iter().zip(padded(dims));
            joined = pairs
                .map(|(a, b)| if a == b || b == one { Some(a) } else { (a == one).then_some(b) })
                .collect::<Option<_>>()?;
        }
        (joined != self.get::<Vec<Dim>>("?s")).then_some(())?;
        self.set("?m", &joined)
    }

    /// The letters of a product.
    pub fn labels(&self, spec: &str) -> Contraction {
        Contraction::parse(self.data(spec).text()).expect("specs in the e-graph are read before")
    }

    /// Sets a shape to the dims of `contract ?x ?y` by this spec.
    pub fn result_of_product(&mut self, spec: &str, shape: &str) -> Option<()> {
        let labels = self.labels(spec);
        let (x, y) = (&self.ty("?x").dims, &self.ty("?y").dims);
        let find = |c: &char| {
            let left = labels.lhs.iter().position(|l| l == c).map(|i| x[i].clone());
            left.or_else(|| labels.rhs.iter().position(|l| l == c).map(|i| y[i].clone()))
        };
        let dims: Vec<Dim> = labels.out.iter().map(find).collect::<Option<_>>()?;
        self.set(shape, &dims)
    }

    /// The dims of a value that a reduction leaves.
    pub fn kept(&self, axes: &str, var: &str) -> Vec<Dim> {
        let axes: Vec<usize> = self.get(axes);
        let dims = self.ty(var).dims.iter().enumerate();
        dims.filter(|(i, _)| !axes.contains(i)).map(|(_, d)| d.clone()).collect()
    }

    /// `?x` is a scalar stretched to `?s`, and no dim of `?a` can be empty; sets `?t` to the dims that are left.
    pub fn reduced_scalar(&mut self) -> Option<()> {
        self.scalar("?x")?;
        let (axes, shape): (Vec<usize>, Vec<Dim>) = (self.get("?a"), self.get("?s"));
        axes.iter().all(|&a| shape[a].constant().is_some_and(|n| n > 0)).then_some(())?;
        let kept: Vec<Dim> = shape.into_iter().enumerate().filter(|(i, _)| !axes.contains(i)).map(|(_, d)| d).collect();
        self.set("?t", &kept)
    }

    /// Dim, start and end of `(slice ?a ?b ?e ..)`.
    pub fn slice(&self) -> (usize, Dim, Dim) {
        (self.get("?a"), self.get("?b"), self.get("?e"))
    }

    /// The dim of the slice is not the last one of a value.
    pub fn not_last(&self, var: &str) -> Option<()> {
        (self.slice().0 + 1 < self.ty(var).rank()).then_some(())
    }

    /// The dims of both operands of a product that the slice of its result cuts.
    pub fn sliced_letter(&self, spec: &str) -> (Option<usize>, Option<usize>) {
        let labels = self.labels(spec);
        let letter = labels.out[self.slice().0];
        let of = |letters: &[char]| letters.iter().position(|c| *c == letter);
        (of(&labels.lhs), of(&labels.rhs))
    }

    /// A slice of `(broadcast ?s ?x)` along a dim that is stretched, or, if `axis` is to be set, along a dim of `?x`.
    /// Sets `?t` to the dims of the result.
    pub fn slice_of_broadcast(&mut self, axis: Option<&str>) -> Option<()> {
        let ((at, start, end), mut shape): (_, Vec<Dim>) = (self.slice(), self.get("?s"));
        let own = &self.ty("?x").dims;
        let inner = (at + own.len()).checked_sub(shape.len()).filter(|&i| own[i] == shape[at]);
        match (inner, axis) {
            (Some(inner), Some(axis)) => self.set(axis, &inner)?,
            (None, None) => {}
            _ => return None,
        }
        shape[at] = &end - &start;
        self.set("?t", &shape)
    }
}

/// What stands in this order.
pub fn permuted<T: Clone>(of: &[T], order: &[usize]) -> Vec<T> {
    order.iter().map(|&i| of[i].clone()).collect()
}

/// `a <= b`, whatever the symbols are.
pub fn at_most(a: &Dim, b: &Dim) -> Option<()> {
    (b - a).constant().is_some_and(|n| n >= 0).then_some(())
}
