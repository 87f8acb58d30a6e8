//! Products with one operand in common, in one launch: each is computed as if it were alone, so merging changes no bit.

use dsgc_ir::Op;

use super::{Launch, contract};

/// Runs `contract_each`.
pub(super) fn run(l: &mut Launch, spec: &str, common: usize) -> Result<(), String> {
    let shared = l.op.args[0];
    for (i, &other) in l.op.args[1..].iter().enumerate() {
        let args = if common == 0 { vec![shared, other] } else { vec![other, shared] };
        let part = l.op.part(Op::Contract { spec: spec.to_string() }, args, i..i + 1);
        let mut one = Launch {
            graph: l.graph,
            op: &part,
            dims: l.dims,
            memory: l.memory,
            threads: l.threads,
            scratch: l.scratch,
            region: None,
        };
        contract::run(&mut one, spec)?;
    }
    Ok(())
}
