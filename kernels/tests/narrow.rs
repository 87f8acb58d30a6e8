//! Narrow floats on the CPU, and on a GPU, beside the interpreter, which computes in f32 and rounds every result to its type.

mod alone;
#[path = "check/mod.rs"]
#[allow(dead_code)] // The tests of ops use the rest.
mod check;

use alone::{bits, by_name, same_bits};
use check::{inputs, is_near, plan, program};
use dsgc_ir::{DType, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::Cpu;
use dsgc_kernels::interp::{Interp, Precision};

/// Runs lines that say `NARROW` for the type in both types, on three numbers of threads, bitwise equal, and on a GPU: off by
/// one unit in the last place at most, as sums in another order round to the next number now and then. `slack` is how far
/// the f32 before rounding may be off, relative above 1, where units are smaller than that.
fn compare(params: &str, lines: &str, range: i64, slack: f64) {
    for dtype in [DType::Bf16, DType::F16] {
        let [params, lines] = [params, lines].map(|text| text.replace("NARROW", dtype.name()));
        let program = program(&params, &lines);
        let given = inputs(&program, range);
        let named: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let oracle = Interp::new(program.clone(), Precision::F32).run("g", &named).unwrap_or_else(|e| panic!("{e:?}"));
        let runs = [1, 2, 3].map(|threads| {
            Cpu::poisoned(plan(&program, threads), threads).run("g", &named).unwrap_or_else(|e| panic!("{e:?}"))
        });
        assert!(
            runs[1..].iter().all(|r| format!("{r:?}") == format!("{:?}", runs[0])),
            "threads change bits of {lines}"
        );
        let graph = program.graph("g").expect("it is called g");
        for (((name, found), (_, expected)), (_, value)) in runs[0].iter().zip(&oracle).zip(&graph.outputs) {
            is_near(found, expected, graph.ty(*value).dtype, slack)
                .unwrap_or_else(|why| panic!("%{name}: {why} in\n{lines}"));
        }
        #[cfg(feature = "wgpu")]
        check::gpu_is_near(&program, &named, &oracle, slack.max(1e-6));
    }
}

#[test]
fn products_of_narrow_floats() {
    // With the number of terms of a sum, whose root says how far its f32 strays on its way.
    for (a, b, spec, terms) in [
        ("5, 7, 33", "21, 33", "btd,vd->btv", 33),
        ("5, 70, 21", "5, 70, 33", "btv,btd->vd", 350),
        ("3, 5, 7, 2", "3, 2, 9", "abcd,ade->ebca", 2),
        // Sums over two dims that do not lie one behind the other: the result is rounded once.
        ("40, 5, 60", "60, 40, 3", "abc,cad->bd", 2400),
        ("1003", "1003", "a,a->", 1003),
        ("0, 3", "3, 2", "ab,bc->ac", 3),
        ("2, 0", "0, 3", "ab,bc->ac", 0),
        // Few rows and a large matrix, as in decoding.
        ("4, 1, 333", "303, 333", "btd,vd->btv", 333),
        ("16, 1024", "66, 1024", "md,nd->mn", 1024),
        ("2, 90, 128", "200, 128", "btd,vd->btv", 128),
        // Two neighbours that begin where a word does, along the sum and across it.
        ("6, 70", "9, 70", "md,nd->mn", 70),
        ("70, 6", "70, 10", "dm,dn->mn", 70),
        // Work for every multiprocessor of a large GPU, by tiles of the larger size on tensor cores.
        ("133, 128, 40", "133, 40, 128", "bmd,bdn->bmn", 40),
    ] {
        for wide in ["", ":f32"] {
            let params = format!("%a: NARROW[{a}], %b: NARROW[{b}]");
            let line = format!("%y = contract %a, %b spec={spec}{wide}");
            compare(&params, &line, 1, 1e-6 * f64::from(terms).sqrt());
        }
    }
}

/// Products that compute in narrow floats, where a device has tensor cores, and no others.
#[cfg(feature = "wgpu")]
#[test]
fn reports_say_what_runs_on_tensor_cores() {
    use dsgc_ir::{Bindings, Dim, Op, Target, Type};
    use dsgc_kernels::cube::{CubeTarget, Platform};
    let (f32, bf16, f16) = (DType::F32, DType::Bf16, DType::F16);
    for (cores, left, right, expected) in [
        (true, bf16, bf16, true),
        (true, f16, f16, true),
        (true, f32, f32, false),
        (true, f32, bf16, false),
        (false, bf16, bf16, false),
    ] {
        let target = CubeTarget { platform: Platform::Cuda, allocation: None, cores };
        let matrix = |dtype| Type::new(dtype, vec![Dim::from(64usize); 2]);
        let op = Op::Contract { spec: "md,nd->mn".into() };
        let said = target.lowering(&op, &[matrix(left), matrix(right)], &Bindings::new()).expect("it has kernels");
        assert_eq!(said.starts_with("product, tensor cores, tiles of"), expected, "{said}");
    }
}

#[test]
fn composites_of_narrow_floats() {
    let heads = "%q: NARROW[2, 9, 4, 8], %k: NARROW[2, 9, 2, 8], %v: NARROW[2, 9, 2, 8], %segment: i32[2, 9]";
    compare(heads, "%y, %z = attention %q, %k, %v, %segment causal=true scale=0.5 window=0", 1, 1e-5);
    let grads = "%y, %z = attention %q, %k, %v, %segment causal=true scale=0.5 window=0
%a, %b, %c = attention_grad %q, %k, %v, %segment, %y, %z, %dy causal=true scale=0.5 window=0";
    compare(&format!("{heads}, %dy: NARROW[2, 9, 4, 8]"), grads, 1, 1e-4);
    for new in [1, 3] {
        let q = format!(
            "%q: NARROW[2, {new}, 4, 8], %k: NARROW[2, 9, 2, 8], %v: NARROW[2, 9, 2, 8], %segment: i32[2, 9], %p: i32[]"
        );
        compare(&q, "%y = cached_attention %q, %k, %v, %segment, %p scale=0.5 window=0", 6, 1e-5);
    }
    // Rows that end within words, and rows that do not.
    for width in [333, 334] {
        let rows = format!("%x: NARROW[3, 5, {width}], %t: i32[3, 5]");
        compare(&rows, "%y = token_logp %x, %t", 333, 1e-5);
        compare(&format!("{rows}, %g: f32[3, 5]"), "%y = token_logp_grad %x, %t, %g", 333, 1e-6);
    }
    compare("%x: NARROW[20, 33], %t: i32[3, 5]", "%y = embed %x, %t", 20, 0.0);
    compare("%g: NARROW[3, 5, 33], %t: i32[3, 5]", "%y = embed_grad %t, %g rows=20", 20, 1e-6);
    let added = "%x: f32[20, 33], %t: i32[3, 5], %g: NARROW[3, 5, 33]";
    compare(added, "%y = add_rows %x, %t, %g", 20, 1e-6);
    for half in [3, 4] {
        let params = format!("%x: NARROW[2, 5, 3, {}], %p: i32[2, 5], %f: f32[{half}]", 2 * half);
        compare(&params, "%y = rope %x, %p, %f inverse=false", 5, 1e-6);
    }
    for axes in ["[0, 1]", "[2]", "[0, 1, 2]"] {
        compare("%x: NARROW[7, 9, 33]", &format!("%y = reduce_sum %x axes={axes}"), 1, 1e-4);
        compare("%x: NARROW[7, 9, 33]", &format!("%y = reduce_max %x axes={axes}"), 1, 0.0);
    }
}

#[test]
fn moves_of_narrow_floats() {
    for line in [
        "%y = broadcast %x shape=[3, 20, 30, 7]",
        "%y = transpose %x order=[2, 0, 1]",
        "%y = slice %x axis=1 start=3 end=11",
        "%y = pad %x axis=1 before=3 after=1",
        "%y = concat %x, %x axis=1",
        "%y = slice_at %x, %p axis=1 len=4",
        "%y = write_at %x, %n, %p axis=1",
        "%y = reshape %x shape=[4200]",
    ] {
        compare("%x: NARROW[20, 30, 7], %n: NARROW[20, 4, 7], %p: i32[]", line, 5, 0.0);
    }
}

/// Every step of a region, twice so that arithmetic is compiled, beside the op alone and the interpreter: the same bits
/// for all pairs of awkward numbers, and for functions that a library computes within a unit.
#[test]
fn elementwise_ops_round_once_and_alike() {
    let awkward =
        [f64::NAN, -0.0, 0.0, 1.0, -1.0, f64::INFINITY, f64::NEG_INFINITY, 1e30, -0.1, 3e9, 1e-41, 2.5, 65504.0, 257.0];
    let unary = "neg; abs; relu; cast dtype=f32; cast dtype=i32; cast dtype=bool; cast dtype=bf16; cast dtype=f16";
    let unary = unary.split("; ").map(|op| (op, "A", "B")).chain([("gelu", "A", "B"), ("tanh", "A", "B")]);
    let binary = "add sub mul div max min eq ne lt le".split(' ').map(|op| (op, "A, B", "B, A"));
    for dtype in ["bf16", "f16", "f32"] {
        for (op, x, y) in unary.clone().chain(binary.clone()).chain([("where", "C, A, B", "C, B, A")]) {
            let (name, attribute) = op.split_once(' ').unwrap_or((op, ""));
            let ran = same_bits(dtype, &awkward, [name, attribute], [x, y]);
            if !["gelu", "tanh"].contains(&name) {
                let expected = Interp::new(ran.program, Precision::F32).run("g", &by_name(&ran.inputs));
                let expected = expected.unwrap_or_else(|e| panic!("{e:?}"));
                assert_eq!(ran.bits, [0, 1].map(|i| bits(&expected[i].1)), "{op} of {dtype}");
            }
        }
    }
}
