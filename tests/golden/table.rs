//! Compares the devices with a folder of reference numbers, and prints a table: `scripts/golden DIR [FAMILY...]`.

mod compare;

use std::path::Path;
use std::process::ExitCode;

use compare::{Golden, On};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(folder) = args.next() else {
        eprintln!("usage: scripts/golden DIR [FAMILY...]");
        return ExitCode::from(1);
    };
    let mut folder = Path::new(&folder);
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
        good &= show(folder, family);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::from(1) }
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
fn show(folder: &Path, family: &str) -> bool {
    let golden = match Golden::open(folder, family) {
        Ok(golden) => golden,
        Err(e) => {
            eprintln!("error: cannot read the references of `{family}`: {e}");
            return false;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut good = true;
    for on in [On::Doubles, On::Cpu(threads)] {
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
