//! `dsgc run`: trains.

use std::path::{Path, PathBuf};

use dsgc_runtime::{MetricsFile, Session};

use super::{Done, open, plan};
use crate::console::Failure;
use crate::device::DeviceName;
use crate::progress::Progress;

/// Arguments of `dsgc run`.
#[derive(clap::Args)]
pub struct Args {
    /// A pipeline.
    file: PathBuf,
    /// Only this stage; what it needs of earlier ones must be there.
    #[arg(long)]
    stage: Option<String>,
    /// The device to run on, instead of the pipeline's.
    #[arg(long)]
    device: Option<DeviceName>,
    /// Another value for a setting: `stages.sft.learning_rate=1e-4`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let loaded = open(&args.file, &args.sets, args.stage.as_deref())?;
    let device = args.device.unwrap_or(loaded.device.into());
    // All stages are compiled before the first one runs: an error of the last must not cost the time of the others.
    let mut stages = Vec::new();
    for program in &loaded.stages {
        stages.push(plan(program, &loaded, device, &mut |_, _, _| {})?);
    }
    for planned in stages {
        let stage = planned.stage.clone();
        let fail = |diags| Failure::new(diags, &loaded.sources);
        let mut progress = Progress::new(&stage);
        let opened = device.open(planned.clone())?;
        let mut session = Session::open(planned, opened, &mut |event| {
            progress.show(event);
            Ok(())
        })
        .map_err(fail)?;
        // Only now: a stage that cannot begin leaves the files of an earlier run as they are.
        let mut metrics = MetricsFile::create(Path::new(&stage.output_dir), &stage.name).map_err(|e| fail(vec![e]))?;
        let mut observer = |event: &_| {
            metrics.write(event)?;
            progress.show(event);
            Ok(())
        };
        session.run(&mut observer).map_err(|e| fail(vec![e]))?;
    }
    Ok(())
}
