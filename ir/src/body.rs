//! Bodies of fused regions: what [`Op::Fused`] computes for one element.
//!
//! A body is a small program over scalars. Its values are numbered: operands of the op first, then one per step. A step
//! is a constant or an elementwise op; every result of the op is the value of a step.
//!
//! ```text
//! {$2 = mul $0, $1; $3 = const value=1.0 dtype=f32; $4 = add $2, $3; return $4}
//! ```

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::infer::infer;
use crate::op::{Class, Op};
use crate::types::{DType, Type};

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

    /// The element type of every value from those of the operands, or what is wrong with the body.
    pub fn dtypes(&self, operands: &[DType]) -> Result<Vec<DType>, String> {
        if operands.len() != self.operands() {
            return Err(format!("the body has {} operands, the op {}", self.operands(), operands.len()));
        }
        if operands.contains(&DType::Key) {
            return Err("a region of random keys".into());
        }
        let mut all = operands.to_vec();
        let mut used = vec![false; operands.len() + self.steps().len()];
        for step in self.steps() {
            if let Some(late) = step.args.iter().find(|&&a| a >= all.len()) {
                return Err(format!("${late} is used before it is defined"));
            }
            let types: Vec<Type> = step.args.iter().map(|&a| Type::scalar(all[a])).collect();
            check_step(&step.op, &types)?;
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
            let (args, attributes): (Vec<&str>, Vec<&str>) =
                rest.split([' ', ',']).filter(|w| !w.is_empty()).partition(|w| w.starts_with('$'));
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

/// Steps are constants and elementwise ops that cannot fail.
fn check_step(op: &Op, types: &[Type]) -> Result<(), String> {
    match op {
        Op::Const { .. } => Ok(()),
        Op::Div {} if types[..].iter().any(|t| t.dtype == DType::I32) => {
            Err("`div` of integers can fail and stays outside of a region".into())
        }
        _ if op.class() == Class::Elementwise => Ok(()),
        _ => Err(format!("`{}` is not elementwise", op.name())),
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
            ("{$1 = stop $0; return $1}", &f32s[..1], "`stop` is not elementwise"),
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
}
