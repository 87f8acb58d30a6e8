//! The settings of LoRA.
//!
//! `lora_r` turns it on; the others then have values too: PEFT's `lora_alpha` of 8, no dropout, `all_linear` (the choice of
//! QLoRA; PEFT has a list per architecture, and models here are documents), and `lora_save: both`: the merged model is what
//! the next stage and every other program reads, the adapter is small and says what was trained.

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Lora, LoraSave, Targets};

use super::models::{Known, Weights};
use super::settings::{Decided, Provenance, parsed};
use crate::literal::Constant;

/// What the keys beside `lora_r` are where nobody says so, and why.
fn defaults(random: bool) -> [(&'static str, &'static str, &'static str); 5] {
    let save = match random {
        true => ("lora_save", "merged", "the model has random weights, which no adapter can name"),
        false => ("lora_save", "both", "lora_r"),
    };
    [
        ("lora_alpha", "8", "lora_r, as in PEFT"),
        ("lora_dropout", "0", "lora_r, as in PEFT"),
        ("lora_target_modules", "all_linear", "lora_r"),
        ("lora_continue", "false", "lora_r"),
        save,
    ]
}

fn find<'d>(training: &'d [Decided], key: &str) -> Option<&'d Decided> {
    training.iter().find(|decided| decided.key == key)
}

/// Fills in what follows from `lora_r`, and notes what does not go together.
pub(super) fn settle(training: &mut [Decided], known: &Known, errors: &mut Vec<Diag>) {
    let weights = &known.weights;
    let on = find(training, "lora_r").is_some_and(|r| r.count().is_some());
    let random = *weights == Weights::Random;
    for (key, value, why) in defaults(random) {
        let Some(decided) = training.iter_mut().find(|decided| decided.key == key) else { continue };
        match (on, &decided.from) {
            (true, Provenance::Default) => {
                decided.node = parsed(value);
                decided.from = Provenance::Derived(why.into());
            }
            (false, from) if *from != Provenance::Default => errors.push(
                Diag::error(format!("found `{key}` without `lora_r`, which turns LoRA on"))
                    .label(decided.node.span, "")
                    .help("write `lora_r: 16` beside it"),
            ),
            _ => {}
        }
    }
    if !on {
        return;
    }
    if *weights == Weights::Small {
        // An adapter would be one of the whole model.
        for (key, value) in [("lora_save", "merged"), ("lora_continue", "false")] {
            training.iter_mut().filter(|d| d.key == key).for_each(|decided| decided.node = parsed(value));
        }
    }
    if let Some(save) = find(training, "lora_save").filter(|save| random && save.text() != "merged") {
        errors.push(
            Diag::error("found an adapter to be saved of a model with random weights")
                .label(save.node.span, "")
                .help("nobody could load it: its base would be nowhere; write `lora_save: merged`"),
        );
    }
    if let Some(continues) = find(training, "lora_continue").filter(|it| is_true(it) && !known.adapter) {
        let what = match weights {
            Weights::Random | Weights::Small => "with random weights".to_string(),
            Weights::Folder(folder) => format!("in `{folder}`, which is no adapter and has none beside it"),
            Weights::Stage(folder) => format!("in `{folder}`, whose stage leaves no adapter"),
        };
        errors.push(
            Diag::error(format!("found `lora_continue` for a model {what}"))
                .label(continues.node.span, "")
                .help("name the folder of an adapter under `models`, or a stage with `lora_r` that saves one"),
        );
    }
}

fn is_true(decided: &Decided) -> bool {
    decided.constant() == Constant::Bool(true)
}

/// What is on the host side.
pub(super) fn lora(training: &[Decided]) -> Option<Lora> {
    let r = find(training, "lora_r")?;
    let targets = find(training, "lora_target_modules")?;
    Some(Lora {
        r: usize::try_from(r.count()?).ok()?,
        alpha: find(training, "lora_alpha")?.float()?,
        dropout: find(training, "lora_dropout")?.float()?,
        // PEFT's spelling of it is another one.
        targets: match targets.words().iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["all_linear" | "all-linear"] => Targets::AllLinear,
            _ => Targets::Named(targets.patterns()),
        },
        save: match find(training, "lora_save")?.text() {
            "adapter" => LoraSave::Adapter,
            "merged" => LoraSave::Merged,
            _ => LoraSave::Both,
        },
        continues: is_true(find(training, "lora_continue")?),
        span: r.node.span,
        adapter: None,
    })
}

/// Whether a stage leaves an adapter of the role.
pub(super) fn leaves_adapter(training: &[Decided]) -> bool {
    lora(training).is_some_and(|lora| lora.save != LoraSave::Merged)
}

/// Whether a stage leaves an adapter of the role and no merged model.
pub(super) fn leaves_adapter_only(training: &[Decided]) -> bool {
    lora(training).is_some_and(|lora| lora.save == LoraSave::Adapter)
}
