//! `dsgc merge`: an adapter and its base model become one model.

use std::path::PathBuf;

use dsgc_hf::{Folder, read_params, save};
use dsgc_ir::Tensor;
use dsgc_ir::diag::Diag;
use dsgc_yaml::load::FolderModel;

use super::Done;
use crate::console::say;
use crate::host::Disk;

/// Arguments of `dsgc merge`.
#[derive(clap::Args)]
pub struct Args {
    /// A folder with an `adapter_config.json`, from a stage with LoRA or from PEFT.
    adapter: PathBuf,
    /// The folder to write: the base model with `W + (alpha / r) B A` in the place of each weight that has factors.
    to: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let (adapter, to) = (args.adapter.display(), args.to.display());
    let folder = Folder::open(&args.adapter)?;
    if folder.adapter().is_none() {
        let diag = Diag::error(format!("found no adapter in `{adapter}`: it has no `adapter_config.json`"));
        return Err(diag.help("a stage with `lora_r` writes one into `adapter` in its folder").into());
    }
    if args.to.exists() {
        let diag = Diag::error(format!("found `{to}`, which is there already"));
        return Err(diag.help("name a folder that is not there yet").into());
    }
    let program = FolderModel::open(&args.adapter, &Disk)?.score(1, 2)?;
    let role = &program.stage.roles[0];
    let params = program.params_of(&role.name);
    let wanted: Vec<(String, Vec<usize>)> =
        params.map(|(id, name)| (name.to_string(), program.state(id).whole_shape())).collect();
    let tensors = read_params(&folder, &role.model.tensors, &wanted)?;
    let named = wanted.into_iter().zip(&tensors).filter_map(|((name, _), tensor)| Some((name, tensor.as_ref()?)));
    let named: Vec<(String, &Tensor)> = named.collect();
    save(&args.to, &role.model, &named, Some(&args.adapter))?;
    say(format!("merged `{adapter}` into its base: `{to}`"));
    Ok(())
}
