//! State and calls: what a session remembers, what binds dims, and what a user's inputs may get wrong.

use dsgc_ir::{Planned, Program, StateId, Tensor, parse};
use dsgc_kernels::Device;
use dsgc_kernels::interp::apart::plan_apart;
use dsgc_kernels::interp::{Interp, Precision, eval_graph};

const PROGRAM: &str = "level logical
state @sum : f32[2]
state @calls : i32[]
graph @add(%x: f32[2]) {
  %old = read @sum
  %new = add %old, %x
  %product = mul %old, %new
  write @sum %new
  %n = read @calls
  %one = const value=1.0 dtype=i32
  %m = add %n, %one
  write @calls %m
  return old_times_new=%product
}
graph @show() {
  %sum = read @sum
  %calls = read @calls
  %zero = const value=0.0 dtype=f32
  %zeros = broadcast %zero shape=[2]
  %copy = sub %sum, %zeros
  return sum=%copy, calls=%calls
}
graph @pick(%table: f32[V, 2], %i: i32[T], %more: f32[2*T, T-1], %mask: bool[2]) {
  dim V: 1..3
  dim T: 2..4
  %y = embed %table, %i
  %total = reduce_sum %y axes=[0]
  write @sum %total
  %size = size dim=T dtype=i32
  write @calls %size
  return y=%y
}
";

/// A session of the program in every mode.
fn sessions() -> Vec<(&'static str, Interp)> {
    let program: Program = parse(PROGRAM).unwrap_or_else(|e| panic!("{e}"));
    let planned = Planned::new(plan_apart(program.clone())).unwrap_or_else(|fault| panic!("{fault}"));
    vec![
        ("f32", Interp::new(program.clone(), Precision::F32)),
        ("f64", Interp::new(program, Precision::F64)),
        ("f32 in the arena", Interp::planned(planned.clone(), Precision::F32)),
        ("f64 in the arena", Interp::planned(planned, Precision::F64)),
    ]
}

fn add(session: &mut Interp, x: [f64; 2]) -> Vec<f64> {
    let x = Tensor::f64(&[2], x.to_vec());
    let outputs = session.run("add", &[("x", &x)]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(outputs[0].0, "old_times_new");
    outputs[0].1.to_f64()
}

const SUM: StateId = StateId(0);
const CALLS: StateId = StateId(1);

#[test]
fn states_begin_at_zero_and_outlive_calls() {
    for (mode, mut session) in sessions() {
        assert_eq!(session.state(SUM).to_f64(), [0.0, 0.0], "{mode}");
        // Within a call, a read gives the value from before.
        assert_eq!(add(&mut session, [1.0, 2.0]), [0.0, 0.0], "{mode}");
        assert_eq!(add(&mut session, [0.5, -1.0]), [1.5, 2.0], "{mode}");
        assert_eq!(session.state(SUM).to_f64(), [1.5, 1.0], "{mode}");
        assert_eq!(session.state(CALLS), Tensor::i32(&[], vec![2]), "{mode}");
        // Graphs share states.
        let shown = session.run("show", &[]).unwrap_or_else(|e| panic!("{mode}: {e}"));
        assert_eq!(shown[0].1.to_f64(), [1.5, 1.0], "{mode}");
        assert_eq!(shown[1].1.to_f64(), [2.0], "{mode}");
    }
}

#[test]
fn states_can_be_set_in_either_width() {
    for (mode, mut session) in sessions() {
        for given in [Tensor::f32(&[2], vec![0.1, 3.0]), Tensor::f64(&[2], vec![f64::from(0.1f32), 3.0])] {
            session.set_state(SUM, &given);
            assert_eq!(session.state(SUM).to_f64(), [f64::from(0.1f32), 3.0], "{mode}");
            // The width of the session, not of what it was given.
            let square = if mode.starts_with("f32") { f64::from(0.1f32 * 0.1) } else { f64::from(0.1f32).powi(2) };
            assert_eq!(add(&mut session, [0.0, 0.5]), [square, 10.5], "{mode}");
        }
    }
}

#[test]
fn sessions_are_apart() {
    for (mode, mut session) in sessions() {
        let mut copy = session.clone();
        add(&mut session, [1.0, 1.0]);
        assert_eq!(copy.state(SUM).to_f64(), [0.0, 0.0], "{mode}");
        add(&mut copy, [2.0, 2.0]);
        assert_eq!(session.state(SUM).to_f64(), [1.0, 1.0], "{mode}");
    }
}

#[test]
fn a_graph_runs_without_a_session() {
    let program = parse(PROGRAM).unwrap_or_else(|e| panic!("{e}"));
    let x = Tensor::f64(&[2], vec![1.0, 2.0]);
    let states = [(SUM, Tensor::f64(&[2], vec![3.0, 4.0]))].into_iter().collect();
    let done = eval_graph(&program, "add", &[("x", &x)], &states, Precision::F64).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(done.outputs[0].1.to_f64(), [12.0, 24.0]);
    assert_eq!(done.written[&SUM].to_f64(), [4.0, 6.0]);
    assert_eq!(done.written[&CALLS].to_f64(), [1.0], "a state that is not given is zero");
}

/// Inputs of `@pick` with `V` = 2 and `T` = 3.
fn picks() -> Vec<(&'static str, Tensor)> {
    vec![
        ("table", Tensor::f64(&[2, 2], vec![1.0, 2.0, 3.0, 4.0])),
        ("i", Tensor::i32(&[3], vec![1, 0, 1])),
        ("more", Tensor::f64(&[6, 2], vec![0.0; 12])),
        ("mask", Tensor::bool(&[2], vec![true, false])),
    ]
}

#[test]
fn inputs_bind_dims() {
    for (mode, mut session) in sessions() {
        let inputs = picks();
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
        let outputs = session.run("pick", &inputs).unwrap_or_else(|e| panic!("{mode}: {e}"));
        assert_eq!(outputs[0].1.shape, [3, 2], "{mode}");
        assert_eq!(outputs[0].1.to_f64(), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0], "{mode}");
        assert_eq!(session.state(CALLS).to_f64(), [3.0], "{mode}");
    }
}

#[test]
fn wrong_inputs_are_errors() {
    type Change = fn(&mut Vec<(&'static str, Tensor)>);
    let cases: &[(&str, Change)] = &[
        ("graph @pick: input `mask` is missing", |all| drop(all.pop())),
        ("graph @pick: no input is called `masks`", |all| all.push(("masks", Tensor::i32(&[], vec![0])))),
        ("input `i` is f32[3], expected i32[T]", |all| all[1].1 = Tensor::f64(&[3], vec![0.0; 3])),
        ("input `i` is i32[3, 1], expected i32[T]", |all| all[1].1 = Tensor::i32(&[3, 1], vec![0; 3])),
        ("input `mask` has the shape [3], expected bool[2] = [2]", |all| all[3].1 = Tensor::bool(&[3], vec![true; 3])),
        ("T is 5, planned for 2 to 4", |all| all[1].1 = Tensor::i32(&[5], vec![0; 5])),
        ("V is 4, planned for 1 to 3", |all| all[0].1 = Tensor::f64(&[4, 2], vec![0.0; 8])),
        ("input `more` has the shape [4, 2], expected f32[2*T, T-1] = [6, 2]", |all| {
            all[2].1 = Tensor::f64(&[4, 2], vec![0.0; 8]);
        }),
        ("input `more` has the shape [6, 1], expected f32[2*T, T-1] = [6, 2]", |all| {
            all[2].1 = Tensor::f64(&[6, 1], vec![0.0; 6]);
        }),
        ("`embed` in graph @pick: found index 2, expected one of 0 to 1", |all| {
            all[1].1 = Tensor::i32(&[3], vec![0, 2, 0]);
        }),
    ];
    for (mode, mut session) in sessions() {
        add(&mut session, [7.0, 7.0]);
        for (expected, change) in cases {
            let mut inputs = picks();
            change(&mut inputs);
            let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
            let error = session.run("pick", &inputs).expect_err(expected);
            assert!(error.message.contains(expected), "in {mode}: found `{}`, expected `{expected}`", error.message);
            assert_eq!(session.state(SUM).to_f64(), [7.0, 7.0], "a failed call has changed a state in {mode}");
        }
        let error = session.run("pck", &[]).expect_err("there is no such graph");
        assert_eq!(error.message, "no graph is called `pck`, only add, show, pick", "{mode}");
    }
}
