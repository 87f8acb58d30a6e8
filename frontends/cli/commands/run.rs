//! `dsgc run`: trains.

use std::path::Path;

use dsgc_kernels::cpu::compile_time;
use dsgc_runtime::{MetricsFile, Session};

use super::{Done, PipelineArgs, plan};
use crate::console::Failure;
use crate::progress::Progress;

/// Arguments of `dsgc run`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let (loaded, device) = args.pipeline.open()?;
    // All stages are compiled before the first one runs: an error of the last must not cost the time of the others.
    let mut stages = Vec::new();
    for program in &loaded.stages {
        stages.push(plan(program, &loaded, device, &mut |_, _, _| {})?);
    }
    for planned in stages {
        let stage = planned.stage.clone();
        let fail = |diags| Failure::new(diags, &loaded.sources);
        let mut progress = Progress::new(&stage);
        let before = compile_time();
        let opened = device.open(planned.clone())?;
        progress.compiled(compile_time() - before);
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
