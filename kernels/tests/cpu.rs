//! The CPU against the interpreter: random programs, every composite at awkward sizes, threads, poison.

mod alone;
#[path = "check/mod.rs"]
#[allow(dead_code)] // The tests of ops use the rest.
mod check;

use alone::same_bits;
use check::{plan, program, try_plan};
use dsgc_ir::fuzz::{Rng, random_bindings, random_inputs, random_program};
use dsgc_ir::{Bindings, DType, Data, Program, StateId, Tensor, Type};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::Cpu;
use dsgc_kernels::interp::{Interp, Precision};

type Results = Result<Vec<Tensor>, String>;

/// Runs every graph once on the same states and inputs: all outputs and all states.
fn run(mut device: impl Device, program: &Program, seed: u64) -> Results {
    for (id, state) in program.state_ids() {
        device.set_state(id, &numbers(&state.ty, seed + u64::from(id.0)));
    }
    let mut results = Vec::new();
    for graph in &program.graphs {
        let bindings = random_bindings(graph, seed);
        let inputs = random_inputs(graph, &bindings, seed);
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        results.extend(device.run(&graph.name, &inputs).map_err(|e| e.message)?.into_iter().map(|(_, t)| t));
    }
    results.extend((0..program.states.len()).map(|i| device.state(StateId(i as u32))));
    Ok(results)
}

/// Numbers of `[-1, 1)` for a type with constant dims.
fn numbers(ty: &Type, seed: u64) -> Tensor {
    let shape = ty.shape(&Bindings::new()).expect("the dims are numbers");
    let (n, mut rng) = (shape.iter().product(), Rng::new(seed));
    let data = match ty.dtype {
        DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => {
            Data::F32((0..n).map(|_| (2.0 * rng.unit() - 1.0) as f32).collect())
        }
        DType::I32 => Data::I32((0..n).map(|_| rng.between(0, 2) as i32).collect()),
        DType::Bool => Data::Bool((0..n).map(|_| rng.once_in(2)).collect()),
        DType::Key => Data::Key((0..n).map(|_| [rng.bits() as u32, rng.bits() as u32]).collect()),
    };
    Tensor::new(&shape, data)
}

/// Equal up to the last digits of single precision: floats relative to the tensor's largest element, and to the square
/// root of the number of terms in a sum, which is how far a sum of such numbers strays on its way.
fn assert_near(found: &Tensor, expected: &Tensor, terms: usize, what: &str) {
    assert_eq!((found.dtype(), &found.shape), (expected.dtype(), &expected.shape), "{what}");
    if found.dtype() == DType::Key {
        return assert_eq!(found, expected, "{what}");
    }
    let (a, b) = (found.to_f64(), expected.to_f64());
    let largest = b.iter().filter(|x| x.is_finite()).fold(1.0, |m: f64, x| m.max(x.abs()));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let near =
            a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 2e-5 * largest + 1e-6 * (terms as f64).sqrt();
        // What is too large for single precision in one is an infinity in the other.
        let overflow = b.abs() > 1e37 && (a.is_infinite() || a.abs() > 1e37);
        assert!(near || overflow, "{what}: element {i} is {a}, expected {b}");
    }
}

/// Whether a tensor is no worse than what the interpreter makes of it in single precision: no element is farther from the
/// exact one than twice the interpreter's farthest. Truth values count as 0 and 1: where two numbers are equal but for
/// rounding, single precision may say either.
fn strays_alike(found: &Tensor, single: &Tensor, exact: &Tensor) -> bool {
    if found.dtype() == DType::Key || found.shape != exact.shape {
        return false;
    }
    let (found, single, exact) = (found.to_f64(), single.to_f64(), exact.to_f64());
    let error = |x: &[f64]| x.iter().zip(&exact).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs()));
    found.iter().chain(&exact).all(|x| x.is_finite()) && error(&found) <= 2.0 * error(&single)
}

#[test]
fn random_programs_compute_what_the_interpreter_computes() {
    let mut programs = 0;
    for seed in 0..300 {
        let program = random_program(seed, 24);
        let Ok(planned) = try_plan(&program, 2) else { continue };
        programs += 1;
        let oracle = run(Interp::new(program.clone(), Precision::F32), &program, seed);
        let exact = run(Interp::new(program.clone(), Precision::F64), &program, seed);
        let found = run(Cpu::new(planned, 2), &program, seed);
        match (&found, &oracle, &exact) {
            (Ok(found), Ok(oracle), Ok(exact)) => {
                for (i, ((a, b), exact)) in found.iter().zip(oracle).zip(exact).enumerate() {
                    // Some programs lose digits, such as norms of nearly equal numbers: all of single precision then
                    // strays as far as the interpreter's does.
                    if !strays_alike(a, b, exact) {
                        assert_near(a, b, 0, &format!("seed {seed}, result {i} of\n{program}"));
                    }
                }
            }
            (found, oracle, _) => assert_eq!(found.is_err(), oracle.is_err(), "seed {seed}: {found:?} and {oracle:?}"),
        }
    }
    assert!(programs > 150, "only {programs} programs can be planned");
}

#[test]
fn threads_and_poison_change_no_bit() {
    for seed in 0..100 {
        let program = random_program(1000 + seed, 24);
        if try_plan(&program, 1).is_err() {
            continue;
        }
        let bits = |results: Results| -> Vec<String> {
            results.map_or_else(|e| vec![e], |all| all.iter().map(|t| format!("{t:?}")).collect())
        };
        let one = bits(run(Cpu::new(plan(&program, 1), 1), &program, seed));
        for threads in [2, 3] {
            assert_eq!(one, bits(run(Cpu::new(plan(&program, threads), threads), &program, seed)), "seed {seed}");
        }
        assert_eq!(one, bits(run(Cpu::poisoned(plan(&program, 2), 2), &program, seed)), "seed {seed}, poisoned");
    }
}

/// Runs `@g` with constant dims on random numbers, on three numbers of threads: bitwise equal, and near the f64
/// interpreter. `ranges` bounds the integers of each input.
fn compare(params: &str, lines: &str, ranges: &[(&str, i64)]) {
    let program = program(params, lines);
    let graph = program.graph("g").expect("it is called g");
    let inputs: Vec<(String, Tensor)> = graph
        .inputs()
        .enumerate()
        .map(|(i, v)| {
            let mut tensor = numbers(graph.ty(v), 77 + i as u64);
            if let (Data::I32(all), Some(range)) = (&mut tensor.data, ranges.iter().find(|r| r.0 == graph.name_of(v))) {
                let mut rng = Rng::new(5);
                // Ascending numbers with runs, as segments are; any order will do for tokens.
                all.iter_mut().for_each(|x| *x = rng.between(0, range.1 - 1) as i32);
            }
            (graph.name_of(v).to_string(), tensor)
        })
        .collect();
    let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let oracle = Interp::new(program.clone(), Precision::F64).run("g", &named).unwrap_or_else(|e| panic!("{e:?}"));
    let runs: Vec<Vec<(String, Tensor)>> = [1, 2, 3]
        .map(|threads| {
            Cpu::poisoned(plan(&program, threads), threads).run("g", &named).unwrap_or_else(|e| panic!("{e:?}"))
        })
        .to_vec();
    for ((name, found), (_, expected)) in runs[0].iter().zip(&oracle) {
        let terms = inputs.iter().map(|(_, t)| t.len()).max().unwrap_or(0) / expected.len().max(1);
        assert_near(found, expected, terms, &format!("%{name} of\n{lines}"));
    }
    assert!(runs[1..].iter().all(|r| format!("{r:?}") == format!("{:?}", runs[0])), "threads change bits of\n{lines}");
}

/// A region that uses its operands in arithmetic and functions, as text.
const REGION: &str = "%y, %z = fused %a, %b, %c, %m shape=[SHAPE] body={$4 = mul $0, $1; $5 = const value=0.5 dtype=f32; \
                      $6 = add $4, $5; $7 = tanh $6; $8 = where $3, $7, $2; $9 = lt $8, $0; $10 = silu $8; \
                      $11 = sub $10, $0; return $9, $11}";

#[test]
fn regions_of_every_layout() {
    // Shape of the region, and of four operands.
    for (shape, [a, b, c, m]) in [
        ("5000", ["5000", "1", "", "5000"]),
        ("3, 7, 1100", ["3, 7, 1100", "1100", "3, 1, 1", "7, 1100"]),
        ("3, 1100, 7", ["1100, 7", "3, 1100, 1", "7", "3, 1, 1"]),
        ("300, 3", ["300, 3", "300, 1", "3", ""]),
        ("40, 50, 30", ["40, 1, 30", "50, 1", "40, 50, 1", "1, 1, 30"]),
        ("2, 70000", ["2, 70000", "2, 1", "70000", "2, 70000"]),
        ("1, 1", ["1, 1", "", "1", "1, 1"]),
        ("0, 5", ["0, 5", "5", "", "0, 1"]),
        ("", ["", "", "", ""]),
        ("13", ["13", "13", "13", "13"]),
    ] {
        let params = format!("%a: f32[{a}], %b: f32[{b}], %c: f32[{c}], %m: bool[{m}]");
        compare(&params, &REGION.replace("SHAPE", shape), &[]);
    }
}

/// Results that no cache holds are written past them: by all threads, or by the one that has enough of them.
#[test]
fn large_results_are_those_of_the_interpreter() {
    compare(
        "%a: f32[1030, 3072], %b: f32[3072]",
        "%b.1 = broadcast %b shape=[1030, 3072]
%y, %z = fused %a, %b.1 shape=[1030, 3072] body={$2 = add $0, $1; $3 = lt $2, $0; $4 = exp $2; return $3, $4}",
        &[],
    );
    let rows = "%x: f32[4100, 768], %w: f32[768], %b: f32[768]";
    compare(rows, "%y = layer_norm %x, %w, %b eps=1e-5", &[]);
    compare("%g: f32[3, 768], %t: i32[3]", "%y = embed_grad %t, %g rows=4100", &[("t", 4100)]);
}

/// Every step of a region, twice so that arithmetic is compiled, beside the op alone: the same bits for all pairs of
/// awkward numbers.
#[test]
fn every_step_has_the_bits_of_its_op() {
    let floats = [f64::NAN, -0.0, 0.0, 1.0, -1.0, f64::INFINITY, f64::NEG_INFINITY, 1e30, -0.1, 3e9, -3e9, 1e-41, 2.5];
    let ints = [0.0, 1.0, -1.0, 7.0, f64::from(i32::MAX), f64::from(i32::MIN), 16777217.0];
    let casts = "cast dtype=f32; cast dtype=i32; cast dtype=bool";
    let functions = "exp; log; sqrt; tanh; sigmoid; log_sigmoid; relu; gelu; gelu_tanh; silu; erf";
    for (dtype, numbers, unary, binary) in [
        ("f32", &floats[..], format!("neg; abs; {functions}; {casts}"), "add sub mul div max min pow eq ne lt le"),
        ("i32", &ints, format!("neg; abs; {casts}"), "add sub mul max min eq ne lt le"),
        ("bool", &[0.0, 1.0], format!("not; {casts}"), "and or eq ne"),
    ] {
        for op in unary.split("; ") {
            let (name, attribute) = op.split_once(' ').unwrap_or((op, ""));
            same_bits(dtype, numbers, [name, attribute], ["A", "B"]);
        }
        for name in binary.split(' ') {
            same_bits(dtype, numbers, [name, ""], ["A, B", "B, A"]);
        }
        same_bits(dtype, numbers, ["where", ""], ["C, A, B", "C, B, A"]);
    }
}

#[test]
fn products_of_every_layout() {
    for (a, b, spec) in [
        ("5, 7, 33", "21, 33", "btd,vd->btv"),
        ("5, 7, 21", "21, 33", "btv,vd->btd"),
        ("5, 70, 21", "5, 70, 33", "btv,btd->vd"),
        ("100003", "100003", "a,a->"),
        ("17, 3, 5", "17, 5, 4", "bij,bjk->bik"),
        ("17, 3, 5", "17, 5, 4", "bij,bjk->kbi"),
        ("3, 5, 7, 2", "3, 2, 9", "abcd,ade->ebca"),
        ("6, 5", "6, 5", "ab,ab->ba"),
        ("6, 5", "5, 6", "ab,ba->"),
        ("6, 5", "4, 3", "ab,cd->dbca"),
        ("4, 5, 6", "6, 4, 3", "abc,cad->bd"),
        ("1, 1", "1, 9", "ab,bc->ac"),
        ("0, 3", "3, 2", "ab,bc->ac"),
        ("2, 0", "0, 3", "ab,bc->ac"),
        ("3, 0, 5", "4, 5, 0", "acd,bdc->ab"),
        // Few rows and a large matrix, as in decoding; with and without rests.
        ("1, 1, 768", "1000, 768", "btd,vd->btv"),
        ("4, 1, 333", "303, 333", "btd,vd->btv"),
        ("7, 515", "401, 515", "md,nd->mn"),
        ("16, 1024", "66, 1024", "md,nd->mn"),
        ("17, 1024", "66, 1024", "md,nd->mn"),
        // Large enough for several threads.
        ("2, 90, 128", "200, 128", "btd,vd->btv"),
        ("2, 90, 200", "2, 90, 128", "btv,btd->vd"),
        ("300, 40", "40", "ab,b->a"),
    ] {
        compare(&format!("%a: f32[{a}], %b: f32[{b}]"), &format!("%y = contract %a, %b spec={spec}"), &[]);
    }
}

/// So an answer does not depend on the others of its batch.
#[test]
fn products_of_one_operand_have_the_bits_that_they_have_alone() {
    // Few rows and large matrices; too many rows; a small matrix among large ones; a common second operand.
    let linear = ("btd,vd->btv", 0, "2, ROWS", ["700, 100", "8, 100", "1301, 100"]);
    let turned = ("btv,btd->vd", 1, "2, ROWS", ["2, ROWS, 70", "2, ROWS, 1", "2, ROWS, 33"]);
    for (spec, common, rows, others) in [linear, turned] {
        for (n, threads) in [(1, 1), (3, 2), (8, 3), (20, 2)] {
            let shape = |text: &str| text.replace("ROWS", &n.to_string());
            let others: Vec<String> = others.iter().map(|o| shape(o)).collect();
            let params: Vec<String> =
                others.iter().zip(["a", "b", "c"]).map(|(o, x)| format!("%{x}: f32[{o}]")).collect();
            let pair = |x: &str| if common == 0 { format!("%x, %{x}") } else { format!("%{x}, %x") };
            let text = format!(
                "graph @g(%x: f32[{}, 100], {}) {{
  %p, %q, %r = contract_each %x, %a, %b, %c spec={spec} common={common}
  %s = contract {} spec={spec}
  %t = contract {} spec={spec}
  %u = contract {} spec={spec}
  return p=%p, s=%s, q=%q, t=%t, r=%r, u=%u
}}",
                shape(rows),
                params.join(", "),
                pair("a"),
                pair("b"),
                pair("c")
            );
            let program = dsgc_ir::parse(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
            let results =
                run(Cpu::new(plan(&program, threads), threads), &program, 5).unwrap_or_else(|e| panic!("{e}"));
            for pair in results.chunks(2) {
                assert_eq!(pair[0], pair[1], "{spec} of {n} rows");
            }
        }
    }
}

#[test]
fn a_row_of_a_small_product_is_the_same_in_any_company() {
    let product = |rows: usize| {
        let program =
            program(&format!("%a: f32[{rows}, 515], %b: f32[401, 515]"), "%y = contract %a, %b spec=md,nd->mn");
        let mut device = Cpu::new(plan(&program, 2), 2);
        let given = |rows: i64, seed| numbers(&Type::new(DType::F32, vec![rows.into(), 515i64.into()]), seed);
        let (a, b) = (given(16, 1), given(401, 2));
        device.run("g", &[("a", &a.rows(0..rows)), ("b", &b)]).unwrap_or_else(|e| panic!("{e}")).remove(0).1
    };
    let all = product(16);
    for rows in 1..16 {
        assert_eq!(product(rows), all.rows(0..rows));
    }
}

#[test]
fn reductions_of_every_layout() {
    for (shape, axes) in [
        ("70000", "[0]"),
        ("3, 40000", "[1]"),
        ("400, 300", "[0]"),
        ("7, 90, 11", "[1]"),
        ("7, 9, 11", "[0, 2]"),
        ("5, 4, 3, 6", "[1, 3]"),
        ("5, 4, 3, 6", "[0, 2]"),
        ("5, 1, 1", "[1]"),
        ("1, 1", "[0, 1]"),
        ("0, 3", "[0]"),
        ("3, 0", "[0]"),
    ] {
        for op in ["reduce_sum", "reduce_max", "reduce_min"] {
            compare(&format!("%x: f32[{shape}]"), &format!("%y = {op} %x axes={axes}"), &[]);
            compare(&format!("%x: i32[{shape}]"), &format!("%y = {op} %x axes={axes}"), &[]);
        }
    }
    for reverse in ["true", "false"] {
        compare("%x: f32[30, 40, 20]", &format!("%y = cumsum %x axis=1 reverse={reverse}"), &[]);
        compare("%x: i32[30, 0, 2]", &format!("%y = cumsum %x axis=1 reverse={reverse}"), &[]);
    }
}

#[test]
fn moves_of_every_layout() {
    for (shape, line) in [
        ("200, 300", "%y = transpose %x order=[1, 0]"),
        ("20, 30, 40", "%y = transpose %x order=[2, 0, 1]"),
        ("20, 30, 40", "%y = transpose %x order=[0, 2, 1]"),
        ("1, 300", "%y = broadcast %x shape=[200, 300]"),
        ("200, 1", "%y = broadcast %x shape=[200, 300]"),
        ("", "%y = broadcast %x shape=[20000]"),
        ("3, 1, 5", "%y = broadcast %x shape=[2, 3, 4, 5]"),
        ("200, 100", "%y = slice %x axis=1 start=3 end=99"),
        ("200, 100", "%y = slice %x axis=0 start=199 end=200"),
        ("200, 100", "%y = pad %x axis=1 before=2 after=1"),
        ("200, 100", "%y = pad %x axis=0 before=0 after=5"),
    ] {
        for dtype in ["f32", "i32", "bool"] {
            compare(&format!("%x: {dtype}[{shape}]"), line, &[]);
        }
    }
    compare("%a: f32[90, 100], %b: f32[90, 3]", "%y = concat %a, %b, %a axis=1", &[]);
}

#[test]
fn composites_of_every_width() {
    for width in [1, 5, 16, 33, 768] {
        let params = format!("%x: f32[130, {width}], %w: f32[{width}], %b: f32[{width}], %g: f32[130, {width}]");
        compare(&params, "%y = layer_norm %x, %w, %b eps=1e-5", &[]);
        compare(&params, "%y, %z, %u = layer_norm_grad %x, %w, %g eps=1e-5", &[]);
        let params = format!("%x: f32[70, {width}], %t: i32[70], %g: f32[70]");
        compare(&params, "%y = token_logp %x, %t", &[("t", width)]);
        compare(&params, "%y = token_logp_grad %x, %t, %g", &[("t", width)]);
        let params = format!("%x: f32[9, {width}], %t: i32[7, 30], %g: f32[7, 30, {width}]");
        compare(&params, "%y = embed %x, %t", &[("t", 9)]);
        compare(&params, "%y = embed_grad %t, %g rows=9", &[("t", 9)]);
    }
    compare("%s: i32[3, 200]", "%y = position_in %s", &[("s", 3)]);
    // Rows of an index that comes again and again, and of one that never comes.
    compare("%x: f32[400, 37], %t: i32[900], %g: f32[900, 37]", "%y = add_rows %x, %t, %g", &[("t", 350)]);
    // More rows than a block has, and fewer.
    for (rows, width, vocabulary) in [(600, 24, 300), (257, 3, 33), (7, 40, 1000), (0, 5, 9)] {
        let params =
            format!("%x: f32[{rows}, {width}], %h: f32[{vocabulary}, {width}], %t: i32[{rows}], %g: f32[{rows}]");
        compare(&params, "%y = head_logp %x, %h, %t", &[("t", vocabulary)]);
        compare(&params, "%y, %z, %u = head_logp_grad %x, %h, %t, %g head=true", &[("t", vocabulary)]);
        compare(&params, "%y, %z = head_logp_grad %x, %h, %t, %g head=false", &[("t", vocabulary)]);
    }
    // Sizes of tensors that are not cut alike by blocks and threads.
    compare("%a: f32[20000], %b: f32[3], %c: f32[130, 70]", "%y = sum_squares %a, %b, %c, %a", &[]);
}

#[test]
fn root_mean_squares_and_rotations_of_every_width() {
    for width in [1, 5, 16, 33, 768] {
        let params = format!("%x: f32[130, {width}], %w: f32[{width}], %g: f32[130, {width}]");
        compare(&params, "%y = rms_norm %x, %w eps=1e-5", &[]);
        compare(&params, "%y, %z = rms_norm_grad %x, %w, %g eps=1e-5", &[]);
    }
    for (heads, half) in [(1, 1), (3, 8), (2, 33)] {
        let params = format!("%x: f32[3, 70, {heads}, {}], %p: i32[3, 70], %f: f32[{half}]", 2 * half);
        for inverse in ["true", "false"] {
            compare(&params, &format!("%y = rope %x, %p, %f inverse={inverse}"), &[("p", 200)]);
        }
    }
    for reverse in ["true", "false"] {
        compare("%x: f32[30, 40, 20]", &format!("%y = recurrence %x axis=1 decay=0.9 reverse={reverse}"), &[]);
    }
}

#[test]
fn places_known_when_it_runs() {
    for dtype in ["f32", "i32", "bool"] {
        let params = format!("%x: {dtype}[20, 30, 7], %n: {dtype}[20, 4, 7], %p: i32[]");
        compare(&params, "%y = slice_at %x, %p axis=1 len=4", &[("p", 27)]);
        compare(&params, "%y = write_at %x, %n, %p axis=1", &[("p", 27)]);
    }
    let program = program("%x: f32[3, 5], %p: i32[]", "%y = slice_at %x, %p axis=1 len=4");
    for place in [-1, 2] {
        let x = Tensor::f32(&[3, 5], vec![0.0; 15]);
        let found = Cpu::new(plan(&program, 1), 1).run("g", &[("x", &x), ("p", &Tensor::i32(&[], vec![place]))]);
        let why = found.expect_err("the places end before").message;
        assert!(why.contains(&format!("found place {place} for 4 of 5 places")), "{why}");
    }
}

#[test]
fn tokens_are_those_of_the_interpreter() {
    let params = "%l: f32[9, 300], %k: key[], %r: i32[9], %p: i32[]";
    for attributes in
        ["temperature=0.0 top_k=0 top_p=1.0", "temperature=0.7 top_k=0 top_p=1.0", "temperature=1.0 top_k=5 top_p=0.5"]
    {
        compare(params, &format!("%y = sample %l, %k, %r, %p {attributes}"), &[("r", 100), ("p", 50)]);
    }
}

#[test]
fn a_token_outside_of_the_table_is_an_error_not_a_crash() {
    let program = program("%x: f32[9, 4], %t: i32[3]", "%y = embed %x, %t");
    let (table, tokens) = (Tensor::f32(&[9, 4], vec![0.0; 36]), Tensor::i32(&[3], vec![0, 9, 1]));
    let found = Cpu::new(plan(&program, 2), 2).run("g", &[("x", &table), ("t", &tokens)]);
    let why = found.expect_err("there is no row 9").message;
    assert!(why.contains("found index 9, expected one of 0 to 8"), "{why}");
}
