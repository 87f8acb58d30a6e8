//! What tests of ops share: programs from text, tensors from numbers, and a run in every mode of the interpreter.

use dsgc_ir::fuzz::Rng;
use dsgc_ir::verify::{Fault, Planned};
use dsgc_ir::{Arena, Bindings, DType, Data, Program, Target, Tensor, Type, parse};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::CpuTarget;
#[cfg(feature = "wgpu")]
use dsgc_kernels::cube::{CubeTarget, Platform, open, target};
use dsgc_kernels::interp::apart::plan_apart;
use dsgc_kernels::interp::{Interp, Precision};
#[cfg(feature = "wgpu")]
use dsgc_kernels::ranks::Member;

/// A program with one graph `@g` from its parameters and lines; it returns the results of the last line, by name.
pub fn program(params: &str, lines: &str) -> Program {
    let last = lines.lines().last().unwrap_or("");
    let results = last.split_once('=').map_or("", |(results, _)| results);
    let returned: Vec<String> =
        results.split(',').map(str::trim).filter(|r| !r.is_empty()).map(|r| format!("{}={r}", &r[1..])).collect();
    let text = format!("level logical\ngraph @g({params}) {{\n{lines}\nreturn {}\n}}\n", returned.join(", "));
    parse(&text).unwrap_or_else(|e| panic!("{e:?} in\n{text}"))
}

/// A tensor of a type with constant dims; a key is two numbers.
pub fn tensor(ty: &Type, numbers: &[f64]) -> Tensor {
    let shape = ty.shape(&Bindings::new()).unwrap_or_else(|s| panic!("{ty} has the symbol {s}"));
    let data = match ty.dtype {
        DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => Data::F64(numbers.to_vec()),
        DType::I32 => Data::I32(numbers.iter().map(|&x| x as i32).collect()),
        DType::Bool => Data::Bool(numbers.iter().map(|&x| x != 0.0).collect()),
        DType::Key => Data::Key(numbers.chunks(2).map(|k| [k[0] as u32, k[1] as u32]).collect()),
    };
    Tensor::new(&shape, data)
}

/// The numbers of a tensor; the words of keys.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    match &tensor.data {
        Data::Key(v) => v.iter().flatten().map(|&w| f64::from(w)).collect(),
        Data::F32(_) | Data::F64(_) | Data::I32(_) | Data::Bool(_) => tensor.to_f64(),
    }
}

/// Runs `@g` on numbers for its inputs in one mode.
pub fn run(mut interp: Interp, given: &[&[f64]]) -> Result<Vec<Tensor>, String> {
    let program = interp.program().clone();
    run_on(&mut interp, &program, given)
}

/// Runs `@g` of a device's program on numbers for its inputs.
pub fn run_on(device: &mut dyn Device, program: &Program, given: &[&[f64]]) -> Result<Vec<Tensor>, String> {
    let graph = program.graph("g").expect("the graph is called g");
    let named: Vec<(&str, Tensor)> =
        graph.inputs().zip(given).map(|(v, x)| (graph.name_of(v), tensor(graph.ty(v), x))).collect();
    let named: Vec<(&str, &Tensor)> = named.iter().map(|(n, t)| (*n, t)).collect();
    Ok(device.run("g", &named).map_err(|e| e.message)?.into_iter().map(|(_, t)| t).collect())
}

/// A session in every mode, with the tolerance of its width.
pub fn modes(program: &Program) -> Vec<(&'static str, f64, Interp)> {
    let planned = || Planned::new(plan_apart(program.clone())).unwrap_or_else(|f| panic!("{f} in\n{program}"));
    vec![
        ("f32", 2e-6, Interp::new(program.clone(), Precision::F32)),
        ("f64", 1e-11, Interp::new(program.clone(), Precision::F64)),
        ("f32 in the arena", 2e-6, Interp::planned(planned(), Precision::F32)),
        ("f64 in the arena", 1e-11, Interp::planned(planned(), Precision::F64)),
    ]
}

/// Every value apart from all others, with the workspaces that the CPU asks for.
pub fn plan(program: &Program, threads: usize) -> Planned {
    try_plan(program, threads).unwrap_or_else(|fault| panic!("{fault}\n{program}"))
}

/// The plan, or why such a plan cannot be: where the old value of a state is used after a write, it needs a copy.
pub fn try_plan(program: &Program, threads: usize) -> Result<Planned, Fault> {
    plan_for(program, &CpuTarget { threads })
}

/// As [`try_plan`], with the workspaces that a device asks for.
pub fn plan_for(program: &Program, target: &dyn Target) -> Result<Planned, Fault> {
    let mut planned = plan_apart(program.clone());
    let mut arena = Arena { scratch: 0, ..planned.arena };
    for graph in &mut planned.graphs {
        let bounds = graph.upper_bounds();
        graph.scratch = graph
            .ops()
            .map(|(_, op)| {
                let types: Vec<Type> = op.args.iter().map(|&a| graph.ty(a).clone()).collect();
                target.workspace(&op.op, &types, &bounds)
            })
            .collect();
        arena.scratch = graph.scratch.iter().copied().fold(arena.scratch, usize::max);
    }
    planned.arena = arena;
    Planned::new(planned)
}

/// Whether two numbers are equal within a tolerance, relative above 1; NaN equals NaN.
pub fn near(a: f64, b: f64, tolerance: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= tolerance * b.abs().max(1.0)
}

/// Random numbers for the inputs of `@g`; integers are below `range`, and ascend from 1 if they are called `segment`.
pub fn inputs(program: &Program, range: i64) -> Vec<(String, Tensor)> {
    let graph = program.graph("g").expect("it is called g");
    let tensor = |(i, v)| {
        let (ty, name): (&Type, &str) = (graph.ty(v), graph.name_of(v));
        let shape = ty.shape(&Bindings::new()).expect("the dims are numbers");
        let (n, mut rng) = (shape.iter().product(), Rng::new(91 + i as u64));
        let data = match ty.dtype {
            DType::I32 if name == "segment" => {
                Data::I32((0..n).map(|at: usize| i32::from(!at.is_multiple_of(7))).collect())
            }
            DType::I32 => Data::I32((0..n).map(|_| rng.between(0, range - 1) as i32).collect()),
            DType::Bool => Data::Bool((0..n).map(|_| rng.once_in(2)).collect()),
            _ => Data::F32((0..n).map(|_| (2.0 * rng.unit() - 1.0) as f32).collect()),
        };
        (name.to_string(), Tensor::new(&shape, data))
    };
    graph.inputs().enumerate().map(tensor).collect()
}

/// The distance from a number to the next of a type.
pub fn unit(dtype: DType, x: f64) -> f64 {
    let digits = match dtype {
        DType::Bf16 => 8,
        DType::F16 => 11,
        _ => 24,
    };
    let smallest = if dtype == DType::F16 { -14 } else { -126 };
    let exponent = if x == 0.0 { smallest } else { (x.abs().log2().floor() as i32).max(smallest) };
    2f64.powi(exponent + 1 - digits)
}

/// Whether all numbers of a result are those of the interpreter: off by one unit in the last place of a narrow type at most,
/// and by so much, relative above 1; NaN equals NaN.
pub fn is_near(found: &Tensor, expected: &Tensor, dtype: DType, slack: f64) -> Result<(), String> {
    for (i, (a, b)) in found.to_f64().into_iter().zip(expected.to_f64()).enumerate() {
        let last = if dtype.is_narrow() && b.is_finite() { unit(dtype, b) } else { 0.0 };
        let near = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= last + slack * b.abs().max(1.0);
        if !near {
            return Err(format!("element {i} of {dtype} is {a}, expected {b}"));
        }
    }
    Ok(())
}

/// The platform that `DSGC_GPU` names; Vulkan unless it names another.
#[cfg(feature = "wgpu")]
pub fn gpu_target() -> CubeTarget {
    let cuda = std::env::var("DSGC_GPU").is_ok_and(|name| name == Platform::Cuda.name());
    target(if cuda { Platform::Cuda } else { Platform::Wgpu })
}

/// The GPU with the program, where it has all its kernels.
#[cfg(feature = "wgpu")]
pub fn gpu(program: &Program) -> Option<Box<dyn Device>> {
    let graph = &program.graphs[0];
    for (_, op) in graph.ops() {
        let types: Vec<Type> = op.args.iter().map(|&v| graph.ty(v).clone()).collect();
        gpu_target().missing_kernel(&op.op, &types).is_none().then_some(())?;
    }
    let planned = plan_for(program, &gpu_target()).unwrap_or_else(|fault| panic!("{fault}\n{program}"));
    Some(open(gpu_target().platform, planned, Member::alone(), None).unwrap_or_else(|e| panic!("{}", e.message)))
}

/// Runs a program on the GPU beside the interpreter, whose results have been computed.
#[cfg(feature = "wgpu")]
pub fn gpu_is_near(program: &Program, given: &[(&str, &Tensor)], expected: &[(String, Tensor)], slack: f64) {
    let mut device = gpu(program).unwrap_or_else(|| panic!("the GPU has no kernel for\n{program}"));
    let found = device.run("g", given).unwrap_or_else(|e| panic!("{e:?} in\n{program}"));
    let graph = program.graph("g").expect("it is called g");
    for (((name, found), (_, expected)), (_, value)) in found.iter().zip(expected).zip(&graph.outputs) {
        is_near(found, expected, graph.ty(*value).dtype, slack)
            .unwrap_or_else(|why| panic!("on the GPU %{name}: {why}\n{program}"));
    }
}
