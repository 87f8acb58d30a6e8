//! Which kernels an op becomes, in words: by the conditions that its launches follow, at the largest dims.

use dsgc_ir::body::{Along, product_parts};
use dsgc_ir::{Bindings, Body, Class, Op, Type};

use super::index::Store;
use super::reduce::{self, TOGETHER, Way};
use super::target::{MOST_TENSORS, knows_narrow};
use super::{contract, cores, head, region};

/// The kernel family, how the work is shared out, and how narrow floats are had; nothing of ops that run no kernel.
pub(super) fn lowering(op: &Op, args: &[Type], results: &[Type], bounds: &Bindings, cores: bool) -> Option<String> {
    let shape = |i: usize| args[i].shape(bounds).unwrap_or_default();
    let class = op.class();
    let family = match op {
        _ if matches!(class, Class::View | Class::State) => return None,
        Op::Cast { .. } if args[0].dtype.is_quantized() || results[0].dtype.is_quantized() => {
            "cast of weights in few bits, a unit a group or a word".into()
        }
        _ if class == Class::Collective => "sent between ranks, through the host or from device to device".into(),
        Op::Shard { .. } => "a rank's part, through the host".into(),
        _ if class == Class::Elementwise => elements(1, results),
        Op::Fused { body, shape } => fused(body, shape.len(), results),
        Op::Contract { spec } | Op::ContractEach { spec, .. } | Op::ContractFused { spec, .. } => {
            product(spec, op, args, results, cores)
        }
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
            let (whole, rank) = (shape(0), args[0].dims.len());
            let count = |taken: bool| {
                let dims = whole.iter().enumerate().filter(|(d, _)| axes.contains(d) == taken);
                dims.map(|(_, n)| n).product()
            };
            match reduce::way(axes, rank, count(false), count(true)) {
                Way::Region(along) => format!("region of a reduction, {}", reduced(along)),
                Way::Alone => "reduction, a unit a result".into(),
                Way::Cubes => format!("reduction, a cube of {TOGETHER} units a result"),
            }
        }
        Op::SumSquares {} => "reduction, a cube a block, then joined".into(),
        Op::Cumsum { .. } | Op::Recurrence { .. } => "running sum, a unit a line".into(),
        Op::LayerNorm { .. } | Op::RmsNorm { .. } => format!("norm, a cube of {TOGETHER} units a row"),
        Op::LayerNormGrad { .. } | Op::RmsNormGrad { .. } => {
            format!("norm, a cube of {TOGETHER} units a row, then one a column")
        }
        Op::Attention { .. } | Op::CachedAttention { .. } => {
            format!("attention, a cube a query with blocks of {TOGETHER} keys")
        }
        Op::AttentionGrad { .. } => {
            format!("attention, a cube a query with blocks of {TOGETHER} keys, then one a key with blocks of queries")
        }
        Op::Embed {} => "rows of a table, a unit a word".into(),
        Op::EmbedGrad { .. } | Op::AddRows {} => "rows added to a table, a cube an index in the order of places".into(),
        Op::TokenLogp {} | Op::TokenLogpGrad {} => format!("softmax, a cube of {TOGETHER} units a row"),
        Op::HeadLogp {} | Op::HeadLogpGrad { .. } => {
            let rows = head::rows(shape(2).iter().product(), shape(1)[0]);
            format!("products and softmax by blocks of {rows} rows, {}", contract::tiles())
        }
        Op::Sample { .. } => format!("sampling, a cube of {TOGETHER} units a row"),
        Op::PositionIn {} => "positions, a unit a column".into(),
        Op::Rope { .. } => "rotary positions, a unit a pair".into(),
        Op::Adamw { .. } => format!("optimizer, as many parameters a launch as {MOST_TENSORS} tensors are"),
        Op::Fold { .. } | Op::RandomNormal { .. } | Op::RandomUniform { .. } | Op::RowUniform { .. } => {
            "random numbers, a unit an element".into()
        }
        Op::Concat { .. } | Op::WriteAt { .. } => "scatter, a unit an element or a word".into(),
        Op::Const { .. } | Op::Size { .. } => "scalar, a unit".into(),
        Op::Iota { .. } => "sequence, a unit an element".into(),
        _ => "gather, a unit a word".into(),
    };
    let (reads, writes) = knows_narrow(op, args);
    let has = |types: &[Type]| types.iter().any(|ty| ty.dtype.is_narrow());
    let copied = (has(args) && !reads) || (has(results) && !writes);
    let narrow = match (has(args) || has(results), copied) {
        (false, _) => "",
        (true, false) => "; narrow floats as they lie",
        (true, true) => "; narrow floats through copies in f32",
    };
    Some(family + narrow)
}

fn elements(steps: usize, results: &[Type]) -> String {
    let each = results.iter().map(|ty| Store::of(ty.dtype).each()).max().unwrap_or(1);
    let steps = if steps == 1 { "1 step".into() } else { format!("{steps} steps") };
    let each = if each == 1 { "an element".into() } else { format!("{each} elements") };
    format!("region of {steps}, a unit {each}")
}

fn fused(body: &Body, rank: usize, results: &[Type]) -> String {
    match body.reduction() {
        None => elements(body.work(), results),
        Some(reduction) => {
            format!("region of {} steps around a reduction, {}", body.work(), reduced(reduction.along(rank)))
        }
    }
}

fn reduced(along: Along) -> String {
    match along {
        Along::Rows => format!("a cube of {TOGETHER} units a row"),
        Along::Columns => format!("a unit a column of {} rows, then joined", region::ROWS),
        Along::Whole => format!("a cube a block of {}, then joined", region::BLOCK),
    }
}

fn product(spec: &str, op: &Op, args: &[Type], results: &[Type], cores: bool) -> String {
    let finish = match op {
        Op::ContractFused { bodies, .. } => {
            let stored =
                product_parts(bodies).into_iter().any(|part| !contract::finishes(spec, &results[part.results]));
            let how = if stored { "stored in f32 and finished by a region" } else { "finished in registers" };
            format!(", {how}")
        }
        _ if results.iter().any(|ty| !contract::finishes(spec, std::slice::from_ref(ty))) => {
            ", stored in f32 and rounded by a region".into()
        }
        _ => String::new(),
    };
    let kept: Vec<&str> = args.iter().filter(|ty| ty.dtype.is_quantized()).map(|ty| ty.dtype.name()).collect();
    let kept = kept.first().map_or(String::new(), |name| format!(", weights of {name} made numbers in the tiles"));
    let narrow = args.len() > 1 && cores::multiplies(contract::computed(args[0].dtype, args[1].dtype));
    let tiles = if cores && narrow { cores::tiles() } else { contract::tiles() };
    format!("product, {tiles}{kept}{finish}")
}
