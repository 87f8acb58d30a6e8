//! The pipeline keeps its contracts, and exact passes keep every bit of random programs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dsgc_ir::Program;
use dsgc_ir::cost::graph_cost;
use dsgc_ir::fuzz::random_program;
use dsgc_passes::{Fact, Numerics, PIPELINE};

mod common;

#[test]
fn every_pass_finds_what_it_requires() {
    let mut facts = BTreeSet::from([Fact::Logical]);
    for pass in PIPELINE {
        for need in pass.requires {
            assert!(facts.contains(need), "`{}` needs {need:?}, which no pass before it provides", pass.name);
        }
        facts.extend(pass.provides);
    }
    assert!(facts.contains(&Fact::Planned), "the pipeline does not end with a plan");
}

#[test]
fn a_name_is_one_pass() {
    let mut named = BTreeMap::new();
    for pass in PIPELINE {
        let run = pass.run as usize;
        assert_eq!(*named.entry(pass.name).or_insert(run), run, "two passes are called `{}`", pass.name);
    }
}

#[test]
fn every_pass_has_filetests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    for pass in PIPELINE {
        let files = std::fs::read_dir(root.join(pass.name)).map_or(0, |folder| folder.count());
        assert!(files > 0, "`{}` has no filetest", pass.name);
    }
}

#[test]
fn exact_passes_keep_every_bit_of_random_programs() {
    let others = PIPELINE.iter().filter(|p| p.numerics != Numerics::Exact).map(|p| p.name);
    let tested = ["adapt", "share_prefix", "share_rows", "precision", "quantize", "partition", "split_stages"];
    assert!(
        others.eq(tested),
        "a pass that is not exact needs a test of its own, as tests/adapt, tests/precision, tests/shared_prefix.rs, tests/shared_rows.rs, tests/ranks.rs and tests/pipeline.rs"
    );
    for seed in 0..200 {
        let mut program = random_program(seed, 10 + seed as usize % 30);
        for pass in PIPELINE {
            let next = common::run(pass, &program).unwrap_or_else(|e| panic!("seed {seed}, `{}`: {}", pass.name, e[0]));
            assert!(pass.numerics == Numerics::Exact || next == program, "seed {seed}: nobody asked `{}`", pass.name);
            program = next;
        }
    }
}

#[test]
fn fusing_moves_fewer_bytes() {
    let mut saved = 0;
    for seed in 0..200 {
        let mut program = random_program(300 + seed, 30);
        for pass in PIPELINE.iter().filter(|pass| pass.name != "plan_memory") {
            let before = program.clone();
            program = common::run(pass, &program).unwrap_or_else(|e| panic!("seed {seed}, `{}`: {}", pass.name, e[0]));
            if pass.name == "fuse" {
                let bytes = |p: &Program| -> u64 {
                    p.graphs.iter().map(|g| graph_cost(g, &g.upper_bounds()).map_or(0, |cost| cost.bytes)).sum()
                };
                let (before, after) = (bytes(&before), bytes(&program));
                assert!(after <= before, "seed {seed}: {before} bytes became {after} in\n{program}");
                saved += before - after;
            }
        }
    }
    assert!(saved > 0);
}
