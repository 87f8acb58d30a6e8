//! Evaluation on held-out rows, and what a stage must reach.

use std::ops::Range;
use std::time::Instant;

use dsgc_ir::Axis;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Bounds, Call, Evaluate, Operand, Statement};

use crate::calls::{Named, Parts};
use crate::plan::{Counters, Told};
use crate::rank::parts_of;
use crate::session::{Event, Metrics, Observer, Session};
use crate::values::{Origin, Values};

impl Session {
    /// Evaluates all held-out rows, if there are any, and gives the numbers.
    ///
    /// Random numbers are the same in every evaluation, and those of training do not depend on how often it is done.
    pub(crate) fn evaluate(&mut self, step: u64, observer: Observer) -> Result<Metrics, Diag> {
        let started = Instant::now();
        self.begins(&format!("the evaluation after step {step}"));
        let counters = std::mem::take(&mut self.counters);
        let metrics = self.evaluations();
        self.counters = counters;
        let metrics = metrics?;
        if !metrics.is_empty() {
            let (steps, seconds) = (self.steps(), started.elapsed().as_secs_f64());
            observer(&Event::Evaluated { step, steps, metrics: metrics.clone(), seconds })?;
        }
        Ok(metrics)
    }

    fn evaluations(&mut self) -> Result<Metrics, Diag> {
        let mut metrics = Metrics::new();
        let all = self.program.stage.evaluate.clone();
        for evaluate in &all {
            if self.data[&evaluate.source].eval_len() == 0 {
                continue;
            }
            self.counters = Counters::default();
            let mut told = Told::default();
            match alone(evaluate) {
                Some((call, parts)) => self.evaluate_parts(evaluate, call, parts, &mut told)?,
                None => {
                    let name = format!("{}.eval", evaluate.source);
                    let rows: Vec<usize> = (0..self.data[&evaluate.source].eval_len()).collect();
                    let batch = self.data[&evaluate.source].eval_batch(&rows);
                    let origin = Origin { source: evaluate.source.clone(), held: true, rows };
                    let mut values = Values::default();
                    values.bind_rows(&name, batch.tensors, origin);
                    self.statements(&evaluate.body, &mut values, 0, &mut told)?;
                }
            }
            // Where several sources are evaluated, their numbers are told apart by the source.
            let several = all.iter().any(|other| other.source != evaluate.source);
            let prefix = if several { format!("{}/", evaluate.source) } else { String::new() };
            metrics.extend(told.metrics.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)));
        }
        Ok(metrics)
    }

    /// A single call on the held-out rows: each part is padded to its own longest row only.
    fn evaluate_parts(&mut self, evaluate: &Evaluate, call: &Call, parts: Parts, told: &mut Told) -> Result<(), Diag> {
        let data = &self.data[&evaluate.source];
        let rows: Vec<usize> = (0..data.eval_len()).collect();
        let name = format!("{}.eval", evaluate.source);
        let inputs = |rows: &[usize]| {
            let mut values = Values::default();
            values.bind(&name, data.eval_batch(rows).tensors);
            self.inputs(&call.args, &values)
        };
        let size = parts.size(&self.program).unwrap_or(rows.len());
        let part = |part: Range<usize>| {
            // A part without rows has the columns of one.
            let columns = part.start.min(rows.len() - 1);
            let inputs = inputs(&rows[columns..part.end.max(columns + 1)])?;
            Ok(if part.is_empty() { parts.without_rows(&self.program, &inputs) } else { inputs })
        };
        let cut = parts_of(rows.len(), size, &self.rank.member.group(Axis::Data)).into_iter().map(part);
        let cut: Vec<Named> = cut.collect::<Result<_, _>>()?;
        let made = parts.run(self.rank.device.as_mut(), &self.program, &self.rank.member, &cut)?;
        let outputs = self.assert(&call.graph, made.whole)?;
        self.tell(&outputs, "", told);
        Ok(())
    }

    /// What the last evaluation must reach and does not.
    pub(crate) fn require(&self, metrics: &Metrics) -> Result<(), Diag> {
        let stage = &self.program.stage;
        for bounds in &stage.require {
            let range = range(bounds);
            let Some((name, value)) = find(metrics, &bounds.metric) else {
                let message = format!("found no `{}` of an evaluation, expected {range}", bounds.metric);
                return Err(Diag::error(message)
                    .label(bounds.span, "required here")
                    .help("hold rows out with `eval` of the data, so that the stage is evaluated"));
            };
            if !holds(bounds, value) {
                let message =
                    format!("found `{name}` = {value} at the end of the stage `{}`, expected {range}", stage.name);
                let mut diag = Diag::error(message).label(bounds.span, "required here");
                if !stage.save.is_empty() {
                    diag = diag.help(format!("what the stage has trained is in `{}` all the same", stage.output_dir));
                }
                return Err(diag);
            }
        }
        Ok(())
    }

    /// Metrics that have just left the range in which they are healthy.
    pub(crate) fn health(&mut self, step: u64, metrics: &Metrics) -> Vec<Event> {
        let mut events = Vec::new();
        for bounds in &self.program.stage.health {
            let Some((name, value)) = find(metrics, &bounds.metric) else { continue };
            if holds(bounds, value) {
                self.unhealthy.remove(name);
            } else if self.unhealthy.insert(name.to_string()) {
                events.push(Event::Health { step, metric: name.into(), value, low: bounds.low, high: bounds.high });
            }
        }
        events
    }
}

/// A body of one call that is run in parts and takes nothing but the held-out rows and what is the same for each.
fn alone(evaluate: &Evaluate) -> Option<(&Call, Parts<'_>)> {
    let [Statement::Call(call)] = &evaluate.body[..] else { return None };
    let batch = format!("{}.eval.", evaluate.source);
    let of_rows = |operand: &Operand| match operand {
        Operand::Path(path) => path.starts_with(&batch),
        Operand::State(_) | Operand::Number(_) => true,
    };
    let parts = call.steps.as_ref().and_then(Parts::of_call).filter(|_| !call.cached);
    parts.filter(|_| call.args.iter().all(|(_, operand)| of_rows(operand))).map(|parts| (call, parts))
}

/// A metric by its name, without the role or source that tells it apart where it is the only one of this name.
pub(crate) fn find<'a>(metrics: &'a Metrics, name: &str) -> Option<(&'a str, f64)> {
    let exact = metrics.get_key_value(name);
    let after = || metrics.iter().find(|(n, _)| n.strip_suffix(name).is_some_and(|head| head.ends_with('/')));
    exact.or_else(after).map(|(name, value)| (name.as_str(), *value))
}

fn holds(bounds: &Bounds, value: f64) -> bool {
    bounds.low.is_none_or(|low| value >= low) && bounds.high.is_none_or(|high| value <= high) && !value.is_nan()
}

/// In words: `at least 0.6`.
fn range(bounds: &Bounds) -> String {
    match (bounds.low, bounds.high) {
        (Some(low), Some(high)) => format!("{low} to {high}"),
        (Some(low), None) => format!("at least {low}"),
        (None, Some(high)) => format!("at most {high}"),
        (None, None) => "a number".into(),
    }
}
