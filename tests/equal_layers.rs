//! Equal layers stay equal: after every pass, the bodies of the inner instances of a repeated block are the same but for
//! the layer's number, in every graph and phase.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Graph, Op, OpId, Program, Tag, Value};
use dsgc_kernels::cpu::CpuTarget;
use dsgc_passes::{PassContext, compile};
use dsgc_yaml::load::{Host, Options, TokenizerFacts, load};
use serde_json::{Map, Value as Json};

const LAYERS: u32 = 5;
const PIPELINE: &str = "
dsgc: 1
models:
  base: {model: opt, tokenizer: tok, config: {vocab: 24, hidden: 16, layers: 5, heads: 2, ffn: 32, max_positions: 32}}
data:
  rows: {path: rows.jsonl, eval: 0.5}
stages:
  sft: {model: base, data: rows, max_length: 8, batch_size: 4, weight_decay: 0.1}
";

struct Files;

impl Host for Files {
    fn text(&self, _: &Path) -> io::Result<String> {
        Ok(PIPELINE.into())
    }
    fn hf_config(&self, _: &Path) -> Result<Map<String, Json>, Diag> {
        Err(Diag::error("there is no folder"))
    }
    fn tokenizer(&self, _: &Path) -> Result<TokenizerFacts, Diag> {
        Ok(TokenizerFacts { vocab: 24, pad: Some(1), eos: Some(2), bos: Some(2) })
    }
    fn columns(&self, _: &Path) -> Result<Vec<String>, Diag> {
        Ok(vec!["text".into()])
    }
}

/// The ops of every instance of every block, as text that does not say which instance it is.
fn bodies(graph: &Graph, program: &Program) -> BTreeMap<String, BTreeMap<u32, Vec<String>>> {
    // The place of each tagged op among those of its instance.
    let mut places: BTreeMap<OpId, usize> = BTreeMap::new();
    let mut counts: BTreeMap<(String, u32), usize> = BTreeMap::new();
    for (id, op) in graph.ops() {
        if let Some(tag) = &op.site.tag {
            let count = counts.entry((tag.block.to_string(), tag.instance)).or_default();
            places.insert(id, *count);
            *count += 1;
        }
    }
    let mut bodies: BTreeMap<String, BTreeMap<u32, Vec<String>>> = BTreeMap::new();
    for (_, op) in graph.ops() {
        let Some(tag) = &op.site.tag else { continue };
        let operands: Vec<String> = op.args.iter().map(|&v| operand(graph, v, tag, &places)).collect();
        let what = match op.op {
            Op::Read { state } | Op::Write { state } => {
                let name = &program.state(state).name;
                format!("{} {}", op.op.name(), name.replace(&format!(".{}.", tag.instance), ".*."))
            }
            // Numbers of the layer, such as the key of its initial values, are the layer's own.
            Op::Fold { .. } => "fold".into(),
            Op::Dropout { p, .. } => format!("dropout p={p}"),
            ref other => other.to_string(),
        };
        let types: Vec<String> = op.results().map(|v| graph.ty(v).to_string()).collect();
        let text = format!("{what} {} : {} {}", operands.join(", "), types.join(", "), op.site.phase.name());
        bodies.entry(tag.block.to_string()).or_default().entry(tag.instance).or_default().push(text);
    }
    bodies
}

/// An operand as seen from an instance: its own op, an op of an instance so many layers away, or something outside.
fn operand(graph: &Graph, value: Value, from: &Tag, places: &BTreeMap<OpId, usize>) -> String {
    let Some(def) = graph.def(value) else { return format!("input {}", graph.name_of(value)) };
    let op = graph.op(def);
    let result = op.results().position(|r| r == value).expect("the op defines it");
    match &op.site.tag {
        Some(tag) if tag.block == from.block => {
            let away = i64::from(tag.instance) - i64::from(from.instance);
            format!("{away:+}:{}.{result}", places[&def])
        }
        _ => format!("outside {}", value.0),
    }
}

fn check(program: &Program, after: &str) {
    for graph in &program.graphs {
        for (block, instances) in bodies(graph, program) {
            assert_eq!(
                instances.len(),
                LAYERS as usize,
                "@{} after {after}: a layer of {block} is missing",
                graph.name
            );
            // The first and the last layer have other neighbours.
            let inner = &instances[&1];
            assert!(inner.len() > 10, "@{} after {after}: {block} has no body", graph.name);
            for instance in 2..LAYERS - 1 {
                assert_eq!(&instances[&instance], inner, "@{} after {after}: {block}/{instance} and /1", graph.name);
            }
        }
    }
}

#[test]
fn inner_layers_are_equal_after_every_pass() {
    let lora = "sft.lora_r=2 sft.lora_dropout=0.1";
    let again = "sft.lora_r=2 sft.lora_dropout=0.1 compile.gradient_checkpointing=true";
    for set in ["sft.micro_batch_size=4", "sft.micro_batch_size=2", lora, again] {
        let options = Options { sets: set.split(' ').map(String::from).collect(), ..Options::default() };
        let loaded = load(Path::new("p.yaml"), &options, &Files).unwrap_or_else(|e| panic!("{:#?}", e.diags));
        let program = loaded.stages.into_iter().next().expect("there is a stage");
        check(&program, "lowering");
        let target = CpuTarget { threads: 2 };
        let mut passes = 0;
        let planned = compile(program, &PassContext::new(&target), &mut |step| {
            check(step.after, step.pass.name);
            passes += 1;
        })
        .unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(passes, dsgc_passes::PIPELINE.len());
        let updates = planned.graphs.iter().flat_map(|g| g.ops()).filter(|(_, op)| op.op.name() == "adamw");
        let tagged: usize = updates.filter(|(_, op)| op.site.tag.is_some()).map(|(_, op)| op.args.len() / 4).sum();
        let trained = if set.contains("lora") { 2 * 6 } else { 16 };
        assert_eq!(tagged, trained * LAYERS as usize, "optimizer ops have the layer of their parameter");
    }
}
