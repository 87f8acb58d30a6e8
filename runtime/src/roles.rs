//! The models of a stage: where their weights come from, and where they go.

use std::path::{Path, PathBuf};

use dsgc_hf::{Folder, read_params, save};
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Origin, Role, Stage};
use dsgc_ir::{Bindings, Program, StateId, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::random::Key;

use crate::calls::graph_named;
use crate::session::{Event, Observer};

/// The key of a stage, from which all its random numbers come.
pub(crate) fn key_of(stage: &Stage) -> Key {
    [(stage.seed >> 32) as u32, stage.seed as u32]
}

/// Puts the weights of all roles into the device.
pub(crate) fn load(program: &Program, device: &mut dyn Device, observer: Observer) -> Result<(), Vec<Diag>> {
    let stage = &program.stage;
    let mut errors: Vec<Diag> = stage.roles.iter().filter_map(|role| overwritten(stage, role)).collect();
    let order = in_order(&stage.roles).map_err(|e| vec![e])?;
    for role in order {
        match load_role(program, device, role) {
            Ok(new) if new.is_empty() => {}
            Ok(params) => observer(&Event::New { role: role.name.clone(), params }).map_err(|e| vec![e])?,
            Err(mut found) => errors.append(&mut found),
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// The roles, each after the one that it is a snapshot of.
fn in_order(roles: &[Role]) -> Result<Vec<&Role>, Diag> {
    let (mut done, mut left): (Vec<&Role>, Vec<&Role>) = (Vec::new(), roles.iter().collect());
    while !left.is_empty() {
        let (ready, rest): (Vec<&Role>, Vec<&Role>) = left.iter().partition(|role| match &role.origin {
            Origin::Snapshot(of) => done.iter().any(|d| d.name == *of),
            _ => true,
        });
        if ready.is_empty() {
            let names: Vec<String> = rest.iter().map(|role| format!("`{}`", role.name)).collect();
            let message = format!("found snapshots of one another or of no role: {}", names.join(", "));
            return Err(Diag::error(message).help("one of them needs weights of its own"));
        }
        done.extend(ready);
        left = rest;
    }
    Ok(done)
}

/// Puts a role's weights into the device; gives the parameters that begin anew.
fn load_role(program: &Program, device: &mut dyn Device, role: &Role) -> Result<Vec<String>, Vec<Diag>> {
    let folder = match &role.origin {
        Origin::Random => return init(program, device, role).map(|()| Vec::new()).map_err(|e| vec![e]),
        Origin::Snapshot(of) => return snapshot(program, device, role, of).map(|()| Vec::new()),
        Origin::Folder(folder) => folder,
        Origin::Stage(folder) if Path::new(folder).join("config.json").is_file() => folder,
        Origin::Stage(folder) => {
            let diag = Diag::error(format!("found no model in `{folder}`, which an earlier stage writes"));
            return Err(vec![diag.help("run the whole pipeline, or that stage first with `--stage`")]);
        }
    };
    load_folder(program, device, role, Path::new(folder))
}

/// Runs the graph that draws a role's parameters.
fn init(program: &Program, device: &mut dyn Device, role: &Role) -> Result<(), Diag> {
    let key = Tensor::key(key_of(&program.stage));
    let graph = graph_named(program, &role.init);
    let inputs: Vec<(&str, &Tensor)> = graph.inputs().map(|input| (graph.name_of(input), &key)).collect();
    device.run(&role.init, &inputs).map(drop)
}

/// Copies the parameters of another role, by their Hugging Face names; those that the two share are there already.
fn snapshot(program: &Program, device: &mut dyn Device, role: &Role, of: &str) -> Result<(), Vec<Diag>> {
    let mut errors = Vec::new();
    for (id, name) in program.params_of(&role.name) {
        let from = program.param(of, name);
        match from.filter(|&from| program.state(from).ty == program.state(id).ty) {
            Some(from) => device.set_state(id, &device.state(from)),
            None => errors.push(Diag::error(format!(
                "`{}` is a snapshot of `{of}`, which has no parameter `{name}` of {}",
                role.name,
                program.state(id).ty
            ))),
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Puts the weights of a Hugging Face folder into the parameters of a role; gives those that the folder may lack and
/// does, which begin as the role's graph `init` says.
pub(crate) fn load_folder(
    program: &Program,
    device: &mut dyn Device,
    role: &Role,
    folder: &Path,
) -> Result<Vec<String>, Vec<Diag>> {
    let folder = Folder::open(folder).map_err(|e| vec![e])?;
    let (ids, wanted): (Vec<StateId>, Vec<(String, Vec<usize>)>) = program
        .params_of(&role.name)
        .map(|(id, name)| {
            let shape = program.state(id).ty.shape(&Bindings::new()).expect("states have constant dims");
            (id, (name.to_string(), shape))
        })
        .unzip();
    let tensors = read_params(&folder, &role.model.tensors, &wanted)?;
    let new: Vec<String> =
        wanted.iter().zip(&tensors).filter(|(_, t)| t.is_none()).map(|((name, _), _)| name.clone()).collect();
    if !new.is_empty() {
        // It draws all of them, also those that the folder has.
        init(program, device, role).map_err(|e| vec![e])?;
    }
    for (id, tensor) in ids.into_iter().zip(tensors) {
        if let Some(tensor) = tensor {
            device.set_state(id, &tensor);
        }
    }
    Ok(new)
}

/// Writes the models that a stage leaves, as Hugging Face folders.
pub(crate) fn save_all(program: &Program, device: &dyn Device, observer: Observer) -> Result<(), Diag> {
    let stage = &program.stage;
    for name in &stage.save {
        let role = stage.roles.iter().find(|r| r.name == *name).expect("the loader saw the role");
        let folder = result_folder(stage, name);
        let params: Vec<(String, Tensor)> =
            program.all_params_of(name).into_iter().map(|(id, param)| (param, device.state(id).single())).collect();
        if let Some((param, _)) = params.iter().find(|(_, t)| t.to_f64().iter().any(|x| !x.is_finite())) {
            let message = format!("`{param}` is not finite after the stage `{}`: nothing is written", stage.name);
            return Err(Diag::error(message).help("a smaller `learning_rate` usually keeps it finite"));
        }
        let params: Vec<(String, &Tensor)> = params.iter().map(|(n, t)| (n.clone(), t)).collect();
        save(&folder, &role.model, &params, role.tokenizer.as_deref().map(Path::new))?;
        observer(&Event::Saved { role: name.clone(), folder })?;
    }
    Ok(())
}

/// Where a stage writes the model of a role.
fn result_folder(stage: &Stage, role: &str) -> PathBuf {
    match stage.save.len() {
        1 => PathBuf::from(&stage.output_dir),
        _ => Path::new(&stage.output_dir).join(role),
    }
}

/// What is wrong if a stage would write over the user's model that a role begins with.
fn overwritten(stage: &Stage, role: &Role) -> Option<Diag> {
    let Origin::Folder(folder) = &role.origin else { return None };
    let model = Path::new(folder).canonicalize().ok()?;
    let saved = stage.save.iter().map(|name| result_folder(stage, name));
    let result = saved.into_iter().find(|result| result.canonicalize().is_ok_and(|r| r == model))?;
    let message =
        format!("`{}` would be overwritten by the stage `{}`, which begins with it", result.display(), stage.name);
    Some(Diag::error(message).help("set another `output_dir`"))
}
