//! The models of a stage: where their weights come from, and where they go.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dsgc_hf::{AdapterConfig, Folder, Param, ParamFiles, merge, read_params, save, save_adapter};
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Adapter, Lora, LoraSave, Origin, Role, Stage};
use dsgc_ir::{Data, Program, StateId, Tensor};
use dsgc_kernels::random::Key;

use crate::calls::graph_named;
use crate::rank::{Rank, Wholes};
use crate::session::{Event, Observer};

/// The key of a stage, from which all its random numbers come.
pub(crate) fn key_of(stage: &Stage) -> Key {
    [(stage.seed >> 32) as u32, stage.seed as u32]
}

/// Puts the weights of all roles into a rank's device.
pub(crate) fn load(program: &Program, rank: &mut Rank, observer: Observer) -> Result<(), Vec<Diag>> {
    let stage = &program.stage;
    let mut errors: Vec<Diag> = stage.roles.iter().filter_map(|role| overwritten(stage, role)).collect();
    let order = in_order(&stage.roles).map_err(|e| vec![e])?;
    for role in order {
        let loaded = load_role(program, rank, role).and_then(|new| {
            begin_factors(program, rank, role)?;
            Ok(new)
        });
        match loaded {
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
fn load_role(program: &Program, rank: &mut Rank, role: &Role) -> Result<Vec<String>, Vec<Diag>> {
    let folder = match &role.origin {
        Origin::Random => return init(program, rank, role).map(|()| Vec::new()).map_err(|e| vec![e]),
        Origin::Snapshot(of) => return snapshot(program, rank, role, of).map(|()| Vec::new()),
        Origin::Folder(folder) => folder,
        Origin::Stage(folder) if CONFIGS.iter().any(|name| Path::new(folder).join(name).is_file()) => folder,
        Origin::Stage(folder) => {
            let diag = Diag::error(format!("found no model in `{folder}`, which an earlier stage writes"));
            return Err(vec![diag.help("run the whole pipeline, or that stage first with `--stage`")]);
        }
    };
    let folder = begins_at(&program.stage, role, folder).map_err(|e| vec![e])?;
    load_folder(program, rank, role, &folder)
}

/// The folder that a role begins with: the model's, or where its adapter is trained further, that of the adapter.
fn begins_at(stage: &Stage, role: &Role, folder: &str) -> Result<PathBuf, Diag> {
    let Some((lora, _)) = lora_of(stage, &role.name).filter(|(lora, _)| lora.continues) else {
        return Ok(folder.into());
    };
    let own = [PathBuf::from(folder), Path::new(folder).join("adapter")];
    own.into_iter().find(|folder| folder.join(ADAPTER).is_file()).ok_or_else(|| {
        Diag::error(format!(
            "found no adapter in `{folder}` or `{folder}/adapter`, whose training `lora_continue` goes on with"
        ))
        .label(lora.span, "LoRA is asked for here")
        .help("name the folder of an adapter, or a stage with `lora_save: adapter` or `both`")
    })
}

/// What makes a folder that of a model, or of an adapter to one.
const CONFIGS: [&str; 2] = ["config.json", ADAPTER];

/// What makes a folder that of an adapter.
const ADAPTER: &str = "adapter_config.json";

/// Runs the graph that draws a role's parameters.
fn init(program: &Program, rank: &mut Rank, role: &Role) -> Result<(), Diag> {
    draw(program, rank, &role.init)
}

/// Runs a graph whose only input is the stage's key.
fn draw(program: &Program, rank: &mut Rank, graph: &str) -> Result<(), Diag> {
    let key = Tensor::key(key_of(&program.stage));
    let graph = graph_named(program, graph);
    let inputs: Vec<(&str, &Tensor)> = graph.inputs().map(|input| (graph.name_of(input), &key)).collect();
    rank.device.run(&graph.name, &inputs).map(drop)
}

/// Draws the low-rank factors of a role that has some, or reads those of an adapter. An adapter that is to be written must
/// have a base that others can load.
fn begin_factors(program: &Program, rank: &mut Rank, role: &Role) -> Result<(), Vec<Diag>> {
    let Some((lora, adapter)) = lora_of(&program.stage, &role.name) else { return Ok(()) };
    if lora.continues {
        return read_factors(program, rank, role, lora, adapter);
    }
    let checked = base_is_loadable(&program.stage, role, lora).and_then(|()| draw(program, rank, &adapter.init));
    checked.map_err(|e| vec![e])
}

/// Reads the factors of the adapter that a role begins with, and what was trained beside them.
fn read_factors(
    program: &Program,
    rank: &mut Rank,
    role: &Role,
    lora: &Lora,
    adapter: &Adapter,
) -> Result<(), Vec<Diag>> {
    let base = base_of(&program.stage, role).expect("the loader lets no adapter of random weights be trained further");
    let folder = begins_at(&program.stage, role, base).and_then(Folder::open).map_err(|e| vec![e])?;
    let found = folder.adapter().expect("`begins_at` looked");
    let factors = adapter.modules.iter().flat_map(|module| Adapter::factors(module));
    let own =
        |name: &str| program.param(&role.name, name).unwrap_or_else(|| panic!("bug: there is no parameter `{name}`"));
    let (ids, wanted): (Vec<StateId>, Vec<(String, Vec<usize>)>) = factors
        .chain(adapter.whole.iter().cloned())
        .map(|name| (own(&name), (name.clone(), program.state(own(&name)).whole_shape())))
        .unzip();
    let tensors = found.read((lora.r, lora.alpha), &role.model.tensors, &wanted);
    let tensors = tensors.map_err(|errors| {
        errors.into_iter().map(|error| error.label(lora.span, "LoRA is asked for here")).collect::<Vec<_>>()
    })?;
    ids.iter().zip(&tensors).for_each(|(&id, tensor)| rank.set(program, id, tensor));
    Ok(())
}

fn base_is_loadable(stage: &Stage, role: &Role, lora: &Lora) -> Result<(), Diag> {
    if let (Some(base), LoraSave::Adapter | LoraSave::Both) = (base_of(stage, role), lora.save)
        && Folder::open(base)?.adapter().is_some()
    {
        let message = format!("the adapter of `{}` would have another adapter as its base, `{base}`", role.name);
        let diag = Diag::error(message).label(lora.span, "LoRA is asked for here");
        return Err(
            diag.help("nobody could load it: write `lora_save: merged`, or `lora_continue: true` to train that one")
        );
    }
    Ok(())
}

/// The folder that a role's model comes from, if it comes from one.
fn base_of<'a>(stage: &'a Stage, role: &'a Role) -> Option<&'a str> {
    match &role.origin {
        Origin::Random => None,
        Origin::Folder(folder) | Origin::Stage(folder) => Some(folder),
        Origin::Snapshot(of) => base_of(stage, stage.roles.iter().find(|r| r.name == *of)?),
    }
}

/// How a role is trained by LoRA, if it is.
fn lora_of<'a>(stage: &'a Stage, role: &str) -> Option<(&'a Lora, &'a Adapter)> {
    let lora = stage.trainings.iter().find(|t| t.role == role)?.lora.as_ref()?;
    Some((lora, lora.adapter.as_ref().expect("the passes filled it in")))
}

/// The factor on the product of a weight's low-rank factors, and their names, if it has some.
fn factors_of(lora: &Lora, adapter: &Adapter, weight: &str) -> Option<(f64, [String; 2])> {
    let module = adapter.modules.iter().find(|module| weight.strip_suffix(".weight") == Some(module.as_str()))?;
    Some((lora.alpha / lora.r as f64, Adapter::factors(module)))
}

/// The parameters of a role's model, `(id, Hugging Face name)`, with those that it shares and without factors.
fn params_of(program: &Program, role: &str) -> Vec<(StateId, String)> {
    let modules = lora_of(&program.stage, role).map_or(&[][..], |(_, adapter)| &adapter.modules[..]);
    let factors: BTreeSet<String> = modules.iter().flat_map(|module| Adapter::factors(module)).collect();
    program.all_params_of(role).into_iter().filter(|(_, name)| !factors.contains(name)).collect()
}

/// Copies the parameters of another role, by their Hugging Face names; those that the two share are there already. Weights with
/// factors that are not zero at first are copied with them merged in.
fn snapshot(program: &Program, rank: &mut Rank, role: &Role, of: &str) -> Result<(), Vec<Diag>> {
    let mut errors = Vec::new();
    let continued = lora_of(&program.stage, of).filter(|(lora, _)| lora.continues);
    for (id, name) in program.params_of(&role.name) {
        let from = program.param(of, name);
        let factors = continued.and_then(|(lora, adapter)| factors_of(lora, adapter, name));
        match from.filter(|&from| program.state(from).whole_dims() == program.state(id).whole_dims()) {
            Some(from) => {
                let whole = |id: StateId| rank.get(program, id).map_err(|e| vec![e]);
                let mut value = whole(from)?;
                if let Some((scale, names)) = factors {
                    let [a, b] = names.map(|name| program.param(of, &name).expect("the pass `adapt` declared it"));
                    value = merge(&value, [&whole(a)?, &whole(b)?], scale);
                }
                rank.set(program, id, &value);
            }
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
    rank: &mut Rank,
    role: &Role,
    folder: &Path,
) -> Result<Vec<String>, Vec<Diag>> {
    let folder = Folder::open(folder).map_err(|e| vec![e])?;
    let (ids, wanted): (Vec<StateId>, Vec<(String, Vec<usize>)>) = params_of(program, &role.name)
        .into_iter()
        .map(|(id, name)| (id, (name, program.state(id).whole_shape())))
        .unzip();
    let files = ParamFiles::open(&folder).map_err(|e| vec![e])?;
    let found = files.find(&role.model.tensors, &wanted)?;
    let lacking = wanted.iter().enumerate().filter(|(at, _)| !found.has(*at));
    let new: Vec<String> = lacking.map(|(_, (name, _))| name.clone()).collect();
    if !new.is_empty() {
        // It draws all of them, also those that the folder has.
        init(program, rank, role).map_err(|e| vec![e])?;
    }
    // One by one, so that no two are held twice. An adapter is merged into the base model, which it holds at once.
    let continues = lora_of(&program.stage, &role.name).is_some_and(|(lora, _)| lora.continues);
    match folder.adapter().filter(|_| !continues) {
        None => ids.iter().enumerate().for_each(|(at, &id)| {
            if let Some(tensor) = found.read(at) {
                rank.set(program, id, &tensor);
            }
        }),
        Some(_) => {
            for (&id, tensor) in ids.iter().zip(read_params(&folder, &role.model.tensors, &wanted)?) {
                if let Some(tensor) = tensor {
                    rank.set(program, id, &tensor);
                }
            }
        }
    }
    Ok(new)
}

/// Writes the models that a stage leaves, as Hugging Face folders; for the first rank.
pub(crate) fn save_all(program: &Program, states: &Wholes, observer: Observer) -> Result<(), Diag> {
    let stage = &program.stage;
    for name in &stage.save {
        let role = stage.roles.iter().find(|r| r.name == *name).expect("the loader saw the role");
        let saving = Saving { program, states, role, folder: result_folder(stage, name) };
        let lora = lora_of(stage, name);
        if let Some((lora, adapter)) = lora.filter(|(lora, _)| lora.save != LoraSave::Merged) {
            let folder = saving.adapter(lora, adapter)?;
            observer(&Event::Saved { role: name.clone(), folder })?;
        }
        if lora.is_none_or(|(lora, _)| lora.save != LoraSave::Adapter) {
            saving.model(lora)?;
            observer(&Event::Saved { role: name.clone(), folder: saving.folder })?;
        }
    }
    Ok(())
}

/// A role that is written.
struct Saving<'a> {
    program: &'a Program,
    states: &'a Wholes<'a>,
    role: &'a Role,
    folder: PathBuf,
}

impl Saving<'_> {
    /// A parameter by its Hugging Face name, in single precision; an error if it is not finite.
    fn param(&self, name: &str) -> Result<Tensor, Diag> {
        let id = self.program.param(&self.role.name, name);
        let tensor = self.states.get(id.unwrap_or_else(|| panic!("bug: there is no parameter `{name}`")))?.single();
        let finite = match &tensor.data {
            Data::F32(v) => v.iter().all(|x| x.is_finite()),
            _ => tensor.to_f64().iter().all(|x| x.is_finite()),
        };
        if finite {
            return Ok(tensor);
        }
        let message =
            format!("`{name}` is not finite after the stage `{}`: nothing is written", self.program.stage.name);
        Err(Diag::error(message).help("a smaller `learning_rate` usually keeps it finite"))
    }

    fn tokenizer(&self) -> Option<&Path> {
        self.role.tokenizer.as_deref().map(Path::new)
    }

    /// Writes the model, with its factors merged into their weights. Parameters are read from the device one by one, twice:
    /// to see that all of them are finite before anything is written, and to write them.
    fn model(&self, lora: Option<(&Lora, &Adapter)>) -> Result<(), Diag> {
        let mut params: Vec<(String, InDevice)> = Vec::new();
        for (id, name) in params_of(self.program, &self.role.name) {
            let factors = lora.and_then(|(lora, adapter)| factors_of(lora, adapter, &name));
            let shape = self.program.state(id).whole_shape();
            let param = InDevice { saving: self, name: name.clone(), shape, factors };
            param.read()?;
            params.push((name, param));
        }
        let params: Vec<(String, &InDevice)> = params.iter().map(|(n, p)| (n.clone(), p)).collect();
        save(&self.folder, &self.role.model, &params, self.tokenizer())
    }

    /// Writes the factors, and what was trained beside them; gives the folder.
    fn adapter(&self, lora: &Lora, adapter: &Adapter) -> Result<PathBuf, Diag> {
        let factors = adapter.modules.iter().flat_map(|module| Adapter::factors(module));
        let names = factors.chain(adapter.whole.iter().cloned());
        let tensors: Vec<(String, Tensor)> =
            names.map(|name| Ok((name.clone(), self.param(&name)?))).collect::<Result<_, Diag>>()?;
        let tensors: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        let params = params_of(self.program, &self.role.name);
        let base = base_of(&self.program.stage, self.role)
            .expect("the loader lets no adapter be written to a model that is in no folder");
        // An adapter that was trained further has the base that it had.
        let base = match lora.continues {
            true => Folder::open(begins_at(&self.program.stage, self.role, base)?)?.path().display().to_string(),
            false => base.to_string(),
        };
        let about = AdapterConfig {
            factors: adapter,
            r: lora.r,
            alpha: lora.alpha,
            dropout: lora.dropout,
            base: &base,
            params: params.iter().map(|(_, name)| name.as_str()).collect(),
        };
        let folder = self.folder.join("adapter");
        save_adapter(&folder, &self.role.model, &about, &tensors, self.tokenizer())?;
        Ok(folder)
    }
}

/// A parameter that lies in the device until it is written.
struct InDevice<'a> {
    saving: &'a Saving<'a>,
    name: String,
    shape: Vec<usize>,
    /// The factor on the product of its low-rank factors, and their names.
    factors: Option<(f64, [String; 2])>,
}

impl InDevice<'_> {
    fn read(&self) -> Result<Tensor, Diag> {
        let own = self.saving.param(&self.name)?;
        Ok(match &self.factors {
            Some((scale, [a, b])) => merge(&own, [&self.saving.param(a)?, &self.saving.param(b)?], *scale),
            None => own,
        })
    }
}

impl Param for InDevice<'_> {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn is_float(&self) -> bool {
        true
    }

    fn value(&self) -> Cow<'_, Tensor> {
        Cow::Owned(self.read().unwrap_or_else(|e| panic!("bug: what was finite is not any more: {}", e.message)))
    }
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
    let saved = saved.flat_map(|folder| [folder.join("adapter"), folder]);
    let result = saved.into_iter().find(|result| result.canonicalize().is_ok_and(|r| r == model))?;
    let message =
        format!("`{}` would be overwritten by the stage `{}`, which begins with it", result.display(), stage.name);
    Some(Diag::error(message).help("set another `output_dir`"))
}
