//! `dsgc run`: trains, and goes on where an earlier run stopped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Axis, Mesh, Planned, Program};
use dsgc_kernels::cpu::compile_time;
use dsgc_kernels::ranks::{Member, enough_threads};
use dsgc_runtime::{Checkpoint, Ended, Keeper, MetricsFile, Session, mpi, on_threads, stage_of};
use dsgc_yaml::load::{Loaded, Options};
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::flag;

use super::{Done, PipelineArgs, plan};
use crate::console::{Failure, say, speak_as};
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
    /// Go on where an earlier run stopped: `auto` for its newest checkpoints, past stages that are done, or the folder of
    /// a checkpoint.
    #[arg(long, value_name = "auto|FOLDER", conflicts_with = "smoke")]
    resume: Option<PathBuf>,
}

/// The exit code where no stage has anything left to do.
const NOTHING_LEFT: u8 = 3;

/// Runs the command.
pub fn run(args: &Args) -> Done {
    if let Some(transport) = mpi::connect()? {
        speak_as(transport.rank());
    }
    if args.smoke {
        return smoke(args);
    }
    let (loaded, device) = agreed(args.pipeline.open())?;
    train(&loaded, device, args)
}

/// Tries the pipeline.
fn smoke(args: &Args) -> Done {
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("dsgc-smoke-").tempdir();
    let folder = folder.map_err(|e| Diag::error(format!("cannot make a folder for the results: {e}")))?;
    let mut sets = args.pipeline.sets.clone();
    // As a YAML text in single quotes, in which only these are special.
    let quoted = of_first(folder.path().display().to_string())?.replace('\'', "''");
    sets.push(format!("output_dir='{quoted}'"));
    let (mut loaded, device) = agreed(args.pipeline.open_as(Options { sets, stage: None, smoke: true }))?;
    for stage in &mut loaded.stages {
        // Two steps from random weights reach nothing.
        stage.stage.require.clear();
    }
    train(&loaded, device, args)?;
    let names: Vec<&str> = loaded.stages.iter().map(|p| p.stage.name.as_str()).collect();
    say(format_args!(
        "smoke: {} ran on small models and a few rows ({:.1} s); nothing of it is kept",
        names.join(", "),
        started.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// What all processes of a job make before they begin. Where one of them cannot, none begins: the first of those says why, and
/// all come to a good end.
fn agreed<T>(made: Result<T, Failure>) -> Result<T, Failure> {
    let Some(transport) = mpi::connect()? else { return made };
    let rank = transport.rank();
    let member = Member { mesh: Mesh::default(), transport };
    let codes = member.all().messages(&[made.as_ref().err().map_or(0, Failure::code)])?;
    let Some(first) = codes.iter().position(|code| code != &[0]) else { return made };
    if let (Err(failure), true) = (&made, rank == first) {
        speak_as(0);
        failure.show();
    }
    Err(Failure::ended(codes[first][0]))
}

/// What the first process of a job has, on all of them.
fn of_first(text: String) -> Result<String, Diag> {
    let Some(transport) = mpi::connect()? else { return Ok(text) };
    let member = Member { mesh: Mesh::default(), transport };
    let all = member.all().messages(text.as_bytes())?;
    Ok(String::from_utf8_lossy(&all[0]).into_owned())
}

/// Runs all stages.
fn train(loaded: &Loaded, device: DeviceName, args: &Args) -> Done {
    let fail = |diags| Failure::new(diags, &loaded.sources);
    let signals = Signals::listen()?;
    let keepers: Vec<Keeper> = loaded.stages.iter().map(|program| Keeper::new(program, signals.stop())).collect();
    let stages = agreed(stages(loaded, &keepers, device, args))?;
    let last = stages.last().map(|(plans, ..)| plans[0].stage.name.clone());
    for (plans, keeper, begin) in stages {
        let (mesh, stage) = (plans[0].mesh, &plans[0].stage);
        let running = Running { plans: &plans, keeper, begin: &begin, device, profile: args.profile };
        let run = |member: Member| running.run(member).map_err(fail);
        // All ranks end alike.
        let ended = match mpi::connect()? {
            Some(transport) => run(Member { mesh, transport })?,
            None => on_threads(mesh, run, |failure| failure.message().to_string())?[0],
        };
        if let Some(signal) = signals.caught_by_any()? {
            let at = match ended {
                Ended::Stopped(step) => format!("stopped after step {step} of `{}`", stage.name),
                Ended::Finished if Some(&stage.name) == last.as_ref() => break,
                Ended::Finished => format!("stopped after the stage `{}`", stage.name),
            };
            say(format_args!("{at}; `--resume auto` goes on from there"));
            return Err(Failure::ended(128 + signal));
        }
    }
    Ok(())
}

/// The plans of a stage that this process needs: of all places along `pipeline` whose ranks it runs.
fn plans(program: &Program, loaded: &Loaded, device: DeviceName) -> Result<Vec<Planned>, Failure> {
    let places: Vec<usize> = match mpi::connect()? {
        Some(transport) => vec![program.mesh.place(Axis::Pipeline, transport.rank())],
        None => (0..program.mesh.pipeline).collect(),
    };
    plan(program, loaded, device, &places)
}

/// A stage that is to run: its plans, one for each place along `pipeline`, its checkpoints, and where it begins.
type Ready<'a> = (Vec<Planned>, &'a Keeper<'a>, Begin);

/// The stages that are to run, planned: an error of the last must not cost the time of the others.
fn stages<'a>(
    loaded: &Loaded,
    keepers: &'a [Keeper<'a>],
    device: DeviceName,
    args: &Args,
) -> Result<Vec<Ready<'a>>, Failure> {
    let fail = |diag| Failure::new(vec![diag], &loaded.sources);
    let begun = resumed(loaded, keepers, args.resume.as_deref()).map_err(fail)?;
    if args.resume.is_some() && begun.iter().all(|begin| matches!(begin, Begin::Done(_))) {
        say("nothing is left to resume: all stages are done");
        return Err(Failure::ended(NOTHING_LEFT));
    }
    let mut stages = Vec::new();
    for ((program, keeper), begin) in loaded.stages.iter().zip(keepers).zip(begun) {
        if let Begin::Done(why) = begin {
            say(format_args!("{} {why}", program.stage.name));
            continue;
        }
        stages.push((plans(program, loaded, device)?, keeper, begin));
    }
    match (mpi::connect()?, stages.first()) {
        (Some(transport), Some((plans, ..))) => enough(plans[0].mesh, transport.size())?,
        (None, Some((plans, ..))) => enough_threads(plans[0].mesh.ranks())?,
        (_, None) => {}
    }
    Ok(stages)
}

/// A pipeline for as many ranks as a launcher has started processes.
fn enough(mesh: Mesh, processes: usize) -> Done {
    if mesh.ranks() == processes {
        return Ok(());
    }
    let message = format!("found {processes} processes of one job, and the pipeline is for {}", mesh.ranks());
    let help = format!("start as many, or write `compile: {{parallel: {{data: {processes}}}}}`");
    Err(Diag::error(message).help(help).into())
}

/// A stage on its ranks, of which the first one writes and shows what happens.
struct Running<'a> {
    /// Of all places along `pipeline` whose ranks this process runs.
    plans: &'a [Planned],
    keeper: &'a Keeper<'a>,
    begin: &'a Begin,
    device: DeviceName,
    profile: bool,
}

impl Running<'_> {
    /// Runs one rank.
    fn run(&self, member: Member) -> Result<Ended, Vec<Diag>> {
        let place = member.mesh.place(Axis::Pipeline, member.rank());
        let planned = self.plans.iter().find(|planned| planned.place == place).expect("its place is planned");
        let stage = &planned.stage;
        let all = member.clone();
        let first = all.rank() == 0;
        let mut progress = first.then(|| Progress::new(stage));
        let before = compile_time();
        let mut device = self.device.open(planned.clone(), member.clone()).map_err(|e| vec![e])?;
        if self.profile && first {
            profile::begin(device.as_mut()).map_err(|e| vec![e])?;
        }
        if let Some(progress) = &progress {
            progress.compiled(compile_time() - before);
        }
        let mut session = Session::open_as(planned.clone(), device, member, &mut |event| {
            progress.iter_mut().for_each(|progress| progress.show(event));
            Ok(())
        })?;
        self.go_on(&mut session, &all, progress).map_err(|e| vec![e])
    }

    /// From the checkpoint, if there is one, to the end.
    fn go_on(&self, session: &mut Session, all: &Member, mut progress: Option<Progress>) -> Result<Ended, Diag> {
        let stage = &self.plans[0].stage;
        if let Begin::At(checkpoint) = self.begin {
            session.resume(checkpoint)?;
        }
        // Only when all ranks can begin: a stage that cannot leaves the files of an earlier run as they are.
        all.all().barrier()?;
        let mut metrics = None;
        if let Some(progress) = &mut progress {
            let folder = Path::new(&stage.output_dir);
            metrics = Some(match self.begin {
                Begin::At(checkpoint) => {
                    progress.resumed(checkpoint.step(), checkpoint.path());
                    MetricsFile::resume(folder, &stage.name, checkpoint.step())?
                }
                _ => {
                    self.keeper.begin()?;
                    MetricsFile::create(folder, &stage.name)?
                }
            });
        }
        let ended = session.run_kept(self.keeper, &mut |event| {
            metrics.iter_mut().try_for_each(|metrics| metrics.write(event))?;
            progress.iter_mut().for_each(|progress| progress.show(event));
            Ok(())
        })?;
        if self.profile && all.rank() == 0 {
            say(format_args!("profile of {}", stage.name));
            profile::show(session.device());
        }
        Ok(ended)
    }
}

/// Where a stage begins.
enum Begin {
    /// At its first step.
    Anew,
    /// After that of a checkpoint.
    At(Checkpoint),
    /// Nowhere: this is why.
    Done(String),
}

/// Where each stage begins if an earlier run is resumed.
fn resumed(loaded: &Loaded, keepers: &[Keeper], from: Option<&Path>) -> Result<Vec<Begin>, Diag> {
    let Some(from) = from else { return Ok(keepers.iter().map(|_| Begin::Anew).collect()) };
    let names: Vec<&str> = loaded.stages.iter().map(|program| program.stage.name.as_str()).collect();
    if from != Path::new("auto") {
        let stage = stage_of(from)?;
        let at = names.iter().position(|name| *name == stage).ok_or_else(|| {
            let message = format!("`{}` is of the stage `{stage}`, which this pipeline does not run", from.display());
            Diag::error(message).help(format!("it runs {}", names.join(", ")))
        })?;
        let checkpoint = keepers[at].open(from)?;
        let mut begun: Vec<Begin> = (0..at).map(|_| Begin::Done("comes before the checkpoint".into())).collect();
        begun.push(Begin::At(checkpoint));
        begun.extend((at + 1..names.len()).map(|_| Begin::Anew));
        return Ok(begun);
    }
    let mut begun = Vec::new();
    for keeper in keepers {
        // What an earlier stage makes anew, later ones take anew.
        let before_are_done = begun.iter().all(|begin| matches!(begin, Begin::Done(_)));
        begun.push(match keeper.finished()? {
            _ if !before_are_done => Begin::Anew,
            Some(steps) => Begin::Done(format!("is done: all {steps} steps")),
            None => keeper.newest()?.map_or(Begin::Anew, Begin::At),
        });
    }
    Ok(begun)
}

/// Signals that end a run after the step that it is in. The second one ends the program at once.
struct Signals {
    stop: Arc<AtomicBool>,
    caught: Arc<AtomicUsize>,
}

impl Signals {
    fn listen() -> Result<Signals, Diag> {
        let signals = Signals { stop: Arc::default(), caught: Arc::default() };
        for signal in TERM_SIGNALS {
            // In this order: the first one finds nothing to do yet.
            let registered = flag::register_conditional_shutdown(*signal, 128 + *signal, signals.stop.clone())
                .and_then(|_| flag::register_usize(*signal, signals.caught.clone(), *signal as usize))
                .and_then(|_| flag::register(*signal, signals.stop.clone()));
            registered.map_err(|e| Diag::error(format!("cannot listen to signals: {e}")))?;
        }
        Ok(signals)
    }

    fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// The signal that stops the run, the same on all processes of a job, whichever of them has caught one. All ask at once.
    fn caught_by_any(&self) -> Result<Option<u8>, Diag> {
        let own = self.caught.load(Ordering::Relaxed) as u8;
        let all = match mpi::connect()? {
            Some(transport) => Member { mesh: Mesh::default(), transport }.all().messages(&[own])?,
            None => vec![vec![own]],
        };
        Ok(all.into_iter().flatten().find(|&signal| signal != 0))
    }
}
