//! The cases on a GPU, or on what Vulkan gives for one.

use std::collections::BTreeSet;

use dsgc_ir::fuzz::Rng;
use dsgc_ir::{DType, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};

use super::check::{gpu, gpu_is_near, inputs, near, numbers, program, run_on};
use super::{COMPOSITES, PLAIN, WRONG};

#[test]
fn ops_have_their_values() {
    let (mut run, mut left_out) = (BTreeSet::new(), BTreeSet::new());
    let mut wrong = Vec::new();
    for (op, params, lines, given, expected) in PLAIN.iter().chain(COMPOSITES) {
        let program = program(params, lines);
        let Some(mut device) = gpu(&program) else {
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
    assert!(without.is_empty(), "no kernel for {without:?}");
}

#[test]
fn wrong_numbers_are_errors() {
    for (params, lines, given, expected) in WRONG {
        let program = program(params, lines);
        let Some(mut device) = gpu(&program) else { continue };
        let found = run_on(device.as_mut(), &program, given).expect_err("the numbers are wrong");
        assert!(found.contains(expected), "found `{found}`, expected `{expected}`");
    }
}

/// Runs lines that say `FLOAT` for the type beside the interpreter, in f32, bf16 and f16, on random numbers.
fn beside(params: &str, lines: &str, slack: f64) {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let [params, lines] = [params, lines].map(|text| text.replace("FLOAT", dtype.name()));
        let program = program(&params, &lines);
        let given = inputs(&program, 7);
        let named: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let oracle = Interp::new(program.clone(), Precision::F32).run("g", &named).unwrap_or_else(|e| panic!("{e:?}"));
        gpu_is_near(&program, &named, &oracle, slack);
    }
}

/// Rows that end within words, rows of several passes of a cube, blocks of rows and more than one block.
#[test]
fn regions_around_a_reduction() {
    for (rows, width) in [(1, 1), (3, 5), (9, 2), (70, 33), (5, 1000), (2, 64), (0, 7), (7, 0)] {
        let params = format!("%a: FLOAT[{rows}, {width}], %n: FLOAT[{rows}, 1], %w: FLOAT[{width}], %c: f32[]");
        let shape = format!("shape=[{rows}, {width}]");
        for (args, results, body) in [
            ("%a", "%y", "$1 = reduce_max $0 axes=[1]; $2 = sub $0, $1; return $2"),
            ("%a", "%y, %z", "$1 = mul $0, $0; $2 = reduce_min $1 axes=[1]; $3 = lt $2, $0; return $2, $3"),
            (
                "%a, %n, %w",
                "%y, %z, %u, %v",
                "$3 = mul $0, $2; $4 = reduce_max $3 axes=[1]; $5 = sub $4, $1; $6 = le $5, $1; $7 = mul $5, $2; \
                 $8 = where $6, $7, $0; return $5, $6, $8, $3",
            ),
            ("%a", "%y", "$1 = cast $0 dtype=f32; $2 = reduce_sum $1 axes=[1]; return $2"),
            (
                "%a, %c",
                "%y",
                "$2 = cast $0 dtype=f32; $3 = reduce_sum $2 axes=[1]; $4 = add $3, $1; $5 = mul $2, $4; return $5",
            ),
            ("%a, %w", "%y, %z", "$2 = mul $0, $1; $3 = reduce_max $2 axes=[0]; return $2, $3"),
            ("%a", "%y, %z", "$1 = lt $0, $0; $2 = reduce_min $0 axes=[0]; return $2, $1"),
            ("%a", "%y", "$1 = cast $0 dtype=f32; $2 = reduce_sum $1 axes=[0]; return $2"),
            ("%a, %n", "%y, %z", "$2 = mul $0, $1; $3 = reduce_max $2 axes=[0, 1]; return $3, $2"),
            ("%a", "%y", "$1 = cast $0 dtype=f32; $2 = reduce_sum $1 axes=[0, 1]; return $2"),
        ] {
            let params: Vec<&str> = params.split(", %").collect();
            let params: Vec<String> = params.iter().map(|p| format!("%{}", p.trim_start_matches('%'))).collect();
            let own: Vec<String> =
                params.into_iter().filter(|p| args.split(", ").any(|arg| p.starts_with(&format!("{arg}:")))).collect();
            beside(&own.join(", "), &format!("{results} = fused {args} {shape} body={{{body}}}"), 2e-5);
        }
    }
    let large = "%a: FLOAT[150, 140]";
    for (axes, results) in [("[0]", "%y, %z"), ("[0, 1]", "%y, %z"), ("[1]", "%y, %z")] {
        let body = format!("$1 = neg $0; $2 = reduce_max $1 axes={axes}; return $1, $2");
        beside(large, &format!("{results} = fused %a shape=[150, 140] body={{{body}}}"), 0.0);
        beside(large, &format!("%y = reduce_sum %a axes={axes}"), 2e-5);
    }
    beside("%a: FLOAT[5, 90, 3]", "%y = reduce_sum %a axes=[1]", 2e-5);
    beside("%a: FLOAT[5, 90, 3]", "%y = reduce_max %a axes=[0, 2]", 0.0);
}

/// Tiles that are not full, results that are stored the other way round, and regions whose words a tile cannot have.
#[test]
fn products_that_regions_finish() {
    for (m, k, n) in [(1, 7, 4), (70, 33, 130), (3, 5, 9)] {
        let params = format!(
            "%x: FLOAT[{m}, {k}], %w: FLOAT[{n}, {k}], %b: FLOAT[{n}], %r: FLOAT[{m}, {n}], %t: FLOAT[{n}, {m}]"
        );
        let relu = "{$2 = add $0, $1; $3 = relu $2; $4 = lt $2, $3; return $3, $4}";
        beside(&params, &format!("%y, %z = contract_fused %x, %w, %b spec=bd,vd->bv common=0 bodies=[{relu}]"), 1e-5);
        beside(
            &params,
            "%y = contract_fused %x, %w, %b, %r spec=bd,vd->bv common=0 bodies=[{$3 = add $0, $1; $4 = add $3, $2; return $4}]",
            1e-5,
        );
        beside(
            &params,
            "%y = contract_fused %w, %x, %t spec=vd,bd->vb common=0 bodies=[{$2 = mul $0, $1; return $2}]",
            1e-5,
        );
        beside(&params, "%y = contract %w, %x spec=vd,bd->vb", 1e-5);
    }
    beside("%a: FLOAT[3, 5, 7, 2], %b: FLOAT[3, 2, 9]", "%y = contract %a, %b spec=abcd,ade->ebca", 1e-5);
    beside("%a: FLOAT[3, 5, 7, 4], %b: FLOAT[3, 5, 4, 6]", "%y = contract %a, %b spec=abcd,abde->abce", 1e-5);
}

/// Sums of one sign, whose rounding errors grow with how many numbers are added one after the other: 8e-7 for all of these,
/// 2e-7 tile by tile.
#[test]
fn long_sums_of_products_round_by_tiles() {
    let program = program("%x: f32[16, 4096], %w: f32[16, 4096]", "%y = contract %x, %w spec=bd,vd->bv");
    let mut rng = Rng::new(3);
    let [x, w] = [(); 2].map(|()| Tensor::f32(&[16, 4096], (0..16 * 4096).map(|_| rng.unit() as f32).collect()));
    let given = [("x", &x), ("w", &w)];
    let mut device = gpu(&program).expect("it has a kernel for products");
    let found = device.run("g", &given).expect("it runs").remove(0).1.to_f64();
    let exact = Interp::new(program.clone(), Precision::F64).run("g", &given).expect("it runs").remove(0).1.to_f64();
    let squares: f64 = found.iter().zip(&exact).map(|(a, b)| ((a - b) / b).powi(2)).sum();
    let error = (squares / exact.len() as f64).sqrt();
    assert!(error < 4e-7, "sums of 4096 products are off by {error:.1e}");
}

#[test]
fn narrow_floats_are_rounded_as_on_the_host() {
    let mut numbers = vec![0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e30, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    numbers.extend([1.0 + 2f64.powi(-9), 1.0 + 3.0 * 2f64.powi(-9), 1.0 + 2f64.powi(-11), 1.0 + 3.0 * 2f64.powi(-12)]);
    // Around the smallest numbers of f16, and between them.
    numbers.extend((1..60).map(|i| f64::from(i) * 2f64.powi(-26)));
    numbers.extend((-30..16).flat_map(|e| [2f64.powi(e), -1.2345678 * 2f64.powi(e), 1.9999 * 2f64.powi(e)]));
    let n = numbers.len();
    for dtype in ["bf16", "f16"] {
        let program = program(&format!("%x: f32[{n}]"), &format!("%h = cast %x dtype={dtype}\n%y = cast %h dtype=f32"));
        let numbers = Tensor::f32(&[n], numbers.iter().map(|&x| x as f32).collect());
        let expected = Interp::new(program.clone(), Precision::F32).run("g", &[("x", &numbers)]).expect("it runs");
        gpu_is_near(&program, &[("x", &numbers)], &expected, 0.0);
    }
}

/// The token of the interpreter for every row: ties at the end of what is kept, and fewer tokens than `top_k`.
#[test]
fn tokens_are_chosen_as_on_the_host() {
    let (rows, mut rng) = (30, Rng::new(5));
    for width in [1, 3, 70, 1000] {
        // Few different numbers, of both signs.
        let logits: Vec<f32> = (0..rows * width).map(|_| rng.between(-20, 20) as f32 / 8.0).collect();
        for (top_k, top_p) in [(0, 1.0), (5, 1.0), (2000, 1.0), (0, 0.7), (0, 0.1), (40, 0.8), (1, 0.5)] {
            let params = format!("%l: f32[{rows}, {width}], %k: key[], %r: i32[{rows}], %p: i32[]");
            let line = format!("%y = sample %l, %k, %r, %p temperature=0.9 top_k={top_k} top_p={top_p:?}");
            let program = program(&params, &line);
            let given = [
                Tensor::f32(&[rows, width], logits.clone()),
                Tensor::new(&[], dsgc_ir::Data::Key(vec![[7, 9]])),
                Tensor::i32(&[rows], (0..rows as i32).collect()),
                Tensor::i32(&[], vec![3]),
            ];
            let named: Vec<(&str, &Tensor)> = ["l", "k", "r", "p"].into_iter().zip(&given).collect();
            let oracle = Interp::new(program.clone(), Precision::F64).run("g", &named).expect("it runs");
            gpu_is_near(&program, &named, &oracle, 0.0);
        }
    }
}
