//! Whatever a user writes, loading ends with a program or with messages that point somewhere.

mod common;

use std::path::Path;

use common::machine;
use dsgc_yaml::load::{Options, check};
use dsgc_yaml::render::{Look, render};

const PIPELINE: &str = "\
dsgc: 1
seed: 7
models:
  base: {model: opt, tokenizer: tok, config: {hidden: 8, layers: 1, heads: 2, ffn: 16, max_positions: 64}}
  other: tiny
data:
  chats:
    path: pairs.jsonl
    eval: 0.25
    fields: {prompt: prompt, chosen: chosen}
    split: {sft: 2, more: 3}
defaults:
  warmup_ratio: 0.1
stages:
  sft:
    recipe: ./mine.yaml
    model: {model: base, adam_betas: [0.9, 0.99]}
    data: {text: chats}
    batch_size: 8
    micro_batch_size: 4
    max_length: 32
    save: [model]
  more: {recipe: sft, model: sft, data: chats, max_length: 16}
";

const RECIPE: &str = "\
recipe: mine
extends: sft
options:
  max_length: {default: 64, type: int}
  weight: 0.5
defaults:
  model: {learning_rate: 1e-4}
graphs:
  loss:
    in:
      text: sequence[B, T]
    let:
      - logp: next_logp(model(text), text.tokens)
      - nll: mean(-logp, where=text.trained[:, 1:])
    out:
      loss: weight * nll
plan:
  - for: batch
    in: text
    do:
      - repeat: 2
        do:
          - update(model, loss(batch))
";

const ODD: [&str; 9] = ["", "~", "[]", "{}", "-1", "1e300", "9223372036854775807", "none", "\"\\u0085'\""];

/// `text` with each word between spaces, brackets and commas replaced in turn, and with each line left out.
fn changed(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let bytes = text.as_bytes();
    let is_word = |i: usize| i < bytes.len() && !b" \n{}[]():,=*".contains(&bytes[i]);
    for start in (0..bytes.len()).filter(|&i| is_word(i) && (i == 0 || !is_word(i - 1))) {
        let end = (start..).find(|&i| !is_word(i)).unwrap_or(bytes.len());
        all.extend(ODD.iter().map(|odd| format!("{}{odd}{}", &text[..start], &text[end..])));
    }
    let lines: Vec<&str> = text.lines().collect();
    for skipped in 0..lines.len() {
        all.push(lines.iter().enumerate().filter(|(i, _)| *i != skipped).map(|(_, l)| format!("{l}\n")).collect());
    }
    all
}

#[track_caller]
fn ends_well(pipeline: &str, recipe: &str) -> bool {
    let machine = machine().with("p.yaml", pipeline).with("mine.yaml", recipe);
    match check(Path::new("p.yaml"), &Options::default(), &machine) {
        Ok(loaded) => {
            for program in &loaded.stages {
                if let Err(fault) = dsgc_ir::verify::verify(program) {
                    panic!("{fault}\n{pipeline}\n{recipe}");
                }
            }
            true
        }
        Err(failed) => {
            let placed = failed.diags.iter().all(|d| !d.labels.is_empty());
            render(&failed.diags, &failed.sources, Look::Plain);
            assert!(placed, "a message without a place: {:#?}\n{pipeline}\n{recipe}", failed.diags);
            false
        }
    }
}

#[test]
fn changed_documents_load_or_say_why() {
    assert!(ends_well(PIPELINE, RECIPE));
    let pipelines = changed(PIPELINE).into_iter().map(|text| ends_well(&text, RECIPE));
    let recipes = changed(RECIPE).into_iter().map(|text| ends_well(PIPELINE, &text));
    let (good, bad): (Vec<bool>, Vec<bool>) = pipelines.chain(recipes).partition(|good| *good);
    // Both kinds are there, or nothing was changed where it matters.
    assert!(good.len() > 30 && bad.len() > 500, "{} load, {} do not", good.len(), bad.len());
}
