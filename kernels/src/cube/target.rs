//! What passes must know of GPUs.

use dsgc_ir::body::product_parts;
use dsgc_ir::infer::infer;
use dsgc_ir::{Bindings, Class, Op, Target, Type};

use super::{contract, head, norm, reduce, region, tokens};

/// Bytes to which buffers are aligned: the largest alignment of offsets that WebGPU allows a device to ask for, which
/// CUDA's vector loads ask less than.
pub(super) const ALIGNMENT: usize = 256;

/// Tensors that a kernel of a region can have, with one place left for what went wrong: Vulkan's devices allow 31 and more.
pub(super) const MOST_TENSORS: usize = 28;

/// Which runtime a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// Vulkan, Metal or DirectX, through wgpu.
    Wgpu,
    /// NVIDIA's own.
    Cuda,
}

impl Platform {
    /// The name of the device that users write.
    pub fn name(self) -> &'static str {
        match self {
            Platform::Wgpu => "wgpu",
            Platform::Cuda => "cuda",
        }
    }
}

/// A GPU as passes know it, also on a machine without one.
#[derive(Clone, Copy, Debug)]
pub struct CubeTarget {
    /// The runtime.
    pub platform: Platform,
    /// Bytes of the largest allocation, a multiple of the alignment, if that has a bound.
    pub allocation: Option<usize>,
    /// Whether products of narrow floats run on tensor cores.
    pub cores: bool,
}

impl Target for CubeTarget {
    fn name(&self) -> &str {
        self.platform.name()
    }

    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn missing_kernel(&self, op: &Op, args: &[Type]) -> Option<String> {
        let keeps = matches!(op.class(), Class::View | Class::State)
            || matches!(op, Op::Cast { .. } | Op::Contract { .. } | Op::ContractEach { .. } | Op::ContractFused { .. });
        if let Some(kept) = args.iter().find(|ty| ty.dtype.is_quantized() && !keeps) {
            return Some(format!("weights of {} are operands of products only", kept.dtype));
        }
        match op {
            Op::Fused { body, .. } if args.len() + body.results().len() > MOST_TENSORS => {
                Some(format!("a region of more than {MOST_TENSORS} operands and results"))
            }
            Op::ContractFused { bodies, .. } => product_parts(bodies).into_iter().find_map(|part| {
                (2 + part.operands.len() + part.results.len() > MOST_TENSORS)
                    .then(|| format!("a region of more than {MOST_TENSORS} operands and results behind a product"))
            }),
            op if op.class() == Class::Collective && args.len() > 1 => Some("several operands sent together".into()),
            Op::AllGather { axis, .. } | Op::ReduceScatter { axis, .. } if *axis > 0 => {
                Some("parts along other dims than the first".into())
            }
            _ => None,
        }
    }

    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        let own = workspace(op, args, bounds);
        let (reads, writes) = knows_narrow(op, args);
        let results = if writes { Vec::new() } else { infer(op, args, None).unwrap_or_default() };
        let narrow = args.iter().filter(|_| !reads).chain(&results).filter(|ty| ty.dtype.is_narrow());
        let wide = narrow.map(|ty| 4 * ty.shape(bounds).unwrap_or_default().iter().product::<usize>());
        wide.fold(own, |all, bytes| all.next_multiple_of(ALIGNMENT) + bytes.next_multiple_of(ALIGNMENT))
    }

    fn lowering(&self, op: &Op, args: &[Type], bounds: &Bindings) -> Option<String> {
        let results = infer(op, args, None).unwrap_or_default();
        super::lowering::lowering(op, args, &results, bounds, self.cores)
    }

    fn memory(&self) -> Option<usize> {
        None
    }

    fn allocation(&self) -> Option<usize> {
        self.allocation
    }

    fn most_elements(&self) -> Option<usize> {
        Some(u32::MAX as usize)
    }
}

/// Whether an op's kernels read narrow floats as they lie, and whether they write them; else they find them in single
/// precision in the workspace.
pub(super) fn knows_narrow(op: &Op, args: &[Type]) -> (bool, bool) {
    // Whether runs of the last dim's elements, a whole one or its halves, are whole words.
    let whole = |parts: i64| {
        let last = args[0].dims.last().and_then(|dim| dim.constant());
        last.is_some_and(|n| n % (2 * parts) == 0)
    };
    match op {
        Op::Rope { .. } => return (whole(2), whole(2)),
        Op::TokenLogpGrad {} => return (whole(1), whole(1)),
        _ => {}
    }
    let moves = matches!(
        op,
        Op::Const { .. }
            | Op::Size { .. }
            | Op::Iota { .. }
            | Op::Broadcast { .. }
            | Op::Transpose { .. }
            | Op::Slice { .. }
            | Op::Pad { .. }
            | Op::SliceAt { .. }
            | Op::Concat { .. }
            | Op::WriteAt { .. }
            | Op::Embed {}
            | Op::AllGather { .. }
            | Op::Shard { .. }
    );
    let both = moves
        || matches!(op.class(), Class::View | Class::State | Class::Elementwise | Class::Fused)
        || matches!(op, Op::Contract { .. } | Op::ContractEach { .. } | Op::ContractFused { .. });
    let reads = matches!(op, Op::TokenLogp {} | Op::EmbedGrad { .. } | Op::AddRows {})
        || matches!(op, Op::Attention { .. } | Op::CachedAttention { .. } | Op::AttentionGrad { .. })
        || matches!(op, Op::ReduceSum { .. } | Op::ReduceMax { .. } | Op::ReduceMin { .. });
    (both || reads, both)
}

fn workspace(op: &Op, args: &[Type], bounds: &Bindings) -> usize {
    let shape = |i: usize| args[i].shape(bounds).unwrap_or_default();
    match op {
        Op::LayerNormGrad { .. } | Op::RmsNormGrad { .. } => norm::workspace(&shape(0)),
        Op::SumSquares {} => reduce::workspace((0..args.len()).map(|i| shape(i).iter().product())),
        Op::HeadLogp {} | Op::HeadLogpGrad { .. } => head::workspace(shape(2).iter().product(), &shape(1)),
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => region::workspace(&shape(0), axes),
        Op::Fused { .. } => region::workspace_of(op, bounds),
        Op::EmbedGrad { .. } => tokens::workspace(shape(0).iter().product()),
        Op::AddRows {} => tokens::workspace(shape(1).iter().product()),
        _ => contract::workspace(op, args, bounds),
    }
}
