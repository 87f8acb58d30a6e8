//! Every kernel family at small fixed shapes, on one thread: what a change to a kernel does to it.
//!
//! `cargo bench --bench kernels [NAME]`. How near a kernel is to the machine's limits at the shapes of real steps is said
//! by `dsgc bench kernels`, whose programs these are.

#[path = "../frontends/cli/measure/cases.rs"]
mod cases;

use criterion::Criterion;
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::PassContext;

use cases::{Case, Model, graph};

/// Small enough that all fits into a cache.
const MODELS: [Model; 2] = [
    Model {
        name: "opt",
        float: "f32",
        batch: 2,
        length: 64,
        hidden: 128,
        ffn: 512,
        vocab: 2000,
        heads: 4,
        llama: false,
    },
    Model {
        name: "llama",
        float: "f32",
        batch: 2,
        length: 64,
        hidden: 128,
        ffn: 512,
        vocab: 2000,
        heads: 4,
        llama: true,
    },
];

fn device(case: &Case) -> Cpu {
    let target = CpuTarget { threads: 1 };
    let planned = dsgc_passes::compile(case.program(1), &PassContext::new(&target), &mut |_| {})
        .unwrap_or_else(|diags| panic!("{}: {}", case.title(), diags[0]));
    let values =
        case.values(1).into_iter().map(|(name, value)| (planned.state_named(&name).expect("it is read"), value));
    let values: Vec<_> = values.collect();
    let mut device = Cpu::new(planned, 1);
    values.iter().for_each(|(id, value)| device.set_state(*id, value));
    device
}

fn kernels(criterion: &mut Criterion) {
    for case in MODELS.iter().flat_map(cases::cases) {
        let mut device = device(&case);
        let id = format!("{} {} {}", case.title(), case.shape, case.float);
        criterion.bench_function(&id, |bench| {
            bench.iter(|| device.run(&graph(0), &[]).unwrap_or_else(|e| panic!("{e}")));
        });
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    kernels(&mut criterion);
    criterion.final_summary();
}
