//! `compile.devices`, `compile.zero_stage` and `compile.parallel`: the ranks that run a pipeline together.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::schedule::PipelineOrder;
use dsgc_ir::{Mesh, stage};

use super::declared::shown;
use super::documents::Documents;
use super::settings::{self, Decided};
use crate::literal::Constant;
use crate::node::Value;
use crate::pipeline::Setting;

/// Ranks, and what those with different rows share out.
#[derive(Clone, Debug, Default)]
pub(super) struct Parallel {
    pub mesh: Mesh,
    pub zero_stage: u8,
    /// What passes and the runtime are told besides.
    pub said: stage::Parallel,
    /// How many parts a batch has, and where that stands.
    microbatches: Option<(usize, Span)>,
}

impl Parallel {
    /// Rows per optimizer step and per call, where `microbatches` says how many calls there are.
    pub fn sizes(
        &self,
        documents: &mut Documents<'_>,
        run: &[Decided],
        (rows, micro): (u64, u64),
    ) -> Option<(u64, u64)> {
        let Some((parts, span)) = self.microbatches else { return Some((rows, micro)) };
        let shares = parts.saturating_mul(self.mesh.data) as u64;
        if shares > rows {
            let of = if self.mesh.data > 1 { format!(" of {} ranks", self.mesh.data) } else { String::new() };
            let message = format!("found {parts} as `microbatches`{of}, expected at most one for each of {rows} rows");
            documents.error(Diag::error(message).label(span, "").help("`batch_size` says how many rows a step has"));
            return None;
        }
        let wanted = rows.div_ceil(shares);
        let given = run.iter().find(|d| d.key == "micro_batch_size").filter(|d| d.count().is_some());
        if let Some(given) = given.filter(|_| micro != wanted) {
            let message = format!("found a micro_batch_size of {micro}, and `microbatches: {parts}` makes it {wanted}");
            documents
                .error(Diag::error(message).label(given.node.span, "").label(span, "the other").help("leave one out"));
            return None;
        }
        Some((rows, wanted))
    }
}

/// A number that stands in two places.
#[derive(Clone, Copy, Default)]
struct Given(Option<(usize, Span)>);

impl Given {
    /// Takes a number; another one before it is an error.
    fn set(&mut self, documents: &mut Documents<'_>, number: usize, span: Span, what: &str) {
        match self.0.replace((number, span)) {
            Some((before, place)) if before != number => {
                let message = format!("found {number} as {what}, and {before} in another place");
                documents.error(Diag::error(message).label(span, "").label(place, "the other").help("leave one out"));
            }
            _ => {}
        }
    }
}

/// Reads what stands in `compile`.
pub(super) fn read(documents: &mut Documents<'_>, compile: &[Setting]) -> Parallel {
    let (mut data, mut tensor, mut zero) = (Given::default(), Given::default(), Given::default());
    let (mut pipeline, mut parts, mut order, mut chunks) = (Given::default(), Given::default(), None, Given::default());
    let mut overlap = true;
    let mut read = |documents: &mut Documents<'_>, Setting { key, value }: &Setting| {
        let given = settings::literal(value).value;
        let at_least_one = || format!("found {} as `{}`, expected at least 1", shown(&given), key.text);
        match (key.text.as_str(), &given) {
            ("devices" | "data", Constant::Int(ranks @ 1..)) => {
                data.set(documents, *ranks as usize, value.span, "the number of ranks with different rows");
            }
            ("zero_stage", Constant::Int(stage @ 0..=3)) => {
                zero.set(documents, *stage as usize, value.span, "`zero_stage`");
            }
            ("zero_stage", _) => {
                let message = format!("found {} as `zero_stage`, expected 0 to 3", shown(&given));
                documents.error(
                    Diag::error(message)
                        .label(value.span, "")
                        .help("0 shares nothing out, 1 the optimizer's moments, 2 gradients too, 3 parameters too"),
                );
            }
            ("tensor", Constant::Int(ranks @ 1..)) => {
                tensor.set(documents, *ranks as usize, value.span, "`tensor`");
            }
            ("pipeline", Constant::Int(ranks @ 1..)) => {
                pipeline.set(documents, *ranks as usize, value.span, "`pipeline`");
            }
            ("microbatches", Constant::Int(count @ 1..)) => {
                parts.set(documents, *count as usize, value.span, "`microbatches`");
            }
            ("virtual_stages", Constant::Int(count @ 1..)) => {
                chunks.set(documents, *count as usize, value.span, "`virtual_stages`");
            }
            ("schedule", Constant::Str(name)) => {
                let found = PipelineOrder::ALL.into_iter().find(|order| order.name() == name);
                order = found.map(|found| (found, value.span));
            }
            ("overlap_comm", Constant::Bool(whether)) => overlap = *whether,
            // The readers of the file saw that nothing else is a key, or a number of another kind.
            _ => documents.error(Diag::error(at_least_one()).label(value.span, "")),
        }
    };
    for setting in compile {
        match (setting.key.text.as_str(), &setting.value.value) {
            ("devices" | "zero_stage", _) => read(documents, setting),
            ("parallel", Value::Map(entries)) => {
                for (key, value) in entries {
                    read(documents, &Setting { key: key.clone(), value: value.clone() });
                }
            }
            _ => {}
        }
    }
    let number = |given: Given, default: usize| given.0.map_or(default, |(number, _)| number);
    let span = |given: Given| given.0.map(|(_, span)| span);
    let mesh = Mesh { data: number(data, 1), tensor: number(tensor, 1), pipeline: number(pipeline, 1) };
    let needs_places =
        [("schedule", order.map(|(_, span)| span)), ("microbatches", span(parts)), ("virtual_stages", span(chunks))];
    for (what, given) in needs_places {
        if let Some(span) = given.filter(|_| mesh.pipeline == 1) {
            let message = format!("found `{what}` without ranks that share the layers out");
            documents.error(Diag::error(message).label(span, "").help("write `pipeline: 2` or more, or leave it out"));
        }
    }
    let order = order.map(|(order, _)| order).unwrap_or_default();
    let interleaved = order == PipelineOrder::Interleaved;
    if let (Some(span), false) = (span(chunks), interleaved || mesh.pipeline == 1) {
        let message =
            format!("found `virtual_stages`, and in `schedule: {}` every rank has one run of layers", order.name());
        let help = format!("write `schedule: {}`, or leave it out", PipelineOrder::Interleaved.name());
        documents.error(Diag::error(message).label(span, "").help(help));
    }
    let said = stage::Parallel {
        tensor: span(tensor).unwrap_or_default(),
        pipeline: span(pipeline).unwrap_or_default(),
        order,
        virtual_stages: number(chunks, if interleaved { 2 } else { 1 }),
        overlap_comm: overlap,
    };
    Parallel { mesh, zero_stage: number(zero, 0) as u8, said, microbatches: parts.0 }
}
