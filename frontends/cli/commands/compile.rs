//! `dsgc compile`: what the passes make of a pipeline.

use clap::ValueEnum;
use dsgc_ir::diag::Diag;
use dsgc_ir::{Planned, Program};
use dsgc_passes::{PassContext, Step};
use dsgc_yaml::load::Loaded;
use rayon::prelude::*;

use super::{Done, PipelineArgs};
use crate::console::{Failure, say};
use crate::device::DeviceName;
use crate::report::{PassReport, StageReport, memory_table};

/// Arguments of `dsgc compile`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Print this instead of the report.
    #[arg(long)]
    emit: Option<Emit>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Emit {
    /// The planned program, in text form.
    Ir,
    /// The host side: roles, data, and which graph is called when.
    Plan,
    /// Where every value lies.
    Memory,
    /// What passes have changed, and by which rules.
    Changes,
}

/// What became of a stage.
struct Compiled {
    /// Of each place along `pipeline`.
    places: Vec<Planned>,
    report: StageReport,
    /// What passes have changed, if that is asked for.
    changes: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    if args.json && args.emit == Some(Emit::Ir) {
        return Err(Diag::error("found `--json` with `--emit ir`, which has a text form only").into());
    }
    let (loaded, device) = args.pipeline.open()?;
    let one = |program| compile(program, &loaded, device, args.emit == Some(Emit::Changes));
    let stages: Vec<Result<Compiled, Failure>> = on_all_cores(|| loaded.stages.par_iter().map(one).collect())?;
    let mut all = Vec::new();
    for stage in stages {
        let Compiled { places, report, changes } = stage?;
        match (args.emit, args.json) {
            (None, false) => say(report),
            (None, true) => all.push(report.json()),
            (Some(Emit::Ir), _) => places.iter().for_each(|planned| say(planned.to_string().trim_end())),
            (Some(Emit::Plan), false) => say(crate::plan_text::plan_text(&places[0].stage)),
            (Some(Emit::Plan), true) => {
                all.push(serde_json::to_value(&places[0].stage).expect("a stage is plain data"));
            }
            (Some(Emit::Changes), false) => changes.iter().for_each(say),
            (Some(Emit::Changes), true) => all.push(changes.into()),
            (Some(Emit::Memory), true) => all.extend(places.iter().map(|planned| memory_table(planned).json())),
            (Some(Emit::Memory), false) => places.iter().for_each(|planned| say(memory_table(planned))),
        }
    }
    if args.json {
        say(serde_json::to_string_pretty(&all).expect("values have string keys"));
    }
    Ok(())
}

/// Compiles a stage for every place along `pipeline`; `explain` asks for changes.
fn compile(program: &Program, loaded: &Loaded, device: DeviceName, explain: bool) -> Result<Compiled, Failure> {
    let target = device.target(&program.mesh)?;
    let fail = |errors| Failure::new(errors, &loaded.sources);
    let (mut passes, mut changes) = (Vec::<PassReport>::new(), Vec::new());
    let mut observe = |step: &Step| {
        passes.push(PassReport::new(step, passes.last(), target.as_ref()));
        changes.extend(step.notes.changes.iter().map(|text| format!("{}: {text}", step.pass.name)));
    };
    let mut context = PassContext::new(target.as_ref());
    context.explain = explain;
    let common = dsgc_passes::common(program.clone(), &context, &mut observe).map_err(fail)?;
    let mut others = Ok(Vec::new());
    let other = |place| common.at(place, &PassContext::new(target.as_ref()), &mut |_| {}).map_err(fail);
    let first = rayon::in_place_scope(|scope| {
        scope.spawn(|_| others = (1..program.mesh.pipeline).into_par_iter().map(other).collect());
        common.at(0, &context, &mut observe).map_err(fail)
    });
    let places = [vec![first?], others?].concat();
    let report = StageReport::new(&places, passes, target.as_ref());
    Ok(Compiled { places, report, changes })
}

/// Runs something that divides its work among threads. They have the stack of a process's first thread, for models as deep.
fn on_all_cores<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R, Failure> {
    let pool = rayon::ThreadPoolBuilder::new().stack_size(8 << 20).build();
    let pool = pool.map_err(|e| Diag::error(format!("threads cannot start: {e}")))?;
    Ok(pool.install(work))
}
