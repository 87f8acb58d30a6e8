//! What passes must know of the interpreter.

use dsgc_ir::{Bindings, Class, Op, Target, Type};

/// The interpreter as a device to plan for: it has every kernel, needs no workspace and has no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct InterpTarget;

impl Target for InterpTarget {
    fn name(&self) -> &str {
        "interp"
    }

    /// A cache line, as on the CPU, so that plans look alike.
    fn alignment(&self) -> usize {
        64
    }

    fn missing_kernel(&self, _: &Op, _: &[Type]) -> Option<String> {
        None
    }

    fn workspace(&self, _: &Op, _: &[Type], _: &Bindings) -> usize {
        0
    }

    fn offloads(&self) -> bool {
        true
    }

    /// What is sent is there at once, and lies where nothing else does until it is waited for.
    fn sends_beside(&self, op: &Op, _: &[Type]) -> bool {
        op.class() == Class::Collective
    }

    fn memory(&self) -> Option<usize> {
        None
    }
}
