//! What passes must know of a device: the meeting place of passes and kernels.

use crate::dim::Bindings;
use crate::op::Op;
use crate::types::Type;

/// A description of a device, implemented by `kernels` and handed to the passes by the program, so that memory is
/// exact and a missing kernel is an error at compile time. Answers are pure functions of their arguments.
pub trait Target: Sync {
    /// Name for messages and reports.
    fn name(&self) -> &str;

    /// Bytes to which every buffer's offset is aligned.
    fn alignment(&self) -> usize;

    /// Why there is no kernel for an op on operands of these types, or nothing if there is one.
    fn missing_kernel(&self, op: &Op, args: &[Type]) -> Option<String>;

    /// Bytes of workspace that the op's kernel needs at these bounds of the dims.
    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize;

    /// Which kernels the op becomes, in words, where the device says so and the op runs any.
    fn lowering(&self, _op: &Op, _args: &[Type], _bounds: &Bindings) -> Option<String> {
        None
    }

    /// Whether parameters and states may be at home in the host's memory: reads and writes of them are copies then.
    fn offloads(&self) -> bool {
        false
    }

    /// Whether a collective can run beside other ops, until somebody waits for it.
    fn sends_beside(&self, _op: &Op, _args: &[Type]) -> bool {
        false
    }

    /// Bytes of memory, where the device has a limit.
    fn memory(&self) -> Option<usize>;

    /// Bytes of the largest allocation, a multiple of the alignment, where the device has several for that reason. No value
    /// lies in two of them.
    fn allocation(&self) -> Option<usize> {
        None
    }

    /// Elements of the largest value that kernels can count, if fewer than memory holds.
    fn most_elements(&self) -> Option<usize> {
        None
    }
}
