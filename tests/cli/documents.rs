//! `check`, `std` and `opt`.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use super::{Workplace, example, has};

#[test]
fn the_library_can_be_listed_and_every_document_shown() {
    let place = Workplace::new();
    let list = place.out(&["std", "list"]);
    for name in ["functions/sequences", "models/opt", "recipes/sft"] {
        assert!(list.lines().any(|line| line == name), "{name} in\n{list}");
    }
    for name in list.lines() {
        let text = place.out(&["std", "show", name]);
        let file = format!("{}.yaml", name.replace('/', "."));
        place.write(&file, &text);
        has(&place.run(&["check", &file]).out, &[&file, ": no errors"]);
    }
    assert_eq!(place.out(&["std", "show", "opt"]), place.out(&["std", "show", "models/opt"]));
}

#[test]
fn an_unknown_document_has_a_nearest_one() {
    let place = Workplace::new();
    has(&place.refused(&["std", "show", "optt"]), &["error", "`optt`", "did you mean `opt`?"]);
    has(&place.refused(&["std", "show", "zzzzzzzz"]), &["`zzzzzzzz`", "dsgc std list"]);
}

#[test]
fn a_reader_that_stops_ends_the_program_quietly() {
    let place = Workplace::new();
    let mut command = place.command(&["std", "show", "opt"]);
    // More lines than a pipe holds are not needed: the reader is gone before the program writes.
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
    assert_eq!((child.wait().expect("it ends").code(), err.as_str()), (Some(0), ""));

    // The same holds for messages.
    let mut child =
        place.command(&["check", "absent.yaml"]).stderr(Stdio::piped()).spawn().expect("the program starts");
    drop(child.stderr.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(1));

    let mut child = place.command(&["std", "list"]).stdout(Stdio::piped()).spawn().expect("the program starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "after `{line}`");
}

#[test]
fn a_pipeline_is_checked() {
    let place = Workplace::new();
    has(&place.out(&["check", "pipeline.yaml"]), &["pipeline.yaml: no errors", "stages: sft, more"]);
}

#[test]
fn the_examples_are_right() {
    let place = Workplace::new();
    place.write(
        "gsm8k.jsonl",
        "{\"prompt\": \"Question: 1 + 1?\", \"chosen\": \" 2\", \"rejected\": \" 3\"}\n".repeat(20).as_str(),
    );
    let examples = fs::read_dir(example(".")).expect("the examples");
    let mut names: Vec<String> =
        examples.map(|e| e.expect("an example").file_name().into_string().expect("text")).collect();
    names.sort();
    assert!(names.len() >= 2, "{names:?}");
    let rows = format!("data.pairs.path={}", place.path("gsm8k.jsonl").display());
    for name in names {
        let file = example(&name).join("pipeline.yaml").display().to_string();
        let mut args = vec!["check", &file];
        if name == "gsm8k" {
            args.extend(["--set", &rows, "--set", "data.pairs.eval=0.1"]);
        }
        has(&place.out(&args), &[&file, ": no errors", "stages: sft"]);
    }
}

#[test]
fn what_check_resolves_is_a_pipeline_that_means_the_same() {
    let place = Workplace::new();
    let resolved = place.out(&["check", "pipeline.yaml", "--resolved"]);
    has(&resolved, &["adam_eps: 1e-8", "# default", "learning_rate: 1e-3", "# pipeline.yaml:"]);
    place.write("resolved.yaml", &resolved);
    for emit in ["plan", "memory"] {
        let of = |file| place.out(&["compile", file, "--emit", emit, "--json"]);
        let without_places = |text: String| {
            // Where the user wrote the path of the rows differs; what is trained does not.
            let mut all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            for stage in all.as_array_mut().into_iter().flatten().filter(|_| emit == "plan") {
                for source in stage["sources"].as_array_mut().into_iter().flatten() {
                    source["span"].take();
                }
            }
            all
        };
        assert_eq!(without_places(of("resolved.yaml")), without_places(of("pipeline.yaml")), "{emit}");
    }
}

#[test]
fn mistakes_come_with_their_place() {
    let place = Workplace::new();
    place.write("bad.yaml", &place.read("pipeline.yaml").replace("batch_size: 4", "batch_syze: 4"));
    has(
        &place.refused(&["check", "bad.yaml"]),
        &["error: unknown key `batch_syze`", "--> bad.yaml:25:5", "batch_size"],
    );
    place.write("broken.yaml", "dsgc: 1\nmodels: [\n");
    has(&place.refused(&["check", "broken.yaml"]), &["error", "--> broken.yaml:"]);
    has(&place.refused(&["check", "absent.yaml"]), &["error: cannot read `absent.yaml`"]);
    let set = ["check", "pipeline.yaml", "--set", "stages.sft.learning_rat=1"];
    has(&place.refused(&set), &["unknown key `learning_rat`", "--> --set:1:12", "learning_rate"]);
    fs::remove_file(place.path("rows.jsonl")).expect("it was there");
    has(&place.refused(&["check", "pipeline.yaml"]), &["rows.jsonl", "--> pipeline.yaml:10:"]);
}

#[test]
fn a_failing_test_of_a_document_says_what_it_found() {
    let place = Workplace::new();
    let functions = place.out(&["std", "show", "functions/sequences"]);
    let (before, after) = functions.split_once("expect:").expect("the library tests its functions");
    let number = after.find(|c: char| c.is_ascii_digit()).expect("a number is expected");
    place.write("wrong.yaml", &format!("{before}expect:{}7{}", &after[..number], &after[number..]));
    let ended = place.run(&["check", "wrong.yaml"]);
    assert_eq!(ended.code, Some(1));
    has(&ended.err, &["error: found", "expected 7", "--> wrong.yaml:", "in this test"]);
}

const PROGRAM: &str = "\
graph @g(%x: f32[2]) {
  %a = neg %x
  %b = neg %a
  %y = neg %b
  return y=%y
}
";

#[test]
fn passes_run_on_programs_in_text() {
    let place = Workplace::new();
    place.write("g.dsg", PROGRAM);
    let once = place.out(&["opt", "g.dsg", "--passes", "infer,canonicalize"]);
    assert_eq!(once, "level logical\n\ngraph @g(%x: f32[2]) {\n  %a = neg %x : f32[2]\n  return y=%a\n}\n");
    place.write("once.dsg", &once);
    assert_eq!(place.out(&["opt", "once.dsg", "--passes", "infer,canonicalize"]), once);
    for device in ["cpu", "interp"] {
        let planned = place.out(&["opt", "g.dsg", "--passes", "infer,adapt,autodiff,plan_memory", "--device", device]);
        has(&planned, &["level planned", "arena", "graph @g"]);
    }
}

#[test]
fn opt_says_what_it_changed_and_why() {
    let place = Workplace::new();
    place.write(
        "g.dsg",
        "graph @g(%x: f32[64, 64]) {\n  %a = log %x\n  %b = neg %a\n  %c = sub %x, %b\n  %d = sub %x, %x\n  return c=%c, d=%d\n}\n",
    );
    let opt = |more: &[&str]| place.out(&[&["opt", "g.dsg", "--passes", "infer,simplify"], more].concat());
    has(&opt(&["--explain"]), &["@g forward", "%c = sub %x, %b  =>  add %x, %a   by subtract negated"]);
    assert!(!opt(&["--explain"]).contains("%d"), "rules that are not exact are off");
    has(&opt(&[]), &["%c = add %x, %a", "%d = sub %x, %x"]);
    let finite = opt(&["--numerics", "finite", "--explain"]);
    has(
        &finite,
        &["%d = sub %x, %x  =>  broadcast (const value=0.0 dtype=f32) shape=[64, 64]", "by difference of equals"],
    );
}

#[test]
fn opt_refuses_what_it_cannot_do() {
    let place = Workplace::new();
    place.write("g.dsg", PROGRAM);
    has(&place.refused(&["opt", "g.dsg", "--passes", "canonicalise"]), &["`canonicalise`", "canonicalize"]);
    has(&place.refused(&["opt", "g.dsg", "--passes", ""]), &["error"]);
    has(&place.refused(&["opt", "g.dsg"]), &["--passes"]);
    has(&place.refused(&["opt", "g.dsg", "--passes", "canonicalize"]), &["`canonicalize`", "run `infer` before it"]);
    // A planned program has all its addresses: no pass that changes ops may follow.
    let late = ["opt", "g.dsg", "--passes", "infer,adapt,autodiff,plan_memory,canonicalize"];
    has(&place.refused(&late), &["error: `canonicalize` cannot run here", "planned"]);
    place.write("planned.dsg", &place.out(&["opt", "g.dsg", "--passes", "infer,adapt,autodiff,plan_memory"]));
    has(&place.refused(&["opt", "planned.dsg", "--passes", "infer"]), &["error: `infer` cannot run here", "planned"]);
    has(&place.refused(&["opt", "absent.dsg", "--passes", "infer"]), &["cannot read `absent.dsg`"]);
    has(&place.refused(&["opt", "pipeline.yaml", "--passes", "infer"]), &["error", "--> pipeline.yaml:1:1"]);
    place.write("bad.dsg", &PROGRAM.replace("neg %a", "neg %z"));
    has(&place.refused(&["opt", "bad.dsg", "--passes", "infer"]), &["`%z`", "--> bad.dsg:3:"]);
}
