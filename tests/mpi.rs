//! Ranks that MPI starts and connects, under every launcher that the tests install: Open MPI's and MPICH's, with one
//! program. Each test starts this file's own program, or `dsgc`, on several ranks.

#[path = "common/place.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod place;
#[path = "../kernels/tests/ranks/suite.rs"]
mod suite;
#[path = "common/tiny.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod tiny;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dsgc_kernels::ranks::{Group, threads};
use dsgc_runtime::mpi;
use serde_json::Value;

use place::Place;
use tiny::Tiny;

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
        command.args(["a_rank", "--exact", "--nocapture", "--test-threads=1"]).env(SCENE, scene);
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

/// The same with what it writes to both streams in the order in which it comes.
fn run_in_order(command: &mut Command) -> Ended {
    let started = Instant::now();
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let mut job = command.stdout(writer.try_clone().expect("a pipe")).stderr(writer).spawn().expect("it starts");
    // The command holds the writer's end too.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut text = Vec::new();
    reader.read_to_end(&mut text).expect("text");
    let code = job.wait().expect("the job ends").code();
    Ended { code, text: String::from_utf8_lossy(&text).into_owned(), took: started.elapsed() }
}

/// Whether a line is more than what this file's program says of itself as a test, or of where it panics.
fn is_said(line: &&str) -> bool {
    !line.is_empty() && *line != "running 1 test" && !line.starts_with("thread 'a_rank'")
}

/// What a rank does that another test has started; nothing where none has.
#[test]
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
            let ended = run_in_order(mpi.scene(3, scene).env("DSGC_WAIT_SECONDS", "1"));
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
            // That rank's message first, before what libraries and launchers say of the end.
            let first = ended.text.lines().map(|line| line.trim_start_matches("test a_rank ... ").trim()).find(is_said);
            assert!(first.is_some_and(|line| line.contains(sentence)), "{} {scene}: {}", mpi.name, ended.text);
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
        assert!(says_that_one_was_killed(&text), "{}: {text}", mpi.name);
        while !ranks_of(&mark).is_empty() {
            assert!(since.elapsed() < Duration::from_secs(5), "a rank lives on after its job");
            thread::yield_now();
        }
    }
}

/// MPICH's launcher says the latter where another rank was reading the killed one's memory and ended by that.
fn says_that_one_was_killed(text: &str) -> bool {
    let text = text.to_lowercase();
    text.contains("signal 9") || text.contains("bad termination")
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

const PIPELINE: &str = "
dsgc: 1
output_dir: runs
seed: 5
save_steps: 2
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 32}}
data:
  texts: {path: rows.jsonl, eval: 0.25, fields: {text: chosen}}
stages:
  sft: {model: base, data: texts, batch_size: 4, max_length: 24, max_steps: 4, eval_steps: 2, logging_steps: 1}
";

const ZERO: &str = "compile.parallel={data: 2, zero_stage: 3}";
const TENSOR: &str = "compile.parallel={tensor: 2}";
const EARLY: &str = "compile.parallel={pipeline: 2, microbatches: 2, schedule: 1f1b}";
const LATE_WEIGHTS: &str = "compile.parallel={pipeline: 2, microbatches: 2, schedule: zero_bubble}";
const ONE: &str = "compile.parallel={data: 1}";

/// Where the only stage writes.
fn of_stage(place: &Place) -> PathBuf {
    let stages = fs::read_dir(place.path("runs")).expect("a folder").map(|entry| entry.expect("an entry").path());
    let [stage] = <[PathBuf; 1]>::try_from(stages.collect::<Vec<_>>()).expect("one stage");
    stage
}

/// The lines of the metrics without times.
fn metrics(place: &Place) -> Vec<Value> {
    let text = fs::read_to_string(of_stage(place).join("metrics.jsonl")).expect("metrics");
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    for line in &mut lines {
        let line = line.as_object_mut().expect("an object");
        line.retain(|key, _| key != "seconds" && key != "tokens_per_second");
    }
    lines
}

fn assert_equal(found: &Place, expected: &Place, what: &str) {
    assert_eq!(metrics(found), metrics(expected), "{what}");
    let weights = |place: &Place| {
        let of_role = |role| fs::read(of_stage(place).join(role).join("model.safetensors")).ok();
        ["", "actor", "critic", "ema"].map(of_role)
    };
    let expected = weights(expected);
    assert!(expected.iter().any(Option::is_some) && weights(found) == expected, "{what}: weights differ");
}

fn assert_near(found: &Place, expected: &Place, what: &str) {
    let (found, expected) = (metrics(found), metrics(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(&expected) {
        let numbers = expected.as_object().expect("an object");
        for (name, number) in numbers.iter().filter(|(name, _)| *name != tiny::OF_FEW_DIGITS) {
            let (a, b) = (found[name].as_f64(), number.as_f64());
            let near = a.zip(b).is_some_and(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
            assert!(near || found[name] == *number, "{what}: `{name}` is {a:?}, expected {b:?}");
        }
    }
}

#[test]
fn a_pipeline_has_the_numbers_of_threads() {
    let _alone = alone();
    let one = Place::with(PIPELINE);
    one.out(&["run", "pipeline.yaml"], &[]);
    for layout in [ZERO, TENSOR, EARLY, LATE_WEIGHTS] {
        let as_threads = Place::with(PIPELINE);
        as_threads.out(&["run", "pipeline.yaml"], &[layout]);
        assert_near(&as_threads, &one, layout);
        for mpi in BOTH {
            let place = Place::with(PIPELINE);
            let mut command = mpi.ranks(2, DSGC);
            let ended = run(command.current_dir(place.path(".")).args(["run", "pipeline.yaml", "--set", layout]));
            assert_eq!(ended.code, Some(0), "{}: {}", mpi.name, ended.text);
            // One speaks for all.
            assert_eq!(ended.text.matches("sft wrote `model` to runs/sft").count(), 1, "{}", ended.text);
            assert_equal(&place, &as_threads, &format!("{layout} under {}", mpi.name));
        }
    }
}

/// The most memory that the ranks of a run have had, in bytes, for each.
fn most_memory(mut command: Command, mark: &str) -> BTreeMap<u32, f64> {
    let mut job = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the launcher starts");
    let mut most = BTreeMap::new();
    let ended = loop {
        if let Some(ended) = job.try_wait().expect("a child") {
            break ended;
        }
        for rank in ranks_of(mark) {
            let status = fs::read_to_string(format!("/proc/{rank}/status")).unwrap_or_default();
            let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
            most.extend(kib.map(|kib| (rank, 1024.0 * kib.parse::<f64>().expect("a number"))));
        }
        thread::sleep(Duration::from_millis(2));
    };
    assert!(ended.success());
    most
}

/// Beside what a process takes for a program that is next to nothing, each rank takes what `dsgc compile` prints.
#[test]
fn ranks_take_the_memory_that_was_planned() {
    let _alone = alone();
    let sizes = |hidden: usize| {
        let mut sets =
            [ZERO, "stages.sft.max_steps=1", "save_steps=none", "data.texts.eval=none"].map(String::from).to_vec();
        sets.push(format!("models.base.config.hidden={hidden}"));
        sets.push(format!("models.base.config.ffn={}", 4 * hidden));
        sets
    };
    let run = |sets: &[String]| {
        let place = Place::with(PIPELINE);
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let report = place.out(&["compile", "pipeline.yaml", "--json"], &sets);
        let report: Value = serde_json::from_str(&report).expect("JSON");
        let planned = report[0]["memory"]["peak"].as_f64().expect("bytes");
        let mark = format!("DSGC_TEST_JOB=memory-{}-{planned}", std::process::id());
        let (name, value) = mark.split_once('=').expect("a variable");
        let mut command = MPICH.ranks(2, DSGC);
        command.current_dir(place.path(".")).env(name, value).args(["run", "pipeline.yaml"]);
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        let most = most_memory(command, &mark);
        assert_eq!(most.len(), 2, "{most:?}");
        (planned, most)
    };
    let ((little, least), (planned, most)) = (run(&sizes(16)), run(&sizes(512)));
    assert!(planned > 56.0 * f64::from(1 << 20) && little < 0.1 * planned, "{planned} and {little}");
    let without = least.values().fold(0.0, |a: f64, b| a.max(*b)) - little;
    for (rank, most) in most {
        let taken = most - without;
        assert!((0.9..=1.05).contains(&(taken / planned)), "process {rank} took {taken} of {planned}");
    }
}

/// A folder with a tiny model's pipeline.
fn of_tiny(tiny: Tiny) -> Place {
    let place = Place::with(&tiny.pipeline("1e-3"));
    tiny::write_tokenizer(&place.path("."));
    fs::write(place.path("rows.jsonl"), tiny::rows().join("\n")).expect("a file");
    place
}

/// Stages on four ranks, along two axes or one.
#[test]
fn four_ranks_have_the_numbers_of_threads() {
    let _alone = alone();
    let tiny = |model, stage, layers| Tiny { model, stage, layers, vocabulary: tiny::TOKENS };
    for (tiny, layout) in [
        (tiny("llama", "ppo", 2), "compile.parallel={data: 2, tensor: 2, zero_stage: 3}"),
        (tiny("opt", "ppo", 2), "compile.parallel={data: 2, pipeline: 2, schedule: 1f1b, zero_stage: 1}"),
        (tiny("llama", "sft", 4), "compile.parallel={pipeline: 4, schedule: zero_bubble}"),
    ] {
        let [one, as_threads] = [ONE, layout].map(|layout| {
            let place = of_tiny(tiny);
            place.out(&["run", "pipeline.yaml"], &[layout]);
            place
        });
        assert!(metrics(&one).len() >= 20);
        assert_near(&as_threads, &one, layout);
        for mpi in BOTH {
            let place = of_tiny(tiny);
            let mut command = mpi.ranks(4, DSGC);
            let ended = run(command.current_dir(place.path(".")).args(["run", "pipeline.yaml", "--set", layout]));
            assert_eq!(ended.code, Some(0), "{}: {}", mpi.name, ended.text);
            assert_equal(&place, &as_threads, &format!("{tiny:?}, {layout} under {}", mpi.name));
        }
    }
}

/// A stage that runs on two ranks for some seconds, with a checkpoint after each step.
struct Long {
    name: &'static str,
    layout: &'static str,
    args: &'static [&'static str],
}

const SFT: Long = Long {
    name: "sft",
    layout: ZERO,
    args: &["--set", "stages.sft.max_steps=80", "--set", "save_steps=1", "--set", "save_total_limit=3"],
};

/// As long as single precision has the numbers of one rank within 1e-5.
const PPO: Long = Long { name: "ppo", layout: ZERO, args: &["--set", "save_steps=1", "--set", "save_total_limit=3"] };

/// A run on two ranks that goes on while the test looks at it.
struct Job {
    launcher: Child,
    mark: String,
    metrics: PathBuf,
}

impl Job {
    fn start(mpi: &Mpi, place: &Place, long: &Long, more: &[&str]) -> Job {
        static JOBS: Mutex<u32> = Mutex::new(0);
        let mut jobs = JOBS.lock().unwrap_or_else(PoisonError::into_inner);
        *jobs += 1;
        let mark = format!("DSGC_TEST_JOB=run-{}-{jobs}", std::process::id());
        let (name, value) = mark.split_once('=').expect("a variable");
        let mut command = mpi.ranks(2, DSGC);
        command.current_dir(place.path(".")).env(name, value).args(["run", "pipeline.yaml"]);
        command.args(["--set", long.layout]).args(long.args).args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
        let metrics = place.path(&format!("runs/{}/metrics.jsonl", long.name));
        Job { launcher: command.spawn().expect("the launcher starts"), mark, metrics }
    }

    /// Its ranks, once it has written so many lines of metrics.
    fn ranks_after(&mut self, lines: usize) -> Vec<u32> {
        let began = Instant::now();
        let written = || fs::read_to_string(&self.metrics).unwrap_or_default().lines().count();
        while written() < lines {
            assert!(self.launcher.try_wait().expect("a child").is_none(), "the job has ended by itself");
            assert!(began.elapsed() < Duration::from_secs(60), "the job takes no step");
            thread::sleep(Duration::from_millis(5));
        }
        let mut ranks = ranks_of(&self.mark);
        ranks.sort_unstable();
        assert_eq!(ranks.len(), 2, "{ranks:?}");
        ranks
    }

    /// Its end, and that of its ranks.
    fn ended(self) -> Ended {
        let since = Instant::now();
        let output = self.launcher.wait_with_output().expect("it ends");
        while !ranks_of(&self.mark).is_empty() {
            assert!(since.elapsed() < Duration::from_secs(10), "a rank lives on after its job");
            thread::sleep(Duration::from_millis(5));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ended { code: output.status.code(), text, took: since.elapsed() }
    }
}

fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").args([name, &process.to_string()]).status().expect("`kill` starts");
    assert!(sent.success());
}

/// What runs without a disturbance leave: on two ranks, and on one.
fn undisturbed(long: &Long, place: impl Fn() -> Place) -> [Place; 2] {
    [long.layout, ONE].map(|layout| {
        let place = place();
        let command = [&["run", "pipeline.yaml", "--set", layout], long.args, &["--set", "save_steps=none"]].concat();
        let ended = place.command(&command);
        assert!(ended.status.success(), "{ended:?}");
        place
    })
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a new folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let to = to.join(path.file_name().expect("a name"));
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(drop).expect("a copy") }
    }
}

/// A run in which each of these ranks is killed after so many lines of metrics, and that goes on to the end on as many
/// ranks, and on one.
fn goes_on_after(kills: [(usize, usize); 2], long: &Long, new: impl Fn() -> Place) {
    let [whole, one] = undisturbed(long, &new);
    for mpi in BOTH {
        let place = new();
        for (at, (victim, lines)) in kills.into_iter().enumerate() {
            let mut job = Job::start(mpi, &place, long, if at == 0 { &[] } else { &["--resume", "auto"] });
            signal("-9", job.ranks_after(lines)[victim]);
            let ended = job.ended();
            assert!(ended.code.is_none_or(|code| code != 0), "{}: {}", mpi.name, ended.text);
            assert!(says_that_one_was_killed(&ended.text), "{}: {}", mpi.name, ended.text);
            assert!(ended.took < Duration::from_secs(5), "{} took {:?}", mpi.name, ended.took);
        }
        let other = new();
        copy(&place.path("runs"), &other.path("runs"));
        let ended = Job::start(mpi, &place, long, &["--resume", "auto"]).ended();
        assert_eq!(ended.code, Some(0), "{}: {}", mpi.name, ended.text);
        assert_equal(&place, &whole, mpi.name);
        let resumed = [&["run", "pipeline.yaml", "--resume", "auto", "--set", ONE], long.args].concat();
        let ended = other.command(&resumed);
        assert!(ended.status.success(), "{ended:?}");
        assert_near(&other, &one, mpi.name);
    }
}

/// Each rank once under each MPI; `scripts/kill-rank` does it more often.
#[test]
fn a_run_goes_on_after_a_rank_was_killed() {
    let _alone = alone();
    goes_on_after([(1, 4), (0, 40)], &SFT, || Place::with(PIPELINE));
}

/// Actor, critic, an average, a penalty that follows the divergence, and a rollout in every step.
#[test]
fn ppo_goes_on_after_a_rank_was_killed() {
    let _alone = alone();
    goes_on_after([(0, 4), (1, 9)], &PPO, || of_tiny(Tiny { model: "opt", stage: "ppo", layers: 2, vocabulary: 25 }));
}

/// Whichever process is told to stop: one rank, all of them, or the launcher, which tells the ranks.
#[test]
fn a_run_stops_after_one_step_on_all_ranks() {
    let _alone = alone();
    let [whole, _] = undisturbed(&SFT, || Place::with(PIPELINE));
    for mpi in BOTH {
        let place = Place::with(PIPELINE);
        for (told, lines) in [("one", 4), ("all", 30), ("launcher", 55)] {
            let mut job = Job::start(mpi, &place, &SFT, if told == "one" { &[] } else { &["--resume", "auto"] });
            let ranks = job.ranks_after(lines);
            match told {
                "one" => signal("-TERM", ranks[1]),
                "all" => ranks.iter().for_each(|&rank| signal("-TERM", rank)),
                _ => signal("-TERM", job.launcher.id()),
            }
            let ended = job.ended();
            // A launcher that is told to end has a code of its own.
            if told != "launcher" {
                assert_eq!(ended.code, Some(143), "{} {told}: {}", mpi.name, ended.text);
                assert_eq!(ended.text.matches("`--resume auto` goes on").count(), 1, "{}: {}", mpi.name, ended.text);
            }
            let taken = place.steps("sft").len();
            let is_written = |step: usize| place.path(&format!("runs/sft/checkpoints/step-{step:08}")).exists();
            // It may leave the ranks no time for a whole step.
            let written = is_written(taken) || told == "launcher" && is_written(taken - 1);
            // And ranks may be done before it has passed the signal on.
            assert!(
                written && (taken < 80 || told == "launcher"),
                "{} {told}: {taken} steps: {}",
                mpi.name,
                ended.text
            );
        }
        let ended = Job::start(mpi, &place, &SFT, &["--resume", "auto"]).ended();
        // 3 where nothing is left to do.
        assert!(matches!(ended.code, Some(0 | 3)), "{}: {}", mpi.name, ended.text);
        assert_equal(&place, &whole, mpi.name);
    }
}

/// Ranks in two folders, in one of which the rows are others.
#[test]
fn ranks_with_other_rows_do_not_begin() {
    let _alone = alone();
    for mpi in BOTH {
        let [one, other] = [(); 2].map(|()| Place::with(PIPELINE));
        let rows = fs::read_to_string(other.path("rows.jsonl")).expect("rows");
        fs::write(other.path("rows.jsonl"), rows.replacen("Yes", "No", 1)).expect("a file");
        let args = ["run", "pipeline.yaml", "--set", ZERO];
        let mut command = Command::new(mpi.mpirun);
        command.envs(["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"].map(|name| (name, "1")));
        if mpi.name == "Open MPI" {
            command.arg("--oversubscribe");
        }
        command.args(["-n", "1", "-wdir"]).arg(one.path(".")).arg(DSGC).args(args);
        command.args([":", "-n", "1", "-wdir"]).arg(other.path(".")).arg(DSGC).args(args);
        let ended = run(&mut command);
        assert_ne!(ended.code, Some(0), "{}", ended.text);
        let sentence = "error: ranks differ in the rows of `text`: 6 for training and 2 held out, whose SHA-256 is ";
        assert_eq!(ended.text.matches(sentence).count(), 1, "{}: {}", mpi.name, ended.text);
        assert!(!one.path("runs/sft/metrics.jsonl").exists());
    }
}
