//! `metrics.jsonl`: one JSON object per line, as the numbers come.
//!
//! ```text
//! {"stage":"sft","step":0,"eval/loss":6.9,"eval/ppl":992.3,"seconds":0.8}
//! {"stage":"sft","step":1,"epoch":0.01,"loss":6.9,"lr":0.0,"grad_norm":1.7,"tokens":812,"tokens_per_second":1603.2}
//! ```
//!
//! JSON has no infinity and no NaN: such numbers are written as the strings `"inf"`, `"-inf"` and `"nan"`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use dsgc_ir::diag::Diag;
use serde_json::{Map, Value, json};

use crate::session::{Event, Metrics};

/// The file of one run of a stage.
pub struct MetricsFile {
    stage: String,
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Begins `metrics.jsonl` in a folder, which is made if it is not there. The file of an earlier run is kept as
    /// `metrics.<n>.jsonl`.
    pub fn create(folder: &Path, stage: &str) -> Result<MetricsFile, Diag> {
        MetricsFile::begin(folder, stage, |_| String::new())
    }

    /// Goes on with `metrics.jsonl` after a step. Lines of later steps, which are yet to come again, are left in
    /// `metrics.<n>.jsonl` with all others.
    pub fn resume(folder: &Path, stage: &str, step: u64) -> Result<MetricsFile, Diag> {
        let before = |line: &&str| match serde_json::from_str::<Value>(line) {
            Ok(line) => line["step"].as_u64().is_some_and(|of| of <= step),
            // Half a line, of a run that was killed.
            Err(_) => false,
        };
        MetricsFile::begin(folder, stage, |old| old.lines().filter(before).map(|line| format!("{line}\n")).collect())
    }

    /// Puts an old file aside and begins one with what is left of it.
    fn begin(folder: &Path, stage: &str, left: impl Fn(&str) -> String) -> Result<MetricsFile, Diag> {
        let path = folder.join("metrics.jsonl");
        let failed = |e: std::io::Error| Diag::error(format!("cannot write `{}`: {e}", path.display()));
        fs::create_dir_all(folder).map_err(failed)?;
        let mut begin = String::new();
        if path.exists() {
            begin = left(&fs::read_to_string(&path).map_err(failed)?);
            let free = (1..).map(|n| folder.join(format!("metrics.{n}.jsonl"))).find(|p| !p.exists());
            fs::rename(&path, free.expect("some number is free")).map_err(failed)?;
        }
        let mut file = File::create(&path).map_err(failed)?;
        file.write_all(begin.as_bytes()).map_err(failed)?;
        Ok(MetricsFile { stage: stage.into(), path, file })
    }

    /// Writes what an event says, if it has numbers.
    pub fn write(&mut self, event: &Event) -> Result<(), Diag> {
        let Some(line) = line(&self.stage, event) else { return Ok(()) };
        // One write per line: a reader never sees half of one, and a crash loses none.
        let text = format!("{line}\n");
        self.file
            .write_all(text.as_bytes())
            .map_err(|e| Diag::error(format!("cannot write `{}`: {e}", self.path.display())))
    }
}

fn line(stage: &str, event: &Event) -> Option<Value> {
    let mut line = Map::new();
    line.insert("stage".into(), json!(stage));
    let add = |prefix: &str, metrics: &Metrics| {
        metrics.iter().map(|(name, &x)| (format!("{prefix}{name}"), number(x))).collect::<Vec<_>>()
    };
    match event {
        Event::Data { .. }
        | Event::New { .. }
        | Event::Health { .. }
        | Event::NoRows { .. }
        | Event::Waited { .. }
        | Event::Checkpoint { .. }
        | Event::Saved { .. } => {
            return None;
        }
        Event::Evaluated { step, metrics, seconds, .. } => {
            line.insert("step".into(), json!(step));
            line.extend(add("eval/", metrics));
            line.insert("seconds".into(), json!(seconds));
        }
        Event::Step { step, epoch, metrics, tokens, seconds, .. } => {
            line.insert("step".into(), json!(step));
            line.insert("epoch".into(), json!(epoch));
            line.extend(add("", metrics));
            line.insert("tokens".into(), json!(tokens));
            line.insert("tokens_per_second".into(), number(*tokens as f64 / seconds));
        }
    }
    Some(Value::Object(line))
}

fn number(x: f64) -> Value {
    match x {
        x if x.is_finite() => json!(x),
        x if x.is_nan() => json!("nan"),
        x if x > 0.0 => json!("inf"),
        _ => json!("-inf"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json_and_older_files_are_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let metrics = Metrics::from([("loss".into(), 2.5), ("ppl".into(), f64::INFINITY)]);
        let event = Event::Step { step: 1, steps: 2, epoch: 0.5, metrics, tokens: 100, seconds: 0.5 };
        for _ in 0..2 {
            let mut file = MetricsFile::create(folder.path(), "sft").expect("it can be written");
            file.write(&event).expect("it can be written");
        }
        for name in ["metrics.jsonl", "metrics.1.jsonl"] {
            let text = fs::read_to_string(folder.path().join(name)).expect("it is there");
            let expected =
                r#"{"stage":"sft","step":1,"epoch":0.5,"loss":2.5,"ppl":"inf","tokens":100,"tokens_per_second":200.0}"#;
            assert_eq!(text, format!("{expected}\n"));
        }
    }
}
