//! The machine as the loader sees it: files, model folders, tokenizers, the columns of rows.

use std::fs;
use std::io;
use std::path::Path;

use dsgc_hf::{Folder, Tokenizer};
use dsgc_ir::diag::Diag;
use dsgc_yaml::load::{Host, TokenizerFacts};
use serde_json::{Map, Value};

/// The local disk.
pub struct Disk;

impl Host for Disk {
    fn text(&self, path: &Path) -> io::Result<String> {
        fs::read_to_string(path)
    }

    fn hf_config(&self, folder: &Path) -> Result<Map<String, Value>, Diag> {
        Folder::open(folder).map(|f| f.config().clone())
    }

    fn tokenizer(&self, folder: &Path) -> Result<TokenizerFacts, Diag> {
        let tokenizer = Tokenizer::load(folder)?;
        let (pad, eos, bos) = (tokenizer.pad(), tokenizer.eos(), tokenizer.bos());
        Ok(TokenizerFacts { vocab: tokenizer.vocab_size(), pad, eos, bos })
    }

    fn columns(&self, file: &Path) -> Result<Vec<String>, Diag> {
        dsgc_runtime::data::columns_of_file(&file.to_string_lossy())
    }
}
