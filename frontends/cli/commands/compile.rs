//! `dsgc compile`: what the passes make of a pipeline.

use std::path::PathBuf;

use clap::ValueEnum;
use dsgc_ir::diag::Diag;

use super::{Done, open, plan};
use crate::console::say;
use crate::device::DeviceName;
use crate::report::{StageReport, memory_table};

/// Arguments of `dsgc compile`.
#[derive(clap::Args)]
pub struct Args {
    /// A pipeline.
    file: PathBuf,
    /// Print this instead of the report.
    #[arg(long)]
    emit: Option<Emit>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Only this stage.
    #[arg(long)]
    stage: Option<String>,
    /// The device to compile for, instead of the pipeline's.
    #[arg(long)]
    device: Option<DeviceName>,
    /// Another value for a setting: `stages.sft.learning_rate=1e-4`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Emit {
    /// The planned program, in text form.
    Ir,
    /// The host side: roles, data, and which graph is called when.
    Plan,
    /// Where every value lies.
    Memory,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    if args.json && args.emit == Some(Emit::Ir) {
        return Err(Diag::error("found `--json` with `--emit ir`, which has a text form only").into());
    }
    let loaded = open(&args.file, &args.sets, args.stage.as_deref())?;
    let device = args.device.unwrap_or(loaded.device.into());
    let mut all = Vec::new();
    for program in &loaded.stages {
        let mut passes = Vec::new();
        let planned = plan(program, &loaded, device, &mut |pass, before, after| {
            let ops = |p: &dsgc_ir::Program| p.graphs.iter().map(|g| g.len()).sum::<usize>();
            passes.push((pass.name, ops(before), ops(after)));
        })?;
        match (args.emit, args.json) {
            (None, false) => say(StageReport::new(&planned, passes)),
            (None, true) => all.push(StageReport::new(&planned, passes).json()),
            (Some(Emit::Ir), _) => say(planned.to_string().trim_end()),
            (Some(Emit::Plan), false) => say(crate::report::plan_text(&planned.stage)),
            (Some(Emit::Plan), true) => {
                all.push(serde_json::to_value(&planned.stage).expect("a stage is plain data"));
            }
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
