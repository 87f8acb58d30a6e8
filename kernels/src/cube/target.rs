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
            op if op.class() == Class::Collective => Some("several GPUs".into()),
            Op::Shard { .. } => Some("several GPUs".into()),
            _ => None,
        }
    }

    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        let own = workspace(op, args, bounds);
        let (reads, writes) = knows_narrow(op);
        let results = if writes { Vec::new() } else { infer(op, args, None).unwrap_or_default() };
        let narrow = args.iter().filter(|_| !reads).chain(&results).filter(|ty| ty.dtype.is_narrow());
        let wide = narrow.map(|ty| 4 * ty.shape(bounds).unwrap_or_default().iter().product::<usize>());
        wide.fold(own, |all, bytes| all.next_multiple_of(ALIGNMENT) + bytes.next_multiple_of(ALIGNMENT))
    }

    fn memory(&self) -> Option<usize> {
        None
    }
}

/// Whether an op's kernels read narrow floats as they lie, and whether they write them; else they find them in single
/// precision in the workspace.
pub(super) fn knows_narrow(op: &Op) -> (bool, bool) {
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
    );
    let both = moves
        || matches!(op.class(), Class::View | Class::State | Class::Elementwise | Class::Fused)
        || matches!(op, Op::Contract { .. } | Op::ContractEach { .. } | Op::ContractFused { .. });
    let reads = matches!(op, Op::Attention { .. } | Op::CachedAttention { .. } | Op::AttentionGrad { .. })
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
