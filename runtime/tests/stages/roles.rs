//! Where the weights of roles come from.

use std::path::Path;

use dsgc_ir::stage::Model;
use dsgc_ir::{StateId, Tensor};
use dsgc_runtime::{Event, Session};
use serde_json::{Value, json};

use super::common::{Place, open};

/// Two roles of two parameters, of which `body` is drawn by both and `head` by the second one, and a state.
const GRAPHS: &str = "
param @actor/body : f32[3] trained
param @actor/head : f32[2] trained
param @ref/body : f32[3]
param @ref/head : f32[2]
state @state/coefficient : f32[]

graph @actor.init(%key: key[]) {
  %body = random_normal %key shape=[3] mean=0.0 std=1.0
  %head = random_normal %key shape=[2] mean=10.0 std=1.0
  write @actor/body %body
  write @actor/head %head
  return
}

graph @states() {
  %coefficient = const value=0.25 dtype=f32
  write @state/coefficient %coefficient
  return
}
";

fn role(name: &str, origin: Value, may_be_new: &[&str]) -> Value {
    json!({
        "name": name, "origin": origin, "init": format!("{name}.init"), "trained": name == "actor", "tokenizer": null,
        "model": {"family": "test", "config": {}, "tensors": {"may_be_new": may_be_new}, "unused": []},
    })
}

fn session(roles: Value, events: &mut Vec<Event>) -> Result<Session, String> {
    let place = Place::new(&["w1"]);
    let stage = place.stage(json!([]), json!({"roles": roles, "init": "states", "seed": 5}));
    open(GRAPHS, &stage, events).map_err(|errors| errors.iter().map(|e| format!("{e}\n")).collect())
}

fn state(session: &Session, id: u32) -> Vec<f64> {
    session.device().state(StateId(id)).to_f64()
}

#[test]
fn a_snapshot_is_a_copy_of_the_role_as_it_begins() {
    // The role that it is of comes after it.
    let roles = json!([role("ref", json!({"snapshot": "actor"}), &[]), role("actor", json!("random"), &[])]);
    let session = session(roles, &mut Vec::new()).expect("it begins");
    assert!(state(&session, 0).iter().all(|&x| x != 0.0));
    assert_eq!(state(&session, 2), state(&session, 0));
    assert_eq!(state(&session, 3), state(&session, 1));
    assert_eq!(state(&session, 4), [0.25], "the recipe's states have their first values");
}

#[test]
fn snapshots_of_one_another_are_an_error() {
    let roles = json!([role("ref", json!({"snapshot": "actor"}), &[]), role("actor", json!({"snapshot": "ref"}), &[])]);
    let error = session(roles, &mut Vec::new()).err().expect("neither has weights");
    assert!(error.contains("found snapshots of one another or of no role: `ref`, `actor`"), "{error}");
}

/// A folder of a model that has a body only.
fn folder(path: &Path) -> Value {
    let model = Model { config: serde_json::from_str(r#"{"model_type": "test"}"#).expect("JSON"), ..Model::default() };
    let body = Tensor::f32(&[3], vec![1.0, 2.0, 3.0]);
    dsgc_hf::save(path, &model, &[("body".into(), &body)], None).expect("a new folder");
    json!({"folder": path.display().to_string()})
}

#[test]
fn parameters_that_may_be_new_begin_as_the_role_says_and_are_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let origin = folder(&dir.path().join("model"));
    let mut events = Vec::new();
    let new = session(json!([role("actor", origin.clone(), &["he*"])]), &mut events).expect("it begins");
    let random = session(json!([role("actor", json!("random"), &[])]), &mut Vec::new()).expect("it begins");
    assert_eq!(state(&new, 0), [1.0, 2.0, 3.0]);
    assert_eq!(state(&new, 1), state(&random, 1));
    assert_eq!(events[0], Event::New { role: "actor".into(), params: vec!["head".into()] });

    let error = session(json!([role("actor", origin, &[])]), &mut Vec::new()).err().expect("the head is missing");
    assert!(error.contains("found no tensor for parameter `head`"), "{error}");
}
