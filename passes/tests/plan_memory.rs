//! Planned programs compute what they computed before, inside their arena, where everything else is poison.

use dsgc_ir::diag::Diag;
use dsgc_ir::verify::Planned;
use dsgc_ir::{Bindings, Data, Op, Program, Region, Target, Tensor, Type, parse};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PassContext, plan_memory};

/// Momentum: the state is read, used, and written where it was.
const STEP: &str = "level logical
param @model/w : f32[8] trained
state @model/w.m : f32[8]
state @model/w.old : f32[8]

graph @step(%g: f32[B, 8]) {
  dim B: 1..4 batch
  %sum = reduce_sum %g axes=[0]
  %w = read @model/w
  %m = read @model/w.m
  %beta = const value=0.9 dtype=f32
  %betas = broadcast %beta shape=[8]
  %slow = mul %m, %betas
  %new = add %slow, %sum
  %next = sub %w, %new
  write @model/w.m %new
  write @model/w %next
  write @model/w.old %w
  %flat = reshape %new shape=[2, 4]
  %out = exp %flat
  return moved=%out
}
";

fn plan(text: &str, target: &dyn Target) -> Result<Program, Vec<Diag>> {
    let program = parse(text).unwrap_or_else(|e| panic!("{}", e.message));
    plan_memory::run(program, &PassContext::new(target))
}

fn run(mut device: Interp, program: &Program) -> (Vec<f64>, Vec<Vec<f64>>) {
    let wave = |n: usize| Data::F64((0..n).map(|i| (0.7 * i as f64).sin()).collect());
    for (id, state) in program.state_ids() {
        device.set_state(id, &Tensor::new(&state.ty.shape(&Bindings::new()).expect("states are constant"), wave(8)));
    }
    let mut outputs = Vec::new();
    for rows in [1, 4, 2] {
        let input = Tensor::new(&[rows, 8], wave(rows * 8));
        let found = device.run("step", &[("g", &input)]).unwrap_or_else(|e| panic!("{}", e.message));
        outputs.extend(found.iter().flat_map(|(_, t)| t.to_f64()));
    }
    (outputs, program.state_ids().map(|(id, _)| device.state(id).to_f64()).collect())
}

#[test]
fn a_plan_changes_no_number() {
    let program = parse(STEP).unwrap_or_else(|e| panic!("{}", e.message));
    let planned = plan(STEP, &InterpTarget).unwrap_or_else(|e| panic!("{}", e[0].message));
    let planned = Planned::new(planned).unwrap_or_else(|f| panic!("{f}"));
    for precision in [Precision::F32, Precision::F64] {
        let before = run(Interp::new(program.clone(), precision), &program);
        let after = run(Interp::planned(planned.clone(), precision), &program);
        assert_eq!(before, after);
        assert!(before.0.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn values_share_bytes_where_they_can_and_only_there() {
    let planned = plan(STEP, &InterpTarget).unwrap_or_else(|e| panic!("{}", e[0].message));
    let graph = planned.graph("step").expect("it has one graph");
    let value = |name: &str| graph.values().find(|&v| graph.name_of(v) == name).expect(name);
    let place = |name: &str| graph.buffer(value(name)).map(|b| (b.region, b.offset));
    let state = |name: &str| planned.state_named(name).and_then(|id| planned.state(id).buffer).expect("placed");
    // The old momentum dies when `slow` is made, so `new` can be made in its place.
    assert_eq!(place("new"), Some((Region::Persistent, state("model/w.m").offset)));
    // `w` is still needed for `old`: the new value waits elsewhere and is copied.
    assert_eq!(place("next").map(|p| p.0), Some(Region::Values));
    assert_eq!(place("flat"), place("new"), "a view is its operand's bytes");
    assert_eq!(planned.arena.persistent, 3 * 64);
    // betas (32 bytes, aligned to 64) dies in `slow`, which takes its place.
    assert_eq!(place("slow"), place("betas"));
}

#[test]
fn a_device_that_is_too_small_is_a_limit_with_numbers() {
    struct Small;
    impl Target for Small {
        fn name(&self) -> &str {
            "small"
        }
        fn alignment(&self) -> usize {
            64
        }
        fn missing_kernel(&self, op: &Op, _: &[Type]) -> Option<String> {
            (*op == Op::Tanh {}).then(|| "it is too small".into())
        }
        fn workspace(&self, _: &Op, _: &[Type], _: &Bindings) -> usize {
            100
        }
        fn memory(&self) -> Option<usize> {
            Some(400)
        }
    }
    let errors = plan(STEP, &Small).expect_err("400 bytes do not hold it");
    assert!(errors[0].message.contains("graph @step needs"), "{}", errors[0].message);
    let errors = plan(&STEP.replace("exp %flat", "tanh %flat"), &Small).expect_err("there is no tanh");
    assert_eq!(errors[0].message, "small has no kernel for `tanh`: it is too small");
}
