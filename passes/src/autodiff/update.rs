//! The optimizer: from gradients to new parameters.

use std::collections::BTreeMap;

use dsgc_ir::infer::Contraction;
use dsgc_ir::stage::{Optimizer, Training};
use dsgc_ir::{Builder, DType, Graph, Loc, Op, Phase, Program, Reason, Site, StateId, StateKind, Tag, Type, Value};

use super::scale::{LOSS_SCALE, OVERFLOW, Scale};

/// Name of the input with the learning rate, `f32[]`.
pub const LR: &str = "lr";
/// Name of the input with the number of the optimizer step, from 1, `i32[]`.
pub const STEP: &str = "t";
/// Name of the output with the gradient's global L2 norm before clipping, `f32[]`.
pub const GRAD_NORM: &str = "grad_norm";

/// Name of the sum of squares of all gradients, scaled, `f32[]`: what a role's graph gives, and the input that takes the sum of
/// the others'.
pub const SQUARES: &str = "squares";

/// Adds the input with the squares of the gradients of roles that step with this one.
pub fn squares_of_others(graph: &mut Graph) -> Value {
    graph.input(SQUARES, Type::scalar(DType::F32))
}

/// The sum of squares of all gradients, `f32[]`.
pub fn squares(graph: &mut Graph, program: &Program, gradients: &BTreeMap<StateId, Value>, layers: &Layers) -> Value {
    let squares: Vec<Value> = gradients
        .iter()
        .map(|(&param, &gradient)| sum_of_squares(&mut Builder::new(graph, site(program, param, layers)), gradient))
        .collect();
    let mut b = Builder::new(graph, Site { phase: Phase::Update, ..Site::default() });
    let sum = squares.into_iter().reduce(|a, c| b.one(Op::Add {}, &[a, c]));
    sum.unwrap_or_else(|| b.fill(0.0, &[]))
}

/// Adds the optimizer's inputs to a graph that has no ops yet: learning rate and step.
pub fn inputs(graph: &mut Graph) -> (Value, Value) {
    (graph.input(LR, Type::scalar(DType::F32)), graph.input(STEP, Type::scalar(DType::I32)))
}

/// Appends clipping and AdamW for parameters with their gradients, and the output [`GRAD_NORM`].
///
/// Clipping is PyTorch's `clip_grad_norm_`: all gradients times `min(1, max_norm / (norm + 1e-6))`. Of a role with a
/// loss scale, gradients come scaled; where they, or the sum of squares of `others`, are not finite, everything stays as it
/// was, and the outputs [`LOSS_SCALE`] and [`OVERFLOW`] say so; a norm that is not finite is given as 0.
pub fn append(
    graph: &mut Graph,
    program: &mut Program,
    training: &Training,
    (lr, step): (Value, Value),
    others: Option<Value>,
    gradients: &BTreeMap<StateId, Value>,
    layers: &Layers,
) {
    let scale = Scale::of(program, &training.role);
    let sum = squares(graph, program, gradients, layers);
    let mut b = Builder::new(graph, Site { phase: Phase::Update, ..Site::default() });
    let mut norm = b.one(Op::Sqrt {}, &[sum]);
    let one = b.fill(1.0, &[]);
    let scaled = scale.map(|scale| {
        let (value, infinite, none) = (scale.value(&mut b), b.fill(f64::INFINITY, &[]), b.fill(0.0, &[]));
        let own_finite = b.one(Op::Lt {}, &[norm, infinite]);
        let skipped = others.map(|others| {
            let finite = b.one(Op::Lt {}, &[others, infinite]);
            b.one(Op::Not {}, &[finite])
        });
        let own = b.one(Op::Div {}, &[norm, value]);
        norm = b.one(Op::Where {}, &[own_finite, own, none]);
        let finite = skipped.map_or(own_finite, |skipped| {
            let not = b.one(Op::Not {}, &[skipped]);
            b.one(Op::And {}, &[own_finite, not])
        });
        (value, finite, own_finite, skipped)
    });
    let factor = match training.max_grad_norm {
        Some(max) => {
            let (max, small) = (b.fill(max, &[]), b.fill(1e-6, &[]));
            let divisor = b.one(Op::Add {}, &[norm, small]);
            let ratio = b.one(Op::Div {}, &[max, divisor]);
            b.one(Op::Min {}, &[ratio, one])
        }
        None => one,
    };
    // A power of two: the product is what it would be without a scale.
    let factor = scaled.map_or(factor, |(value, ..)| b.one(Op::Div {}, &[factor, value]));
    for (&param, &gradient) in gradients {
        let moments = ["m", "v"].map(|suffix| companion(program, param, suffix, StateKind::State));
        let (name, ty) = (&program.state(param).name, program.state(param).ty.clone());
        b.site = site(program, param, layers);
        let Optimizer { betas, eps, .. } = training.optimizer;
        let decay = decay_of(&training.optimizer, name.strip_prefix(&format!("{}/", training.role)).unwrap_or(name));
        let mut operands = vec![b.read(param, &ty), gradient];
        operands.extend(moments.iter().map(|&m| b.read(m, &ty)));
        operands.extend([lr, step, factor]);
        let mut new = b.push(Op::Adamw { beta1: betas.0, beta2: betas.1, eps, decay }, &operands);
        if let Some((_, finite, ..)) = scaled {
            let finite = b.stretch(finite, &ty.dims);
            for (new, old) in new.iter_mut().zip([operands[0], operands[2], operands[3]]) {
                *new = b.one(Op::Where {}, &[finite, *new, old]);
            }
        }
        for (state, value) in [param, moments[0], moments[1]].into_iter().zip(new) {
            b.write(state, &ty, value);
        }
    }
    if let (Some(scale), Some((value, finite, own_finite, skipped))) = (scale, scaled) {
        b.site = Site { phase: Phase::Update, ..Site::default() };
        scale.renew(&mut b, own_finite, skipped);
        let overflow = b.one(Op::Not {}, &[finite]);
        let overflow = b.cast(overflow, DType::F32);
        graph.outputs.extend([(LOSS_SCALE.into(), value), (OVERFLOW.into(), overflow)]);
    }
    graph.outputs.push((GRAD_NORM.into(), norm));
}

/// The state that belongs to a parameter: `<role>/<name>.<suffix>`, of its type, declared when first asked for.
pub fn companion(program: &mut Program, param: StateId, suffix: &str, kind: StateKind) -> StateId {
    let of = program.state(param);
    let (name, ty, span) = (format!("{}.{suffix}", of.name), of.ty.clone(), of.span);
    program.state_named(&name).unwrap_or_else(|| program.declare(name, ty, kind, span))
}

/// The layer that a parameter belongs to, where all its reads are in one.
pub type Layers = BTreeMap<StateId, Option<Tag>>;

/// The layers of all parameters that a graph reads.
pub fn layers(graph: &Graph) -> Layers {
    let mut layers = Layers::new();
    for (_, op) in graph.ops() {
        if let Op::Read { state } = op.op {
            let tag = &op.site.tag;
            layers
                .entry(state)
                .and_modify(|t| *t = t.take().filter(|t| Some(t) == tag.as_ref()))
                .or_insert(tag.clone());
        }
    }
    layers
}

/// The site of an op that belongs to the update of a parameter.
pub fn site(program: &Program, param: StateId, layers: &Layers) -> Site {
    let loc = Loc { span: program.state(param).span, reason: Reason::Update };
    Site { phase: Phase::Update, loc, tag: layers.get(&param).cloned().flatten() }
}

/// Decay of the parameter with this Hugging Face name.
fn decay_of(optimizer: &Optimizer, name: &str) -> f64 {
    let name = name.to_lowercase();
    let exempt = optimizer.no_decay.iter().any(|part| name.contains(&part.to_lowercase()));
    if exempt { 0.0 } else { optimizer.weight_decay }
}

/// One product of a tensor with itself, so that no tensor of squares is ever stored.
fn sum_of_squares(b: &mut Builder, tensor: Value) -> Value {
    let letters: Vec<char> = ('a'..).take(b.ty(tensor).rank()).collect();
    let labels = Contraction { lhs: letters.clone(), rhs: letters, out: vec![], wide: false };
    b.one(Op::Contract { spec: labels.spec() }, &[tensor, tensor])
}
