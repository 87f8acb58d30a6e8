//! The verifier: for each of its rules, a program that breaks this rule and no other.
//!
//! Most are valid programs that are then changed by hand, since the text form and the builder refuse them.

use dsgc_ir::verify::{Planned, verify};
use dsgc_ir::{Axis, Buffer, DType, Dim, Graph, Level, Op, Program, Region, Site, StateId, Type, Value, parse};

/// Something that breaks a program.
type Break = fn(&mut Program);

fn check(valid: &str, cases: &[(&str, Break)]) {
    let program = parse(valid).unwrap_or_else(|e| panic!("{e}"));
    verify(&program).unwrap_or_else(|fault| panic!("the program to break is not valid: {fault}"));
    for (expected, change) in cases {
        let mut broken = program.clone();
        change(&mut broken);
        match verify(&broken) {
            Ok(()) => panic!("nothing is found, expected `{expected}`"),
            Err(fault) => assert!(fault.to_string().contains(expected), "found `{fault}`, expected `{expected}`"),
        }
    }
}

fn graph(program: &mut Program) -> &mut Graph {
    &mut program.graphs[0]
}

/// Pushes an op on given operands.
fn push(program: &mut Program, op: Op, args: &[Value], state: Option<StateId>) {
    let ty = state.map(|id| program.state(id).ty.clone());
    let pushed = graph(program).try_push(op, args, ty.as_ref(), Site::default());
    pushed.unwrap_or_else(|why| panic!("the program cannot be broken like this: {why}"));
}

/// Replaces the first graph by one made from scratch.
fn replace(program: &mut Program, make: impl FnOnce(&mut Graph)) {
    let mut new = Graph::new("g");
    make(&mut new);
    program.graphs[0] = new;
}

fn vector(n: i64) -> Type {
    Type::new(DType::F32, [Dim::from(n)])
}

fn symbolic(symbol: &str) -> Type {
    Type::new(DType::F32, [Dim::symbol(symbol)])
}

#[test]
fn logical_programs_must_keep_every_rule() {
    let valid = "level logical
state @s : f32[4]
state @t : f32[4]
graph @g(%x: f32[4], %y: f32[B, 4]) {
  dim B: 1..4 batch
  %s = read @s
  %z = add %x, %s
  write @s %z
  return z=%z
}
graph @h() {
  return
}
";
    check(
        valid,
        &[
            ("`@s` is declared twice", |p| p.states[1].name = "s".into()),
            ("`@t` has the type f32[B]; its dims must be numbers", |p| p.states[1].ty = symbolic("B")),
            ("`@t` has the type f32[-4]; its dims must be numbers", |p| p.states[1].ty = vector(-4)),
            ("graph `@g` is defined twice", |p| p.graphs[1].name = "g".into()),
            ("dim `B` is declared twice", |p| {
                let again = graph(p).dims[0].clone();
                graph(p).dims.push(again);
            }),
            ("the range of dim `B` is empty", |p| graph(p).dims[0].min = 5),
            ("the range of dim `B` is empty", |p| graph(p).dims[0].min = -1),
            ("the batch dim `R` is not declared", |p| graph(p).batch = Some("R".into())),
            ("two inputs are called `x`", |p| graph(p).set_name(Value(1), "x")),
            ("two outputs are called `z`", |p| graph(p).outputs.push(("z".into(), Value(0)))),
            ("graph @g: dim `B` is not declared", |p| {
                graph(p).dims.clear();
                graph(p).batch = None;
            }),
            ("graph @g, op 0: dim `T` is not declared", |p| {
                replace(p, |g| {
                    g.try_push(Op::Iota { len: Dim::symbol("T") }, &[], None, Site::default()).expect("it fits");
                });
            }),
            // The type of the result does not show the dim.
            ("graph @g, op 3: dim `T` is not declared", |p| {
                push(p, Op::Size { dim: Dim::symbol("T"), dtype: DType::I32 }, &[], None);
            }),
            ("graph @g: a dim is -4", |p| replace(p, |g| assert_eq!(g.input("x", vector(-4)), Value(0)))),
            // A graph is well typed when it is built, but the state may be declared anew.
            ("op 0: `read` has other results than inferred", |p| p.states[0].ty = vector(5)),
            ("op 0: found f32[4], expected f32[5]", |p| {
                replace(p, |g| {
                    let x = g.input("x", vector(4));
                    let (op, ty) = (Op::Write { state: StateId(0) }, vector(4));
                    g.try_push(op, &[x], Some(&ty), Site::default()).expect("it fits");
                });
                p.states[0].ty = vector(5);
            }),
            ("graph @g, op 3: state 7 does not exist", |p| {
                let ty = vector(4);
                let op = Op::Read { state: StateId(7) };
                graph(p).try_push(op, &[], Some(&ty), Site::default()).expect("the type is given");
            }),
            ("op 3: `@s` is written twice", |p| {
                push(p, Op::Write { state: StateId(0) }, &[Value(0)], Some(StateId(0)))
            }),
            ("op 3: `@s` is read after it was written", |p| {
                push(p, Op::Read { state: StateId(0) }, &[], Some(StateId(0)));
            }),
            ("output `late` is not defined", |p| graph(p).outputs.push(("late".into(), Value(9)))),
        ],
    );
}

const PARTITIONED: &str = "\
level partitioned
mesh pipeline=1 data=2 tensor=1
param @w : f32[3, 4] trained of [5, 4] cut data/0
state @w.grad : f32[5, 4] scratch of [5, 4] partial data
graph @g(%x: f32[5, 4]) {
  %w = read @w : f32[3, 4]
  %all = all_gather %w over=data axis=0 lens=[5] : f32[5, 4]
  %sum = all_reduce %x over=data : f32[5, 4]
  %part = reduce_scatter %x over=data axis=0 ranks=2 : f32[3, 4]
  %own = shard %all over=data axis=0 ranks=2 : f32[3, 4]
  %new = add %part, %own : f32[3, 4]
  write @w %new
  return sum=%sum
}
";

#[test]
fn partitioned_programs_must_fit_their_mesh() {
    check(
        PARTITIONED,
        &[
            ("`@w` is in parts, and nothing is yet", |p| p.level = Level::Logical),
            ("`@w` is f32[3, 4], and a rank's part of it is [2, 4]", |p| p.mesh.data = 3),
            ("a cut of `@w` is along no dim of it", |p| {
                p.states[0].placement.as_mut().expect("it is in parts").cuts[0].dim = 2;
            }),
            ("`all_gather over=data axis=0 lens=[7]` does not fit the mesh", |p| {
                push(p, Op::AllGather { over: Axis::Data, axis: 0, lens: vec![7] }, &[Value(1)], None);
            }),
            ("`shard over=tensor axis=0 ranks=2` does not fit the mesh", |p| {
                push(p, Op::Shard { over: Axis::Tensor, axis: 0, ranks: 2 }, &[Value(2)], None);
            }),
            ("`all_reduce`, and nothing is in parts yet", |p| {
                p.level = Level::Logical;
                p.states.iter_mut().for_each(|state| state.placement = None);
                replace(p, |g| {
                    let x = g.input("x", vector(4));
                    g.try_push(Op::AllReduce { over: Axis::Data }, &[x], None, Site::default()).expect("it fits");
                });
            }),
        ],
    );
}

const SENT: &str = "\
level partitioned
mesh pipeline=1 data=2 tensor=1
param @w : f32[4] trained of [8] cut data/0
graph @g(%x: f32[4]) {
  %w = read @w : f32[4]
  %all = all_gather %w over=data axis=0 lens=[8] : f32[8]
  %sum = all_reduce %x over=data : f32[4]
  %y = exp %x : f32[4]
  %all.1 = wait %all, %w : f32[8]
  %sum.1 = wait %sum : f32[4]
  %z = add %y, %sum.1 : f32[4]
  return all=%all.1, z=%z
}
";

#[test]
fn what_is_sent_beside_other_ops_is_waited_for() {
    check(
        SENT,
        &[
            ("what is on its way is used", |p| push(p, Op::Neg {}, &[Value(2)], None)),
            ("`wait` for what no rank sends", |p| push(p, Op::Wait {}, &[Value(4)], None)),
            ("`wait` does not keep what is sent", |p| push(p, Op::Wait {}, &[Value(2)], None)),
            ("`wait` does not keep what is sent", |p| push(p, Op::Wait {}, &[Value(3), Value(0)], None)),
            ("`wait` for what has come", |p| push(p, Op::Wait {}, &[Value(3)], None)),
            ("output `z` is on its way", |p| graph(p).outputs[1].1 = Value(3)),
        ],
    );
}

fn buffer(offset: usize, bytes: usize) -> Buffer {
    Buffer { region: Region::Values, offset, bytes }
}

fn persistent(offset: usize, bytes: usize) -> Buffer {
    Buffer { region: Region::Persistent, offset, bytes }
}

/// Moves a value by name.
fn place(program: &mut Program, name: &str, buffer: Buffer) {
    let graph = graph(program);
    let value = graph.values().find(|&v| graph.name_of(v) == name).expect("it has a name");
    graph.set_buffer(value, buffer);
}

#[test]
fn planned_programs_must_have_places_for_everything() {
    let valid = "level planned
arena persistent=64 values=128 scratch=16
state @s : f32[4] in persistent+0:16
state @t : f32[4] in persistent+16:16
graph @g(%x: f32[B, 2] in values+0:32, %y: f32[4] in values+32:16) {
  dim B: 1..4 batch
  %a = exp %y : f32[4] in values+48:16 scratch=16
  return a=%a
}
";
    check(
        valid,
        &[
            ("`@t` has no buffer", |p| p.states[1].buffer = None),
            ("`@t` does not fit its buffer", |p| p.states[1].buffer = Some(persistent(16, 12))),
            ("`@t` does not fit its buffer", |p| p.states[1].buffer = Some(buffer(64, 16))),
            ("`@t` leaves the arena", |p| p.states[1].buffer = Some(persistent(56, 16))),
            ("`@s` and `@t` overlap", |p| p.states[1].buffer = Some(persistent(12, 16))),
            ("%a.3 has no buffer", |p| {
                let op = Op::Stop {};
                push(p, op, &[Value(2)], None);
                graph(p).set_name(Value(3), "a");
                graph(p).scratch.push(0);
            }),
            // The upper bound of `B` counts.
            ("%x does not fit its buffer", |p| place(p, "x", buffer(0, 24))),
            ("%a does not fit its buffer", |p| place(p, "a", buffer(120, 16))),
            ("%a does not fit its buffer", |p| place(p, "a", Buffer { region: Region::Scratch, offset: 0, bytes: 16 })),
            ("inputs %x and %y overlap", |p| place(p, "y", buffer(16, 16))),
            ("workspace is not planned", |p| graph(p).scratch.clear()),
            ("workspace is not planned", |p| graph(p).scratch[0] = 17),
        ],
    );
}

#[test]
fn planned_programs_must_not_overwrite_what_is_needed() {
    let valid = "level planned
arena persistent=16 values=256 scratch=0
state @s : f32[4] in persistent+0:16
graph @g(%x: f32[4] in values+0:16, %m: f32[2, 2] in values+16:16) {
  %s = read @s : f32[4] in persistent+0:16
  %v = reshape %x shape=[2, 2] : f32[2, 2] in values+0:16
  %t = transpose %v order=[1, 0] : f32[2, 2] in values+32:16
  %u = add %t, %v : f32[2, 2] in values+32:16
  %w = mul %x, %s : f32[4] in values+0:16
  %z = cast %w dtype=bool : bool[4] in values+48:4
  return u=%u, z=%z, m=%m
}
";
    check(
        valid,
        &[
            ("op 0: a read must be its state's buffer", |p| place(p, "s", buffer(64, 16))),
            ("op 1: a view must be its operand's buffer", |p| place(p, "v", buffer(64, 16))),
            // `transpose` cannot work in place.
            ("op 2: %t overwrites %x, which is still needed", |p| place(p, "t", buffer(0, 16))),
            // `add` can, but not on half of an operand, and not on one that is used later.
            ("op 3: %u overwrites %t, which is still needed", |p| place(p, "u", buffer(40, 16))),
            ("op 3: %u overwrites %x, which is still needed", |p| place(p, "u", buffer(0, 16))),
            // An output and an operand of a later op, neither operand of this one.
            ("op 4: %w overwrites %u, which is still needed", |p| place(p, "w", buffer(32, 16))),
            ("op 4: %w overwrites %m, which is still needed", |p| place(p, "w", buffer(16, 16))),
            // An elementwise op of another size cannot work in place: elements would be lost before they are read.
            ("op 5: %z overwrites %w, which is still needed", |p| {
                // Nothing but the size forbids it here.
                graph(p).outputs.retain(|(name, _)| name != "u");
                place(p, "w", buffer(64, 16));
                place(p, "z", buffer(64, 4));
            }),
            ("op 5: %z overwrites %u, which is still needed", |p| place(p, "z", buffer(44, 4))),
        ],
    );
}

#[test]
fn a_state_must_not_be_written_while_its_old_value_is_needed() {
    let valid = "level planned
arena persistent=16 values=64 scratch=0
state @s : f32[4] in persistent+0:16
graph @g(%x: f32[4] in values+0:16) {
  %s = read @s : f32[4] in persistent+0:16
  %a = mul %x, %s : f32[4] in values+16:16
  %b = add %a, %s : f32[4] in values+32:16
  write @s %a
  return b=%b
}
";
    check(
        valid,
        &[
            ("op 1: %a overwrites %s, which is still needed", |p| place(p, "a", persistent(0, 16))),
            ("op 3: %s is read after its state was written", |p| {
                graph(p).outputs.push(("old".into(), Value(1)));
            }),
        ],
    );
    let two = "level planned
arena persistent=0 values=512 scratch=0
graph @g(%p: f32[4] in values+0:16, %g: f32[4] in values+16:16, %m: f32[4] in values+32:16, \
%v: f32[4] in values+48:16, %r: f32[] in values+64:4, %t: i32[] in values+72:4, %f: f32[] in values+80:4) {
  %a, %b, %c = adamw %p, %g, %m, %v, %r, %t, %f beta1=0.9 beta2=0.9 eps=1e-8 decay=0.0 : \
f32[4] in values+0:16, f32[4] in values+32:16, f32[4] in values+48:16
  return a=%a, b=%b, c=%c
}
";
    check(
        &two.replace("\\\n", ""),
        &[
            ("op 0: results %8 and %9 overlap", |p| {
                place(p, "b", buffer(128, 16));
                place(p, "c", buffer(128, 16));
            }),
            // The gradient's place is not one of those that the optimizer may take.
            ("op 0: %a overwrites %g, which is still needed", |p| place(p, "a", buffer(16, 16))),
        ],
    );
}

#[test]
fn only_planned_programs_become_planned() {
    let logical = parse("level logical\ngraph @g() {\n  return\n}").expect("it is valid");
    let fault = Planned::new(logical).expect_err("it has no plan");
    assert_eq!(fault.message, "the program is not planned");
    let mut planned = parse("level planned\ngraph @g() {\n  return\n}").expect("it is valid");
    assert!(Planned::new(planned.clone()).is_ok());
    planned.declare("s", vector(4), dsgc_ir::StateKind::State, dsgc_ir::diag::Span::NONE);
    assert!(Planned::new(planned).is_err(), "every level is verified");
}
