//! Memory plans on the device that is made for them: whole compiled programs on the CPU, where all memory that holds
//! nothing is NaN, beside the interpreter in and out of the arena.

use std::collections::BTreeMap;

use dsgc_ir::fuzz::{Rng, random_bindings, random_inputs, random_program, random_tensor};
use dsgc_ir::{Bindings, DType, Op, Planned, Program, StateId, Target, Tensor, Type, parse};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PIPELINE, PassContext, compile};

fn plan(program: &Program, threads: usize) -> Planned {
    let target = CpuTarget { threads };
    compile(program.clone(), &PassContext::new(&target), &mut |_| {})
        .unwrap_or_else(|diags| panic!("{diags:?}\n{program}"))
}

/// All graphs, one after the other, twice: outputs, and states at the end.
fn run(device: impl Device + 'static, program: &Program, seed: u64) -> Result<Vec<Tensor>, String> {
    run_on(Box::new(device), program, seed)
}

/// The same in a box.
fn run_on(mut device: Box<dyn Device>, program: &Program, seed: u64) -> Result<Vec<Tensor>, String> {
    let mut rng = Rng::new(seed);
    for (id, state) in program.state_ids() {
        device.set_state(id, &random_tensor(&state.ty, &Bindings::new(), &mut rng));
    }
    let mut results = Vec::new();
    for (i, graph) in program.graphs.iter().chain(&program.graphs).enumerate() {
        let bindings = random_bindings(graph, seed + i as u64);
        let inputs = random_inputs(graph, &bindings, seed + i as u64);
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        results.extend(device.run(&graph.name, &inputs).map_err(|e| e.message)?.into_iter().map(|(_, t)| t));
    }
    results.extend((0..program.states.len()).map(|i| device.state(StateId(i as u32))));
    Ok(results)
}

fn near(found: &Tensor, expected: &Tensor) -> bool {
    if found.dtype() == DType::Key || found.shape != expected.shape {
        return found == expected;
    }
    let (a, b) = (found.to_f64(), expected.to_f64());
    let largest = b.iter().filter(|x| x.is_finite()).fold(1.0, |m: f64, x| m.max(x.abs()));
    a.iter().zip(&b).all(|(a, b)| {
        let overflow = b.abs() > 1e37 && (a.is_infinite() || a.abs() > 1e37);
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 2e-5 * largest || overflow
    })
}

#[test]
fn compiled_programs_run_among_nan() {
    let (mut in_place, mut total) = (0, 0);
    for seed in 0..200 {
        let program = random_program(8000 + seed, 24);
        let planned = plan(&program, 2);
        let text = |results: Result<Vec<Tensor>, String>| format!("{results:?}");
        let loose = run(Interp::new(program.clone(), Precision::F32), &program, seed);
        let arena = run(Interp::planned(planned.clone(), Precision::F32), &program, seed);
        assert_eq!(text(arena), text(loose.clone()), "seed {seed}: the interpreter in its arena\n{program}");
        let plain = run(Cpu::new(planned.clone(), 2), &program, seed);
        let poisoned = run(Cpu::poisoned(planned.clone(), 2), &program, seed);
        assert_eq!(text(poisoned), text(plain.clone()), "seed {seed}: the CPU among NaN\n{}", *planned);
        match (plain, loose) {
            (Ok(plain), Ok(loose)) => {
                let odd = plain.iter().zip(&loose).position(|(a, b)| !near(a, b));
                let both = odd.map(|i| (&plain[i], &loose[i]));
                assert!(odd.is_none(), "seed {seed}: result {odd:?} {both:?} of\n{}", *planned);
            }
            (plain, loose) => assert_eq!(plain.is_err(), loose.is_err(), "seed {seed}: {plain:?} and {loose:?}"),
        }
        // The test shows nothing if values never share bytes. Inside of regions there are none that could.
        for graph in &planned.graphs {
            let mut places: Vec<_> = graph.values().filter_map(|v| graph.buffer(v)).collect();
            total += places.len();
            places.sort_by_key(|b| (b.region, b.offset));
            in_place += places.windows(2).filter(|w| w[0] == w[1]).count();
        }
    }
    assert!(in_place * 5 > total, "only {in_place} of {total} values share their bytes");
}

/// A device that bounds its allocations.
struct Bounded<'a> {
    target: &'a dyn Target,
    allocation: usize,
}

impl Target for Bounded<'_> {
    fn name(&self) -> &str {
        self.target.name()
    }

    fn alignment(&self) -> usize {
        self.target.alignment()
    }

    fn missing_kernel(&self, op: &Op, args: &[Type]) -> Option<String> {
        self.target.missing_kernel(op, args)
    }

    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        self.target.workspace(op, args, bounds)
    }

    fn memory(&self) -> Option<usize> {
        None
    }

    fn allocation(&self) -> Option<usize> {
        Some(self.allocation)
    }
}

/// The plan of a program in the smallest allocations in which it has one; in smaller ones it is refused with numbers.
fn plan_in_allocations(program: &Program, target: &dyn Target) -> Planned {
    let plan = |target: &dyn Target| compile(program.clone(), &PassContext::new(target), &mut |_| {});
    let whole = plan(target).unwrap_or_else(|diags| panic!("{diags:?}\n{program}"));
    let states = whole.states.iter().filter_map(|state| state.buffer);
    let values = whole.graphs.iter().flat_map(|graph| graph.values().filter_map(|value| graph.buffer(value)));
    let bytes = states.chain(values).map(|buffer| buffer.bytes).chain([whole.arena.scratch]).max().unwrap_or(0);
    let allocation = bytes.next_multiple_of(target.alignment()).max(target.alignment());
    if allocation > target.alignment() {
        let less = Bounded { target, allocation: allocation - target.alignment() };
        let diags = plan(&less).expect_err("something is larger");
        let told = |text: &str| diags.iter().all(|diag| diag.message.contains(text));
        assert!(told("found ") && told(&format!("{} gives ", target.name())), "{diags:?}");
    }
    plan(&Bounded { target, allocation }).unwrap_or_else(|diags| panic!("{diags:?}\n{program}"))
}

/// The verifier sees to it that no value lies in two. The interpreter has no workspace, which on the CPU is larger than the
/// values of these programs.
#[test]
fn plans_in_several_allocations_change_no_bit() {
    let mut several = 0;
    for seed in 0..60 {
        let program = random_program(8000 + seed, 24);
        let planned = plan_in_allocations(&program, &InterpTarget);
        let loose = format!("{:?}", run(Interp::new(program.clone(), Precision::F32), &program, seed));
        let arena = format!("{:?}", run(Interp::planned(planned.clone(), Precision::F32), &program, seed));
        assert_eq!(arena, loose, "seed {seed}\n{}", *planned);
        assert_eq!(parse(&planned.to_string()).expect("it reads back").arena, planned.arena);
        let allocation = planned.arena.allocation.expect("the device bounds them");
        several += usize::from(planned.arena.values > allocation || planned.arena.persistent > allocation);
    }
    assert!(several > 50, "only {several} plans have several allocations");
}

#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_runs_in_several_allocations() {
    use dsgc_kernels::cube::{Platform, open, target};
    use dsgc_kernels::ranks::Member;
    let (mut ran, mut several) = (0, 0);
    for seed in 0..8 {
        let program = random_program(8000 + seed, 24);
        let target = target(Platform::Wgpu);
        let whole =
            compile(program.clone(), &PassContext::new(&target), &mut |_| {}).unwrap_or_else(|e| panic!("{e:?}"));
        let cut = plan_in_allocations(&program, &target);
        let [whole, parts] = [&whole, &cut].map(|planned| {
            let device = open(Platform::Wgpu, planned.clone(), Member::alone(), None)
                .unwrap_or_else(|e| panic!("{}", e.message));
            format!("{:?}", run_on(device, &program, seed))
        });
        assert_eq!(parts, whole, "seed {seed}\n{}", *cut);
        ran += usize::from(whole.starts_with("Ok"));
        let allocation = cut.arena.allocation.expect("the device bounds them");
        several += usize::from(cut.arena.values > allocation || cut.arena.persistent > allocation);
    }
    assert!(ran > 5 && several > 5, "{ran} programs ran, {several} of all in several allocations");
}

/// The plan without one of the passes.
fn plan_without(without: &str, program: &Program, threads: usize) -> Planned {
    let (mut program, target) = (program.clone(), CpuTarget { threads });
    for pass in PIPELINE.iter().filter(|pass| pass.name != without) {
        program = (pass.run)(program, &PassContext::new(&target)).unwrap_or_else(|diags| panic!("{diags:?}"));
    }
    Planned::new(program).unwrap_or_else(|fault| panic!("{fault}"))
}

#[test]
fn fused_regions_have_the_bits_of_their_ops() {
    let (mut regions, mut steps, mut products) = (0, 0, 0);
    for seed in 0..150 {
        let program = random_program(9000 + seed, 40);
        let apart = format!("{:?}", run(Cpu::new(plan_without("fuse", &program, 2), 2), &program, seed));
        for threads in 1..=3 {
            let planned = plan(&program, threads);
            let fused = format!("{:?}", run(Cpu::poisoned(planned.clone(), threads), &program, seed));
            assert_eq!(fused, apart, "seed {seed}, {threads} threads\n{}", *planned);
            for (_, op) in planned.graphs.iter().flat_map(|g| g.ops()) {
                match &op.op {
                    Op::Fused { body, .. } => (regions, steps) = (regions + 1, steps + body.work()),
                    Op::ContractFused { bodies, .. } => products += bodies.len(),
                    _ => {}
                }
            }
        }
    }
    assert!(regions > 500 && 2 * steps > 3 * regions, "only {regions} regions with {steps} steps");
    assert!(products > 100, "only {products} products are finished by regions");
}

/// A CPU that finishes no products.
struct Unfinished(CpuTarget);

impl Target for Unfinished {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn alignment(&self) -> usize {
        self.0.alignment()
    }
    fn missing_kernel(&self, op: &Op, args: &[Type]) -> Option<String> {
        if matches!(op, Op::ContractFused { .. }) { Some("none".into()) } else { self.0.missing_kernel(op, args) }
    }
    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        self.0.workspace(op, args, bounds)
    }
    fn memory(&self) -> Option<usize> {
        self.0.memory()
    }
}

/// Products that are finished by a bias and a function whose operand is kept, a scaled residual, an accumulator, a region of
/// a result that lies the other way, regions of products in one op, and regions of bf16.
fn finished_products(m: usize, n: usize, k: usize) -> Program {
    let text = format!(
        "level logical
state @sum : f32[{n}, {k}]

graph @activation(%x: f32[{m}, {k}], %w: f32[{n}, {k}], %bias: f32[{n}]) {{
  %h = contract %x, %w spec=bi,oi->bo
  %stretched = broadcast %bias shape=[{m}, {n}]
  %before = add %h, %stretched
  %y = gelu %before
  return before=%before, y=%y
}}

graph @residual(%x: f32[{m}, {k}], %w: f32[{n}, {k}], %rows: f32[{m}, 1], %rest: f32[{m}, {n}]) {{
  %h = contract %x, %w spec=bi,oi->bo
  %stretched = broadcast %rows shape=[{m}, {n}]
  %scaled = mul %h, %stretched
  %y = add %rest, %scaled
  return y=%y
}}

graph @accumulate(%x: f32[{m}, {k}], %y: f32[{m}, {n}]) {{
  %grad = contract %y, %x spec=bo,bi->oi
  %sum = read @sum
  %new = add %sum, %grad
  write @sum %new
  return
}}

graph @turned(%x: f32[{m}, {k}], %w: f32[{n}, {k}], %rows: f32[{n}, 1]) {{
  %h = contract %x, %w spec=bi,oi->ob
  %stretched = broadcast %rows shape=[{n}, {m}]
  %y = max %h, %stretched
  return y=%y
}}

graph @each(%x: f32[{m}, {k}], %w: f32[{n}, {k}], %v: f32[{n}, {k}], %bias: f32[{n}]) {{
  %a = contract %x, %w spec=bi,oi->bo
  %b = contract %x, %v spec=bi,oi->bo
  %stretched = broadcast %bias shape=[{m}, {n}]
  %c = add %a, %stretched
  %d = relu %b
  return c=%c, d=%d
}}

graph @narrow(%x: f32[{m}, {k}], %w: f32[{n}, {k}], %bias: f32[{n}]) {{
  %x.1 = cast %x dtype=bf16
  %w.1 = cast %w dtype=bf16
  %bias.1 = cast %bias dtype=bf16
  %stretched = broadcast %bias.1 shape=[{m}, {n}]
  %a = contract %x.1, %w.1 spec=bi,oi->bo
  %b = add %a, %stretched
  %c = tanh %b
  %d = contract %w.1, %x.1 spec=oi,bi->bo:f32
  %e = neg %d
  %f = cast %e dtype=bf16
  %g = contract %x.1, %w.1 spec=bi,oi->ob
  %h = cast %g dtype=f32
  return c=%c, f=%f, h=%h
}}
"
    );
    parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

#[test]
fn finished_products_have_the_bits_of_products_and_regions() {
    // One element; few rows of a large matrix; sums of several blocks; more columns and more rows than a block of panels;
    // sums that lie in the workspace as a whole.
    for (m, n, k) in
        [(1, 1, 1), (3, 80, 900), (40, 70, 900), (300, 40, 9), (17, 600, 33), (150, 650, 3300), (2, 3, 66_000)]
    {
        let program = finished_products(m, n, k);
        let unfinished = Unfinished(CpuTarget { threads: 2 });
        let apart =
            compile(program.clone(), &PassContext::new(&unfinished), &mut |_| {}).unwrap_or_else(|e| panic!("{e:?}"));
        assert!(!apart.op_counts().contains_key("contract_fused"));
        let expected = run(Cpu::new(apart, 2), &program, 7);
        for threads in 1..=3 {
            let planned = plan(&program, threads);
            assert_eq!(planned.op_counts().get("contract_fused"), Some(&8), "{}", *planned);
            let found = run(Cpu::poisoned(planned.clone(), threads), &program, 7);
            assert!(found == expected, "{m} x {n} x {k} on {threads} threads\n{}", *planned);
        }
        if m * n * k < 100_000 {
            let fused = run(Interp::planned(plan(&program, 1), Precision::F32), &program, 7);
            assert!(fused == run(Interp::new(program.clone(), Precision::F32), &program, 7), "{m} x {n} x {k}");
        }
    }
}

/// A norm with a weight and one without, a softmax in a number of rows that the launch gives, the largest of integers, and
/// in bf16: sums of rows with what they are of, those of columns as of a bias, and those of everything, in an operand's place.
fn reductions(rows: usize, width: usize) -> Program {
    let shape = format!("[{rows}, {width}]");
    let text = format!(
        "level logical

graph @norm(%x: f32{shape}, %w: f32[{width}], %eps: f32[{rows}]) {{
  %squares = mul %x, %x
  %sum = reduce_sum %squares axes=[1]
  %more = add %sum, %eps
  %root = sqrt %more
  %kept = reshape %root shape=[{rows}, 1]
  %roots = broadcast %kept shape={shape}
  %normed = div %x, %roots
  %ws = broadcast %w shape={shape}
  %y = mul %normed, %ws
  return y=%y, root=%root
}}

graph @softmax(%x: f32[B, {width}]) {{
  dim B: 1..{rows} batch
  %most = reduce_max %x axes=[1]
  %kept = reshape %most shape=[B, 1]
  %stretched = broadcast %kept shape=[B, {width}]
  %less = sub %x, %stretched
  %exp = exp %less
  %sum = reduce_sum %exp axes=[1]
  %kept.1 = reshape %sum shape=[B, 1]
  %stretched.1 = broadcast %kept.1 shape=[B, {width}]
  %y = div %exp, %stretched.1
  return y=%y
}}

graph @integers(%x: i32{shape}, %m: bool{shape}) {{
  %sums = cast %m dtype=i32
  %more = add %x, %sums
  %most = reduce_max %more axes=[1]
  %least = reduce_min %more axes=[1]
  %both = add %most, %least
  return both=%both, more=%more
}}

graph @columns(%x: f32{shape}, %dy: f32{shape}) {{
  %e = tanh %x
  %dx = mul %e, %dy
  %dbias = reduce_sum %dx axes=[0]
  %more = neg %dx
  return dx=%more, dbias=%dbias
}}

graph @whole(%x: f32{shape}, %mask: f32{shape}) {{
  %kept = mul %x, %mask
  %sum = reduce_sum %kept axes=[0, 1]
  %more = exp %kept
  return sum=%sum, more=%more
}}

graph @narrow(%x: f32{shape}, %y: f32{shape}) {{
  %x.1 = cast %x dtype=bf16
  %y.1 = cast %y dtype=bf16
  %a = mul %x.1, %y.1
  %most = reduce_max %a axes=[1]
  %kept = reshape %most shape=[{rows}, 1]
  %stretched = broadcast %kept shape={shape}
  %less = sub %a, %stretched
  %columns = reduce_sum %less axes=[0]
  %half = cast %y dtype=f16
  %b = neg %half
  %all = reduce_max %b axes=[0, 1]
  %sums = reduce_sum %b axes=[1]
  return most=%most, less=%less, columns=%columns, all=%all, sums=%sums
}}
"
    );
    parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

#[test]
fn reductions_in_regions_have_the_bits_of_their_ops() {
    // Rows that share a block, with an end of their own or without; that are kept; that are longer than what is kept, and than
    // a block of a sum; more columns than a block; more rows than are added at once.
    for (rows, width) in
        [(1, 2), (3, 5), (700, 7), (300, 64), (65, 768), (5, 1030), (130, 3000), (2, 9001), (3, 50_272)]
    {
        let program = reductions(rows, width);
        let expected = run(Cpu::new(plan_without("fuse", &program, 2), 2), &program, 7);
        for threads in 1..=3 {
            let planned = plan(&program, threads);
            let with = |op: &&Op| matches!(op, Op::Fused { body, .. } if body.reduction().is_some());
            let count = planned.graphs.iter().flat_map(|g| g.ops()).map(|(_, op)| &op.op).filter(with).count();
            // Over one row, a sum of columns is none.
            assert_eq!(count, if rows == 1 { 7 } else { 8 }, "{}", *planned);
            let found = run(Cpu::poisoned(planned.clone(), threads), &program, 7);
            assert!(found == expected, "{rows} x {width} on {threads} threads\n{}", *planned);
        }
        if rows * width < 20_000 {
            let fused = run(Interp::planned(plan(&program, 1), Precision::F32), &program, 7);
            assert!(fused == run(Interp::new(program.clone(), Precision::F32), &program, 7), "{rows} x {width}");
        }
    }
}

#[test]
fn merged_ops_have_the_bits_of_their_ops() {
    // Rows may be added to a -0 by leaving it alone.
    let text = |results: Result<Vec<Tensor>, String>| {
        let positive = |t: &Tensor| if t.dtype() == DType::F32 { positive_zeros(t) } else { t.clone() };
        format!("{:?}", results.map(|all| all.iter().map(positive).collect::<Vec<Tensor>>()))
    };
    let mut merged: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..150 {
        let program = random_program(11_000 + seed, 40);
        let apart = plan_without("merge", &program, 2);
        let expected = text(run(Cpu::new(apart.clone(), 2), &program, seed));
        for threads in 1..=3 {
            let planned = plan(&program, threads);
            let found = text(run(Cpu::poisoned(planned.clone(), threads), &program, seed));
            assert_eq!(found, expected, "seed {seed}, {threads} threads\n{}", *planned);
            let (with, without) = (planned.op_counts(), apart.op_counts());
            for name in ["contract_each", "sum_squares", "add_rows", "adamw", "head_logp", "head_logp_grad"] {
                let count = |counts: &BTreeMap<&str, usize>| counts.get(name).copied().unwrap_or(0);
                *merged.entry(name).or_default() += count(&with).abs_diff(count(&without));
            }
        }
    }
    assert!(merged.values().all(|&n| n >= 12), "only {merged:?}");
}

/// The tensor with 0 for every -0.
fn positive_zeros(tensor: &Tensor) -> Tensor {
    Tensor::f32(&tensor.shape, tensor.to_f64().into_iter().map(|x| x as f32 + 0.0).collect())
}
