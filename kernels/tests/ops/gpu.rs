//! The cases on a GPU, or on what Vulkan gives for one.

use std::collections::BTreeSet;

use dsgc_ir::{Program, Target, Type};
use dsgc_kernels::Device;
use dsgc_kernels::cube::{CubeTarget, Platform, open};

use super::check::{near, numbers, plan_for, program, run_on};
use super::{COMPOSITES, PLAIN, WRONG};

/// The platform that `DSGC_GPU` names; Vulkan unless it names another.
fn target() -> CubeTarget {
    let cuda = std::env::var("DSGC_GPU").is_ok_and(|name| name == Platform::Cuda.name());
    CubeTarget { platform: if cuda { Platform::Cuda } else { Platform::Wgpu } }
}

/// The device with the program, where it has all its kernels.
fn device(program: &Program) -> Option<Box<dyn Device>> {
    let graph = &program.graphs[0];
    for (_, op) in graph.ops() {
        let types: Vec<Type> = op.args.iter().map(|&v| graph.ty(v).clone()).collect();
        target().missing_kernel(&op.op, &types).is_none().then_some(())?;
    }
    let planned = plan_for(program, &target()).unwrap_or_else(|fault| panic!("{fault}\n{program}"));
    Some(open(target().platform, planned).unwrap_or_else(|e| panic!("{}", e.message)))
}

#[test]
fn ops_have_their_values() {
    let (mut run, mut left_out) = (BTreeSet::new(), BTreeSet::new());
    let mut wrong = Vec::new();
    for (op, params, lines, given, expected) in PLAIN.iter().chain(COMPOSITES) {
        let program = program(params, lines);
        let Some(mut device) = device(&program) else {
            left_out.insert(*op);
            continue;
        };
        run.insert(*op);
        let found: Vec<Vec<f64>> = match run_on(device.as_mut(), &program, given) {
            Ok(all) => all.iter().map(numbers).collect(),
            Err(why) => {
                wrong.push(format!("`{op}`: {why}\n{program}"));
                continue;
            }
        };
        let equal = found.len() == expected.len()
            && found
                .iter()
                .zip(*expected)
                .all(|(a, b)| a.len() == b.len() && a.iter().zip(*b).all(|(&a, &b)| near(a, b, 2e-6)));
        if !equal {
            wrong.push(format!("`{op}`: found {found:?}, expected {expected:?}\n{program}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let without: Vec<&str> = left_out.difference(&run).copied().collect();
    assert_eq!(without, ["contract_fused"]);
}

#[test]
fn wrong_numbers_are_errors() {
    for (params, lines, given, expected) in WRONG {
        let program = program(params, lines);
        let Some(mut device) = device(&program) else { continue };
        let found = run_on(device.as_mut(), &program, given).expect_err("the numbers are wrong");
        assert!(found.contains(expected), "found `{found}`, expected `{expected}`");
    }
}
