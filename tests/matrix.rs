//! The metamorphic matrix: SFT and PPO of the tiny OPT and the tiny Llama, shared out in every way. After twenty steps the
//! metrics of all of them, and all parameters and states, are those of one rank.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use dsgc_ir::{Planned, Program};
use tempfile::TempDir;

#[path = "common/on_ranks.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod on_ranks;
#[allow(dead_code)] // Other tests use the rest.
mod stages;
#[path = "common/tiny.rs"]
mod tiny;

use on_ranks::{On, Ran, difference_above, planned_at_all, ran, run_planned};
use tiny::Tiny;

/// Layouts as a user writes them, beside the layers that the models have there: two, as those whose numbers are known, or as many
/// as make some for every place.
type Layouts = [(usize, &'static [&'static str])];

const ZERO: &Layouts = &[(
    2,
    &[
        "{data: 2, zero_stage: 0}",
        "{data: 2, zero_stage: 1}",
        "{data: 2, zero_stage: 2}",
        "{data: 2, zero_stage: 3}",
        "{data: 4, zero_stage: 0}",
        "{data: 4, zero_stage: 1}",
        "{data: 4, zero_stage: 2}",
        "{data: 4, zero_stage: 3}",
    ],
)];

const TENSOR: &Layouts = &[(2, &["{tensor: 2}"])];

/// OPT's table of tokens is at the first place, where it is read, and at the last one, whose head it is; Llama's head is its own.
const PIPELINE: &Layouts = &[
    (
        4,
        &[
            "{pipeline: 2, schedule: gpipe}",
            "{pipeline: 2, schedule: 1f1b}",
            "{pipeline: 2, schedule: interleaved_1f1b}",
            "{pipeline: 2, schedule: zero_bubble}",
            "{pipeline: 4, schedule: gpipe}",
            "{pipeline: 4, schedule: 1f1b}",
            "{pipeline: 4, schedule: zero_bubble}",
        ],
    ),
    (8, &["{pipeline: 4, schedule: interleaved_1f1b}"]),
];

const FOUR_RANKS: &Layouts = &[
    (2, &["{data: 2, tensor: 2, zero_stage: 1}", "{data: 2, tensor: 2, zero_stage: 3}"]),
    (
        4,
        &[
            "{data: 2, pipeline: 2, schedule: gpipe, zero_stage: 3}",
            "{data: 2, pipeline: 2, schedule: zero_bubble, zero_stage: 2}",
            "{tensor: 2, pipeline: 2, schedule: 1f1b}",
            "{tensor: 2, pipeline: 2, schedule: interleaved_1f1b}",
        ],
    ),
];

const EIGHT_RANKS: &Layouts = &[
    (2, &["{data: 4, tensor: 2, zero_stage: 2}"]),
    (
        4,
        &[
            "{data: 4, pipeline: 2, schedule: 1f1b, zero_stage: 1}",
            "{data: 2, pipeline: 4, schedule: zero_bubble, zero_stage: 3}",
            "{tensor: 2, pipeline: 4, schedule: gpipe}",
            "{data: 2, tensor: 2, pipeline: 2, schedule: interleaved_1f1b, zero_stage: 3}",
        ],
    ),
];

/// One along each axis, and one along all.
const EVERY_AXIS: &Layouts = &[
    (2, &["{data: 2, zero_stage: 3}", "{tensor: 2}"]),
    (
        4,
        &[
            "{pipeline: 2, schedule: zero_bubble}",
            "{data: 2, tensor: 2, pipeline: 2, schedule: interleaved_1f1b, zero_stage: 2}",
        ],
    ),
];

/// As many along one.
const FOUR_IN_LINE: &Layouts = &[(2, &["{data: 4, zero_stage: 1}"]), (4, &["{pipeline: 4, schedule: 1f1b}"])];

/// The stage with these settings, and the folder that it reads.
fn load(tiny: Tiny, on: On, sets: &[&str]) -> (TempDir, Program) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny::write_tokenizer(folder.path());
    // Adam moves every weight by about the learning rate, however small its gradient is beside the rounding errors of that.
    let learning_rate = if on == On::Doubles { "1e-2" } else { "1e-3" };
    let program = stages::program(folder.path(), &tiny.pipeline(learning_rate), &tiny::rows(), sets);
    (folder, program)
}

/// Without the metric that single precision has few digits of.
fn comparable(mut ran: Ran, on: On) -> Ran {
    if on != On::Doubles {
        ran.steps.iter_mut().for_each(|metrics| metrics.retain(|name, _| name != tiny::OF_FEW_DIGITS));
    }
    ran
}

/// What one rank has, which is run once for all tests.
fn one_rank(tiny: Tiny, on: On) -> Arc<Ran> {
    type Run = Arc<OnceLock<Arc<Ran>>>;
    static RUNS: Mutex<Vec<(Tiny, On, Run)>> = Mutex::new(Vec::new());
    let mut runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = runs.iter().find(|(of, at, _)| (*of, *at) == (tiny, on)).map(|(_, _, run)| run.clone());
    let run = known.unwrap_or_else(|| {
        let run = Run::default();
        runs.push((tiny, on, run.clone()));
        run
    });
    drop(runs);
    let first = || {
        let (_folder, program) = load(tiny, on, &[]);
        let one = ran(&program, on, false, None);
        assert_eq!(one.steps.len(), 20);
        Arc::new(comparable(one, on))
    };
    run.get_or_init(first).clone()
}

/// Both models in both stages in every layout beside one rank, with settings whose plans are looked at.
fn beside_one_rank(layouts: &Layouts, on: On, sets: &[&str], look: impl Fn(&Program, &[Planned])) {
    with_a_vocabulary(tiny::TOKENS, layouts, on, sets, look);
}

/// The same where the models have so many tokens.
fn with_a_vocabulary(vocabulary: usize, layouts: &Layouts, on: On, sets: &[&str], look: impl Fn(&Program, &[Planned])) {
    // In single precision a metric may be the difference of numbers of the size of one: it is as exact as those.
    let (least, bound) = if on == On::Doubles { (1e-3, 1e-9) } else { (1.0, 1e-5) };
    for (layers, layout) in layouts.iter().flat_map(|(layers, all)| all.iter().map(|layout| (*layers, *layout))) {
        let parallel = format!("compile.parallel={layout}");
        let sets = [&[parallel.as_str()], sets].concat();
        for tiny in Tiny::all(layers).map(|tiny| Tiny { vocabulary, ..tiny }) {
            let what = format!("{tiny:?}, {sets:?}");
            let (_folder, program) = load(tiny, on, &sets);
            let plans = planned_at_all(&program, on);
            let in_pieces = plans.iter().all(|plan| !plan.stage.pieces.is_empty());
            assert!(program.mesh.ranks() > 1 && in_pieces == (program.mesh.pipeline > 1), "{what}");
            look(&program, &plans);
            let found = run_planned(&program, &plans, on, false, None).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let found = comparable(found, on);
            let (metrics, states) = difference_above(&found, &one_rank(tiny, on), least);
            let near = metrics <= bound && states <= bound;
            assert!(near, "{what}: metrics differ by {metrics:e}, states by {states:e}");
        }
    }
}

fn in_doubles(layouts: &Layouts) {
    beside_one_rank(layouts, On::Doubles, &[], |_, _| ());
}

#[test]
fn zero_0_1_2_and_3_on_2_and_4_ranks_have_one_ranks_numbers() {
    in_doubles(ZERO);
}

#[test]
fn layers_shared_by_2_ranks_have_one_ranks_numbers() {
    in_doubles(TENSOR);
}

/// Layouts in which two ranks have 13 and 12 of 25 tokens.
const ODD: &Layouts = &[
    (2, &["{tensor: 2}", "{data: 2, tensor: 2, zero_stage: 1}", "{data: 2, tensor: 2, zero_stage: 3}"]),
    (4, &["{tensor: 2, pipeline: 2, schedule: 1f1b}"]),
];

#[test]
fn a_vocabulary_that_2_ranks_share_unevenly_has_one_ranks_numbers() {
    let looked = |_: &Program, plans: &[Planned]| {
        let tables = plans.iter().flat_map(|plan| &plan.states).filter(|state| state.whole_shape() == [25, 16]);
        let parts: Vec<Option<i64>> = tables.map(|table| table.ty.dims[0].constant()).collect();
        assert!(!parts.is_empty() && parts.iter().all(|&rows| rows < Some(25)), "{parts:?}");
    };
    with_a_vocabulary(25, ODD, On::Doubles, &[], looked);
    with_a_vocabulary(25, &ODD[..1], On::Fast, &[], looked);
}

#[test]
fn every_schedule_on_2_and_4_places_has_one_ranks_numbers() {
    in_doubles(PIPELINE);
}

#[test]
fn products_of_axes_on_4_ranks_have_one_ranks_numbers() {
    in_doubles(FOUR_RANKS);
}

#[test]
fn products_of_axes_on_8_ranks_have_one_ranks_numbers() {
    in_doubles(EIGHT_RANKS);
}

#[test]
fn recomputation_on_every_axis_has_one_ranks_numbers() {
    let forward = |plans: &[Planned]| plans.iter().map(|plan| plan.op_counts()["attention"]).sum::<usize>();
    beside_one_rank(EVERY_AXIS, On::Doubles, &["compile.gradient_checkpointing=true"], |program, plans| {
        let mut kept = program.clone();
        kept.stage.memory.gradient_checkpointing = false;
        assert!(forward(plans) > forward(&planned_at_all(&kept, On::Doubles)), "nothing is computed again");
    });
}

#[test]
fn offloading_on_every_axis_has_one_ranks_numbers() {
    let sets = ["defaults.offload_optimizer=true", "defaults.offload_param=true", "compile.offload_activations=true"];
    beside_one_rank(EVERY_AXIS, On::Doubles, &sets, |program, plans| {
        assert!(program.stage.roles.iter().all(|role| role.offload_optimizer && role.offload_param));
        // Between pieces, what gradients need is on the host anyway.
        let offloads = |plan: &Planned| plan.op_counts().contains_key("to_host") == plan.stage.pieces.is_empty();
        let is_on_host = |plan: &Planned| plan.arena.host > 0 && offloads(plan);
        assert!(plans.iter().all(is_on_host), "nothing is kept on the host");
    });
}

#[test]
fn single_precision_on_every_axis_is_near_one_ranks_numbers() {
    beside_one_rank(EVERY_AXIS, On::Fast, &[], |_, _| ());
    beside_one_rank(FOUR_IN_LINE, On::Fast, &[], |_, _| ());
}
