//! Documents from the library or from text, and the programs they become.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Sources};
use dsgc_ir::{DimRange, Program};
use dsgc_yaml::document::{Document, parse};
use dsgc_yaml::functions::Functions;
use dsgc_yaml::library;
use dsgc_yaml::literal::Constant;
use dsgc_yaml::lower::{self, Entry, Request, Role, TokenIds, Trunk};
use dsgc_yaml::model::Model;
use dsgc_yaml::recipe::Recipe;

/// Documents with their places.
#[derive(Default)]
pub struct Documents {
    pub sources: Sources,
}

impl Documents {
    pub fn read(&mut self, name: &str, text: &str) -> Document {
        parse(&mut self.sources, name, text).unwrap_or_else(|errors| {
            let all: Vec<String> = errors.iter().map(|d| d.plain(&self.sources)).collect();
            panic!("{}", all.join("\n"))
        })
    }

    fn library(&mut self, kind: &str, name: &str) -> Document {
        let entry = library::find(kind, name).expect("the library has it");
        self.read(&entry.file(), entry.text)
    }

    pub fn std_model(&mut self, name: &str) -> Model {
        let Document::Model(model) = self.library("models", name) else { panic!("{name} is no model") };
        *model
    }

    pub fn std_recipe(&mut self, name: &str) -> Recipe {
        let Document::Recipe(recipe) = self.library("recipes", name) else { panic!("{name} is no recipe") };
        *recipe
    }

    pub fn std_functions(&mut self) -> Functions {
        let Document::Functions(functions) = self.library("functions", "sequences") else { panic!("no functions") };
        functions
    }
}

/// A value for every declared name: the given ones as text, and defaults.
pub fn values(declared: &[dsgc_yaml::graph::Declaration], given: &[(&str, Constant)]) -> BTreeMap<String, Constant> {
    let of = |name: &str| given.iter().find(|(n, _)| *n == name).map(|(_, v)| v.clone());
    let all = declared.iter().map(|d| {
        let default = || d.default.clone().map(|l| l.value);
        let value = of(&d.name.text).or_else(default).unwrap_or_else(|| panic!("no `{}`", d.name.text));
        (d.name.text.clone(), value)
    });
    all.collect()
}

/// Ranges of dims, from 1.
pub fn dims(all: &[(&str, i64)]) -> Vec<DimRange> {
    all.iter().map(|&(symbol, max)| DimRange { symbol: symbol.into(), min: 1, max }).collect()
}

pub const IDS: TokenIds = TokenIds { pad: Some(2), eos: Some(2), bos: None };

/// The config of the tiny OPT of rlhf.md 17.6.
pub fn tiny() -> Vec<(&'static str, Constant)> {
    let sizes =
        [("vocab", 24), ("hidden", 16), ("layers", 2), ("heads", 2), ("ffn", 32), ("max_positions", 32), ("embed", 16)];
    sizes.map(|(name, n)| (name, Constant::Int(n))).into()
}

/// A model in a role.
pub fn role<'a>(
    name: &'a str,
    model: &'a Model,
    functions: &'a Functions,
    config: &[(&str, Constant)],
    trained: bool,
) -> Role<'a> {
    let config = values(&model.config, config);
    Role { name, model, functions: vec![functions], config, trained, trunk: None }
}

/// A model in a role that is built upon the tiny OPT or another one.
pub fn role_over<'a>(
    name: &'a str,
    head: &'a Model,
    (model, config): (&'a Model, &[(&str, Constant)]),
    functions: &'a Functions,
) -> Role<'a> {
    let config = values(&model.config, config);
    let trunk = Trunk { name: &head.models[0].name.text, model, functions: vec![functions], config };
    Role { trunk: Some(trunk), ..role(name, head, functions, &[], true) }
}

/// What graphs are lowered from: these roles, and the graph `loss` of a recipe.
pub fn request<'a>(recipe: &'a Recipe, functions: &'a Functions, roles: Vec<Role<'a>>) -> Request<'a> {
    Request {
        recipe,
        functions: vec![functions],
        roles,
        options: values(&recipe.options, &[]),
        ids: IDS,
        entries: vec![Entry { graph: "loss".into(), dims: dims(&[("B", 8), ("T", 16)]) }],
        states: recipe.state.clone(),
        sets: Vec::new(),
        averages: Vec::new(),
    }
}

/// One model in the role `model`, and the graph `loss` of a recipe.
pub fn lower(
    recipe: &Recipe,
    functions: &Functions,
    model: &Model,
    config: &[(&str, Constant)],
) -> Result<Program, Vec<Diag>> {
    let role = role("model", model, functions, config, true);
    lower::program(&request(recipe, functions, vec![role])).map(|lowered| lowered.program)
}
