//! `dsgc compile`: what the passes make of a pipeline.

use clap::ValueEnum;
use dsgc_ir::diag::Diag;
use dsgc_ir::{Planned, Program};

use super::{Done, PipelineArgs, plan};
use crate::console::{Failure, say};
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

/// Runs the command.
pub fn run(args: &Args) -> Done {
    if args.json && args.emit == Some(Emit::Ir) {
        return Err(Diag::error("found `--json` with `--emit ir`, which has a text form only").into());
    }
    let (loaded, device) = args.pipeline.open()?;
    let mut all = Vec::new();
    for program in &loaded.stages {
        let target = device.target(&program.mesh)?;
        let (mut passes, mut changes) = (Vec::<PassReport>::new(), Vec::new());
        let explain = args.emit == Some(Emit::Changes);
        let first = plan(program, &loaded, device, explain, &mut |step| {
            passes.push(PassReport::new(step, passes.last(), target.as_ref()));
            changes.extend(step.notes.changes.iter().map(|text| format!("{}: {text}", step.pass.name)));
        })?;
        let others = (1..program.mesh.pipeline)
            .map(|place| plan(&Program { place, ..program.clone() }, &loaded, device, false, &mut |_| {}))
            .collect::<Result<Vec<Planned>, Failure>>()?;
        let places = [vec![first], others].concat();
        match (args.emit, args.json) {
            (None, false) => say(StageReport::new(&places, passes, target.as_ref())),
            (None, true) => all.push(StageReport::new(&places, passes, target.as_ref()).json()),
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
