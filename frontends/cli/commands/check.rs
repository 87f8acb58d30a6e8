//! `dsgc check`: whether a document is right, and what it means.

use std::path::PathBuf;

use super::{Done, open, plan};
use crate::console::say;

/// Arguments of `dsgc check`.
#[derive(clap::Args)]
pub struct Args {
    /// A pipeline.
    file: PathBuf,
    /// Print the pipeline with every default filled in, and where each value comes from.
    #[arg(long)]
    resolved: bool,
    /// Another value for a setting: `stages.sft.learning_rate=1e-4`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let loaded = open(&args.file, &args.sets, None)?;
    for program in &loaded.stages {
        plan(program, &loaded, loaded.device.into(), &mut |_, _, _| {})?;
    }
    if args.resolved {
        say(loaded.resolved.trim_end());
    } else {
        let names: Vec<&str> = loaded.stages.iter().map(|p| p.stage.name.as_str()).collect();
        say(format!("{}: no errors, stages: {}", args.file.display(), names.join(", ")));
    }
    Ok(())
}
