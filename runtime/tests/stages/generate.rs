//! Generation with models of a few ops: which columns are fed, when rows end, and what does not change answers.

use dsgc_ir::{Data, StateId};
use serde_json::{Value, json};

use super::common::{Place, Ran, call, run};

/// Columns that the models have room for.
const WIDTH: usize = 8;

/// A model that adds all tokens so far, which it keeps in a state as a cache does, and the place of the new column. So
/// a column too many or too few shows in the answer. `kept` are answers as the plan sees them.
fn adder(rows: usize, kept: usize) -> String {
    let body = "
  %cache = read @cache
  %all = write_at %cache, %tokens, %place axis=1
  write @cache %all
  %seen = mul %all, %segment
  %x = cast %seen dtype=f32
  %sum = reduce_sum %x axes=[1]
  %at = cast %place dtype=f32
  %ats = broadcast %at shape=[ROWS]
  %next = add %sum, %ats
  %token = cast %next dtype=i32
  %logits = reshape %next shape=[ROWS, 1]
  return logits=%logits, token=%token
}";
    let count = "
  %calls = read @calls
  %one = const value=1.0 dtype=f32
  %more = add %calls, %one
  write @calls %more";
    graphs("state @cache : i32[ROWS, WIDTH]\nstate @calls : f32[]", &format!("{count}{body}"), rows, kept)
}

/// A model to which all of eight tokens are alike.
fn dice(rows: usize, kept: usize) -> String {
    let body = "
  %zero = const value=0.0 dtype=f32
  %logits = broadcast %zero shape=[ROWS, 8]
  %token = sample %logits, %key, %row, %place temperature=1.0 top_k=0 top_p=1.0
  return logits=%logits, token=%token
}";
    graphs("", body, rows, kept)
}

fn graphs(states: &str, body: &str, rows: usize, kept: usize) -> String {
    let text = format!(
        "
state @kept/tokens : i32[{kept}, 7]
state @kept/segment : i32[{kept}, 7]
state @kept/trained : bool[{kept}, 7]
state @kept/answer : bool[{kept}, 4]
{states}

graph @prefill(%tokens: i32[ROWS, Q], %segment: i32[ROWS, WIDTH], %place: i32[], %key: key[], %row: i32[ROWS]) {{
  dim Q: 1..4
{body}

graph @step(%tokens: i32[ROWS, 1], %segment: i32[ROWS, WIDTH], %place: i32[], %key: key[], %row: i32[ROWS]) {{
{body}

graph @keep(%tokens: i32[{kept}, 7], %segment: i32[{kept}, 7], %trained: bool[{kept}, 7], %answer: bool[{kept}, 4]) {{
  write @kept/tokens %tokens
  write @kept/segment %segment
  write @kept/trained %trained
  write @kept/answer %answer
  return
}}
"
    );
    text.replace("ROWS", &rows.to_string()).replace("WIDTH", &WIDTH.to_string())
}

fn generate(samples: usize, stop: Option<i32>) -> Value {
    json!({"generate": {
        "name": "rollout", "role": "model", "prompt": "batch.seq", "samples": samples, "max_new_tokens": 4,
        "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, "stop": stop, "pad": 30, "forward": "logits",
        "prompt_width": 4, "rows": 0, "steps": {"prefill": "prefill", "step": "step"}
    }})
}

fn keep(of: &str) -> Value {
    let args = ["tokens", "segment", "trained"].map(|name| (name, format!("{of}.{name}")));
    let mut args: Vec<(&str, &str)> = args.iter().map(|(name, path)| (*name, path.as_str())).collect();
    args.push(("answer", "rollout.answer"));
    call(None, "keep", &args)
}

/// Runs a stage whose only batch are three left-padded prompts of up to three tokens.
fn stage(graphs: &str, body: Value, seed: u64) -> Ran {
    let place = Place::new(&["w1 w2", "w5", "w1 w1"]);
    stage_in(&place, graphs, body, json!({"seed": seed}))
}

fn stage_in(place: &Place, graphs: &str, body: Value, more: Value) -> Ran {
    let mut source = place.source();
    source["batch_size"] = json!(3);
    source["pad"] = json!("left");
    source["max_length"] = json!(3);
    source["pad_to_max"] = json!(true);
    let mut stage = place.stage(body, more);
    stage["sources"] = json!([source]);
    let ran = run(graphs, &stage);
    assert!(ran.end.is_ok(), "{:?}", ran.end);
    ran
}

/// Rows of a state; truth values are 0 and 1.
fn rows(ran: &Ran, state: u32) -> Vec<Vec<i32>> {
    let tensor = ran.session.device().state(StateId(state));
    let all: Vec<i32> = match tensor.data {
        Data::I32(v) => v,
        Data::Bool(v) => v.into_iter().map(i32::from).collect(),
        other => panic!("{other:?}"),
    };
    all.chunks(tensor.shape[1]).map(<[i32]>::to_vec).collect()
}

#[test]
fn answers_continue_their_prompts_up_to_the_end_token() {
    for of in ["rollout", "rollout.seq"] {
        let ran = stage(&adder(2, 3), json!([generate(1, Some(7)), keep(of)]), 1);
        // Sums of all tokens, and 3, 4 and 5 as the places of the later columns.
        let tokens = [[0, 1, 2, 3, 9, 19, 39], [0, 0, 5, 5, 13, 27, 55], [0, 1, 1, 2, 7, 30, 30]];
        assert_eq!(rows(&ran, 0), tokens, "{of}");
        assert_eq!(rows(&ran, 1), [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]);
        assert_eq!(rows(&ran, 2), [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]);
        assert_eq!(rows(&ran, 3), [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]);
    }
}

#[test]
fn no_call_is_made_after_all_rows_have_ended() {
    let calls = |rows: usize, stop: Option<i32>| {
        let ran = stage(&adder(rows, 3), json!([generate(1, stop), keep("rollout")]), 1);
        ran.session.device().state(StateId(5)).scalar()
    };
    assert_eq!(calls(1, None), 12.0);
    assert_eq!(calls(1, Some(7)), 10.0, "the last prompt's answer has two tokens");
    assert_eq!(calls(3, Some(7)), 4.0);
}

#[test]
fn answers_to_a_prompt_stand_together_and_do_not_depend_on_the_size_of_calls() {
    let sampled = |rows_of_call: usize, seed: u64| {
        let ran = stage(&dice(rows_of_call, 9), json!([generate(3, Some(0)), keep("rollout")]), seed);
        (rows(&ran, 0), rows(&ran, 3))
    };
    let (tokens, answer) = sampled(9, 1);
    let prompts: Vec<&[i32]> = tokens.iter().map(|row| &row[..3]).collect();
    let expected = [[0, 1, 2], [0, 0, 5], [0, 1, 1]].map(|prompt| [prompt; 3]).concat();
    assert_eq!(prompts, expected);
    for (row, answer) in tokens.iter().zip(&answer) {
        let length = answer.iter().filter(|&&a| a == 1).count();
        let first_stop = row[3..].iter().position(|&t| t == 0).map_or(4, |at| at + 1);
        assert_eq!(length, first_stop, "{row:?} {answer:?}");
    }
    let distinct: std::collections::BTreeSet<&[i32]> = tokens.iter().map(|row| &row[3..]).collect();
    assert!(distinct.len() > 6, "{tokens:?}");
    for rows_of_call in [1, 2, 4, 16] {
        assert_eq!(sampled(rows_of_call, 1), (tokens.clone(), answer.clone()), "{rows_of_call} rows");
    }
    assert_ne!(sampled(9, 2).0, tokens);
}

#[test]
fn every_generation_draws_its_own_numbers_and_evaluation_changes_none() {
    let place = Place::new(&["w1 w2", "w5", "w1 w1"]);
    let body = json!([generate(1, None), keep("rollout")]);
    let tokens = |more: Value| rows(&stage_in(&place, &dice(3, 3), body.clone(), more), 0);
    let (first, second) = (tokens(json!({"num_epochs": 1.0})), tokens(json!({"num_epochs": 2.0})));
    assert_ne!(first, second);

    let mut held = place.source();
    held["name"] = json!("held");
    held["eval"] = json!({"path": place.path("rows.jsonl")});
    held["pad"] = json!("left");
    let mut evaluated = generate(1, None);
    evaluated["generate"]["prompt"] = json!("held.eval.seq");
    let mut source = place.source();
    source["batch_size"] = json!(3);
    source["pad"] = json!("left");
    source["pad_to_max"] = json!(true);
    source["max_length"] = json!(3);
    let more = json!({
        "num_epochs": 2.0, "eval_steps": 1, "sources": [source, held],
        "evaluate": [{"source": "held", "body": [evaluated]}],
    });
    let ran = run(&dice(3, 3), &place.stage(body.clone(), more));
    assert!(ran.end.is_ok(), "{:?}", ran.end);
    assert_eq!(rows(&ran, 0), second);
}

#[test]
fn a_prompt_that_is_too_long_is_an_error() {
    let place = Place::new(&["w1 w2 w3 w4 w5"]);
    let ran = run(&adder(1, 1), &place.stage(json!([generate(1, None)]), json!({})));
    assert!(ran.error().contains("found 5 more columns, and there is room for 4"), "{}", ran.error());
}
