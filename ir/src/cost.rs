//! Work of an op by formula: floating-point operations and bytes, at given dims.
//!
//! A multiply-add counts as two. Transcendental functions count as one each: the figures compare programs and
//! price matrix products, they do not predict elementwise time, which bytes do.

use crate::dim::{Bindings, Symbol};
use crate::graph::{Graph, OpData};
use crate::infer::Contraction;
use crate::op::{Class, Op};

/// Work of an op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

impl std::ops::Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

/// The cost of one op of a graph; an unbound symbol otherwise.
pub fn cost(graph: &Graph, op: &OpData, bindings: &Bindings) -> Result<Cost, Symbol> {
    let len = |v| graph.ty(v).len().eval(bindings).map(|n| n.max(0) as u64);
    let mut bytes = 0;
    for value in op.args.iter().copied().chain(op.results()) {
        bytes += graph.ty(value).bytes(bindings)? as u64;
    }
    let out = op.results().next().map_or(Ok(0), len)?;
    let extent = |v: crate::Value, axis: usize| graph.ty(v).dims[axis].eval(bindings).map(|n| n.max(0) as u64);
    let flops = match (&op.op, op.op.class()) {
        (Op::Contract { spec }, _) => {
            let labels = Contraction::parse(spec).expect("verified ops have readable specs");
            let mut summed = 1;
            for (i, c) in labels.lhs.iter().enumerate() {
                if !labels.out.contains(c) {
                    summed *= extent(op.args[0], i)?;
                }
            }
            2 * out * summed
        }
        // Scores and their product with v: two contractions over all pairs of places; masked ones count too.
        (Op::Attention { .. }, _) => 4 * out * extent(op.args[1], 1)?,
        (Op::CachedAttention { .. }, _) => 4 * out * extent(op.args[1], 1)?,
        // The scores again, and four gradients.
        (Op::AttentionGrad { .. }, _) => 10 * out * extent(op.args[1], 1)?,
        (Op::LayerNorm { .. }, _) => 8 * out,
        (Op::RmsNorm { .. }, _) => 5 * out,
        (Op::RmsNormGrad { .. }, _) => 10 * out,
        (Op::Rope { .. }, _) => 3 * out,
        (Op::Recurrence { .. }, _) => 2 * out,
        (Op::Sample { .. }, _) => 3 * len(op.args[0])?,
        (Op::LayerNormGrad { .. }, _) => 14 * out,
        (Op::TokenLogp {} | Op::TokenLogpGrad {}, _) => 3 * len(op.args[0])?,
        (Op::EmbedGrad { .. }, _) => len(op.args[1])?,
        (Op::Adamw { .. }, _) => 14 * out,
        (Op::Fused { body, .. }, _) => body.work() as u64 * out,
        (_, Class::Reduction) => len(op.args[0])?,
        (_, Class::Elementwise | Class::Composite | Class::Fused | Class::Random) => out,
        (_, Class::Structure | Class::View | Class::State | Class::Contraction | Class::Update) => 0,
    };
    let bytes = match op.op.class() {
        Class::View | Class::State => 0,
        _ => bytes,
    };
    Ok(Cost { flops, bytes })
}

/// The cost of a whole graph; an unbound symbol otherwise.
pub fn graph_cost(graph: &Graph, bindings: &Bindings) -> Result<Cost, Symbol> {
    graph.ops().try_fold(Cost::default(), |sum, (_, op)| Ok(sum + cost(graph, op, bindings)?))
}
