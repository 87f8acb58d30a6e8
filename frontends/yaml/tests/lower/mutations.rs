//! Documents with random changes: whatever is in a file, nothing panics, and every error points into a file.

use dsgc_ir::Program;
use dsgc_ir::diag::Diag;
use dsgc_ir::verify::verify;
use dsgc_yaml::document::{Document, parse};
use dsgc_yaml::functions::Functions;
use dsgc_yaml::graph::{Declaration, Graph, Test};
use dsgc_yaml::library;
use dsgc_yaml::literal::Constant;
use dsgc_yaml::lower::{self, document_tests};

use crate::heads::{HEAD, SCORES};
use crate::setup::{Documents, lower, request, role_over, tiny};

/// Numbers that look random (Knuth's MMIX generator).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Runs of letters and digits, and single other characters.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut in_word = false;
    for c in text.chars() {
        let word = c.is_alphanumeric() || c == '_';
        match tokens.last_mut() {
            Some(last) if word && in_word => last.push(c),
            _ => tokens.push(c.to_string()),
        }
        in_word = word;
    }
    tokens
}

const INTERESTING: [&str; 20] = [
    "0",
    "-1",
    "1",
    "2147483648",
    "9223372036854775807",
    "0.5",
    "1e308",
    "none",
    "true",
    "T",
    "B",
    "N",
    "x",
    "[]",
    "[:, None]",
    "[0]",
    "concat",
    "mean",
    "not ",
    "\"a\"",
];

/// One to three tokens replaced by others of the text or by values at the edges; line breaks stay.
fn mutate(text: &str, random: &mut Random) -> String {
    let mut tokens = tokens(text);
    for _ in 0..=random.below(3) {
        let (at, other) = (random.below(tokens.len()), random.below(tokens.len()));
        if tokens[at] == "\n" || tokens[other] == "\n" {
            continue;
        }
        tokens[at] = match random.below(4) {
            0 => String::new(),
            1 => INTERESTING[random.below(INTERESTING.len())].into(),
            _ => tokens[other].clone(),
        };
    }
    tokens.concat()
}

fn sound(program: &Program) {
    verify(program).unwrap_or_else(|fault| panic!("{fault}"));
}

/// What is said about a document, if it can be lowered without values that it does not have.
fn lowered(documents: &mut Documents, document: &Document) -> Option<Result<(), Vec<Diag>>> {
    let (functions, sft) = (documents.std_functions(), documents.std_recipe("sft"));
    let given = |declared: &[Declaration], values: &[(&str, Constant)]| {
        declared.iter().all(|d| d.default.is_some() || values.iter().any(|(name, _)| *name == d.name.text))
    };
    let tests = |tests: &[Test], options: &[Declaration], graphs: &[Graph], functions: &[&Functions]| {
        document_tests(tests, options, graphs, functions).map(|all| all.iter().for_each(|t| sound(&t.program)))
    };
    match document {
        Document::Model(model) => {
            let known = |(name, _): &(&str, Constant)| model.config.iter().any(|d| d.name.text == *name);
            let config: Vec<_> = tiny().into_iter().filter(known).collect();
            let model = given(&model.config, &config).then_some(model)?;
            if model.models.is_empty() {
                return Some(lower(&sft, &functions, model, &config).map(|program| sound(&program)));
            }
            let opt = documents.std_model("opt");
            let Document::Recipe(scores) = documents.read("scores.yaml", SCORES) else { panic!("no recipe") };
            let role = role_over("critic", model, (&opt, &tiny()), &functions);
            let lowered = lower::program(&request(&scores, &functions, vec![role]));
            Some(lowered.map(|lowered| sound(&lowered.program)))
        }
        Document::Recipe(recipe) => {
            let recipe = given(&recipe.options, &[]).then_some(recipe)?;
            let tested = tests(&recipe.tests, &recipe.options, &recipe.graphs, &[&functions]);
            if !recipe.graphs.iter().any(|g| g.name.text == "loss") {
                return Some(tested);
            }
            let program = lower(recipe, &functions, &documents.std_model("opt"), &tiny());
            Some(program.map(|program| sound(&program)).and(tested))
        }
        Document::Functions(own) => Some(tests(&own.tests, &[], &own.graphs, &[own, &functions])),
        Document::Pipeline(_) => None,
    }
}

#[test]
fn no_document_makes_us_panic() {
    let std = |kind, name| library::find(kind, name).expect("the library has it").text;
    let texts = [
        std("models", "opt"),
        HEAD,
        std("recipes", "sft"),
        std("functions", "sequences"),
        include_str!("rlhf.yaml"),
        include_str!("builtins.yaml"),
    ];
    let mut random = Random(17);
    let (mut right, mut wrong) = (0, 0);
    for text in std::iter::repeat_n(texts, ROUNDS).flatten() {
        let text = mutate(text, &mut random);
        let mut documents = Documents::default();
        let Ok(document) = parse(&mut documents.sources, "mutated.yaml", &text) else { continue };
        match lowered(&mut documents, &document) {
            None => {}
            Some(Ok(())) => right += 1,
            Some(Err(diags)) => {
                wrong += 1;
                assert!(!diags.is_empty(), "an error without a message:\n{text}");
                let files = documents.sources.names().count();
                for diag in diags {
                    let placed = diag.labels.iter().all(|l| (l.span.source as usize) < files);
                    assert!(placed && !diag.labels.is_empty(), "{diag}\n{text}");
                }
            }
        }
    }
    assert!(right > ROUNDS / 4 && wrong > ROUNDS / 4, "{right} right and {wrong} wrong ones");
}

/// Rounds over all texts; thousands have been run, these take a second.
const ROUNDS: usize = 60;
