//! Texts of a batch in as few rows as they take: the numbers of rows of their own.

use dsgc_ir::stage::Packing;
use dsgc_ir::{Program, Tensor};
use tempfile::TempDir;

#[allow(dead_code)] // Other tests use the rest.
mod stages;
#[path = "common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use stages::{Ran, cpu, interp};
use tiny::Tiny;

/// The stage with these settings, and the folder that it reads.
fn load(model: &'static str, sets: &[&str]) -> (TempDir, Program) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny::write_tokenizer(folder.path());
    let pipeline = Tiny { model, stage: "sft", layers: 2, vocabulary: tiny::TOKENS }.pipeline("1e-3");
    let program = stages::program(folder.path(), &pipeline, &tiny::rows(), sets);
    (folder, program)
}

/// How far metrics and states are apart, each number relative to the largest of its tensor, or to `least` where that is smaller.
fn distance(a: &Ran, b: &Ran, least: f64) -> f64 {
    let error = |a: &[f64], b: &[f64]| {
        assert_eq!(a.len(), b.len());
        let most = b.iter().fold(least, |most: f64, x| most.max(x.abs()));
        a.iter().zip(b).map(|(a, b)| (a - b).abs() / most).fold(0.0, f64::max)
    };
    assert!(a.0.len() == 20 && a.1.keys().eq(b.1.keys()));
    let numbers = |tensor: &Tensor| tensor.to_f64();
    let metrics = a.0.iter().zip(&b.0).map(|(a, b)| {
        assert!(a.keys().eq(b.keys()), "{a:?} and {b:?}");
        a.iter().map(|(name, x)| error(&[*x], &[b[name]])).fold(0.0, f64::max)
    });
    // The gradient of a key's bias is nothing but roundings, which Adam takes for a direction.
    let states =
        a.1.iter()
            .filter(|(name, _)| !name.contains("k_proj.bias"))
            .map(|(name, tensor)| error(&numbers(tensor), &numbers(&b.1[name])));
    metrics.chain(states).fold(0.0, f64::max)
}

#[test]
fn numbers_are_those_of_rows_of_their_own() {
    for model in ["opt", "llama"] {
        for size in ["8", "2"] {
            let size = format!("stages.sft.micro_batch_size={size}");
            let ((_here, shared), (_there, apart)) =
                (load(model, &[&size]), load(model, &[&size, "stages.sft.packing=false"]));
            assert_eq!([&shared, &apart].map(|p| p.stage.sources[0].packing), [Packing::Batch, Packing::None]);
            let ((planned, shared_ran), (_, apart_ran)) = (interp(&shared, None), interp(&apart, None));
            assert_eq!(planned.stage.sources[0].packing, Packing::Batch, "no pass took it back");
            let doubles = distance(&shared_ran, &apart_ran, 1e-3);
            assert!(doubles < 1e-9, "{model}, {size}: {doubles}");
            let single = distance(&cpu(&shared, 2, None), &cpu(&apart, 2, None), 1.0);
            assert!(single < 1e-5, "{model}, {size}: {single} on the CPU");
        }
    }
}

#[test]
fn it_is_not_done_where_it_would_change_numbers() {
    for sets in [
        &["stages.sft.lora_r=2", "stages.sft.lora_dropout=0.1"][..],
        &["compile.parallel={data: 2}"],
        &["data.texts.pad_to_max=true"],
    ] {
        let (_folder, program) = load("opt", sets);
        let context = dsgc_passes::PassContext::new(&dsgc_kernels::interp::InterpTarget);
        let planned = stages::compile(&program, &context, None);
        assert_eq!(planned.stage.sources[0].packing, Packing::None, "{sets:?}");
    }
}
