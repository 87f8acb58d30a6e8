//! Generation: the graphs that `decode` derives give the logits of the whole forward graph at every step.

use dsgc_ir::stage::{Generate, Statement};
use dsgc_ir::{Data, Program, Tensor, parse};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PassContext, run_passes};

/// Two layers of attention with positions, and scores for 7 tokens. `LINES` may change values `%a` on the way.
fn text(lines: &str) -> String {
    let layer = |x: &str, y: &str, n: usize| {
        format!(
            "  %q{n} = contract {x}, %wq spec=btd,ed->bte
  %qh{n} = reshape %q{n} shape=[B, T, 2, 2]
  %k{n} = contract {x}, %wk spec=btd,ed->bte
  %kh{n} = reshape %k{n} shape=[B, T, 1, 2]
  %o{n}, %d{n} = attention %qh{n}, %kh{n}, %kh{n}, %segment causal=true scale=0.7 window=0
  %of{n} = reshape %o{n} shape=[B, T, 4]
  {y} = add {x}, %of{n}\n"
        )
    };
    format!(
        r#"level logical
param @actor/e : f32[7, 4]
param @actor/p : f32[16, 4]
param @actor/q : f32[4, 4]
param @actor/k : f32[2, 4]
graph @actor.forward(%tokens: i32[B, T], %segment: i32[B, T]) {{
  dim B: 1..3
  dim T: 1..9
  %e = read @actor/e
  %p = read @actor/p
  %wq = read @actor/q
  %wk = read @actor/k
  %words = embed %e, %tokens
  %at = position_in %segment
  %places = embed %p, %at
  %x = add %words, %places
{}{}{lines}
  %logits = contract %z, %e spec=btd,vd->btv
  return logits=%logits
}}
stage {{
  "name": "s",
  "plan": [{{"generate": {{
    "name": "rollout", "role": "actor", "prompt": "batch.prompt", "samples": 1, "max_new_tokens": 4,
    "sampling": {{"temperature": 0.0, "top_k": 0, "top_p": 1.0}}, "stop": null, "pad": 0, "forward": "actor.forward",
    "prompt_width": 5, "rows": 3, "steps": null
  }}}}]
}}
"#,
        layer("%x", "%y", 0),
        layer("%y", "%z0", 1),
    )
}

fn decoded(lines: &str) -> Result<Program, String> {
    let program = parse(&text(lines)).unwrap_or_else(|e| panic!("{e}"));
    let context = PassContext::new(&InterpTarget);
    run_passes(program, &["infer", "adapt", "canonicalize", "decode"], &context)
        .map_err(|diags| diags.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
}

const PLAIN: &str = "  %z = relu %z0";

fn generate(program: &Program) -> Generate {
    match &program.stage.plan[0] {
        Statement::Generate(generate) => generate.clone(),
        other => panic!("found {other:?}"),
    }
}

fn device(program: Program) -> Interp {
    let mut interp = Interp::new(program, Precision::F64);
    for (name, shape, by) in
        [("e", vec![7, 4], 0.7), ("p", vec![16, 4], 1.9), ("q", vec![4, 4], 2.3), ("k", vec![2, 4], 3.1)]
    {
        let id = interp.program().state_named(&format!("actor/{name}")).expect("it is declared");
        let n: usize = shape.iter().product();
        let wave = (0..n).map(|i| (by * i as f64 + 0.3).sin()).collect();
        interp.set_state(id, &Tensor::new(&shape, Data::F64(wave)));
    }
    interp
}

fn ints(shape: &[usize], data: Vec<i32>) -> Tensor {
    Tensor::i32(shape, data)
}

/// Columns from `from` on, of rows that are `width` long.
fn columns(all: &[i32], width: usize, from: usize, to: usize) -> Tensor {
    let rows = all.len() / width;
    ints(&[rows, to - from], all.chunks(width).flat_map(|row| row[from..to].to_vec()).collect())
}

const TOKENS: [i32; 27] = [0, 0, 3, 1, 4, 1, 5, 2, 6, 2, 6, 5, 3, 5, 1, 1, 4, 3, 0, 0, 0, 0, 2, 3, 3, 1, 2];
const SEGMENT: [i32; 27] = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1];

/// Runs the columns in pieces that end at these places; the logits of the last column of each.
fn pieces(interp: &mut Interp, generate: &Generate, ends: &[usize]) -> Vec<Vec<f64>> {
    let steps = generate.steps.as_ref().expect("the pass fills it in");
    let mut from = 0;
    let mut all = Vec::new();
    for &to in ends {
        let graph = if to - from == 1 { &steps.step } else { &steps.prefill };
        // Nothing is known of later columns.
        let segment = SEGMENT.iter().enumerate().map(|(i, &s)| if i % 9 < to { s } else { 0 }).collect();
        let inputs = [
            ("tokens", &columns(&TOKENS, 9, from, to)),
            ("segment", &ints(&[3, 9], segment)),
            ("place", &ints(&[], vec![from as i32])),
            ("key", &Tensor::key([1, 2])),
            ("row", &ints(&[3], vec![0, 1, 2])),
        ];
        let outputs = interp.run(graph, &inputs).unwrap_or_else(|e| panic!("{e}"));
        let found = |name: &str| outputs.iter().find(|(n, _)| n == name).expect("it is an output").1.to_f64();
        let logits = found("logits");
        // Greedy: the token is the best one.
        for (row, token) in logits.chunks(7).zip(found("token")) {
            assert!(row.iter().all(|&x| x <= row[token as usize]));
        }
        all.push(logits);
        from = to;
    }
    all
}

#[test]
fn every_step_is_the_whole_forward() {
    let text = text(PLAIN);
    let mut whole = device(parse(&text).unwrap_or_else(|e| panic!("{e}")));
    let program = decoded(PLAIN).unwrap_or_else(|e| panic!("{e}"));
    let generate = generate(&program);
    // One prefill and steps; a second prefill behind the first, as in a conversation.
    for ends in [&[5, 6, 7, 8, 9][..], &[2, 5, 6, 9], &[1, 2, 3, 4, 5, 6, 7, 8, 9]] {
        let mut interp = device(program.clone());
        let found = pieces(&mut interp, &generate, ends);
        for (&end, logits) in ends.iter().zip(found) {
            let inputs = [("tokens", &columns(&TOKENS, 9, 0, end)), ("segment", &columns(&SEGMENT, 9, 0, end))];
            let outputs = whole.run("actor.forward", &inputs).unwrap_or_else(|e| panic!("{e}"));
            let expected = outputs[0].1.to_f64();
            for row in 0..3 {
                let at = (row * end + end - 1) * 7;
                let near = (0..7).all(|i| (expected[at + i] - logits[row * 7 + i]).abs() < 1e-12);
                assert!(near, "row {row}, {end} columns: {:?} and {:?}", &expected[at..at + 7], &logits[row * 7..]);
            }
        }
    }
}

#[test]
fn the_graphs_have_their_caches_and_the_forward_graph_goes_away() {
    let program = decoded(PLAIN).unwrap_or_else(|e| panic!("{e}"));
    let names: Vec<&str> = program.graphs.iter().map(|g| g.name.as_str()).collect();
    assert_eq!(names, ["actor.prefill", "actor.step"]);
    let caches: Vec<String> = program
        .states
        .iter()
        .filter(|s| s.name.starts_with("cache/"))
        .map(|s| format!("{} {}", s.name, s.ty))
        .collect();
    assert_eq!(caches, ["0.k", "0.v", "1.k", "1.v"].map(|name| format!("cache/actor/{name} f32[3, 9, 1, 2]")));
}

#[test]
fn what_looks_at_other_columns_is_an_error_that_names_the_op() {
    let cases = [
        ("  %z = cumsum %z0 axis=1 reverse=false", "`cumsum` looks at several columns"),
        (
            "  %m = reduce_sum %z0 axes=[1]
  %mm = reshape %m shape=[B, 1, 4]
  %z = broadcast %mm shape=[B, T, 4]",
            "`reduce_sum` looks at several columns",
        ),
        (
            "  %i = iota len=T
  %f = cast %i dtype=f32
  %g = reshape %f shape=[T, 1]
  %h = broadcast %g shape=[B, T, 4]
  %z = add %z0, %h",
            "`iota` counts the columns",
        ),
        (
            "  %r = reshape %z0 shape=[B*T, 4]
  %s = relu %r
  %z = reshape %s shape=[B, T, 4]",
            "mixes the columns of a sequence with another dim",
        ),
        (
            "  %h = reshape %z0 shape=[B, T, 2, 2]
  %o, %d = attention %h, %h, %h, %segment causal=false scale=1.0 window=0
  %z = reshape %o shape=[B, T, 4]",
            "`attention` looks at later columns",
        ),
        (
            "  %h = reshape %z0 shape=[B, T, 2, 2]
  %own = neg %segment
  %o, %d = attention %h, %h, %h, %own causal=true scale=1.0 window=0
  %z = reshape %o shape=[B, T, 4]",
            "`attention` has a mask of its own",
        ),
    ];
    for (lines, expected) in cases {
        let found = decoded(lines).expect_err(lines);
        assert!(found.contains(expected), "found `{found}`, expected `{expected}`");
    }
}
