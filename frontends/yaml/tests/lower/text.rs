//! What a lowered program looks like, and that it is sound.

use std::path::Path;

use dsgc_ir::verify::verify;
use dsgc_ir::{Graph, Op, Program, StateKind, parse};
use dsgc_yaml::literal::Constant;

use crate::setup::{Documents, lower, tiny};

fn sft(config: &[(&str, Constant)]) -> Program {
    let mut documents = Documents::default();
    let (recipe, functions, model) =
        (documents.std_recipe("sft"), documents.std_functions(), documents.std_model("opt"));
    let program = lower(&recipe, &functions, &model, config).unwrap_or_else(|e| panic!("{e:#?}"));
    let program = Program { sources: documents.sources.names().map(String::from).collect(), ..program };
    verify(&program).unwrap_or_else(|e| panic!("{e}\n{program}"));
    let text = program.to_string();
    assert_eq!(parse(&text).unwrap_or_else(|e| panic!("{e:?}\n{text}")).to_string(), text);
    program
}

fn count(graph: &Graph, wanted: fn(&Op) -> bool) -> usize {
    graph.ops().filter(|(_, op)| wanted(&op.op)).count()
}

fn with(config: &[(&'static str, Constant)], changes: &[(&'static str, Constant)]) -> Vec<(&'static str, Constant)> {
    let kept = config.iter().filter(|(name, _)| !changes.iter().any(|(n, _)| n == name));
    kept.chain(changes).cloned().collect()
}

/// `BLESS=1 cargo test -p dsgc-yaml --test lower` writes the file.
#[test]
fn a_small_model_is_as_blessed() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lower/opt.dsg");
    let program = sft(&with(&tiny(), &[("layers", Constant::Int(1))])).to_string();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&file, &program).expect("it can be written");
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    for (at, (found, expected)) in program.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "line {} of {}", at + 1, file.display());
    }
    assert_eq!(program.lines().count(), expected.lines().count());
}

#[test]
fn every_layer_is_tagged_and_equal_to_the_first() {
    let program = sft(&tiny());
    let graph = program.graph("loss").expect("the plan calls it");
    let layer = |i: u32| -> Vec<String> {
        let of = |op: &&dsgc_ir::OpData| op.site.tag.as_ref().is_some_and(|t| t.instance == i);
        graph.ops().map(|(_, op)| op).filter(of).map(|op| op.op.name().to_string()).collect()
    };
    assert!(layer(0).len() > 20);
    assert_eq!(layer(0), layer(1));
    assert!(layer(2).is_empty());
    assert_eq!(graph.batch.as_deref(), Some("B"));
}

#[test]
fn parameters_stand_under_their_hugging_face_names() {
    let program = sft(&tiny());
    assert_eq!(program.params_of("model").count(), 36);
    let of = |name: &str| program.state(program.state_named(name).unwrap_or_else(|| panic!("no {name}"))).clone();
    let bias = of("model/model.decoder.layers.1.self_attn.k_proj.bias");
    assert_eq!((bias.ty.to_string().as_str(), bias.kind), ("f32[16]", StateKind::Param { trained: true }));
    assert_eq!(of("model/model.decoder.embed_positions.weight").ty.to_string(), "f32[34, 16]");
    assert!(program.state_named("model/lm_head.weight").is_none());
}

#[test]
fn the_350m_shape_has_its_projections_and_no_last_norm() {
    let changes = [("embed", Constant::Int(8)), ("norm_first", Constant::Bool(false))];
    let program = sft(&with(&tiny(), &changes));
    let names: Vec<&str> = program.params_of("model").map(|(_, name)| name).collect();
    assert!(names.contains(&"model.decoder.project_in.weight") && names.contains(&"model.decoder.project_out.weight"));
    assert!(!names.contains(&"model.decoder.final_layer_norm.weight"));
    let graph = program.graph("loss").expect("the plan calls it");
    assert_eq!(count(graph, |op| matches!(op, Op::LayerNorm { .. })), 4);
}

#[test]
fn norms_without_parameters_and_untied_heads_lower() {
    let off = Constant::Bool(false);
    let changes = [("norm_affine", off.clone()), ("bias", off.clone()), ("tied", off)];
    let program = sft(&with(&tiny(), &changes));
    let names: Vec<&str> = program.params_of("model").map(|(_, name)| name).collect();
    assert!(names.contains(&"lm_head.weight"));
    assert!(!names.iter().any(|name| name.ends_with("bias") || name.contains("norm")));
}

#[test]
fn first_values_are_drawn_from_a_key_per_parameter() {
    let program = sft(&tiny());
    let graph = program.graph("model.init").expect("there is one per role");
    assert_eq!(graph.inputs().map(|v| graph.name_of(v).to_string()).collect::<Vec<_>>(), ["key"]);
    assert_eq!(count(graph, |op| matches!(op, Op::Write { .. })), 36);
    let mut folds: Vec<u64> = Vec::new();
    for (_, op) in graph.ops() {
        if let Op::Fold { data } = op.op {
            folds.push(data);
        }
    }
    let draws = count(graph, |op| matches!(op, Op::RandomNormal { std: 0.02, .. }));
    assert_eq!((folds.len(), draws), (14, 14));
    folds.dedup();
    assert_eq!(folds.len(), 14);
}
