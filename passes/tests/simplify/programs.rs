//! What the pass promises of whole programs.

use dsgc_ir::cost::graph_time;
use dsgc_ir::fuzz::random_program;
use dsgc_ir::{Program, parse};
use dsgc_kernels::interp::InterpTarget;
use dsgc_passes::{Numerics, PassContext, canonicalize, infer, simplify};

fn time(program: &Program) -> u64 {
    program.graphs.iter().map(|g| graph_time(g, &g.upper_bounds()).expect("all dims have bounds")).sum()
}

#[test]
fn no_program_gets_worse() {
    let mut better = 0;
    for seed in 0..150 {
        let mut context = PassContext::new(&InterpTarget);
        context.numerics = if seed % 2 == 0 { Numerics::Exact } else { Numerics::Finite };
        let mut program = random_program(seed, 20 + seed as usize % 40);
        for pass in [infer::PASS, canonicalize::PASS] {
            program = (pass.run)(program, &context).expect("it fits");
        }
        let before = time(&program);
        let after = time(&simplify::run(program.clone(), &context).expect("it fits"));
        assert!(after <= before, "seed {seed}: {before} before, {after} after\n{program}");
        better += usize::from(after < before);
    }
    assert!(better > 30, "only {better} programs got better");
}

#[test]
fn equal_programs_have_equal_results_in_any_thread() {
    let texts = || {
        (0..40u64).map(|seed| {
            let context = PassContext::new(&InterpTarget);
            let program = infer::run(random_program(seed, 40), &context).expect("it fits");
            simplify::run(program, &context).expect("it fits").to_string()
        })
    };
    let here: Vec<String> = texts().collect();
    // Names that are interned anywhere are so in another order here.
    let there = std::thread::spawn(move || texts().rev().collect::<Vec<String>>());
    let mut there = there.join().expect("the thread ends");
    there.reverse();
    assert_eq!(here, there);
}

/// A model of so many equal layers.
fn layers(n: usize) -> Program {
    let mut text = String::from("level logical\n\ngraph @g(%x.0: f32[64, 256], %w: f32[256]) {\n");
    for i in 0..n {
        let tag = format!("layer model.layers/{i}");
        text += &format!("  %a.{i} = broadcast %w shape=[64, 256] : f32[64, 256] {tag}\n");
        text += &format!("  %b.{i} = exp %a.{i} : f32[64, 256] {tag}\n");
        text += &format!("  %x.{} = mul %x.{i}, %b.{i} : f32[64, 256] {tag}\n", i + 1);
    }
    text += &format!("  return y=%x.{n}\n}}\n");
    parse(&text).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn equal_layers_are_searched_once_and_rewritten_alike() {
    let mut context = PassContext::new(&InterpTarget);
    context.explain = true;
    let program = infer::run(layers(24), &context).expect("it fits");
    let after = simplify::run(program, &context).expect("it fits");
    let notes = context.take_notes();
    assert_eq!(notes.matched.get("unary of broadcast"), Some(&24), "{notes:?}");
    let [change] = &notes.changes[..] else { panic!("{:?}", notes.changes) };
    assert!(change.starts_with("@g forward model.layers/0, and 23 equal ones\n"), "{change}");
    assert!(change.contains("%b.0 = exp %a.0  =>  broadcast (exp %w) shape=[64, 256]"), "{change}");
    assert!(change.contains("by unary of broadcast"), "{change}");
    let graph = &after.graphs[0];
    assert_eq!(graph.len(), 24 * 3);
    let small = graph.ops().filter(|(_, op)| op.op.name() == "exp" && graph.ty(op.result()).rank() == 1);
    assert_eq!(small.count(), 24);
}

#[test]
fn more_than_exact_is_asked_for() {
    let text = "graph @g(%x: f32[64, 256]) {\n  %y = sub %x, %x : f32[64, 256]\n  return y=%y\n}\n";
    let count = |numerics| {
        let mut context = PassContext::new(&InterpTarget);
        context.numerics = numerics;
        let program = infer::run(parse(text).unwrap_or_else(|e| panic!("{e}")), &context).expect("it fits");
        simplify::run(program, &context).expect("it fits").op_counts().get("sub").copied().unwrap_or(0)
    };
    assert_eq!((count(Numerics::Exact), count(Numerics::Reassociating), count(Numerics::Finite)), (1, 1, 0));
}
