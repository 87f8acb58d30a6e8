//! `dsgc doctor`: what this machine has to run on.

use super::Done;
use crate::console::say;
use crate::device::{gpu, threads};

/// Arguments of `dsgc doctor`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_: &Args) -> Done {
    say(format_args!("cpu: {} threads", threads()));
    gpu::lines().into_iter().for_each(say);
    Ok(())
}
