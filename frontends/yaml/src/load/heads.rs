//! Models over models: over what a role's model is built, what is written beside its weights, and how its files are
//! read.

use std::path::Path;
use std::rc::Rc;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Model as HostModel;
use serde_json::Value as Json;

use crate::expr::Word;
use crate::graph::Tree;
use crate::model::{FromHf, Model};

use super::config::{self, Asked, Config};
use super::documents::{Documents, ScopedModel};

/// The model that another is built upon.
#[derive(Clone)]
pub(super) struct Trunk {
    pub document: Rc<ScopedModel>,
    pub config: Config,
}

/// Names of a model's outputs; none if it has only one.
pub(super) fn outputs(model: &Model) -> Vec<&str> {
    match &model.graph.out {
        Tree::Expr(_) => Vec::new(),
        Tree::Record(_, entries) => entries.iter().map(|(name, _)| name.text.as_str()).collect(),
    }
}

/// The document of the library that a role's type names, if that is built upon another model.
pub(super) fn head(documents: &mut Documents<'_>, ty: &Word) -> Option<Rc<ScopedModel>> {
    let head = documents.model(ty, Path::new(""))?;
    if head.model.models.is_empty() {
        let diag = Diag::error(format!("found the type `{}`, expected `causal_lm`, `value` or `any`", ty.text));
        documents.error(diag.label(ty.span, ""));
        return None;
    }
    Some(head)
}

/// The config of a model over `trunk`, for the role `role`. Its entries have the defaults of its document.
pub(super) fn config_over(
    documents: &mut Documents<'_>,
    head: &ScopedModel,
    trunk: &Trunk,
    role: &Word,
    pad: Option<i32>,
) -> Option<Config> {
    let asked = Asked { name: &role.text, span: role.span, folder: None };
    let own = config::from_scratch(&head.model, &[], None, &asked, &mut documents.errors)?;
    let host = head.model.host_over(&trunk.document.model, &trunk.config.host, pad);
    Some(Config { host, ..own })
}

/// What ends the names of Hugging Face's classes: that of a language model, and that of its body alone.
const ENDINGS: [&str; 2] = ["ForCausalLM", "Model"];

impl Model {
    /// The host side of this model over the `trunk` with the host side `host`.
    ///
    /// Files are those of the trunk with another end: they may lack the head's parameters. Which of the trunk's they may
    /// have left over is known when the graphs are lowered ([`crate::lower::Lowered`]). `config.json` is the trunk's with the architecture that the `suffix`
    /// makes of its own, one label, and the padding token: transformers scores the last token that is no padding.
    pub fn host_over(&self, trunk: &Model, host: &HostModel, pad: Option<i32>) -> HostModel {
        let mut over = HostModel { family: self.name.text.clone(), ..host.clone() };
        let rules = self.from_hf.as_ref();
        if let Some(own) = rules.map(|rules| &rules.tensors) {
            let tensors = &mut over.tensors;
            tensors.strip_prefixes.extend(own.strip_prefixes.iter().cloned());
            tensors.add_prefix.extend(own.add_prefix.clone());
            tensors.transpose.extend(own.transpose.iter().cloned());
            tensors.skip.extend(own.skip.iter().cloned());
            tensors.may_repeat.extend(own.may_repeat.clone());
            tensors.also_called.extend(own.also_called.clone());
        }
        let of_blocks = self.blocks.iter().flat_map(|block| &block.params).map(|p| format!("*.{}", p.name.text));
        over.tensors.may_be_new = self.params.iter().map(|p| p.name.text.clone()).chain(of_blocks).collect();
        if let Some(suffix) = rules.and_then(|rules| rules.suffix.as_ref()) {
            if let Some(family) = family(trunk.from_hf.as_ref(), host, &suffix.text) {
                over.config.insert("architectures".into(), vec![format!("{family}{}", suffix.text)].into());
            }
            over.config.insert("num_labels".into(), 1.into());
        }
        if let Some(pad) = pad
            && over.config.get("pad_token_id").is_none_or(Json::is_null)
        {
            over.config.insert("pad_token_id".into(), pad.into());
        }
        over
    }
}

/// What the names of all classes of a family begin with: `OPT` of `OPTForCausalLM`.
fn family<'m>(rules: Option<&'m FromHf>, host: &'m HostModel, suffix: &str) -> Option<&'m str> {
    let in_file = host.config.get("architectures").and_then(|all| all.get(0)).and_then(Json::as_str);
    let in_document = rules.and_then(|rules| rules.architectures.first()).map(|name| name.text.as_str());
    let mut known = in_file.into_iter().chain(in_document);
    known.find_map(|name| [suffix].iter().chain(&ENDINGS).find_map(|ending| name.strip_suffix(ending)))
}

#[cfg(test)]
mod tests {
    use dsgc_ir::diag::Sources;
    use serde_json::{Map, json};

    use super::*;
    use crate::document::{Document, parse};
    use crate::library;

    fn std_model(name: &str) -> Model {
        let entry = library::find("models", name).expect("the library has it");
        let document = parse(&mut Sources::default(), &entry.file(), entry.text);
        let Ok(Document::Model(model)) = document else { panic!("{name} is no model") };
        *model
    }

    fn host(config: Json) -> HostModel {
        let config: Map<String, Json> = config.as_object().cloned().unwrap_or_default();
        let tensors = std_model("opt").from_hf.map(|rules| rules.tensors).unwrap_or_default();
        HostModel { family: "opt".into(), config, tensors, unused: vec!["odd".into()] }
    }

    #[test]
    fn a_reward_model_is_a_classifier_with_one_label() {
        let (value, opt) = (std_model("value"), std_model("opt"));
        let bare = host(json!({"architectures": ["OPTForCausalLM"], "hidden_size": 16, "pad_token_id": null}));
        let over = value.host_over(&opt, &bare, Some(2));
        assert_eq!(
            Json::Object(over.config),
            json!({"architectures": ["OPTForSequenceClassification"], "hidden_size": 16, "pad_token_id": 2, "num_labels": 1})
        );
        assert_eq!(over.tensors.may_be_new, ["score.weight"]);
        assert_eq!(over.tensors.also_called["score.weight"], ["v_head.weight"]);
        assert_eq!(over.tensors.also_called["model.decoder.*"], ["decoder.*"]);
        assert_eq!(over.tensors.strip_prefixes, bare.tensors.strip_prefixes);
        assert_eq!(over.unused, ["odd"]);
    }

    #[test]
    fn the_architecture_is_of_the_family_of_the_trunk() {
        let (value, opt) = (std_model("value"), std_model("opt"));
        let of = |config: Json| value.host_over(&opt, &host(config), None).config["architectures"].clone();
        assert_eq!(
            of(json!({"architectures": ["OPTForSequenceClassification"]})),
            json!(["OPTForSequenceClassification"])
        );
        assert_eq!(of(json!({"architectures": ["MistralModel"]})), json!(["MistralForSequenceClassification"]));
        assert_eq!(of(json!({})), json!(["OPTForSequenceClassification"]));
        let kept = value.host_over(&opt, &host(json!({"pad_token_id": 1})), Some(2));
        assert_eq!(kept.config["pad_token_id"], 1);
    }
}
