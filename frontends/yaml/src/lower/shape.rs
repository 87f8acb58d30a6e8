//! Types of inputs, and the dims they bind (D6).
//!
//! Capitals are dims of one graph; every call binds them anew. A dim must stand alone, or times a number, in one
//! input, where it takes its value; every other place is checked against it.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, DimList, Value};

use crate::expr::{BinaryOp, Expr, ExprKind, Item, Word};
use crate::graph::Graph as Source;
use crate::literal::Constant;

use super::scope::Scope;
use super::value::{Arg, Val};
use super::{Lowering, R, Reported, SEQUENCE, sequence_field};

/// Elements of a tensor beyond which no machine has the memory.
const MAX_ELEMENTS: i64 = 1 << 48;

/// The type of an input as it is written.
enum Declared<'e> {
    Tensor(DType, Vec<&'e Expr>),
    Sequence(Vec<&'e Expr>),
    Static(&'static str),
}

/// The name and the dims of a type such as `f32[B, T]`.
pub(super) fn parts(ty: &Expr) -> Option<(&str, Vec<&Expr>)> {
    let ExprKind::Index { base, items } = &ty.kind else { return None };
    let dims = items.iter().map(|item| match item {
        Item::At(dim) => Some(dim),
        _ => None,
    });
    Some((base.name()?, dims.collect::<Option<_>>()?))
}

/// A name that is a dim's: it begins with a capital.
pub(super) fn is_dim(name: &str) -> bool {
    name.starts_with(char::is_uppercase)
}

/// The dim that takes its value where this stands: `N`, or `2 * N`.
pub(super) fn binder(dim: &Expr) -> Option<(&str, i64)> {
    match &dim.kind {
        ExprKind::Name(name) if is_dim(name) => Some((name, 1)),
        ExprKind::Binary(BinaryOp::Mul, a, b) => match (&a.kind, &b.kind) {
            (ExprKind::Int(n), ExprKind::Name(name)) | (ExprKind::Name(name), ExprKind::Int(n)) => {
                (is_dim(name) && *n > 0).then_some((name, *n))
            }
            _ => None,
        },
        _ => None,
    }
}

/// The dims that take their values in a type, e.g. `B` and `T` of `sequence[B, T]`.
pub fn binders(ty: &Expr) -> Vec<&str> {
    let dims = parts(ty).map_or(Vec::new(), |(_, dims)| dims);
    dims.into_iter().filter_map(|dim| Some(binder(dim)?.0)).collect()
}

impl<'a> Lowering<'a> {
    fn declared<'e>(&mut self, ty: &'e Expr) -> R<Declared<'e>> {
        const STATIC: [&str; 4] = ["int", "float", "bool", "str"];
        if let Some(name) = ty.name().and_then(|n| STATIC.into_iter().find(|s| *s == n)) {
            return Ok(Declared::Static(name));
        }
        if let Some((base, dims)) = parts(ty) {
            let dtype = match base {
                "f" | "f32" => Some(DType::F32),
                "i32" => Some(DType::I32),
                "bool" => Some(DType::Bool),
                _ => None,
            };
            match dtype {
                Some(dtype) => return Ok(Declared::Tensor(dtype, dims)),
                None if base == "sequence" && dims.len() == 2 => return Ok(Declared::Sequence(dims)),
                None => {}
            }
        }
        self.fail(Diag::error(format!("found `{ty}`, expected a type")).label(ty.span, "").help(
            "types are `f[..]`, `f32[..]`, `i32[..]`, `bool[..]`, `sequence[B, T]`, and `int`, `float`, `bool`, `str`",
        ))
    }

    /// The size that an expression gives.
    pub fn dim(&mut self, scope: &mut Scope<'a>, expr: &Expr) -> R<Dim> {
        let value = self.eval(scope, expr)?;
        self.size(&Arg { span: expr.span, value })
    }

    /// A value as a size, of which a few can be added and multiplied without a thought of overflow.
    pub fn size(&mut self, arg: &Arg) -> R<Dim> {
        match arg.value.as_dim() {
            Some(dim) if dim.largest_coefficient() <= i32::MAX.into() => Ok(dim),
            Some(dim) => self.fail(Diag::error(format!("the size {dim} is out of range")).label(arg.span, "")),
            None => {
                let found = self.describe(&arg.value);
                self.fail(Diag::error(format!("found {found}, expected a size")).label(arg.span, ""))
            }
        }
    }

    /// Ends with an error where a tensor would have more elements than can be counted.
    pub fn check_elements(&mut self, dims: &[Dim], span: Span) -> R<()> {
        let elements = dims.iter().try_fold(1i64, |all, dim| all.checked_mul(dim.largest_coefficient()));
        match elements {
            Some(n) if n <= MAX_ELEMENTS => Ok(()),
            _ => self.fail(Diag::error(format!("the shape {} is out of range", DimList(dims))).label(span, "")),
        }
    }

    fn derived(&mut self, scope: &mut Scope<'a>, source: &Source) {
        for (name, expr) in &source.dims {
            let value = self.dim(scope, expr).map_or(Val::Bad, Val::dim);
            self.bind(scope, name, value);
        }
    }

    /// Binds the dims of a graph that is called from outside to what `value` says; where it says nothing, `help` does.
    pub fn symbols(&mut self, scope: &mut Scope<'a>, source: &Source, value: impl Fn(&str) -> Option<Dim>, help: &str) {
        for (_, ty) in &source.inputs {
            let Some((_, dims)) = parts(ty) else { continue };
            for dim in dims {
                let Some((name, _)) = binder(dim) else { continue };
                if scope.value(name).is_some() || source.dims.iter().any(|d| d.0.text == name) {
                    continue;
                }
                let bound = match value(name) {
                    Some(bound) => Val::dim(bound),
                    None => {
                        let diag = Diag::error(format!("nothing says how large `{name}` is")).label(dim.span, "");
                        let _: R<()> = self.fail(diag.help(help));
                        Val::Bad
                    }
                };
                self.bind(scope, &Word { span: dim.span, text: name.into() }, bound);
            }
        }
        self.derived(scope, source);
    }

    /// Makes the inputs of a graph that is called from outside.
    pub fn host_inputs(&mut self, scope: &mut Scope<'a>, source: &Source) {
        for (name, ty) in &source.inputs {
            let value = self.host_input(scope, name, ty).unwrap_or(Val::Bad);
            self.bind(scope, name, value);
        }
    }

    fn host_input(&mut self, scope: &mut Scope<'a>, name: &Word, ty: &Expr) -> R<Val> {
        match self.declared(ty)? {
            Declared::Tensor(dtype, dims) => {
                let dims = self.dims(scope, &dims)?;
                Ok(Val::Tensor(self.graph.input(&name.text, super::ty(dtype, &dims))))
            }
            Declared::Sequence(dims) => {
                let dims = self.dims(scope, &dims)?;
                let fields = SEQUENCE.map(|(field, dtype)| {
                    let value = self.graph.input(format!("{}.{field}", name.text), super::ty(dtype, &dims));
                    (field.to_string(), Val::Tensor(value))
                });
                Ok(Val::record(fields.into(), false))
            }
            Declared::Static(kind) => self.fail(
                Diag::error(format!("found the input `{}: {kind}` in a graph that the plan calls", name.text))
                    .label(ty.span, "")
                    .help("make it an option of the recipe"),
            ),
        }
    }

    /// The tensors that an input is made of, with their types: what a test gives. None for a static value.
    pub fn input_types(&mut self, scope: &mut Scope<'a>, name: &Word, ty: &Expr) -> R<Vec<(String, DType, Vec<Dim>)>> {
        Ok(match self.declared(ty)? {
            Declared::Tensor(dtype, dims) => vec![(name.text.clone(), dtype, self.dims(scope, &dims)?)],
            Declared::Sequence(dims) => {
                let dims = self.dims(scope, &dims)?;
                SEQUENCE.map(|(field, dtype)| (format!("{}.{field}", name.text), dtype, dims.clone())).into()
            }
            Declared::Static(_) => Vec::new(),
        })
    }

    pub fn dims(&mut self, scope: &mut Scope<'a>, dims: &[&Expr]) -> R<Vec<Dim>> {
        // All of them, so that all errors are told.
        let all: Vec<R<Dim>> = dims.iter().map(|d| self.dim(scope, d)).collect();
        let all: Vec<Dim> = all.into_iter().collect::<R<_>>()?;
        self.check_elements(&all, dims.first().map_or(Span::NONE, |d| d.span))?;
        Ok(all)
    }

    /// Binds the inputs of a called graph, and its dims.
    pub fn arguments(&mut self, scope: &mut Scope<'a>, source: &Source, args: Vec<Arg>) -> R<()> {
        let mut places = Vec::new();
        for ((name, ty), arg) in source.inputs.iter().zip(args) {
            let value = self.argument(name, ty, arg, &mut places).unwrap_or(Val::Bad);
            self.bind(scope, name, value);
        }
        let mut from: BTreeMap<String, Span> = BTreeMap::new();
        let mut all = Ok(());
        for place in &places {
            let Some((name, factor)) = binder(place.declared) else { continue };
            if from.contains_key(name) || source.dims.iter().any(|d| d.0.text == name) {
                continue;
            }
            let Some(value) = place.actual.div_exact(factor) else {
                let diag = Diag::error(format!("found a size of {}, expected a multiple of {factor}", place.actual))
                    .label(place.span, "")
                    .label(place.declared.span, "declared here");
                all = self.fail(diag);
                continue;
            };
            from.insert(name.into(), place.span);
            self.bind(scope, &Word { span: place.declared.span, text: name.into() }, Val::dim(value));
        }
        self.derived(scope, source);
        for place in &places {
            let Ok(expected) = self.dim(scope, place.declared) else {
                all = Err(Reported);
                continue;
            };
            if expected == place.actual {
                continue;
            }
            let mut diag = Diag::error(format!(
                "found {} for `{}`, expected {expected} where it has {}",
                self.ty(place.tensor),
                place.input,
                place.actual
            ))
            .label(place.span, self.ty(place.tensor).to_string())
            .label(place.declared.span, format!("`{}` stands for {expected} in this call", place.declared));
            for (name, span) in &from {
                if binder(place.declared).is_some_and(|(n, _)| n == name) && *span != place.span {
                    diag = diag.label(*span, format!("`{name}` is taken from here"));
                }
            }
            all = self.fail(diag);
        }
        all
    }

    fn argument<'e>(&mut self, name: &'e Word, ty: &'e Expr, arg: Arg, places: &mut Vec<Place<'e>>) -> R<Val> {
        match self.declared(ty)? {
            Declared::Tensor(dtype, dims) => {
                let value = self.as_tensor(&arg, dtype)?;
                self.places(name, ty, value, &dims, arg.span, places)?;
                Ok(Val::Tensor(value))
            }
            Declared::Sequence(dims) => {
                let Val::Record(record) = &arg.value else {
                    if matches!(arg.value, Val::Bad) {
                        return Err(Reported);
                    }
                    let found = self.describe(&arg.value);
                    return self.fail(
                        Diag::error(format!("found {found} for `{}`, expected a sequence", name.text))
                            .label(arg.span, "")
                            .label(ty.span, "declared here"),
                    );
                };
                for (field, value) in &record.fields {
                    let Some(dtype) = sequence_field(field) else { continue };
                    let part = Arg { span: arg.span, value: value.clone() };
                    let tensor = self.tensor_of(&part, dtype)?;
                    self.places(name, ty, tensor, &dims, arg.span, places)?;
                }
                Ok(arg.value)
            }
            Declared::Static(kind) => {
                let fits = match &arg.value {
                    Val::Static(Constant::Int(_)) => matches!(kind, "int" | "float"),
                    Val::Dim(_) => kind == "int",
                    Val::Static(Constant::Float(_)) => kind == "float",
                    Val::Static(Constant::Bool(_)) => kind == "bool",
                    Val::Static(Constant::Str(_)) => kind == "str",
                    Val::Bad => return Err(Reported),
                    _ => false,
                };
                if fits {
                    return Ok(arg.value);
                }
                let found = self.describe(&arg.value);
                self.fail(
                    Diag::error(format!("found {found} for `{}`, expected `{kind}`", name.text))
                        .label(arg.span, "")
                        .label(ty.span, "declared here"),
                )
            }
        }
    }

    fn places<'e>(
        &mut self,
        input: &'e Word,
        ty: &Expr,
        tensor: Value,
        dims: &[&'e Expr],
        span: Span,
        places: &mut Vec<Place<'e>>,
    ) -> R<()> {
        let actual = self.ty(tensor).clone();
        if actual.rank() != dims.len() {
            return self.fail(
                Diag::error(format!("found {actual} for `{}`, expected {} dims", input.text, dims.len()))
                    .label(span, actual.to_string())
                    .label(ty.span, "declared here"),
            );
        }
        for (declared, actual) in dims.iter().zip(actual.dims) {
            places.push(Place { input: &input.text, tensor, declared, actual, span });
        }
        Ok(())
    }
}

/// A dim of an argument.
struct Place<'e> {
    input: &'e str,
    tensor: Value,
    declared: &'e Expr,
    actual: Dim,
    span: Span,
}
