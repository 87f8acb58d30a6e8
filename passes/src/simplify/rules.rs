//! The rules of `simplify`, one table.
//!
//! A rule is directed: where its left side matches and its condition holds, its right side is equal. Both are written
//! as patterns over ops, attributes before operands in the order of the op table. `@unary` and `@binary` stand for
//! every elementwise op of one or two operands without attributes, `@reduce` for every reduction, so that an op that
//! enters the table has its rules at once. The condition sees types, attributes and known numbers of what matched, and
//! computes the attributes of the right side. A match whose right side has no type, or another one, is passed over.
//!
//! Each rule says what it does to numbers ([`Numerics`]), and each is run on random numbers in the tests. Rules whose sides have
//! different gradients have no place here, because the pass also runs before `autodiff`: `max(x, 0)` for `relu(x)` differs
//! at 0, and `where(c, sqrt(x), sqrt(1))` for `sqrt(where(c, x, 1))` has none where the choice guards it.

use dsgc_ir::infer::Contraction;
use dsgc_ir::{DType, Dim};

use crate::pipeline::Numerics;

use super::matching::{Match, at_most, permuted};

/// A rule.
#[derive(Clone, Copy)]
pub struct Rule {
    /// Its name in reports.
    pub name: &'static str,
    /// What it does to numbers.
    pub numerics: Numerics,
    /// The left side.
    pub from: &'static str,
    /// The right side.
    pub to: &'static str,
    /// The condition, which sets the attributes that only the right side has.
    pub when: fn(&mut Match) -> Option<()>,
}

const fn exact(name: &'static str, from: &'static str, to: &'static str, when: fn(&mut Match) -> Option<()>) -> Rule {
    Rule { name, numerics: Numerics::Exact, from, to, when }
}

const fn reassociating(
    name: &'static str,
    from: &'static str,
    to: &'static str,
    when: fn(&mut Match) -> Option<()>,
) -> Rule {
    Rule { name, numerics: Numerics::Reassociating, from, to, when }
}

const fn finite(name: &'static str, from: &'static str, to: &'static str, when: fn(&mut Match) -> Option<()>) -> Rule {
    Rule { name, numerics: Numerics::Finite, from, to, when }
}

/// No condition.
fn always(_: &mut Match) -> Option<()> {
    Some(())
}

/// All rules.
#[rustfmt::skip]
pub const RULES: &[Rule] = &[
    // Broadcasts move outwards, so that work happens on the smaller tensor.
    exact("unary of broadcast", "(@unary (broadcast ?s ?x))", "(broadcast ?s (@unary ?x))", always),
    exact("cast of broadcast", "(cast ?d (broadcast ?s ?x))", "(broadcast ?s (cast ?d ?x))", always),
    exact("binary of broadcasts", "(@binary (broadcast ?s ?x) (broadcast ?s ?y))",
        "(broadcast ?s (@binary (broadcast ?m ?x) (broadcast ?m ?y)))", |m| m.join(&["?x", "?y"])),
    exact("where of broadcasts", "(where (broadcast ?s ?c) (broadcast ?s ?x) (broadcast ?s ?y))",
        "(broadcast ?s (where (broadcast ?m ?c) (broadcast ?m ?x) (broadcast ?m ?y)))", |m| m.join(&["?c", "?x", "?y"])),
    exact("broadcast twice", "(broadcast ?s (broadcast ?t ?x))", "(broadcast ?s ?x)", always),
    exact("broadcast of nothing", "(broadcast ?s ?x)", "?x", always),
    exact("broadcast of reshaped scalar", "(broadcast ?s (reshape ?t ?x))", "(broadcast ?s ?x)", |m| m.scalar("?x")),
    exact("transpose of stretched scalar", "(transpose ?p (broadcast ?s ?x))", "(broadcast ?t ?x)", |m| {
        m.scalar("?x")?;
        let (order, shape): (Vec<usize>, Vec<Dim>) = (m.get("?p"), m.get("?s"));
        m.set("?t", &permuted(&shape, &order))
    }),
    exact("reshape of stretched scalar", "(reshape ?t (broadcast ?s ?x))", "(broadcast ?t ?x)", |m| m.scalar("?x")),
    exact("largest of stretched scalar", "(reduce_max ?a (broadcast ?s ?x))", "(broadcast ?t ?x)", |m| m.reduced_scalar()),
    exact("smallest of stretched scalar", "(reduce_min ?a (broadcast ?s ?x))", "(broadcast ?t ?x)", |m| m.reduced_scalar()),

    // Choices.
    exact("where of equals", "(where ?c ?x ?x)", "?x", always),
    exact("where not", "(where (not ?c) ?x ?y)", "(where ?c ?y ?x)", always),
    exact("where within then", "(where ?c (where ?c ?x ?y) ?z)", "(where ?c ?x ?z)", always),
    exact("where within else", "(where ?c ?x (where ?c ?y ?z))", "(where ?c ?x ?z)", always),
    exact("where and", "(where ?c (where ?d ?x ?y) ?y)", "(where (and ?c ?d) ?x ?y)", always),
    exact("where or", "(where ?c ?x (where ?d ?x ?y))", "(where (or ?c ?d) ?x ?y)", always),
    exact("where true", "(where ?c ?x ?y)", "?x", |m| m.is("?c", 1.0)),
    exact("where false", "(where ?c ?x ?y)", "?y", |m| m.is("?c", 0.0)),
    exact("where one else zero", "(where ?c ?x ?y)", "(cast f32 ?c)", |m| {
        m.is("?x", 1.0)?;
        m.is("?y", 0.0)
    }),

    // Truth values.
    exact("not equal", "(not (eq ?x ?y))", "(ne ?x ?y)", always),
    exact("not unequal", "(not (ne ?x ?y))", "(eq ?x ?y)", always),
    exact("not less, whole", "(not (lt ?x ?y))", "(le ?y ?x)", |m| m.dtype("?x", DType::I32)),
    exact("not at most, whole", "(not (le ?x ?y))", "(lt ?y ?x)", |m| m.dtype("?x", DType::I32)),
    exact("neither", "(and (not ?x) (not ?y))", "(not (or ?x ?y))", always),
    exact("not both", "(or (not ?x) (not ?y))", "(not (and ?x ?y))", always),
    exact("and of equals", "(and ?x ?x)", "?x", always),
    exact("or of equals", "(or ?x ?x)", "?x", always),
    exact("and true", "(and ?x ?c)", "?x", |m| m.is("?c", 1.0)),
    exact("true and", "(and ?c ?x)", "?x", |m| m.is("?c", 1.0)),
    exact("and false", "(and ?x ?c)", "?c", |m| m.is("?c", 0.0)),
    exact("false and", "(and ?c ?x)", "?c", |m| m.is("?c", 0.0)),
    exact("or false", "(or ?x ?c)", "?x", |m| m.is("?c", 0.0)),
    exact("false or", "(or ?c ?x)", "?x", |m| m.is("?c", 0.0)),
    exact("or true", "(or ?x ?c)", "?c", |m| m.is("?c", 1.0)),
    exact("true or", "(or ?c ?x)", "?c", |m| m.is("?c", 1.0)),
    exact("cast of cast truth", "(cast ?d (cast ?e ?x))", "(cast ?d ?x)", |m| m.dtype("?x", DType::Bool)),
    exact("cast of nothing", "(cast ?d ?x)", "?x", always),
    exact("cast truth unequal zero", "(ne (cast ?d ?x) ?z)", "?x", |m| {
        m.dtype("?x", DType::Bool)?;
        m.is("?z", 0.0)
    }),

    // Signs and neutral elements. Rounding is the same on both sides of zero.
    exact("add negated", "(add ?x (neg ?y))", "(sub ?x ?y)", always),
    exact("negated add", "(add (neg ?x) ?y)", "(sub ?y ?x)", always),
    exact("subtract negated", "(sub ?x (neg ?y))", "(add ?x ?y)", always),
    exact("product of negated", "(mul (neg ?x) (neg ?y))", "(mul ?x ?y)", always),
    exact("negated times", "(mul (neg ?x) ?y)", "(neg (mul ?x ?y))", always),
    exact("times negated", "(mul ?x (neg ?y))", "(neg (mul ?x ?y))", always),
    exact("negated by", "(div (neg ?x) ?y)", "(neg (div ?x ?y))", |m| m.dtype("?x", DType::F32)),
    exact("by negated", "(div ?x (neg ?y))", "(neg (div ?x ?y))", |m| m.dtype("?x", DType::F32)),
    exact("negated twice", "(neg (neg ?x))", "?x", always),
    exact("magnitude of negated", "(abs (neg ?x))", "(abs ?x)", always),
    exact("magnitude twice", "(abs (abs ?x))", "(abs ?x)", always),
    exact("times minus one", "(mul ?x ?c)", "(neg ?x)", |m| m.is("?c", -1.0)),
    exact("minus one times", "(mul ?c ?x)", "(neg ?x)", |m| m.is("?c", -1.0)),
    exact("add minus zero", "(add ?x ?c)", "?x", |m| m.is_neutral("?c")),
    exact("minus zero add", "(add ?c ?x)", "?x", |m| m.is_neutral("?c")),
    exact("to the power of one", "(pow ?x ?c)", "?x", |m| m.is("?c", 1.0)),
    exact("relu twice", "(relu (relu ?x))", "(relu ?x)", always),
    exact("max of equals", "(max ?x ?x)", "?x", always),
    exact("min of equals", "(min ?x ?x)", "?x", always),
    exact("max of max", "(max (max ?x ?c) ?d)", "(max ?x ?d)", |m| m.less("?c", "?d")),
    exact("max within max", "(max (max ?x ?c) ?d)", "(max ?x ?c)", |m| m.less("?d", "?c")),
    exact("min of min", "(min (min ?x ?c) ?d)", "(min ?x ?d)", |m| m.less("?d", "?c")),
    exact("min within min", "(min (min ?x ?c) ?d)", "(min ?x ?c)", |m| m.less("?c", "?d")),

    // Transposes move outwards, until they meet or become letters of a product.
    exact("unary of transpose", "(@unary (transpose ?p ?x))", "(transpose ?p (@unary ?x))", always),
    exact("cast of transpose", "(cast ?d (transpose ?p ?x))", "(transpose ?p (cast ?d ?x))", always),
    exact("binary of transposes", "(@binary (transpose ?p ?x) (transpose ?p ?y))", "(transpose ?p (@binary ?x ?y))", always),
    exact("binary of transpose and scalar", "(@binary (transpose ?p ?x) (broadcast ?s ?c))",
        "(transpose ?p (@binary ?x (broadcast ?t ?c)))", |m| { m.scalar("?c")?; m.dims_of("?x", "?t") }),
    exact("binary of scalar and transpose", "(@binary (broadcast ?s ?c) (transpose ?p ?x))",
        "(transpose ?p (@binary (broadcast ?t ?c) ?x))", |m| { m.scalar("?c")?; m.dims_of("?x", "?t") }),
    exact("where of transposes", "(where (transpose ?p ?c) (transpose ?p ?x) (transpose ?p ?y))",
        "(transpose ?p (where ?c ?x ?y))", always),
    exact("transpose twice", "(transpose ?p (transpose ?q ?x))", "(transpose ?r ?x)", |m| {
        let (second, first): (Vec<usize>, Vec<usize>) = (m.get("?p"), m.get("?q"));
        m.set("?r", &permuted(&first, &second))
    }),
    exact("transpose of nothing", "(transpose ?p ?x)", "?x", |m| {
        let order: Vec<usize> = m.get("?p");
        order.iter().enumerate().all(|(i, &o)| i == o).then_some(())
    }),
    exact("product of transpose", "(contract ?e (transpose ?p ?x) ?y)", "(contract ?f ?x ?y)", |m| {
        let (labels, order): (Contraction, Vec<usize>) = (m.labels("?e"), m.get("?p"));
        let mut new = labels.clone();
        order.iter().zip(&labels.lhs).for_each(|(&i, &c)| new.lhs[i] = c);
        // Sums run over the letters in the order of the first operand.
        let summed = |l: &Contraction| l.lhs.iter().copied().filter(|c| !l.out.contains(c)).collect::<Vec<_>>();
        (summed(&labels) == summed(&new)).then_some(())?;
        m.set("?f", &new.spec())
    }),
    exact("product with transpose", "(contract ?e ?x (transpose ?p ?y))", "(contract ?f ?x ?y)", |m| {
        let (mut labels, order): (Contraction, Vec<usize>) = (m.labels("?e"), m.get("?p"));
        let old = labels.rhs.clone();
        order.iter().zip(old).for_each(|(&i, c)| labels.rhs[i] = c);
        m.set("?f", &labels.spec())
    }),
    exact("transpose of product", "(transpose ?p (contract ?e ?x ?y))", "(contract ?f ?x ?y)", |m| {
        let (mut labels, order): (Contraction, Vec<usize>) = (m.labels("?e"), m.get("?p"));
        labels.out = permuted(&labels.out, &order);
        m.set("?f", &labels.spec())
    }),
    exact("reduction of transpose", "(@reduce ?a (transpose ?p ?x))", "(@reduce ?b ?x)", |m| {
        // Sums run in the order of the dims: along one dim it stays, and what is left must not be transposed.
        let (axes, order): (Vec<usize>, Vec<usize>) = (m.get("?a"), m.get("?p"));
        let [axis] = axes[..] else { return None };
        let kept = order.iter().enumerate().filter(|(i, _)| *i != axis).map(|(_, &o)| o);
        kept.is_sorted().then_some(())?;
        m.set("?b", &vec![order[axis]])
    }),

    // Slices move inwards, so that what is cut away is never computed.
    exact("slice of everything", "(slice ?a ?b ?e ?x)", "?x", |m| {
        let (axis, start, end) = m.slice();
        (start == Dim::default() && m.ty("?x").dims[axis] == end).then_some(())
    }),
    exact("slice twice", "(slice ?a ?b ?e (slice ?a ?c ?f ?x))", "(slice ?a ?g ?h ?x)", |m| {
        let ((_, start, end), first): (_, Dim) = (m.slice(), m.get("?c"));
        m.set("?g", &(&first + &start))?;
        m.set("?h", &(&first + &end))
    }),
    exact("slice of unary", "(slice ?a ?b ?e (@unary ?x))", "(@unary (slice ?a ?b ?e ?x))", always),
    exact("slice of cast", "(slice ?a ?b ?e (cast ?d ?x))", "(cast ?d (slice ?a ?b ?e ?x))", always),
    exact("slice of binary", "(slice ?a ?b ?e (@binary ?x ?y))",
        "(@binary (slice ?a ?b ?e ?x) (slice ?a ?b ?e ?y))", always),
    exact("slice of where", "(slice ?a ?b ?e (where ?c ?x ?y))",
        "(where (slice ?a ?b ?e ?c) (slice ?a ?b ?e ?x) (slice ?a ?b ?e ?y))", always),
    exact("slice of stretched dim", "(slice ?a ?b ?e (broadcast ?s ?x))", "(broadcast ?t ?x)", |m| m.slice_of_broadcast(None)),
    exact("slice of broadcast", "(slice ?a ?b ?e (broadcast ?s ?x))", "(broadcast ?t (slice ?g ?b ?e ?x))",
        |m| m.slice_of_broadcast(Some("?g"))),
    exact("slice of transpose", "(slice ?a ?b ?e (transpose ?p ?x))", "(transpose ?p (slice ?g ?b ?e ?x))", |m| {
        let order: Vec<usize> = m.get("?p");
        m.set("?g", &order[m.slice().0])
    }),
    exact("slice of reshape", "(slice ?a ?b ?e (reshape ?s ?x))", "(reshape ?t (slice ?g ?b ?e ?x))", |m| {
        let ((axis, start, end), shape): (_, Vec<Dim>) = (m.slice(), m.get("?s"));
        let old = m.ty("?x").dims.clone();
        // The dim and those on one side of it are as before.
        let from_end = shape.len() - axis;
        let at = if old.len() > axis && old[..=axis] == shape[..=axis] {
            axis
        } else if old.len() >= from_end && old[old.len() - from_end..] == shape[axis..] {
            old.len() - from_end
        } else {
            return None;
        };
        let mut cut = shape;
        cut[axis] = &end - &start;
        m.set("?t", &cut)?;
        m.set("?g", &at)
    }),
    exact("slice of row of product", "(slice ?a ?b ?e (contract ?s ?x ?y))", "(contract ?s (slice ?g ?b ?e ?x) ?y)", |m| {
        let (left, right) = m.sliced_letter("?s");
        right.is_none().then_some(())?;
        m.set("?g", &left?)
    }),
    exact("slice of column of product", "(slice ?a ?b ?e (contract ?s ?x ?y))", "(contract ?s ?x (slice ?h ?b ?e ?y))", |m| {
        let (left, right) = m.sliced_letter("?s");
        left.is_none().then_some(())?;
        m.set("?h", &right?)
    }),
    exact("slice of batch of product", "(slice ?a ?b ?e (contract ?s ?x ?y))",
        "(contract ?s (slice ?g ?b ?e ?x) (slice ?h ?b ?e ?y))", |m| {
        let (left, right) = m.sliced_letter("?s");
        m.set("?g", &left?)?;
        m.set("?h", &right?)
    }),
    exact("slice of reduction", "(slice ?a ?b ?e (@reduce ?r ?x))", "(@reduce ?r (slice ?g ?b ?e ?x))", |m| {
        let (axis, axes): (usize, Vec<usize>) = (m.slice().0, m.get("?r"));
        let kept = (0..m.ty("?x").rank()).filter(|i| !axes.contains(i)).nth(axis)?;
        m.set("?g", &kept)
    }),
    exact("slice of token_logp", "(slice ?a ?b ?e (token_logp ?x ?y))",
        "(token_logp (slice ?a ?b ?e ?x) (slice ?a ?b ?e ?y))", always),
    exact("slice of token_logp_grad", "(slice ?a ?b ?e (token_logp_grad ?x ?y ?z))",
        "(token_logp_grad (slice ?a ?b ?e ?x) (slice ?a ?b ?e ?y) (slice ?a ?b ?e ?z))", always),
    exact("slice of embed", "(slice ?a ?b ?e (embed ?x ?y))", "(embed ?x (slice ?a ?b ?e ?y))", always),
    exact("slice of layer_norm", "(slice ?a ?b ?e (layer_norm ?n ?x ?y ?z))",
        "(layer_norm ?n (slice ?a ?b ?e ?x) ?y ?z)", |m| m.not_last("?x")),
    exact("slice of rms_norm", "(slice ?a ?b ?e (rms_norm ?n ?x ?y))", "(rms_norm ?n (slice ?a ?b ?e ?x) ?y)", |m| m.not_last("?x")),
    exact("slice of rope", "(slice ?a ?b ?e (rope ?i ?x ?y ?z))",
        "(rope ?i (slice ?a ?b ?e ?x) (slice ?a ?b ?e ?y) ?z)", |m| (m.slice().0 < 2).then_some(())),
    exact("slice of first", "(slice ?a ?b ?e (concat ?a ?x ?y))", "(slice ?a ?b ?e ?x)", |m| {
        let (axis, _, end) = m.slice();
        at_most(&end, &m.ty("?x").dims[axis])
    }),
    exact("slice of second", "(slice ?a ?b ?e (concat ?a ?x ?y))", "(slice ?a ?g ?h ?y)", |m| {
        let (axis, start, end) = m.slice();
        let first = m.ty("?x").dims[axis].clone();
        at_most(&first, &start)?;
        m.set("?g", &(&start - &first))?;
        m.set("?h", &(&end - &first))
    }),
    exact("slice beside concat", "(slice ?a ?b ?e (concat ?c ?x ?y))",
        "(concat ?c (slice ?a ?b ?e ?x) (slice ?a ?b ?e ?y))", |m| (m.slice().0 != m.get::<usize>("?c")).then_some(())),
    exact("neighbouring slices", "(concat ?a (slice ?a ?b ?c ?x) (slice ?a ?c ?e ?x))", "(slice ?a ?b ?e ?x)", always),
    exact("slice within pad", "(slice ?a ?b ?e (pad ?a ?p ?q ?x))", "(slice ?a ?g ?h ?x)", |m| {
        let ((axis, start, end), before): (_, Dim) = (m.slice(), m.get("?p"));
        at_most(&before, &start)?;
        at_most(&end, &(&before + &m.ty("?x").dims[axis]))?;
        m.set("?g", &(&start - &before))?;
        m.set("?h", &(&end - &before))
    }),
    exact("slice beside pad", "(slice ?a ?b ?e (pad ?c ?p ?q ?x))", "(pad ?c ?p ?q (slice ?a ?b ?e ?x))",
        |m| (m.slice().0 != m.get::<usize>("?c")).then_some(())),
    exact("pad twice", "(pad ?a ?b ?e (pad ?a ?c ?f ?x))", "(pad ?a ?g ?h ?x)", |m| {
        let [b, e, c, f]: [Dim; 4] = ["?b", "?e", "?c", "?f"].map(|v| m.get(v));
        m.set("?g", &(&b + &c))?;
        m.set("?h", &(&e + &f))
    }),

    // Equal in exact arithmetic.
    reassociating("scaled first factor", "(contract ?e (mul ?x (broadcast ?s ?c)) ?y)",
        "(mul (contract ?e ?x ?y) (broadcast ?t ?c))", |m| { m.scalar("?c")?; m.result_of_product("?e", "?t") }),
    reassociating("scaled second factor", "(contract ?e ?x (mul ?y (broadcast ?s ?c)))",
        "(mul (contract ?e ?x ?y) (broadcast ?t ?c))", |m| { m.scalar("?c")?; m.result_of_product("?e", "?t") }),
    reassociating("sum of scaled", "(reduce_sum ?a (mul ?x (broadcast ?s ?c)))", "(mul (reduce_sum ?a ?x) (broadcast ?t ?c))", |m| {
        m.scalar("?c")?;
        let kept = m.kept("?a", "?x");
        m.set("?t", &kept)
    }),
    reassociating("sum of negated", "(reduce_sum ?a (neg ?x))", "(neg (reduce_sum ?a ?x))", always),
    reassociating("sum twice", "(reduce_sum ?a (reduce_sum ?b ?x))", "(reduce_sum ?c ?x)", |m| {
        let (outer, inner): (Vec<usize>, Vec<usize>) = (m.get("?a"), m.get("?b"));
        let left: Vec<usize> = (0..m.ty("?x").rank()).filter(|i| !inner.contains(i)).collect();
        let mut all: Vec<usize> = outer.iter().map(|&i| left[i]).chain(inner).collect();
        all.sort_unstable();
        m.set("?c", &all)
    }),
    reassociating("negated difference", "(neg (sub ?x ?y))", "(sub ?y ?x)", always),
    reassociating("common factor", "(add (mul ?x ?z) (mul ?y ?z))", "(mul (add ?x ?y) ?z)", always),
    reassociating("common second factor", "(add (contract ?e ?x ?z) (contract ?e ?y ?z))", "(contract ?e (add ?x ?y) ?z)", always),
    reassociating("common first factor", "(add (contract ?e ?z ?x) (contract ?e ?z ?y))", "(contract ?e ?z (add ?x ?y))", always),
    reassociating("square", "(pow ?x ?c)", "(mul ?x ?x)", |m| m.is("?c", 2.0)),
    reassociating("add zero", "(add ?x ?c)", "?x", |m| m.is_zero("?c")),
    reassociating("zero add", "(add ?c ?x)", "?x", |m| m.is_zero("?c")),
    reassociating("sigmoid times itself", "(mul ?x (sigmoid ?x))", "(silu ?x)", always),

    // Equal where everything is finite.
    finite("difference of equals", "(sub ?x ?x)", "(broadcast ?s (const 0.0 f32))", |m| m.dims_of("?x", "?s")),
    finite("times zero", "(mul ?x ?c)", "?c", |m| m.is_zero("?c")),
    finite("zero times", "(mul ?c ?x)", "?c", |m| m.is_zero("?c")),
    finite("times truth", "(mul ?x (cast f32 ?c))", "(where ?c ?x (broadcast ?s (const 0.0 f32)))", |m| {
        m.dtype("?c", DType::Bool)?;
        m.dims_of("?x", "?s")
    }),
    finite("not less", "(not (lt ?x ?y))", "(le ?y ?x)", always),
    finite("not at most", "(not (le ?x ?y))", "(lt ?y ?x)", always),
    finite("logarithm of power", "(log (exp ?x))", "?x", always),
    finite("product of powers", "(mul (exp ?x) (exp ?y))", "(exp (add ?x ?y))", always),
    finite("quotient of powers", "(div (exp ?x) (exp ?y))", "(exp (sub ?x ?y))", always),
    finite("logarithm of sigmoid", "(log (sigmoid ?x))", "(log_sigmoid ?x)", always),
    finite("product of padded", "(contract ?e (pad ?a ?b ?c ?x) ?y)", "(pad ?g ?b ?c (contract ?e ?x ?y))", |m| {
        let (labels, axis): (Contraction, usize) = (m.labels("?e"), m.get("?a"));
        let letter = labels.lhs[axis];
        (!labels.rhs.contains(&letter)).then_some(())?;
        m.set("?g", &labels.out.iter().position(|c| *c == letter)?)
    }),
];
