//! `dsgc opt`: passes on a program in text form.

use std::fs;
use std::path::PathBuf;

use clap::ValueEnum;
use dsgc_ir::diag::{Diag, Sources};
use dsgc_ir::parse;
use dsgc_ir::verify::verify;
use dsgc_passes::{Numerics, PassContext, run_passes};

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
    /// The most that passes with a choice may do to numbers.
    #[arg(long, default_value = "exact")]
    numerics: NumericsName,
    /// Print instead what the passes have changed, and by which rules.
    #[arg(long)]
    explain: bool,
    /// The device to plan for.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
}

#[derive(Clone, Copy, ValueEnum)]
enum NumericsName {
    /// Nothing: every bit stays.
    Exact,
    /// Other rounding.
    Reassociating,
    /// Other results where a number is infinite or none.
    Finite,
}

impl From<NumericsName> for Numerics {
    fn from(name: NumericsName) -> Numerics {
        match name {
            NumericsName::Exact => Numerics::Exact,
            NumericsName::Reassociating => Numerics::Reassociating,
            NumericsName::Finite => Numerics::Finite,
        }
    }
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
    let target = args.device.chosen().target(&program.mesh)?;
    let names: Vec<&str> = args.passes.iter().map(String::as_str).collect();
    let mut context = PassContext::new(target.as_ref());
    (context.numerics, context.explain) = (args.numerics.into(), args.explain);
    // Places in the program mean the files that it names, which are not here.
    let program = run_passes(program, &names, &context)
        .map_err(|diags| Failure::from(diags.into_iter().map(without_places).collect::<Vec<_>>()))?;
    if args.explain {
        context.take_notes().changes.iter().for_each(say);
    } else {
        say(program.to_string().trim_end());
    }
    Ok(())
}

fn without_places(mut diag: Diag) -> Diag {
    diag.labels.clear();
    diag
}
