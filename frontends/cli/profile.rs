//! The table of `--profile`: where the time of a device went.

use std::time::Duration;

use dsgc_ir::diag::Diag;
use dsgc_kernels::{Device, Launches};

use crate::console::say;

/// Parts of the whole time that are a line of their own; the others are one line.
const SHOWN: f64 = 0.001;
/// Most characters of what was launched.
const WIDTH: usize = 72;

/// Lets the device measure; an error if it cannot.
pub fn begin(device: &mut dyn Device) -> Result<(), Diag> {
    if device.measure() {
        return Ok(());
    }
    Err(Diag::error(format!("`--profile`: the device `{}` does not measure its launches", device.name()))
        .help("write `--device cpu`"))
}

/// Prints what it measured, what took longest first.
pub fn show(device: &dyn Device) {
    let mut all = device.measured();
    all.sort_by(|a, b| b.time.cmp(&a.time).then_with(|| (&a.graph, &a.what).cmp(&(&b.graph, &b.what))));
    let whole: Duration = all.iter().map(|l| l.time).sum();
    let share = |time: Duration| time.as_secs_f64() / whole.as_secs_f64().max(f64::MIN_POSITIVE);
    let graphs = all.iter().map(|l| l.graph.len()).max().unwrap_or(0).max("graph".len());
    let widest = all.iter().map(|l| l.what.chars().count()).max().unwrap_or(0).min(WIDTH);
    let line = |graph: &str, what: &str, count: u64, time: Duration, rate: &str| {
        let (time, share) = (time.as_secs_f64() * 1e3, 100.0 * share(time));
        say(format!("{graph:<graphs$}  {what:<widest$.widest$}  {count:>8}  {time:>10.2}  {share:>5.1} %  {rate:>14}")
            .trim_end());
    };
    say(format!(
        "{:<graphs$}  {:<widest$}  {:>8}  {:>10}  {:>7}  {:>14}",
        "graph", "op", "launches", "ms", "share", "by formula"
    ));
    let (long, short): (Vec<_>, Vec<_>) = all.iter().partition(|l| share(l.time) >= SHOWN);
    for launches in long {
        line(&launches.graph, &launches.what, launches.count, launches.time, &rate(launches));
    }
    if !short.is_empty() {
        line("", "all others", short.iter().map(|l| l.count).sum(), short.iter().map(|l| l.time).sum(), "");
    }
    line("", "together", all.iter().map(|l| l.count).sum(), whole, "");
}

/// Operations or bytes per second, whichever a device needs longer for.
fn rate(launches: &Launches) -> String {
    let (seconds, cost) = (launches.time.as_secs_f64().max(1e-9), launches.cost);
    match (cost.flops, cost.bytes) {
        (0, 0) => String::new(),
        (flops, bytes) if flops > bytes.saturating_mul(dsgc_ir::cost::FLOPS_PER_BYTE) => {
            format!("{:.1} GFLOP/s", flops as f64 / seconds / 1e9)
        }
        (_, bytes) => format!("{:.1} GB/s", bytes as f64 / seconds / 1e9),
    }
}
