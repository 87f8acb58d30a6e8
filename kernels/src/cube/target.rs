//! What passes must know of GPUs.

use dsgc_ir::{Bindings, Class, DType, Op, Target, Type};

use super::{head, norm, reduce};

/// Bytes to which buffers are aligned: the largest alignment of offsets that WebGPU allows a device to ask for, which
/// CUDA's vector loads ask less than.
pub(super) const ALIGNMENT: usize = 256;

/// Tensors that a kernel of a region can have, with one place left for what went wrong: Vulkan's devices allow 31 and more.
const MOST_TENSORS: usize = 28;

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
        let made = match op {
            Op::Cast { dtype } | Op::Const { dtype, .. } | Op::Size { dtype, .. } => Some(*dtype),
            _ => None,
        };
        let mut types = args.iter().map(|ty| ty.dtype).chain(made);
        if let Some(other) = types.find(|dtype| !matches!(dtype, DType::F32 | DType::I32 | DType::Bool | DType::Key)) {
            return Some(format!("its kernels compute in f32, found {other}"));
        }
        match op {
            Op::Fused { body, .. } if args.len() + body.results().len() > MOST_TENSORS => {
                Some(format!("a region of more than {MOST_TENSORS} operands and results"))
            }
            // The pass `fuse` asks, and leaves them apart.
            Op::Fused { body, .. } if body.reduction().is_some() => Some("a region around a reduction".into()),
            Op::ContractFused { .. } => Some("products are finished by an op of their own".into()),
            Op::Sample { top_k, top_p, .. } if *top_k > 0 || *top_p < 1.0 => {
                Some("it takes no `top_k` and no `top_p`".into())
            }
            op if op.class() == Class::Collective => Some("several GPUs".into()),
            Op::Shard { .. } => Some("several GPUs".into()),
            _ => None,
        }
    }

    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        let shape = |i: usize| args[i].shape(bounds).unwrap_or_default();
        match op {
            Op::LayerNormGrad { .. } | Op::RmsNormGrad { .. } => norm::workspace(&shape(0)),
            Op::SumSquares {} => reduce::workspace((0..args.len()).map(|i| shape(i).iter().product())),
            Op::HeadLogp {} | Op::HeadLogpGrad { .. } => head::workspace(shape(2).iter().product(), &shape(1)),
            _ => 0,
        }
    }

    fn memory(&self) -> Option<usize> {
        None
    }
}
