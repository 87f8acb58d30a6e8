//! Statements of a plan on small tables: which rows are seen, in which order, under which names.

use super::common::{Place, call, minibatches, open, run};
use dsgc_runtime::Event;
use serde_json::json;

/// `note` writes the sum of all tokens as one more digit of a number; `keep` says of which rows the first token is
/// under 5; `ask` wants every token to be under 5.
const GRAPHS: &str = "
state @state/seen : f32[]

graph @note(%tokens: i32[B, T]) {
  dim B: 1..8 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %sum = reduce_sum %x axes=[0, 1]
  %seen = read @state/seen
  %ten = const value=10.0 dtype=f32
  %shifted = mul %seen, %ten
  %new = add %shifted, %sum
  write @state/seen %new
  return seen=%new
}

graph @keep(%tokens: i32[B, T]) {
  dim B: 1..8 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %first = slice %x axis=1 start=0 end=1
  %row = reduce_sum %first axes=[1]
  %five = const value=5.0 dtype=f32
  %fives = broadcast %five shape=[B]
  %keep = lt %row, %fives
  %total = reduce_sum %row axes=[0]
  return keep=%keep, double.first=%row, total=%total
}

graph @add(%tokens: i32[B, T], %number: f32[], %seen: f32[]) {
  dim B: 1..8 batch
  dim T: 1..8
  %sum = add %number, %seen
  return sum=%sum
}

graph @ask(%tokens: i32[B, T]) {
  dim B: 1..8 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %most = reduce_max %x axes=[0, 1]
  %five = const value=5.0 dtype=f32
  %under = lt %most, %five
  %holds = cast %under dtype=f32
  return most=%most, assert.0=%holds
}
";

/// The batch with what `keep` says of it, as the record `table`.
fn table() -> [serde_json::Value; 2] {
    [
        call(Some("kept"), "keep", &[("tokens", "batch.seq.tokens")]),
        json!({"join": {"name": "table", "parts": ["batch.seq", "kept.keep"]}}),
    ]
}

fn note(path: &str) -> serde_json::Value {
    call(None, "note", &[("tokens", path)])
}

/// The digits of a number.
fn digits(number: f64) -> String {
    format!("{number}")
}

fn sorted(text: &str) -> String {
    let mut all: Vec<char> = text.chars().collect();
    all.sort_unstable();
    all.into_iter().collect()
}

/// A source of all rows in one batch.
fn one_batch(place: &Place, rows: usize) -> serde_json::Value {
    let mut source = place.source();
    source["batch_size"] = json!(rows);
    json!([source])
}

#[test]
fn minibatches_drop_rows_and_draw_the_others_in_another_order_each_time() {
    let place = Place::new(&["w1", "w9", "w2", "w3", "w4", "w8"]);
    let [kept, join] = table();
    let visit = minibatches(1, Some("table.keep"), true, json!([note("mini.tokens")]));
    let body = json!([kept, join, {"repeat": {"times": 3, "body": [visit]}}]);
    let seen = |seed: u64| {
        let more = json!({"sources": one_batch(&place, 6), "seed": seed});
        digits(run(GRAPHS, &place.stage(body.clone(), more)).metric("seen")[0])
    };
    let first = seen(1);
    assert_eq!(first.len(), 12);
    let loops = [&first[..4], &first[4..8], &first[8..]];
    assert!(loops.iter().all(|l| sorted(l) == "1234"), "{first}");
    assert!(loops.iter().any(|l| *l != loops[0]), "each loop has its own order: {first}");
    assert_eq!(seen(1), first);
    assert_ne!(seen(2), first);
}

#[test]
fn the_last_minibatch_is_smaller_and_without_shuffle_rows_stay() {
    let place = Place::new(&["w1", "w2", "w3", "w1", "w1"]);
    let [kept, join] = table();
    let visit = minibatches(2, None, false, json!([note("mini.tokens")]));
    let ran = run(GRAPHS, &place.stage(json!([kept, join, visit]), json!({"sources": one_batch(&place, 5)})));
    assert_eq!(ran.metric("seen"), [341.0]);
}

#[test]
fn a_table_of_which_no_row_is_kept_is_told_and_nothing_is_done() {
    let place = Place::new(&["w7", "w9", "w1", "w2"]);
    let [kept, join] = table();
    let visit = minibatches(2, Some("kept.keep"), true, json!([note("mini.tokens")]));
    let ran = run(GRAPHS, &place.stage(json!([kept, join, visit]), json!({})));
    let seen = ran.metric("seen");
    assert!(seen[0].is_nan() && seen[1] == 3.0, "{seen:?}");
    let told: Vec<&Event> = ran.events.iter().filter(|e| matches!(e, Event::NoRows { .. })).collect();
    assert_eq!(told, [&Event::NoRows { table: "table".into(), rows: 2 }]);
}

#[test]
fn names_are_paths_and_those_of_a_loop_vanish() {
    let place = Place::new(&["w1", "w2"]);
    let [kept, join] = table();
    let inside = call(Some("inner"), "keep", &[("tokens", "mini.tokens")]);
    let body = json!([kept, join, minibatches(2, None, false, json!([inside])), note("inner.keep")]);
    let error = run(GRAPHS, &place.stage(body, json!({}))).error();
    assert!(error.contains("found no tensor `inner.keep`"), "{error}");
    assert!(error.contains("kept.double.first, kept.keep, kept.total, table.keep, table.segment"), "{error}");
    assert!(!error.contains("mini."), "{error}");
}

#[test]
fn operands_are_tensors_states_and_numbers() {
    let place = Place::new(&["w1", "w2"]);
    let mut add = call(None, "add", &[("tokens", "batch.seq.tokens")]);
    let more = [json!(["number", {"number": 0.5}]), json!(["seen", {"state": "seen"}])];
    add["call"]["args"].as_array_mut().expect("a list").extend(more);
    let ran = run(GRAPHS, &place.stage(json!([note("batch.seq.tokens"), add]), json!({})));
    assert_eq!(ran.metric("sum"), [3.5]);
}

#[test]
fn next_takes_batches_of_another_source_round_and_round() {
    let place = Place::new(&["w1", "w2", "w3"]);
    let mut other = place.source();
    other["name"] = json!("other");
    let mut first = place.source();
    first["batch_size"] = json!(1);
    let body = json!([{"next": {"name": "more", "source": "other"}}, note("more.seq.tokens")]);
    let ran = run(GRAPHS, &place.stage(body, json!({"sources": [first, other], "num_epochs": 5.0 / 3.0})));
    // Batches of two rows of three: 1 + 2, 3, and again.
    assert_eq!(ran.metric("seen"), [3.0, 33.0, 333.0, 3333.0, 33333.0]);
}

#[test]
fn a_replay_buffer_keeps_the_newest_rows_of_all_steps() {
    let place = Place::new(&["w1", "w2", "w3", "w4", "w5", "w6"]);
    let recent = json!({"recent": {"name": "table", "table": "batch.seq", "rows": 3}});
    let visit = minibatches(1, None, false, json!([note("mini.tokens")]));
    let ran = run(GRAPHS, &place.stage(json!([recent, visit]), json!({})));
    assert_eq!(ran.metric("seen").last(), Some(&12234456.0));
}

#[test]
fn a_replay_buffer_of_rows_of_different_widths_is_an_error() {
    let place = Place::new(&["w1", "w2", "w3 w4", "w5"]);
    let recent = json!({"recent": {"name": "table", "table": "batch.seq", "rows": 3}});
    let error = run(GRAPHS, &place.stage(json!([recent]), json!({}))).error();
    assert!(error.contains("rows of `segment` of `batch.seq` have the shapes [1] and [2]"), "{error}");
}

#[test]
fn a_join_takes_each_member_once() {
    let place = Place::new(&["w1", "w2"]);
    let [kept, _] = table();
    let join = json!({"join": {"name": "table", "parts": ["kept", "kept.keep"]}});
    let error = run(GRAPHS, &place.stage(json!([kept, join]), json!({}))).error();
    assert!(error.contains("found two members `keep` in join(kept, kept.keep)"), "{error}");
}

#[test]
fn what_a_graph_demands_of_its_inputs_ends_the_stage_where_it_does_not_hold() {
    let place = Place::new(&["w1", "w2", "w3", "w7"]);
    let span = json!({"source": 0, "line": 4, "column": 2, "len": 5});
    let assert = json!({"graph": "ask", "output": "assert.0", "message": "found a token over 4", "span": span});
    let stage = place
        .stage(json!([call(Some("asked"), "ask", &[("tokens", "batch.seq.tokens")])]), json!({"asserts": [assert]}));
    let ran = run(GRAPHS, &stage);
    let error = ran.error();
    assert!(error.contains("found a token over 4") && error.contains("4:2: "), "{error}");
    let steps: Vec<_> = ran
        .events
        .iter()
        .filter_map(|e| if let Event::Step { metrics, .. } = e { Some(metrics) } else { None })
        .collect();
    assert_eq!(steps.len(), 1, "the second batch breaks it");
    assert_eq!(steps[0].keys().collect::<Vec<_>>(), ["most"], "an assertion is no metric");
}

#[test]
fn cached_outputs_are_computed_once_for_each_row() {
    let place = Place::new(&["w1", "w2", "w3"]);
    let cached = |graph: &str| {
        let mut cached = call(Some("old"), graph, &[("tokens", "batch.seq.tokens")]);
        cached["call"]["cached"] = json!(true);
        cached
    };
    // `once` counts the rows that it is run on.
    let graphs = format!(
        "{GRAPHS}
state @state/count : f32[]

graph @once(%tokens: i32[B, T]) {{
  dim B: 1..8 batch
  dim T: 1..8
  %x = cast %tokens dtype=f32
  %row = reduce_sum %x axes=[1]
  %rows = size dim=B dtype=f32
  %count = read @state/count
  %new = add %count, %rows
  write @state/count %new
  return value=%row
}}

graph @sum(%value: f32[B], %count: f32[]) {{
  dim B: 1..8 batch
  %sum = reduce_sum %value axes=[0]
  return sum=%sum, count=%count
}}
"
    );
    let mut sum = call(None, "sum", &[("value", "old.value")]);
    sum["call"]["args"].as_array_mut().expect("a list").push(json!(["count", {"state": "count"}]));
    let mut source = place.source();
    source["shuffle"] = json!("each_epoch");
    let more = json!({"sources": [source], "num_epochs": 3.0, "seed": 3});
    let ran = run(&graphs, &place.stage(json!([cached("once"), sum]), more));
    let sums = ran.metric("sum");
    let per_epoch: Vec<f64> = sums.chunks(2).map(|s| s.iter().sum()).collect();
    assert_eq!(per_epoch, [6.0; 3], "every row has its own value: {sums:?}");
    assert!(sums.chunks(2).any(|s| s != &sums[..2]), "rows come in other orders: {sums:?}");
    assert_eq!(ran.metric("count"), [2.0, 3.0, 3.0, 3.0, 3.0, 3.0]);

    let error = run(GRAPHS, &place.stage(json!([cached("keep")]), json!({}))).error();
    assert!(error.contains("`keep` cannot be cached: `total` has the shape []"), "{error}");
    let [kept, join] = table();
    let mut of_table = call(None, "keep", &[("tokens", "table.tokens")]);
    of_table["call"]["cached"] = json!(true);
    let error = run(GRAPHS, &place.stage(json!([kept, join, of_table]), json!({}))).error();
    assert!(error.contains("`table.tokens` is no part of the only batch that it takes"), "{error}");
}

#[test]
fn plans_of_another_form_are_refused_before_anything_is_read() {
    let place = Place::new(&["w1"]);
    let refused = |plan: serde_json::Value| {
        let stage = place.stage(json!([]), json!({"plan": plan}));
        let errors = open(GRAPHS, &stage, &mut Vec::new()).err().expect("the stage cannot begin");
        errors[0].to_string()
    };
    let over = |body| json!({"for": {"batch": "batch", "rows": {"source": "text"}, "body": body}});
    let nested = refused(json!([over(json!([{"repeat": {"times": 2, "body": [over(json!([]))]}}]))]));
    assert!(nested.contains("a `for` over data inside another one"), "{nested}");
    let two = refused(json!([over(json!([])), over(json!([]))]));
    assert!(two.contains("found 2 statements in the plan"), "{two}");
}
