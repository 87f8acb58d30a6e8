//! The text form: what is written reads back, and what cannot be read is an error at its place.

use dsgc_ir::fuzz::random_program;
use dsgc_ir::parse;

#[test]
fn random_programs_read_back() {
    for seed in 0..300 {
        let program = random_program(seed, 30);
        let text = program.to_string();
        let read = parse(&text).unwrap_or_else(|e| panic!("seed {seed}: {e:?} in\n{text}"));
        assert_eq!(read.to_string(), text, "seed {seed}");
    }
}
