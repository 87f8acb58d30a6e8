//! Hugging Face folders: `config.json`, safetensors and `tokenizer.json`, read from and written to local disk.
//!
//! This crate knows files, not models: which names and layouts a family uses comes as data, in
//! [`dsgc_ir::stage::TensorRules`]. It never downloads anything and never runs Python or pickles.
//!
//! ```text
//! Folder::open(path) -> Folder -- read_params(folder, rules, wanted) --> tensors in the order asked for, as far as there are
//! Tokenizer::load(path) -> Tokenizer -- encode(text) --> ids, and where in the text each begins
//! ChatTemplate::of_folder(path) -> ChatTemplate -- render(messages) --> the text that the model continues
//! save(path, model, params, tokenizer_from) --> a folder that transformers opens
//! save_adapter(path, model, about, factors, tokenizer_from) --> a folder that PEFT opens
//! ```
//!
//! A LoRA adapter's folder is read as its base model with the adapter merged in.

mod adapter;
mod chat;
mod config;
mod save;
mod tokenizer;
mod weights;

pub use adapter::{Adapter, AdapterConfig, merge, save_adapter};
pub use chat::{ChatTemplate, Message, PLAIN_TEMPLATE};
pub use config::Folder;
pub use save::{Param, save};
pub use tokenizer::{Encoded, Tokenizer, end_tokens};
pub use weights::{FoundParams, ParamFiles, read_params};

use std::path::Path;

use dsgc_ir::diag::Diag;
use serde_json::{Map, Value};

/// The error of a file operation, e.g. ``cannot read `opt/config.json`: permission denied``.
fn file_error(action: &str, path: &Path, error: impl std::fmt::Display) -> Diag {
    Diag::error(format!("cannot {action} `{}`: {error}", path.display()))
}

/// The JSON object in a file; `None` where there is no such file.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, Diag> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(file_error("read", path, error)),
    };
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(Diag::error(format!("`{}` holds no JSON object", path.display()))),
        Err(error) => Err(file_error("parse", path, error)),
    }
}
