//! `dsgc check`: whether a document is right, and what it means.

use std::path::PathBuf;

use dsgc_ir::Tensor;
use dsgc_ir::diag::Diag;
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_yaml::load::{Options, check};
use dsgc_yaml::lower::DocumentTest;

use super::{Done, plan};
use crate::console::{Failure, say, show};
use crate::host::Disk;

/// Arguments of `dsgc check`.
#[derive(clap::Args)]
pub struct Args {
    /// A pipeline, a model, a recipe or functions.
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
    let options = Options { sets: args.sets.clone(), ..Options::default() };
    let loaded = check(&args.file, &options, &Disk)?;
    show(&loaded.warnings, &loaded.sources);
    for program in &loaded.stages {
        let places: Vec<usize> = (0..program.mesh.pipeline).collect();
        plan(program, &loaded, loaded.device.into(), &places)?;
    }
    let failed: Vec<Diag> = loaded.tests.iter().filter_map(failure).collect();
    if !failed.is_empty() {
        return Err(Failure::new(failed, &loaded.sources));
    }
    if args.resolved && !loaded.resolved.is_empty() {
        say(loaded.resolved.trim_end());
        return Ok(());
    }
    let names: Vec<&str> = loaded.stages.iter().map(|p| p.stage.name.as_str()).collect();
    let stages = if names.is_empty() { String::new() } else { format!(", stages: {}", names.join(", ")) };
    say(format!("{}: no errors, {} tests passed{stages}", args.file.display(), loaded.tests.len()));
    Ok(())
}

/// What is wrong with the first output of a test that is not as expected.
fn failure(test: &DocumentTest) -> Option<Diag> {
    let inputs: Vec<(&str, &Tensor)> = test.inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let outputs = match Interp::new(test.program.clone(), Precision::F64).run(&test.graph, &inputs) {
        Ok(outputs) => outputs,
        Err(diag) => return Some(diag.label(test.span, "in this test")),
    };
    for (name, expected) in &test.expect {
        let fail = |message: String| Some(Diag::error(message).label(test.span, "in this test"));
        let Some((_, found)) = outputs.iter().find(|(output, _)| output == name) else {
            return fail(format!("found no value for `{name}`"));
        };
        if found.shape != expected.shape {
            return fail(format!("found the shape {:?} for `{name}`, expected {:?}", found.shape, expected.shape));
        }
        let pairs = expected.to_f64().into_iter().zip(found.to_f64());
        for (at, (wanted, value)) in pairs.enumerate() {
            // Both not a number is as expected; one of them alone is not.
            if (wanted - value).abs() > test.tolerance || wanted.is_nan() != value.is_nan() {
                let place = if expected.shape.is_empty() { String::new() } else { format!(", element {at}") };
                return fail(format!("found {value} for `{name}`{place}, expected {wanted}"));
            }
        }
    }
    None
}
