//! Every rule on 100 random terms that it matches: both sides through the interpreter, in doubles.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::fuzz::Rng;
use dsgc_ir::op::ROWS;
use dsgc_ir::{Bindings, Builder, DType, Data as Elements, Dim, DimRange, Graph, Program, Site, Tensor, Type, Value};
use dsgc_kernels::interp::{Precision, eval_graph};
use dsgc_passes::Numerics;
use dsgc_passes::simplify::language::{Data, EGraph, Facts, Node, op_of};
use dsgc_passes::simplify::matching::{Rewrite, rewrites};
use dsgc_passes::simplify::rules::RULES;
use egg::{ENodeOrVar, Id, Language, RecExpr, Searcher};

use crate::draw::{Term, term};

const DRAWS: usize = 100;
/// Terms that are drawn for a rule at most; the rarest matches once in some hundred.
const MOST_TRIES: usize = 200_000;
/// Largest error, relative to the larger of the number and 1, where rounding may differ.
const TOLERANCE: f64 = 1e-12;

#[test]
fn names_are_used_once() {
    let names: BTreeSet<&str> = RULES.iter().map(|r| r.name).collect();
    assert_eq!(names.len(), RULES.len());
}

#[test]
fn both_sides_are_equal() {
    let dims = [Dim::from(1i64), Dim::from(2i64), Dim::from(3i64), Dim::symbol("B")];
    for (i, rewrite) in rewrites(Numerics::Finite).iter().enumerate() {
        let mut rng = Rng::new(i as u64);
        let (mut checked, mut tries) = (0, 0);
        while checked < DRAWS {
            tries += 1;
            let what = format!("{} ({} => {})", rewrite.rule.name, rewrite.rule.from, rewrite.rule.to);
            assert!(tries < MOST_TRIES, "{what}: matched {checked} of {tries} random terms");
            let Some(left) = term(&rewrite.from.ast, &dims, &mut rng) else { continue };
            let Some(right) = right_side(rewrite, &left) else { continue };
            checked += usize::from(agree(rewrite.rule.numerics, &left, &right, &mut rng, &what));
        }
    }
}

/// The right side for a term that the left side matches.
pub fn right_side(rewrite: &Rewrite, left: &Term) -> Option<RecExpr<Node>> {
    let value = |ty: &Type| Data::Value { ty: ty.clone(), constant: None };
    let mut graph = EGraph::new(Facts { leaves: left.leaves.iter().map(value).collect(), steps: vec![] });
    let root = graph.add_expr(&left.nodes);
    graph.rebuild();
    let found = rewrite.from.search_eclass(&graph, root)?;
    let subst = found.substs.iter().find_map(|s| rewrite.bind(&mut graph, root, s))?;
    let mut right = RecExpr::default();
    let mut ids: Vec<Id> = Vec::new();
    for node in rewrite.to.as_ref() {
        let id = match node {
            ENodeOrVar::ENode(node) => right.add(node.clone().map_children(|c| ids[usize::from(c)])),
            ENodeOrVar::Var(v) => {
                let inner = graph.id_to_expr(subst[*v]);
                let mut own: Vec<Id> = Vec::new();
                for node in inner.as_ref() {
                    own.push(right.add(node.clone().map_children(|c| own[usize::from(c)])));
                }
                *own.last().expect("a term is not empty")
            }
        };
        ids.push(id);
    }
    Some(right)
}

/// Whether the term could be run; both sides are equal then.
fn agree(numerics: Numerics, left: &Term, right: &RecExpr<Node>, rng: &mut Rng, what: &str) -> bool {
    let special = numerics == Numerics::Exact;
    let bindings: Bindings = [("B".into(), rng.between(0, 3))].into_iter().collect();
    let inputs: Vec<Tensor> = left.leaves.iter().map(|ty| tensor(ty, &bindings, special, rng)).collect();
    let show = Tensor::bool(&[bindings["B"] as usize], vec![false; bindings["B"] as usize]);
    let run = |term: &RecExpr<Node>| {
        let program = program(&left.leaves, term);
        let names: Vec<String> = (0..inputs.len()).map(|i| format!("x{i}")).collect();
        let mut named: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&inputs).collect();
        named.push(("show", &show));
        let done = eval_graph(&program, "g", &named, &BTreeMap::new(), Precision::F64);
        done.map(|done| done.outputs[0].1.clone()).map_err(|e| format!("{e} in\n{program}"))
    };
    // Indices beyond their table, whole numbers by zero, slices of what is empty: errors of the draw.
    let Ok(a) = run(&left.nodes) else { return false };
    let b = run(right).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!((a.dtype(), &a.shape), (b.dtype(), &b.shape), "{what}");
    let (x, y) = (a.to_f64(), b.to_f64());
    if !special && x.iter().any(|x| !x.is_finite()) {
        return false;
    }
    let same = |(x, y): (&f64, &f64)| match special {
        true => x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan(),
        false => (x - y).abs() <= TOLERANCE * x.abs().max(1.0),
    };
    if !x.iter().zip(&y).all(same) {
        panic!(
            "{what}: {x:?} and {y:?} from {inputs:?} by\n{}{}",
            program(&left.leaves, &left.nodes),
            program(&left.leaves, right)
        );
    }
    !x.is_empty()
}

/// Numbers of every kind: ordinary ones, and if `special` zeros of both signs, infinities, none, and the largest. Every
/// other tensor has ordinary ones only, so that rounding shows.
fn tensor(ty: &Type, bindings: &Bindings, special: bool, rng: &mut Rng) -> Tensor {
    let shape = ty.shape(bindings).expect("all dims are bound");
    let n: usize = shape.iter().product();
    let rare = [0.0, -0.0, 1.0, -1.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e300, -1e300, 5e-324];
    let rare = if special { &rare[..] } else { &rare[..4] };
    let ordinary = rng.once_in(2);
    let float = |rng: &mut Rng| if ordinary || rng.once_in(2) { 4.0 * rng.unit() - 2.0 } else { rng.choose(rare) };
    let whole = |rng: &mut Rng| match rng.once_in(8) {
        true => rng.choose(&[i32::MIN, i32::MAX, -1, -2]),
        false => rng.below(3) as i32,
    };
    let elements = match ty.dtype {
        DType::F32 | DType::Bf16 | DType::F16 => Elements::F64((0..n).map(|_| float(rng)).collect()),
        DType::I32 => Elements::I32((0..n).map(|_| whole(rng)).collect()),
        DType::Bool => Elements::Bool((0..n).map(|_| rng.once_in(2)).collect()),
        DType::Key | DType::Quantized(_) => panic!("no rule is about {}", ty.dtype),
    };
    Tensor::new(&shape, elements)
}

/// A graph with the term as its only output; one input shows how large `B` is.
fn program(leaves: &[Type], term: &RecExpr<Node>) -> Program {
    let mut graph = Graph::new("g");
    graph.dims.push(DimRange { symbol: "B".into(), min: 0, max: 3 });
    let inputs: Vec<Value> =
        leaves.iter().enumerate().map(|(i, ty)| graph.input(format!("x{i}"), ty.clone())).collect();
    graph.input("show", Type::new(DType::Bool, [Dim::symbol("B")]));
    let root = build(&mut graph, &inputs, term);
    graph.outputs.push(("y".into(), root));
    Program { graphs: vec![graph], ..Program::default() }
}

/// Appends a term, whose values from outside are given.
pub fn build(graph: &mut Graph, leaves: &[Value], term: &RecExpr<Node>) -> Value {
    let mut values: Vec<Option<Value>> = Vec::new();
    for node in term.as_ref() {
        let value = match node {
            Node::Leaf(i) => Some(leaves[*i as usize]),
            Node::Attribute(_) => None,
            Node::Op(name, children) => {
                let row = ROWS.iter().find(|r| r.name == *name).expect("a row");
                let (own, operands) = children.split_at(row.attributes.len());
                let texts = own.iter().map(|&a| match &term[a] {
                    Node::Attribute(text) => &**text,
                    other => panic!("{other:?} is no attribute"),
                });
                let op = op_of(row, texts).expect("it was drawn to fit");
                let operands: Vec<Value> =
                    operands.iter().map(|&o| values[usize::from(o)].expect("an operand")).collect();
                Some(Builder::new(graph, Site::default()).one(op, &operands))
            }
        };
        values.push(value);
    }
    values.last().copied().flatten().expect("a term is a value")
}
