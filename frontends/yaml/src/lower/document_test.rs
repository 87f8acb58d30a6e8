//! Tests in documents (D24): given values, expected ones, and a graph between them.
//!
//! A test has no models and no plan. Its sizes are those of the given values, so its graph has no symbols. A given
//! value can stand for any let, and what no expected value needs is not computed: so a loss is tested from the logits
//! on.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::{Diag, Span, nearest};
use dsgc_ir::{DType, Data, Dim, Program, Tensor};

use crate::expr::{Expr, Word};
use crate::functions::Functions;
use crate::graph::{Declaration, Graph as Source, Test, Tree};
use crate::literal::{Constant, Literal};

use super::call::mentions;
use super::scope::{Home, Scope};
use super::value::{Arg, Val};
use super::{Lowering, R, Reported, SEQUENCE, TokenIds};

/// A test that can be run: `graph` of `program` on `inputs` gives `expect`.
#[derive(Clone, Debug, PartialEq)]
pub struct DocumentTest {
    /// The graph that is tested, for messages.
    pub name: String,
    /// Where the test stands.
    pub span: Span,
    /// A program with one graph and no states.
    pub program: Program,
    /// Name of the graph.
    pub graph: String,
    /// Its inputs; floats are doubles.
    pub inputs: Vec<(String, Tensor)>,
    /// What its outputs should be; a whole number may stand for a float, 0 and 1 for truth values.
    pub expect: Vec<(String, Tensor)>,
    /// Largest absolute difference.
    pub tolerance: f64,
}

/// Largest difference where a test says nothing.
const TOLERANCE: f64 = 1e-6;

/// The tests of a document with these graphs and options. `functions` are in its scope: an earlier one wins.
pub fn document_tests(
    tests: &[Test],
    options: &[Declaration],
    graphs: &[Source],
    functions: &[&Functions],
) -> Result<Vec<DocumentTest>, Vec<Diag>> {
    let (mut all, mut errors) = (Vec::new(), Vec::new());
    for test in tests {
        match one(test, options, graphs, functions) {
            Ok(test) => all.push(test),
            Err(diags) => errors.extend(diags),
        }
    }
    if errors.is_empty() { Ok(all) } else { Err(errors) }
}

fn one(
    test: &Test,
    options: &[Declaration],
    graphs: &[Source],
    functions: &[&Functions],
) -> Result<DocumentTest, Vec<Diag>> {
    let with = |name: &str| test.with.iter().find(|(n, _)| n.text == name).map(|(_, l)| l.value.clone());
    let id = |name: &str| match with(name) {
        Some(Constant::Int(n)) => i32::try_from(n).ok(),
        _ => None,
    };
    let ids = TokenIds { pad: id("pad"), eos: id("eos"), bos: id("bos") };
    let mut lowering = Lowering::new(functions, &[], ids);
    let given = options.iter().filter_map(|o| {
        let value = with(&o.name.text).or_else(|| o.default.as_ref().map(|d| d.value.clone()))?;
        Some((o.name.text.clone(), value))
    });
    let values: BTreeMap<String, Constant> = given.collect();
    for (name, literal) in &test.with {
        let is_id = ["pad", "eos", "bos"].contains(&name.text.as_str());
        if is_id && !matches!(literal.value, Constant::Int(_)) {
            let diag = Diag::error(format!("found `{}`, expected the id of a token", literal.value));
            let _: R<()> = lowering.fail(diag.label(literal.span, ""));
        } else if !is_id && !options.iter().any(|o| o.name.text == name.text) {
            let known = options.iter().map(|o| o.name.text.as_str()).chain(["pad", "eos", "bos"]);
            let _: R<()> = lowering.unknown(name, "an option or the id of a token", known);
        }
    }
    let made = match graphs.iter().find(|g| g.name.text == test.graph.text) {
        None => lowering.unknown(&test.graph, "a graph of this document", graphs.iter().map(|g| g.name.text.as_str())),
        Some(source) => {
            let home = Home {
                statics: lowering.statics(options, &values),
                graphs,
                functions: functions.into(),
                first: 0,
                role: None,
                calls_models: false,
            };
            lowering.test(home, test, source)
        }
    };
    match made {
        Ok(made) if lowering.errors.is_empty() => Ok(made),
        _ => {
            let place = |diag: Diag| match diag
                .labels
                .iter()
                .any(|l| l.span.source == test.span.source && l.span.line >= test.span.line)
            {
                true => diag,
                false => diag.label(test.graph.span, "in this test"),
            };
            Err(lowering.errors.into_iter().map(place).collect())
        }
    }
}

impl<'a> Lowering<'a> {
    fn unknown<'n, T>(&mut self, word: &Word, expected: &str, known: impl Iterator<Item = &'n str>) -> R<T> {
        let diag = Diag::error(format!("found `{}`, expected {expected}", word.text)).label(word.span, "");
        self.fail(match nearest(&word.text, known) {
            Some(near) => diag.help(format!("write `{near}`")),
            None => diag,
        })
    }

    fn test(&mut self, home: Home<'a>, test: &Test, source: &'a Source) -> R<DocumentTest> {
        self.begin(&source.name.text, &[]);
        let mut scope = Scope::new(home);
        let given = |name: &str| test.given.iter().find(|(n, _)| n.text == name);
        let mut known: Vec<String> = source.lets.iter().map(|(name, _)| name.text.clone()).collect();
        for (name, ty) in &source.inputs {
            match super::shape::parts(ty) {
                Some(("sequence", _)) => known.extend(SEQUENCE.map(|(field, _)| format!("{}.{field}", name.text))),
                _ => known.push(name.text.clone()),
            }
        }
        for (name, literal) in &test.given {
            if !known.contains(&name.text) {
                let _: R<()> = self.unknown(name, "an input or a let", known.iter().map(String::as_str));
            }
            let _ = self.constant_tensor(literal, None);
        }
        if !self.errors.is_empty() {
            return Err(Reported);
        }
        let shapes = self.given_dims(test, source);
        let needed = needed(test, source);
        let size = |symbol: &str| match shapes.get(symbol) {
            Some(n) => Some(Dim::from(*n)),
            None => (!needed.contains(symbol)).then(|| Dim::symbol(symbol)),
        };
        self.symbols(&mut scope, source, size, "give a value to an input that has this dim");
        let mut inputs = Vec::new();
        // Inputs of a graph come before all its ops: pinned lets as well.
        let mut pins = Vec::new();
        for (name, ty) in &source.inputs {
            let value = self.given_input(&mut scope, test, name, ty, &mut inputs);
            let value = match value {
                Ok(Some(value)) => value,
                Ok(None) if needed.contains(name.text.as_str()) => {
                    let diag = Diag::error(format!("the test gives no `{}`", name.text)).label(test.span, "");
                    self.fail(diag.label(ty.span, "declared here"))?
                }
                Ok(None) | Err(Reported) => Val::Bad,
            };
            self.bind(&mut scope, name, value);
        }
        for (name, _) in &source.lets {
            let Some((_, literal)) = given(&name.text) else { continue };
            let value = match &literal.value {
                Constant::List(_) => {
                    let tensor = self.constant_tensor(literal, None)?;
                    self.pin(&name.text, tensor, &mut inputs)
                }
                value => Val::Static(value.clone()),
            };
            pins.push((name.text.as_str(), value));
        }
        for (name, tree) in &source.lets {
            match pins.iter().find(|(n, _)| *n == name.text) {
                Some((_, value)) => self.bind(&mut scope, name, value.clone()),
                None if needed.contains(name.text.as_str()) => self.let_value(&mut scope, name, tree),
                None => {}
            }
        }
        self.asserts(&mut scope, source);
        let mut expect = Vec::new();
        for (name, literal) in &test.expect {
            let Ok(value) = self.expected(&mut scope, source, name) else { continue };
            let arg = Arg { span: name.span, value };
            let Ok(values) = self.one_dtype(name.span, &[&arg]) else { continue };
            let Ok(tensor) = self.constant_tensor(literal, None) else { continue };
            self.graph.outputs.push((name.text.clone(), values[0]));
            expect.push((name.text.clone(), tensor));
        }
        for (k, assert) in std::mem::take(&mut self.asserted).into_iter().enumerate() {
            let name = format!("assert.{k}");
            self.graph.outputs.push((name.clone(), assert.holds));
            expect.push((name, Tensor::new(&[], Data::F64(vec![1.0]))));
        }
        if !self.errors.is_empty() {
            return Err(Reported);
        }
        self.program.graphs.push(std::mem::take(&mut self.graph));
        Ok(DocumentTest {
            name: source.name.text.clone(),
            span: test.span,
            program: std::mem::take(&mut self.program),
            graph: source.name.text.clone(),
            inputs,
            expect,
            tolerance: test.tolerance.unwrap_or(TOLERANCE),
        })
    }

    /// The sizes of dims by the shapes of what is given.
    fn given_dims(&mut self, test: &Test, source: &Source) -> BTreeMap<String, i64> {
        let mut sizes = BTreeMap::new();
        for (name, ty) in &source.inputs {
            let Some((_, dims)) = super::shape::parts(ty) else { continue };
            let member = |given: &str| {
                given.strip_prefix(name.text.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('.'))
            };
            for (_, literal) in test.given.iter().filter(|(given, _)| member(&given.text)) {
                let Ok(tensor) = self.constant_tensor(literal, None) else { continue };
                for (dim, n) in dims.iter().zip(&tensor.shape) {
                    if let Some((symbol, factor)) = super::shape::binder(dim) {
                        sizes.entry(symbol.to_string()).or_insert(*n as i64 / factor);
                    }
                }
            }
        }
        sizes
    }

    /// An input of a graph as a test gives it.
    fn given_input(
        &mut self,
        scope: &mut Scope<'a>,
        test: &Test,
        name: &Word,
        ty: &Expr,
        inputs: &mut Vec<(String, Tensor)>,
    ) -> R<Option<Val>> {
        let mut fields = Vec::new();
        for (whole, dtype, dims) in self.input_types(scope, name, ty)? {
            let Some((_, literal)) = test.given.iter().find(|(n, _)| n.text == whole) else { continue };
            let tensor = self.constant_tensor(literal, Some(dtype))?;
            let found: Vec<Dim> = tensor.shape.iter().map(|n| Dim::from(*n)).collect();
            if found != dims {
                let expected = dsgc_ir::DimList(&dims);
                let diag =
                    Diag::error(format!("found the shape {:?} for `{whole}`, expected {expected}", tensor.shape));
                return self.fail(diag.label(literal.span, "").label(ty.span, "declared here"));
            }
            let value = self.pin(&whole, tensor, inputs);
            match whole.strip_prefix(&format!("{}.", name.text)) {
                Some(field) => fields.push((field.to_string(), value)),
                None => return Ok(Some(value)),
            }
        }
        if !fields.is_empty() {
            return Ok(Some(Val::record(fields, false)));
        }
        let known = test.given.iter().find(|(n, _)| n.text == name.text);
        Ok(known.map(|(_, literal)| Val::Static(literal.value.clone())))
    }

    /// An input of the test's graph with a given value.
    fn pin(&mut self, name: &str, tensor: Tensor, inputs: &mut Vec<(String, Tensor)>) -> Val {
        let dims: Vec<Dim> = tensor.shape.iter().map(|n| Dim::from(*n)).collect();
        let value = self.graph.input(name, super::ty(tensor.dtype(), &dims));
        inputs.push((name.to_string(), tensor));
        Val::Tensor(value)
    }

    /// The output or the let of this name.
    fn expected(&mut self, scope: &mut Scope<'a>, source: &Source, name: &Word) -> R<Val> {
        if let Some(tree) = output(&source.out, &name.text) {
            return self.out(scope, tree);
        }
        match scope.value(&name.text) {
            Some(Val::Bad) => Err(Reported),
            Some(value) if source.lets.iter().any(|(n, _)| n.text == name.text) => Ok(value.clone()),
            _ => {
                let outputs: Vec<&str> = match &source.out {
                    Tree::Expr(_) => vec!["out"],
                    Tree::Record(_, fields) => fields.iter().map(|(n, _)| n.text.as_str()).collect(),
                };
                let lets = source.lets.iter().map(|(n, _)| n.text.as_str());
                self.unknown(name, "an output or a let", outputs.into_iter().chain(lets))
            }
        }
    }

    /// A literal as a tensor: of the given element type, or of the one that its numbers show.
    fn constant_tensor(&mut self, literal: &Literal, dtype: Option<DType>) -> R<Tensor> {
        let (mut shape, mut flat) = (Vec::new(), Vec::new());
        if let Err(span) = collect(literal, 0, &mut shape, &mut flat) {
            let diag = Diag::error("found rows of different lengths, or other things than numbers").label(span, "");
            return self.fail(diag.help("a tensor is written `[[1, 2], [3, 4]]`"));
        }
        let all = |wanted: fn(&Constant) -> bool| flat.iter().all(wanted);
        let dtype = dtype.unwrap_or_else(|| match () {
            () if all(|c| matches!(c, Constant::Bool(_))) => DType::Bool,
            () if all(|c| matches!(c, Constant::Int(_))) => DType::I32,
            () => DType::F32,
        });
        let numbers = flat.iter().map(|c| match c {
            Constant::Bool(b) => f64::from(u8::from(*b)),
            other => other.number().unwrap_or(f64::NAN),
        });
        let numbers: Vec<f64> = numbers.collect();
        let fits = match dtype {
            DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => all(|c| !matches!(c, Constant::Bool(_))),
            DType::I32 => {
                all(|c| matches!(c, Constant::Int(_))) && numbers.iter().all(|x| i32::try_from(*x as i64).is_ok())
            }
            DType::Bool => numbers.iter().all(|x| *x == 0.0 || *x == 1.0),
            DType::Key => false,
        };
        if !fits {
            return self.fail(Diag::error(format!("found values that are no {dtype}")).label(literal.span, ""));
        }
        let data = match dtype {
            DType::I32 => Data::I32(numbers.iter().map(|x| *x as i32).collect()),
            DType::Bool => Data::Bool(numbers.iter().map(|x| *x != 0.0).collect()),
            DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) | DType::Key => Data::F64(numbers),
        };
        Ok(Tensor::new(&shape, data))
    }
}

/// The elements of nested lists in order, and their shape; the place of what does not fit otherwise.
fn collect(literal: &Literal, depth: usize, shape: &mut Vec<usize>, flat: &mut Vec<Constant>) -> Result<(), Span> {
    match &literal.value {
        Constant::List(items) => {
            if depth == shape.len() && flat.is_empty() {
                shape.push(items.len());
            }
            if shape.get(depth) != Some(&items.len()) {
                return Err(literal.span);
            }
            items.iter().try_for_each(|item| collect(item, depth + 1, shape, flat))
        }
        Constant::Int(_) | Constant::Float(_) | Constant::Bool(_) if depth == shape.len() => {
            flat.push(literal.value.clone());
            Ok(())
        }
        _ => Err(literal.span),
    }
}

/// The output of a name with dots; a result without names is called `out`.
fn output<'t>(out: &'t Tree, name: &str) -> Option<&'t Tree> {
    fn member<'t>(tree: &'t Tree, name: &str) -> Option<&'t Tree> {
        let Tree::Record(_, fields) = tree else { return None };
        let (first, rest) = name.split_once('.').unwrap_or((name, ""));
        let (_, tree) = fields.iter().find(|(n, _)| n.text == first)?;
        if rest.is_empty() { Some(tree) } else { member(tree, rest) }
    }
    match out {
        Tree::Expr(_) => (name == "out").then_some(out),
        Tree::Record(..) => member(out, name),
    }
}

/// Inputs, lets and dims that the expected values depend on; not through what is given.
fn needed<'s>(test: &Test, source: &'s Source) -> BTreeSet<&'s str> {
    fn leaves<'t>(tree: &'t Tree, all: &mut Vec<&'t Expr>) {
        match tree {
            Tree::Expr(expr) => all.push(expr),
            Tree::Record(_, fields) => fields.iter().for_each(|(_, tree)| leaves(tree, all)),
        }
    }
    let mut open: Vec<&'s Expr> = source.asserts.iter().map(|a| &a.condition).collect();
    // What each name stands for: nothing more for inputs and for dims that these bind.
    let mut meanings: BTreeMap<&'s str, Vec<&'s Expr>> = BTreeMap::new();
    for (name, ty) in &source.inputs {
        meanings.insert(&name.text, Vec::new());
        let dims = super::shape::parts(ty).map(|(_, dims)| dims).unwrap_or_default();
        meanings.extend(dims.into_iter().filter_map(|d| Some((super::shape::binder(d)?.0, Vec::new()))));
    }
    meanings.extend(source.dims.iter().map(|(name, expr)| (name.text.as_str(), vec![expr])));
    for (name, tree) in &source.lets {
        let meaning = meanings.entry(&name.text).or_default();
        if !test.given.iter().any(|(n, _)| n.text == name.text) {
            leaves(tree, meaning);
        }
    }
    let mut needed = BTreeSet::new();
    for (name, _) in &test.expect {
        match (output(&source.out, &name.text), meanings.get_key_value(name.text.as_str())) {
            (Some(tree), _) => leaves(tree, &mut open),
            (None, Some((name, meaning))) => {
                needed.insert(*name);
                open.extend(meaning);
            }
            (None, None) => {}
        }
    }
    while let Some(expr) = open.pop() {
        for (name, meaning) in &meanings {
            if mentions(expr, name) && needed.insert(name) {
                open.extend(meaning);
            }
        }
    }
    needed
}
