//! Compares the devices with a folder of reference numbers, and prints a table: `scripts/golden DIR [FAMILY...]`. With
//! `--gpu wgpu` or `--gpu cuda`, a GPU only.

mod compare;

use std::path::Path;
use std::process::ExitCode;

use compare::{Golden, On};

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut devices = vec![On::Doubles, On::Cpu(threads)];
    if args.first().is_some_and(|arg| arg == "--gpu") {
        let Some(gpu) = args.get(1).and_then(|name| gpu(name)) else {
            eprintln!("error: `--gpu` takes `wgpu` or `cuda`, in a build with that feature");
            return ExitCode::from(1);
        };
        devices = vec![gpu];
        args.drain(..2);
    }
    let mut args = args.into_iter();
    let Some(folder) = args.next() else {
        eprintln!("usage: scripts/golden [--gpu wgpu|cuda] DIR [FAMILY...]");
        return ExitCode::from(1);
    };
    // The pipelines name their models by whole paths.
    let folder = match std::fs::canonicalize(&folder) {
        Ok(folder) => folder,
        Err(e) => {
            eprintln!("error: cannot open {folder}: {e}");
            return ExitCode::from(1);
        }
    };
    let mut folder = folder.as_path();
    let mut named: Vec<String> = args.collect();
    // The folder of one family is as good a name for it.
    if let (true, Some(parent), Some(family)) =
        (folder.join("config.json").is_file(), folder.parent(), folder.file_name())
    {
        named.push(family.to_string_lossy().into_owned());
        folder = parent;
    }
    let families = if named.is_empty() { families(folder) } else { named };
    if families.is_empty() {
        eprintln!("error: found no folder FAMILY with FAMILY.json and FAMILY.safetensors beside it in {folder:?}");
        return ExitCode::from(1);
    }
    let mut good = true;
    for family in &families {
        good &= show(folder, family, &devices);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

/// A GPU by the name of its device, if this build has it.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn gpu(name: &str) -> Option<On> {
    use dsgc_kernels::cube::{Platform, built};
    let platform = [Platform::Wgpu, Platform::Cuda].into_iter().find(|platform| platform.name() == name)?;
    built(platform).is_ok().then_some(On::Gpu(platform))
}

/// A GPU by the name of its device, if this build has it.
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
fn gpu(_: &str) -> Option<On> {
    None
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
fn show(folder: &Path, family: &str, devices: &[On]) -> bool {
    let golden = match Golden::open(folder, family) {
        Ok(golden) => golden,
        Err(e) => {
            eprintln!("error: cannot read the references of `{family}`: {e}");
            return false;
        }
    };
    let mut good = true;
    for &on in devices {
        let both = golden.compare(on).and_then(|mut all| {
            all.extend(golden.compare_stages(on)?);
            Ok(all)
        });
        let compared = match both {
            Ok(compared) => compared,
            Err(message) => {
                eprintln!("{family}: not compared\n{message}");
                return false;
            }
        };
        println!("{family} on {on:?}: relative errors, {:.0e} allowed", on.tolerance());
        for one in &compared {
            let verdict = if one.error <= on.tolerance() { "" } else { "  too large" };
            println!("  {:8.1e}  {}{verdict}", one.error, one.what);
            good &= verdict.is_empty();
        }
        println!("  {} after steps: not compared, its gradient is zero in exact arithmetic", compare::ZERO_GRADIENT);
    }
    good
}
