//! What the program says: results on standard output, messages on standard error. Of several processes of one job, the first
//! one speaks for all.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{process, thread};

use dsgc_ir::diag::{Diag, Sources};
use dsgc_runtime::mpi;
use dsgc_yaml::load::Failed;
use dsgc_yaml::render::{Look, render};

/// Messages to the user, with the files that they point into; the end of a command.
pub struct Failure {
    diags: Vec<Diag>,
    sources: Sources,
    code: u8,
}

/// This process's rank in its job.
static RANK: AtomicUsize = AtomicUsize::new(0);

/// How long others than the first process wait before they say what is wrong.
const OTHERS_WAIT: Duration = Duration::from_millis(2500);

/// From now on only the first process of a job says something.
pub fn speak_as(rank: usize) {
    RANK.store(rank, Ordering::Relaxed);
}

fn is_silent() -> bool {
    RANK.load(Ordering::Relaxed) > 0
}

/// The exit code where it is the user's input that is wrong.
const INPUT: u8 = 1;

impl Failure {
    /// Messages that point into these files.
    pub fn new(diags: Vec<Diag>, sources: &Sources) -> Failure {
        Failure { diags, sources: sources.clone(), code: INPUT }
    }

    /// An end that is no error but has a code of its own; what it is has been said.
    pub fn ended(code: u8) -> Failure {
        Failure { diags: vec![], sources: Sources::default(), code }
    }

    /// The first message.
    pub fn message(&self) -> &str {
        self.diags.first().map_or("", |diag| &diag.message)
    }

    /// The exit code of the program.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// Writes all messages to standard error.
    ///
    /// What is wrong for one process of a job mostly is for all; so others than the first leave it some time to say so, which
    /// ends the job.
    pub fn show(&self) {
        let rank = RANK.load(Ordering::Relaxed);
        if rank > 0 && !self.is_agreed() {
            thread::sleep(OTHERS_WAIT);
            RANK.store(0, Ordering::Relaxed);
            note(format_args!("on rank {rank}:"));
        }
        show(&self.diags, &self.sources);
    }

    /// Whether it is an end that is no error, to which all ranks of a run come.
    pub fn is_agreed(&self) -> bool {
        self.diags.is_empty()
    }
}

impl From<Diag> for Failure {
    fn from(diag: Diag) -> Failure {
        Failure { diags: vec![diag], sources: Sources::default(), code: INPUT }
    }
}

impl From<Vec<Diag>> for Failure {
    fn from(diags: Vec<Diag>) -> Failure {
        Failure { diags, sources: Sources::default(), code: INPUT }
    }
}

impl From<Failed> for Failure {
    fn from(failed: Failed) -> Failure {
        Failure { diags: failed.diags, sources: failed.sources, code: INPUT }
    }
}

/// Writes messages to standard error.
pub fn show(diags: &[Diag], sources: &Sources) {
    if !diags.is_empty() && !is_silent() {
        let look = if io::stderr().is_terminal() { Look::Colour } else { Look::Plain };
        tell(render(diags, sources, look));
    }
}

/// Writes a line to standard output. Whoever reads it may stop reading, as `head` does: then there is no more to do.
pub fn say(line: impl std::fmt::Display) {
    if is_silent() {
        return;
    }
    let mut out = io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(0),
        Err(error) => {
            tell(format_args!("error: cannot write to standard output: {error}"));
            process::exit(1);
        }
    }
}

/// Writes a part of a line to standard output, at once.
pub fn say_part(text: &str) {
    if is_silent() {
        return;
    }
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    if written.is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
        process::exit(0);
    }
}

/// Tells something beside the results.
pub fn note(text: impl std::fmt::Display) {
    if is_silent() {
        return;
    }
    tell(format_args!("note: {text}"));
}

/// Writes a line to standard output of work that goes on whether anybody reads it or not.
pub fn say_on(line: impl std::fmt::Display) {
    if is_silent() {
        return;
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// Writes a line to standard error. Where nobody reads it, there is nobody left to tell.
fn tell(line: impl std::fmt::Display) {
    writeln!(io::stderr().lock(), "{line}").ok();
}

/// A panic is a bug of ours: it ends the program with code 2, whatever thread it is in, and all ranks of its job.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let why = info.payload_as_str().unwrap_or("no message");
        let version = env!("CARGO_PKG_VERSION");
        tell(format_args!(
            "dsgc {version} has a bug: {why}{place}\nPlease report this together with the file that you ran."
        ));
        mpi::end_job(2);
        process::exit(2);
    }));
}
