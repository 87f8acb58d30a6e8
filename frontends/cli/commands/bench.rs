//! `dsgc bench`: what this machine can do, and what our kernels and collectives make of it.

mod comm;

use std::fs;
use std::time::Duration;

use dsgc_kernels::cpu::limits::{instructions, last_level_cache};
use serde_json::{Value, json};

use super::Done;
use crate::console::{note, say};
use crate::device::threads;
use crate::measure::{Bench, Bound, Limits, Measured, Series};
use crate::report::size;

/// Arguments of `dsgc bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Measure every kernel family against multiply-adds on registers and plain copies, in the same run.
    Kernels(Kernels),
    /// Measure collectives between ranks: of MPI under its launcher, else threads of this process.
    Comm(comm::Args),
}

#[derive(clap::Args)]
struct Kernels {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Threads of the device; all cores unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Only kernels with this in their name, as the table shows it.
    #[arg(long, value_name = "NAME", default_value = "")]
    filter: String,
    /// How long each kernel runs, but three times at least.
    #[arg(long, value_name = "S", default_value = "1", value_parser = seconds)]
    seconds: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse::<f64>().ok().filter(|s| *s >= 0.0);
    number.and_then(|s| Duration::try_from_secs_f64(s).ok()).ok_or_else(|| "expected a number of seconds".into())
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    match &args.what {
        What::Kernels(args) => kernels(args),
        What::Comm(args) => comm::run(args),
    }
}

fn kernels(args: &Kernels) -> Done {
    if cfg!(debug_assertions) {
        note("this program is built for debugging; speed is measured with `cargo build --release`");
    }
    let threads = args.threads.map_or_else(threads, usize::from);
    let machine = Machine::here(threads);
    if !args.json {
        say(machine.line());
        say(HEAD);
    }
    let tell = &mut |kernel: &Measured| {
        if !args.json {
            say(row(kernel));
        }
    };
    let (limits, kernels) = Bench::new(threads, args.seconds).run(&args.filter, tell)?;
    if args.json {
        let kernels: Vec<Value> = kernels.iter().map(kernel_json).collect();
        let document = json!({"machine": machine.json(), "limits": limits_json(&limits), "kernels": kernels});
        say(serde_json::to_string_pretty(&document).expect("values have string keys"));
    } else {
        limits_lines(&limits, threads).iter().for_each(say);
    }
    Ok(())
}

/// Where and with what it was measured.
struct Machine {
    cpu: Option<String>,
    cores: usize,
    threads: usize,
    cache: Option<usize>,
}

impl Machine {
    fn here(threads: usize) -> Machine {
        let facts = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = facts.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let cpu = model.map(|(_, name)| name.trim().to_string());
        Machine { cpu, cores: crate::device::threads(), threads, cache: last_level_cache() }
    }

    fn line(&self) -> String {
        let cpu = self.cpu.as_deref().unwrap_or("unknown CPU");
        let sets = instructions().join(" ");
        format!("{cpu}, {} cores, {} threads used; {sets}; dsgc {}", self.cores, self.threads, version())
    }

    fn json(&self) -> Value {
        json!({
            "cpu": self.cpu, "cores": self.cores, "threads": self.threads, "instructions": instructions(),
            "last_level_cache": self.cache, "system": std::env::consts::OS, "architecture": std::env::consts::ARCH,
            "dsgc": env!("CARGO_PKG_VERSION"), "commit": COMMIT,
        })
    }
}

/// The commit that this program was built from, if the build was told.
const COMMIT: Option<&str> = option_env!("DSGC_COMMIT");

fn version() -> String {
    let commit = COMMIT.map(|commit| format!(" at {commit}"));
    env!("CARGO_PKG_VERSION").to_string() + &commit.unwrap_or_default()
}

const HEAD: &str = "\
kernel                                             shape                    best ms  median ms    GFLOP/s     GB/s  limit   share";

/// A line of the table.
fn row(kernel: &Measured) -> String {
    let title = format!("{} {} {}", kernel.model, kernel.family, kernel.name);
    let (best, median) = (kernel.seconds.least(), kernel.seconds.median());
    let rate = |work: u64| work as f64 / best / 1e9;
    let star = if kernel.bound == Bound::Copy && kernel.cached { "*" } else { "" };
    format!(
        "{title:<50} {:<22} {:>9.3} {:>10.3} {:>10.1} {:>8.1}  {:<5} {:>5.0} %{star}",
        kernel.shape,
        best * 1e3,
        median * 1e3,
        rate(kernel.work.flops),
        rate(kernel.work.bytes),
        kernel.bound.name(),
        100.0 * kernel.share(),
    )
}

fn kernel_json(kernel: &Measured) -> Value {
    let best = kernel.seconds.least();
    json!({
        "model": kernel.model, "family": kernel.family, "name": kernel.name, "shape": kernel.shape,
        "float": kernel.float, "runs": kernel.seconds.len(), "best_s": best, "median_s": kernel.seconds.median(),
        "flops": kernel.work.flops, "bytes": kernel.work.bytes, "cached": kernel.cached,
        "gflop_per_s": kernel.work.flops as f64 / best / 1e9, "gb_per_s": kernel.work.bytes as f64 / best / 1e9,
        "limit": kernel.bound.name(), "limit_per_s": kernel.limit, "share": kernel.share(),
    })
}

/// All limits by name: on one thread and on all, in operations or bytes per second.
fn named(limits: &Limits) -> Vec<(&'static str, &'static str, &Series, &Series)> {
    let mut all = vec![("fma_f32", limits.f32_how, &limits.f32_one, &limits.f32_all)];
    all.extend(limits.bf16.as_ref().map(|(how, one, all)| ("fma_bf16", *how, one, all)));
    all.push(("copy", "read and written", &limits.copy_one, &limits.copy_all));
    all.push(("read", "added up", &limits.read_one, &limits.read_all));
    all
}

fn limits_json(limits: &Limits) -> Value {
    let series = |s: &Series| json!({"best_per_s": s.most(), "median_per_s": s.median(), "times": s.len()});
    let mut all = serde_json::Map::new();
    for (name, how, one, every) in named(limits) {
        all.insert(name.into(), json!({"how": how, "one_thread": series(one), "all_threads": series(every)}));
    }
    all.insert("array_bytes".into(), limits.array.into());
    Value::Object(all)
}

fn limits_lines(limits: &Limits, threads: usize) -> Vec<String> {
    let mut lines = vec![String::from("* may have been in a cache, where more than a copy's bandwidth is possible")];
    for (name, how, one, all) in named(limits) {
        let unit = if name.starts_with("fma") { "GFLOP/s" } else { "GB/s" };
        lines.push(format!(
            "{name:<9} 1 thread {:>8.1} {unit}, {threads} threads {:>8.1} best, {:.1} median of {}; {how}",
            one.most() / 1e9,
            all.most() / 1e9,
            all.median() / 1e9,
            all.len(),
        ));
    }
    lines.push(format!("arrays of {}", size(limits.array)));
    lines
}
