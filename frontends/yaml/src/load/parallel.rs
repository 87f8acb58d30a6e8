//! `compile.devices`, `compile.zero_stage` and `compile.parallel`: the ranks that run a pipeline together.

use dsgc_ir::Mesh;
use dsgc_ir::diag::{Diag, Span};

use super::declared::shown;
use super::documents::Documents;
use super::settings;
use crate::literal::Constant;
use crate::node::Value;
use crate::pipeline::Setting;

/// Ranks, and what those with different rows share out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parallel {
    pub mesh: Mesh,
    pub zero_stage: u8,
    /// Where `tensor` stands.
    pub tensor: Span,
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
            ("pipeline", Constant::Int(1)) => {}
            ("pipeline" | "schedule" | "microbatches", Constant::Int(1..) | Constant::Str(_)) => {
                let message = format!("`{}: {}` is not part of this version", key.text, shown(&given).replace('`', ""));
                documents.error(
                    Diag::error(message)
                        .label(value.span, "")
                        .help("ranks can have different rows, `data`, or share every layer, `tensor`"),
                );
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
    let mesh = Mesh { data: number(data, 1), tensor: number(tensor, 1), ..Mesh::default() };
    let span = tensor.0.map_or(Span::NONE, |(_, span)| span);
    Parallel { mesh, zero_stage: number(zero, 0) as u8, tensor: span }
}
