//! Pushing ops: numbers take the type of the tensors beside them, shapes are stretched, and what does not fit is the
//! user's error with the type of every operand.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, DimList, Loc, Op, Reason, Site, StateId, Type, Value};

use crate::literal::Constant;

use super::value::{Arg, Val};
use super::{Lowering, R};

/// What can be computed with: a tensor, or a number that becomes one.
#[derive(Clone, Debug)]
pub(super) enum Operand {
    Tensor(Value),
    Number(Constant),
    Dim(Dim),
}

impl Lowering<'_> {
    pub fn ty(&self, value: Value) -> &Type {
        self.graph.ty(value)
    }

    fn site(&self, span: Span) -> Site {
        Site { loc: Loc { span, reason: Reason::Written }, tag: self.tag.clone(), ..Site::default() }
    }

    /// Adds an op with one result. `args` say where the operands were written.
    pub fn op(&mut self, span: Span, op: Op, args: &[(Value, Span)]) -> R<Value> {
        let values: Vec<Value> = args.iter().map(|a| a.0).collect();
        let site = self.site(span);
        match self.graph.try_push(op, &values, None, site) {
            // `attention` has a second result, which only its gradient uses.
            Ok(id) => {
                let first = self.graph.op(id).results().next().expect("ops of expressions have results");
                self.check_elements(&self.ty(first).dims.clone(), span)?;
                Ok(first)
            }
            Err(why) => {
                let mut diag = Diag::error(why).label(span, "");
                for (value, place) in args {
                    diag = diag.label(*place, self.ty(*value).to_string());
                }
                self.fail(diag)
            }
        }
    }

    /// Adds an op that fits by construction.
    pub fn emit(&mut self, span: Span, op: Op, args: &[Value]) -> Value {
        let shown = op.to_string();
        let site = self.site(span);
        match self.graph.try_push(op, args, None, site) {
            Ok(id) => self.graph.op(id).results().next().expect("ops of expressions have results"),
            Err(why) => panic!("bug: lowering pushed `{shown}` in graph @{}: {why}", self.graph.name),
        }
    }

    /// Reads a parameter, once per graph.
    pub fn read_state(&mut self, span: Span, state: StateId) -> Value {
        if let Some(value) = self.reads.get(&state) {
            return *value;
        }
        let ty = self.program.state(state).ty.clone();
        let site = self.site(span);
        let id = self.graph.try_push(Op::Read { state }, &[], Some(&ty), site).expect("a read of a typed state fits");
        let value = self.graph.op(id).result();
        self.reads.insert(state, value);
        value
    }

    /// Writes a parameter's value, which has its type.
    pub fn write(&mut self, span: Span, state: StateId, ty: &Type, value: Value) {
        let site = self.site(span);
        let pushed = self.graph.try_push(Op::Write { state }, &[value], Some(ty), site);
        pushed.expect("a value of the state's type fits");
    }

    pub fn scalar(&mut self, span: Span, value: f64, dtype: DType) -> Value {
        self.emit(span, Op::Const { value, dtype }, &[])
    }

    /// The value with these dims; it must stretch to them.
    pub fn stretch(&mut self, span: Span, value: Value, dims: &[Dim]) -> Value {
        if self.ty(value).dims == dims {
            return value;
        }
        self.emit(span, Op::Broadcast { shape: dims.to_vec() }, &[value])
    }

    pub fn cast(&mut self, span: Span, value: Value, dtype: DType) -> Value {
        if self.ty(value).dtype == dtype {
            return value;
        }
        self.emit(span, Op::Cast { dtype }, &[value])
    }

    /// A value that can be computed with.
    pub fn operand(&mut self, arg: &Arg) -> R<Operand> {
        match arg.value.clone().single() {
            Val::Tensor(value) => Ok(Operand::Tensor(value)),
            Val::Static(c @ (Constant::Int(_) | Constant::Float(_) | Constant::Bool(_))) => Ok(Operand::Number(c)),
            Val::Dim(dim) => Ok(Operand::Dim(dim)),
            Val::Param(param) => self.read(arg.span, &param).map(Operand::Tensor),
            Val::Bad => Err(super::Reported),
            other => {
                let found = self.describe(&other);
                self.fail(Diag::error(format!("found {found}, expected a tensor or a number")).label(arg.span, ""))
            }
        }
    }

    /// A tensor; numbers do not become one here.
    pub fn tensor(&mut self, arg: &Arg) -> R<Value> {
        match self.operand(arg)? {
            Operand::Tensor(value) => Ok(value),
            Operand::Number(_) | Operand::Dim(_) => {
                let found = self.describe(&arg.value);
                self.fail(Diag::error(format!("found {found}, expected a tensor")).label(arg.span, ""))
            }
        }
    }

    /// A tensor of the given element type.
    pub fn tensor_of(&mut self, arg: &Arg, dtype: DType) -> R<Value> {
        let value = self.tensor(arg)?;
        let found = self.ty(value).dtype;
        if found == dtype {
            return Ok(value);
        }
        let diag = Diag::error(format!("found {}, expected {dtype}", self.ty(value))).label(arg.span, "");
        self.fail(if found == DType::Key { diag } else { diag.help(format!("write `{dtype}(..)` around it")) })
    }

    /// The element type that operands have together: that of the tensors; of numbers alone, the widest.
    fn common_dtype(&mut self, span: Span, args: &[(&Arg, &Operand)]) -> R<DType> {
        let mut found: Option<(DType, Span)> = None;
        for (arg, operand) in args {
            let Operand::Tensor(value) = operand else { continue };
            let dtype = self.ty(*value).dtype;
            match found {
                None => found = Some((dtype, arg.span)),
                Some((first, _)) if first == dtype => {}
                Some((first, first_span)) => {
                    let diag = Diag::error(format!("found {first} beside {dtype}, expected one element type"))
                        .label(span, "")
                        .label(first_span, first.to_string())
                        .label(arg.span, dtype.to_string());
                    let help = if first == DType::F32 || dtype == DType::F32 { "f32" } else { "i32" };
                    return self.fail(diag.help(format!("write `{help}(..)` around the other one")));
                }
            }
        }
        let numbers = args.iter().filter_map(|(arg, operand)| match operand {
            Operand::Number(c) => Some((*arg, c.clone())),
            Operand::Dim(_) => Some((*arg, Constant::Int(0))),
            Operand::Tensor(_) => None,
        });
        let numbers: Vec<(&Arg, Constant)> = numbers.collect();
        let Some((dtype, tensor_span)) = found else {
            let any = |wanted: fn(&Constant) -> bool| numbers.iter().any(|(_, c)| wanted(c));
            return Ok(if any(|c| matches!(c, Constant::Float(_))) {
                DType::F32
            } else if any(|c| matches!(c, Constant::Int(_))) {
                DType::I32
            } else {
                DType::Bool
            });
        };
        for (arg, number) in numbers {
            let fits = match number {
                Constant::Float(_) => dtype == DType::F32,
                Constant::Int(n) if dtype == DType::I32 => i32::try_from(n).is_ok(),
                Constant::Int(_) => dtype == DType::F32,
                _ => dtype == DType::Bool,
            };
            if !fits {
                let found = self.describe(&arg.value);
                let diag = Diag::error(format!("found {found} beside {dtype}, expected one element type"))
                    .label(arg.span, "")
                    .label(tensor_span, dtype.to_string());
                return self.fail(match dtype {
                    DType::I32 | DType::Bool => diag.help("write `f32(..)` around the tensor"),
                    DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => {
                        diag.help("write `1.0` or `0.0`, or `where(..)`")
                    }
                    DType::Key => diag,
                });
            }
        }
        Ok(dtype)
    }

    fn materialise(&mut self, span: Span, operand: Operand, dtype: DType) -> Value {
        match operand {
            Operand::Tensor(value) => value,
            Operand::Number(Constant::Bool(b)) => self.scalar(span, f64::from(u8::from(b)), dtype),
            Operand::Number(c) => self.scalar(span, c.number().unwrap_or(f64::NAN), dtype),
            Operand::Dim(dim) => self.emit(span, Op::Size { dim, dtype }, &[]),
        }
    }

    /// A value as a tensor of the given element type: numbers become scalars.
    pub fn as_tensor(&mut self, arg: &Arg, dtype: DType) -> R<Value> {
        let operand = self.operand(arg)?;
        match operand {
            Operand::Tensor(_) => self.tensor_of(arg, dtype),
            number => {
                let scalar = Operand::Tensor(self.scalar(arg.span, 0.0, dtype));
                self.common_dtype(arg.span, &[(arg, &number), (arg, &scalar)])?;
                Ok(self.materialise(arg.span, number, dtype))
            }
        }
    }

    /// Operands as tensors of one element type.
    pub fn one_dtype(&mut self, span: Span, args: &[&Arg]) -> R<Vec<Value>> {
        let mut operands = Vec::new();
        for arg in args {
            operands.push(self.operand(arg)?);
        }
        let pairs: Vec<(&Arg, &Operand)> = args.iter().copied().zip(&operands).collect();
        let dtype = self.common_dtype(span, &pairs)?;
        Ok(args.iter().zip(operands).map(|(arg, o)| self.materialise(arg.span, o, dtype)).collect())
    }

    /// The dims that all values stretch to: numpy's rule from the right, but only a literal 1 stretches (D6).
    pub fn common_dims(&mut self, span: Span, values: &[(Value, Span)]) -> R<Vec<Dim>> {
        let mut dims: Vec<Dim> = Vec::new();
        for (at, (value, place)) in values.iter().enumerate() {
            let next = self.ty(*value).dims.clone();
            let mut joined = Vec::new();
            for i in 1..=dims.len().max(next.len()) {
                let side = |d: &[Dim]| d.len().checked_sub(i).map(|k| d[k].clone());
                joined.push(match (side(&dims), side(&next)) {
                    (Some(a), Some(b)) if a == b || b.constant() == Some(1) => a,
                    (Some(a), Some(b)) if a.constant() == Some(1) => b,
                    (Some(_), Some(_)) => return self.unequal(span, &values[..at], (*value, *place), &dims),
                    (a, b) => a.or(b).unwrap_or_default(),
                });
            }
            joined.reverse();
            dims = joined;
        }
        self.check_elements(&dims, span)?;
        Ok(dims)
    }

    fn unequal<T>(&mut self, span: Span, before: &[(Value, Span)], odd: (Value, Span), dims: &[Dim]) -> R<T> {
        let odd_ty = self.ty(odd.0).clone();
        let mut diag = Diag::error(format!("the shapes {} and {} do not fit", DimList(dims), DimList(&odd_ty.dims)))
            .label(span, "");
        for (value, place) in before.iter().copied().chain([odd]) {
            diag = diag.label(place, self.ty(value).to_string());
        }
        // A column against rows is what is nearly always meant.
        let column =
            |narrow: &[Dim], wide: &[Dim]| !narrow.is_empty() && narrow.len() < wide.len() && wide.starts_with(narrow);
        let extra = |narrow: &[Dim], wide: &[Dim]| ", None".repeat(wide.len() - narrow.len());
        let help = if column(&odd_ty.dims, dims) {
            Some((extra(&odd_ty.dims, dims), odd_ty.dims.clone()))
        } else if column(dims, &odd_ty.dims) {
            Some((extra(dims, &odd_ty.dims), dims.to_vec()))
        } else {
            None
        };
        if let Some((extra, narrow)) = help {
            let colons = vec![":"; narrow.len()].join(", ");
            diag = diag.help(format!("write `[{colons}{extra}]` after the one with the shape {}", DimList(&narrow)));
        }
        self.fail(diag)
    }

    /// A value stretched to dims, if it stretches to them.
    pub fn fitted(&mut self, span: Span, (value, place): (Value, Span), dims: &[Dim]) -> R<Value> {
        match dsgc_ir::infer::broadcasts(&self.ty(value).dims, dims) {
            Ok(()) => Ok(self.stretch(place, value, dims)),
            Err(why) => self.fail(Diag::error(why).label(place, self.ty(value).to_string()).label(span, "")),
        }
    }

    /// Operands as tensors of one element type and one shape.
    pub fn aligned(&mut self, span: Span, args: &[&Arg]) -> R<Vec<Value>> {
        let values = self.one_dtype(span, args)?;
        let placed: Vec<(Value, Span)> = values.iter().copied().zip(args.iter().map(|a| a.span)).collect();
        let dims = self.common_dims(span, &placed)?;
        Ok(placed.into_iter().map(|(v, place)| self.stretch(place, v, &dims)).collect())
    }

    /// What a value is, for messages.
    pub fn describe(&self, value: &Val) -> String {
        match value {
            Val::Static(c) => format!("`{c}`"),
            Val::Dim(dim) => format!("the size `{dim}`"),
            Val::Tensor(value) => self.ty(*value).to_string(),
            Val::Record(record) => {
                let names: Vec<&str> = record.fields.iter().map(|f| f.0.as_str()).collect();
                format!("a record of {}", crate::schema::words(&names))
            }
            Val::List(_) => "a list".into(),
            Val::Param(p) => format!("the parameter `{}`", p.name),
            Val::Group(p) => format!("the parameters `{}.*`", p.name),
            Val::Model(role) => format!("the model `{}`", self.roles[*role].name),
            Val::Bad => "an error".into(),
        }
    }
}
