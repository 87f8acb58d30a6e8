//! Bodies of fused regions: what [`Op::Fused`] computes for one element.
//!
//! A body is a small program over scalars. Its values are numbered: operands of the op first, then one per step. A step
//! is a constant or an elementwise op; every result of the op is the value of a step.
//!
//! ```text
//! {$2 = mul $0, $1; $3 = const value=1.0 dtype=f32; $4 = add $2, $3; return $4}
//! ```
//!
//! One step may be a reduction, over dims of the region. Over the last dims it gives a value for each row of them, which
//! later steps may take: a step is *of the row* if it takes such a value and besides only such values, constants, and
//! operands that have 1 or nothing in the place of those dims. It is computed once for a row, and as a result it has the
//! dims that are left. Any other step that takes a value of the row has it stretched along the row.
//!
//! ```text
//! {$1 = mul $0, $0; $2 = reduce_sum $1 axes=[1]; $3 = sqrt $2; $4 = div $0, $3; return $4}
//! ```
//!
//! Over the first dims, or over all, a reduction is the end of a region: a result that no step takes.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::dim::Dim;
use crate::infer::{broadcasts, infer};
use crate::op::{Class, Op};
use crate::types::{DType, DimList, Type};

/// A step of a [`Body`].
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What it computes.
    pub op: Op,
    /// Numbers of earlier values.
    pub args: Vec<usize>,
}

#[derive(Debug, PartialEq)]
struct Parts {
    operands: usize,
    steps: Vec<Step>,
    results: Vec<usize>,
}

/// What the dims that a reduction takes away are to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// The last ones, but not all: a value for each row.
    Rows,
    /// The first ones, but not all: a value for each column.
    Columns,
    /// All: one value.
    Whole,
}

impl Along {
    /// What these dims are among so many, if a region may reduce them.
    pub fn of(axes: &[usize], rank: usize) -> Option<Along> {
        let run = |from: usize| axes.iter().copied().eq(from..from + axes.len());
        match axes.len() {
            0 => None,
            n if n == rank => run(0).then_some(Along::Whole),
            n if n > rank => None,
            n if run(rank - n) => Some(Along::Rows),
            _ => run(0).then_some(Along::Columns),
        }
    }
}

/// The step of a body that is a reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reduction<'a> {
    /// The number of its value.
    pub value: usize,
    /// The number of what it reduces.
    pub arg: usize,
    /// The dims of the region that it takes away, ascending.
    pub axes: &'a [usize],
}

impl Reduction<'_> {
    /// What its dims are to a region of so many.
    ///
    /// # Panics
    /// If the verifier has not seen the body.
    pub fn along(&self, rank: usize) -> Along {
        Along::of(self.axes, rank).unwrap_or_else(|| panic!("bug: dims {:?} of {rank} in a region", self.axes))
    }
}

/// What a fused region computes for one element; cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Body(Arc<Parts>);

impl Body {
    /// A body of this many operands. Results are numbers of values.
    pub fn new(operands: usize, steps: Vec<Step>, results: Vec<usize>) -> Body {
        Body(Arc::new(Parts { operands, steps, results }))
    }

    /// How many operands it takes.
    pub fn operands(&self) -> usize {
        self.0.operands
    }

    /// The steps, in order; step `i` gives the value `operands + i`.
    pub fn steps(&self) -> &[Step] {
        &self.0.steps
    }

    /// Numbers of the values that are results.
    pub fn results(&self) -> &[usize] {
        &self.0.results
    }

    /// The steps that compute something: all but constants.
    pub fn work(&self) -> usize {
        self.steps().iter().filter(|s| !matches!(s.op, Op::Const { .. })).count()
    }

    /// The reduction among the steps, if there is one.
    pub fn reduction(&self) -> Option<Reduction<'_>> {
        let of = |(i, step): (usize, &'_ Step)| -> Option<(usize, usize)> {
            reduced(&step.op).map(|_| (self.operands() + i, step.args[0]))
        };
        let (value, arg) = self.steps().iter().enumerate().find_map(of)?;
        Some(Reduction { value, arg, axes: reduced(&self.steps()[value - self.operands()].op)? })
    }

    /// Of every value whether it is of the row, in a region of so many dims. `alike` says of an operand, by its place among
    /// the dims from the last one, whether it has 1 or nothing there.
    pub fn of_rows(&self, rank: usize, alike: impl Fn(usize, usize) -> bool) -> Vec<bool> {
        let mut rows = vec![false; self.operands() + self.steps().len()];
        let Some(reduction) = self.reduction().filter(|r| r.along(rank) == Along::Rows) else { return rows };
        let stays = |v: usize| match v.checked_sub(self.operands()) {
            None => reduction.axes.iter().all(|axis| alike(v, rank - 1 - axis)),
            Some(step) => matches!(self.steps()[step].op, Op::Const { .. }),
        };
        for (i, step) in self.steps().iter().enumerate() {
            let value = self.operands() + i;
            let takes = step.args.iter().any(|&a| rows[a]) && step.args.iter().all(|&a| rows[a] || stays(a));
            rows[value] = takes || value == reduction.value;
        }
        rows
    }

    /// The type of every value of a region of these dims from those of the operands, or what is wrong. A value that is for
    /// every element has the region's dims, an operand its own.
    pub fn types(&self, shape: &[Dim], args: &[Type]) -> Result<Vec<Type>, String> {
        for arg in args {
            broadcasts(&arg.dims, shape)?;
        }
        let dtypes = self.dtypes(&args.iter().map(|a| a.dtype).collect::<Vec<_>>())?;
        let reduction = self.reduction();
        if let Some(Reduction { value, axes, .. }) = reduction {
            let along = Along::of(axes, shape.len()).ok_or_else(|| {
                format!("a region reduces the dims {axes:?} of {}, expected the first or the last ones", DimList(shape))
            })?;
            if along != Along::Rows && self.steps().iter().any(|step| step.args.contains(&value)) {
                return Err(format!("${value} is no value of a row, and a step takes it"));
            }
        }
        let one = |v: usize, from_last: usize| {
            let place = args[v].dims.len().checked_sub(1 + from_last);
            place.is_none_or(|i| args[v].dims[i].constant() == Some(1))
        };
        let rows = self.of_rows(shape.len(), one);
        let gone = reduction.map_or(&[][..], |r| r.axes);
        let left: Vec<Dim> = (0..shape.len()).filter(|i| !gone.contains(i)).map(|i| shape[i].clone()).collect();
        let dims = |v: usize| match args.get(v) {
            Some(arg) => &arg.dims[..],
            None if rows[v] || reduction.is_some_and(|r| r.value == v) => &left[..],
            None => shape,
        };
        Ok(dtypes.iter().enumerate().map(|(v, &dtype)| Type::new(dtype, dims(v))).collect())
    }

    /// The element type of every value from those of the operands, or what is wrong with the body.
    pub fn dtypes(&self, operands: &[DType]) -> Result<Vec<DType>, String> {
        if operands.len() != self.operands() {
            return Err(format!("the body has {} operands, the op {}", self.operands(), operands.len()));
        }
        if operands.contains(&DType::Key) {
            return Err("a region of random keys".into());
        }
        let (mut all, mut reduces) = (operands.to_vec(), false);
        let mut used = vec![false; operands.len() + self.steps().len()];
        for step in self.steps() {
            if let Some(late) = step.args.iter().find(|&&a| a >= all.len()) {
                return Err(format!("${late} is used before it is defined"));
            }
            let types: Vec<Type> = step.args.iter().map(|&a| Type::scalar(all[a])).collect();
            check_step(&step.op, &types)?;
            let types = match reduced(&step.op) {
                None => types,
                Some(_) if std::mem::replace(&mut reduces, true) => return Err("a region with two reductions".into()),
                // As many dims as it wants to see; which there are is known where the region's are.
                Some(axes) => {
                    let dims = vec![Dim::from(1i64); axes.iter().max().map_or(0, |last| last + 1)];
                    types.into_iter().map(|ty| Type::new(ty.dtype, dims.clone())).collect()
                }
            };
            all.push(infer(&step.op, &types, None)?[0].dtype);
            step.args.iter().for_each(|&a| used[a] = true);
        }
        if self.results().is_empty() {
            return Err("a region without results".into());
        }
        for (i, &result) in self.results().iter().enumerate() {
            if result < self.operands() || result >= all.len() {
                return Err(format!("the result ${result} is not the value of a step"));
            }
            if self.results()[..i].contains(&result) {
                return Err(format!("${result} is a result twice"));
            }
            used[result] = true;
        }
        match used.iter().position(|used| !used) {
            Some(unused) => Err(format!("${unused} is used nowhere")),
            None => Ok(all),
        }
    }

    /// Reads the text form.
    pub(crate) fn parse(text: &str) -> Result<Body, String> {
        let bad = || format!("`{text}` is no body; expected e.g. `{{$1 = exp $0; return $1}}`");
        let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).ok_or_else(bad)?;
        let number = |text: &str| -> Result<usize, String> {
            let digits = text.trim().strip_prefix('$').ok_or_else(bad)?;
            digits.parse().map_err(|_| bad())
        };
        let list = |text: &str| text.split(',').map(number).collect::<Result<Vec<usize>, String>>();
        let (mut first, mut steps) = (None, Vec::new());
        for line in inner.split(';').map(str::trim) {
            if let Some(results) = line.strip_prefix("return ") {
                let operands = first.ok_or("a region without steps")?;
                return Ok(Body::new(operands, steps, list(results)?));
            }
            let (defined, rest) = line.split_once('=').ok_or_else(bad)?;
            let (defined, (name, rest)) = (number(defined)?, rest.trim().split_once(' ').ok_or_else(bad)?);
            if defined != *first.get_or_insert(defined) + steps.len() {
                return Err(format!("${defined} stands in the place of ${}", first.unwrap_or(0) + steps.len()));
            }
            let mut in_list = false;
            let ends = |c: char| {
                in_list = (in_list || c == '[') && c != ']';
                !in_list && [' ', ','].contains(&c)
            };
            let (args, attributes): (Vec<&str>, Vec<&str>) =
                rest.split(ends).filter(|w| !w.is_empty()).partition(|w| w.starts_with('$'));
            let attributes = attributes.into_iter().map(|a| {
                let (key, value) = a.split_once('=').ok_or_else(bad)?;
                Ok((key.to_string(), value.to_string()))
            });
            let op = Op::from_text(name, &attributes.collect::<Result<Vec<_>, String>>()?)?;
            steps.push(Step { op, args: args.into_iter().map(number).collect::<Result<_, _>>()? });
        }
        Err(bad())
    }
}

/// One product of an [`Op::ContractFused`], by the places of the op's operands and results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProductPart {
    /// The operand that it does not have in common with others.
    pub other: usize,
    /// The operands of its body behind the product.
    pub operands: Range<usize>,
    /// The results of its body.
    pub results: Range<usize>,
}

/// The products of an [`Op::ContractFused`] with these bodies.
pub fn product_parts(bodies: &[Body]) -> Vec<ProductPart> {
    let (mut operand, mut result) = (1 + bodies.len(), 0);
    let part = |(i, body): (usize, &Body)| {
        let operands = operand..operand + body.operands().saturating_sub(1);
        let results = result..result + body.results().len();
        (operand, result) = (operands.end, results.end);
        ProductPart { other: 1 + i, operands, results }
    };
    bodies.iter().enumerate().map(part).collect()
}

/// The dims that an op takes away, if it is a reduction that can be a step.
fn reduced(op: &Op) -> Option<&[usize]> {
    match op {
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => Some(axes),
        _ => None,
    }
}

/// Steps are constants, elementwise ops that cannot fail, and a reduction.
fn check_step(op: &Op, types: &[Type]) -> Result<(), String> {
    match op {
        Op::Const { .. } => Ok(()),
        Op::Div {} if types[..].iter().any(|t| t.dtype == DType::I32) => {
            Err("`div` of integers can fail and stays outside of a region".into())
        }
        _ if op.class() == Class::Elementwise || reduced(op).is_some() => Ok(()),
        _ => Err(format!("`{}` is neither elementwise nor a reduction", op.name())),
    }
}

/// Whether an op on operands of these types can be a step of a region. What is quantised has no elements apart.
pub fn can_be_step(op: &Op, types: &[Type]) -> bool {
    let quantizes = matches!(op, Op::Cast { dtype } if dtype.is_quantized());
    check_step(op, types).is_ok()
        && !quantizes
        && types.iter().all(|t| t.dtype != DType::Key && !t.dtype.is_quantized())
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &[usize]| values.iter().map(|v| format!("${v}")).collect::<Vec<_>>().join(", ");
        write!(f, "{{")?;
        for (i, step) in self.steps().iter().enumerate() {
            write!(f, "${} = {}", self.operands() + i, step.op.name())?;
            if !step.args.is_empty() {
                write!(f, " {}", list(&step.args))?;
            }
            for (key, value) in step.op.attributes() {
                write!(f, " {key}={value}")?;
            }
            write!(f, "; ")?;
        }
        write!(f, "return {}}}", list(self.results()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_read_back() {
        let text = "{$2 = cast $0 dtype=i32; $3 = const value=-0.5 dtype=f32; $4 = where $1, $0, $3; return $4, $2}";
        let body = Body::parse(text).expect("it is a body");
        assert_eq!(body.to_string(), text);
        let types = body.dtypes(&[DType::F32, DType::Bool]);
        assert_eq!(types, Ok(vec![DType::F32, DType::Bool, DType::I32, DType::F32, DType::F32]));
    }

    #[test]
    fn what_is_no_body_is_an_error() {
        for (text, why) in [
            ("$1 = exp $0", "is no body"),
            ("{$1 = exp $0}", "is no body"),
            ("{$1 = exp x; return $1}", "is no body"),
            ("{return $0}", "a region without steps"),
            ("{$1 = exp $0; $3 = exp $1; return $3}", "$3 stands in the place of $2"),
            ("{$1 = expp $0; return $1}", "no op is called `expp`"),
            ("{$1 = cast $0 to=f32; return $1}", "`cast` has no attribute `to`"),
        ] {
            let found = Body::parse(text).expect_err(text);
            assert!(found.contains(why), "found `{found}`, expected `{why}`");
        }
    }

    #[test]
    fn wrong_bodies_are_refused() {
        let f32s = [DType::F32; 2];
        for (text, operands, why) in [
            ("{$1 = exp $0; return $1}", &f32s[..], "the body has 1 operands, the op 2"),
            ("{$1 = exp $0; return $1}", &[DType::Key], "a region of random keys"),
            ("{$1 = exp $0; return $1}", &[DType::I32], "`exp` of i32[], expected f32"),
            ("{$1 = exp $1; return $1}", &f32s[..1], "$1 is used before it is defined"),
            ("{$1 = stop $0; return $1}", &f32s[..1], "`stop` is neither elementwise nor a reduction"),
            ("{$1 = reduce_sum $0 axes=[0]; $2 = reduce_max $1 axes=[0]; return $2}", &f32s[..1], "two reductions"),
            ("{$1 = reduce_sum $0 axes=[1, 0]; return $1}", &f32s[..1], "are not ascending dims"),
            ("{$1 = div $0, $0; return $1}", &[DType::I32], "`div` of integers can fail"),
            ("{$1 = exp $0; return $0}", &f32s[..1], "the result $0 is not the value of a step"),
            ("{$1 = exp $0; return $2}", &f32s[..1], "the result $2 is not the value of a step"),
            ("{$1 = exp $0; return $1, $1}", &f32s[..1], "$1 is a result twice"),
            ("{$1 = exp $0; $2 = neg $0; return $2}", &f32s[..1], "$1 is used nowhere"),
            ("{$2 = exp $0; return $2}", &f32s[..], "$1 is used nowhere"),
        ] {
            let found = Body::parse(text).expect("it reads").dtypes(operands).expect_err(text);
            assert!(found.contains(why), "found `{found}`, expected `{why}`");
        }
    }

    #[test]
    fn values_of_the_row_have_the_dims_that_are_left() {
        let text = "{$2 = mul $0, $0; $3 = reduce_sum $2 axes=[1, 2]; $4 = add $3, $1; $5 = div $0, $4; return $5, $4}";
        let body = Body::parse(text).expect("it is a body");
        assert_eq!(body.to_string(), text);
        let dim = |text: &str| Dim::parse(text).expect("it is a dim");
        let shape = [dim("B"), dim("T"), dim("3")];
        let (x, rows) =
            (Type::new(DType::F32, shape.to_vec()), Type::new(DType::F32, vec![dim("B"), dim("1"), dim("1")]));
        let types = body.types(&shape, &[x.clone(), rows.clone()]).expect("it fits");
        let of_row = Type::new(DType::F32, vec![dim("B")]);
        assert_eq!(types[2..], [x.clone(), of_row.clone(), of_row, x.clone()]);
        // What runs along the row is for every element.
        let types = body.types(&shape, &[x.clone(), Type::new(DType::F32, vec![dim("3")])]).expect("it fits");
        assert_eq!(types[4], x);
    }

    #[test]
    fn reductions_that_do_not_fit_a_region_are_refused() {
        let shape = [2i64, 3, 4].map(Dim::from);
        let x = [Type::new(DType::F32, shape.to_vec())];
        for (text, why) in [
            ("{$1 = reduce_sum $0 axes=[1]; return $1}", "expected the first or the last ones"),
            ("{$1 = reduce_sum $0 axes=[2, 3]; return $1}", "expected the first or the last ones"),
            ("{$1 = reduce_sum $0 axes=[]; return $1}", "expected the first or the last ones"),
            ("{$1 = reduce_sum $0 axes=[0]; $2 = exp $1; return $2}", "$1 is no value of a row, and a step takes it"),
            ("{$1 = reduce_max $0 axes=[0, 1, 2]; $2 = sub $0, $1; return $2}", "$1 is no value of a row"),
        ] {
            let found = Body::parse(text).expect("it reads").types(&shape, &x).expect_err(text);
            assert!(found.contains(why), "found `{found}`, expected `{why}`");
        }
    }
}
