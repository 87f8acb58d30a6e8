//! Whole training steps: the numbers of PyTorch in `tests/golden`, to 1e-8 by the interpreter in doubles and to 1e-4 by
//! the CPU; and the same numbers whichever way a batch is cut into micro-batches.

#[path = "golden/compare.rs"]
mod compare;
#[path = "common/text.rs"]
mod text;
#[path = "golden/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::path::Path;

use compare::{Compared, Golden, On, Rank, ZERO_GRADIENT, relative_error};
use dsgc_ir::schedule::PipelineOrder;
use dsgc_ir::{Mesh, Tensor};
#[cfg(feature = "wgpu")]
use dsgc_kernels::cube::Platform;
use dsgc_runtime::on_threads;

fn references() -> Golden {
    of("opt")
}

fn of(family: &str) -> Golden {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    Golden::open(&folder, family).expect("the references are there")
}

/// Reward model, PPO, DPO and generation of a family.
fn check_stages(family: &str, on: On) {
    let compare = |on| of(family).compare_stages(on).unwrap_or_else(|e| panic!("{e}"));
    let compared = compare(on);
    if let On::Cpu(2) = on {
        // Not only good, but the same to the bit.
        let errors = |all: &[Compared]| all.iter().map(|c| c.error.to_bits()).collect::<Vec<_>>();
        for threads in [1, 3] {
            assert_eq!(errors(&compare(On::Cpu(threads))), errors(&compared), "{family} with {threads} threads");
        }
    }
    assert_eq!(compared.len(), 6 + 2 * 14 + 4 + 2, "everything that the references hold");
    let worse: Vec<String> =
        compared.iter().filter(|c| c.error > on.tolerance()).map(|c| format!("{}: {:.1e}", c.what, c.error)).collect();
    assert!(worse.is_empty(), "{family} on {on:?} differs from the references:\n{}", worse.join("\n"));
}

#[test]
fn stages_of_opt_in_doubles() {
    check_stages("opt", On::Doubles);
}

#[test]
fn stages_of_opt_on_the_cpu() {
    check_stages("opt", On::Cpu(2));
}

#[test]
fn stages_of_llama_in_doubles() {
    check_stages("llma", On::Doubles);
}

#[test]
fn stages_of_llama_on_the_cpu() {
    check_stages("llma", On::Cpu(2));
}

#[test]
fn llama_has_the_logits_of_the_references() {
    for on in [On::Doubles, On::Cpu(2)] {
        let compared = of("llma").compare(on).unwrap_or_else(|e| panic!("{e}"));
        // They have no sft.
        let [logits] = compared.as_slice() else { panic!("{on:?}: {} comparisons", compared.len()) };
        assert!(logits.error < on.tolerance(), "{on:?}: {:.1e}", logits.error);
    }
}

/// Left-padded prompts, a token at a time with keys and values in a cache, beside one pass over all columns.
#[test]
fn decoding_is_the_full_forward() {
    for family in ["opt", "llma"] {
        for (on, allowed) in [(On::Doubles, 1e-12), (On::Cpu(2), 1e-5)] {
            let worst = of(family).decoding(on).unwrap_or_else(|e| panic!("{family} on {on:?}: {e}"));
            assert!(worst < allowed, "{family} on {on:?}: logits differ by {worst:.1e}");
        }
    }
}

fn check(on: On) {
    let compared = references().compare(on).unwrap_or_else(|e| panic!("{e}"));
    // One number or tensor of everything that the references hold: 36 gradients, 34 parameters after steps.
    assert_eq!(compared.len(), 1 + 1 + 36 + 1 + 34 + 1);
    let worse: Vec<String> =
        compared.iter().filter(|c| c.error > on.tolerance()).map(|c| format!("{}: {:.1e}", c.what, c.error)).collect();
    assert!(
        worse.is_empty(),
        "{on:?} differs from the references by more than {:.0e}:\n{}",
        on.tolerance(),
        worse.join("\n")
    );
}

#[test]
fn the_interpreter_in_doubles_gives_the_references() {
    check(On::Doubles);
}

#[test]
fn one_thread_of_the_cpu_gives_the_references() {
    check(On::Cpu(1));
}

#[test]
fn three_threads_of_the_cpu_give_the_references() {
    check(On::Cpu(3));
}

/// Each rank compares everything; `scripts/golden` takes other layouts, and the stages behind sft.
#[test]
fn ranks_give_the_references() {
    let layouts = [(Mesh { data: 2, ..Mesh::default() }, 3), (Mesh { tensor: 2, pipeline: 2, ..Mesh::default() }, 0)];
    for (mesh, zero_stage) in layouts {
        let rank = |member| -> Result<(), String> {
            check(On::Rank(&Rank { member, zero_stage, order: PipelineOrder::default(), threads: None }));
            Ok(())
        };
        on_threads(mesh, rank, String::clone).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_gives_the_references() {
    check(On::Gpu(Platform::Wgpu));
}

#[cfg(feature = "wgpu")]
#[test]
fn stages_of_opt_on_a_gpu() {
    check_stages("opt", On::Gpu(Platform::Wgpu));
}

#[cfg(feature = "wgpu")]
#[test]
fn stages_of_llama_on_a_gpu() {
    check_stages("llma", On::Gpu(Platform::Wgpu));
}

#[cfg(feature = "wgpu")]
#[test]
fn decoding_on_a_gpu_is_the_full_forward() {
    for family in ["opt", "llma"] {
        let worst = of(family).decoding(On::Gpu(Platform::Wgpu)).unwrap_or_else(|e| panic!("{family}: {e}"));
        assert!(worst < 1e-5, "{family}: logits differ by {worst:.1e}");
    }
}

/// D1: in how many parts an optimizer batch is computed changes no number. Its rows have 17 to 50 tokens, so a mean of
/// means would be another number.
#[test]
fn micro_batches_do_not_change_numbers() {
    let golden = references();
    let runs: Vec<(Vec<f64>, BTreeMap<String, Tensor>)> = ["4", "2", "1"]
        .iter()
        .map(|rows| {
            let size = format!("micro_batch_size={rows}");
            let settings = [size.as_str(), "max_grad_norm=1.0", "warmup_steps=5", "lr_scheduler_type=cosine"];
            let mut trainer = golden.trainer(On::Doubles, &settings).unwrap_or_else(|e| panic!("{e}"));
            let steps = (0..20).map(|step| trainer.step(&golden.batch(step % 4)));
            (steps.flat_map(|step| [step.loss, step.grad_norm]).collect(), trainer.tensors(""))
        })
        .collect();
    let (whole, parts) = runs.split_first().expect("three runs");
    let (first, last) = (whole.0[0], whole.0[38]);
    assert!(last < 0.9 * first, "the runs train: {first} to {last}");
    for (numbers, params) in parts {
        let error = relative_error(numbers, &whole.0, 0.0);
        assert!(error < 1e-12, "losses and norms differ by {error:e}");
        assert_eq!(params.len(), whole.1.len());
        for ((name, param), reference) in params.iter().zip(whole.1.values()) {
            // The steps of a parameter whose gradient is zero in exact arithmetic follow its rounding errors.
            if !name.ends_with(ZERO_GRADIENT) {
                let error = relative_error(&param.to_f64(), &reference.to_f64(), 0.0);
                assert!(error < 1e-12, "{name} differs by {error:e} after 20 steps");
            }
        }
    }
}
