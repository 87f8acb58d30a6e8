//! `dsgc doctor`: what this machine has to run on.

use dsgc_runtime::mpi;

use super::Done;
use super::launch::Launcher;
use crate::console::say;
use crate::device::{gpu, threads};

/// Arguments of `dsgc doctor`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_: &Args) -> Done {
    say(format_args!("cpu: {} threads", threads()));
    gpu::lines().into_iter().for_each(say);
    mpi_lines().into_iter().for_each(say);
    Ok(())
}

/// Lines about launchers of MPI and the libraries that their ranks would open.
fn mpi_lines() -> Vec<String> {
    let launchers: Vec<String> = Launcher::all().iter().map(Launcher::line).collect();
    let libraries: Vec<String> =
        mpi::found().into_iter().map(|(name, version)| format!("{name} ({version})")).collect();
    let line = |what: &str, found: Vec<String>| {
        let found = if found.is_empty() { "none".into() } else { found.join(", ") };
        format!("mpi: {what}: {found}")
    };
    vec![line("launchers", launchers), line("libraries", libraries)]
}
