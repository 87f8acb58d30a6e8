//! Updates and calls in parts, schedules over loops, evaluation, and what a stage must reach.

use dsgc_runtime::{Event, Metrics};
use serde_json::{Value, json};

use super::common::{Place, Ran, call, minibatches, run};

/// A parameter `w` that every step makes larger by the learning rate; losses of `w` and the batch, as the pass
/// `autodiff` would cut them for two rows per call; and a call with rows and numbers.
const GRAPHS: &str = "
param @model/w : f32[] trained

; Sum of the tokens, then of the squares of their shares in it, then of each square's share in that times w: w itself,
; if the sums are those of all parts.
graph @share.count(%tokens: i32[B, T]) {
  dim B: 0..2 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %sum = reduce_sum %x axes=[0, 1]
  return sum.0=%sum
}
graph @share.count2(%tokens: i32[B, T], %sum.0: f32[]) {
  dim B: 0..2 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %all = broadcast %sum.0 shape=[B, T]
  %share = div %x, %all
  %square = mul %share, %share
  %squares = reduce_sum %square axes=[0, 1]
  return sum.1=%squares
}
graph @share.grad(%tokens: i32[B, T], %sum.0: f32[], %sum.1: f32[]) {
  dim B: 0..2 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %all = broadcast %sum.0 shape=[B, T]
  %share = div %x, %all
  %square = mul %share, %share
  %squares = reduce_sum %square axes=[0, 1]
  %of_all = div %squares, %sum.1
  %w = read @model/w
  %part = mul %of_all, %w
  return sum.2=%part
}
graph @share.finish(%sum.0: f32[], %sum.2: f32[]) {
  return loss=%sum.2, tokens=%sum.0
}

graph @most.grad(%tokens: i32[B, T]) {
  dim B: 0..2 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %most = reduce_max %x axes=[0, 1]
  return max.0=%most
}
graph @most.finish(%max.0: f32[]) {
  return loss=%max.0
}

graph @apply(%lr: f32[], %t: i32[]) {
  %w = read @model/w
  %new = add %w, %lr
  write @model/w %new
  return grad_norm=%lr
}

; The graph of this name is what is cut: `rows` and `finish` are its parts.
graph @look.rows(%tokens: i32[B, T], %number: f32[]) {
  dim B: 0..2 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %row = reduce_sum %x axes=[1]
  %sum = reduce_sum %row axes=[0]
  %rows = size dim=B dtype=f32
  return seq.value=%row, sum.0=%sum, sum.1=%rows
}
graph @look.finish(%sum.0: f32[], %sum.1: f32[], %number: f32[]) {
  %mean = div %sum.0, %sum.1
  %scaled = mul %mean, %number
  return mean=%scaled
}

graph @total(%value: f32[B]) {
  dim B: 1..8 batch
  %total = reduce_sum %value axes=[0]
  %least = reduce_min %value axes=[0]
  return total=%total, least=%least
}
";

/// The call that is cut.
fn look(name: Option<&str>, tokens: &str, number: f64) -> Value {
    let mut look = call(name, "look", &[("tokens", tokens)]);
    look["call"]["args"].as_array_mut().expect("a list").push(json!(["number", {"number": number}]));
    look["call"]["steps"] = json!({"split": {"count": [], "rows": "look.rows", "finish": "look.finish"}});
    look
}

/// An optimizer step on losses: graph, weight, rounds of totals.
fn update(terms: &[(&str, f64, &[&str])], tokens: &str) -> Value {
    let args = json!([["tokens", {"path": tokens}]]);
    let term = |(graph, weight, _): &(&str, f64, &[&str])| json!({"weight": weight, "graph": graph, "args": args});
    let steps = |(graph, _, count): &(&str, f64, &[&str])| json!({"count": count, "grad": format!("{graph}.grad"), "finish": format!("{graph}.finish")});
    let split = json!({
        "terms": terms.iter().map(steps).collect::<Vec<_>>(), "apply": "apply",
    });
    json!({"update": {
        "role": "model", "terms": terms.iter().map(term).collect::<Vec<_>>(), "steps": {"split": split},
    }})
}

const SHARE: (&str, f64, &[&str]) = ("share", 2.0, &["share.count", "share.count2"]);

/// Settings of the role's training: the learning rate falls from 1 in a straight line.
fn training() -> Value {
    json!([{
        "role": "model",
        "optimizer": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "no_decay": []},
        "schedule": {"learning_rate": 1.0, "kind": "linear", "warmup_steps": 0, "warmup_ratio": 0.0, "clamp": true},
        "max_grad_norm": null
    }])
}

/// Rows of different lengths, three to a batch.
fn place() -> (Place, Value) {
    let place = Place::new(&["w1", "w2 w3", "w4", "w6", "w5 w1", "w2"]);
    let mut source = place.source();
    source["batch_size"] = json!(3);
    (place, source)
}

fn ran(body: Value, more: Value) -> Ran {
    let (place, source) = place();
    let mut stage = place.stage(body, json!({"sources": [source], "trainings": training()}));
    for (key, value) in more.as_object().expect("settings by name") {
        stage[key] = value.clone();
    }
    run(GRAPHS, &stage)
}

/// Numbers without what rounding does to thirds.
fn rounded(metrics: &Metrics) -> Metrics {
    metrics.iter().map(|(name, value)| (name.clone(), (value * 1e12).round() / 1e12)).collect()
}

fn metrics(pairs: &[(&str, f64)]) -> Metrics {
    pairs.iter().map(|(name, value)| (name.to_string(), *value)).collect()
}

#[test]
fn one_loss_is_told_as_it_is() {
    let ran = ran(json!([update(&[SHARE], "batch.seq.tokens")]), json!({}));
    // The first batch is 1 + 2 + 3 + 4; w is 0, then 1.
    let first = metrics(&[("loss", 0.0), ("tokens", 10.0), ("grad_norm", 1.0), ("lr", 1.0)]);
    assert_eq!(ran.steps()[0], &first);
    assert_eq!(rounded(ran.steps()[1])["loss"], 2.0, "the weight is part of the loss");
}

#[test]
fn several_losses_are_added_and_told_apart() {
    let ran = ran(json!([update(&[SHARE, ("most", 0.5, &[])], "batch.seq.tokens")]), json!({}));
    let second = [
        ("loss", 2.0 * 1.0 + 0.5 * 6.0),
        ("share/loss", 1.0),
        ("share/tokens", 14.0),
        ("most/loss", 6.0),
        ("grad_norm", 0.5),
        ("lr", 0.5),
    ];
    assert_eq!(rounded(ran.steps()[1]), metrics(&second));
}

#[test]
fn rows_of_parts_stand_together_and_numbers_are_of_all() {
    let total = call(None, "total", &[("value", "looked.seq.value")]);
    let ran = ran(json!([look(Some("looked"), "batch.seq.tokens", 3.0), total]), json!({}));
    assert_eq!(ran.metric("mean"), [10.0, 14.0]);
    assert_eq!(ran.metric("total"), [10.0, 14.0]);
    assert_eq!(ran.metric("least"), [1.0, 2.0]);
}

#[test]
fn the_learning_rate_is_laid_out_for_all_steps_of_the_role() {
    let join = json!({"join": {"name": "table", "parts": ["batch.seq"]}});
    let visit = minibatches(2, None, false, json!([update(&[("most", 1.0, &[])], "mini.tokens")]));
    let ran = ran(json!([join, {"repeat": {"times": 3, "body": [visit]}}]), json!({}));
    // Two batches of three rows are two minibatches each, three times over: 12 steps, of which the sixth and the last
    // are told.
    assert_eq!(ran.metric("lr"), [1.0 - 5.0 / 12.0, 1.0 - 11.0 / 12.0]);
}

/// An evaluation of the same rows.
fn held(body: Value, more: Value) -> Ran {
    let (place, mut source) = place();
    source["eval"] = json!({"path": place.path("rows.jsonl")});
    let mut stage = place.stage(
        json!([]),
        json!({"sources": [source], "output_dir": "runs", "evaluate": [{"source": "text", "body": body}]}),
    );
    for (key, value) in more.as_object().expect("settings by name") {
        stage[key] = value.clone();
    }
    run(GRAPHS, &stage)
}

fn evaluations(ran: &Ran) -> Vec<&Metrics> {
    let events = ran.events.iter();
    events.filter_map(|event| if let Event::Evaluated { metrics, .. } = event { Some(metrics) } else { None }).collect()
}

#[test]
fn the_held_out_rows_are_one_batch() {
    let alone = held(json!([look(None, "text.eval.seq.tokens", 6.0)]), json!({}));
    assert!(alone.end.is_ok(), "{:?}", alone.end);
    assert_eq!(evaluations(&alone), [&metrics(&[("mean", 24.0)]); 2]);
    let total = call(None, "total", &[("value", "looked.seq.value")]);
    let body = held(json!([look(Some("looked"), "text.eval.seq.tokens", 6.0), total]), json!({}));
    assert!(body.end.is_ok(), "{:?}", body.end);
    assert_eq!(evaluations(&body), [&metrics(&[("least", 1.0), ("mean", 24.0), ("total", 24.0)]); 2]);
}

#[test]
fn a_stage_fails_that_does_not_reach_what_it_must() {
    let span = json!({"source": 0, "line": 9, "column": 5, "len": 4});
    let required = |metric: &str, low: Option<f64>, high: Option<f64>| {
        let require = json!([{"metric": metric, "low": low, "high": high, "span": span}]);
        held(json!([look(None, "text.eval.seq.tokens", 1.0)]), json!({"require": require}))
    };
    assert!(required("mean", Some(4.0), Some(4.0)).end.is_ok());
    let error = required("mean", Some(4.5), None).error();
    assert!(error.contains("found `mean` = 4 at the end of the stage `test`, expected at least 4.5"), "{error}");
    assert!(error.contains("9:5: "), "{error}");
    let error = required("mean", None, Some(3.0)).error();
    assert!(error.contains("expected at most 3"), "{error}");
    let error = required("median", Some(4.5), Some(5.0)).error();
    assert!(error.contains("found no `median` of an evaluation, expected 4.5 to 5"), "{error}");
}

#[test]
fn a_metric_that_leaves_its_range_is_told_when_it_does() {
    let (place, mut source) = place();
    source["batch_size"] = json!(1);
    let health =
        json!([{"metric": "mean", "low": 3.0, "high": null, "span": {"source": 0, "line": 0, "column": 0, "len": 0}}]);
    let body = json!([look(None, "batch.seq.tokens", 1.0)]);
    let ran = run(GRAPHS, &place.stage(body, json!({"sources": [source], "num_epochs": 2.0, "health": health})));
    // Of 1, 5, 4, 6, 6, 2 and again, the first and the two in the middle, one after the other, are too low.
    assert_eq!(ran.metric("mean")[5..7], [2.0, 1.0]);
    let told = |event: &Event| match event {
        Event::Health { step, metric, value, low, high } => Some((*step, metric.clone(), *value, *low, *high)),
        _ => None,
    };
    let told: Vec<_> = ran.events.iter().filter_map(told).collect();
    let expected = |step, value| (step, "mean".to_string(), value, Some(3.0), None);
    assert_eq!(told, [expected(1, 1.0), expected(6, 2.0), expected(12, 2.0)]);
}
