//! `tokenizer.json`, and what the files beside it say about special tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dsgc_ir::diag::Diag;
use serde_json::{Map, Value};

use crate::{Folder, file_error, read_object};

/// A tokenizer with the ids of its special tokens.
///
/// The ids are facts, not decisions: where a folder names no padding token, [`Tokenizer::pad`] is `None`, and it is the
/// caller who pads with `eos` as DeepSpeed-Chat does.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    special: BTreeMap<&'static str, i32>,
}

/// A text as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<i32>,
    /// For each token the byte of the text at which it begins; 0 for those that the tokenizer itself adds. Whether a
    /// space belongs to the word after it is as the tokenizer reports it.
    pub starts: Vec<usize>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a folder. Truncation and padding that may be stored in it are switched off.
    pub fn load(folder: impl AsRef<Path>) -> Result<Tokenizer, Diag> {
        let folder = &Folder::holding("tokenizer.json", folder.as_ref())?;
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Diag::error(format!("found no `tokenizer.json` in `{}`", folder.display())).help(
                "if it has an older tokenizer, convert it: \
                 `AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)`",
            ));
        }
        let mut inner = tokenizers::Tokenizer::from_file(&path).map_err(|e| file_error("read", &path, e))?;
        inner.with_truncation(None).map_err(|e| file_error("read", &path, e))?;
        inner.with_padding(None);
        let ids = inner.get_vocab(true);
        // Ids may have gaps, so the count alone can be less than what an embedding needs.
        let vocab_size = ids.values().map(|&id| id as usize + 1).max().unwrap_or(0).max(ids.len());
        let special = special_tokens(folder, &inner, vocab_size)?;
        Ok(Tokenizer { inner, vocab_size, special })
    }

    /// Tokens of a text, with the special tokens that the tokenizer adds to every text.
    pub fn encode(&self, text: &str) -> Result<Encoded, Diag> {
        self.inner.encode(text, true).map(encoded).map_err(encode_error)
    }

    /// Tokens of a text that names its special tokens itself, as chat templates do.
    pub fn encode_whole(&self, text: &str) -> Result<Vec<i32>, Diag> {
        self.inner.encode(text, false).map(|e| encoded(e).ids).map_err(encode_error)
    }

    /// [`Tokenizer::encode`] of many texts on all cores; the results are in the order of the texts.
    pub fn encode_all(&self, texts: &[&str]) -> Result<Vec<Encoded>, Diag> {
        let all = self.inner.encode_batch(texts.to_vec(), true).map_err(encode_error)?;
        Ok(all.into_iter().map(encoded).collect())
    }

    /// The text of tokens, without the special ones.
    pub fn decode(&self, ids: &[i32]) -> Result<String, Diag> {
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| u32::try_from(id).map_err(|_| Diag::error(format!("found token id {id}, expected one from 0"))))
            .collect::<Result<_, _>>()?;
        self.inner.decode(&ids, true).map_err(|e| Diag::error(format!("cannot decode tokens: {e}")))
    }

    /// The id of a token by its exact text, e.g. `<|endoftext|>`.
    pub fn id(&self, token: &str) -> Option<i32> {
        self.inner.token_to_id(token).and_then(|id| i32::try_from(id).ok())
    }

    /// The text of a token.
    pub fn token(&self, id: i32) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?)
    }

    /// Number of rows that an embedding of all tokens needs: the largest id and one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id of the padding token, if the folder names one.
    pub fn pad(&self) -> Option<i32> {
        self.special.get("pad").copied()
    }

    /// Id of the token that ends a text, if the folder names one.
    pub fn eos(&self) -> Option<i32> {
        self.special.get("eos").copied()
    }

    /// Id of the token that begins a text, if the folder names one.
    pub fn bos(&self) -> Option<i32> {
        self.special.get("bos").copied()
    }
}

fn encoded(encoding: tokenizers::Encoding) -> Encoded {
    // Ids are below `vocab_size`, which fits a tensor's i32 for every tokenizer there is.
    let ids = encoding.get_ids().iter().map(|&id| id as i32).collect();
    let added = encoding.get_special_tokens_mask();
    let starts = encoding.get_offsets().iter().zip(added).map(|(o, &a)| if a == 1 { 0 } else { o.0 }).collect();
    Encoded { ids, starts }
}

fn encode_error(error: tokenizers::Error) -> Diag {
    Diag::error(format!("cannot tokenise a text: {error}"))
}

/// Looks for `pad`, `eos` and `bos` where transformers keeps them: by text in the tokenizer's files, then by id in the
/// model's.
fn special_tokens(
    folder: &Path,
    tokenizer: &tokenizers::Tokenizer,
    vocab_size: usize,
) -> Result<BTreeMap<&'static str, i32>, Diag> {
    let by_text = objects(folder, ["tokenizer_config.json", "special_tokens_map.json"])?;
    let by_id = objects(&Folder::holding("config.json", folder)?, ["config.json", "generation_config.json"])?;
    let mut ids = BTreeMap::new();
    for name in ["pad", "eos", "bos"] {
        let text = by_text.iter().find_map(|(file, o)| Some((file, token_text(o.get(&format!("{name}_token"))?)?)));
        if let Some((file, text)) = text {
            let id = tokenizer.token_to_id(text).and_then(|id| i32::try_from(id).ok()).ok_or_else(|| {
                Diag::error(format!(
                    "`{file}` in `{}` names `{text}` as {name}_token, but `tokenizer.json` has no such token",
                    folder.display()
                ))
                .help("name a token of the vocabulary, or take the key out")
            })?;
            ids.insert(name, id);
        } else if let Some(id) =
            by_id.iter().find_map(|(_, o)| token_id(o.get(&format!("{name}_token_id"))?, vocab_size))
        {
            ids.insert(name, id);
        }
    }
    Ok(ids)
}

/// A file's name and the object in it.
type Named = (&'static str, Map<String, Value>);

/// Those of the files that are there.
fn objects(folder: &Path, names: [&'static str; 2]) -> Result<Vec<Named>, Diag> {
    let mut objects = Vec::new();
    for name in names {
        objects.extend(read_object(&folder.join(name))?.map(|o| (name, o)));
    }
    Ok(objects)
}

/// A token is its text, or an object (`AddedToken`) with the text under `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// An id is a number, or a list whose first one counts (Llama 3 has several `eos`). Old files say -1 for "none".
fn token_id(value: &Value, vocab_size: usize) -> Option<i32> {
    let id = value.as_i64().or_else(|| value.get(0)?.as_i64())?;
    i32::try_from(id).ok().filter(|&id| id >= 0 && (id as usize) < vocab_size)
}

/// Ids of the tokens that end an answer, by all files of a folder that name some: Llama 3 has several.
pub fn end_tokens(folder: impl AsRef<Path>) -> Result<Vec<i32>, Diag> {
    let folder = Folder::check(folder.as_ref())?;
    let mut ends = BTreeSet::new();
    for (_, object) in objects(folder, ["config.json", "generation_config.json"])? {
        let ids = match object.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
            None => Vec::new(),
        };
        ends.extend(ids.iter().filter_map(|id| i32::try_from(id.as_i64()?).ok()).filter(|id| *id >= 0));
    }
    if folder.join("tokenizer.json").is_file() {
        ends.extend(Tokenizer::load(folder)?.eos());
    }
    Ok(ends.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A byte-level BPE over a few letters, with `</s>` put before every text as OPT does.
    fn bpe() -> Value {
        serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"</s>": 0, "a": 1, "b": 2, "Ġ": 3, "ab": 4, "Ġab": 9}, "merges": [["a", "b"], ["Ġ", "ab"]]}
        })
    }

    fn load(files: &[(&str, Value)]) -> Result<Tokenizer, Diag> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), bpe().to_string()).unwrap();
        for (name, value) in files {
            fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        Tokenizer::load(dir.path())
    }

    #[test]
    fn tokens_know_where_they_begin_and_come_back_as_text() {
        let tokenizer = load(&[]).unwrap();
        let tokens = tokenizer.encode("ab ab b").unwrap();
        assert_eq!(tokens, Encoded { ids: vec![0, 4, 9, 3, 2], starts: vec![0, 0, 2, 5, 6] });
        assert_eq!(tokenizer.decode(&tokens.ids).unwrap(), "ab ab b");
        assert_eq!(tokenizer.encode_all(&["a", "ab ab b"]).unwrap()[1], tokens);
        assert_eq!(tokenizer.vocab_size(), 10);
        assert!(tokenizer.decode(&[-100]).is_err());
    }

    #[test]
    fn special_tokens_are_texts_objects_or_ids() {
        use serde_json::json;
        let tokenizer = load(&[
            ("tokenizer_config.json", json!({"bos_token": {"content": "</s>"}, "pad_token": null})),
            ("special_tokens_map.json", json!({"bos_token": "b", "pad_token": "a"})),
            ("config.json", json!({"eos_token_id": [2, 4], "pad_token_id": 3})),
        ])
        .unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.pad(), tokenizer.eos()), (Some(0), Some(1), Some(2)));
        let none = load(&[("config.json", json!({"pad_token_id": -1, "eos_token_id": 77}))]).unwrap();
        assert_eq!((none.bos(), none.pad(), none.eos()), (None, None, None));
    }

    #[test]
    fn unknown_special_tokens_and_missing_files_are_errors() {
        let error = load(&[("tokenizer_config.json", serde_json::json!({"eos_token": "<end>"}))]).err().unwrap();
        assert!(error.message.contains("names `<end>` as eos_token"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        assert!(Tokenizer::load(dir.path()).err().unwrap().message.contains("found no `tokenizer.json`"));
        assert!(Tokenizer::load("hf://x/y").err().unwrap().help[0].contains("huggingface-cli download x/y"));
    }
}
