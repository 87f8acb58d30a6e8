//! `metric_for_best_model` and `greater_is_better`: which checkpoint is kept beside the newest ones.

use std::collections::BTreeSet;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Best, Statement};
use dsgc_ir::{DType, Program};

use super::documents::Documents;
use super::settings;
use crate::literal::Constant;
use crate::pipeline::{Pipeline, Setting};
use crate::schema::words;

const METRIC: &str = "metric_for_best_model";
const GREATER: &str = "greater_is_better";

/// Metrics of which less is better, by how their names end.
const SMALLER: [&str; 3] = ["loss", "ppl", "perplexity"];

fn find<'a>(given: &'a [Setting], key: &str) -> Option<&'a Setting> {
    given.iter().find(|setting| setting.key.text == key)
}

/// What the keys say.
pub(super) fn read(documents: &mut Documents<'_>, given: &[Setting]) -> Option<Best> {
    let constant = |key| find(given, key).map(|setting| settings::literal(&setting.value).value);
    match (constant(METRIC), constant(GREATER)) {
        (Some(Constant::Str(metric)), greater) => {
            let greater = match greater {
                Some(Constant::Bool(greater)) => greater,
                _ => !SMALLER.iter().any(|ending| metric.ends_with(ending)),
            };
            Some(Best { metric, greater })
        }
        (None, Some(_)) => {
            let span = find(given, GREATER).map(|setting| setting.key.span);
            let diag = Diag::error(format!("found `{GREATER}` without `{METRIC}`"));
            documents.error(diag.label(span.unwrap_or_default(), "").help(format!("name the metric in `{METRIC}`")));
            None
        }
        _ => None,
    }
}

/// Leaves it to the stages whose evaluations give the metric. One that none gives is an error, or a warning
/// where only one stage is to run: others may give it.
pub(super) fn of_stages(documents: &mut Documents<'_>, pipeline: &Pipeline, stages: &mut [Program], only_one: bool) {
    let Some(setting) = find(&pipeline.settings, METRIC) else { return };
    let (mut all, mut has_any) = (BTreeSet::new(), false);
    for program in stages {
        let metrics = evaluated(program);
        let Some(best) = &program.stage.checkpoints.best else { return };
        // With several sources, the name of one may stand before.
        let name = best.metric.rsplit('/').next().unwrap_or_default();
        match metrics.contains(name) {
            true => has_any = true,
            false => program.stage.checkpoints.best = None,
        }
        all.extend(metrics);
    }
    // What is wrong with a stage may be why it gives no metric.
    if has_any || !documents.errors.is_empty() {
        return;
    }
    let span = setting.value.span;
    let found = settings::literal(&setting.value).value;
    let found = super::shown(&found);
    let help = match all.is_empty() {
        true => "hold rows out with `eval` of the data, so that a stage is evaluated".into(),
        false => format!("evaluations give {}", words(&all.into_iter().collect::<Vec<_>>())),
    };
    if only_one {
        let warning = Diag::warning(format!("found {found} as `{METRIC}`, which no evaluation of this stage gives"));
        documents.warnings.push(warning.label(span, "").help(help));
    } else {
        let error = Diag::error(format!("found {found} as `{METRIC}`, which no evaluation gives"));
        documents.error(error.label(span, "").help(help));
    }
}

/// Metrics of a stage's evaluations: numbers that the graphs give which are called on held-out rows.
fn evaluated(program: &Program) -> BTreeSet<String> {
    fn calls<'a>(body: &'a [Statement], into: &mut Vec<&'a str>) {
        for statement in body {
            match statement {
                Statement::Call(call) => into.push(&call.graph),
                Statement::For { body, .. } | Statement::Repeat { body, .. } => calls(body, into),
                _ => {}
            }
        }
    }
    let held = |source: &str| program.stage.sources.iter().any(|s| s.name == source && s.eval.is_some());
    let mut called = Vec::new();
    program.stage.evaluate.iter().filter(|e| held(&e.source)).for_each(|e| calls(&e.body, &mut called));
    let graphs = program.graphs.iter().filter(|graph| called.contains(&graph.name.as_str()));
    let number = |graph: &dsgc_ir::Graph, value| {
        let ty = graph.ty(value);
        ty.dims.is_empty() && ty.dtype == DType::F32
    };
    graphs.flat_map(|graph| graph.outputs.iter().filter(|(_, v)| number(graph, *v)).map(|(n, _)| n.clone())).collect()
}
