//! Work of an op by formula: floating-point operations and bytes, at given dims.
//!
//! A multiply-add counts as two. Transcendental functions count as one each: the figures compare programs and
//! price matrix products, they do not predict elementwise time, which bytes do. What cannot be counted is the most
//! that a number holds.
//!
//! [`time`] makes one figure of both, by which passes choose between programs.

use std::collections::BTreeSet;

use crate::body::product_parts;
use crate::dim::{Bindings, Symbol};
use crate::graph::{Graph, OpData};
use crate::infer::Contraction;
use crate::mesh::Mesh;
use crate::op::{Class, Op};
use crate::program::Program;
use crate::stage::Piece;
use crate::types::{DType, Type};

/// Floating-point operations that a device does while it moves a byte: 487 GFLOP/s beside 57 GB/s on two cores of a
/// Zen 5. Graphics cards have more of both, in about the same proportion.
pub const FLOPS_PER_BYTE: u64 = 8;

/// Bytes that a device moves while it starts a kernel: a few hundred nanoseconds on a CPU.
const BYTES_PER_LAUNCH: u64 = 16 << 10;

/// Seconds of a message between two ranks beside those of its bytes, and bytes that a rank sends in a second: assumed, as for
/// ranks of one machine. They choose which messages go together and which reshard is made, never a number of a model.
const SECONDS_PER_MESSAGE: f64 = 5e-6;
const SENT_PER_SECOND: f64 = 5e9;

/// Bytes that a device moves in a second: assumed, as for the memory of such a machine.
const BYTES_PER_SECOND: f64 = 57e9;

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
        Cost { flops: self.flops.saturating_add(other.flops), bytes: self.bytes.saturating_add(other.bytes) }
    }
}

/// The cost of an op from the types of its operands and results; an unbound symbol otherwise.
pub fn cost(op: &Op, args: &[&Type], results: &[&Type], bindings: &Bindings) -> Result<Cost, Symbol> {
    let len = |ty: &Type| -> Result<u64, Symbol> {
        Ok(ty.shape(bindings)?.into_iter().fold(1u64, |n, extent| n.saturating_mul(extent as u64)))
    };
    let mut bytes = 0u64;
    for ty in args.iter().chain(results) {
        bytes = bytes.saturating_add(ty.bytes(bindings)? as u64);
    }
    let moved = |ty: &Type| ty.bytes(bindings).map(|n| (n as u64).saturating_mul(2));
    let out = results.first().map_or(Ok(0), |ty| len(ty))?;
    let times = |n: u64| n.saturating_mul(out);
    let extent = |ty: &Type, axis: usize| ty.dims[axis].eval(bindings).map(|n| n.max(0) as u64);
    let flops = match (op, op.class()) {
        (Op::Contract { spec }, _) => {
            let labels = Contraction::parse(spec).expect("verified ops have readable specs");
            let mut summed = 1u64;
            for (i, c) in labels.lhs.iter().enumerate() {
                if !labels.out.contains(c) {
                    summed = summed.saturating_mul(extent(args[0], i)?);
                }
            }
            times(summed.saturating_mul(2))
        }
        // Scores and their product with v: two contractions over all pairs of places that the causal mask leaves. What
        // segments hide counts too.
        (Op::Attention { causal, .. }, _) => times(seen(extent(args[1], 1)?, *causal).saturating_mul(2)),
        (Op::ContractEach { spec, common }, _) => {
            let one = Op::Contract { spec: spec.clone() };
            let mut flops = 0u64;
            for (&other, &result) in args[1..].iter().zip(results) {
                let pair = if *common == 0 { [args[0], other] } else { [other, args[0]] };
                flops = flops.saturating_add(cost(&one, &pair, &[result], bindings)?.flops);
            }
            flops
        }
        (Op::ContractFused { spec, common, bodies }, _) => {
            let one = Op::Contract { spec: spec.clone() };
            let mut flops = 0u64;
            for (part, body) in product_parts(bodies).into_iter().zip(bodies) {
                let result = results[part.results.start];
                let mut pair = [args[0], args[part.other]];
                pair.rotate_left(*common);
                let finished = len(result)?.saturating_mul(body.work() as u64);
                flops = flops.saturating_add(cost(&one, &pair, &[result], bindings)?.flops).saturating_add(finished);
            }
            flops
        }
        (Op::SumSquares {}, _) => {
            let lens = args.iter().map(|ty| len(ty)).collect::<Result<Vec<u64>, _>>()?;
            lens.into_iter().fold(0u64, u64::saturating_add).saturating_mul(2)
        }
        (Op::CachedAttention { .. }, _) => times(extent(args[1], 1)?.saturating_mul(4)),
        // The scores again, and four gradients.
        (Op::AttentionGrad { causal, .. }, _) => times(seen(extent(args[1], 1)?, *causal).saturating_mul(5)),
        (Op::LayerNorm { .. }, _) => times(8),
        (Op::RmsNorm { .. }, _) => times(5),
        (Op::RmsNormGrad { .. }, _) => times(10),
        (Op::Rope { .. }, _) => times(3),
        (Op::Recurrence { .. }, _) => times(2),
        (Op::Sample { .. }, _) => len(args[0])?.saturating_mul(3),
        (Op::LayerNormGrad { .. }, _) => times(14),
        (Op::TokenLogp {} | Op::TokenLogpGrad {}, _) => len(args[0])?.saturating_mul(3),
        // One product, or with it those of the gradients; and what `token_logp` does to every logit.
        (Op::HeadLogp {} | Op::HeadLogpGrad { .. }, _) => {
            let products = results.len() as u64;
            let logits = len(args[2])?.saturating_mul(extent(args[1], 0)?);
            logits.saturating_mul(extent(args[1], 1)?.saturating_mul(2 * products).saturating_add(3))
        }
        (Op::EmbedGrad { .. }, _) => len(args[1])?,
        (Op::AddRows {}, _) => len(args[2])?,
        (Op::Adamw { .. }, _) => {
            let lens = results.iter().step_by(3).map(|ty| len(ty)).collect::<Result<Vec<u64>, _>>()?;
            lens.into_iter().fold(0u64, u64::saturating_add).saturating_mul(14)
        }
        // Once for every element, or for every row.
        (Op::Fused { shape, body }, _) => {
            let args: Vec<Type> = args.iter().map(|&ty| ty.clone()).collect();
            let types = body.types(shape, &args).expect("the verifier saw the body");
            let reduction = body.reduction();
            let mut flops = 0u64;
            for (i, step) in body.steps().iter().enumerate() {
                let value = body.operands() + i;
                flops = flops.saturating_add(match step.op {
                    Op::Const { .. } => 0,
                    _ if reduction.is_some_and(|r| r.value == value) => {
                        len(&Type::new(types[value].dtype, &shape[..]))?
                    }
                    _ => len(&types[value])?,
                });
            }
            flops
        }
        (_, Class::Reduction) => len(args[0])?,
        (_, Class::Elementwise | Class::Composite | Class::Fused | Class::Random) => out,
        (_, Class::Structure | Class::View | Class::State | Class::Contraction | Class::Update | Class::Collective) => {
            0
        }
    };
    let bytes = match (op, op.class()) {
        (_, Class::View | Class::State) => 0,
        // Of what is larger only the part that is asked for, read and written. A row of a table may be asked for twice,
        // and is read once.
        (Op::Embed {}, _) => bytes.min(moved(results[0])?.saturating_add(args[1].bytes(bindings)? as u64)),
        (Op::Slice { .. } | Op::SliceAt { .. }, _) => moved(results[0])?,
        // The rows that are added, and those that they are added to, read and written.
        (Op::AddRows {}, _) => {
            let rows = args[2].bytes(bindings)? as u64;
            (args[1].bytes(bindings)? as u64).saturating_add(rows.saturating_mul(3))
        }
        _ => bytes,
    };
    Ok(Cost { flops, bytes })
}

/// Twice the mean number of keys that a query sees, of so many.
fn seen(keys: u64, causal: bool) -> u64 {
    if causal { keys.saturating_add(1) } else { keys.saturating_mul(2) }
}

/// How long an op takes, in bytes that the device could have moved meanwhile; an unbound symbol otherwise.
///
/// An op that runs no kernel counts as 1, so that of two programs that are equally fast the shorter is cheaper.
pub fn time(op: &Op, args: &[&Type], results: &[&Type], bindings: &Bindings) -> Result<u64, Symbol> {
    let Cost { flops, bytes } = cost(op, args, results, bindings)?;
    Ok(match op.class() {
        Class::View | Class::State => 1,
        _ => bytes.max(flops / FLOPS_PER_BYTE).saturating_add(BYTES_PER_LAUNCH),
    })
}

/// Predicted seconds of an op's kernel: its [`time`] on a machine whose memory moves as many bytes as is assumed here.
pub fn seconds(op: &Op, args: &[&Type], results: &[&Type], bindings: &Bindings) -> Result<f64, Symbol> {
    Ok(match op.class() {
        Class::View | Class::State => 0.0,
        _ => time(op, args, results, bindings)? as f64 / BYTES_PER_SECOND,
    })
}

/// How long messages take, predicted, in the unit of [`time`].
pub fn time_of_sending(sending: Sending) -> u64 {
    (sending.seconds() * BYTES_PER_SECOND) as u64
}

/// Bytes that the first rank of a group sends for an op, by rings: of a sum `2 (n - 1) / n` of its bytes, of a part of a sum or
/// of all parts `(n - 1) / n`, as far as parts are equally long. An unbound symbol otherwise.
pub fn sent(op: &Op, args: &[&Type], results: &[&Type], bindings: &Bindings, mesh: &Mesh) -> Result<u64, Symbol> {
    let bytes = |ty: &Type| ty.bytes(bindings).map(|bytes| bytes as u64);
    // The part of the place `at` of so many elements in parts of equal length, of which the last ones may be shorter.
    let part = |all: u64, len: u64, at: u64| (at * len).min(all).abs_diff(((at + 1) * len).min(all));
    let over = match op {
        Op::AllReduce { over } | Op::AllGather { over, .. } | Op::ReduceScatter { over, .. } => *over,
        _ => return Ok(0),
    };
    let ranks = mesh.size(over) as u64;
    if ranks == 1 {
        return Ok(0);
    }
    let mut sum = 0;
    for (&arg, &result) in args.iter().zip(results) {
        sum += match op {
            Op::AllReduce { .. } => {
                let width = arg.dtype.bytes() as u64;
                let all = bytes(arg)? / width;
                let len = all.div_ceil(ranks);
                // Every part but its own, then every part but the next one's.
                let sent = 2 * all - part(all, len, 0) - part(all, len, 1);
                // Sums of narrow floats are sent as f32.
                sent * if arg.dtype.is_narrow() { 4 } else { width }
            }
            Op::AllGather { .. } => {
                let (all, len) = (bytes(result)?, bytes(arg)?);
                all - part(all, len, 1)
            }
            _ => {
                let (all, len) = (bytes(arg)?, bytes(result)?);
                all - part(all, len, 0)
            }
        };
    }
    Ok(sum)
}

/// What a rank sends, and how often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sending {
    /// Messages to the next rank of a ring.
    pub messages: u64,
    /// Bytes of all messages.
    pub bytes: u64,
}

impl Sending {
    /// So many times as much.
    pub fn times(self, n: u64) -> Sending {
        Sending { messages: self.messages.saturating_mul(n), bytes: self.bytes.saturating_mul(n) }
    }

    /// Predicted seconds.
    pub fn seconds(self) -> f64 {
        self.messages as f64 * SECONDS_PER_MESSAGE + self.bytes as f64 / SENT_PER_SECOND
    }
}

impl std::ops::Add for Sending {
    type Output = Sending;
    fn add(self, other: Sending) -> Sending {
        Sending {
            messages: self.messages.saturating_add(other.messages),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

/// Whether an op sends so little that it is sooner sent in one message with another, which costs two passes over its bytes.
pub fn joins_messages(op: &Op, args: &[&Type], results: &[&Type], bindings: &Bindings, mesh: &Mesh) -> bool {
    let copied = args.iter().chain(results).map(|ty| ty.bytes(bindings).map_or(u64::MAX, |bytes| bytes as u64));
    let copied = copied.fold(0, u64::saturating_add) as f64 / BYTES_PER_SECOND;
    sending(op, args, results, bindings, mesh)
        .is_ok_and(|sending| sending.messages as f64 * SECONDS_PER_MESSAGE > copied)
}

/// What the first rank of a group sends for an op; see [`sent`].
pub fn sending(
    op: &Op,
    args: &[&Type],
    results: &[&Type],
    bindings: &Bindings,
    mesh: &Mesh,
) -> Result<Sending, Symbol> {
    let others = |over| mesh.size(over) as u64 - 1;
    let messages = match *op {
        Op::AllReduce { over } => 2 * others(over),
        Op::AllGather { over, .. } | Op::ReduceScatter { over, .. } => others(over),
        _ => 0,
    };
    Ok(Sending { messages, bytes: sent(op, args, results, bindings, mesh)? })
}

/// [`sending`] of all ops of a graph.
pub fn graph_sending(graph: &Graph, bindings: &Bindings, mesh: &Mesh) -> Result<Sending, Symbol> {
    let one = |op: &OpData| {
        let (args, results) = types(graph, op);
        sending(&op.op, &args, &results, bindings, mesh)
    };
    graph.ops().map(|(_, op)| one(op)).try_fold(Sending::default(), |sum, one| Ok(sum + one?))
}

/// Bytes that a piece of a graph hands on to ranks of each place along `pipeline` for a part of a batch, its own place among
/// them, of a planned program of its place. Tensors lie on the host between pieces, where narrow floats are f32. Outputs of the
/// graph, which all places get, count where they are sent. An unbound symbol otherwise.
pub fn handed_on(program: &Program, pieces: &[Piece], at: usize, bindings: &Bindings) -> Result<Vec<u64>, Symbol> {
    let piece = &pieces[at];
    let graph = program.graph(&piece.graph).unwrap_or_else(|| panic!("bug: @{} is of another place", piece.graph));
    let bytes = |name: &String| {
        let (_, value) = graph.outputs.iter().find(|(output, _)| output == name).expect("the piece gives it");
        let ty = graph.ty(*value);
        if ty.dtype.is_narrow() { ty.with(DType::F32) } else { ty.clone() }.bytes(bindings).map(|bytes| bytes as u64)
    };
    let all = |names: &BTreeSet<&String>| names.iter().map(|&name| bytes(name)).sum::<Result<u64, Symbol>>();
    let outputs = all(&piece.gives.iter().collect())?;
    (0..program.mesh.pipeline)
        .map(|place| {
            let takes = pieces.iter().filter(|p| p.place == place).flat_map(|p| &p.takes);
            let taken = takes.filter(|taken| taken.piece == at).flat_map(|taken| &taken.values).collect();
            Ok(all(&taken)? + if place == piece.place { 0 } else { outputs })
        })
        .collect()
}

/// The types of an op's operands and results.
pub fn types<'a>(graph: &'a Graph, op: &OpData) -> (Vec<&'a Type>, Vec<&'a Type>) {
    (op.args.iter().map(|&v| graph.ty(v)).collect(), op.results().map(|v| graph.ty(v)).collect())
}

/// The cost of a whole graph; an unbound symbol otherwise.
pub fn graph_cost(graph: &Graph, bindings: &Bindings) -> Result<Cost, Symbol> {
    graph.ops().try_fold(Cost::default(), |sum, (_, op)| {
        let (args, results) = types(graph, op);
        Ok(sum + cost(&op.op, &args, &results, bindings)?)
    })
}

/// The [`time`] of a whole graph; an unbound symbol otherwise.
pub fn graph_time(graph: &Graph, bindings: &Bindings) -> Result<u64, Symbol> {
    graph.ops().try_fold(0u64, |sum, (_, op)| {
        let (args, results) = types(graph, op);
        Ok(sum.saturating_add(time(&op.op, &args, &results, bindings)?))
    })
}
