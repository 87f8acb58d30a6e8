//! Which launcher has started this process, by the variables that it sets.

use dsgc_ir::diag::Diag;

/// Names of MPICH's library and of its relatives, with the standard ABI first.
const MPICH: &[&str] = &["libmpi_abi.so.1", "libmpi.so.12", "libmpich.so.12"];
const OPEN_MPI: &[&str] = &["libmpi.so.40"];
/// Where a launcher serves every MPI.
const ANY: &[&str] = &["libmpi.so.40", "libmpi_abi.so.1", "libmpi.so.12", "libmpich.so.12"];

/// The launcher of this process.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Launcher {
    /// The variable by which it was known.
    pub sign: &'static str,
    /// How many ranks it has started, where it says so.
    pub size: Option<usize>,
    library: Option<String>,
    names: &'static [&'static str],
}

impl Launcher {
    /// The launcher that has set these variables, if one has.
    pub fn find(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Launcher>, Diag> {
        let number = |name: &str| variable(name).and_then(|text| text.parse::<usize>().ok());
        // Slurm's steps are no launcher of MPI unless they offer one of its interfaces.
        let tasks = number("SLURM_STEP_NUM_TASKS");
        let (sign, size, names) = if variable("OMPI_COMM_WORLD_SIZE").is_some() {
            ("OMPI_COMM_WORLD_SIZE", number("OMPI_COMM_WORLD_SIZE"), OPEN_MPI)
        } else if variable("PMI_RANK").is_some() || variable("PMI_SIZE").is_some() {
            (if variable("PMI_RANK").is_some() { "PMI_RANK" } else { "PMI_SIZE" }, number("PMI_SIZE"), MPICH)
        } else if variable("PMIX_RANK").is_some() {
            // Another launcher within a step of Slurm starts ranks of its own.
            let by_slurm = variable("PMIX_NAMESPACE").is_some_and(|name| name.starts_with("slurm."));
            ("PMIX_RANK", tasks.filter(|_| by_slurm), ANY)
        } else if let Some(tasks) = tasks.filter(|&tasks| tasks > 1) {
            let message = format!("Slurm started {tasks} tasks without MPI, each of which would be a run of its own");
            return Err(Diag::error(message).help("write `srun --mpi=pmix` (`srun --mpi=list` says what there is)"));
        } else {
            return Ok(None);
        };
        // A shell may be such a task, in which MPI begins once and dsgc as often as the user likes.
        if tasks == Some(1) && size == Some(1) {
            return Ok(None);
        }
        Ok(Some(Launcher { sign, size, library: variable("DSGC_MPI"), names }))
    }

    /// Libraries that may be its MPI, the likeliest first. One that the user names is the only one.
    pub fn candidates(&self) -> Vec<&str> {
        self.library.as_deref().map_or_else(|| self.names.to_vec(), |library| vec![library])
    }
}

/// How many of the job's ranks share this machine, where the launcher says so; of Slurm's, how many share the fullest one.
pub fn ranks_here() -> Option<usize> {
    let slurm = || number("SLURM_STEP_NUM_TASKS").filter(|&n| n > 1).and(variable("SLURM_STEP_TASKS_PER_NODE"));
    let said = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"].into_iter().find_map(number);
    said.or_else(|| fullest(&slurm()?)).filter(|&n| n > 0)
}

/// The largest number of Slurm's list `4(x2),3`. Ranks must plan alike, so all of them go by one number.
fn fullest(list: &str) -> Option<usize> {
    list.split(',').filter_map(|entry| entry.split('(').next()?.parse().ok()).max()
}

/// Which of those this one is, from 0.
pub fn rank_here() -> Option<usize> {
    ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"].into_iter().find_map(number)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn number(name: &str) -> Option<usize> {
    variable(name)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(variables: &[(&str, &str)]) -> Result<Option<Launcher>, Diag> {
        Launcher::find(&|name| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| value.to_string()))
    }

    fn known(variables: &[(&str, &str)]) -> (&'static str, Option<usize>, &'static [&'static str]) {
        let launcher = find(variables).expect("no error").expect("a launcher");
        (launcher.sign, launcher.size, launcher.names)
    }

    #[test]
    fn a_launcher_is_known_by_its_variables() {
        assert_eq!(find(&[("PATH", "/bin"), ("SLURM_STEP_NUM_TASKS", "1")]), Ok(None));
        let open_mpi = [("OMPI_COMM_WORLD_SIZE", "4"), ("PMIX_RANK", "0")];
        assert_eq!(known(&open_mpi), ("OMPI_COMM_WORLD_SIZE", Some(4), OPEN_MPI));
        assert_eq!(known(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]), ("PMI_RANK", Some(2), MPICH));
        let slurm = [("PMIX_RANK", "1"), ("PMIX_NAMESPACE", "slurm.pmix.7.0"), ("SLURM_STEP_NUM_TASKS", "8")];
        assert_eq!(known(&slurm), ("PMIX_RANK", Some(8), ANY));
        let within = [("PMIX_RANK", "1"), ("PMIX_NAMESPACE", "prterun-host-9@1"), ("SLURM_STEP_NUM_TASKS", "1")];
        assert_eq!(known(&within), ("PMIX_RANK", None, ANY));
    }

    #[test]
    fn a_step_of_one_task_needs_no_mpi() {
        let one = ("SLURM_STEP_NUM_TASKS", "1");
        assert_eq!(find(&[one, ("PMIX_RANK", "0"), ("PMIX_NAMESPACE", "slurm.pmix.7.0")]), Ok(None));
        assert_eq!(find(&[one, ("PMI_RANK", "0"), ("PMI_SIZE", "1")]), Ok(None));
        assert_eq!(known(&[one, ("PMI_RANK", "0"), ("PMI_SIZE", "2")]), ("PMI_RANK", Some(2), MPICH));
    }

    #[test]
    fn ranks_go_by_the_fullest_machine() {
        assert_eq!(fullest("3"), Some(3));
        assert_eq!(fullest("2(x10),4,1(x2)"), Some(4));
        assert_eq!(fullest(""), None);
    }

    #[test]
    fn the_users_library_is_the_only_candidate() {
        let named = find(&[("PMI_RANK", "0"), ("DSGC_MPI", "/opt/mpi/libmpi.so")]).expect("no error");
        assert_eq!(named.expect("a launcher").candidates(), ["/opt/mpi/libmpi.so"]);
    }

    #[test]
    fn tasks_without_mpi_are_no_ranks() {
        let error = find(&[("SLURM_STEP_NUM_TASKS", "4")]).expect_err("nobody connects them");
        assert!(error.message.starts_with("Slurm started 4 tasks without MPI"), "{}", error.message);
    }
}
