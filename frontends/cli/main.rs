//! The `dsgc` program.
fn main() {}
