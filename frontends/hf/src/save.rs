//! Writing a model folder that transformers opens.
//!
//! A folder with a `config.json` is a whole model: everything is written into a sibling `<name>.saving`, synced, and
//! then moved. A new folder appears in one rename. Where the folder is there already (with logs in it, or an older
//! model), its `config.json` goes first and the new one comes last, so that old and new files never pass for one model.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Model;
use dsgc_ir::{Data, Tensor};
use safetensors::{Dtype, View};
use serde_json::{Map, Value};

use crate::weights::{is_transposed, transposed};
use crate::{Folder, file_error};

/// What makes up a tokenizer, and the settings of generation; those that are there are copied.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// What is written of a parameter: its shape, and its elements when their turn comes.
pub trait Param {
    /// Its dims.
    fn shape(&self) -> &[usize];

    /// Whether it holds floats.
    fn is_float(&self) -> bool;

    /// Its value.
    fn value(&self) -> Cow<'_, Tensor>;
}

impl Param for Tensor {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn is_float(&self) -> bool {
        matches!(self.data, Data::F32(_) | Data::F64(_))
    }

    fn value(&self) -> Cow<'_, Tensor> {
        Cow::Borrowed(self)
    }
}

/// Writes `config.json`, `model.safetensors` (single precision) and the files of the tokenizer in `tokenizer_from`.
///
/// Parameters go under their own names, transposed where the model's rules say so. The `dtype` in `config.json` becomes
/// that of the file, `float32`.
pub fn save<P: Param>(
    path: &Path,
    model: &Model,
    params: &[(String, &P)],
    tokenizer_from: Option<&Path>,
) -> Result<(), Diag> {
    let tensors: Vec<(&str, Stored<P>)> = params
        .iter()
        .map(|&(ref name, param)| Ok((name.as_str(), Stored::new(name, param, model)?)))
        .collect::<Result<_, Diag>>()?;
    write_folder(path, ("config.json", &single_precision(&model.config)), "model.safetensors", tensors, tokenizer_from)
}

/// Writes a folder whose file `config.0` makes it whole.
pub(crate) fn write_folder<N: AsRef<str> + Ord + std::fmt::Display, P: Param>(
    path: &Path,
    config: (&str, &Map<String, Value>),
    weights: &str,
    tensors: Vec<(N, Stored<P>)>,
    tokenizer_from: Option<&Path>,
) -> Result<(), Diag> {
    let tokenizer_from = tokenizer_from.map(|from| Folder::holding("tokenizer.json", from)).transpose()?;
    let staging = sibling(path)?;
    if staging.exists() {
        // Left by a run that was stopped while it saved.
        fs::remove_dir_all(&staging).map_err(|e| file_error("remove", &staging, e))?;
    }
    fs::create_dir_all(&staging).map_err(|e| file_error("create", &staging, e))?;

    let weights = staging.join(weights);
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(about), &weights).map_err(|e| file_error("write", &weights, e))?;
    for name in COMPANIONS {
        let Some(from) = tokenizer_from.as_ref().map(|folder| folder.join(name)).filter(|f| f.is_file()) else {
            continue;
        };
        fs::copy(&from, staging.join(name)).map_err(|e| file_error("copy", &from, e))?;
    }
    let (name, about) = config;
    let config = staging.join(name);
    fs::write(&config, format!("{:#}\n", Value::Object(about.clone()))).map_err(|e| file_error("write", &config, e))?;
    // The writer of weights lets nobody else read them; whoever may read the config may read the weights.
    let permissions = fs::metadata(&config).map_err(|e| file_error("read", &config, e))?.permissions();
    fs::set_permissions(&weights, permissions).map_err(|e| file_error("write", &weights, e))?;
    publish(&staging, path, name)
}

/// Moves the files of `staging` to `path`, that of the name `config` last.
fn publish(staging: &Path, path: &Path, config: &str) -> Result<(), Diag> {
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(staging).map_err(|e| file_error("read", staging, e))? {
        names.push(entry.map_err(|e| file_error("read", staging, e))?.file_name());
    }
    for file in names.iter().map(|n| staging.join(n)) {
        sync(&file)?;
    }
    sync(staging)?;
    if path.exists() {
        let old = path.join(config);
        if old.exists() {
            fs::remove_file(&old).map_err(|e| file_error("replace", &old, e))?;
            sync(path)?;
        }
        names.sort_by_key(|n| n == config);
        for name in &names {
            let to = path.join(name);
            fs::rename(staging.join(name), &to).map_err(|e| file_error("write", &to, e))?;
        }
        sync(path)?;
        fs::remove_dir(staging).map_err(|e| file_error("remove", staging, e))?;
    } else {
        fs::rename(staging, path).map_err(|e| file_error("create", path, e))?;
    }
    path.parent().filter(|p| !p.as_os_str().is_empty()).map_or(Ok(()), sync)
}

/// Waits until a file's bytes, or a folder's entries, are on the disk.
fn sync(path: &Path) -> Result<(), Diag> {
    // Windows opens no folders; its renames need no such sync.
    if cfg!(windows) && path.is_dir() {
        return Ok(());
    }
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| file_error("write", path, e))
}

/// `<path>.saving`, on the same file system because it lies beside it.
fn sibling(path: &Path) -> Result<PathBuf, Diag> {
    let Some(name) = path.file_name() else {
        return Err(Diag::error(format!(
            "cannot write a model to `{}`, expected the name of a folder",
            path.display()
        )));
    };
    let mut name = name.to_owned();
    name.push(".saving");
    Ok(path.with_file_name(name))
}

/// The `config.json` of a model in single precision.
fn single_precision(config: &Map<String, Value>) -> Map<String, Value> {
    let mut config = config.clone();
    // transformers 5 says `dtype`, 4 said `torch_dtype`; both load the weights in it.
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key) {
            *value = Value::from("float32");
        }
    }
    config
}

/// A parameter as it lies in the file.
pub(crate) struct Stored<'a, P> {
    param: &'a P,
    shape: Vec<usize>,
    transpose: bool,
}

impl<'a, P: Param> Stored<'a, P> {
    pub fn new(name: &str, param: &'a P, model: &Model) -> Result<Stored<'a, P>, Diag> {
        if !param.is_float() {
            return Err(Diag::error(format!("parameter `{name}` holds no floats, expected f32")));
        }
        let transpose = is_transposed(&model.tensors, name);
        if transpose && param.shape().len() != 2 {
            return Err(Diag::error(format!(
                "parameter `{name}` of shape {:?} is no matrix, but stands under `transpose`",
                param.shape()
            )));
        }
        let mut shape = param.shape().to_vec();
        if transpose {
            shape.reverse();
        }
        Ok(Stored { param, shape, transpose })
    }
}

impl<P: Param> View for Stored<'_, P> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let value = self.param.value();
        let floats: Cow<[f32]> = match &value.data {
            Data::F32(v) => Cow::Borrowed(v),
            Data::F64(v) => v.iter().map(|&x| x as f32).collect(),
            Data::I32(_) | Data::Bool(_) | Data::Key(_) => unreachable!("`Stored::new` takes floats only"),
        };
        let floats = if self.transpose { transposed(&floats, self.shape[1], self.shape[0]).into() } else { floats };
        let mut bytes = Vec::with_capacity(self.data_len());
        floats.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read_params;

    fn model() -> Model {
        let Value::Object(config) = serde_json::json!({"model_type": "x", "dtype": "bfloat16", "a": [1]}) else {
            panic!()
        };
        let mut model = Model { config, ..Model::default() };
        model.tensors.transpose = vec!["*.fc.weight".to_owned()];
        model
    }

    fn params() -> Vec<Tensor> {
        vec![Tensor::f32(&[2, 3], vec![0., 1., 2., 3., 4., 5.]), Tensor::f64(&[2], vec![6., 7.])]
    }

    fn names(params: &[Tensor]) -> Vec<(String, &Tensor)> {
        vec![("h.fc.weight".to_owned(), &params[0]), ("h.fc.bias".to_owned(), &params[1])]
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let (dir, params) = (tempfile::tempdir().unwrap(), params());
        let (path, from) = (dir.path().join("out"), dir.path().join("tok"));
        fs::create_dir(&from).unwrap();
        fs::write(from.join("merges.txt"), "a b").unwrap();
        fs::create_dir(dir.path().join("out.saving")).unwrap();
        save(&path, &model(), &names(&params), Some(&from)).unwrap();

        let folder = Folder::open(&path).unwrap();
        assert_eq!(folder.config()["dtype"], "float32");
        assert_eq!(folder.config().keys().collect::<Vec<_>>(), ["model_type", "dtype", "a"]);
        assert_eq!(fs::read_to_string(path.join("merges.txt")).unwrap(), "a b");
        assert!(!dir.path().join("out.saving").exists());
        let bytes = fs::read(path.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("h.fc.weight").unwrap().shape(), [3, 2]);
        assert_eq!(file.tensor("h.fc.weight").unwrap().data()[4..8], 3f32.to_le_bytes());

        let wanted = [("h.fc.bias".to_owned(), vec![2]), ("h.fc.weight".to_owned(), vec![2, 3])];
        let read = read_params(&folder, &model().tensors, &wanted).unwrap();
        assert_eq!(read, [Some(params[1].clone().single()), Some(params[0].clone())]);
    }

    #[test]
    fn a_folder_that_is_there_keeps_its_other_files() {
        let (dir, params) = (tempfile::tempdir().unwrap(), params());
        fs::write(dir.path().join("config.json"), "old").unwrap();
        fs::write(dir.path().join("log.jsonl"), "{}").unwrap();
        save(dir.path(), &model(), &names(&params), None).unwrap();
        assert!(Folder::open(dir.path()).is_ok());
        assert!(dir.path().join("log.jsonl").exists());
    }

    #[test]
    fn only_floats_are_parameters() {
        let (dir, ids) = (tempfile::tempdir().unwrap(), Tensor::i32(&[1], vec![1]));
        let error = save(&dir.path().join("out"), &model(), &[("p".to_owned(), &ids)], None).unwrap_err();
        assert_eq!(error.message, "parameter `p` holds no floats, expected f32");
        assert!(!dir.path().join("out").exists());
    }
}
