//! The products of a step of decoding, by what weights are kept in.
//!
//! `cargo bench --bench decode [ROWS,ROWS,...]` runs all products of OPT-125m's layers and of a Llama's of 15 million
//! parameters, one after the other, for so many rows: weights in f32 and f16 beside rows in f32, in bf16 beside rows in
//! bf16, in int8 and int4 beside both. Printed are milliseconds, best and median of interleaved runs, the bytes of the
//! weights, and how many of them are read in a second. OPT's do not fit a cache, and the Llama's may.

use std::time::Instant;

use dsgc_ir::fuzz::Rng;
use dsgc_ir::{Bindings, Program, Tensor, parse};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::PassContext;

/// Name, layers, width, inner width.
const MODELS: [(&str, usize, usize, usize); 2] = [("OPT-125m", 12, 768, 3072), ("LLaMA-15M", 6, 288, 768)];

/// What rows are, and what weights are kept in.
const TYPES: [[&str; 2]; 7] = [
    ["f32", "f32"],
    ["f32", "f16"],
    ["bf16", "bf16"],
    ["f32", "int8x64"],
    ["bf16", "int8x64"],
    ["f32", "int4x64"],
    ["bf16", "int4x64"],
];

/// Seconds of all runs of a model and a number of rows, about.
const SECONDS: f64 = 8.0;

/// All products of a step, in layers that follow each other.
fn program((layers, hidden, inner): (usize, usize, usize), rows: usize, [x, w]: [&str; 2]) -> Program {
    let (mut params, mut lines) = (String::new(), String::new());
    for layer in 0..layers {
        for (name, [out, from]) in ["q", "k", "v", "o"]
            .map(|name| (name, [hidden; 2]))
            .into_iter()
            .chain([("up", [inner, hidden]), ("down", [hidden, inner])])
        {
            params += &format!("param @{name}{layer} : {w}[{out}, {from}]\n");
            lines += &format!("%{name}{layer} = read @{name}{layer}\n");
        }
        let before = if layer == 0 { "x".to_string() } else { format!("d{}", layer - 1) };
        lines += &format!(
            "%a{layer}, %b{layer}, %c{layer} = contract_each %{before}, %q{layer}, %k{layer}, %v{layer} spec=bd,vd->bv common=0
%e{layer} = contract %c{layer}, %o{layer} spec=bd,vd->bv
%u{layer} = contract %e{layer}, %up{layer} spec=bd,vd->bv
%d{layer} = contract %u{layer}, %down{layer} spec=bd,vd->bv\n"
        );
    }
    let text = format!(
        "level logical\n{params}graph @g(%x: {x}[{rows}, {hidden}]) {{\n{lines}return y=%d{}\n}}\n",
        layers - 1
    );
    parse(&text).unwrap_or_else(|e| panic!("{e:?} in\n{text}"))
}

/// A program with its weights in the CPU, and their bytes.
fn open(program: Program, threads: usize) -> (Cpu, usize) {
    let target = CpuTarget { threads };
    let context = PassContext::new(&target);
    let planned = dsgc_passes::compile(program, &context, &mut |_| {}).unwrap_or_else(|e| panic!("{e:?}"));
    let bytes = planned.states.iter().map(|state| state.bytes()).sum();
    let mut device = Cpu::new(planned.clone(), threads);
    for (i, (id, state)) in planned.state_ids().enumerate() {
        let shape = state.ty.shape(&Bindings::new()).expect("parameters have constant dims");
        let mut rng = Rng::new(i as u64);
        // Of the size with which rows neither grow nor vanish.
        let bound = (3.0 / shape[1] as f64).sqrt();
        let numbers = (0..shape.iter().product()).map(|_| ((2.0 * rng.unit() - 1.0) * bound) as f32).collect();
        device.set_state(id, &Tensor::f32(&shape, numbers));
    }
    (device, bytes)
}

fn main() {
    let rows = std::env::args().nth(1).filter(|arg| !arg.starts_with('-')).unwrap_or("1,4,8,16".into());
    let rows: Vec<usize> = rows.split(',').map(|n| n.parse().expect("numbers of rows, as in `1,4`")).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    for (name, layers, hidden, inner) in MODELS {
        for &rows in &rows {
            let programs = TYPES.map(|types| open(program((layers, hidden, inner), rows, types), threads));
            let mut all: Vec<(Cpu, usize, Vec<f64>)> = programs.into_iter().map(|(d, b)| (d, b, Vec::new())).collect();
            let x = Tensor::f32(&[rows, hidden], (0..rows * hidden).map(|i| (i % 7) as f32 - 3.0).collect());
            let begun = Instant::now();
            while begun.elapsed().as_secs_f64() < SECONDS {
                for (device, _, times) in &mut all {
                    let begun = Instant::now();
                    device.run("g", &[("x", &x)]).expect("it runs");
                    times.push(begun.elapsed().as_secs_f64());
                }
            }
            println!("{name}, {rows} rows, {threads} threads");
            for ([x, w], (_, bytes, mut times)) in TYPES.into_iter().zip(all) {
                times.sort_by(f64::total_cmp);
                let (best, median) = (times[0], times[times.len() / 2]);
                println!(
                    "  {w:<8} beside {x:<5} {:7.2} ms {:7.2} ms  {:6.1} MB {:6.1} GB/s",
                    best * 1e3,
                    median * 1e3,
                    bytes as f64 / 1e6,
                    bytes as f64 / best / 1e9
                );
            }
        }
    }
}
