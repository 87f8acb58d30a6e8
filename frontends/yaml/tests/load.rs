//! Pipelines to stages: which setting counts, what models and rows are bound to, and `--resolved`.

mod common;

use std::path::Path;

use common::{Machine, machine};
use dsgc_ir::diag::Span;
use dsgc_ir::stage::{Held, Operand, Origin, ScheduleKind, Stage, Statement};
use dsgc_yaml::load::{FolderModel, Loaded, Options, load};
use dsgc_yaml::render::{Look, render};

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

/// Loads a text as the file `pipeline.yaml`; a panic with the messages if it does not load.
#[track_caller]
fn loaded(machine: Machine, text: &str, sets: &[&str]) -> Loaded {
    let options = Options { sets: sets.iter().map(|s| s.to_string()).collect(), ..Options::default() };
    match load(Path::new("pipeline.yaml"), &options, &machine.with("pipeline.yaml", text)) {
        Ok(loaded) => loaded,
        Err(failed) => panic!("{}", render(&failed.diags, &failed.sources, Look::Plain)),
    }
}

#[track_caller]
fn stage(text: &str, sets: &[&str]) -> Stage {
    loaded(machine(), text, sets).stages.remove(0).stage
}

#[test]
fn a_pipeline_becomes_a_stage() {
    let stage = stage(SFT, &[]);
    assert_eq!((stage.name.as_str(), stage.output_dir.as_str()), ("sft", "runs/pipeline/sft"));
    assert!(matches!(stage.roles[0].origin, Origin::Random));
    let source = &stage.sources[0];
    assert_eq!((source.path.as_str(), source.tokenizer.as_str()), ("pairs.jsonl", "tok"));
    assert_eq!((source.pad_id, source.eoc_id, source.max_length), (1, 2, 32));
    assert_eq!((source.batch_size, source.micro_batch_size), (8, 4));
    assert_eq!(source.eval, Some(Held::Share(0.25)));
    assert_eq!(stage.save, ["model"]);
}

#[test]
fn the_program_of_a_stage_is_whole() {
    let program = loaded(machine(), SFT, &[]).stages.remove(0);
    dsgc_ir::verify::verify(&program).unwrap();
    let names: Vec<&str> = program.graphs.iter().map(|g| g.name.as_str()).collect();
    assert_eq!(names, ["loss", "model.init"]);
    let loss = program.graph("loss").unwrap();
    let range = |dim: &str| loss.dim_range(dim).map(|d| (d.min, d.max));
    assert_eq!((range("B"), range("T")), (Some((1, 8)), Some((1, 32))), "a whole batch, and rows of up to max_length");
    let Statement::For { body, .. } = &program.stage.plan[0] else { panic!() };
    let [Statement::Update(update)] = &body[..] else { panic!() };
    let arg = |batch: &str, name: &str| (format!("text.{name}"), Operand::Path(format!("{batch}.text.{name}")));
    let args = |batch: &str| ["tokens", "segment", "trained"].map(|name| arg(batch, name));
    assert_eq!(update.terms[0].args, args("batch"));
    let [Statement::Call(call)] = &program.stage.evaluate[0].body[..] else { panic!() };
    assert_eq!(call.args, args("text.eval"));
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
    let stages = |loaded: &Loaded| -> Vec<Stage> { loaded.stages.iter().map(|p| placeless(p.stage.clone())).collect() };
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

#[test]
fn a_folder_is_read_by_the_rules_of_its_model() {
    let text = SFT.replace(
        "{model: opt, tokenizer: tok, config: {hidden: 8, layers: 2, heads: 2, ffn: 16, max_positions: 64}}",
        "tiny",
    );
    let loaded = loaded(machine(), &text, &[]);
    let role = &loaded.stages[0].stage.roles[0];
    assert_eq!((&role.origin, role.tokenizer.as_deref()), (&Origin::Folder("tiny".into()), Some("tiny")));
    assert_eq!(role.model.family, "opt");
    assert_eq!(role.model.unused, ["dropout"], "what the model does not use is listed");
    assert_eq!(
        serde_json::Value::from(role.model.config.clone()),
        serde_json::from_str::<serde_json::Value>(common::TINY).unwrap()
    );
    for line in [
        "# in config.json, kept and not used: dropout\n",
        "# vocab: 104 ",
        "# norm_first: true ",
        "# tied: true ",
        "# activation: relu ",
    ] {
        assert!(loaded.resolved.contains(line), "{line} in {}", loaded.resolved);
    }
}

#[test]
fn the_config_of_random_weights_reads_back_as_the_same_model() {
    let config = "hidden: 8, layers: 2, heads: 2, ffn: 16, max_positions: 64, embed: 4, activation: gelu_tanh, \
                  norm_first: false, final_norm: false, tied: false";
    let text = SFT.replace("hidden: 8, layers: 2, heads: 2, ffn: 16, max_positions: 64", config);
    let first = loaded(machine(), &text, &[]);
    let written = first.stages[0].stage.roles[0].model.config.clone();
    assert_eq!(written["architectures"], serde_json::json!(["OPTForCausalLM"]));
    assert_eq!(written["model_type"], "opt");
    assert_eq!(written["activation_function"], "gelu_new", "their name for ours");
    assert_eq!(written["_remove_final_layer_norm"], true, "the opposite of ours");
    assert_eq!((&written["vocab_size"], &written["pad_token_id"]), (&100.into(), &1.into()), "from the tokenizer");
    let json = serde_json::to_string(&written).unwrap();
    let folder = machine().with("saved/config.json", &json).with("saved/tokenizer.json", "[100, 1, 2, 2]");
    let start = text.find("{model: opt").unwrap();
    let end = start + text[start..].find('\n').unwrap();
    let again = loaded(folder, &format!("{}saved{}", &text[..start], &text[end..]), &[]);
    // The lines of the config, without where each value came from.
    let values = |text: &str, from: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|l| !l.contains(from)).skip(1).take_while(|l| l.starts_with("      "));
        lines
            .map(|l| l.trim_start_matches([' ', '#']).split(" #").next().unwrap_or_default().trim().to_owned())
            .collect()
    };
    let config = values(&first.resolved, "    config:");
    assert!(config.len() > 10);
    assert_eq!(config, values(&again.resolved, "# config:"));
}

#[test]
fn a_stage_begins_with_the_result_of_an_earlier_one() {
    let text = format!("{SFT}  more: {{recipe: sft, model: sft, data: chats, max_length: 16}}\n");
    let loaded = loaded(machine(), &text, &["output_dir=out"]);
    let [first, second] = &loaded.stages[..] else { panic!() };
    assert_eq!(second.stage.roles[0].origin, Origin::Stage(first.stage.output_dir.clone()));
    assert_eq!(second.stage.roles[0].origin, Origin::Stage("out/sft".into()));
    assert_eq!(second.stage.roles[0].tokenizer.as_deref(), Some("tok"), "inherited");
    assert_eq!(second.stage.roles[0].model, first.stage.roles[0].model);
}

#[test]
fn extends_replaces_whole_entries() {
    let mine = "\
recipe: mine
extends: sft
options:
  max_length: 24
defaults:
  model: {learning_rate: 7e-4}
";
    let text = SFT
        .replace("  sft:\n", "  sft:\n    recipe: ./own/mine.yaml\n")
        .replace("    max_length: 32\n    batch", "    batch");
    let text = text.replace("    learning_rate: 1e-3\n", "");
    let stage = loaded(machine().with("own/mine.yaml", mine), &text, &[]).stages.remove(0).stage;
    assert_eq!(stage.sources[0].max_length, 24);
    assert_eq!(stage.trainings[0].schedule.learning_rate, 7e-4);
    assert_eq!(
        stage.trainings[0].schedule.kind,
        ScheduleKind::Linear,
        "`model` is one entry: nothing of sft's is left"
    );
    assert_eq!(stage.plan.len(), 1, "the plan is inherited");
}

#[test]
fn rows_are_bound_by_their_columns() {
    let source = |data: &str| stage(&SFT.replace("{path: pairs.jsonl, eval: 0.25}", data), &[]).sources.remove(0);
    let parts = |data: &str| source(data).sequences.remove(0).parts;
    assert_eq!(parts("{path: pairs.jsonl}").len(), 3, "prompt, chosen, eoc");
    assert_eq!(parts("{path: texts.jsonl}").len(), 2, "text, eoc");
    let renamed =
        source("{path: texts.jsonl, fields: {prompt: text, chosen: text}, train_on_prompt: false, prefix: ' '}");
    assert_eq!(renamed.fields["chosen"], "text");
    assert!(!renamed.train_on_prompt);
    assert_eq!(renamed.prefix, " ");
    let split =
        source("{path: texts.jsonl, split: {reward: 4, sft: 2}, shuffle: deepspeed_chat, pad_to_max: true}").split;
    assert_eq!(split.map(|s| (s.parts, s.part)), Some((vec![4.0, 2.0], 1)));
}

#[test]
fn paths_start_from_the_file_that_names_them() {
    let files = machine()
        .with("deep/pairs.jsonl", r#"{"prompt": "a", "chosen": "b"}"#)
        .with("deep/tok/tokenizer.json", "[100, 1, 2, 2]")
        .with("deep/pipeline.yaml", SFT);
    let load = |sets: &[&str]| {
        let options = Options { sets: sets.iter().map(|s| s.to_string()).collect(), ..Options::default() };
        let loaded = load(Path::new("deep/pipeline.yaml"), &options, &files).unwrap();
        loaded.stages[0].stage.sources[0].clone()
    };
    assert_eq!((load(&[]).path.as_str(), load(&[]).tokenizer.as_str()), ("deep/pairs.jsonl", "deep/tok"));
    assert_eq!(load(&["data.chats.path=./pairs.jsonl"]).path, "pairs.jsonl", "--set: from the working directory");
}

#[test]
fn any_folder_can_be_scored() {
    let program = FolderModel::open(Path::new("tiny"), &machine()).unwrap().score(3, 16).unwrap();
    dsgc_ir::verify::verify(&program).unwrap();
    let graph = program.graph("score").unwrap();
    let ty = |name: &str| graph.ty(graph.output_named(name).unwrap()).to_string();
    assert_eq!((ty("logits").as_str(), ty("logp").as_str()), ("f32[B, T, 104]", "f32[B, T-1]"));
    assert_eq!(graph.dim_range("B").map(|d| d.max), Some(3));
    let too_long = FolderModel::open(Path::new("tiny"), &machine()).unwrap().score(3, 65).unwrap_err();
    assert_eq!(too_long.diags[0].message, "found rows of 65 tokens, but `tiny` has 64 positions");
}

/// A recipe that takes a function from a file, with a choice in its plan.
const MINE: &str = "\
recipe: mine
extends: sft
use: [./lib.yaml]
options:
  max_length: 32
  twice: false
graphs:
  loss:
    in:
      text: sequence[B, T]
    let:
      - nll: -next_logp(model(text), text.tokens)
    out:
      loss: halved(mean(nll, where=text.trained[:, 1:]))
plan:
  - for: batch
    in: text
    do:
      - if: twice
        do:
          - repeat: 2
            do:
              - update(model, loss(text=batch.text))
        else:
          - update(model, loss(batch.text))
";

const LIB: &str = "\
functions: lib
graphs:
  halved:
    in: {x: \"f[]\"}
    out: x / 2
tests:
  - graph: halved
    given: {x: 3.0}
    expect: {out: 1.5}
";

#[test]
fn functions_come_from_files_and_plans_are_decided_at_load() {
    let text = SFT.replace("  sft:\n", "  sft:\n    recipe: own/mine.yaml\n");
    let files = || machine().with("own/mine.yaml", MINE).with("own/lib.yaml", LIB);
    let body = |sets: &[&str]| {
        let loaded = loaded(files(), &text, sets);
        assert!(loaded.tests.iter().any(|t| t.name.contains("halved")), "the tests of every document in use");
        let mut plan = loaded.stages[0].stage.plan.clone();
        let Statement::For { body, .. } = plan.remove(0) else { panic!() };
        body
    };
    let tokens = Operand::Path("batch.text.tokens".into());
    assert!(matches!(&body(&[])[..], [Statement::Update(u)] if u.terms[0].args[0].1 == tokens));
    let twice = body(&["sft.twice=true"]);
    let [Statement::Repeat { times: 2, body }] = &twice[..] else { panic!("{twice:?}") };
    assert!(matches!(&body[..], [Statement::Update(u)] if u.terms[0].args[0].1 == tokens));
}

#[test]
fn a_stage_saves_what_it_says_and_nothing_if_it_says_so() {
    assert_eq!(stage(SFT, &[]).save, ["model"], "every trained role");
    assert!(stage(&format!("{SFT}    save: []\n"), &[]).save.is_empty());
    assert_round_trip(&format!("{SFT}    save: []\n"), &[]);
}
