//! `dsgc compile`: what the passes make of a pipeline.

use clap::ValueEnum;
use dsgc_ir::diag::Diag;

use super::{Done, PipelineArgs, plan};
use crate::console::say;
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
        let planned = plan(program, &loaded, device, explain, &mut |step| {
            passes.push(PassReport::new(step, passes.last(), target.as_ref()));
            changes.extend(step.notes.changes.iter().map(|text| format!("{}: {text}", step.pass.name)));
        })?;
        match (args.emit, args.json) {
            (None, false) => say(StageReport::new(&planned, passes, target.as_ref())),
            (None, true) => all.push(StageReport::new(&planned, passes, target.as_ref()).json()),
            (Some(Emit::Ir), _) => say(planned.to_string().trim_end()),
            (Some(Emit::Plan), false) => say(crate::plan_text::plan_text(&planned.stage)),
            (Some(Emit::Plan), true) => {
                all.push(serde_json::to_value(&planned.stage).expect("a stage is plain data"));
            }
            (Some(Emit::Changes), false) => changes.iter().for_each(say),
            (Some(Emit::Changes), true) => all.push(changes.into()),
            (Some(Emit::Memory), json) => {
                let table = memory_table(&planned);
                if json {
                    all.push(table.json());
                } else {
                    say(table);
                }
            }
        }
    }
    if args.json {
        say(serde_json::to_string_pretty(&all).expect("values have string keys"));
    }
    Ok(())
}
