//! `dsgc run`: trains.

use std::path::Path;
use std::time::Instant;

use dsgc_ir::diag::Diag;
use dsgc_kernels::cpu::compile_time;
use dsgc_runtime::{MetricsFile, Session};
use dsgc_yaml::load::{Loaded, Options};

use super::{Done, PipelineArgs, plan};
use crate::console::{Failure, say};
use crate::device::DeviceName;
use crate::profile;
use crate::progress::Progress;

/// Arguments of `dsgc run`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Only try it: two steps of every stage with small models of random weights on the first rows, in a folder that
    /// goes away.
    #[arg(long, conflicts_with = "stage")]
    smoke: bool,
    /// Print after each stage which ops took how long.
    #[arg(long)]
    profile: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    if args.smoke {
        return smoke(args);
    }
    let (loaded, device) = args.pipeline.open()?;
    train(&loaded, device, args.profile)
}

/// Tries the pipeline.
fn smoke(args: &Args) -> Done {
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("dsgc-smoke-").tempdir();
    let folder = folder.map_err(|e| Diag::error(format!("cannot make a folder for the results: {e}")))?;
    let mut sets = args.pipeline.sets.clone();
    // As a YAML text in single quotes, in which only these are special.
    let quoted = folder.path().display().to_string().replace('\'', "''");
    sets.push(format!("output_dir='{quoted}'"));
    let (mut loaded, device) = args.pipeline.open_as(Options { sets, stage: None, smoke: true })?;
    for stage in &mut loaded.stages {
        // Two steps from random weights reach nothing.
        stage.stage.require.clear();
    }
    train(&loaded, device, args.profile)?;
    let names: Vec<&str> = loaded.stages.iter().map(|p| p.stage.name.as_str()).collect();
    say(format_args!(
        "smoke: {} ran on small models and a few rows ({:.1} s); nothing of it is kept",
        names.join(", "),
        started.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Runs all stages.
fn train(loaded: &Loaded, device: DeviceName, profiled: bool) -> Done {
    // All stages are compiled before the first one runs: an error of the last must not cost the time of the others.
    let mut stages = Vec::new();
    for program in &loaded.stages {
        stages.push(plan(program, loaded, device, false, &mut |_| {})?);
    }
    for planned in stages {
        let stage = planned.stage.clone();
        let fail = |diags| Failure::new(diags, &loaded.sources);
        let mut progress = Progress::new(&stage);
        let before = compile_time();
        let mut opened = device.open(planned.clone())?;
        if profiled {
            profile::begin(opened.as_mut())?;
        }
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
        if profiled {
            say(format_args!("profile of {}", stage.name));
            profile::show(session.device());
        }
    }
    Ok(())
}
