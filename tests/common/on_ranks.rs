//! Stages on several ranks, each a thread of this process.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use dsgc_ir::diag::Diag;
use dsgc_ir::{Axis, Mesh, Planned, Program, StateId, StateKind, Target, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
#[cfg(feature = "wgpu")]
use dsgc_kernels::cube::{self, Platform};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_kernels::ranks::Member;
use dsgc_passes::PassContext;
use dsgc_runtime::{Ended, Event, Keeper, Metrics, Session, on_threads};

/// What runs a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum On {
    Doubles,
    /// With NaN where nothing lives.
    Cpu,
    #[cfg(feature = "wgpu")]
    Gpu,
    /// Without, which is faster.
    #[allow(dead_code)] // Not every test of several ranks takes as many steps.
    Fast,
}

/// The program as the ranks of a mesh run it.
pub fn laid_out(program: &Program, mesh: Mesh, zero_stage: u8) -> Program {
    let mut program = program.clone();
    program.mesh = mesh;
    program.stage.roles.iter_mut().for_each(|role| role.zero_stage = zero_stage);
    program
}

/// The plan of the ranks at the program's place along `pipeline`.
pub fn planned(program: &Program, on: On) -> Planned {
    planned_at(program, on, program.place..program.place + 1).remove(0)
}

/// The plans of all places along `pipeline`.
pub fn planned_at_all(program: &Program, on: On) -> Vec<Planned> {
    planned_at(program, on, 0..program.mesh.pipeline)
}

fn planned_at(program: &Program, on: On, places: Range<usize>) -> Vec<Planned> {
    let target: Box<dyn Target> = match on {
        On::Doubles => Box::new(InterpTarget),
        On::Cpu | On::Fast => Box::new(CpuTarget { threads: 1 }),
        #[cfg(feature = "wgpu")]
        On::Gpu => Box::new(cube::target(Platform::Wgpu)),
    };
    let context = PassContext::new(target.as_ref());
    let common = dsgc_passes::common(program.clone(), &context, &mut |_| {}).unwrap_or_else(|e| panic!("{e:?}"));
    let at = |place| common.at(place, &context, &mut |_| {}).unwrap_or_else(|e| panic!("{e:?}"));
    places.map(at).collect()
}

pub fn device(planned: &Planned, on: On, member: &Member) -> Box<dyn Device> {
    match on {
        On::Doubles => Box::new(Interp::planned(planned.clone(), Precision::F64).as_member(member.clone())),
        On::Cpu => Box::new(Cpu::poisoned(planned.clone(), 1).as_member(member.clone())),
        #[cfg(feature = "wgpu")]
        On::Gpu => cube::open(Platform::Wgpu, planned.clone(), member.clone(), None).expect("Vulkan is there"),
        On::Fast => Box::new(Cpu::new(planned.clone(), 1).as_member(member.clone())),
    }
}

/// What is left of a stage, the same on all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Ran {
    pub steps: Vec<Metrics>,
    pub evaluations: Vec<Metrics>,
    /// Parameters and states, whole.
    pub states: BTreeMap<String, Tensor>,
}

/// Runs a stage on all ranks, from a checkpoint if there is one; `stops` says after which step somebody wants it to stop, and on
/// which rank.
pub fn run(program: &Program, on: On, resume: bool, stops: Option<(usize, u64)>) -> Result<Ran, Vec<Diag>> {
    run_planned(program, &planned_at_all(program, on), on, resume, stops)
}

/// The same with the plans of all places.
pub fn run_planned(
    program: &Program,
    plans: &[Planned],
    on: On,
    resume: bool,
    stops: Option<(usize, u64)>,
) -> Result<Ran, Vec<Diag>> {
    let cut = plans[0].states.iter().any(|state| state.placement.as_ref().is_some_and(|p| !p.cuts.is_empty()));
    let cuts = program.mesh.tensor > 1
        || (program.mesh.data > 1 && program.stage.roles.iter().any(|role| role.zero_stage > 0));
    assert_eq!(cut, cuts, "what is cut");
    let stop: Vec<AtomicBool> = (0..program.mesh.ranks()).map(|_| AtomicBool::new(false)).collect();
    let rank = |member: Member| -> Result<Ran, Vec<Diag>> {
        let at = member.rank();
        let planned = &plans[program.mesh.place(Axis::Pipeline, at)];
        let keeper = Keeper::new(program, &stop[at]);
        let ignore: &mut dyn FnMut(&Event) -> Result<(), Diag> = &mut |_| Ok(());
        let device = device(planned, on, &member);
        let mut session = Session::open_as(planned.clone(), device, member, ignore)?;
        if resume {
            let newest = keeper.newest().map_err(|e| vec![e])?.expect("there is a checkpoint");
            session.resume(&newest).map_err(|e| vec![e])?;
        }
        let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
        let ended = session.run_kept(&keeper, &mut |event| {
            match event {
                Event::Step { step, metrics, .. } => {
                    steps.push(metrics.clone());
                    if stops == Some((at, *step)) {
                        stop[at].store(true, Ordering::Relaxed);
                    }
                }
                Event::Evaluated { metrics, .. } => evaluations.push(metrics.clone()),
                _ => {}
            }
            Ok(())
        });
        let expected = stops.map_or(Ended::Finished, |(_, step)| Ended::Stopped(step));
        assert_eq!(ended.map_err(|e| vec![e])?, expected);
        let lasts = |kind| matches!(kind, StateKind::Param { .. } | StateKind::State);
        let ids: Vec<(StateId, String)> =
            planned.state_ids().filter(|(_, s)| lasts(s.kind)).map(|(id, s)| (id, s.name.clone())).collect();
        let states = ids.into_iter().map(|(id, name)| Ok((name, session.state(id)?)));
        let states = states.collect::<Result<_, Diag>>().map_err(|e| vec![e])?;
        Ok(Ran { steps, evaluations, states })
    };
    let mut all = on_threads(program.mesh, rank, first_message)?;
    for (rank, other) in all.iter().enumerate() {
        assert!(*other == all[0], "rank {rank} has other numbers than the first one");
    }
    Ok(all.swap_remove(0))
}

/// The same where it must not fail.
pub fn ran(program: &Program, on: On, resume: bool, stops: Option<(usize, u64)>) -> Ran {
    run(program, on, resume, stops).unwrap_or_else(|e| panic!("{}: {e:?}", program.mesh))
}

/// What ends the other ranks.
#[allow(clippy::ptr_arg)] // It is handed on as a function of a rank's error.
pub fn first_message(errors: &Vec<Diag>) -> String {
    errors[0].message.clone()
}

/// A device whose runs somebody watches, or changes.
pub struct Watched<F> {
    pub device: Box<dyn Device>,
    pub run: F,
}

/// What a graph gives.
pub type Outputs = Result<Vec<(String, Tensor)>, Diag>;

impl<F: FnMut(&mut dyn Device, &str, &[(&str, &Tensor)]) -> Outputs> Device for Watched<F> {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        self.device.set_state(id, value);
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.device.set_part(id, value);
    }

    fn state(&self, id: StateId) -> Tensor {
        self.device.state(id)
    }

    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Outputs {
        (self.run)(self.device.as_mut(), graph, inputs)
    }
}

/// The largest difference of the metrics, each relative to itself, and of the states: of moments relative to their largest
/// elements, of weights, which are of the size of one or less, in absolute numbers.
pub fn difference(a: &Ran, b: &Ran) -> (f64, f64) {
    // Some metrics are differences of numbers of the size of one.
    difference_above(a, b, 1e-3)
}

/// The same, where metrics are taken to be at least so large.
pub fn difference_above(a: &Ran, b: &Ran, least: f64) -> (f64, f64) {
    let of_metrics = |a: &[Metrics], b: &[Metrics]| {
        assert_eq!(a.len(), b.len());
        let metric = |(a, b): (&Metrics, &Metrics)| {
            assert!(a.keys().eq(b.keys()), "{a:?} and {b:?}");
            let apart = |(x, y): (&f64, &f64)| (x - y).abs() / x.abs().max(y.abs()).max(least);
            a.values().zip(b.values()).map(apart).fold(0.0, f64::max)
        };
        a.iter().zip(b).map(metric).fold(0.0, f64::max)
    };
    let metrics = of_metrics(&a.steps, &b.steps).max(of_metrics(&a.evaluations, &b.evaluations));
    assert!(a.states.keys().eq(b.states.keys()));
    // The gradient of this bias is zero in exact arithmetic: its steps follow rounding errors.
    let meant = a.states.iter().filter(|(name, _)| !name.contains("k_proj.bias"));
    let of_state = |(name, a): (&String, &Tensor)| {
        let b = &b.states[name];
        assert_eq!(a.shape, b.shape, "{name}");
        let (a, b) = (a.to_f64(), b.to_f64());
        // Optimizers move a weight whose gradient is hardly more than a rounding error as far as any other.
        let least = if name.ends_with(".m") || name.ends_with(".v") { f64::MIN_POSITIVE } else { 1.0 };
        let largest = a.iter().fold(least, |m, x| m.max(x.abs()));
        a.iter().zip(&b).map(|(x, y)| (x - y).abs() / largest).fold(0.0, f64::max)
    };
    (metrics, meant.map(of_state).fold(0.0, f64::max))
}

pub fn assert_near(found: &Ran, expected: &Ran, bound: f64, what: &str) {
    let (metrics, states) = difference(found, expected);
    assert!(metrics <= bound && states <= bound, "{what}: metrics differ by {metrics:e}, states by {states:e}");
}
