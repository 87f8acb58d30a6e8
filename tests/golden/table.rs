//! Compares the devices with a folder of reference numbers, and prints a table: `scripts/golden --help`.

mod compare;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use compare::{Compared, Golden, On, Rank};
use dsgc_ir::Mesh;
use dsgc_ir::schedule::PipelineOrder;
use dsgc_runtime::on_threads;

/// Compares the interpreter in doubles and the CPU with a folder of reference numbers.
#[derive(Parser)]
struct Args {
    /// A GPU instead: `wgpu` or `cuda`, in a build with that feature.
    #[arg(long)]
    gpu: Option<String>,
    /// So many ranks with different rows.
    #[arg(long, default_value_t = 1)]
    data: usize,
    /// So many ranks that share layers.
    #[arg(long, default_value_t = 1)]
    tensor: usize,
    /// So many ranks that share the layers out.
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
    /// The order in which these work: `gpipe`, `1f1b`, `interleaved_1f1b` or `zero_bubble`.
    #[arg(long, default_value = "1f1b", value_parser = schedule)]
    schedule: PipelineOrder,
    /// What ranks with different rows share out.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    zero_stage: u8,
    /// The folder of the references, or that of one family in it.
    folder: PathBuf,
    /// Only these families.
    families: Vec<String>,
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut devices = vec![On::Doubles, On::Cpu(threads)];
    if let Some(name) = &args.gpu {
        let Some(gpu) = gpu(name) else {
            eprintln!("error: `--gpu` takes `wgpu` or `cuda`, in a build with that feature");
            return ExitCode::from(1);
        };
        devices = vec![gpu];
    }
    // The pipelines name their models by whole paths.
    args.folder = match std::fs::canonicalize(&args.folder) {
        Ok(folder) => folder,
        Err(e) => {
            eprintln!("error: cannot open {}: {e}", args.folder.display());
            return ExitCode::from(1);
        }
    };
    // The folder of one family is as good a name for it.
    if let (true, Some(parent), Some(family)) =
        (args.folder.join("config.json").is_file(), args.folder.parent(), args.folder.file_name())
    {
        args.families.push(family.to_string_lossy().into_owned());
        args.folder = parent.to_path_buf();
    }
    if args.families.is_empty() {
        args.families = families(&args.folder);
    }
    if args.families.is_empty() {
        eprintln!(
            "error: found no folder FAMILY with FAMILY.json and FAMILY.safetensors beside it in {:?}",
            args.folder
        );
        return ExitCode::from(1);
    }
    let mesh = Mesh { data: args.data, tensor: args.tensor, pipeline: args.pipeline };
    if !mesh.is_single() && args.gpu.is_some() {
        eprintln!("error: ranks run on the interpreter and the CPU only");
        return ExitCode::from(1);
    }
    let mut good = true;
    for family in &args.families {
        for &on in &devices {
            good &= show(&args.folder, family, on, mesh, args.zero_stage, args.schedule);
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

/// A GPU by the name of its device, if this build has it.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn gpu(name: &str) -> Option<On<'static>> {
    use dsgc_kernels::cube::{Platform, built};
    let platform = [Platform::Wgpu, Platform::Cuda].into_iter().find(|platform| platform.name() == name)?;
    built(platform).is_ok().then_some(On::Gpu(platform))
}

/// A GPU by the name of its device, if this build has it.
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
fn gpu(_: &str) -> Option<On<'static>> {
    None
}

/// A schedule by its name.
fn schedule(name: &str) -> Result<PipelineOrder, String> {
    let found = PipelineOrder::ALL.into_iter().find(|order| order.name() == name);
    found.ok_or_else(|| format!("there are {}", PipelineOrder::ALL.map(PipelineOrder::name).join(", ")))
}

/// Names of the Hugging Face folders that have references beside them.
fn families(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    let mut all: Vec<String> = names
        .filter(|n| folder.join(n).join("config.json").is_file() && folder.join(format!("{n}.json")).is_file())
        .collect();
    all.sort();
    all
}

/// Prints a family's table; whether everything is within its tolerance.
fn show(folder: &Path, family: &str, on: On, mesh: Mesh, zero_stage: u8, order: PipelineOrder) -> bool {
    let golden = match Golden::open(folder, family) {
        Ok(golden) => golden,
        Err(e) => {
            eprintln!("error: cannot read the references of `{family}`: {e}");
            return false;
        }
    };
    let both = |on: On<'_>| -> Result<Vec<Compared>, String> {
        let mut all = golden.compare(on)?;
        all.extend(golden.compare_stages(on)?);
        Ok(all)
    };
    let (what, compared) = if mesh.is_single() {
        (format!("{on:?}"), both(on))
    } else {
        let threads = if let On::Cpu(_) = on { Some(1) } else { None };
        let ranks = on_threads(
            mesh,
            |member| {
                let rank = Rank { member, zero_stage, order, threads };
                Ok((format!("{:?}", On::Rank(&rank)), both(On::Rank(&rank))?))
            },
            String::clone,
        );
        match ranks {
            Ok(mut ranks) => {
                let (what, first) = ranks.swap_remove(0);
                (what, Ok(first))
            }
            Err(message) => (format!("{on:?}"), Err(message)),
        }
    };
    let compared = match compared {
        Ok(compared) => compared,
        Err(message) => {
            eprintln!("{family}: not compared\n{message}");
            return false;
        }
    };
    println!("{family} on {what}: relative errors, {:.0e} allowed", on.tolerance());
    let mut good = true;
    for one in &compared {
        let verdict = if one.error <= on.tolerance() { "" } else { "  too large" };
        println!("  {:8.1e}  {}{verdict}", one.error, one.what);
        good &= verdict.is_empty();
    }
    if golden.has_sft() {
        println!("  {} after steps: not compared, its gradient is zero in exact arithmetic", compare::ZERO_GRADIENT);
    } else {
        println!("  sft: not compared, the references have none");
    }
    good
}
