//! The order of the passes, and what each one promises.

use dsgc_ir::diag::Diag;
use dsgc_ir::verify::verify;
use dsgc_ir::{Planned, Program, Target};

use crate::{autodiff, canonicalize, infer, plan_memory};

/// What a program satisfies at a point of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fact {
    /// As the frontend made it.
    Logical,
    /// All types are inferred; dims with one value are numbers.
    Typed,
    /// Gradient and optimizer graphs exist; every update and evaluation of the plan names them.
    Differentiated,
    /// Every value has a buffer.
    Planned,
}

/// Whether a pass changes numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Bitwise equal results.
    Exact,
    /// Equal in exact arithmetic; sums may be taken in another order.
    Reassociating,
}

/// What passes need besides the program.
pub struct PassContext<'a> {
    /// The device to plan for.
    pub target: &'a dyn Target,
}

/// A pass.
pub struct Pass {
    /// Name, as in `dsgc opt --passes`.
    pub name: &'static str,
    /// What must hold before.
    pub requires: &'static [Fact],
    /// What holds afterwards.
    pub provides: &'static [Fact],
    /// Whether it changes numbers.
    pub numerics: Numerics,
    /// The rewrite. Errors are limits (does not fit, no kernel) or the user's; anything else is a bug and panics.
    pub run: fn(Program, &PassContext) -> Result<Program, Vec<Diag>>,
}

/// Every pass in the order it runs. Read this first.
pub const PIPELINE: &[Pass] = &[infer::PASS, canonicalize::PASS, autodiff::PASS, canonicalize::PASS, plan_memory::PASS];

/// What is told of a pass that has run: the pass, and the program before and after it.
pub type Observer<'a> = &'a mut dyn FnMut(&Pass, &Program, &Program);

/// Runs the pipeline. In debug builds the verifier runs after every pass.
pub fn compile(program: Program, context: &PassContext, observe: Observer) -> Result<Planned, Vec<Diag>> {
    let mut program = program;
    for pass in PIPELINE {
        let next = (pass.run)(program.clone(), context)?;
        if cfg!(debug_assertions)
            && let Err(fault) = verify(&next)
        {
            panic!("bug: after the pass `{}`: {fault}", pass.name);
        }
        observe(pass, &program, &next);
        program = next;
    }
    match Planned::new(program) {
        Ok(planned) => Ok(planned),
        Err(fault) => panic!("bug: the planned program is not valid: {fault}"),
    }
}
