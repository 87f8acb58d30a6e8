//! Pipelines to stages: which setting counts, what models and rows are bound to, and `--resolved`.

mod common;

use common::{loaded, machine};
use dsgc_ir::diag::Span;
use dsgc_ir::stage::{Held, Origin, ScheduleKind, Stage};

const SFT: &str = "\
dsgc: 1
models:
  base: {model: opt, tokenizer: tok, config: {hidden: 8, layers: 2, heads: 2, ffn: 16, max_positions: 64}}
data:
  chats: {path: pairs.jsonl, eval: 0.25}
stages:
  sft:
    model: base
    data: chats
    max_length: 32
    batch_size: 8
    micro_batch_size: 4
    learning_rate: 1e-3
";

#[track_caller]
fn stage(text: &str, sets: &[&str]) -> Stage {
    loaded(machine(), text, sets).stages.remove(0).stage
}

#[test]
fn a_pipeline_becomes_a_stage() {
    let stage = stage(SFT, &[]);
    assert_eq!((stage.name.as_str(), stage.output_dir.as_str()), ("sft", "runs/pipeline/sft"));
    assert!(matches!(stage.roles[0].origin, Origin::Random { .. }));
    let source = &stage.sources[0];
    assert_eq!((source.path.as_str(), source.tokenizer.as_str()), ("pairs.jsonl", "tok"));
    assert_eq!((source.pad_id, source.eoc_id, source.max_length), (1, 2, 32));
    assert_eq!((source.batch_size, source.micro_batch_size), (8, 4));
    assert_eq!(source.eval, Some(Held::Share(0.25)));
    assert_eq!(stage.save, ["model"]);
}

#[test]
fn the_stronger_place_counts() {
    let rate = |text: &str, sets: &[&str]| stage(text, sets).trainings[0].schedule.learning_rate;
    let without = SFT.replace("    learning_rate: 1e-3\n", "");
    assert_eq!(rate(&without, &[]), 1e-5, "the recipe's default");
    let defaults = format!("{without}defaults: {{learning_rate: 2e-3}}\n");
    assert_eq!(rate(&defaults, &[]), 2e-3, "the pipeline's defaults");
    let both = format!("{SFT}defaults: {{learning_rate: 2e-3}}\n");
    assert_eq!(rate(&both, &[]), 1e-3, "the stage");
    let block = SFT.replace("model: base", "model: {model: base, learning_rate: 3e-3}");
    assert_eq!(rate(&block, &[]), 3e-3, "the role's block");
    assert_eq!(rate(&block, &["sft.learning_rate=4e-3"]), 4e-3, "--set, wherever it sets");
    assert_eq!(rate(&block, &["stages.sft.learning_rate=4e-3"]), 4e-3, "the long form of the same");
}

#[test]
fn settings_that_exclude_each_other_go_by_strength() {
    let text = format!("{SFT}defaults: {{warmup_steps: 10}}\n")
        .replace("    max_length", "    warmup_ratio: 0.1\n    max_length");
    let schedule = stage(&text, &[]).trainings[0].schedule.clone();
    assert_eq!((schedule.warmup_steps, schedule.warmup_ratio, schedule.kind), (0, 0.1, ScheduleKind::Cosine));
    let steps = SFT.replace("batch_size: 8\n", "gradient_accumulation_steps: 3\n");
    assert_eq!(stage(&steps, &[]).sources[0].batch_size, 12, "3 micro-batches of 4 rows");
    let weaker = format!("{steps}defaults: {{batch_size: 64}}\n");
    assert_eq!(stage(&weaker, &[]).sources[0].batch_size, 12);
    assert_eq!(stage(SFT, &["sft.gradient_accumulation_steps=2"]).sources[0].batch_size, 8);
}

/// Everything but places, which another text has elsewhere.
fn placeless(mut stage: Stage) -> Stage {
    stage.sources.iter_mut().for_each(|source| source.span = Span::NONE);
    stage
}

#[track_caller]
fn assert_round_trip(text: &str, sets: &[&str]) -> String {
    let first = loaded(machine(), text, sets);
    let again = loaded(machine(), &first.resolved, &[]);
    let stages = |loaded: &dsgc_yaml::load::Loaded| -> Vec<Stage> {
        loaded.stages.iter().map(|p| placeless(p.stage.clone())).collect()
    };
    assert_eq!(stages(&first), stages(&again), "{}", first.resolved);
    first.resolved
}

#[test]
fn the_resolved_text_loads_to_the_same_stages() {
    let text = assert_round_trip(SFT, &["sft.num_epochs=0.5", "data.chats.separator=' '"]);
    assert!(text.contains("learning_rate: 1e-3                        # pipeline.yaml:13"), "{text}");
    assert!(text.contains("num_epochs: 0.5                              # --set sft.num_epochs=0.5"), "{text}");
    assert!(text.contains("lr_scheduler_type: cosine                  # default of recipe sft"), "{text}");
    let steps = SFT.replace("batch_size: 8\n", "gradient_accumulation_steps: 3\n");
    assert!(
        assert_round_trip(&steps, &[])
            .contains("batch_size: 12                               # 4 rows x 3 micro-batches")
    );
    assert_round_trip(
        &SFT.replace("model: base\n", "model: {model: base, warmup_ratio: 0.1, max_grad_norm: none}\n"),
        &[],
    );
    assert_round_trip(
        &SFT.replace(
            "{model: opt, tokenizer: tok, config: {hidden: 8, layers: 2, heads: 2, ffn: 16, max_positions: 64}}",
            "tiny",
        ),
        &[],
    );
}
