//! The functions that the language brings: one table.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Op};

use crate::expr::Word;
use crate::literal::Constant;

use super::value::{Arg, Val};
use super::{Lowering, R, layers, rules};

/// A function of the language.
#[derive(Clone, Copy, Debug)]
pub struct Builtin {
    /// Its name.
    pub name: &'static str,
    /// Its parameters: `x` is required, `axis=` is not, `*x` is any number of them and comes first.
    pub params: &'static [&'static str],
    /// What it computes.
    pub doc: &'static str,
    rule: Rule,
}

/// How a function becomes ops.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// An op, element by element, and the same on numbers that are known.
    Elementwise(fn() -> Op, Option<fn(f64) -> f64>),
    /// Another element type.
    Cast(DType),
    /// Anything else.
    Special(fn(&mut Lowering<'_>, &Call) -> R<Val>),
}

/// A call of a builtin, with its arguments in the order of its parameters.
pub(super) struct Call {
    pub span: Span,
    pub builtin: &'static Builtin,
    /// One per parameter; `*x` has an empty place.
    args: Vec<Option<Arg>>,
    /// The arguments of `*x`.
    pub rest: Vec<Arg>,
}

impl Call {
    /// An argument, if it is given.
    pub fn get(&self, name: &str) -> Option<&Arg> {
        let at = self.builtin.params.iter().position(|p| bare(p) == name);
        let at = at.unwrap_or_else(|| panic!("bug: builtin `{}` has no parameter `{name}`", self.builtin.name));
        self.args[at].as_ref()
    }

    /// A required argument.
    pub fn arg(&self, name: &str) -> &Arg {
        self.get(name).unwrap_or_else(|| panic!("bug: parameter `{name}` of `{}` is optional", self.builtin.name))
    }
}

fn bare(param: &str) -> &str {
    param.trim_start_matches('*').trim_end_matches('=')
}

const fn elementwise(name: &'static str, op: fn() -> Op, known: Option<fn(f64) -> f64>, doc: &'static str) -> Builtin {
    Builtin { name, params: &["x"], doc, rule: Rule::Elementwise(op, known) }
}

const fn cast(name: &'static str, dtype: DType, doc: &'static str) -> Builtin {
    Builtin { name, params: &["x"], doc, rule: Rule::Cast(dtype) }
}

const fn special(
    name: &'static str,
    params: &'static [&'static str],
    rule: fn(&mut Lowering<'_>, &Call) -> R<Val>,
    doc: &'static str,
) -> Builtin {
    Builtin { name, params, doc, rule: Rule::Special(rule) }
}

/// All functions but `repeat`, in the order of documentation.
#[rustfmt::skip]
pub const BUILTINS: &[Builtin] = &[
    elementwise("exp", || Op::Exp {}, Some(f64::exp), "e to the power of x"),
    elementwise("log", || Op::Log {}, Some(f64::ln), "natural logarithm"),
    elementwise("sqrt", || Op::Sqrt {}, Some(f64::sqrt), "square root"),
    elementwise("abs", || Op::Abs {}, Some(f64::abs), "absolute value"),
    elementwise("tanh", || Op::Tanh {}, Some(f64::tanh), "hyperbolic tangent"),
    elementwise("sigmoid", || Op::Sigmoid {}, None, "1 / (1 + exp(-x))"),
    elementwise("log_sigmoid", || Op::LogSigmoid {}, None, "log(sigmoid(x)), finite for every finite x"),
    elementwise("relu", || Op::Relu {}, None, "max(x, 0)"),
    elementwise("gelu", || Op::Gelu {}, None, "x times the normal distribution function of x, by erf"),
    elementwise("gelu_tanh", || Op::GeluTanh {}, None, "gelu by the tanh formula"),
    elementwise("silu", || Op::Silu {}, None, "x * sigmoid(x)"),
    elementwise("erf", || Op::Erf {}, None, "Gauss's error function"),

    cast("f32", DType::F32, "as floats: true is 1, false is 0"),
    cast("i32", DType::I32, "as whole numbers: floats are cut off towards 0"),
    cast("bool", DType::Bool, "whether it is not 0"),

    special("where", &["condition", "a", "b"], rules::choose, "a where the condition holds, else b, element by element"),
    special("clip", &["x", "low", "high"], rules::clip, "x, but at least low and at most high"),
    special("max", &["x", "b=", "axis=", "where=", "empty=", "keep="], rules::max, "max(a, b): the larger, element by element; max(x, axis=1): the largest along dims"),
    special("min", &["x", "b=", "axis=", "where=", "empty=", "keep="], rules::min, "min(a, b): the smaller, element by element; min(x, axis=1): the smallest along dims"),

    special("sum", &["x", "axis=", "where=", "keep="], rules::sum, "sum along dims, of all elements without `axis`; `where` leaves elements out, `keep=true` keeps the dims as 1"),
    special("mean", &["x", "axis=", "where=", "empty=", "keep="], rules::mean, "sum / count; NaN where nothing is left, unless `empty` says otherwise"),
    special("var", &["x", "axis=", "where=", "keep="], rules::var, "mean of the squared differences from the mean; NaN where nothing is left"),
    special("std", &["x", "axis=", "where=", "keep="], rules::std, "square root of `var`"),
    special("any", &["x", "axis=", "where="], rules::any, "whether one is true"),
    special("all", &["x", "axis=", "where="], rules::all, "whether all are true"),
    special("cumsum", &["x", "axis", "reverse="], rules::cumsum, "running sum along a dim; from the end with `reverse=true`"),

    special("recurrence", &["x", "decay", "reverse=", "axis="], rules::recurrence, "y[t] = x[t] + decay * y[t - 1] along a dim, the last one unless given; from the end with `reverse=true`"),
    special("shift", &["x", "n", "fill=", "axis="], rules::shift, "y[t] = x[t - n] along a dim, the last one unless given, and `fill` (0) where there is no such place: `shift(x, -1)` is the next one"),
    special("softmax", &["x", "axis="], rules::softmax, "exp(x), divided by its sum along a dim, the last one unless given"),
    special("log_softmax", &["x", "axis="], rules::log_softmax, "log(softmax(x)), finite for every finite x"),

    special("range", &["n"], rules::range, "0, 1, .. up to before n"),
    special("zeros", &["shape"], rules::zeros, "floats that are 0: `zeros([B, T])`"),
    special("reshape", &["x", "shape"], rules::reshape, "the same elements in the same order in another shape"),
    special("transpose", &["x", "order"], rules::transpose, "dims in another order: `transpose(x, [0, 2, 1])`"),
    special("concat", &["*x", "axis="], rules::concat, "one after the other along a dim; records member by member"),
    special("dropout", &["x", "p"], rules::dropout, "x; where an update trains the model that calls it, elements are 0 with the probability p, and divided by 1 - p otherwise"),
    special("stop", &["x"], rules::stop, "x, but no gradient flows through"),

    special("embed", &["indices", "table"], layers::embed, "rows of a table by number"),
    special("linear", &["x", "weight", "bias="], layers::linear, "x times the transposed weight over the last dim, plus the bias; of a group, `.weight` and `.bias` where there is one"),
    special("layer_norm", &["x", "weight=", "bias=", "eps="], layers::layer_norm, "(x - mean) / sqrt(variance + eps) * weight + bias over the last dim; of a group, those that exist"),
    special("rms_norm", &["x", "weight=", "eps="], layers::rms_norm, "x / sqrt(mean(x ** 2) + eps) * weight over the last dim; of a group, `.weight`"),
    special("rope", &["x", "positions", "freq"], layers::rope, "rotary positions for [B, T, heads, D]: the pair x[i], x[i + D / 2] turns by the angle position * freq[i]"),
    special("attention", &["q", "k", "v", "segment", "causal=", "scale=", "window=", "slopes="], layers::attention, "softmax(scale * q k^T) v for [B, T, heads, head_dim]; places see their own segment only, 0 is padding, and with a window those less than so many places away; the scale is head_dim ** -0.5 unless given; slopes per head times the distance are taken from the scores (`alibi_slopes`)"),
    special("position_in", &["segment"], layers::position_in, "the place of each token inside its text, from 0"),
    special("token_logp", &["logits", "tokens"], layers::token_logp, "log-probability of each token under the softmax of its logits"),
];

impl Lowering<'_> {
    /// A call of a builtin.
    pub fn builtin(&mut self, builtin: &'static Builtin, span: Span, given: Vec<(Option<Word>, Arg)>) -> R<Val> {
        let call = self.match_params(builtin, span, given)?;
        match builtin.rule {
            Rule::Special(rule) => rule(self, &call),
            Rule::Elementwise(op, known) => self.elementwise(&call, op(), known),
            Rule::Cast(dtype) => self.cast_call(&call, dtype),
        }
    }

    fn match_params(&mut self, builtin: &'static Builtin, span: Span, given: Vec<(Option<Word>, Arg)>) -> R<Call> {
        let mut call = Call { span, builtin, args: vec![None; builtin.params.len()], rest: Vec::new() };
        let name = builtin.name;
        let usage = || format!("it is `{name}({})`", builtin.params.join(", "));
        let collects = builtin.params.first().is_some_and(|p| p.starts_with('*'));
        for (word, arg) in given {
            let at = match &word {
                Some(word) => builtin.params.iter().position(|p| bare(p) == word.text),
                None if collects => {
                    call.rest.push(arg);
                    continue;
                }
                None => call.args.iter().position(Option::is_none),
            };
            let Some(at) = at else {
                let diag = match &word {
                    Some(word) => {
                        Diag::error(format!("`{name}` has no parameter `{}`", word.text)).label(word.span, "")
                    }
                    None => Diag::error(format!("found an argument too many for `{name}`")).label(arg.span, ""),
                };
                return self.fail(diag.help(usage()));
            };
            if call.args[at].is_some() {
                let diag = Diag::error(format!("`{}` is given twice", bare(builtin.params[at]))).label(arg.span, "");
                return self.fail(diag);
            }
            // An optional part that is left out by a choice: `slopes=x if c else none`.
            let none = matches!(arg.value, Val::Static(Constant::None)) && builtin.params[at].ends_with('=');
            if !none {
                call.args[at] = Some(arg);
            }
        }
        for (param, arg) in builtin.params.iter().zip(&call.args) {
            let missing = match param.strip_prefix('*') {
                Some(_) => call.rest.is_empty(),
                None => !param.ends_with('=') && arg.is_none(),
            };
            if missing {
                let diag = Diag::error(format!("`{name}` misses `{}`", bare(param))).label(span, "");
                return self.fail(diag.help(usage()));
            }
        }
        Ok(call)
    }

    fn elementwise(&mut self, call: &Call, op: Op, known: Option<fn(f64) -> f64>) -> R<Val> {
        let arg = call.arg("x");
        if let (Some(known), Val::Static(c)) = (known, &arg.value)
            && let Some(x) = c.number()
        {
            return Ok(Val::float(known(x)));
        }
        let value = match op {
            Op::Abs {} => self.numeric(arg)?,
            _ => self.as_tensor(arg, DType::F32)?,
        };
        self.op(call.span, op, &[(value, arg.span)]).map(Val::Tensor)
    }

    fn cast_call(&mut self, call: &Call, dtype: DType) -> R<Val> {
        let arg = call.arg("x");
        let known = match &arg.value {
            Val::Static(Constant::Bool(b)) => Some(f64::from(u8::from(*b))),
            Val::Static(c) => c.number(),
            _ => None,
        };
        if let Some(x) = known {
            return Ok(match dtype {
                DType::I32 => Val::int(x as i64),
                DType::Bool => Val::bool(x != 0.0),
                DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) | DType::Key => Val::float(x),
            });
        }
        if let (Val::Dim(dim), DType::I32 | DType::F32) = (&arg.value, dtype) {
            return Ok(Val::Tensor(self.emit(call.span, Op::Size { dim: dim.clone(), dtype }, &[])));
        }
        let value = self.tensor(arg)?;
        Ok(Val::Tensor(self.cast(call.span, value, dtype)))
    }
}
