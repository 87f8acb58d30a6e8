//! The text form: what is written reads back, and what cannot be read is an error at its place.

use dsgc_ir::fuzz::{Rng, random_program};
use dsgc_ir::print::{value_name, value_names};
use dsgc_ir::stage::{Origin, Role, Source, Stage, Statement};
use dsgc_ir::{Value, parse};

#[test]
fn random_programs_read_back() {
    for seed in 0..300 {
        let program = random_program(seed, 30);
        let text = program.to_string();
        let read = parse(&text).unwrap_or_else(|e| panic!("seed {seed}: {e} in\n{text}"));
        assert_eq!(read.to_string(), text, "seed {seed}");
        // Values get the names they are printed with; all else is as it was.
        assert_eq!(parse(&read.to_string()), Ok(read), "seed {seed}");
    }
}

#[test]
fn stages_and_sources_read_back() {
    let role = Role {
        name: "model".into(),
        model: Default::default(),
        origin: Origin::Folder("a \"quoted\" folder".into()),
        init: "model.init".into(),
        trained: true,
        precision: None,
        weights: None,
        zero_stage: 0,
        gather_for_generation: false,
        offload_optimizer: true,
        offload_param: false,
        tokenizer: None,
        shared: vec![],
    };
    let stage = Stage {
        name: "sft".into(),
        roles: vec![role],
        sources: vec![Source { name: "text".into(), ..Source::default() }],
        num_epochs: 0.1,
        plan: vec![Statement::Repeat { times: 2, body: vec![] }],
        ..Stage::default()
    };
    let mut program = random_program(3, 10);
    program.sources.push("dir/späte \\ \"datei\".yaml".into());
    program.stage = stage;
    let read = parse(&program.to_string()).expect("it was printed");
    assert_eq!((&read.stage, &read.sources), (&program.stage, &program.sources));
    assert_eq!(read.to_string(), program.to_string());
}

#[test]
fn planned_programs_read_back() {
    let text = "level planned
arena persistent=64 values=128 scratch=32
param @w : f32[4] trained in persistent+0:16 loc 0:2:1:4

graph @g(%x: f32[4] in values+0:16) {
  %w = read @w : f32[4] in persistent+0:16
  %y = add %x, %w : f32[4] in values+64:16 scratch=32 update layer layers/3 update_of 0:2:1:4
  write @w %y update
  return y=%y
}
";
    let program = parse(text).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(program.to_string(), text);
    assert_eq!(program.graphs[0].scratch, [0, 32, 0]);
    let without = text.replace(" scratch=32 update", " update");
    let program = parse(&without).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(program.graphs[0].scratch, [0, 0, 0], "a planned graph has a workspace per op");
}

#[test]
fn comments_and_types_may_be_left_out() {
    let text = "; what this is
level logical

graph @g(%x: f32[2, T]) { ; the graph
  ; its dims
  dim T: 1..4 ; batch
  %y = exp %x ; no type

  return y=%y
} ; the end
; of the file";
    let program = parse(text).unwrap_or_else(|e| panic!("{e}"));
    let printed =
        "level logical\n\ngraph @g(%x: f32[2, T]) {\n  dim T: 1..4\n  %y = exp %x : f32[2, T]\n  return y=%y\n}\n";
    assert_eq!(program.to_string(), printed);
}

/// What is wrong with a text, and where: `line:column`, a part of the message, a part of the help.
#[rustfmt::skip]
const ERRORS: &[(&str, &str, &str, &str)] = &[
    ("levl logical", "1:1", "no item of a program is called `levl`", "the nearest is `level`"),
    ("level physical", "1:7", "no level is called `physical`", "there are logical, partitioned, planned"),
    ("level logical here", "1:15", "found `here`, expected the end of the line", ""),
    ("source 0 model.yaml", "1:10", "expected value", ""),
    ("arena persistent=64", "1:20", "expected `values`", ""),
    ("arena persistent=-1", "1:18", "expected a number", ""),
    ("param w : f32[2]", "1:7", "expected `@`", ""),
    ("param @w f32[2]", "1:10", "expected `:`", ""),
    ("param @w : f23[2]", "1:12", "no element type is called `f23`", "the nearest is `f32`"),
    ("param @w : f32", "1:15", "expected dims in brackets", ""),
    ("param @w : f32[2", "1:15", "expected `]`", ""),
    ("param @w : f32[2, 1x]", "1:22", "`1x` is no dim", ""),
    ("param @w : f32[2+]", "1:19", "`2+` is no dim", ""),
    ("param @w : f32[2] in vales+0:8", "1:22", "no region is called `vales`", "the nearest is `values`"),
    ("param @w : f32[2]\nstate @w : f32[2]", "2:18", "`@w` is declared twice", ""),
    ("graph @g(x: f32[2]) {", "1:10", "expected `%`", ""),
    ("graph @g(%x: f32[2], %x: f32[2]) {", "1:32", "`%x` is defined twice", ""),
    ("graph @g(%x: f32[2])\n  return\n}", "1:21", "expected `{`", ""),
    ("graph @g() {\n  %y = const value=1.0 dtype=f32", "2:33", "the text ends inside a graph", "end it with `return`"),
    ("graph @g() {\n  dim T: 1.4\n  return\n}", "2:11", "expected `..`", ""),
    ("graph @g() {\n  return\n}\ngraph @g() {\n  return\n}", "6:2", "graph `@g` is defined twice", ""),
    ("graph @g() {\n  return\n", "3:1", "expected `}`", ""),
    ("graph @g(%x: f32[2]) {\n  %y = exq %x\n  return\n}", "2:8", "no op is called `exq`; the nearest is `exp`", ""),
    ("graph @g(%hidden: f32[2]) {\n  %y = exp %hiden\n  return\n}", "2:12", "`%hiden` is not defined before its use", "the nearest is `%hidden`"),
    ("graph @g(%x: f32[2]) {\n  %y = exp %y\n  return\n}", "2:12", "`%y` is not defined before its use", ""),
    ("graph @g(%x: f32[2]) {\n  %x = exp %x\n  return\n}", "2:3", "`%x` is defined twice", ""),
    ("graph @g(%x: f32[2]) {\n  %y = exp\n  return\n}", "2:3", "`exp` has 0 operands", ""),
    ("graph @g(%x: f32[2]) {\n  exp %x\n  return\n}", "2:3", "`exp` has 1 results", ""),
    ("graph @g(%x: f32[2]) {\n  %y = exp %x axis=1\n  return\n}", "2:8", "`exp` has no attribute `axis`", ""),
    ("graph @g(%x: f32[2]) {\n  %y = cumsum %x axis=0\n  return\n}", "2:8", "`cumsum` misses its attribute `reverse`", ""),
    ("graph @g(%x: f32[2]) {\n  %y = cumsum %x axis=0 axis=0 reverse=true\n  return\n}", "2:8", "`cumsum` has its attribute `axis` twice", ""),
    ("graph @g(%x: f32[2]) {\n  %y = cumsum %x axis=one reverse=true\n  return\n}", "2:8", "`one` is no usize", ""),
    ("graph @g(%x: f32[2]) {\n  %y = cumsum %x axis=1 reverse=true\n  return\n}", "2:3", "f32[2] has no dim 1", ""),
    ("graph @g(%x: f32[2]) {\n  %y = exp %x : f32[3]\n  return\n}", "2:3", "`exp` gives f32[2], but f32[3] stands here", ""),
    ("graph @g(%x: f32[2], %i: i32[2]) {\n  %y = add %x, %i\n  return\n}", "2:3", "found f32[2], expected i32[2]", ""),
    ("graph @g(%x: f32[2]) {\n  %y = exp %x forwards\n  return\n}", "2:15", "found `forwards`, expected the end of the line", ""),
    ("graph @g(%x: f32[2]) {\n  %y = exp %x layer three\n  return\n}", "2:26", "a layer is `name/number`", ""),
    ("graph @g(%x: f32[2]) {\n  write @w %x\n  return\n}", "2:10", "no param or state is called `w`", ""),
    ("graph @g(%x: f32[2]) {\n  return y=%z\n}", "2:12", "`%z` is not defined before its use", ""),
    ("stage {\"name\": 3}", "1:16", "expected a string", ""),
    ("stage {\"nam\": \"sft\"}", "1:12", "unknown field `nam`", ""),
];

#[test]
fn what_cannot_be_read_is_an_error_at_its_place() {
    let mut wrong = Vec::new();
    for (text, place, message, help) in ERRORS {
        let found = match parse(text) {
            Ok(_) => "no error".to_string(),
            Err(error) => {
                let span = error.labels[0].span;
                let (found, helps) = (format!("{}:{}", span.line, span.column), error.help.join("; "));
                if found == *place && error.message.contains(message) && helps.contains(help) {
                    continue;
                }
                format!("{found} {} ({helps})", error.message)
            }
        };
        wrong.push(format!("found {found}\nexpected {place} {message} ({help}) for\n{text}\n"));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_name_of_one_value_is_that_among_all() {
    let text =
        "graph @g(%x: f32[2], %y: f32[2]) {\n  %2 = exp %x\n  %3 = exp %x\n  %4 = exp %x\n  %5 = exp %x\n  return\n}";
    for names in [["x", "x", "y", ""], ["y.3", "y", "", "y"], ["7", "x.5", "x", "x"], ["a", "b", "a", "a.4"]] {
        let mut program = parse(text).expect("it is read");
        let graph = &mut program.graphs[0];
        (2..).zip(names).filter(|(_, name)| !name.is_empty()).for_each(|(v, name)| graph.set_name(Value(v), name));
        let all = value_names(graph);
        for value in graph.values() {
            assert_eq!(value_name(graph, value), all[value.0 as usize], "{names:?}");
        }
    }
}

#[test]
fn mangled_texts_are_errors_or_other_programs() {
    let mut rng = Rng::new(5);
    for seed in 0..40 {
        let text = random_program(seed, 12).to_string();
        for _ in 0..60 {
            let mut bytes = text.clone().into_bytes();
            match rng.below(3) {
                0 => bytes.truncate(rng.below(text.len())),
                1 => drop(bytes.remove(rng.below(text.len()))),
                _ => {
                    let at = rng.below(text.len());
                    bytes[at] = rng.choose(b" %@=[]{}:,+-*.0x\n");
                }
            }
            let Ok(mangled) = String::from_utf8(bytes) else { continue };
            match parse(&mangled) {
                Err(error) => assert!(error.labels[0].span.is_some(), "no place for `{error}` in\n{mangled}"),
                Ok(program) => {
                    let printed = program.to_string();
                    let read = parse(&printed).unwrap_or_else(|e| panic!("{e} in\n{printed}\nread from\n{mangled}"));
                    assert_eq!(read.to_string(), printed, "read from\n{mangled}");
                }
            }
        }
    }
}
