//! Passes on programs in text: `tests/filetests/<pass>/<what-is-shown>.dsg`.
//!
//! A file begins with comments, one of which is `; passes: infer, canonicalize`. Then comes the program, then the line
//! `; result`, then what the passes make of it: a program, or the messages of a refusal. Run with `BLESS=1` to write
//! results anew. After every pass the program is verified, read back and, for exact passes, run beside the one before.

use std::fs;
use std::path::{Path, PathBuf};

use dsgc_ir::diag::{Diag, Sources};
use dsgc_ir::verify::verify;
use dsgc_ir::{Program, parse};
use dsgc_passes::{PIPELINE, Pass};

mod common;

const RESULT: &str = "; result\n";

/// A pass of the pipeline.
fn pass_named(name: &str) -> &'static Pass {
    PIPELINE.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no pass is called `{name}`"))
}

/// What the passes named in a file make of its program.
fn result(text: &str, folder: &str) -> String {
    let (_, names) = text.split_once("; passes: ").expect("a comment names the passes");
    let names: Vec<&str> = names.lines().next().unwrap_or("").split(',').map(str::trim).collect();
    assert!(names.contains(&folder), "the file is in the folder `{folder}` and does not show that pass");
    let mut program = parse(text).unwrap_or_else(|e| panic!("{e}"));
    verify(&program).unwrap_or_else(|fault| panic!("{fault}"));
    for name in names {
        match common::run(pass_named(name), &program) {
            Ok(next) => program = next,
            Err(errors) => return errors.iter().flat_map(|e| comment(e, &program)).collect(),
        }
    }
    program.to_string()
}

/// A message as comment lines.
fn comment(diag: &Diag, program: &Program) -> Vec<String> {
    let mut sources = Sources::default();
    for name in &program.sources {
        sources.add(name, "");
    }
    diag.plain(&sources).lines().map(|line| format!("; {line}\n")).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry of the folder").path()).collect();
    all.sort();
    all
}

#[test]
fn passes_make_what_the_files_say() {
    let bless = std::env::var_os("BLESS").is_some();
    let mut wrong = Vec::new();
    let folders = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests"));
    for path in folders.iter().flat_map(|folder| files(folder)) {
        let shown = path.display();
        let folder = path.parent().and_then(Path::file_name).and_then(|n| n.to_str()).expect("a folder of a pass");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{shown}: {e}"));
        let (input, expected) = text.split_once(RESULT).unwrap_or((&text, ""));
        eprintln!("{shown}");
        let found = result(input, folder);
        if found == expected {
            continue;
        }
        if bless {
            let text = format!("{}\n\n{RESULT}{found}", input.trim_end());
            fs::write(&path, text).unwrap_or_else(|e| panic!("{shown}: {e}"));
        } else {
            wrong.push(format!("{shown}\nfound:\n{found}\nexpected:\n{expected}"));
        }
    }
    assert!(wrong.is_empty(), "{} files differ:\n{}", wrong.len(), wrong.join("\n"));
}
