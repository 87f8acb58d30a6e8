//! What users are told: each file of `diagnostics/` beside the messages it gives, word for word.
//!
//! Lines `# --set a.b=c` at the top of a file are arguments. `BLESS=1 cargo test -p dsgc-yaml --test diagnostics` writes
//! the messages anew; they are to be read as a user would read them.

mod common;

use std::path::Path;

use common::machine;
use dsgc_yaml::load::{Options, check};
use dsgc_yaml::render::{Look, render};

#[test]
fn messages_are_as_blessed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/diagnostics");
    let bless = std::env::var_os("BLESS").is_some();
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "yaml"));
    files.sort();
    assert!(files.len() >= 25, "only {} files in {}", files.len(), folder.display());
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let sets = text.lines().map_while(|line| line.strip_prefix("# --set ")).map(str::to_owned).collect();
        let machine = machine().with(&name, &text);
        let (diags, sources) = match check(Path::new(&name), &Options { sets, ..Options::default() }, &machine) {
            Ok(loaded) => (loaded.warnings, loaded.sources),
            Err(failed) => (failed.diags, failed.sources),
        };
        let found = render(&diags, &sources, Look::Plain) + "\n";
        let expect = file.with_extension("expect");
        if bless {
            std::fs::write(&expect, &found).unwrap();
        }
        let expected = std::fs::read_to_string(&expect).unwrap_or_default();
        if found != expected || found.trim().is_empty() {
            wrong.push(format!("{name}\nfound:\n{found}\nexpected:\n{expected}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
