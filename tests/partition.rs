//! Graph by graph: what all ranks of a mesh compute in lockstep is what one rank computes, in doubles.

use std::collections::BTreeMap;
use std::path::Path;

use dsgc_ir::fuzz::{Rng, random_bindings, random_tensor};
use dsgc_ir::print::GraphText;
use dsgc_ir::{Bindings, DType, Data, Graph, Mesh, Op, Planned, Program, State, StateId, StateKind, Tensor};
use dsgc_kernels::cpu::CpuTarget;
use dsgc_kernels::interp::{Evaluated, Given, InterpTarget, Precision, eval_graph, eval_ranks};
use dsgc_passes::{PIPELINE, PassContext, run_passes};

#[allow(dead_code)] // Sessions are other tests'.
mod stages;
#[path = "common/tiny.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod tiny;

use tiny::Tiny;

/// Tokens of the example's tokenizer.
const VOCABULARY: usize = 512;

fn pipeline(model: &str) -> String {
    format!(
        "\
dsgc: 1
seed: 7
models:
  base:
    {model}
    tokenizer: TOKENIZER
data:
  prompts: {{path: rows.jsonl}}
  texts: {{path: rows.jsonl, fields: {{text: prompt}}}}
stages:
  ppo:
    actor: {{model: base, learning_rate: 1e-2}}
    critic: {{model: base, learning_rate: 1e-2}}
    data: {{prompts: prompts, ptx: texts}}
    unsup_coef: 1
    enable_ema: true
    batch_size: 4
    micro_batch_size: 2
    max_prompt_len: 24
    max_new_tokens: 8
"
    )
}

const OPT: &str = "model: opt\n    config: {hidden: 16, layers: 2, heads: 4, ffn: 32, max_positions: 64}";
const LLAMA: &str =
    "model: llama\n    config: {hidden: 16, layers: 2, heads: 4, kv_heads: 2, ffn: 24, max_positions: 64}";

/// The program that ranks of a mesh run, before it is ordered and planned.
fn partitioned(program: &Program, mesh: Mesh) -> Program {
    let names: Vec<&str> = PIPELINE.iter().map(|pass| pass.name).collect();
    let until = names.iter().position(|name| *name == "partition").expect("it is a pass");
    let program = Program { mesh, ..program.clone() };
    let context = PassContext::new(&InterpTarget);
    run_passes(program, &names[..=until], &context).unwrap_or_else(|errors| panic!("{errors:?}"))
}

/// Inputs that a graph of a stage takes whose models have so many tokens.
fn inputs(graph: &Graph, vocabulary: usize, bindings: &Bindings, rng: &mut Rng) -> Vec<(String, Tensor)> {
    let one = |input| {
        let (name, ty) = (graph.name_of(input), graph.ty(input));
        let mut tensor = random_tensor(ty, bindings, rng);
        if let (DType::I32, Data::I32(numbers)) = (ty.dtype, &mut tensor.data) {
            let mut below = |n: usize| rng.below(n) as i32;
            numbers.iter_mut().for_each(|x| {
                *x = match name.rsplit('.').next() {
                    Some("tokens") => below(vocabulary),
                    Some("segment") => 1,
                    Some("t") => 3,
                    Some("place") => 0,
                    _ => below(2),
                }
            });
        }
        (name.to_string(), tensor)
    };
    graph.inputs().map(one).collect()
}

fn close(a: &Tensor, b: &Tensor) -> bool {
    let near = |(a, b): (f64, f64)| {
        a == b || (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0) || a.is_nan() && b.is_nan()
    };
    a.shape == b.shape && (matches!(a.data, Data::Key(_)) || a.to_f64().into_iter().zip(b.to_f64()).all(near))
}

/// All graphs that both programs have, on the same inputs and states.
fn equal(whole: &Program, local: &Program, vocabulary: usize) -> usize {
    let ranks = local.mesh.ranks();
    for (at, graph) in whole.graphs.iter().enumerate() {
        let mut rng = Rng::new(at as u64 + 1);
        let bindings = random_bindings(graph, at as u64 + 1);
        let given = inputs(graph, vocabulary, &bindings, &mut rng);
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut states: BTreeMap<StateId, Tensor> = BTreeMap::new();
        for (id, state) in whole.state_ids().filter(|(_, state)| !matches!(state.kind, StateKind::Copy { .. })) {
            let mut tensor = random_tensor(&state.ty, &Bindings::new(), &mut rng);
            if let Data::F64(numbers) = &mut tensor.data {
                // Second moments are squares; and layers must not grow without bound.
                numbers.iter_mut().for_each(|x| *x = x.abs() * 0.1);
            }
            states.insert(id, tensor);
        }
        let expected = eval_graph(whole, &graph.name, &given, &states, Precision::F64);
        let expected = expected.unwrap_or_else(|e| panic!("@{}: {e:?}", graph.name));
        let of_rank = |rank: usize| {
            let part = |(&id, tensor): (&StateId, &Tensor)| match &local.state(id).placement {
                Some(placement) => (id, placement.part(&local.mesh, rank, tensor)),
                None => (id, tensor.clone()),
            };
            Given { inputs: given.clone(), states: states.iter().map(part).collect() }
        };
        let all: Vec<Given> = (0..ranks).map(of_rank).collect();
        let found = eval_ranks(local, &graph.name, &all, Precision::F64);
        let found: Vec<Evaluated> = found.unwrap_or_else(|e| panic!("@{}: {e:?}", graph.name));
        for (rank, found) in found.iter().enumerate() {
            for ((name, a), (_, b)) in expected.outputs.iter().zip(&found.outputs) {
                assert!(close(a, b), "`{name}` of @{} on rank {rank}: {a:?} and {b:?} in\n{local}", graph.name);
            }
        }
        for (id, expected) in &expected.written {
            let state = local.state(*id);
            let parts: Vec<Tensor> = found.iter().map(|found| found.written[id].clone()).collect();
            let written = match &state.placement {
                Some(placement) => placement.whole(&local.mesh, &parts),
                None => parts[ranks - 1].clone(),
            };
            assert!(close(expected, &written), "`{}` after @{} in\n{local}", state.name, graph.name);
        }
    }
    whole.graphs.len()
}

#[test]
fn ranks_that_share_layers_compute_what_one_computes() {
    let rows: Vec<String> = (0..8).map(|i| format!("{{\"prompt\": \"Question {i}?\"}}")).collect();
    for (model, extra) in [(OPT, vec![]), (LLAMA, vec![]), (OPT, vec!["stages.ppo.actor.lora_r=2"])] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = stages::program(folder.path(), &pipeline(model), &rows, &extra);
        let whole = partitioned(&program, Mesh::default());
        let local = partitioned(&program, Mesh { tensor: 2, ..Mesh::default() });
        assert!(equal(&whole, &local, VOCABULARY) > 10);
        // Layers are column and row parallel: heads, the inner width and the vocabulary are in parts, the rest is whole.
        let cut = |name: &str| {
            let found = local.state_ids().find(|(_, state)| state.name.ends_with(name));
            let (_, state) = found.unwrap_or_else(|| panic!("no `{name}` in\n{local}"));
            state.placement.as_ref().map(|placement| placement.cuts[0].dim)
        };
        if model == OPT {
            let names = [
                "layers.1.self_attn.q_proj.weight",
                "self_attn.out_proj.weight",
                "fc1.weight",
                "fc1.bias",
                "fc2.weight",
            ];
            assert_eq!(names.map(&cut), [Some(0), Some(1), Some(0), Some(0), Some(1)]);
            assert_eq!(["fc2.bias", "self_attn_layer_norm.weight"].map(&cut), [None, None]);
            assert_eq!(cut("embed_tokens.weight"), Some(0));
        }
        if extra.is_empty() {
            // The scores of a model: a sum for the embedding, two for each layer; and the logits of all ranks.
            let graph = local.graph("actor.prefill").expect("the actor generates");
            let sums = graph.ops().filter(|(_, op)| matches!(op.op, Op::AllReduce { .. })).count();
            assert_eq!(
                (sums, graph.ops().filter(|(_, op)| matches!(op.op, Op::AllGather { .. })).count()),
                (1 + 2 * 2, 1),
                "{}",
                GraphText(graph, &local)
            );
        }
    }
}

/// Of 25 tokens two ranks have 13 and 12; and of eight ranks, the seventh has one, and the last none.
#[test]
fn a_vocabulary_is_filled_up_for_the_last_ranks() {
    for (model, ranks) in [("opt", 2), ("llama", 2), ("opt", 8), ("llama", 8)] {
        let tiny = Tiny { model, stage: "ppo", layers: 2, vocabulary: 25 };
        let folder = tempfile::tempdir().expect("a temporary folder");
        tiny::write_tokenizer(folder.path());
        let heads = [format!("models.{model}.config.heads=8"), format!("models.{model}.config.kv_heads=8")];
        let heads: Vec<&str> = heads.iter().take(if model == "opt" { 1 } else { 2 }).map(String::as_str).collect();
        let program = stages::program(folder.path(), &tiny.pipeline("1e-3"), &tiny::rows(), &heads);
        let whole = partitioned(&program, Mesh::default());
        let local = partitioned(&program, Mesh { tensor: ranks, ..Mesh::default() });
        let tables: Vec<&State> = local.states.iter().filter(|state| state.whole_shape() == [25, 16]).collect();
        let rows = Some(25usize.div_ceil(ranks) as i64);
        assert!(!tables.is_empty() && tables.iter().all(|table| table.ty.dims[0].constant() == rows), "{local}");
        assert!(equal(&whole, &local, 25) > 10);
    }
}

/// A model of which what is too small to be cut is far less than a hundredth.
const LARGE: &str = "
dsgc: 1
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 256, layers: 3, heads: 4, ffn: 1024, max_positions: 60}}
data:
  texts: {path: rows.jsonl, fields: {text: prompt}}
stages:
  sft: {model: base, data: texts, batch_size: 16, micro_batch_size: 2, max_length: 24, max_steps: 1}
";

/// Parameters, gradients and two moments take 16 bytes a parameter, of which a rank has what its stage of ZeRO says, and the
/// padding of what cannot be shared evenly.
#[test]
fn states_of_a_rank_are_those_of_zeros_formulas() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let rows = [r#"{"prompt": "Question?"}"#.to_string()];
    let program = stages::program(folder.path(), LARGE, &rows, &[]);
    let names: Vec<&str> = PIPELINE.iter().map(|pass| pass.name).collect();
    let whole = |state: &State| 4 * state.whole_shape().iter().product::<usize>();
    for ranks in [2, 4, 8] {
        for zero_stage in 0..=3 {
            let mut program = Program { mesh: Mesh { data: ranks, ..Mesh::default() }, ..program.clone() };
            program.stage.roles.iter_mut().for_each(|role| role.zero_stage = zero_stage);
            let planned = run_passes(program, &names, &PassContext::new(&CpuTarget { threads: 1 }));
            let planned = Planned::new(planned.unwrap_or_else(|e| panic!("{e:?}"))).unwrap_or_else(|e| panic!("{e}"));
            let params: usize = planned.params_of("model").map(|(id, _)| whole(planned.state(id))).sum();
            let (p, n) = (params as f64, ranks as f64);
            let expected = match zero_stage {
                0 => 4.0 * p,
                1 => 2.0 * p + 2.0 * p / n,
                2 => p + 3.0 * p / n,
                _ => 4.0 * p / n,
            };
            let cut = |state: &&State| state.placement.as_ref().is_some_and(|placement| !placement.cuts.is_empty());
            let states: usize = planned.states.iter().map(|state| state.bytes()).sum();
            let padding = planned.states.iter().filter(cut).map(|state| state.bytes() as f64 - whole(state) as f64 / n);
            let (padding, what) = (padding.sum::<f64>(), format!("{ranks} ranks, zero {zero_stage}"));
            let apart = (states as f64 - padding - expected).abs();
            assert!(apart <= 0.01 * expected, "{what}: {states} bytes with {padding} of padding, expected {expected}");
            // 62 rows of positions; every other dim that is cut is whole in all of these.
            let rows = 62usize.div_ceil(ranks) as f64 - 62.0 / n;
            let cuts = [0.0, 2.0, 3.0, 4.0][usize::from(zero_stage)];
            assert_eq!(padding, cuts * rows * 256.0 * 4.0, "{what}");
            // The device has no other memory, and each state begins at a cache line.
            let arena = planned.arena.persistent;
            assert!((states..states + 64 * planned.states.len()).contains(&arena), "{what}: {arena} of {states}");
        }
    }
}

#[test]
fn what_cannot_be_shared_evenly_is_said() {
    let rows: Vec<String> = (0..8).map(|i| format!("{{\"prompt\": \"Question {i}?\"}}")).collect();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pipeline = pipeline(LLAMA) + "compile: {parallel: {tensor: 4}}\n";
    let program = stages::program(folder.path(), &pipeline, &rows, &[]);
    let sources = program.sources.clone();
    let names: Vec<&str> = PIPELINE.iter().map(|pass| pass.name).collect();
    let errors = run_passes(program, &names, &PassContext::new(&InterpTarget)).expect_err("two heads for four ranks");
    let message = "4 ranks cannot share dim 0 of `model.layers.0.self_attn.q_proj.weight`, which is f32[16, 16]";
    assert_eq!(errors[0].message, message);
    assert_eq!(errors[0].help, ["what goes with it, such as heads, has the divisor 2: `tensor` can be 1, 2"]);
    // Where it is asked for, and where the model declares the weight.
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("frontends/yaml/std/models/llama.yaml");
    let [asked, declared] = &errors[0].labels[..] else { panic!("found {:?}", errors[0].labels) };
    for (label, text, file, from) in [
        (asked, "asked for here", folder.path().join("pipeline.yaml"), "4"),
        (declared, "declared here", library, "self_attn.q_proj.weight"),
    ] {
        assert_eq!(label.text, text);
        let source = &sources[label.span.source as usize];
        assert!(Path::new(source).file_name() == file.file_name(), "{text} in {source}");
        let whole = std::fs::read_to_string(&file).expect("a file");
        let line = whole.lines().nth(label.span.line as usize - 1).expect("a line");
        let at: String = line.chars().skip(label.span.column as usize - 1).take(label.span.len as usize).collect();
        assert_eq!(at, from, "{text}: {line}");
    }
}
