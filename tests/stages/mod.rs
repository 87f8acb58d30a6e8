//! Stages from strings that run in this process, compiled with all passes or without one of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use dsgc_ir::{Planned, Program, StateId, StateKind, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PIPELINE, PassContext, run_passes};
use dsgc_runtime::{Event, Metrics, Session};
use dsgc_yaml::load::{self, Options};

#[path = "../../frontends/cli/host.rs"]
mod host;

/// The first stage of a pipeline as loaded, with further settings of it; `TOKENIZER` in the text stands for the example's,
/// and `rows.jsonl` in the folder has these rows.
pub fn program(folder: &Path, pipeline: &str, rows: &[String], sets: &[&str]) -> Program {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/rlhf/tokenizer");
    let text = pipeline.replace("TOKENIZER", &tokenizer.display().to_string());
    fs::write(folder.join("rows.jsonl"), rows.join("\n")).expect("a new file");
    fs::write(folder.join("pipeline.yaml"), text).expect("a new file");
    let mut sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    sets.push(format!("output_dir={}", folder.join("runs").display()));
    let loaded = load::load(&folder.join("pipeline.yaml"), &Options { sets, ..Options::default() }, &host::Disk);
    loaded.unwrap_or_else(|e| panic!("{:?}", e.diags)).stages.remove(0)
}

/// The planned program, without the pass of this name if there is one.
pub fn compile(program: &Program, context: &PassContext, without: Option<&str>) -> Planned {
    let names: Vec<&str> = PIPELINE.iter().map(|p| p.name).filter(|name| Some(*name) != without).collect();
    let made = run_passes(program.clone(), &names, context).unwrap_or_else(|e| panic!("{e:?}"));
    Planned::new(made).unwrap_or_else(|fault| panic!("{fault}"))
}

/// Metrics of all steps, and all parameters and states at the end.
pub type Ran = (Vec<Metrics>, BTreeMap<String, Tensor>);

fn run(planned: Planned, device: Box<dyn Device>) -> Ran {
    // Others' values lie over what a generation kept.
    let lasts = planned.state_ids().filter(|(_, state)| state.kind != StateKind::Generation);
    let names: Vec<(String, StateId)> = lasts.map(|(id, state)| (state.name.clone(), id)).collect();
    let mut session = Session::open(planned, device, &mut |_| Ok(())).unwrap_or_else(|e| panic!("{e:?}"));
    let mut steps = Vec::new();
    let end = session.run(&mut |event| {
        if let Event::Step { metrics, .. } = event {
            steps.push(metrics.clone());
        }
        Ok(())
    });
    assert!(end.is_ok(), "{end:?}");
    let states = names.into_iter().map(|(name, id)| (name, session.device().state(id))).collect();
    (steps, states)
}

/// The stage in doubles.
pub fn interp(program: &Program, without: Option<&str>) -> (Planned, Ran) {
    let planned = compile(program, &PassContext::new(&InterpTarget), without);
    let device = Box::new(Interp::planned(planned.clone(), Precision::F64));
    (planned.clone(), run(planned, device))
}

/// The stage on the CPU with so many threads.
pub fn cpu(program: &Program, threads: usize, without: Option<&str>) -> Ran {
    let planned = compile(program, &PassContext::new(&CpuTarget { threads }), without);
    run(planned.clone(), Box::new(Cpu::new(planned, threads)))
}
