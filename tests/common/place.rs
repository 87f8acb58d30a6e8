//! A folder in which a user works: a pipeline, eight rows of preferences, and the program itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use dsgc_ir::Tensor;
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// The folder; it goes away with this.
pub struct Place(TempDir);

impl Place {
    /// With a pipeline in which `TOKENIZER` stands for the example's; its rows are `rows.jsonl`.
    pub fn with(pipeline: &str) -> Place {
        let place = Place(tempfile::tempdir().expect("a temporary folder"));
        let tokenizer = format!("{}/examples/rlhf/tokenizer", env!("CARGO_MANIFEST_DIR"));
        let rows =
            (0..8).map(|i| format!("{{\"prompt\": \"Is it {i}?\", \"chosen\": \" Yes.\", \"rejected\": \" {i}\"}}\n"));
        fs::write(place.path("pipeline.yaml"), pipeline.replace("TOKENIZER", &tokenizer)).expect("a new file");
        fs::write(place.path("rows.jsonl"), rows.collect::<String>()).expect("a new file");
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs dsgc there.
    pub fn command(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_dsgc")).current_dir(&self.0).args(args).output().expect("dsgc runs")
    }

    /// What a command prints, with these settings.
    pub fn out(&self, args: &[&str], sets: &[&str]) -> String {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let ran = self.command(&args.iter().copied().chain(sets).collect::<Vec<_>>());
        assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).into_owned()
    }

    /// The lines of a stage's metrics that are steps.
    pub fn steps(&self, stage: &str) -> Vec<Value> {
        let metrics = fs::read_to_string(self.path(&format!("runs/{stage}/metrics.jsonl"))).expect("metrics");
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).expect("an object"));
        lines.filter(|line| line.get("epoch").is_some()).collect()
    }

    /// The tensors of a file.
    pub fn tensors(&self, file: &str) -> BTreeMap<String, Tensor> {
        let bytes = fs::read(self.path(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let read = SafeTensors::deserialize(&bytes).expect("safetensors");
        let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        read.tensors().into_iter().map(|(name, t)| (name, Tensor::f32(t.shape(), floats(t.data())))).collect()
    }
}
