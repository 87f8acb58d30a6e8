//! Pieces of graphs follow each other as their schedule takes them, whatever else is asked for: nothing but the schedule says
//! how long ranks along `pipeline` wait.

use dsgc_ir::Mesh;
use dsgc_ir::schedule::{PipelineOrder, Work, scheduled, timeline};
use dsgc_ir::stage::Piece;

#[path = "common/on_ranks.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod on_ranks;
#[allow(dead_code)] // Other tests use the rest.
mod stages;
#[path = "common/tiny.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod tiny;

use on_ranks::{On, laid_out, planned};
use tiny::Tiny;

const PLACES: usize = 2;

/// The pieces of the gradients of a tiny model's SFT that is laid out so.
fn pieces(model: &'static str, order: PipelineOrder, mesh: Mesh, zero_stage: u8, sets: &[&str]) -> Vec<Piece> {
    let folder = tempfile::tempdir().expect("a folder can be made");
    tiny::write_tokenizer(folder.path());
    let tiny = Tiny { model, stage: "sft", layers: 4, vocabulary: tiny::TOKENS };
    let program = stages::program(folder.path(), &tiny.pipeline("1e-2"), &tiny::rows(), sets);
    let mut program = laid_out(&program, mesh, zero_stage);
    program.stage.parallel.order = order;
    program.stage.parallel.virtual_stages = chunks(order);
    planned(&program, On::Cpu).stage.pieces["model.loss.grad"].clone()
}

/// How many runs of layers a place has.
fn chunks(order: PipelineOrder) -> usize {
    if order == PipelineOrder::Interleaved { 2 } else { 1 }
}

/// How many pieces long a schedule is by the formulas of `ir/src/schedule.rs`.
fn length(order: PipelineOrder, parts: usize) -> usize {
    match order {
        PipelineOrder::Gpipe | PipelineOrder::OneForwardOneBackward => 2 * (parts + PLACES - 1),
        PipelineOrder::Interleaved => 2 * (chunks(order) * parts + PLACES - 1),
        PipelineOrder::ZeroBubble => 3 * parts + PLACES - 1,
    }
}

/// Most parts that the runs of layers of a place have under way, by the formulas of `ir/src/schedule.rs`; two places have
/// rounds of two parts.
fn under_way(order: PipelineOrder, place: usize, parts: usize) -> usize {
    match order {
        PipelineOrder::Gpipe => parts,
        PipelineOrder::OneForwardOneBackward => PLACES - place,
        PipelineOrder::Interleaved => {
            let runs = chunks(order);
            (2 * (PLACES - 1 - place) + (runs - 1) * PLACES + 1).min(runs * parts)
        }
        PipelineOrder::ZeroBubble => PLACES,
    }
}

/// The same of what a place does.
fn most_under_way(actions: &[(usize, usize)], pieces: &[Piece], last: Work) -> usize {
    let mut now = 0usize;
    let most = actions.iter().map(|&(_, piece)| {
        now += usize::from(pieces[piece].work == Work::Forward);
        let all = now;
        now -= usize::from(pieces[piece].work == last);
        all
    });
    most.max().unwrap_or(0)
}

fn keeps_to_its_schedule(mesh: Mesh, zero_stage: u8, sets: &[&str]) {
    for (model, order) in ["opt", "llama"].into_iter().flat_map(|m| PipelineOrder::ALL.map(|order| (m, order))) {
        let what = format!("{model} {} {mesh}, zero_stage {zero_stage}, {sets:?}", order.name());
        let pieces = pieces(model, order, mesh, zero_stage, sets);
        for place in 0..PLACES {
            let of = |work| pieces.iter().filter(|piece| piece.place == place && piece.work == work).count();
            let weight = usize::from(order.splits_backward());
            let found = [Work::Forward, Work::Backward, Work::Weight].map(of);
            assert_eq!(found, [chunks(order), chunks(order), weight], "place {place} of {what}");
        }
        for parts in [2, 4, 8] {
            let actions = scheduled(order, &pieces, PLACES, parts);
            let actions = actions.unwrap_or_else(|| panic!("{what}: no schedule in {parts} parts"));
            let ends = timeline(&actions, &pieces, |_| 1).unwrap_or_else(|why| panic!("{what}: {why}"));
            let last = ends.into_iter().flatten().max();
            assert_eq!(last, Some(length(order, parts) as u64), "{what} in {parts} parts");
            let last = if order.splits_backward() { Work::Weight } else { Work::Backward };
            let found: Vec<usize> = actions.iter().map(|own| most_under_way(own, &pieces, last)).collect();
            let expected: Vec<usize> = (0..PLACES).map(|place| under_way(order, place, parts)).collect();
            assert_eq!(found, expected, "parts under way, {what} in {parts} parts");
        }
    }
}

const ALONE: Mesh = Mesh { pipeline: PLACES, data: 1, tensor: 1 };
const DATA: Mesh = Mesh { data: 2, ..ALONE };

#[test]
fn under_zero() {
    (0..4).for_each(|zero_stage| keeps_to_its_schedule(DATA, zero_stage, &[]));
}

#[test]
fn with_tensors_cut_too() {
    keeps_to_its_schedule(Mesh { tensor: 2, ..ALONE }, 0, &[]);
    keeps_to_its_schedule(Mesh { tensor: 2, ..DATA }, 3, &[]);
}

#[test]
fn in_narrow_floats() {
    for precision in ["stages.sft.bf16=true", "stages.sft.fp16=true"] {
        keeps_to_its_schedule(ALONE, 0, &[precision]);
        keeps_to_its_schedule(DATA, 3, &[precision]);
    }
}

#[test]
fn with_recomputation() {
    keeps_to_its_schedule(ALONE, 0, &["compile.gradient_checkpointing=true"]);
    keeps_to_its_schedule(DATA, 3, &["compile.gradient_checkpointing=true", "stages.sft.fp16=true"]);
}

#[test]
fn with_adapters() {
    keeps_to_its_schedule(ALONE, 0, &["stages.sft.lora_r=2"]);
    keeps_to_its_schedule(DATA, 3, &["stages.sft.lora_r=2"]);
}
