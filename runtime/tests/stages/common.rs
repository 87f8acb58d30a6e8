//! Stages out of text: graphs in the text form, a plan in JSON, and a folder with a few rows.

use std::fs;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Planned, parse};
use dsgc_kernels::interp::apart::plan_apart;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_runtime::{Event, Metrics, Session};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with rows of words and a tokenizer by which the word `w<i>` is the token `i`.
pub struct Place(pub TempDir);

/// What is left of a stage.
pub struct Ran {
    pub session: Session,
    pub events: Vec<Event>,
    pub end: Result<(), Diag>,
}

impl Place {
    /// One row for each text.
    pub fn new(texts: &[&str]) -> Place {
        let place = Place(tempfile::tempdir().expect("a temporary folder"));
        let rows: Vec<String> = texts.iter().map(|text| json!({"text": text}).to_string()).collect();
        fs::write(place.path("rows.jsonl"), rows.join("\n")).expect("a new file");
        let vocab: serde_json::Map<String, Value> = (0..40).map(|i| (format!("w{i}"), json!(i))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
            "model": {"type": "WordLevel", "unk_token": "w0", "vocab": vocab}
        });
        fs::write(place.path("tokenizer.json"), tokenizer.to_string()).expect("a new file");
        place
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// The rows as a source called `text` with the sequence `seq`, in batches of two, in the order of the file.
    pub fn source(&self) -> Value {
        json!({
            "name": "text", "path": self.path("rows.jsonl"), "tokenizer": self.path(""), "fields": {},
            "sequences": [{"name": "seq", "parts": [{"field": "text"}]}],
            "max_length": 8, "shuffle": "none", "batch_size": 2, "micro_batch_size": 2
        })
    }

    /// A stage of one epoch with this body of its loop over `text`, and further settings.
    pub fn stage(&self, body: Value, more: Value) -> Value {
        let mut stage = json!({
            "name": "test", "num_epochs": 1.0, "sources": [self.source()],
            "plan": [{"for": {"batch": "batch", "rows": {"source": "text"}, "body": body}}]
        });
        for (key, value) in more.as_object().expect("settings by name") {
            stage[key] = value.clone();
        }
        stage
    }
}

/// Opens a stage in the interpreter, which computes in doubles.
pub fn open(graphs: &str, stage: &Value, events: &mut Vec<Event>) -> Result<Session, Vec<Diag>> {
    let program = parse(&format!("{graphs}\nstage {stage}\n")).unwrap_or_else(|e| panic!("{e}"));
    let planned = Planned::new(plan_apart(program)).unwrap_or_else(|fault| panic!("{fault}"));
    let device = Interp::planned(planned.clone(), Precision::F64);
    Session::open(planned, Box::new(device), &mut |event| {
        events.push(event.clone());
        Ok(())
    })
}

/// Opens and runs a stage.
pub fn run(graphs: &str, stage: &Value) -> Ran {
    let mut events = Vec::new();
    let mut session = open(graphs, stage, &mut events).unwrap_or_else(|e| panic!("{e:?}"));
    let end = session.run(&mut |event| {
        events.push(event.clone());
        Ok(())
    });
    Ran { session, events, end }
}

impl Ran {
    /// The numbers of all steps of a stage that has come to its end.
    pub fn steps(&self) -> Vec<&Metrics> {
        assert!(self.end.is_ok(), "{:?}", self.end);
        let events = self.events.iter();
        events.filter_map(|event| if let Event::Step { metrics, .. } = event { Some(metrics) } else { None }).collect()
    }

    /// A metric of all steps; NaN where a step does not have it.
    pub fn metric(&self, name: &str) -> Vec<f64> {
        self.steps().iter().map(|metrics| metrics.get(name).copied().unwrap_or(f64::NAN)).collect()
    }

    /// The message of the error at the end.
    pub fn error(&self) -> String {
        self.end.as_ref().expect_err("the stage ends with an error").to_string()
    }
}

/// A call of a graph; `args` are input and path.
pub fn call(name: Option<&str>, graph: &str, args: &[(&str, &str)]) -> Value {
    let args: Vec<Value> = args.iter().map(|(input, path)| json!([input, {"path": path}])).collect();
    json!({"call": {"name": name, "graph": graph, "args": args, "cached": false, "steps": "whole"}})
}

/// A loop over minibatches called `mini` of a record called `table`.
pub fn minibatches(size: usize, keep: Option<&str>, shuffle: bool, body: Value) -> Value {
    let rows = json!({"minibatches": {"table": "table", "size": size, "keep": keep, "shuffle": shuffle}});
    json!({"for": {"batch": "mini", "rows": rows, "body": body}})
}
