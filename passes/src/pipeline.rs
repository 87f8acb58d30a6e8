//! The order of the passes, and what each one promises.

use std::cell::RefCell;
use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, nearest};
use dsgc_ir::verify::verify;
use dsgc_ir::{Level, Planned, Program, Target};

use crate::split_stages::Split;
use crate::{
    adapt, autodiff, canonicalize, copies, decode, fit, fuse, infer, join_updates, merge, offload, offload_activations,
    order, partition, plan_memory, precision, prefetch, quantize, rematerialize, reshard, share_prefix, share_rows,
    simplify, split_stages,
};

/// What a program satisfies at a point of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fact {
    /// As the frontend made it.
    Logical,
    /// All types are inferred; dims with one value are numbers.
    Typed,
    /// Freezing and sharing stand in the parameters and reads of the program.
    Adapted,
    /// Gradient and optimizer graphs exist; every update and evaluation of the plan names them.
    Differentiated,
    /// Every rank has its parts of rows and layers.
    Partitioned,
    /// Every value has a buffer.
    Planned,
}

/// Whether a pass changes numbers; later ones allow more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Numerics {
    /// Bitwise equal results.
    Exact,
    /// Equal in exact arithmetic; sums may be taken in another order, and a zero may have the other sign.
    Reassociating,
    /// The same where every number is finite, also in between.
    Finite,
    /// It computes what the user wants changed in the models; without such wishes, bitwise equal results.
    AsAsked,
}

/// What passes need besides the program, and where they say what they did.
pub struct PassContext<'a> {
    /// The device to plan for.
    pub target: &'a dyn Target,
    /// The most that a pass with a choice may do to numbers.
    pub numerics: Numerics,
    /// Whether passes say of each change what it was and why.
    pub explain: bool,
    notes: RefCell<Notes>,
}

/// What a pass says of its work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// What it matched, and how often.
    pub matched: BTreeMap<String, usize>,
    /// What it changed and why, in words, if [`PassContext::explain`] asks for it.
    pub changes: Vec<String>,
}

impl<'a> PassContext<'a> {
    /// For a device; exact, without explanations.
    pub fn new(target: &'a dyn Target) -> PassContext<'a> {
        PassContext { target, numerics: Numerics::Exact, explain: false, notes: RefCell::default() }
    }

    /// Says that something matched so many times; nothing where it did not.
    pub fn matched(&self, what: &str, times: usize) {
        if times == 0 {
            return;
        }
        *self.notes.borrow_mut().matched.entry(what.to_string()).or_default() += times;
    }

    /// Says what was changed and why.
    pub fn changed(&self, text: String) {
        self.notes.borrow_mut().changes.push(text);
    }

    /// What was said since this was asked last.
    pub fn take_notes(&self) -> Notes {
        self.notes.take()
    }
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
pub const PIPELINE: &[Pass] = &[
    infer::PASS,
    adapt::PASS,
    canonicalize::PASS,
    share_prefix::PASS,
    share_rows::PASS,
    decode::PASS,
    // Before gradients: what is cut away here has none.
    simplify::PASS,
    precision::PASS,
    quantize::PASS,
    autodiff::PASS,
    join_updates::PASS,
    canonicalize::PASS,
    simplify::PASS,
    copies::PASS,
    partition::PASS,
    offload::PASS,
    reshard::PASS,
    // Before regions are made, so that what is recomputed becomes part of what uses it.
    rematerialize::PASS,
    // After it, so that what is recomputed becomes part of the piece that uses it.
    split_stages::PASS,
    merge::PASS,
    fuse::PASS,
    // When all that is kept is known.
    offload_activations::PASS,
    order::PASS,
    prefetch::PASS,
    plan_memory::PASS,
];

/// A pass that has run.
pub struct Step<'a> {
    /// The pass.
    pub pass: &'a Pass,
    /// The program before it.
    pub before: &'a Program,
    /// The program after it.
    pub after: &'a Program,
    /// What it said.
    pub notes: Notes,
}

/// Is told of every pass that has run.
pub type Observer<'a> = &'a mut dyn FnMut(&Step);

/// A program on its way: what all places along `pipeline` have of it in common, up to the pass that cuts it into their pieces.
pub struct Common {
    /// Before it is cut, and after.
    program: Program,
    split: Split,
    /// What the pass said.
    notes: Notes,
    /// The program as it came, where memory has a limit.
    asked: Option<Program>,
}

/// Runs the pipeline as far as it is the same for all places.
pub fn common(program: Program, context: &PassContext, observe: Observer) -> Result<Common, Vec<Diag>> {
    let asked = plan_memory::limit(&program, context.target).map(|_| program.clone());
    let program = run_each(&PIPELINE[..cuts()], program, asked.as_ref(), context, observe)?;
    let split = Split::of(program.clone(), context)?;
    Ok(Common { program, split, notes: context.take_notes(), asked })
}

impl Common {
    /// Runs what is left of the pipeline, for one place. In debug builds the verifier runs after every pass.
    pub fn at(&self, place: usize, context: &PassContext, observe: Observer) -> Result<Planned, Vec<Diag>> {
        let (pass, rest) = PIPELINE[cuts()..].split_first().expect("it is a pass");
        let program = verified(pass, self.split.at(place));
        observe(&Step { pass, before: &self.program, after: &program, notes: self.notes.clone() });
        let asked = self.asked.as_ref().map(|asked| Program { place, ..asked.clone() });
        let program = run_each(rest, program, asked.as_ref(), context, observe)?;
        match Planned::new(program) {
            Ok(planned) => Ok(planned),
            Err(fault) => panic!("bug: the planned program is not valid: {fault}"),
        }
    }
}

/// Runs the pipeline for a program's place along `pipeline`.
pub fn compile(program: Program, context: &PassContext, observe: Observer) -> Result<Planned, Vec<Diag>> {
    let place = program.place;
    common(program, context, observe)?.at(place, context, observe)
}

/// Which pass cuts a program into pieces.
fn cuts() -> usize {
    PIPELINE.iter().position(|pass| pass.name == split_stages::PASS.name).expect("it is a pass")
}

fn run_each(
    passes: &[Pass],
    mut program: Program,
    asked: Option<&Program>,
    context: &PassContext,
    observe: Observer,
) -> Result<Program, Vec<Diag>> {
    for pass in passes {
        let next = run_one(pass, program.clone(), context).map_err(|errors| match asked {
            Some(asked) if pass.name == plan_memory::PASS.name => fit::with_help(errors, asked, context),
            _ => errors,
        })?;
        observe(&Step { pass, before: &program, after: &next, notes: context.take_notes() });
        program = next;
    }
    Ok(program)
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

/// Runs a pass. In debug builds the verifier runs after it.
pub(crate) fn run_one(pass: &Pass, program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    (pass.run)(program, context).map(|next| verified(pass, next))
}

/// What a pass has made, which the verifier looks at in debug builds.
fn verified(pass: &Pass, program: Program) -> Program {
    if cfg!(debug_assertions)
        && let Err(fault) = verify(&program)
    {
        panic!("bug: after the pass `{}`: {fault}", pass.name);
    }
    program
}
