//! Products with weights that are kept in fewer bits, beside the interpreter and beside the same product of the same numbers
//! in full, and on a GPU.

#[path = "check/mod.rs"]
#[allow(dead_code)] // The tests of ops use the rest.
mod check;

use self::check::plan;
use dsgc_ir::fuzz::Rng;
use dsgc_ir::{Bindings, DType, Program, Quantized, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::Cpu;
use dsgc_kernels::interp::{Interp, Precision};

fn inputs(program: &Program) -> Vec<(String, Tensor)> {
    let graph = program.graph("g").expect("it is called g");
    let tensor = |(i, v)| {
        let shape = graph.ty(v).shape(&Bindings::new()).expect("the dims are numbers");
        let (n, mut rng) = (shape.iter().product(), Rng::new(91 + i as u64));
        let numbers = (0..n).map(|_: usize| (2.0 * rng.unit() - 1.0) as f32).collect();
        (graph.name_of(v).to_string(), Tensor::f32(&shape, numbers))
    };
    graph.inputs().enumerate().map(tensor).collect()
}

/// What a product computes in, and what its weights are kept in.
fn types() -> Vec<(DType, DType)> {
    let some = [(8, 32), (8, 128), (4, 64)].map(|(bits, group)| Quantized::new(bits, group));
    let quantized = some.map(|q| DType::Quantized(q.expect("there is such a one")));
    let floats = [DType::F32, DType::Bf16, DType::F16];
    let all = floats.into_iter().flat_map(|x| quantized.map(|w| (x, w)));
    all.chain([(DType::F32, DType::Bf16), (DType::F32, DType::F16)]).collect()
}

/// Runs lines where `X` is what is computed in and `W` what weights are kept in: near the interpreter, and the same bits as
/// lines that widen the weights, at every number of threads.
fn check(params: &str, lines: &str, widened: &str, terms: f64) {
    for (x, w) in types() {
        let [params, lines, widened] =
            [params, lines, widened].map(|text| text.replace('X', x.name()).replace('W', w.name()));
        let program = check::program(&params, &lines);
        let given = inputs(&program);
        let named: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let run = |program: &Program, threads: usize| {
            let outputs = Cpu::poisoned(plan(program, threads), threads).run("g", &named);
            outputs.unwrap_or_else(|e| panic!("{e:?}")).into_iter().map(|(_, tensor)| tensor).collect::<Vec<_>>()
        };
        let found = run(&program, 1);
        for threads in [2, 3] {
            assert_eq!(found, run(&program, threads), "threads change bits of {lines}");
        }
        assert_eq!(found, run(&check::program(&params, &widened), 2), "{lines} beside {widened} with {params}");
        let oracle = Interp::new(program.clone(), Precision::F32).run("g", &named).unwrap_or_else(|e| panic!("{e:?}"));
        for (found, (_, expected)) in found.iter().zip(&oracle) {
            // Sums that are as near may still round to neighbours.
            check::is_near(found, expected, x, 1e-6 * terms.sqrt())
                .unwrap_or_else(|why| panic!("{why} in {lines} with {params}"));
        }
        // Kernels of a GPU depend on the types alone, and take long to make.
        #[cfg(feature = "wgpu")]
        if matches!(x, DType::F32 | DType::Bf16) {
            check::gpu_is_near(&program, &named, &oracle, 1e-6 * terms.sqrt());
        }
    }
}

#[test]
fn products_take_weights_as_they_are_kept() {
    for (x, w, spec, terms) in [
        // Few rows, as in decoding, of matrices that are large enough to be read as they lie in f32 too.
        ("1, 320", "264, 320", "bd,vd->bv", 320.0),
        ("4, 1, 512", "130, 512", "btd,vd->btv", 512.0),
        ("16, 1024", "66, 1024", "md,nd->mn", 1024.0),
        // Many rows.
        ("5, 7, 100", "21, 100", "btd,vd->btv", 100.0),
        ("40, 64", "300, 64", "bd,vd->bv", 64.0),
        // What a gradient needs of a weight, and other orders.
        ("5, 7, 21", "21, 100", "btv,vd->btd", 21.0),
        ("40, 21", "100, 21", "bv,dv->db", 21.0),
        ("0, 64", "30, 64", "bd,vd->bv", 1.0),
    ] {
        let params = format!("%x: X[{x}], %w: W[{w}]");
        let (operands, out) = spec.split_once("->").expect("a contraction");
        let (left, right) = operands.split_once(',').expect("of two");
        for (spec, operands) in [(spec.to_string(), "%x, W"), (format!("{right},{left}->{out}"), "W, %x")] {
            let line = |weight| format!("%y = contract {} spec={spec}", operands.replace('W', weight));
            check(&params, &line("%w"), &format!("%d = cast %w dtype=X\n{}", line("%d")), terms);
        }
    }
}

#[test]
fn products_of_one_operand_take_them_together() {
    for rows in [3, 20] {
        let params = format!("%x: X[{rows}, 320], %v: W[256, 320], %w: W[320, 320]");
        let line = |v, w| format!("%a, %b = contract_each %x, {v}, {w} spec=bd,vd->bv common=0");
        let widened = format!("%d = cast %v dtype=X\n%e = cast %w dtype=X\n{}", line("%d", "%e"));
        check(&params, &line("%v", "%w"), &widened, 320.0);
    }
    // One matrix for several operands.
    let params = "%x: X[3, 320], %y: X[20, 320], %w: W[256, 320]";
    let line = |w| format!("%a, %b = contract_each {w}, %x, %y spec=bd,vd->bv common=1");
    check(params, &line("%w"), &format!("%d = cast %w dtype=X\n{}", line("%d")), 320.0);
}

#[test]
fn casts_round_and_widen() {
    for w in Quantized::ALL.map(DType::Quantized) {
        for k in [5, 32, 100, 300] {
            for x in ["f32", "bf16", "f16"] {
                let params = format!("%x: f32[7, {k}]");
                let lines = format!("%q = cast %x dtype={w}\n%y = cast %q dtype={x}");
                let program = check::program(&params, &lines);
                let given = inputs(&program);
                let named: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
                let expected = Interp::new(program.clone(), Precision::F32).run("g", &named).expect("it runs");
                for threads in [1, 2, 3] {
                    let found = Cpu::poisoned(plan(&program, threads), threads).run("g", &named).expect("it runs");
                    assert_eq!(found, expected, "{w} to {x}");
                }
                #[cfg(feature = "wgpu")]
                check::gpu_is_near(&program, &named, &expected, 0.0);
            }
        }
    }
}
