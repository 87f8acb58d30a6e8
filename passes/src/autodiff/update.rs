//! The optimizer: from gradients to new parameters.

use std::collections::BTreeMap;

use dsgc_ir::diag::Span;
use dsgc_ir::stage::{Optimizer, Training};
use dsgc_ir::{Builder, DType, Dim, Graph, Loc, Op, Phase, Program, Reason, Site, StateId, StateKind, Type, Value};

/// Name of the input with the learning rate, `f32[]`.
pub const LR: &str = "lr";
/// Name of the input with the number of the optimizer step, from 1, `i32[]`.
pub const STEP: &str = "t";
/// Name of the output with the gradient's global L2 norm before clipping, `f32[]`.
pub const GRAD_NORM: &str = "grad_norm";

/// Adds the optimizer's inputs to a graph that has no ops yet: learning rate and step.
pub fn inputs(graph: &mut Graph) -> (Value, Value) {
    (graph.input(LR, Type::scalar(DType::F32)), graph.input(STEP, Type::scalar(DType::I32)))
}

/// Appends clipping and AdamW for parameters with their gradients, and the output [`GRAD_NORM`].
///
/// Clipping is PyTorch's `clip_grad_norm_`: all gradients times `min(1, max_norm / (norm + 1e-6))`.
pub fn append(
    graph: &mut Graph,
    program: &mut Program,
    training: &Training,
    (lr, step): (Value, Value),
    gradients: &BTreeMap<StateId, Value>,
) {
    let mut b = Builder::new(graph, site(Span::NONE));
    let norm = norm(&mut b, gradients.values());
    let one = b.fill(1.0, &[]);
    let factor = match training.max_grad_norm {
        Some(max) => {
            let (max, small) = (b.fill(max, &[]), b.fill(1e-6, &[]));
            let divisor = b.one(Op::Add {}, &[norm, small]);
            let ratio = b.one(Op::Div {}, &[max, divisor]);
            b.one(Op::Min {}, &[ratio, one])
        }
        None => one,
    };
    for (&param, &gradient) in gradients {
        let (name, ty, span) = {
            let state = program.state(param);
            (state.name.clone(), state.ty.clone(), state.span)
        };
        let moments = ["m", "v"].map(|suffix| companion(program, param, suffix));
        b.site = site(span);
        let Optimizer { betas, eps, .. } = training.optimizer;
        let decay = decay_of(&training.optimizer, name.strip_prefix(&format!("{}/", training.role)).unwrap_or(&name));
        let mut operands = vec![b.read(param, &ty), gradient];
        operands.extend(moments.iter().map(|&m| b.read(m, &ty)));
        operands.extend([lr, step, factor]);
        let new = b.push(Op::Adamw { beta1: betas.0, beta2: betas.1, eps, decay }, &operands);
        for (state, value) in [param, moments[0], moments[1]].into_iter().zip(new) {
            b.write(state, &ty, value);
        }
    }
    graph.outputs.push((GRAD_NORM.into(), norm));
}

/// The state that belongs to a parameter: `<role>/<name>.<suffix>`, of its type, declared when first asked for.
pub fn companion(program: &mut Program, param: StateId, suffix: &str) -> StateId {
    let of = program.state(param);
    let (name, ty, span) = (format!("{}.{suffix}", of.name), of.ty.clone(), of.span);
    program.state_named(&name).unwrap_or_else(|| program.declare(name, ty, StateKind::State, span))
}

/// The site of an op that belongs to the parameter declared there.
pub fn site(span: Span) -> Site {
    Site { phase: Phase::Update, loc: Loc { span, reason: Reason::Update }, tag: None }
}

/// Decay of the parameter with this Hugging Face name.
fn decay_of(optimizer: &Optimizer, name: &str) -> f64 {
    let name = name.to_lowercase();
    let exempt = optimizer.no_decay.iter().any(|part| name.contains(&part.to_lowercase()));
    if exempt { 0.0 } else { optimizer.weight_decay }
}

/// The square root of the sum of all squares. A tensor's sum is one product of it with itself, so that no tensor of
/// squares is ever stored.
fn norm<'v>(b: &mut Builder, tensors: impl IntoIterator<Item = &'v Value>) -> Value {
    let mut sum: Option<Value> = None;
    for &tensor in tensors {
        let ty = b.ty(tensor);
        let flat = b.one(Op::Reshape { shape: vec![Dim::product(&ty.dims)] }, &[tensor]);
        let squares = b.one(Op::Contract { spec: "a,a->".into() }, &[flat, flat]);
        sum = Some(match sum {
            None => squares,
            Some(sum) => b.one(Op::Add {}, &[sum, squares]),
        });
    }
    let sum = sum.unwrap_or_else(|| b.fill(0.0, &[]));
    b.one(Op::Sqrt {}, &[sum])
}
