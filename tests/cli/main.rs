//! The program `dsgc` as users run it: what it prints and writes, and the codes with which it ends.

mod answers;
mod bench;
mod compile;
mod devices;
mod documents;
mod run;
mod score;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A folder with a small pipeline `pipeline.yaml` on `rows.jsonl`, in which commands are run.
struct Workplace(TempDir);

/// How a command ended.
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Trains in two stages, of which the second goes on from the first.
const PIPELINE: &str = "\
dsgc: 1
output_dir: runs
seed: 7
models:
  base:
    model: opt
    tokenizer: tokenizer
    config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 64}
data:
  prefs: {path: rows.jsonl, eval: 0.25}
stages:
  sft:
    model: base
    data: prefs
    batch_size: 8
    micro_batch_size: 4
    max_length: 48
    max_steps: 3
    learning_rate: 1e-2
    logging_steps: 1
  more:
    recipe: sft
    model: sft
    data: prefs
    batch_size: 4
    max_length: 48
    num_epochs: 0.5
    eval_steps: 2
    learning_rate: 1e-3
";

impl Workplace {
    fn new() -> Workplace {
        let place = Workplace(tempfile::tempdir().expect("a temporary folder"));
        let rows = fs::read_to_string(example("rlhf/data/prefs.jsonl")).expect("the example's rows");
        let rows: Vec<&str> = rows.lines().take(24).collect();
        place.write("rows.jsonl", &rows.join("\n"));
        place.write("pipeline.yaml", PIPELINE);
        fs::create_dir(place.path("tokenizer")).expect("a new folder");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let from = example("rlhf/tokenizer").join(file);
            fs::copy(from, place.path("tokenizer").join(file)).expect("the example's tokenizer");
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a file in a temporary folder");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsgc"));
        command.args(args).current_dir(self.0.path());
        command
    }

    fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Ended {
        let Output { status, stdout, stderr } = self.command(args).output().expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        Ended { code: status.code(), out: text(stdout), err: text(stderr) }
    }

    /// Runs a command that must succeed, silently on standard error, and gives what it prints.
    fn out<S: AsRef<OsStr>>(&self, args: &[S]) -> String {
        let ended = self.run(args);
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
        ended.out
    }

    /// Runs a command that must end with code 1 and print nothing but messages, and gives these.
    fn refused<S: AsRef<OsStr>>(&self, args: &[S]) -> String {
        let ended = self.run(args);
        assert_eq!(ended.out, "");
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        ended.err
    }
}

/// A file of `examples/`.
fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name)
}

/// Asserts that a text has all these parts, in this order.
#[track_caller]
fn has(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        let at = rest.find(part).unwrap_or_else(|| panic!("expected `{part}` in\n{text}"));
        rest = &rest[at + part.len()..];
    }
}

#[test]
fn help_and_version_are_results() {
    let place = Workplace::new();
    has(
        &place.out(&["--help"]),
        &["Usage: dsgc", "check", "compile", "run", "score", "generate", "chat", "opt", "std", "bench"],
    );
    assert_eq!(place.out(&["--version"]), format!("dsgc {}\n", env!("CARGO_PKG_VERSION")));
    has(&place.out(&["run", "--help"]), &["--stage", "--device", "--set"]);
}

#[test]
fn wrong_usage_ends_with_1() {
    let place = Workplace::new();
    has(&place.refused::<&str>(&[]), &["Usage: dsgc"]);
    has(&place.refused(&["compil"]), &["compil", "compile"]);
    has(&place.refused(&["run"]), &["<FILE>"]);
    has(&place.refused(&["run", "pipeline.yaml", "--device", "abacus"]), &["abacus", "cpu", "interp"]);
    has(&place.refused(&["compile", "pipeline.yaml", "--emit", "all"]), &["all", "ir", "plan", "memory"]);
    has(&place.refused(&["compile", "pipeline.yaml", "--emit", "ir", "--json"]), &["--json", "--emit ir"]);
    has(&place.refused(&["std", "show"]), &["<NAME>"]);
}
