//! Tests that stand in documents.

use dsgc_ir::Tensor;
use dsgc_ir::verify::verify;
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_yaml::document::Document;
use dsgc_yaml::lower::{BUILTINS, DocumentTest, document_tests};
use dsgc_yaml::render::{Look, render};

use crate::setup::Documents;

/// The largest difference of one expected value, with its name, if it is beyond the tolerance.
fn wrong(test: &DocumentTest) -> Option<String> {
    verify(&test.program).unwrap_or_else(|e| panic!("{e}\n{}", test.program));
    let mut interp = Interp::new(test.program.clone(), Precision::F64);
    let inputs: Vec<(&str, &Tensor)> = test.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = interp.run(&test.graph, &inputs).unwrap_or_else(|e| panic!("{e}"));
    for ((name, expected), (_, found)) in test.expect.iter().zip(&outputs) {
        let far = |(a, b): (f64, f64)| (a - b).abs() > test.tolerance || a.is_nan() != b.is_nan();
        if expected.shape != found.shape || expected.to_f64().into_iter().zip(found.to_f64()).any(far) {
            return Some(format!("{name} of {}: found {found:?}, expected {expected:?}", test.name));
        }
    }
    None
}

#[test]
fn the_library_passes_its_tests() {
    let mut documents = Documents::default();
    let (recipe, functions) = (documents.std_recipe("sft"), documents.std_functions());
    let own = document_tests(&functions.tests, &[], &functions.graphs, &[&functions]);
    let sft = document_tests(&recipe.tests, &recipe.options, &recipe.graphs, &[&functions]);
    let (own, sft) = (own.unwrap_or_else(|e| panic!("{e:#?}")), sft.unwrap_or_else(|e| panic!("{e:#?}")));
    assert!(own.len() >= functions.graphs.len() && !sft.is_empty());
    let all: Vec<String> = own.iter().chain(&sft).filter_map(wrong).collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

/// Every builtin with numbers, as `dsgc check` runs them.
#[test]
fn builtins_compute_what_they_say() {
    let text = include_str!("builtins.yaml");
    let mut documents = Documents::default();
    let Document::Functions(functions) = documents.read("builtins.yaml", text) else { panic!("no functions") };
    let std = documents.std_functions();
    let tests = document_tests(&functions.tests, &[], &functions.graphs, &[&functions, &std]);
    let tests = tests.unwrap_or_else(|e| panic!("{}", render(&e, &documents.sources, Look::Plain)));
    let wrong: Vec<String> = tests.iter().filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Dropout belongs into a model, which these graphs are not: tests/adapt of the whole program has one.
    for builtin in BUILTINS.iter().filter(|builtin| builtin.name != "dropout") {
        assert!(text.contains(&format!("{}(", builtin.name)), "no test calls `{}`", builtin.name);
    }
}

/// The losses of RLHF are expressions of the language, and give DeepSpeed-Chat's numbers.
#[test]
fn losses_of_rlhf_have_their_golden_values() {
    let mut documents = Documents::default();
    let Document::Recipe(recipe) = documents.read("rlhf.yaml", include_str!("rlhf.yaml")) else { panic!("no recipe") };
    let std = documents.std_functions();
    let tests = document_tests(&recipe.tests, &recipe.options, &recipe.graphs, &[&std]);
    let tests = tests.unwrap_or_else(|e| panic!("{}", render(&e, &documents.sources, Look::Plain)));
    let wrong: Vec<String> = tests.iter().filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A function of the user's wins over a builtin, but not inside of the library's functions.
#[test]
fn own_functions_win_in_own_files_only() {
    const MINE: &str = "\
functions: mine
graphs:
  sum:
    in: {x: \"f[B]\"}
    out: x + 1
  picked:
    in: {x: \"f[B, T]\", i: \"i32[B]\"}
    out: sum(pick(x, i))
tests:
  - graph: picked
    given: {x: [[1.0, 2.0], [3.0, 4.0]], i: [1, 0]}
    expect: {out: [3, 4]}
";
    let mut documents = Documents::default();
    let Document::Functions(mine) = documents.read("mine.yaml", MINE) else { panic!("no functions") };
    let std = documents.std_functions();
    let tests = document_tests(&mine.tests, &[], &mine.graphs, &[&mine, &std]);
    let tests = tests.unwrap_or_else(|e| panic!("{}", render(&e, &documents.sources, Look::Plain)));
    assert_eq!(tests.iter().filter_map(wrong).collect::<Vec<_>>(), [] as [String; 0]);
}
