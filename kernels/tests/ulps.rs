//! How far functions of the CPU are from the true values, in units of the last place: as stated here, over each function's range.

#[path = "check/mod.rs"]
#[allow(dead_code)] // The tests of ops use the rest.
mod check;

use check::{plan, program, tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::Cpu;
use dsgc_kernels::interp::{Interp, Precision};

/// Numbers of a range that are tried.
const POINTS: usize = 400_000;

/// What a unit is of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Of {
    /// The result.
    Result,
    /// The operand: where results are differences of numbers of its size, which vanish in its negative tail.
    Operand,
}

/// Op, the range of its operand, the units that it may be off, and of what. `a / b` and square roots are rounded once.
const FUNCTIONS: [(&str, [f64; 2], f64, Of); 13] = [
    ("exp", [-87.0, 88.0], 2.0, Of::Result),
    ("log", [1e-30, 1e3], 2.0, Of::Result),
    ("log", [0.5, 2.0], 2.0, Of::Result),
    ("sqrt", [0.0, 1e6], 0.5, Of::Result),
    ("tanh", [-10.0, 10.0], 4.0, Of::Result),
    ("sigmoid", [-80.0, 80.0], 4.0, Of::Result),
    ("log_sigmoid", [-80.0, 80.0], 4.0, Of::Result),
    ("erf", [-4.0, 4.0], 4.0, Of::Result),
    ("gelu", [-10.0, 10.0], 4.0, Of::Operand),
    ("gelu", [0.0, 10.0], 4.0, Of::Result),
    ("gelu_tanh", [-10.0, 10.0], 4.0, Of::Operand),
    ("silu", [-80.0, 80.0], 4.0, Of::Result),
    ("relu", [-10.0, 10.0], 0.0, Of::Result),
];

/// The distance of the next larger `f32` from the one next to a number.
fn unit(x: f64) -> f64 {
    let near = (x.abs() as f32).max(f32::MIN_POSITIVE);
    f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near)
}

#[test]
fn functions_of_the_cpu_are_as_near_as_stated() {
    let mut missed = Vec::new();
    for (op, [low, high], units, of) in FUNCTIONS {
        let program = program(&format!("%x: f32[{POINTS}]"), &format!("%y = {op} %x"));
        let points = (0..POINTS).map(|i| f64::from((low + (high - low) * i as f64 / (POINTS - 1) as f64) as f32));
        let points: Vec<f64> = points.collect();
        let x = tensor(program.graphs[0].ty(dsgc_ir::Value(0)), &points);
        let run = |device: &mut dyn Device| device.run("g", &[("x", &x)]).expect("it runs").remove(0).1.to_f64();
        let exact = run(&mut Interp::new(program.clone(), Precision::F64));
        let found = run(&mut Cpu::new(plan(&program, 1), 1));
        let of_what = |i: usize| unit(if of == Of::Result { exact[i] } else { points[i] });
        let off = |i: usize| (found[i] - exact[i]).abs() / of_what(i);
        let worst = (0..POINTS).max_by(|&a, &b| off(a).total_cmp(&off(b))).expect("there are points");
        println!("{op} over {low} to {high}: {:.2} units of the {of:?} at {}", off(worst), points[worst]);
        if off(worst) > units {
            missed.push(format!("{op} of {}: {:.2} units off, not {units}", points[worst], off(worst)));
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}
