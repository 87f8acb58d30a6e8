//! Random programs are valid, reach every op, and depend on nothing but their seed.

use std::collections::BTreeSet;

use dsgc_ir::fuzz::{is_of_layout, random_program};
use dsgc_ir::op::ROWS;
use dsgc_ir::verify::verify;

#[test]
fn random_programs_are_valid_and_reach_every_op() {
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        let program = random_program(seed, 40);
        verify(&program).unwrap_or_else(|fault| panic!("seed {seed}: {fault} in\n{program}"));
        assert_eq!(program, random_program(seed, 40), "seed {seed} gives two programs");
        seen.extend(program.op_counts().into_keys());
    }
    let missing = ROWS.iter().filter(|row| !is_of_layout(row) && !seen.contains(row.name));
    let missing: Vec<&str> = missing.map(|row| row.name).collect();
    assert!(missing.is_empty(), "never drawn: {missing:?}");
}
