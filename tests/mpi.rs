//! Ranks that MPI starts and connects, under every launcher that the tests install: Open MPI's and MPICH's, with one
//! program. Each test starts this file's own program, or `dsgc`, on several ranks.

#[path = "../kernels/tests/ranks/suite.rs"]
mod suite;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dsgc_kernels::ranks::{Group, threads};
use dsgc_runtime::mpi;
use serde_json::Value;

const DSGC: &str = env!("CARGO_BIN_EXE_dsgc");

/// Says to the program of a rank what it does.
const SCENE: &str = "DSGC_TEST_SCENE";

/// A launcher: its program, its MPI's name, its library, and the variables that it sets.
struct Mpi {
    mpirun: &'static str,
    name: &'static str,
    library: &'static str,
    sign: &'static str,
}

const OPEN_MPI: Mpi =
    Mpi { mpirun: "mpirun.openmpi", name: "Open MPI", library: "libmpi.so.40", sign: "OMPI_COMM_WORLD_SIZE" };
const MPICH: Mpi = Mpi { mpirun: "mpirun.mpich", name: "MPICH", library: "libmpich.so.12", sign: "PMI_RANK" };
const BOTH: [&Mpi; 2] = [&OPEN_MPI, &MPICH];

/// One job at a time: each has more ranks than a small machine has cores.
fn alone() -> MutexGuard<'static, ()> {
    static JOBS: Mutex<()> = Mutex::new(());
    JOBS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mpi {
    /// Ranks of a program.
    fn ranks(&self, n: usize, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(self.mpirun);
        command.args(["-n", &n.to_string()]).env("OMPI_ALLOW_RUN_AS_ROOT", "1");
        command.env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        if self.name == "Open MPI" {
            command.arg("--oversubscribe");
        }
        command.arg(program.as_ref());
        command
    }

    /// Ranks of this file's program in one of its scenes.
    fn scene(&self, n: usize, scene: &str) -> Command {
        let mut command = self.ranks(n, std::env::current_exe().expect("this program has a path"));
        command.args(["a_rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"]).env(SCENE, scene);
        command
    }
}

/// How a job ended.
struct Ended {
    code: Option<i32>,
    /// What it wrote to either stream.
    text: String,
    took: Duration,
}

fn run(command: &mut Command) -> Ended {
    let started = Instant::now();
    let output = command.output().unwrap_or_else(|e| {
        panic!("{} does not start: {e}; `scripts/test` installs mpich and openmpi-bin", command.get_program().display())
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ended { code: output.status.code(), text, took: started.elapsed() }
}

/// What a rank does that a test has started. `cargo test -- --ignored` finds nothing to do here.
#[test]
#[ignore = "the other tests start it on several ranks"]
fn a_rank() {
    let Ok(scene) = std::env::var(SCENE) else { return };
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        mpi::end_job(2);
    }));
    let transport = mpi::connect().expect("the launcher's MPI is here").expect("a launcher has started this");
    let ranks = transport.size();
    let group = Group::new(transport.as_ref(), (0..ranks).collect());
    match (scene.as_str(), group.at()) {
        ("suite", _) => {
            suite::check(&group);
            let own = suite::bits(&group);
            let all = threads(ranks);
            let as_threads = thread::scope(|scope| {
                let run = |rank: usize| suite::bits(&Group::new(all[rank].as_ref(), (0..ranks).collect()));
                (1..ranks).for_each(|rank| drop(scope.spawn(move || run(rank))));
                run(0)
            });
            assert!(own == as_threads, "sums depend on the transport");
            println!("rank {} of {ranks} agrees, {}", group.at(), mpi::library().unwrap_or_default());
            mpi::finalize();
        }
        ("panic", 1) => panic!("a bug on one rank"),
        ("abort", 1) => transport.abort("rows.jsonl is not there"),
        ("hang", 1) => loop {
            thread::park();
        },
        ("panic" | "abort" | "hang", _) => {
            transport.note("`all_reduce` %g in @sft.grad");
            group.barrier().expect("the job ends");
            panic!("rank 1 came");
        }
        other => panic!("no such scene: {other:?}"),
    }
}

#[test]
fn collectives_are_those_of_threads() {
    let _alone = alone();
    for (mpi, n) in BOTH.into_iter().flat_map(|mpi| [2, 3].map(|n| (mpi, n))) {
        let ended = run(&mut mpi.scene(n, "suite"));
        assert_eq!(ended.code, Some(0), "{}: {}", mpi.name, ended.text);
        for rank in 0..n {
            let line = format!("rank {rank} of {n} agrees, {}", mpi.name);
            assert!(ended.text.contains(&line), "expected `{line}` in {}", ended.text);
        }
    }
}

#[test]
fn a_rank_that_fails_ends_all() {
    let _alone = alone();
    for mpi in BOTH {
        for (scene, code, sentence) in [
            ("panic", 2, "a bug on one rank"),
            ("abort", 4, "error: rank 1 of 3: rows.jsonl is not there"),
            ("hang", 4, " s for 1 of 1 bytes from rank "),
        ] {
            let ended = run(mpi.scene(3, scene).env("DSGC_WAIT_SECONDS", "1"));
            assert_eq!(ended.code, Some(code), "{} {scene}: {}", mpi.name, ended.text);
            assert!(ended.text.contains(sentence), "{} {scene}: {}", mpi.name, ended.text);
            assert!(ended.took < Duration::from_secs(10), "{} {scene} took {:?}", mpi.name, ended.took);
            if scene == "hang" {
                assert!(
                    ended.text.contains(", at `all_reduce` %g in @sft.grad; `DSGC_WAIT_SECONDS`"),
                    "{}",
                    ended.text
                );
            }
        }
    }
}

#[test]
fn another_mpis_library_is_refused() {
    let _alone = alone();
    for (mpi, other) in [(&OPEN_MPI, &MPICH), (&MPICH, &OPEN_MPI)] {
        let ended = run(mpi.ranks(2, DSGC).args(["bench", "comm"]).env("DSGC_MPI", other.library));
        assert_ne!(ended.code, Some(0), "{}", ended.text);
        let sentence =
            format!("the launcher started 2 ranks (`{}`), but the MPI in `{}` sees 1", mpi.sign, other.library);
        assert!(ended.text.contains(&sentence), "{}", ended.text);
    }
    let ended = run(MPICH.ranks(2, DSGC).args(["bench", "comm"]).env("DSGC_MPI", "libmpi-of-nobody.so"));
    assert_ne!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("an MPI launcher started this process (`PMI_RANK` is set)"), "{}", ended.text);
    assert!(ended.text.contains("`DSGC_MPI`"), "{}", ended.text);
}

#[test]
fn bench_comm_measures_what_it_has_checked() {
    let _alone = alone();
    for mpi in BOTH {
        let mut command = Command::new(DSGC);
        command.args(["launch", "-n", "3", "--mpirun", mpi.mpirun, "--", "bench", "comm", "--json"]);
        let ended = run(command.args(["--largest", "4", "--seconds", "0.01"]));
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        let (first, last) = (ended.text.find('{'), ended.text.rfind('}'));
        let text = &ended.text[first.expect("JSON")..=last.expect("JSON")];
        let document: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
        assert_eq!(document["ranks"], 3);
        assert!(document["transport"].as_str().is_some_and(|by| by.contains(mpi.name)), "{document}");
        assert_eq!(document["collectives"].as_array().map(Vec::len), Some(7 * 4), "{document}");
    }
}

/// A rank that is killed, twice under each MPI; `scripts/kill-rank` does it more often.
#[test]
fn a_job_ends_when_a_rank_is_killed() {
    let _alone = alone();
    for (mpi, victim) in BOTH.into_iter().flat_map(|mpi| [0, 1].map(|victim| (mpi, victim))) {
        let mark = format!("DSGC_TEST_JOB=killed-{}-{}-{victim}", std::process::id(), mpi.mpirun);
        let (name, value) = mark.split_once('=').expect("a variable");
        let mut command = mpi.ranks(3, DSGC);
        // Far longer than the test: only the kill can end it.
        command.args(["bench", "comm", "--filter", "all_reduce", "--seconds", "60"]).env(name, value);
        let mut job = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the launcher starts");
        let mut lines = BufReader::new(job.stdout.take().expect("a pipe"));
        // The first row of the table: all ranks send.
        let mut line = String::new();
        while !line.starts_with(|c: char| c.is_ascii_digit()) || line.contains("ranks") {
            line.clear();
            assert!(lines.read_line(&mut line).expect("the job writes") > 0, "the job ended by itself");
        }
        let mut ranks = ranks_of(&mark);
        assert_eq!(ranks.len(), 3, "{ranks:?}");
        ranks.sort_unstable();
        let killed = Command::new("kill").args(["-9", &ranks[victim].to_string()]).status().expect("`kill` starts");
        assert!(killed.success());
        let since = Instant::now();
        let mut text = String::new();
        lines.read_to_string(&mut text).expect("text");
        job.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
        let code = job.wait().expect("the job ends");
        let took = since.elapsed();
        assert!(!code.success(), "{}: {text}", mpi.name);
        assert!(took < Duration::from_secs(5), "{} took {took:?}", mpi.name);
        assert!(text.to_lowercase().contains("signal 9"), "{}: {text}", mpi.name);
        while !ranks_of(&mark).is_empty() {
            assert!(since.elapsed() < Duration::from_secs(5), "a rank lives on after its job");
            thread::yield_now();
        }
    }
}

/// Processes of `dsgc` with a variable in their environment.
fn ranks_of(mark: &str) -> Vec<u32> {
    let folders = fs::read_dir("/proc").expect("this is Linux").flatten();
    let is_rank = |folder: &Path| {
        let program = fs::read_link(folder.join("exe")).unwrap_or_default();
        let environment = fs::read(folder.join("environ")).unwrap_or_default();
        program == Path::new(DSGC) && environment.split(|&b| b == 0).any(|variable| variable == mark.as_bytes())
    };
    folders.filter(|f| is_rank(&f.path())).filter_map(|f| f.file_name().to_str()?.parse().ok()).collect()
}
