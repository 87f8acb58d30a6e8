//! The plainest memory plan: every value apart from all others.
//!
//! Tests of devices use it where the memory planner is not what they test; it also shows what a plan saves.

use dsgc_ir::op::Class;
use dsgc_ir::{Arena, Bindings, Buffer, Level, Op, Program, Region, Type};

/// Bytes to which offsets are aligned: what GPUs may ask for, enough for every device.
const ALIGNMENT: usize = 256;

/// Gives every value and state of a logical program a place of its own, and no workspace. Reads lie at their states,
/// views at their operands, as the verifier wants.
///
/// # Panics
/// If the program does not verify.
pub fn plan_apart(mut program: Program) -> Program {
    let mut arena = Arena::default();
    let place = |used: &mut usize, region: Region, ty: &Type, bounds: &Bindings| {
        let bytes = ty.bytes(bounds).expect("verified types have declared dims only");
        let buffer = Buffer { region, offset: *used, bytes };
        *used += bytes.next_multiple_of(ALIGNMENT);
        buffer
    };
    for state in &mut program.states {
        state.buffer = Some(place(&mut arena.persistent, Region::Persistent, &state.ty, &Bindings::new()));
    }
    for graph in &mut program.graphs {
        let (bounds, mut used) = (graph.upper_bounds(), 0);
        for value in graph.values() {
            let op = graph.def(value).map(|d| graph.op(d));
            let buffer = match op {
                Some(op) if op.op.class() == Class::View => graph.buffer(op.args[0]),
                Some(op) => match op.op {
                    Op::Read { state } => program.states[state.0 as usize].buffer,
                    _ => None,
                },
                None => None,
            };
            let buffer = buffer.unwrap_or_else(|| place(&mut used, Region::Values, graph.ty(value), &bounds));
            graph.set_buffer(value, buffer);
        }
        graph.scratch = vec![0; graph.len()];
        arena.values = arena.values.max(used);
    }
    program.arena = arena;
    program.level = Level::Planned;
    program
}
