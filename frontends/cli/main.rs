//! `dsgc`: compiles and runs training pipelines.
//!
//! One file per command in `commands/`. Exit codes: 0 done, 1 the user's input (usage errors too), 2 ours, 3 nothing is left
//! to resume, 4 another rank's failure has ended the run, 128 and a signal's number where that stopped a run after a
//! checkpoint.

mod answers;
mod commands;
mod console;
mod device;
mod host;
mod measure;
mod places;
mod plan_text;
mod profile;
mod progress;
mod report;
mod weights;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{bench, chat, check, compile, doctor, generate, launch, library, merge, opt, run, score};
use dsgc_runtime::mpi;

/// A compiler for training pipelines: YAML graphs to planned programs.
#[derive(Parser)]
#[command(name = "dsgc", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a document and run its tests.
    Check(check::Args),
    /// Compile a pipeline and report what every pass did.
    Compile(compile::Args),
    /// Run a pipeline.
    Run(run::Args),
    /// Score texts with a model.
    Score(score::Args),
    /// Continue a text with a model.
    Generate(generate::Args),
    /// Talk with a model.
    Chat(chat::Args),
    /// Make one model of an adapter and its base.
    Merge(merge::Args),
    /// Run passes on a program in text form.
    Opt(opt::Args),
    /// Look into the standard library.
    Std(library::Args),
    /// List the devices of this machine.
    Doctor(doctor::Args),
    /// Measure kernels against the limits of this machine, or collectives between ranks.
    Bench(bench::Args),
    /// Run a command on several ranks with the MPI of this machine.
    Launch(launch::Args),
}

/// Mesa's Vulkan looks for a display in the folder that `XDG_RUNTIME_DIR` names, and complains where it names none, as in
/// containers. No display is needed, so it looks where none is.
#[cfg(feature = "wgpu")]
fn quiet_mesa() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: the program has one thread yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
}

fn main() -> ExitCode {
    #[cfg(feature = "wgpu")]
    quiet_mesa();
    console::report_panics();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; clap's own code for usage errors is 2, which is ours for bugs.
            let code = if error.use_stderr() { ExitCode::from(1) } else { ExitCode::SUCCESS };
            return error.print().map_or(ExitCode::from(1), |()| code);
        }
    };
    let done = match cli.command {
        Command::Check(args) => check::run(&args),
        Command::Compile(args) => compile::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Opt(args) => opt::run(&args),
        Command::Std(args) => library::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Launch(args) => launch::run(&args),
    };
    match done {
        Ok(()) => {
            mpi::finalize();
            ExitCode::SUCCESS
        }
        Err(failure) => {
            failure.show();
            if failure.is_agreed() {
                mpi::finalize();
            } else {
                mpi::end_job(failure.code());
            }
            ExitCode::from(failure.code())
        }
    }
}
