//! `dsgc opt`: passes on a program in text form.

use std::fs;
use std::path::PathBuf;

use dsgc_ir::diag::{Diag, Sources};
use dsgc_ir::parse;
use dsgc_ir::verify::verify;
use dsgc_passes::{PassContext, run_passes};

use super::Done;
use crate::console::{Failure, say};
use crate::device::DeviceName;

/// Arguments of `dsgc opt`.
#[derive(clap::Args)]
pub struct Args {
    /// A program in text form.
    file: PathBuf,
    /// Passes in the order in which they run, e.g. `infer,canonicalize`.
    #[arg(long, value_delimiter = ',', required = true)]
    passes: Vec<String>,
    /// The device to plan for.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let name = args.file.display().to_string();
    let text = fs::read_to_string(&args.file).map_err(|e| Diag::error(format!("cannot read `{name}`: {e}")))?;
    let mut sources = Sources::default();
    sources.add(&name, &text);
    let fail = |diags: Vec<Diag>| Failure::new(diags, &sources);
    let program = parse(&text).map_err(|e| fail(vec![e]))?;
    verify(&program).map_err(|fault| fail(vec![Diag::error(format!("`{name}` is not valid: {fault}"))]))?;
    let target = args.device.target();
    let names: Vec<&str> = args.passes.iter().map(String::as_str).collect();
    // Places in the program mean the files that it names, which are not here.
    let program = run_passes(program, &names, &PassContext { target: target.as_ref() })
        .map_err(|diags| Failure::from(diags.into_iter().map(without_places).collect::<Vec<_>>()))?;
    say(program.to_string().trim_end());
    Ok(())
}

fn without_places(mut diag: Diag) -> Diag {
    diag.labels.clear();
    diag
}
