//! Whether an op may run again, and what that costs.

use dsgc_ir::Op;

/// What it means to run an op again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remat {
    /// It disappears into a region with what uses it, if that is elementwise too; otherwise it costs its time.
    Cheap,
    /// It costs its time.
    Costly,
    /// It must not: it changes a state, or only the host knows when it runs.
    Never,
}

/// The class of an op.
pub(super) fn remat(op: &Op) -> Remat {
    match op {
        Op::Const { .. }
        | Op::Size { .. }
        | Op::Cast { .. }
        | Op::Broadcast { .. }
        | Op::Reshape { .. }
        | Op::Stop {}
        | Op::Dropout { .. }
        | Op::Add {}
        | Op::Sub {}
        | Op::Mul {}
        | Op::Div {}
        | Op::Max {}
        | Op::Min {}
        | Op::Pow {}
        | Op::Neg {}
        | Op::Abs {}
        | Op::Exp {}
        | Op::Log {}
        | Op::Sqrt {}
        | Op::Tanh {}
        | Op::Sigmoid {}
        | Op::LogSigmoid {}
        | Op::Relu {}
        | Op::Gelu {}
        | Op::GeluTanh {}
        | Op::Silu {}
        | Op::Erf {}
        | Op::Eq {}
        | Op::Ne {}
        | Op::Lt {}
        | Op::Le {}
        | Op::And {}
        | Op::Or {}
        | Op::Not {}
        | Op::Where {}
        | Op::Fused { .. } => Remat::Cheap,
        Op::Iota { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::SliceAt { .. }
        | Op::Contract { .. }
        | Op::ContractEach { .. }
        | Op::ContractFused { .. }
        | Op::SumSquares {}
        | Op::AddRows {}
        | Op::ReduceSum { .. }
        | Op::ReduceMax { .. }
        | Op::ReduceMin { .. }
        | Op::Cumsum { .. }
        | Op::Recurrence { .. }
        | Op::Embed {}
        | Op::EmbedGrad { .. }
        | Op::LayerNorm { .. }
        | Op::LayerNormGrad { .. }
        | Op::RmsNorm { .. }
        | Op::RmsNormGrad { .. }
        | Op::Rope { .. }
        | Op::Attention { .. }
        | Op::AttentionGrad { .. }
        | Op::TokenLogp {}
        | Op::TokenLogpGrad {}
        | Op::HeadLogp {}
        | Op::HeadLogpGrad { .. }
        | Op::PositionIn {}
        | Op::Fold { .. }
        | Op::RandomNormal { .. }
        | Op::RandomUniform { .. }
        | Op::RowUniform { .. }
        | Op::AllGather { .. }
        | Op::Shard { .. } => Remat::Costly,
        Op::WriteAt { .. }
        | Op::CachedAttention { .. }
        | Op::Sample { .. }
        | Op::AllReduce { .. }
        | Op::ReduceScatter { .. }
        | Op::Wait {}
        | Op::ToHost {}
        | Op::FromHost {}
        | Op::Adamw { .. }
        | Op::Read { .. }
        | Op::Write { .. } => Remat::Never,
    }
}
