//! Numbers in double precision: merged and unmerged, gradients beside finite differences, micro-batches.

use dsgc_ir::stage::Adapter;
use dsgc_ir::{Bindings, Program, StateId, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PassContext, compile, run_passes};
use dsgc_runtime::Session;
use dsgc_yaml::load::{self, Options};

use super::Place;

#[path = "../../frontends/cli/host.rs"]
mod host;

/// LoRA on all linear layers but the head. With a first decay rate of 0, the first moment is the gradient; at a learning
/// rate of 0, nothing moves.
const STILL: [&str; 5] =
    ["lora_r=2", "lora_alpha=3", "adam_betas=[0.0, 0.9]", "learning_rate=0.0", "max_grad_norm=none"];

fn program(place: &Place, sets: &[&str]) -> Program {
    let mut sets: Vec<String> = sets.iter().map(|set| format!("stages.dpo.{set}")).collect();
    sets.push(format!("output_dir={}", place.path("runs").display()));
    let options = Options { sets, stage: Some("dpo".into()), ..Options::default() };
    let loaded = load::load(&place.path("pipeline.yaml"), &options, &host::Disk);
    loaded.unwrap_or_else(|e| panic!("{:#?}", e.diags)).stages.remove(0)
}

/// The step of DPO on one batch, in an interpreter whose parameters are all sines, plus 1 in norms.
struct Step {
    interp: Interp,
    factors: Vec<(StateId, [StateId; 2])>,
    scale: f64,
}

impl Step {
    fn new(place: &Place, dropout: &str) -> Step {
        let context = PassContext::new(&InterpTarget);
        let passes = ["infer", "adapt", "canonicalize", "autodiff", "canonicalize"];
        let program = run_passes(program(place, &[&STILL[..], &[dropout]].concat()), &passes, &context)
            .unwrap_or_else(|e| panic!("{e:?}"));
        let lora = program.stage.trainings[0].lora.as_ref().expect("LoRA is on");
        let id = |name: &str| program.state_named(&format!("policy/{name}")).unwrap_or_else(|| panic!("no {name}"));
        let modules = &lora.adapter.as_ref().expect("the pass fills it in").modules;
        let factors: Vec<_> =
            modules.iter().map(|m| (id(&format!("{m}.weight")), Adapter::factors(m).map(|f| id(&f)))).collect();
        assert_eq!(factors.len(), 2 * 6);
        let scale = lora.alpha / lora.r as f64;
        let mut interp = Interp::new(program.clone(), Precision::F64);
        for (p, (id, name)) in program.params_of("policy").enumerate() {
            let shape = program.state(id).ty.shape(&Bindings::new()).expect("constant dims");
            let one = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
            let value = |k: usize| 0.2 * (0.7 * k as f64 + 1.9 * p as f64 + 0.3).sin() + one;
            interp.set_state(id, &Tensor::f64(&shape, (0..shape.iter().product()).map(value).collect()));
        }
        Step { interp, factors, scale }
    }

    /// The loss; the gradients lie in the first moments.
    fn loss(&mut self) -> f64 {
        let row = |first: i32| (0..6).map(move |t| first + 3 * t);
        let tokens = |first| Tensor::i32(&[2, 6], row(first).chain(row(first + 50)).collect());
        let (ones, all) = (Tensor::i32(&[2, 6], vec![1; 12]), Tensor::bool(&[2, 6], vec![true; 12]));
        let reference = |x| Tensor::f64(&[2], vec![x, x - 1.0]);
        let inputs = [
            ("chosen.tokens", tokens(5)),
            ("rejected.tokens", tokens(7)),
            ("chosen.segment", ones.clone()),
            ("rejected.segment", ones),
            ("chosen.trained", all.clone()),
            ("rejected.trained", all),
            ("ref_chosen", reference(-30.0)),
            ("ref_rejected", reference(-31.0)),
            ("lr", Tensor::f64(&[], vec![0.0])),
            ("t", Tensor::i32(&[], vec![1])),
            ("dropout.key", Tensor::key([7, 9])),
            ("dropout.row", Tensor::i32(&[2], vec![0, 1])),
        ];
        let graph = self.interp.program().graph("policy.dpo_loss.step").expect("the step");
        let taken = inputs.iter().filter(|(name, _)| graph.input_named(name).is_some());
        let inputs: Vec<(&str, &Tensor)> = taken.map(|(name, tensor)| (*name, tensor)).collect();
        let outputs = self.interp.run("policy.dpo_loss.step", &inputs).unwrap_or_else(|e| panic!("{e}"));
        outputs.iter().find(|(name, _)| name == "loss").expect("there is a loss").1.scalar()
    }
}

#[test]
fn merged_and_unmerged_are_one_model() {
    let place = Place::new();
    let mut step = Step::new(&place, STILL[0]);
    let apart = step.loss();
    for (weight, [a, b]) in step.factors.clone() {
        let [w, a_now, b_now] = [weight, a, b].map(|id| step.interp.state(id));
        step.interp.set_state(weight, &dsgc_hf::merge(&w, [&a_now, &b_now], step.scale));
        step.interp.set_state(b, &Tensor::f64(&b_now.shape, vec![0.0; b_now.len()]));
    }
    let merged = step.loss();
    assert!((apart - merged).abs() < 1e-12, "{apart} and {merged}");
    for (_, [a, b]) in step.factors.clone() {
        let [a_now, b_now] = [a, b].map(|id| step.interp.state(id));
        assert!(a_now.to_f64().iter().any(|x| *x != 0.0) && b_now.to_f64().iter().all(|x| *x == 0.0));
    }
    // The factors do count.
    assert!((Step::new(&place, STILL[0]).loss() - apart).abs() == 0.0);
    let (_, [_, b]) = step.factors[0];
    step.interp.set_state(b, &Tensor::f64(&[16, 2], vec![0.1; 32]));
    assert!((step.loss() - merged).abs() > 1e-6);
}

#[test]
fn gradients_of_factors_are_finite_differences() {
    let place = Place::new();
    for dropout in ["lora_dropout=0", "lora_dropout=0.5"] {
        differences(Step::new(&place, dropout));
    }
    let [without, with] = ["lora_dropout=0", "lora_dropout=0.5"].map(|dropout| Step::new(&place, dropout).loss());
    assert!((without - with).abs() > 1e-3, "{without} and {with}");
}

fn differences(mut step: Step) {
    const STEP: f64 = 1e-4;
    step.loss();
    let program = step.interp.program().clone();
    let moment = |id: StateId| program.state_named(&format!("{}.m", program.state(id).name)).expect("it is trained");
    let states = program.states.iter().filter(|state| state.name.ends_with(".m")).count();
    assert_eq!(states, 2 * step.factors.len(), "nothing else has a gradient");
    let gradients: Vec<(StateId, Vec<f64>)> = (step.factors.iter())
        .flat_map(|(_, factors)| *factors)
        .map(|id| (id, step.interp.state(moment(id)).to_f64()))
        .collect();
    for (id, gradient) in gradients {
        let value = step.interp.state(id);
        let at = gradient.len() / 3;
        let [low, high] = [-STEP, STEP].map(|by| {
            let mut moved = value.to_f64();
            moved[at] += by;
            step.interp.set_state(id, &Tensor::f64(&value.shape, moved));
            step.loss()
        });
        step.interp.set_state(id, &value);
        let expected = (high - low) / (2.0 * STEP);
        let error = (gradient[at] - expected).abs() / expected.abs().max(1e-3);
        assert!(error < 1e-5, "{}[{at}]: {} and {expected}", program.state(id).name, gradient[at]);
    }
}

#[test]
fn micro_batches_change_no_number_of_lora() {
    let place = Place::new();
    let run = |micro: &str| {
        let sets = ["lora_r=2", "lora_dropout=0.3", "learning_rate=1e-2", "weight_decay=0.1", micro];
        let context = PassContext::new(&InterpTarget);
        let planned = compile(program(&place, &sets), &context, &mut |_| {}).unwrap_or_else(|e| panic!("{e:?}"));
        let device = Box::new(Interp::planned(planned.clone(), Precision::F64));
        let mut session = Session::open(planned.clone(), device, &mut |_| Ok(())).unwrap_or_else(|e| panic!("{e:?}"));
        session.run(&mut |_| Ok(())).unwrap_or_else(|e| panic!("{e}"));
        let trained = planned.params_of("policy").filter(|(_, name)| name.contains(".lora_"));
        trained.flat_map(|(id, _)| session.device().state(id).to_f64()).collect::<Vec<f64>>()
    };
    let (whole, cut) = (run("micro_batch_size=4"), run("micro_batch_size=1"));
    assert_eq!(whole.len(), 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32)));
    for (a, b) in whole.iter().zip(&cut) {
        assert!((a - b).abs() < 1e-10, "{a} and {b}");
    }
}
