//! The reverse sweep: appends to a graph the gradients of some of its values.

use dsgc_ir::diag::Diag;
use dsgc_ir::{Builder, Graph, Loc, Op, OpId, Phase, Reason, Site, Value};

use super::vjp::vjp;

/// Appends gradients of `wanted` to the graph, from the gradients of later values (`seeds`: value, gradient).
///
/// The answer has an entry per wanted value: `None` where no seed depends on it. Sums of several contributions are
/// taken in reverse program order, so they do not depend on anything but the graph. Nothing flows on beyond a wanted
/// value. Every op inherits line and layer of the op whose gradient it belongs to.
pub fn backward(graph: &mut Graph, seeds: &[(Value, Value)], wanted: &[Value]) -> Result<Vec<Option<Value>>, Diag> {
    let forward = graph.len();
    let depends = depends_on(graph, wanted);
    let weights = without_inputs(graph);
    let mut gradients: Vec<Option<Value>> = vec![None; graph.values().len()];
    for &(value, gradient) in seeds {
        add(graph, &mut gradients[value.0 as usize], gradient, &grad_site(&Site::default(), Phase::BackwardInput));
    }
    for id in (0..forward as u32).rev().map(OpId) {
        let op = graph.op(id).clone();
        let needs: Vec<bool> = op.args.iter().map(|a| depends[a.0 as usize]).collect();
        let results: Vec<Value> = op.results().collect();
        let dys: Vec<Option<Value>> = results.iter().map(|r| gradients[r.0 as usize]).collect();
        let stops = results.iter().any(|r| wanted.contains(r));
        if stops || !needs.contains(&true) || dys.iter().all(Option::is_none) {
            continue;
        }
        for (phase, needs) in by_phase(&op.op, &op.args, &needs, &weights) {
            let site = grad_site(&op.site, phase);
            let mut builder = Builder::new(graph, site.clone());
            let found = vjp(&mut builder, &op, &op.args, &results, &dys, &needs).map_err(|why| {
                Diag::error(why).label(op.site.loc.span, "a gradient is wanted here").help("put it inside `stop(..)`")
            })?;
            for (arg, gradient) in op.args.iter().zip(found) {
                if let Some(gradient) = gradient {
                    add(graph, &mut gradients[arg.0 as usize], gradient, &site);
                }
            }
        }
    }
    Ok(wanted.iter().map(|w| gradients[w.0 as usize]).collect())
}

/// Which gradients of an op are computed together, in which phase. Only products come apart: they are what a
/// zero-bubble schedule moves (Qi et al. 2023). All other ops belong to the input phase if they have a part in it.
fn by_phase(op: &Op, args: &[Value], needs: &[bool], weights: &[bool]) -> Vec<(Phase, Vec<bool>)> {
    let of_weights: Vec<bool> = args.iter().zip(needs).map(|(a, &n)| n && weights[a.0 as usize]).collect();
    let of_inputs: Vec<bool> = needs.iter().zip(&of_weights).map(|(&n, &w)| n && !w).collect();
    let parts = match (of_inputs.contains(&true), of_weights.contains(&true)) {
        (true, true) if !matches!(op, Op::Contract { .. }) => vec![(Phase::BackwardInput, needs.to_vec())],
        _ => vec![(Phase::BackwardInput, of_inputs), (Phase::BackwardWeight, of_weights)],
    };
    parts.into_iter().filter(|(_, needs)| needs.contains(&true)).collect()
}

fn grad_site(of: &Site, phase: Phase) -> Site {
    Site { phase, loc: Loc { span: of.loc.span, reason: Reason::Grad }, tag: of.tag.clone() }
}

fn add(graph: &mut Graph, sum: &mut Option<Value>, more: Value, site: &Site) {
    *sum = Some(match *sum {
        None => more,
        Some(sum) => Builder::new(graph, site.clone()).one(Op::Add {}, &[sum, more]),
    });
}

/// Per value, whether a gradient can flow from it to one of `wanted`.
fn depends_on(graph: &Graph, wanted: &[Value]) -> Vec<bool> {
    let mut depends = vec![false; graph.values().len()];
    for value in wanted {
        depends[value.0 as usize] = true;
    }
    for (_, op) in graph.ops() {
        let any = op.args.iter().any(|a| depends[a.0 as usize]) && op.op != (Op::Stop {});
        for result in op.results() {
            depends[result.0 as usize] |= any && graph.ty(result).dtype.is_float();
        }
    }
    depends
}

/// Per value, whether it is computed from parameters and constants only.
fn without_inputs(graph: &Graph) -> Vec<bool> {
    let mut without = vec![true; graph.values().len()];
    for input in graph.inputs() {
        without[input.0 as usize] = false;
    }
    for (_, op) in graph.ops() {
        let all = op.args.iter().all(|a| without[a.0 as usize]);
        for result in op.results() {
            without[result.0 as usize] = all;
        }
    }
    without
}
