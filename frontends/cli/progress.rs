//! What a user sees of a running stage: a bar with rate and remaining time on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use dsgc_ir::stage::Stage;
use dsgc_kernels::cpu::CompileTime;
use dsgc_runtime::data::DataReport;
use dsgc_runtime::{Event, Metrics};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::console::say_on;

/// Shows the events of one stage.
pub struct Progress {
    stage: String,
    /// A plain line every so many steps.
    every: u64,
    bar: Option<ProgressBar>,
    /// Metrics of the first evaluation, to compare the last one with.
    before: Option<Metrics>,
    /// Since the first step began.
    training: Option<Training>,
    /// Steps that an earlier run took.
    first: u64,
}

struct Training {
    started: Instant,
    tokens: u64,
}

impl Progress {
    /// For a stage that begins; tells what of its models' `config.json` is not used.
    pub fn new(stage: &Stage) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} eta {eta}")
                .expect("the template is right")
                .progress_chars("=> ");
            ProgressBar::new(0).with_style(style).with_prefix(stage.name.clone())
        });
        let every = stage.logging_steps.max(1);
        let progress = Progress { stage: stage.name.clone(), every, bar, before: None, training: None, first: 0 };
        for role in stage.roles.iter().filter(|r| !r.model.unused.is_empty()) {
            let unused = role.model.unused.join(", ");
            progress.line(format!("`{}`: config.json has keys that are kept and not used: {unused}", role.name));
        }
        progress
    }

    /// Shows what the device compiled for the stage, if it did.
    pub fn compiled(&self, new: CompileTime) {
        if new.regions > 0 {
            self.line(format!("compiled {} fused regions in {:.3} s", new.regions, new.spent.as_secs_f64()));
        }
    }

    /// Shows where the stage goes on.
    pub fn resumed(&mut self, step: u64, checkpoint: &Path) {
        self.line(format!("goes on after step {step}, from {}", checkpoint.display()));
        self.first = step;
    }

    /// Shows an event.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Data { source, train, eval } => {
                self.line(format!("{source}: {}", rows(train)));
                if let Some(eval) = eval {
                    self.line(format!("{source} held out: {}", rows(eval)));
                }
            }
            Event::Evaluated { step, steps, metrics, seconds } => {
                self.line(format!("step {step}/{steps} held out: {} ({seconds:.1} s)", numbers(metrics)));
                if *step == 0 {
                    self.before = Some(metrics.clone());
                } else if step == steps
                    && let Some(before) = &self.before
                {
                    let changes: Vec<String> = metrics
                        .iter()
                        .filter_map(|(name, after)| {
                            before.get(name).map(|b| format!("{name} {} -> {}", number(*b), number(*after)))
                        })
                        .collect();
                    self.line(format!("held out, before -> after: {}", changes.join(", ")));
                }
            }
            Event::Step { step, steps, metrics, tokens, seconds, epoch } => {
                let training = self.training.get_or_insert_with(|| Training {
                    started: Instant::now() - Duration::from_secs_f64(*seconds),
                    tokens: 0,
                });
                training.tokens += tokens;
                let rate = training.tokens as f64 / training.started.elapsed().as_secs_f64();
                let text = format!("{} {rate:.0} tokens/s", numbers(metrics));
                if let Some(bar) = &self.bar {
                    bar.set_length(*steps);
                    bar.set_message(text);
                    bar.set_position(*step);
                    if step == steps {
                        bar.finish();
                    }
                } else if step.is_multiple_of(self.every) || *step == self.first + 1 || step == steps {
                    let left =
                        training.started.elapsed().as_secs_f64() * (steps - step) as f64 / (*step - self.first) as f64;
                    let eta = HumanDuration(Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX));
                    self.line(format!("step {step}/{steps} epoch {epoch:.2} {text}, {eta:#} left"));
                }
            }
            Event::New { role, params } => {
                self.line(format!("`{role}` begins with new values of {}", params.join(", ")));
            }
            Event::Health { step, metric, value, low, high } => {
                let end = |x: &Option<f64>| x.map_or("..".into(), number);
                let range = format!("{} to {}", end(low), end(high));
                self.line(format!("warning: step {step}: `{metric}` is {}, healthy is {range}", number(*value)));
            }
            Event::NoRows { table, rows } => {
                self.line(format!("warning: none of the {rows} rows of `{table}` takes part in this step"));
            }
            Event::Checkpoint { step, folder, seconds } => {
                self.line(format!("step {step}: checkpoint {} ({seconds:.1} s)", folder.display()));
            }
            Event::Waited { places } => {
                let shares: Vec<String> = places.iter().map(|share| format!("{:.1} %", 100.0 * share)).collect();
                self.line(format!("ranks along `pipeline` waited for each other, by place: {}", shares.join(", ")));
            }
            Event::Saved { role, folder } => self.line(format!("wrote `{role}` to {}", folder.display())),
        }
    }

    fn line(&self, text: String) {
        let line = format!("{} {text}", self.stage);
        match &self.bar {
            // Before the first step there is no bar on the screen, and a line must not draw an empty one.
            Some(bar) if self.training.is_some() => bar.suspend(|| say_on(line)),
            _ => say_on(line),
        }
    }
}

fn rows(report: &DataReport) -> String {
    let mut text = format!("{} rows, {} tokens, {} of them targets", report.rows, report.tokens, report.trained_tokens);
    for (count, what) in [
        (report.dropped, "left out, longer than `max_length`"),
        (report.truncated, "cut at `max_length`"),
        (report.rows_without_trained, "without a target"),
    ] {
        if count > 0 {
            text += &format!("; {count} rows {what}");
        }
    }
    if let Some(packed) = report.packed {
        text += &format!("; packed into {packed} rows");
    }
    text
}

/// `loss 2.3457 ppl 10.441`: the loss first, then the others by name.
fn numbers(metrics: &Metrics) -> String {
    let mut names: Vec<&String> = metrics.keys().collect();
    names.sort_by_key(|name| (!name.ends_with("loss"), *name));
    names.iter().map(|name| format!("{name} {}", number(metrics[*name]))).collect::<Vec<_>>().join(" ")
}

/// Five digits.
fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if (1e-3..1e5).contains(&a) => {
            let digits = (4 - a.log10().floor() as i32).clamp(0, 7) as usize;
            format!("{x:.digits$}")
        }
        _ => format!("{x:.3e}"),
    }
}
