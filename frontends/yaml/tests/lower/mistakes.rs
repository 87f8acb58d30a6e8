//! Recipes in `mistakes/`, each with a mistake in its graph `loss`, models and tests with mistakes, and what is said
//! about them (`.expect`).
//!
//! `BLESS=1 cargo test -p dsgc-yaml --test lower` writes what is said.

use std::path::Path;

use dsgc_yaml::document::Document;
use dsgc_yaml::literal::Constant;
use dsgc_yaml::lower::document_tests;
use dsgc_yaml::model::Model;
use dsgc_yaml::recipe::Recipe;
use dsgc_yaml::render::{Look, render};

use crate::setup::{Documents, lower, tiny};

#[test]
fn mistakes_are_told() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lower/mistakes");
    let bless = std::env::var_os("BLESS").is_some();
    let mut wrong = Vec::new();
    let mut seen = 0;
    let entries = std::fs::read_dir(&folder).expect("the folder is there");
    let mut files: Vec<_> = entries.map(|e| e.expect("it can be read").path()).collect();
    files.sort();
    for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "yaml")) {
        seen += 1;
        let mut documents = Documents::default();
        let text = std::fs::read_to_string(file).expect("it can be read");
        let (functions, sft) = (documents.std_functions(), documents.std_recipe("sft"));
        let lowered = |recipe: &Recipe, model: &Model, config: &[(&'static str, Constant)]| {
            lower(recipe, &functions, model, config).map(|_| ())
        };
        let said = match documents.read("mine.yaml", &text) {
            Document::Recipe(recipe) => {
                let recipe = Recipe { options: sft.options, ..*recipe };
                lowered(&recipe, &documents.std_model("opt"), &tiny())
            }
            Document::Model(model) => lowered(&sft, &model, &[]),
            Document::Functions(own) => document_tests(&own.tests, &[], &own.graphs, &[&own, &functions]).map(|_| ()),
            Document::Pipeline(_) => panic!("{}", file.display()),
        };
        let said = match said {
            Ok(()) => "nothing is wrong\n".into(),
            Err(diags) => render(&diags, &documents.sources, Look::Plain) + "\n",
        };
        let expect = file.with_extension("expect");
        if bless {
            std::fs::write(&expect, &said).expect("it can be written");
        } else if std::fs::read_to_string(&expect).unwrap_or_default() != said {
            wrong.push(format!("{}:\n{said}", file.display()));
        }
    }
    assert!(seen > 20, "{seen} files in {}", folder.display());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
