//! `model:` documents: an architecture, its parameters under their Hugging Face names, and how files map to it.

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::TensorRules;

use crate::expr::{Expr, Word};
use crate::graph::{DECLARATION, Declaration, GRAPH, Graph, ROLE, RoleDecl, TEST, Test};
use crate::literal::Literal;
use crate::node::{Node, Value};
use crate::reader::Reader;
use crate::schema::{Form, Table, key};
use crate::text::Text;

/// A model document.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its name.
    pub name: Word,
    /// What it is.
    pub doc: Option<Word>,
    /// Files of functions it uses besides the library's.
    pub uses: Vec<Word>,
    /// Its sizes and switches.
    pub config: Vec<Declaration>,
    /// Sizes with which it can be tried.
    pub small: Vec<(Word, Literal)>,
    /// Initial values of parameters that name none.
    pub init: Option<Expr>,
    /// Models it is built upon.
    pub models: Vec<RoleDecl>,
    /// Parameters outside of blocks.
    pub params: Vec<Param>,
    /// Parts that `repeat` calls.
    pub blocks: Vec<Block>,
    /// The forward pass.
    pub graph: Graph,
    /// How Hugging Face's files map to it.
    pub from_hf: Option<FromHf>,
    /// Given and expected values.
    pub tests: Vec<Test>,
}

/// A parameter.
#[derive(Clone, Debug)]
pub struct Param {
    /// Hugging Face's name; in a block, relative to the layer.
    pub name: Word,
    /// An expression per dimension.
    pub shape: Vec<Expr>,
    /// Initial values.
    pub init: Option<Expr>,
    /// Whether it exists.
    pub when: Option<Expr>,
}

/// A part of a model with parameters of its own.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its parameters, with relative names.
    pub params: Vec<Param>,
    /// What it computes; its name is the block's.
    pub graph: Graph,
}

/// How `config.json` and tensor files map to a model.
#[derive(Clone, Debug)]
pub struct FromHf {
    /// Values of `architectures` that this model reads.
    pub architectures: Vec<Word>,
    /// Config entries as expressions over `config.json`.
    pub config: Vec<(Word, ConfigRule)>,
    /// Values that `config.json` must have where it has them.
    pub require: Vec<(Word, Literal)>,
    /// Exceptions of names and layouts.
    pub tensors: TensorRules,
    /// For a model over a model: what its architecture is called after the trunk's family.
    pub suffix: Option<Word>,
}

/// Where a config entry comes from.
#[derive(Clone, Debug)]
pub struct ConfigRule {
    /// An expression over `config.json`.
    pub from: Expr,
    /// Their name -> ours, where they differ; another name is an error.
    pub names: Option<Vec<(Word, Word)>>,
}

const SHAPE: Form = Form::List(&Form::Expr);
const PARAMS: Form = Form::Map(&Form::Either(&[Form::Keys(&PARAM), SHAPE]));

/// Keys of a model document.
pub const MODEL: Table = Table {
    what: "a model",
    keys: &[
        key("model", Form::Name, "its name"),
        key("doc", Form::Text, "what it is"),
        key("use", Form::List(&Form::Text), "files of functions, besides the library's"),
        key(
            "config",
            Form::Map(&Form::Either(&[Form::Keys(&DECLARATION), Form::Literal])),
            "sizes and switches: `name: int` is required, `name: 32` has a default",
        ),
        key(
            "small",
            Form::Map(&Form::Literal),
            "config entries with which the model can be tried, by `dsgc check` and `dsgc run --smoke`",
        ),
        key("init", Form::Expr, "initial values of parameters that name none"),
        key("models", Form::Map(&Form::Either(&[Form::Keys(&ROLE), Form::Name])), "models it is built upon"),
        key("params", PARAMS, "parameters under their Hugging Face names"),
        key("blocks", Form::Map(&Form::Keys(&BLOCK)), "parts that `repeat` calls, with relative parameter names"),
        key("graph", Form::Keys(&GRAPH), "the forward pass"),
        key("from_hf", Form::Keys(&FROM_HF), "how Hugging Face's files map to it"),
        key("tests", Form::List(&Form::Keys(&TEST)), "given and expected values, run by `dsgc check`"),
    ],
};

/// Keys of a parameter in its long form.
pub const PARAM: Table = Table {
    what: "a parameter",
    keys: &[
        key("shape", SHAPE, "an expression per dimension"),
        key("init", Form::Expr, "initial values: `zeros`, `ones`, `normal(std)`"),
        key("when", Form::Expr, "whether it exists; decided when the file is read"),
    ],
};

/// Keys of a block: those of a graph, and parameters.
pub const BLOCK: Table = Table {
    what: "a block",
    keys: &[
        key("doc", Form::Text, "what it computes"),
        key("params", PARAMS, "parameters, with names relative to the layer"),
        key("in", Form::Map(&Form::Expr), "inputs and their types"),
        key("dims", Form::Map(&Form::Expr), "dims that follow from those of the inputs"),
        key("let", Form::List(&Form::Map(&Form::Expr)), "values in order: `- name: expression`"),
        key("assert", Form::List(&Form::Map(&Form::Text)), "what must hold: `- condition: message`"),
        key("out", Form::Expr, "the result, which the next layer gets"),
    ],
};

/// Keys of `from_hf`.
pub const FROM_HF: Table = Table {
    what: "`from_hf`",
    keys: &[
        key("architectures", Form::List(&Form::Name), "values of `architectures` in config.json that this model reads"),
        key(
            "config",
            Form::Map(&Form::Either(&[Form::Keys(&CONFIG_RULE), Form::Expr])),
            "config entries as expressions over config.json",
        ),
        key("require", Form::Map(&Form::Literal), "values that config.json must have where it has them"),
        key("tensors", Form::Keys(&TENSORS), "exceptions of names and layouts"),
        key("suffix", Form::Text, "what the architecture is called after the trunk's family"),
    ],
};

/// Keys of an entry of `from_hf.config` in its long form.
pub const CONFIG_RULE: Table = Table {
    what: "a config rule",
    keys: &[
        key("from", Form::Expr, "an expression over config.json"),
        key("names", Form::Map(&Form::Name), "their name to ours; another one is an error"),
    ],
};

/// Keys of `from_hf.tensors`; see [`TensorRules`].
pub const TENSORS: Table = Table {
    what: "`tensors`",
    keys: &[
        key("strip_prefixes", Form::List(&Form::Text), "prefixes that a file may put before every name"),
        key("add_prefix", Form::Map(&Form::Text), "architecture to a prefix that its files leave out"),
        key("transpose", Form::List(&Form::Text), "parameters stored transposed, as globs"),
        key("skip", Form::List(&Form::Text), "tensors that are not read and not written, as globs"),
        key("may_repeat", Form::Map(&Form::Text), "tensor to the parameter that it repeats, such as a tied head"),
        key("also_called", Form::Map(&Form::List(&Form::Text)), "parameter to further names, as globs, read only"),
    ],
};

pub(crate) fn read(reader: &mut Reader, node: &Node) -> Option<Model> {
    let fields = reader.fields(node, &MODEL)?;
    let name = fields.get("model").and_then(|n| reader.word(n, "the model's name"));
    let doc = fields.get("doc").and_then(|n| reader.word(n, "a text"));
    let uses = fields.get("use").map_or_else(Vec::new, |n| reader.words(n, "a list of files"));
    let config = fields.get("config").map_or_else(Vec::new, |n| reader.declarations(n));
    let small = fields.get("small").map_or_else(Vec::new, |n| reader.named_literals(n));
    let init = fields.get("init").and_then(|n| reader.expr(n));
    let models = fields.get("models").map_or_else(Vec::new, |n| reader.roles(n));
    let params = fields.get("params").map_or_else(Vec::new, |n| reader.params(n));
    let blocks = fields.get("blocks").map_or_else(Vec::new, |n| reader.blocks(n));
    let from_hf = fields.get("from_hf").and_then(|n| reader.hf_rules(n));
    let tests = fields.get("tests").map_or_else(Vec::new, |n| reader.tests(n));
    let Some((key, graph)) = fields.entry("graph") else {
        reader.error(Diag::error("a model has no `graph`").label(fields.span, ""));
        return None;
    };
    let graph = reader.graph(key, graph)?;
    let model = Model { name: name?, doc, uses, config, small, init, models, params, blocks, graph, from_hf, tests };
    check_trunk(reader, &model);
    check_small(reader, &model);
    Some(model)
}

/// The small sizes are config entries.
fn check_small(reader: &mut Reader, model: &Model) {
    for (name, _) in &model.small {
        if !model.config.iter().any(|declared| declared.name.text == name.text) {
            let diag = Diag::error(format!("found `{}`, which is no entry of `config`", name.text));
            let near = dsgc_ir::diag::nearest(&name.text, model.config.iter().map(|d| d.name.text.as_str()));
            let diag = diag.label(name.span, "");
            reader.error(match near {
                Some(near) => diag.help(format!("write `{near}`")),
                None => diag,
            });
        }
    }
}

/// A model is built upon one other at most, of which it says nothing but its name.
fn check_trunk(reader: &mut Reader, model: &Model) {
    let Some(trunk) = model.models.first() else {
        if let Some(suffix) = model.from_hf.as_ref().and_then(|rules| rules.suffix.as_ref()) {
            let diag = Diag::error("found a `suffix`, which is for models over models").label(suffix.span, "");
            reader.error(diag.help("write the whole names under `architectures`"));
        }
        return;
    };
    if let Some(second) = model.models.get(1) {
        let diag = Diag::error("found a second model, expected one to build upon").label(second.name.span, "");
        reader.error(diag.label(trunk.name.span, "the first"));
    }
    match &trunk.ty {
        Some(ty) if ty.text == "any" => {}
        Some(ty) => {
            let diag = Diag::error(format!("found `{}`, expected `any`", ty.text)).label(ty.span, "");
            reader.error(diag.help("what the other model must have follows from how it is used"));
        }
        None => reader.error(
            Diag::error(format!("`{}` has no type", trunk.name.text))
                .label(trunk.name.span, "")
                .help(format!("write `{}: any`", trunk.name.text)),
        ),
    }
    let spans = [&trunk.snapshot, &trunk.average].map(|word| word.as_ref().map(|word| word.span));
    let odd = spans.into_iter().chain([trunk.when.as_ref().map(|when| when.span)]).flatten().next();
    if let Some(span) = odd.or(trunk.trained.then_some(trunk.name.span)) {
        let diag = Diag::error(format!("found more than the type of `{}`", trunk.name.text)).label(span, "");
        reader.error(diag.help("what a role is, and whether it is trained, is said in recipes"));
    }
    let named = |word: &&Word| word.text.split('.').next() == Some(trunk.name.text.as_str());
    let config = model.config.iter().map(|declared| &declared.name);
    let params = model.params.iter().chain(model.blocks.iter().flat_map(|block| &block.params));
    if let Some(other) = config.chain(params.map(|param| &param.name)).find(named) {
        let diag = Diag::error(format!("`{}` has two meanings", trunk.name.text)).label(other.span, "");
        reader.error(diag.label(trunk.name.span, "the model of that name").help("give one of them another name"));
    }
}

impl Reader {
    fn params(&mut self, node: &Node) -> Vec<Param> {
        let mut params = Vec::new();
        for (name, node) in self.entries(node, "parameters: `name: [dims]`") {
            let name = self.name(name, true);
            let param = match &node.value {
                Value::Map(_) => self.long_param(name, node),
                _ => Some(Param {
                    name,
                    shape: self.exprs(node, "a shape such as `[rows, columns]`"),
                    init: None,
                    when: None,
                }),
            };
            params.extend(param);
        }
        params
    }

    fn long_param(&mut self, name: Word, node: &Node) -> Option<Param> {
        let fields = self.fields(node, &PARAM)?;
        let init = fields.get("init").and_then(|n| self.expr(n));
        let when = fields.get("when").and_then(|n| self.expr(n));
        match fields.get("shape") {
            Some(shape) => {
                Some(Param { name, shape: self.exprs(shape, "a shape such as `[rows, columns]`"), init, when })
            }
            None => {
                self.error(Diag::error(format!("parameter `{}` has no `shape`", name.text)).label(name.span, ""));
                None
            }
        }
    }

    fn blocks(&mut self, node: &Node) -> Vec<Block> {
        let mut blocks = Vec::new();
        for (name, node) in self.entries(node, "blocks by name") {
            let name = self.name(name, false);
            let Some(fields) = self.fields(node, &BLOCK) else { continue };
            let params = fields.get("params").map_or_else(Vec::new, |n| self.params(n));
            blocks.extend(self.graph_body(name, &fields).map(|graph| Block { params, graph }));
        }
        blocks
    }

    fn hf_rules(&mut self, node: &Node) -> Option<FromHf> {
        let fields = self.fields(node, &FROM_HF)?;
        let architectures = fields.get("architectures").map_or_else(Vec::new, |n| self.words(n, "a list of names"));
        let mut config = Vec::new();
        if let Some(node) = fields.get("config") {
            for (name, node) in self.entries(node, "config entries: `name: expression`") {
                let rule = self.config_rule(node);
                config.extend(rule.map(|rule| (word(name), rule)));
            }
        }
        let require = fields.get("require").map_or_else(Vec::new, |n| self.named_literals(n));
        let tensors = fields.get("tensors").map_or_else(TensorRules::default, |n| self.tensor_rules(n));
        let suffix = fields.get("suffix").and_then(|n| self.word(n, "a text"));
        Some(FromHf { architectures, config, require, tensors, suffix })
    }

    fn config_rule(&mut self, node: &Node) -> Option<ConfigRule> {
        let Value::Map(_) = &node.value else {
            return self.expr(node).map(|from| ConfigRule { from, names: None });
        };
        let fields = self.fields(node, &CONFIG_RULE)?;
        let names = fields.get("names").map(|n| {
            let entries = self.entries(n, "their names and ours");
            entries.iter().filter_map(|(k, v)| self.word(v, "a name").map(|v| (word(k), v))).collect()
        });
        match fields.get("from") {
            Some(from) => self.expr(from).map(|from| ConfigRule { from, names }),
            None => {
                self.error(Diag::error("a config rule has no `from`").label(node.span, ""));
                None
            }
        }
    }

    fn tensor_rules(&mut self, node: &Node) -> TensorRules {
        let Some(fields) = self.fields(node, &TENSORS) else { return TensorRules::default() };
        let mut texts = |key| -> Vec<String> {
            let words = fields.get(key).map_or_else(Vec::new, |n| self.words(n, "a list of names"));
            words.into_iter().map(|w| w.text).collect()
        };
        let (strip_prefixes, transpose, skip) = (texts("strip_prefixes"), texts("transpose"), texts("skip"));
        let mut pairs = |key| {
            let Some(node) = fields.get(key) else { return Default::default() };
            let entries = self.entries(node, "pairs of names");
            entries.iter().filter_map(|(k, v)| self.word(v, "a name").map(|v| (k.text.clone(), v.text))).collect()
        };
        let (add_prefix, may_repeat) = (pairs("add_prefix"), pairs("may_repeat"));
        let mut also_called = std::collections::BTreeMap::new();
        if let Some(node) = fields.get("also_called") {
            for (name, node) in self.entries(node, "lists of names") {
                let names = self.words(node, "a list of names").into_iter().map(|w| w.text).collect();
                also_called.insert(name.text.clone(), names);
            }
        }
        TensorRules { strip_prefixes, add_prefix, transpose, skip, may_repeat, also_called, ..TensorRules::default() }
    }
}

/// A key whose form nobody prescribes.
pub(crate) fn word(key: &Text) -> Word {
    Word { span: key.span, text: key.text.clone() }
}
