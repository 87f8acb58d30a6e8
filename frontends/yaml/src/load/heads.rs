//! What is written beside the weights of a model over a model, and how its files are read.

use dsgc_ir::stage::Model as HostModel;
use serde_json::Value as Json;

use crate::model::{FromHf, Model};

/// What ends the names of Hugging Face's classes: that of a language model, and that of its body alone.
const ENDINGS: [&str; 2] = ["ForCausalLM", "Model"];

impl Model {
    /// The host side of this model over the `trunk` with the host side `host`.
    ///
    /// Files are those of the trunk with other ends: they may lack the head's parameters, and may have those of the
    /// trunk in `left`, which nothing here reads. `config.json` is the trunk's with the architecture that the `suffix`
    /// makes of its own, one label, and the padding token: transformers scores the last token that is no padding.
    pub fn host_over(&self, trunk: &Model, host: &HostModel, left: &[String], pad: Option<i32>) -> HostModel {
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
        over.tensors.may_be_left = left.to_vec();
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
        let over = value.host_over(&opt, &bare, &["lm_head.weight".into()], Some(2));
        assert_eq!(
            Json::Object(over.config),
            json!({"architectures": ["OPTForSequenceClassification"], "hidden_size": 16, "pad_token_id": 2, "num_labels": 1})
        );
        assert_eq!(
            (over.tensors.may_be_new, over.tensors.may_be_left),
            (vec!["score.weight".into()], vec!["lm_head.weight".into()])
        );
        assert_eq!(over.tensors.also_called["score.weight"], ["v_head.weight"]);
        assert_eq!(over.tensors.also_called["model.decoder.*"], ["decoder.*"]);
        assert_eq!(over.tensors.strip_prefixes, bare.tensors.strip_prefixes);
        assert_eq!(over.unused, ["odd"]);
    }

    #[test]
    fn the_architecture_is_of_the_family_of_the_trunk() {
        let (value, opt) = (std_model("value"), std_model("opt"));
        let of = |config: Json| value.host_over(&opt, &host(config), &[], None).config["architectures"].clone();
        assert_eq!(
            of(json!({"architectures": ["OPTForSequenceClassification"]})),
            json!(["OPTForSequenceClassification"])
        );
        assert_eq!(of(json!({"architectures": ["MistralModel"]})), json!(["MistralForSequenceClassification"]));
        assert_eq!(of(json!({})), json!(["OPTForSequenceClassification"]));
        let kept = value.host_over(&opt, &host(json!({"pad_token_id": 1})), &[], Some(2));
        assert_eq!(kept.config["pad_token_id"], 1);
    }
}
