//! Reading parameters from `model.safetensors` or its shards.
//!
//! Every tensor of the files must find its place (unless it is one of `may_be_left`) and every parameter its tensor
//! (unless it is one of `may_be_new`). A name in a file is taken through these steps, and the first name that is known
//! decides:
//!
//! 1. each of `strip_prefixes` is taken off, in their order, and last the name is taken as it is (so that what
//!    [`crate::save`] wrote is always read back);
//! 2. where `add_prefix` names the folder's architecture, that is put before it; the plain form is tried after it,
//!    for heads that do not lie inside the base model;
//! 3. where a prefix was taken off, any of those in `add_prefix` is tried last: who wraps a base model in another one,
//!    as DeepSpeed-Chat does in its `rwtransformer`, keeps the architecture of the whole in `config.json`;
//! 4. it is then a parameter, another name of one (`also_called`), to be left (`may_be_left`), a repetition
//!    (`may_repeat`), or not ours (`skip`).
//!
//! Files are mapped into memory and read one tensor at a time, and let go of, so no more than one is held twice.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use dsgc_ir::Tensor;
use dsgc_ir::diag::{Diag, nearest};
use dsgc_ir::stage::{TensorRules, glob};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::{Folder, file_error, read_object};

/// Reads the parameters `wanted` (name and shape) in that order, as single-precision floats: `None` for those that the
/// files lack and `may_be_new` allows to begin otherwise. Factors of an adapter are merged into them.
///
/// A missing, surplus, mis-shaped or doubled tensor is an error, and all such errors come at once.
pub fn read_params(
    folder: &Folder,
    rules: &TensorRules,
    wanted: &[(String, Vec<usize>)],
) -> Result<Vec<Option<Tensor>>, Vec<Diag>> {
    let files = ParamFiles::open(folder).map_err(|e| vec![e])?;
    let found = files.find(rules, wanted)?;
    let mut params: Vec<Option<Tensor>> = (0..wanted.len()).map(|at| found.read(at)).collect();
    if let Some(adapter) = folder.adapter() {
        adapter.merge_into(&Places::new(folder, rules, wanted), wanted, &mut params)?;
    }
    Ok(params)
}

/// The files of a folder's weights, mapped into memory.
pub struct ParamFiles<'a> {
    folder: &'a Folder,
    files: Vec<(String, Mmap)>,
}

/// Parameters that were found in files and can be read one by one.
pub struct FoundParams<'a> {
    rules: &'a TensorRules,
    wanted: &'a [(String, Vec<usize>)],
    found: Vec<Option<(Found<'a>, &'a Mmap)>>,
}

impl FoundParams<'_> {
    /// A parameter by its place in what was wanted, as [`read_params`] gives it but without an adapter.
    pub fn read(&self, at: usize) -> Option<Tensor> {
        let (name, shape) = &self.wanted[at];
        let (tensor, map) = self.found[at].as_ref()?;
        let read = tensor.read(name, shape, is_transposed(self.rules, name));
        forget(map, tensor.view.data());
        Some(read.unwrap_or_else(|e| panic!("bug: what was checked cannot be read: {}", e.message)))
    }

    /// Whether the files have a parameter.
    pub fn has(&self, at: usize) -> bool {
        self.found[at].is_some()
    }
}

impl<'f> ParamFiles<'f> {
    /// Maps the files.
    pub fn open(folder: &'f Folder) -> Result<ParamFiles<'f>, Diag> {
        Ok(ParamFiles { folder, files: open_files(folder)? })
    }

    /// Finds and checks the parameters; errors as those of [`read_params`].
    pub fn find<'a>(
        &'a self,
        rules: &'a TensorRules,
        wanted: &'a [(String, Vec<usize>)],
    ) -> Result<FoundParams<'a>, Vec<Diag>> {
        find(self.folder, &self.files, rules, wanted)
    }
}

fn find<'a>(
    folder: &'a Folder,
    files: &'a [(String, Mmap)],
    rules: &'a TensorRules,
    wanted: &'a [(String, Vec<usize>)],
) -> Result<FoundParams<'a>, Vec<Diag>> {
    let places = Places::new(folder, rules, wanted);
    let mut found: Vec<Option<(Found, &Mmap)>> = wanted.iter().map(|_| None).collect();
    let (mut repeats, mut surplus, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for (file, map) in files {
        let tensors = parse(folder.path(), file, map).map_err(|e| vec![e])?;
        let mut tensors = tensors.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, view) in tensors {
            let tensor = Found { name, file, view };
            match places.of(&tensor.name) {
                Some(Place::Param(at)) => match &found[at] {
                    Some((first, _)) => errors.push(
                        Diag::error(format!(
                            "tensors `{}` in `{}` and `{}` in `{file}` are both parameter `{}`, expected one",
                            first.name, first.file, tensor.name, wanted[at].0
                        ))
                        .help("take one of them out of the file"),
                    ),
                    None => found[at] = Some((tensor, map)),
                },
                Some(Place::Repeats(of)) => repeats.push((tensor, of)),
                Some(Place::Skipped) => {}
                None => surplus.push(tensor),
            }
        }
    }

    let may_be_new = |name: &str| rules.may_be_new.iter().any(|pattern| glob(pattern, name));
    let lacking = wanted.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(w, _)| w.0.as_str());
    let missing: Vec<&str> = lacking.filter(|name| !may_be_new(name)).collect();
    for (name, shape) in wanted.iter().filter(|w| missing.contains(&w.0.as_str())) {
        let diag = Diag::error(format!("found no tensor for parameter `{name}`, expected one of shape {shape:?}"));
        let near = nearest(name, surplus.iter().map(|t| t.name.as_str()));
        errors.push(match near.and_then(|n| surplus.iter().find(|t| t.name == n)) {
            Some(t) => diag.help(format!("the nearest name is `{}` in `{}`", t.name, t.file)),
            None => diag.help(format!("is `{}` the folder of this model?", folder.path().display())),
        });
    }
    for tensor in &surplus {
        let diag = Diag::error(format!("tensor `{}` in `{}` belongs to no parameter", tensor.name, tensor.file));
        errors.push(match nearest(&tensor.name, missing.iter().copied()) {
            Some(near) => diag.help(format!("the nearest parameter without a tensor is `{near}`")),
            None => diag.help("if it is not needed, name it under `skip` of the model's `from_hf.tensors`"),
        });
    }

    for ((name, shape), tensor) in wanted.iter().zip(&found) {
        let checked = tensor.as_ref().map(|(tensor, _)| tensor.check(name, shape, is_transposed(rules, name)));
        errors.extend(checked.and_then(Result::err));
    }
    for (tensor, of) in repeats {
        // A repetition of something that is not read, or that has failed already, proves nothing.
        let first = wanted.iter().position(|w| w.0 == of).and_then(|at| found[at].as_ref());
        let Some((first, _)) = first else { continue };
        let same_shape = first.view.shape() == tensor.view.shape();
        if !(same_shape && first.floats().is_ok_and(|f| tensor.floats().is_ok_and(|t| f == t))) {
            errors.push(
                Diag::error(format!(
                    "tensor `{}` in `{}` differs from `{of}`, expected a copy of it",
                    tensor.name, tensor.file
                ))
                .help(
                    "this model ties the two: say `\"tie_word_embeddings\": false` in `config.json` if yours does not",
                ),
            );
        }
    }
    if errors.is_empty() { Ok(FoundParams { rules, wanted, found }) } else { Err(errors) }
}

/// Gives the memory of a part of a file that was read back to the system, so that it is not held beside what was made of
/// it. It is read again if it must be.
fn forget(map: &Mmap, part: &[u8]) {
    #[cfg(unix)]
    {
        let start = part.as_ptr() as usize - map.as_ptr() as usize;
        // SAFETY: pages of a file that are given back come back with the bytes of the file.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, part.len()) };
        // A system that does not know of it keeps them.
        drop(advised);
    }
    #[cfg(not(unix))]
    let _ = (map, part);
}

/// Whether files have this parameter transposed.
pub(crate) fn is_transposed(rules: &TensorRules, name: &str) -> bool {
    rules.transpose.iter().any(|pattern| glob(pattern, name))
}

/// The transpose of a row-major matrix.
pub(crate) fn transposed<T: Copy>(data: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| data[r * columns + c])).collect()
}

/// A tensor in a file.
pub(crate) struct Found<'a> {
    pub name: String,
    pub file: &'a str,
    pub view: TensorView<'a>,
}

impl Found<'_> {
    /// The elements as they lie in the file.
    fn floats(&self) -> Result<Vec<f32>, Diag> {
        fn each<const N: usize>(bytes: &[u8], one: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<N>().0.iter().map(|b| one(*b)).collect()
        }
        let bytes = self.view.data();
        match self.view.dtype() {
            Dtype::F32 => Ok(each(bytes, f32::from_le_bytes)),
            Dtype::F64 => Ok(each(bytes, |b| f64::from_le_bytes(b) as f32)),
            Dtype::F16 => Ok(each(bytes, |b| half::f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Ok(each(bytes, |b| half::bf16::from_le_bytes(b).to_f32())),
            _ => Err(self.no_floats()),
        }
    }

    /// What is wrong with it as the parameter `name` of this shape.
    fn check(&self, name: &str, shape: &[usize], transpose: bool) -> Result<(), Diag> {
        let stored: Vec<usize> = if transpose { shape.iter().rev().copied().collect() } else { shape.to_vec() };
        if self.view.shape() != stored {
            let diag = Diag::error(format!(
                "tensor `{}` in `{}` has shape {:?}, expected {stored:?} for parameter `{name}`",
                self.name,
                self.file,
                self.view.shape()
            ));
            let turned = self.view.shape().iter().rev().eq(&stored) && shape.len() == 2;
            return Err(if turned {
                diag.help("it is the other way round: see `transpose` of the model's `from_hf.tensors`")
            } else {
                diag
            });
        }
        if !matches!(self.view.dtype(), Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::BF16) {
            return Err(self.no_floats());
        }
        if transpose && shape.len() != 2 {
            let message = format!("parameter `{name}` of shape {shape:?} is no matrix, but stands under `transpose`");
            return Err(Diag::error(message));
        }
        Ok(())
    }

    fn no_floats(&self) -> Diag {
        Diag::error(format!(
            "tensor `{}` in `{}` has elements of type {:?}, expected F32, F64, F16 or BF16",
            self.name,
            self.file,
            self.view.dtype()
        ))
        .help("quantised files cannot be trained: take the model's original weights")
    }

    /// The parameter `name` of this shape.
    pub fn read(&self, name: &str, shape: &[usize], transpose: bool) -> Result<Tensor, Diag> {
        self.check(name, shape, transpose)?;
        let floats = self.floats()?;
        match (transpose, shape) {
            (true, &[rows, columns]) => Ok(Tensor::f32(shape, transposed(&floats, columns, rows))),
            _ => Ok(Tensor::f32(shape, floats)),
        }
    }
}

/// What becomes of a tensor.
pub(crate) enum Place<'a> {
    /// It is the parameter of this index.
    Param(usize),
    /// It repeats this parameter.
    Repeats(&'a str),
    /// It is not read.
    Skipped,
}

/// Finds the place of a name in a file.
pub(crate) struct Places<'a> {
    pub rules: &'a TensorRules,
    add_prefix: Option<&'a str>,
    params: BTreeMap<&'a str, usize>,
    /// Another name, which may be a glob, and the parameter's.
    aliases: Vec<(&'a str, &'a str)>,
}

impl<'a> Places<'a> {
    fn new(folder: &Folder, rules: &'a TensorRules, wanted: &'a [(String, Vec<usize>)]) -> Places<'a> {
        let params = wanted.iter().enumerate().map(|(at, (name, _))| (name.as_str(), at)).collect();
        let also_called = rules.also_called.iter();
        let aliases = also_called.flat_map(|(name, others)| others.iter().map(|o| (o.as_str(), name.as_str())));
        let add_prefix = folder.architecture().and_then(|a| rules.add_prefix.get(a)).map(String::as_str);
        Places { rules, add_prefix, params, aliases: aliases.collect() }
    }

    pub fn of(&self, name: &str) -> Option<Place<'a>> {
        let prefixes = self.rules.strip_prefixes.iter().map(String::as_str).chain([""]);
        let stripped: Vec<&str> = prefixes.filter_map(|p| name.strip_prefix(p)).collect();
        let plain = (stripped.iter())
            .flat_map(|n| self.add_prefix.map(|p| format!("{p}{n}")).into_iter().chain([(*n).to_owned()]));
        let wrapped = (stripped.iter().filter(|n| **n != name))
            .flat_map(|n| self.rules.add_prefix.values().map(move |p| format!("{p}{n}")));
        plain.chain(wrapped).find_map(|n| self.known(&n))
    }

    fn known(&self, name: &str) -> Option<Place<'a>> {
        if let Some(&at) = self.params.get(name) {
            return Some(Place::Param(at));
        }
        let mut called = self.aliases.iter().filter_map(|(other, param)| renamed(name, other, param));
        if let Some(&at) = called.find_map(|param| self.params.get(param.as_str())) {
            return Some(Place::Param(at));
        }
        let named = |patterns: &[String]| patterns.iter().any(|pattern| glob(pattern, name));
        // What nothing here reads need not be a copy either.
        if named(&self.rules.may_be_left) {
            return Some(Place::Skipped);
        }
        if let Some(of) = self.rules.may_repeat.get(name) {
            return Some(Place::Repeats(of));
        }
        named(&self.rules.skip).then_some(Place::Skipped)
    }
}

/// The name that `to` makes of one that matches `from`: what each `*` stands for is put in the place of the other's.
fn renamed(name: &str, from: &str, to: &str) -> Option<String> {
    let Some((head, rest)) = from.split_once('*') else { return (name == from).then(|| to.to_owned()) };
    let tail = name.strip_prefix(head)?;
    let (before, after) = to.split_once('*')?;
    let ends = tail.char_indices().map(|(i, _)| i).chain([tail.len()]);
    ends.filter_map(|end| Some(format!("{before}{}{}", &tail[..end], renamed(&tail[end..], rest, after)?))).next()
}

/// The files that hold the folder's weights, mapped.
fn open_files(folder: &Folder) -> Result<Vec<(String, Mmap)>, Diag> {
    let path = folder.path();
    let names: Vec<String> = if path.join("model.safetensors").is_file() {
        vec!["model.safetensors".to_owned()]
    } else if let Some(index) = read_object(&path.join("model.safetensors.index.json"))? {
        let shards = index.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| {
            Diag::error(
                "found no `weight_map` in `model.safetensors.index.json`, expected tensor names with their files",
            )
        })?;
        let mut names: Vec<String> = shards.values().filter_map(|f| f.as_str()).map(str::to_owned).collect();
        names.sort();
        names.dedup();
        names
    } else {
        return Err(no_weights(path));
    };
    // The listed names are file names; with a separator they would lead out of the folder.
    if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
        return Err(Diag::error(format!(
            "`model.safetensors.index.json` names the shard `{name}`, expected a file name"
        )));
    }
    names.into_iter().map(|name| map(&path.join(&name)).map(|m| (name, m))).collect()
}

pub(crate) fn map(path: &Path) -> Result<Mmap, Diag> {
    let file = File::open(path).map_err(|e| file_error("open", path, e))?;
    // SAFETY: the map is only read. A file that somebody shortens meanwhile ends the process, as it would end any
    // other reader of safetensors; no result can come of it.
    unsafe { Mmap::map(&file) }.map_err(|e| file_error("read", path, e))
}

pub(crate) fn parse<'a>(folder: &Path, file: &str, map: &'a Mmap) -> Result<SafeTensors<'a>, Diag> {
    SafeTensors::deserialize(map).map_err(|e| {
        file_error("read", &folder.join(file), e).help("the file is not whole: download or write it again")
    })
}

fn no_weights(path: &Path) -> Diag {
    let diag = Diag::error(format!("found no `model.safetensors` in `{}`", path.display()));
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|f| path.join(f).is_file());
    match pickled {
        Some(file) => diag
            .help(format!(
            "`{file}` is a pickle, which can run code and is not read: convert it with \
             `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)`"
        ))
        .help(
            "a reward model of DeepSpeed-Chat is converted with `safetensors.torch.save_file({k: v.clone() for k, v in \
             torch.load(file, weights_only=True).items()}, \"model.safetensors\")`",
        ),
        None => {
            diag.help("give a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards")
        }
    }
}

#[cfg(test)]
#[path = "weights_tests.rs"]
mod tests;
