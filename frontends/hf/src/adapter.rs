//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, with the tensors
//! `base_model.model.<layer>.lora_A.weight: [r, in]` and `.lora_B.weight: [out, r]`. A layer's weight with its factors is
//! `W + (alpha / r) B A`; other tensors take the place of the base model's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dsgc_ir::Tensor;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Adapter as Factors, Model, TensorRules};
use memmap2::Mmap;
use serde_json::{Map, Value, json};

use crate::read_object;
use crate::save::{Stored, write_folder};
use crate::weights::{Found, Place, Places, is_transposed, map, parse};

/// What makes a folder an adapter's.
pub(crate) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of the base model.
const PREFIX: &str = "base_model.model.";

/// An adapter's folder.
#[derive(Clone, Debug)]
pub struct Adapter {
    path: PathBuf,
    config: Map<String, Value>,
}

impl Adapter {
    /// Opens a folder with an `adapter_config.json`; `None` where there is none.
    pub(crate) fn open(path: &Path) -> Result<Option<Adapter>, Diag> {
        let Some(config) = read_object(&path.join(CONFIG))? else { return Ok(None) };
        let adapter = Adapter { path: path.to_owned(), config };
        let given = |key: &str| adapter.config.get(key).filter(|v| !v.is_null());
        let cannot = |what: &str| Err(adapter.error(&format!("{what}, which is not part of this version")));
        if let Some(kind) = given("peft_type").filter(|kind| *kind != "LORA") {
            return cannot(&format!("is of the type {kind}"));
        }
        if given("use_dora").is_some_and(|v| *v == true) {
            return cannot("uses DoRA");
        }
        if given("alpha_pattern").and_then(Value::as_object).is_some_and(|pattern| !pattern.is_empty()) {
            return cannot("has an `alpha_pattern`");
        }
        if adapter.alpha().is_none() {
            return Err(adapter.error("has no number for `lora_alpha`"));
        }
        Ok(Some(adapter))
    }

    fn error(&self, what: &str) -> Diag {
        Diag::error(format!("the adapter in `{}` {what}", self.path.display()))
    }

    fn alpha(&self) -> Option<f64> {
        self.config.get("lora_alpha")?.as_f64()
    }

    /// The folder of the model that the adapter belongs to: as `base_model_name_or_path` says, from the working directory
    /// or else from the adapter's folder.
    pub fn base(&self) -> Result<PathBuf, Diag> {
        let Some(name) = self.config.get("base_model_name_or_path").and_then(Value::as_str) else {
            return Err(self.error("names no base model in `base_model_name_or_path`"));
        };
        let beside = self.path.join(name);
        Ok(if !Path::new(name).is_dir() && beside.is_dir() { beside } else { name.into() })
    }

    /// The tensors of an adapter that is trained further: factors and whole parameters by their names and shapes, all that
    /// it has. Its rank and its scale must be those that the training asks for.
    pub fn read(
        &self,
        (r, alpha): (usize, f64),
        rules: &TensorRules,
        wanted: &[(String, Vec<usize>)],
    ) -> Result<Vec<Tensor>, Vec<Diag>> {
        let mut errors = Vec::new();
        let mut other = |key: &str, found: String, expected: String| {
            if found != expected {
                errors.push(self.error(&format!("has {found} as `{key}`, expected {expected}")));
            }
        };
        let rank = self.config.get("r").map_or("nothing".to_owned(), Value::to_string);
        other("r", rank, r.to_string());
        other("lora_alpha", self.alpha().expect("`open` saw it").to_string(), alpha.to_string());
        other("use_rslora", self.is_rank_stabilised().to_string(), "false".to_owned());
        let bytes = self.bytes().map_err(|e| vec![e])?;
        let tensors = parse(&self.path, WEIGHTS, &bytes).map_err(|e| vec![e])?;
        let mut left: BTreeMap<String, Found> = BTreeMap::new();
        for (name, view) in tensors.tensors() {
            let own = name.strip_prefix(PREFIX).unwrap_or(&name).to_owned();
            left.insert(own, Found { name, file: WEIGHTS, view });
        }
        let mut read = Vec::new();
        for (name, shape) in wanted {
            match left.remove(name) {
                Some(tensor) => match tensor.read(name, shape, is_transposed(rules, name)) {
                    Ok(tensor) => read.push(tensor),
                    Err(error) => errors.push(error),
                },
                None => errors.push(self.error(&format!("has no `{PREFIX}{name}`"))),
            }
        }
        errors.extend(left.values().map(|tensor| {
            self.error(&format!("has the tensor `{}`, which nothing here trains further", tensor.name))
                .help("name its layers in `lora_target_modules`")
        }));
        if errors.is_empty() { Ok(read) } else { Err(errors) }
    }

    /// Whether the factors' product is scaled by `alpha / sqrt(r)` (rsLoRA).
    fn is_rank_stabilised(&self) -> bool {
        self.config.get("use_rslora").is_some_and(|v| *v == true)
    }

    /// The file of tensors.
    fn bytes(&self) -> Result<Mmap, Diag> {
        let file = self.path.join(WEIGHTS);
        if file.is_file() { map(&file) } else { Err(self.error(&format!("has no `{WEIGHTS}`"))) }
    }

    /// Merges the adapter into parameters that were read from its base.
    pub(crate) fn merge_into(
        &self,
        places: &Places,
        wanted: &[(String, Vec<usize>)],
        params: &mut [Option<Tensor>],
    ) -> Result<(), Vec<Diag>> {
        let bytes = self.bytes().map_err(|e| vec![e])?;
        let tensors = parse(&self.path, WEIGHTS, &bytes).map_err(|e| vec![e])?;
        let mut errors = Vec::new();
        let mut all: Vec<Found> =
            tensors.tensors().into_iter().map(|(name, view)| Found { name, file: WEIGHTS, view }).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        for tensor in &all {
            let name = tensor.name.strip_prefix(PREFIX).unwrap_or(&tensor.name);
            let (layer, factor) = match (name.strip_suffix(".lora_A.weight"), name.strip_suffix(".lora_B.weight")) {
                (Some(layer), _) => (layer, "A"),
                // It is read with its A.
                (None, Some(layer)) if all.iter().any(|t| t.name == format!("{PREFIX}{layer}.lora_A.weight")) => {
                    continue;
                }
                (None, Some(layer)) => (layer, "B"),
                (None, None) => ("", ""),
            };
            let param = if layer.is_empty() { name.to_owned() } else { format!("{layer}.weight") };
            let Some(Place::Param(at)) = places.of(&param) else {
                errors.push(self.error(&format!("has the tensor `{}`, which belongs to no parameter", tensor.name)));
                continue;
            };
            let (name, shape) = &wanted[at];
            let merged = match factor {
                "A" => self.merged(tensor, &all, layer, shape, params[at].as_ref()),
                "B" => Err(self.error(&format!("has no `{PREFIX}{layer}.lora_A.weight`"))),
                _ => tensor.read(name, shape, is_transposed(places.rules, name)),
            };
            match merged {
                Ok(merged) => params[at] = Some(merged),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// The weight of a layer with its factors, of which `a` is the first.
    fn merged(
        &self,
        a: &Found,
        all: &[Found],
        layer: &str,
        shape: &[usize],
        weight: Option<&Tensor>,
    ) -> Result<Tensor, Diag> {
        let name = format!("{PREFIX}{layer}.lora_B.weight");
        let b = all.iter().find(|t| t.name == name).ok_or_else(|| self.error(&format!("has no `{name}`")))?;
        let (&[out, inputs], &[r, _], Some(weight)) = (shape, a.view.shape(), weight) else {
            return Err(self.error(&format!("has factors for `{layer}`, whose weight is no matrix of the base model")));
        };
        let factors = [a.read(&a.name, &[r, inputs], false)?, b.read(&b.name, &[out, r], false)?];
        let alpha = self.alpha().expect("`open` saw it");
        let divisor = if self.is_rank_stabilised() { (r as f64).sqrt() } else { r as f64 };
        Ok(merge(weight, [&factors[0], &factors[1]], alpha / divisor))
    }
}

/// `W + scale * B A` for `W: [out, in]`, `A: [r, in]`, `B: [out, r]`; summed in double precision.
pub fn merge(weight: &Tensor, [a, b]: [&Tensor; 2], scale: f64) -> Tensor {
    let (r, columns) = (a.shape[0], weight.shape[1]);
    let (a, b, mut sum) = (a.to_f64(), b.to_f64(), weight.to_f64());
    for (row, b) in sum.chunks_exact_mut(columns).zip(b.chunks_exact(r)) {
        for (a, b) in a.chunks_exact(columns).zip(b) {
            row.iter_mut().zip(a).for_each(|(w, a)| *w += scale * b * a);
        }
    }
    let sum = Tensor::f64(&weight.shape, sum);
    if matches!(weight.data, dsgc_ir::Data::F32(_)) { sum.single() } else { sum }
}

/// What an adapter's `adapter_config.json` is made from.
pub struct AdapterConfig<'a> {
    /// The factors.
    pub factors: &'a Factors,
    /// Their rank.
    pub r: usize,
    /// `r` times the factor on their product.
    pub alpha: f64,
    /// Dropout with which they were trained.
    pub dropout: f64,
    /// Folder of the model that they belong to.
    pub base: &'a str,
    /// Names of all parameters of that model.
    pub params: Vec<&'a str>,
}

/// Writes an adapter that PEFT loads: factors and whole parameters under their own names, and the files of the tokenizer
/// in `tokenizer_from`.
pub fn save_adapter(
    path: &Path,
    model: &Model,
    about: &AdapterConfig,
    tensors: &[(String, &Tensor)],
    tokenizer_from: Option<&Path>,
) -> Result<(), Diag> {
    let stored: Vec<(String, Stored<Tensor>)> = tensors
        .iter()
        .map(|&(ref name, tensor)| Ok((format!("{PREFIX}{name}"), Stored::new(name, tensor, model)?)))
        .collect::<Result<_, Diag>>()?;
    write_folder(path, (CONFIG, &config(model, about)), WEIGHTS, stored, tokenizer_from)
}

fn config(model: &Model, about: &AdapterConfig) -> Map<String, Value> {
    let architecture = model.config.get("architectures").and_then(|all| all.get(0)).and_then(Value::as_str);
    let ends = |end: &str| architecture.is_some_and(|name| name.ends_with(end));
    let task = match () {
        () if ends("ForCausalLM") => json!("CAUSAL_LM"),
        () if ends("ForSequenceClassification") => json!("SEQ_CLS"),
        () => Value::Null,
    };
    let mut whole: Vec<&str> = about.factors.whole.iter().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
    whole.dedup();
    let number = |x: f64| if x.fract() == 0.0 && x.abs() < 1e9 { json!(x as i64) } else { json!(x) };
    let transposed = about.factors.modules.iter().any(|m| is_transposed(&model.tensors, &format!("{m}.weight")));
    let config = json!({
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": about.base,
        "r": about.r,
        "lora_alpha": number(about.alpha),
        "lora_dropout": about.dropout,
        "target_modules": target_modules(about),
        "modules_to_save": if whole.is_empty() { Value::Null } else { json!(whole) },
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": true,
        "init_lora_weights": true,
        "use_rslora": false,
        "use_dora": false,
    });
    match config {
        Value::Object(config) => config,
        other => unreachable!("bug: {other} is no object"),
    }
}

/// The layers as PEFT names them: by the last parts of their names, where these mean the same layers.
fn target_modules(about: &AdapterConfig) -> Vec<String> {
    let modules = &about.factors.modules;
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    let mut ends: Vec<String> = modules.iter().map(|m| last(m)).collect();
    ends.sort();
    ends.dedup();
    let layers = about.params.iter().filter_map(|name| name.strip_suffix(".weight"));
    let mut meant: Vec<&str> = layers.filter(|layer| ends.contains(&last(layer))).collect();
    let mut own: Vec<&str> = modules.iter().map(String::as_str).collect();
    meant.sort_unstable();
    own.sort_unstable();
    if meant == own { ends } else { modules.clone() }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{Folder, read_params, save};

    fn model() -> Model {
        let config = json!({"architectures": ["XForCausalLM"]});
        let Value::Object(config) = config else { panic!() };
        Model { config, ..Model::default() }
    }

    fn factors() -> Factors {
        let modules = vec!["h.0.q".to_owned(), "h.1.q".to_owned()];
        Factors { modules, whole: vec!["head.weight".to_owned()], init: String::new() }
    }

    /// A base model and an adapter beside it.
    fn folders(dir: &Path) -> PathBuf {
        let weight = Tensor::f32(&[2, 2], vec![1., 2., 3., 4.]);
        let head = Tensor::f32(&[1], vec![5.]);
        let names = ["h.0.q.weight", "h.1.q.weight", "h.1.k.weight"];
        let mut params: Vec<(String, &Tensor)> = names.iter().map(|n| ((*n).to_owned(), &weight)).collect();
        params.push(("head.weight".to_owned(), &head));
        save(&dir.join("base"), &model(), &params, None).unwrap();

        let (a, b) = (Tensor::f32(&[1, 2], vec![1., 10.]), Tensor::f32(&[2, 1], vec![1., 100.]));
        let head = Tensor::f32(&[1], vec![6.]);
        let mut tensors: Vec<(String, &Tensor)> = Vec::new();
        for module in factors().modules {
            let [first, second] = Factors::factors(&module);
            tensors.extend([(first, &a), (second, &b)]);
        }
        tensors.push(("head.weight".to_owned(), &head));
        let params = vec!["h.0.q.weight", "h.1.q.weight", "h.1.k.weight", "head.weight"];
        let about = AdapterConfig { factors: &factors(), r: 1, alpha: 0.5, dropout: 0.1, base: "../base", params };
        let path = dir.join("adapter");
        save_adapter(&path, &model(), &about, &tensors, None).unwrap();
        path
    }

    fn read(path: &Path) -> Result<Vec<Option<Tensor>>, Vec<Diag>> {
        let matrix = vec![2, 2];
        let wanted = ["h.0.q.weight", "h.1.q.weight", "h.1.k.weight"].map(|name| (name, matrix.clone()));
        let wanted = wanted.into_iter().chain([("head.weight", vec![1])]);
        let wanted: Vec<(String, Vec<usize>)> = wanted.map(|(n, s)| (n.to_owned(), s)).collect();
        read_params(&Folder::open(path).map_err(|e| vec![e])?, &model().tensors, &wanted)
    }

    #[test]
    fn an_adapter_is_read_as_its_base_with_it_merged_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = folders(dir.path());
        let merged = Some(Tensor::f32(&[2, 2], vec![1.5, 7., 53., 504.]));
        let base = Some(Tensor::f32(&[2, 2], vec![1., 2., 3., 4.]));
        assert_eq!(read(&path).unwrap(), [merged.clone(), merged, base, Some(Tensor::f32(&[1], vec![6.]))]);
        let config = fs::read_to_string(path.join(CONFIG)).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        // `q` alone means these layers and no others.
        assert_eq!((&config["target_modules"], &config["task_type"]), (&json!(["q"]), &json!("CAUSAL_LM")));
        assert_eq!((&config["modules_to_save"], &config["lora_alpha"]), (&json!(["head"]), &json!(0.5)));
    }

    #[test]
    fn layers_are_named_in_full_where_their_ends_mean_others_too() {
        let factors = Factors { modules: vec!["h.0.q".to_owned()], ..factors() };
        let about = AdapterConfig {
            factors: &factors,
            r: 1,
            alpha: 1.0,
            dropout: 0.1,
            base: "",
            params: vec!["h.0.q.weight", "h.1.q.weight"],
        };
        assert_eq!(target_modules(&about), ["h.0.q"]);
    }

    #[test]
    fn the_scale_is_that_of_the_config() {
        let dir = tempfile::tempdir().unwrap();
        let path = folders(dir.path());
        let config = fs::read_to_string(path.join(CONFIG)).unwrap();
        fs::write(path.join(CONFIG), config.replace("\"lora_alpha\": 0.5", "\"lora_alpha\": 0")).unwrap();
        assert_eq!(read(&path).unwrap()[0], Some(Tensor::f32(&[2, 2], vec![1., 2., 3., 4.])));
    }

    #[test]
    fn what_cannot_be_merged_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = folders(dir.path());
        let config = fs::read_to_string(path.join(CONFIG)).unwrap();
        let error = |from: &str, to: &str| {
            assert!(config.contains(from), "{config}");
            fs::write(path.join(CONFIG), config.replace(from, to)).unwrap();
            read(&path).unwrap_err()[0].to_string()
        };
        for (from, to, expected) in [
            ("\"LORA\"", "\"IA3\"", "is of the type \"IA3\""),
            ("\"use_dora\": false", "\"use_dora\": true", "uses DoRA"),
            ("\"lora_alpha\": 0.5", "\"lora_alpha\": null", "has no number for `lora_alpha`"),
            ("\"lora_alpha\": 0.5", "\"lora_alpha\": 1, \"alpha_pattern\": {\"q\": 2}", "has an `alpha_pattern`"),
            ("\"../base\"", "null", "names no base model"),
            ("\"../base\"", "\"owner/name\"", "is an adapter to the model `owner/name`"),
            ("\"../base\"", "\"owner/name\"", "huggingface-cli download owner/name"),
        ] {
            let found = error(from, to);
            assert!(found.contains(expected), "{found}");
        }
        fs::write(path.join(CONFIG), &config).unwrap();
        fs::remove_file(path.join(WEIGHTS)).unwrap();
        assert!(read(&path).unwrap_err()[0].to_string().contains("has no `adapter_model.safetensors`"));
    }

    #[test]
    fn every_tensor_of_an_adapter_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = folders(dir.path());
        let tensor = Tensor::f32(&[2, 2], vec![0.; 4]);
        let errors = |names: &[&str]| -> Vec<String> {
            let tensors: Vec<(String, &Tensor)> = names.iter().map(|n| ((*n).to_owned(), &tensor)).collect();
            let about = AdapterConfig {
                factors: &factors(),
                r: 2,
                alpha: 1.0,
                dropout: 0.0,
                base: "../base",
                params: Vec::new(),
            };
            save_adapter(&path, &model(), &about, &tensors, None).unwrap();
            let here = format!("error: the adapter in `{}` ", path.display());
            read(&path).unwrap_err().iter().map(|e| e.to_string().replace(&here, "it ")).collect()
        };
        let unknown = errors(&["h.0.v.lora_A.weight", "h.0.v.lora_B.weight", "h.0.q.lora_embedding_A"]);
        assert_eq!(unknown.len(), 2, "{unknown:?}");
        assert_eq!(
            unknown[0],
            "it has the tensor `base_model.model.h.0.q.lora_embedding_A`, which belongs to no parameter"
        );
        assert_eq!(errors(&["h.0.q.lora_A.weight"]), ["it has no `base_model.model.h.0.q.lora_B.weight`"]);
        assert_eq!(errors(&["h.0.q.lora_B.weight"]), ["it has no `base_model.model.h.0.q.lora_A.weight`"]);
        assert!(errors(&["head.weight"])[0].contains("has shape [2, 2], expected [1] for parameter `head.weight`"));
    }
}
