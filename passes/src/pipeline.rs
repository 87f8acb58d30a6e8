//! The order of the passes, and what each one promises.

use dsgc_ir::diag::{Diag, nearest};
use dsgc_ir::verify::verify;
use dsgc_ir::{Level, Planned, Program, Target};

use crate::{autodiff, canonicalize, decode, fuse, infer, plan_memory};

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
pub const PIPELINE: &[Pass] =
    &[infer::PASS, canonicalize::PASS, decode::PASS, autodiff::PASS, canonicalize::PASS, fuse::PASS, plan_memory::PASS];

/// What is told of a pass that has run: the pass, and the program before and after it.
pub type Observer<'a> = &'a mut dyn FnMut(&Pass, &Program, &Program);

/// Runs the pipeline. In debug builds the verifier runs after every pass.
pub fn compile(program: Program, context: &PassContext, observe: Observer) -> Result<Planned, Vec<Diag>> {
    let mut program = program;
    for pass in PIPELINE {
        let next = run_one(pass, program.clone(), context)?;
        observe(pass, &program, &next);
        program = next;
    }
    match Planned::new(program) {
        Ok(planned) => Ok(planned),
        Err(fault) => panic!("bug: the planned program is not valid: {fault}"),
    }
}

/// Runs passes by name, in this order. Their contracts hold as in [`PIPELINE`]: what a pass requires, an earlier one
/// must provide. In debug builds the verifier runs after every pass.
pub fn run_passes(program: Program, names: &[&str], context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut program = program;
    let mut facts = vec![Fact::Logical];
    for name in names {
        let Some(pass) = PIPELINE.iter().find(|p| p.name == *name) else {
            let diag = Diag::error(format!("no pass is called `{name}`"));
            return Err(vec![match nearest(name, PIPELINE.iter().map(|p| p.name)) {
                Some(near) => diag.help(format!("the nearest is `{near}`")),
                None => diag.help(format!("there are {}", all_names())),
            }]);
        };
        if program.level == Level::Planned {
            let diag = Diag::error(format!("`{name}` cannot run here: the memory of the program is planned already"));
            return Err(vec![diag.help("planning is the last step: run every other pass before it")]);
        }
        if let Some(missing) = pass.requires.iter().find(|f| !facts.contains(f)) {
            let provider = PIPELINE.iter().find(|p| p.provides.contains(missing)).map_or("no pass", |p| p.name);
            let diag = Diag::error(format!("`{name}` cannot run here: it needs what `{provider}` provides"));
            return Err(vec![diag.help(format!("run `{provider}` before it"))]);
        }
        program = run_one(pass, program, context)?;
        facts.extend(pass.provides);
    }
    Ok(program)
}

/// The names of all passes, each once, in the order in which they first run.
fn all_names() -> String {
    let mut names: Vec<&str> = Vec::new();
    for pass in PIPELINE {
        if !names.contains(&pass.name) {
            names.push(pass.name);
        }
    }
    names.join(", ")
}

fn run_one(pass: &Pass, program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let next = (pass.run)(program, context)?;
    if cfg!(debug_assertions)
        && let Err(fault) = verify(&next)
    {
        panic!("bug: after the pass `{}`: {fault}", pass.name);
    }
    Ok(next)
}
