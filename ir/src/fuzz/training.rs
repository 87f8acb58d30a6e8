//! Random trainings: a random graph as the loss of a model, and a stage that updates the model on it.

use serde_json::json;

use super::{Draw, Rng, is_of_layout};
use crate::diag::Span;
use crate::dim::Dim;
use crate::graph::{Graph, StateId, Value};
use crate::op::{Op, ROWS};
use crate::program::{Program, StateKind};
use crate::types::{DType, Type};

/// Rows that only passes make: they have no gradient.
const MADE_BY_PASSES: [&str; 14] = [
    "adamw",
    "add_rows",
    "attention_grad",
    "cached_attention",
    "contract_each",
    "contract_fused",
    "embed_grad",
    "fused",
    "head_logp",
    "head_logp_grad",
    "layer_norm_grad",
    "rms_norm_grad",
    "sum_squares",
    "token_logp_grad",
];

/// A program with one graph `loss` of about `size` drawn ops, over up to five matrices of the role `model`, and a stage that
/// updates the role on batches of up to three rows. Freezing, decay, the bound of the gradient's norm and what is recomputed are
/// drawn too. Every parameter that is trained has a part in the loss, which is a sum of bounded numbers.
pub fn random_training(seed: u64, size: usize) -> Program {
    let mut rng = Rng::new(seed);
    let mut program = Program { sources: vec!["random.yaml".into()], ..Program::default() };
    for i in 0..rng.between(2, 5) {
        let dims: Vec<Dim> = (0..2).map(|_| Dim::from(rng.between(1, 4))).collect();
        let kind = StateKind::Param { trained: true };
        program.declare(format!("model/layers.{i}.weight"), Type::new(DType::F32, dims), kind, Span::NONE);
    }
    let graph = Draw::new(&mut rng, &program, "loss", 0).loss(size);
    let args: Vec<_> = graph.inputs().map(|v| graph.name_of(v).to_string()).collect();
    let args: Vec<_> = args.iter().map(|name| json!([name, {"path": format!("b.{name}")}])).collect();
    program.graphs.push(graph);
    let frozen = if rng.once_in(2) { json!([{"glob": "layers.0.*", "span": Span::NONE}]) } else { json!([]) };
    let stage = json!({
        "name": "s",
        "sources": [{"name": "rows", "batch_size": 3, "micro_batch_size": 3}],
        "trainings": [{
            "role": "model",
            "optimizer": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": rng.choose(&[0.0, 0.1]), "no_decay": ["1"]},
            "schedule": {"learning_rate": 0.1, "kind": "constant", "warmup_steps": 0, "warmup_ratio": 0.0, "clamp": true},
            "max_grad_norm": rng.choose(&[None, Some(1.0)]),
            "freeze": frozen,
        }],
        "memory": {"gradient_checkpointing": rng.once_in(2)},
        "plan": [{"for": {"batch": "b", "rows": {"source": "rows"}, "body": [
            {"update": {"role": "model", "terms": [{"weight": 1.0, "graph": "loss", "args": args}], "steps": null}}
        ]}}],
    });
    program.stage = serde_json::from_value(stage).unwrap_or_else(|why| panic!("the fuzzer drew no stage: {why}"));
    program
}

impl Draw<'_> {
    /// The graph, with the output `loss`.
    fn loss(mut self, size: usize) -> Graph {
        self.inputs();
        let rows: Vec<&str> = ROWS.iter().filter(|row| !is_of_layout(row)).map(|row| row.name).collect();
        let rows: Vec<&str> = rows.into_iter().filter(|row| !MADE_BY_PASSES.contains(row)).collect();
        let params: Vec<StateId> = self.program.state_ids().map(|(id, _)| id).collect();
        let reads: Vec<Value> = params.iter().map(|&id| self.read(id)).collect();
        while self.graph.len() < size {
            if self.rng.once_in(3) {
                self.product_with_param();
            }
            let row = self.rng.choose(&rows);
            self.draw(row);
        }
        let mut used = vec![false; self.graph.values().len()];
        self.graph.ops().flat_map(|(_, op)| op.args.clone()).for_each(|arg| used[arg.0 as usize] = true);
        let is_part = |v: &Value| {
            let unused = !used[v.0 as usize] && !self.hidden.contains(v);
            self.graph.ty(*v).dtype == DType::F32 && (unused || reads.contains(v))
        };
        let parts: Vec<Value> = self.graph.values().filter(is_part).collect();
        let sums: Vec<Value> = parts.into_iter().map(|part| self.bounded_sum(part)).collect();
        let loss = sums.into_iter().reduce(|a, b| self.must(Op::Add {}, &[a, b])).expect("parameters are parts");
        self.graph.outputs.push(("loss".into(), loss));
        self.graph
    }

    fn read(&mut self, state: StateId) -> Value {
        let ty = self.program.state(state).ty.clone();
        self.push_with(Op::Read { state }, &[], Some(&ty))[0]
    }

    /// The sum of `tanh` of all elements.
    fn bounded_sum(&mut self, value: Value) -> Value {
        let axes = (0..self.ty(value).rank()).collect();
        let bounded = self.must(Op::Tanh {}, &[value]);
        self.must(Op::ReduceSum { axes }, &[bounded])
    }
}
