//! `compile.devices`, `compile.zero_stage` and `compile.parallel`: the ranks that run a pipeline together.

use dsgc_ir::Mesh;
use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::schedule::PipelineOrder;

use super::declared::shown;
use super::documents::Documents;
use super::settings::{self, Decided};
use crate::literal::Constant;
use crate::node::Value;
use crate::pipeline::Setting;

/// Ranks, and what those with different rows share out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parallel {
    pub mesh: Mesh,
    pub zero_stage: u8,
    /// The order in which ranks with different layers work on parts of a batch.
    pub order: PipelineOrder,
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
    let (mut pipeline, mut parts, mut order) = (Given::default(), Given::default(), None);
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
            ("schedule", Constant::Str(name)) => {
                let found = PipelineOrder::ALL.into_iter().find(|order| order.name() == name);
                match found {
                    Some(found) => order = Some((found, value.span)),
                    None => {
                        let all = PipelineOrder::ALL.map(|order| format!("`{}`", order.name())).join(", ");
                        let message = format!("`schedule: {name}` is not part of this version");
                        documents.error(Diag::error(message).label(value.span, "").help(format!("there are {all}")));
                    }
                }
            }
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
    let mesh = Mesh { data: number(data, 1), tensor: number(tensor, 1), pipeline: number(pipeline, 1) };
    let microbatches = parts.0;
    for (what, given) in
        [("schedule", order.map(|(_, span)| span)), ("microbatches", microbatches.map(|(_, span)| span))]
    {
        if let Some(span) = given.filter(|_| mesh.pipeline == 1) {
            let message = format!("found `{what}` without ranks that share the layers out");
            documents.error(Diag::error(message).label(span, "").help("write `pipeline: 2` or more, or leave it out"));
        }
    }
    let order = order.map(|(order, _)| order).unwrap_or_default();
    Parallel { mesh, zero_stage: number(zero, 0) as u8, order, microbatches }
}
