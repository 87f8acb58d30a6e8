use std::path::Path;

use super::*;

/// Name, shape and first element; the others count up from it.
type Tensors<'a> = &'a [(&'a str, &'a [usize], f32)];

/// A folder with files of these tensors.
fn folder(dir: &Path, architecture: &str, files: &[(&str, Tensors)]) -> Folder {
    let config = format!(r#"{{"architectures": ["{architecture}"]}}"#);
    std::fs::write(dir.join("config.json"), config).unwrap();
    for (file, tensors) in files {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, shape, first)| {
                (0..shape.iter().product()).flat_map(|i: usize| (first + i as f32).to_le_bytes()).collect()
            })
            .collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|(t, b)| (t.0.to_owned(), TensorView::new(Dtype::F32, t.1.to_vec(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(file)).unwrap();
    }
    Folder::open(dir).unwrap()
}

fn wanted(params: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
    params.iter().map(|(n, s)| ((*n).to_owned(), s.to_vec())).collect()
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

/// The errors of reading one file of tensors as some parameters.
fn errors(rules: &TensorRules, tensors: Tensors, params: &[(&str, &[usize])]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder(dir.path(), "X", &[("model.safetensors", tensors)]);
    let errors = read_params(&folder, rules, &wanted(params)).unwrap_err();
    errors.iter().map(|e| e.to_string().replace(&dir.path().display().to_string(), "DIR")).collect()
}

#[test]
fn names_are_stripped_prefixed_skipped_and_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Tensors = &[
        ("rwtransformer.embed.weight", &[2], 1.0),
        ("lm_head.weight", &[2], 1.0),
        ("layers.0.inv_freq", &[1], 0.0),
        ("v_head.weight", &[1], 9.0),
    ];
    let folder = folder(dir.path(), "Base", &[("model.safetensors", tensors)]);
    let rules = TensorRules {
        strip_prefixes: strings(&["", "rwtransformer."]),
        add_prefix: [("Base".to_owned(), "model.".to_owned())].into(),
        skip: strings(&["*.inv_freq"]),
        may_repeat: [("lm_head.weight".to_owned(), "model.embed.weight".to_owned())].into(),
        also_called: [("score.weight".to_owned(), strings(&["v_head.weight"]))].into(),
        ..TensorRules::default()
    };
    let params = wanted(&[("score.weight", &[1]), ("model.embed.weight", &[2])]);
    let read = read_params(&folder, &rules, &params).unwrap();
    assert_eq!(read, [Some(Tensor::f32(&[1], vec![9.0])), Some(Tensor::f32(&[2], vec![1.0, 2.0]))]);
}

/// DeepSpeed-Chat's reward models of both families: the base model wrapped as `rwtransformer`, beside a head.
#[test]
fn reward_models_of_deepspeed_chat_are_read() {
    let heads = [("score.weight".to_owned(), strings(&["v_head.weight"]))];
    let prefixes = strings(&["", "base_model.", "rwtransformer."]);

    let dir = tempfile::tempdir().unwrap();
    let tensors: Tensors = &[
        ("rwtransformer.decoder.embed.weight", &[2], 1.0),
        ("rwtransformer.decoder.layers.1.fc1.bias", &[1], 3.0),
        ("v_head.weight", &[1], 9.0),
    ];
    let opt = folder(dir.path(), "OPTForCausalLM", &[("model.safetensors", tensors)]);
    let also = [("model.decoder.*".to_owned(), strings(&["decoder.*"]))];
    let rules = TensorRules {
        strip_prefixes: prefixes.clone(),
        also_called: heads.clone().into_iter().chain(also).collect(),
        ..TensorRules::default()
    };
    let params: &[(&str, &[usize])] =
        &[("model.decoder.embed.weight", &[2]), ("model.decoder.layers.1.fc1.bias", &[1]), ("score.weight", &[1])];
    let read = read_params(&opt, &rules, &wanted(params)).unwrap();
    assert_eq!(read.into_iter().flatten().map(|t| t.to_f64()[0]).collect::<Vec<_>>(), [1.0, 3.0, 9.0]);

    let dir = tempfile::tempdir().unwrap();
    let tensors: Tensors = &[
        ("rwtransformer.layers.0.mlp.weight", &[1], 1.0),
        ("rwtransformer.norm.weight", &[1], 2.0),
        ("v_head.weight", &[1], 9.0),
    ];
    let llama = folder(dir.path(), "LlamaForCausalLM", &[("model.safetensors", tensors)]);
    let rules = TensorRules {
        strip_prefixes: prefixes,
        add_prefix: [("LlamaModel".to_owned(), "model.".to_owned())].into(),
        also_called: heads.into(),
        ..TensorRules::default()
    };
    let params: &[(&str, &[usize])] =
        &[("model.layers.0.mlp.weight", &[1]), ("model.norm.weight", &[1]), ("score.weight", &[1])];
    let read = read_params(&llama, &rules, &wanted(params)).unwrap();
    assert_eq!(read.into_iter().flatten().map(|t| t.to_f64()[0]).collect::<Vec<_>>(), [1.0, 2.0, 9.0]);
}

#[test]
fn parts_that_are_not_taken_off_get_no_prefix() {
    let rules = TensorRules { add_prefix: [("Base".to_owned(), "model.".to_owned())].into(), ..TensorRules::default() };
    let errors = errors(&rules, &[("norm.weight", &[1], 0.0)], &[("model.norm.weight", &[1])]);
    assert!(errors[1].contains("tensor `norm.weight` in `model.safetensors` belongs to no parameter"), "{errors:?}");
}

#[test]
fn a_head_may_be_new_and_another_one_left() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Tensors = &[("body", &[1], 1.0), ("lm_head.weight", &[3], 0.0), ("lm_head.bias", &[3], 0.0)];
    let folder = folder(dir.path(), "X", &[("model.safetensors", tensors)]);
    let params = wanted(&[("score.weight", &[1]), ("body", &[1])]);
    let mut rules = TensorRules {
        may_be_new: strings(&["score.*"]),
        may_be_left: strings(&["lm_head.*"]),
        ..TensorRules::default()
    };
    let read = read_params(&folder, &rules, &params).unwrap();
    assert_eq!(read, [None, Some(Tensor::f32(&[1], vec![1.0]))]);

    rules.may_be_left.clear();
    let errors = read_params(&folder, &rules, &params).unwrap_err();
    assert_eq!(errors.len(), 2, "{errors:?}");
    rules = TensorRules { may_be_left: strings(&["lm_head.*"]), ..TensorRules::default() };
    let errors = read_params(&folder, &rules, &params).unwrap_err();
    assert!(errors[0].message.contains("found no tensor for parameter `score.weight`"), "{errors:?}");
}

#[test]
fn other_names_keep_what_stars_stand_for() {
    assert_eq!(
        renamed("decoder.layers.3.w", "decoder.*", "model.decoder.*").as_deref(),
        Some("model.decoder.layers.3.w")
    );
    assert_eq!(renamed("h.3.attn.w", "h.*.attn.*", "layers.*.self.*").as_deref(), Some("layers.3.self.w"));
    assert_eq!(renamed("v_head.weight", "v_head.weight", "score.weight").as_deref(), Some("score.weight"));
    assert_eq!(renamed("v_head.bias", "v_head.weight", "score.weight"), None);
}

#[test]
fn shards_are_read_together() {
    let dir = tempfile::tempdir().unwrap();
    let folder =
        folder(dir.path(), "X", &[("a.safetensors", &[("p", &[1], 1.0)]), ("b.safetensors", &[("q", &[1], 2.0)])]);
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"p": "a.safetensors", "q": "b.safetensors"}}"#).unwrap();
    let params = wanted(&[("q", &[1]), ("p", &[1])]);
    let read = read_params(&folder, &TensorRules::default(), &params).unwrap();
    assert_eq!(read, [Some(Tensor::f32(&[1], vec![2.0])), Some(Tensor::f32(&[1], vec![1.0]))]);

    std::fs::write(&index, r#"{"weight_map": {"p": "../a.safetensors"}}"#).unwrap();
    let error = &read_params(&folder, &TensorRules::default(), &params).unwrap_err()[0];
    assert!(error.message.contains("names the shard `../a.safetensors`, expected a file name"), "{error}");
}

#[test]
fn narrow_and_wide_floats_become_single() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let half: Vec<u8> = half::f16::from_f32(-1.5).to_le_bytes().into();
    let brain: Vec<u8> = half::bf16::from_f32(3.0).to_le_bytes().into();
    let double: Vec<u8> = 0.25f64.to_le_bytes().into();
    let parts = [("b", Dtype::BF16, &brain), ("d", Dtype::F64, &double), ("h", Dtype::F16, &half)];
    let views = parts.map(|(n, t, b)| (n, TensorView::new(t, vec![1], b).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let params = wanted(&[("h", &[1]), ("b", &[1]), ("d", &[1])]);
    let read = read_params(&Folder::open(dir.path()).unwrap(), &TensorRules::default(), &params).unwrap();
    assert_eq!(read.into_iter().flatten().map(|t| t.scalar()).collect::<Vec<_>>(), [-1.5, 3.0, 0.25]);
}

#[test]
fn all_misfits_come_at_once() {
    let rules = TensorRules { transpose: strings(&["turned"]), ..TensorRules::default() };
    let tensors: Tensors = &[("fc1.wieght", &[1], 0.0), ("turned", &[2, 3], 0.0), ("zzz", &[1], 0.0)];
    let params: &[(&str, &[usize])] = &[("fc1.weight", &[1]), ("turned", &[2, 3]), ("gone", &[4])];
    assert_eq!(
        errors(&rules, tensors, params),
        [
            "error: found no tensor for parameter `fc1.weight`, expected one of shape [1]\n  \
             help: the nearest name is `fc1.wieght` in `model.safetensors`",
            "error: found no tensor for parameter `gone`, expected one of shape [4]\n  \
             help: is `DIR` the folder of this model?",
            "error: tensor `fc1.wieght` in `model.safetensors` belongs to no parameter\n  \
             help: the nearest parameter without a tensor is `fc1.weight`",
            "error: tensor `zzz` in `model.safetensors` belongs to no parameter\n  \
             help: if it is not needed, name it under `skip` of the model's `from_hf.tensors`",
            "error: tensor `turned` in `model.safetensors` has shape [2, 3], expected [3, 2] for parameter `turned`\n  \
             help: it is the other way round: see `transpose` of the model's `from_hf.tensors`",
        ]
    );
}

#[test]
fn a_repetition_must_be_equal() {
    let rules = TensorRules { may_repeat: [("head".to_owned(), "embed".to_owned())].into(), ..TensorRules::default() };
    let errors = errors(&rules, &[("embed", &[2], 0.0), ("head", &[2], 1.0)], &[("embed", &[2])]);
    assert!(errors[0].contains("tensor `head` in `model.safetensors` differs from `embed`"), "{errors:?}");
}

#[test]
fn two_tensors_for_one_parameter_are_an_error() {
    let rules = TensorRules { strip_prefixes: strings(&["model."]), ..TensorRules::default() };
    let errors = errors(&rules, &[("model.p", &[1], 0.0), ("p", &[1], 1.0)], &[("p", &[1])]);
    assert!(errors[0].contains("`model.p` in `model.safetensors` and `p`"), "{errors:?}");
}

#[test]
fn pickles_and_broken_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder(dir.path(), "X", &[]);
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    let error = read_params(&folder, &TensorRules::default(), &[]).unwrap_err()[0].to_string();
    assert!(error.contains("found no `model.safetensors`") && error.contains("safe_serialization=True"), "{error}");
    std::fs::write(dir.path().join("model.safetensors"), "cut off").unwrap();
    let error = read_params(&folder, &TensorRules::default(), &[]).unwrap_err()[0].to_string();
    assert!(error.contains("the file is not whole"), "{error}");
}
