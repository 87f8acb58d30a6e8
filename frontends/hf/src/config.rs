//! A model folder and its `config.json`.

use std::path::{Path, PathBuf};

use dsgc_ir::diag::Diag;
use serde_json::{Map, Value};

use crate::{Adapter, read_object};

/// A local folder in Hugging Face's layout.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    config: Map<String, Value>,
    adapter: Option<Adapter>,
}

impl Folder {
    /// Opens a folder and reads its `config.json`; weights and tokenizer are looked at when they are asked for. The folder
    /// of a LoRA adapter opens as that of its base model.
    pub fn open(path: impl AsRef<Path>) -> Result<Folder, Diag> {
        let path = path.as_ref();
        if let Some(config) = read_object(&Folder::check(path)?.join("config.json"))? {
            return Ok(Folder { path: path.to_owned(), config, adapter: None });
        }
        let Some(adapter) = Adapter::open(path)? else {
            let diag = Diag::error(format!("found no `config.json` in `{}`, expected a model folder", path.display()));
            return Err(diag.help("give the folder that holds `config.json`, `model.safetensors` and `tokenizer.json`"));
        };
        let at = adapter.base()?;
        let beside =
            |diag: Diag| diag.help(format!("`{}` is an adapter to the model `{}`", path.display(), at.display()));
        let base = Folder::check(&at).and_then(|at| {
            let config = read_object(&at.join("config.json"))?;
            config.ok_or_else(|| {
                Diag::error(format!("found no `config.json` in `{}`, expected a model folder", at.display()))
            })
        });
        Ok(Folder { config: base.map_err(beside)?, path: at, adapter: Some(adapter) })
    }

    /// The folder that has a file of a model: an adapter may leave it to its base.
    pub(crate) fn holding(file: &str, path: &Path) -> Result<PathBuf, Diag> {
        let path = Folder::check(path)?;
        if path.join(file).is_file() {
            return Ok(path.to_owned());
        }
        Adapter::open(path)?.map_or(Ok(path.to_owned()), |adapter| adapter.base())
    }

    /// That `path` is a local folder; if not, what to do about it.
    pub(crate) fn check(path: &Path) -> Result<&Path, Diag> {
        let name = path.to_string_lossy();
        if let Some(repository) = name.strip_prefix("hf://") {
            return Err(Diag::error(format!("found `{name}`, expected a local folder"))
                .help(download(repository.split('@').next().unwrap_or(repository))));
        }
        if path.is_dir() {
            return Ok(path);
        }
        if path.exists() {
            return Err(Diag::error(format!("`{name}` is a file, expected a model folder"))
                .help("give the folder that it lies in"));
        }
        let diag = Diag::error(format!("there is no folder `{name}`"));
        // `owner/name` is how the hub calls models; anything else is a path.
        let parts: Vec<&str> = name.split('/').collect();
        let hub_name = parts.len() == 2 && parts.iter().all(|p| !p.is_empty() && !p.starts_with('.'));
        Err(if hub_name { diag.help(download(&name)) } else { diag })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The adapter that is merged into what is read.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// `config.json`, in the order of its author.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The first entry of `architectures`, e.g. `OPTForCausalLM`.
    pub fn architecture(&self) -> Option<&str> {
        self.config.get("architectures")?.as_array()?.first()?.as_str()
    }
}

fn download(repository: &str) -> String {
    format!(
        "download the model first, e.g. with `huggingface-cli download {repository} --local-dir FOLDER`, \
         and give that folder"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(path: impl AsRef<Path>) -> String {
        Folder::open(path).unwrap_err().to_string()
    }

    #[test]
    fn config_keeps_its_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), r#"{"z": 1, "architectures": ["A"], "a": 2}"#).unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(folder.config().keys().collect::<Vec<_>>(), ["z", "architectures", "a"]);
        assert_eq!(folder.architecture(), Some("A"));
    }

    #[test]
    fn hub_names_are_to_be_downloaded_first() {
        let expect = "huggingface-cli download facebook/opt-125m --local-dir";
        assert!(message("hf://facebook/opt-125m@main").contains(expect));
        assert!(message("facebook/opt-125m").contains(expect));
        assert!(!message("../no such folder").contains("download"));
    }

    #[test]
    fn broken_folders_say_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(dir.path()).contains("found no `config.json`"));
        std::fs::write(dir.path().join("config.json"), "{\"a\": }").unwrap();
        assert!(message(dir.path()).contains("line 1 column 7"));
        std::fs::write(dir.path().join("config.json"), "[]").unwrap();
        assert!(message(dir.path()).contains("holds no JSON object"));
        assert!(message(dir.path().join("config.json")).contains("is a file"));
    }
}
