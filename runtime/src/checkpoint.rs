//! Checkpoints: where a stage stands after an optimizer step, on disk.
//!
//! ```text
//! <output_dir>/<stage>/checkpoints/step-00000100/
//!   checkpoint.json      format, step, identity of the program, counters, files with their sizes and hashes, its own hash
//!   states.safetensors   parameters that training changes, moments, states of the recipe, by their names
//!   tables.safetensors   replay buffers and cached outputs, if there are any
//! ```
//!
//! Tensors have the names of the program's states, so nothing in a checkpoint depends on the device or on how the program was
//! planned. One rank writes them whole. Several write their shares at once, `states.<rank>.safetensors`, and
//! `checkpoint.json` says which places of which whole tensor are in which file, so any number of ranks can read them.
//! What a step leaves to no other ([`StateKind::Scratch`]) and copies are not in it. A folder is written beside its place,
//! synchronised, and renamed by the first rank when all have written: under its name it is whole. What is read must have the
//! hash that was written.

mod shards;
mod tensors;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Best, Call, Checkpoints, Stage};
use dsgc_ir::{Mesh, Op, Program, StateId, StateKind, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::calls::Named;
use crate::evaluate::find;
use crate::plan::{Cache, Counters, Place};
use crate::session::{Metrics, Session};
use crate::values;
use shards::Shards;
use tensors::{Stored, read_tensor};

/// The version of the format with whole tensors, and of that with those of several ranks.
const FORMAT: u32 = 1;
const FORMAT_OF_RANKS: u32 = 2;
const MANIFEST: &str = "checkpoint.json";
const STATES: &str = "states.safetensors";
const TABLES: &str = "tables.safetensors";
const FINISHED: &str = "finished.json";
/// Folders beside checkpoints: one that is being written, and one whose place it takes.
const STAGING: &str = ".writing";
const REPLACED: &str = ".replaced";

/// What makes two runs of a stage the same one: its settings, and its graphs before any pass. How many ranks run it, what
/// each of them holds, and how many rows are in one call, is no part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    settings: Value,
    graphs: String,
}

/// Settings that change neither the numbers nor how many there are.
const FREE: [&str; 10] = [
    "output_dir",
    "eval_steps",
    "logging_steps",
    "evaluate",
    "require",
    "health",
    "save",
    "checkpoints",
    "memory",
    "parallel",
];

impl Identity {
    /// Of a stage's program before any pass.
    pub fn of(program: &Program) -> Identity {
        let mut settings = serde_json::to_value(&program.stage).expect("a stage is JSON in the text form too");
        if let Value::Object(entries) = &mut settings {
            entries.retain(|key, _| !FREE.contains(&key.as_str()));
        }
        strip(&mut settings);
        let graphs = Program { stage: Stage::default(), sources: vec![], mesh: Mesh::default(), ..program.clone() };
        // A place in a file is no part of what is computed.
        let text = graphs.to_string();
        let lines = text.lines().map(|line| line.rsplit_once(" loc ").map_or(line, |(line, _)| line));
        let mut hash = Sha256::new();
        lines.for_each(|line| {
            hash.update(line);
            hash.update("\n");
        });
        Identity { settings, graphs: hex(hash) }
    }

    /// All of it in a few letters.
    pub(crate) fn digest(&self) -> String {
        hex(Sha256::new_with_prefix(json(self)))
    }

    /// How another run differs from this one, if it does.
    fn differs(&self, other: &Identity) -> Option<String> {
        if let (Value::Object(ours), Value::Object(theirs)) = (&self.settings, &other.settings) {
            let keys: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
            let differ: Vec<String> = keys
                .into_iter()
                .filter(|key| ours.get(*key) != theirs.get(*key))
                .map(|key| format!("`{key}`"))
                .collect();
            if !differ.is_empty() {
                return Some(differ.join(", "));
            }
        }
        (self.graphs != other.graphs).then(|| "the graphs of its models or of its recipe".into())
    }
}

/// Places in files, what is where in memory, and how many rows are in one call.
const FREE_ANYWHERE: [&str; 6] =
    ["span", "zero_stage", "gather_for_generation", "offload_optimizer", "offload_param", "micro_batch_size"];

/// Takes them out.
fn strip(value: &mut Value) {
    match value {
        Value::Object(entries) => {
            entries.retain(|key, _| !FREE_ANYWHERE.contains(&key.as_str()));
            if let Some(Value::Object(generate)) = entries.get_mut("generate") {
                generate.remove("rows");
            }
            entries.values_mut().for_each(strip);
        }
        Value::Array(entries) => entries.iter_mut().for_each(strip),
        _ => {}
    }
}

/// Where the checkpoints of one run of a stage go, and when.
pub struct Keeper<'a> {
    folder: PathBuf,
    identity: Identity,
    every: Option<u64>,
    keep: Option<u64>,
    best: Option<Best>,
    /// Whether the user wants the run to end after the step that it is in.
    pub stop: &'a AtomicBool,
}

impl<'a> Keeper<'a> {
    /// For a stage's program before any pass.
    pub fn new(program: &Program, stop: &'a AtomicBool) -> Keeper<'a> {
        let stage = &program.stage;
        let Checkpoints { every, keep, best } = stage.checkpoints.clone();
        Keeper { folder: folder(&stage.output_dir), identity: Identity::of(program), every, keep, best, stop }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Puts checkpoints of an earlier run aside, as `checkpoints.<n>`: this one begins anew.
    pub fn begin(&self) -> Result<(), Diag> {
        let finished = self.finished_file();
        if finished.exists() {
            fs::remove_file(&finished).map_err(|e| failed("remove", &finished, &e))?;
        }
        if !self.folder.exists() {
            return Ok(());
        }
        let aside = |n: u32| self.folder.with_file_name(format!("checkpoints.{n}"));
        let free = (1..).map(aside).find(|path| !path.exists()).expect("some number is free");
        fs::rename(&self.folder, &free).map_err(|e| failed("rename", &self.folder, &e))
    }

    /// Whether a checkpoint is due after a step.
    pub fn due(&self, step: u64) -> bool {
        self.every.is_some_and(|every| step.is_multiple_of(every))
    }

    /// Notes that the stage is done.
    pub fn finish(&self, steps: u64) -> Result<(), Diag> {
        let path = self.finished_file();
        let about = Finished { steps, identity: self.identity.clone() };
        fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(|e| failed("create", &path, &e))?;
        // A file that ends in its middle would be there after a crash.
        let staging = path.with_file_name(format!("{FINISHED}{STAGING}"));
        write(&staging, &json(&about))?;
        fs::rename(&staging, &path).map_err(|e| failed("rename", &staging, &e))?;
        synchronise(path.parent().unwrap_or(Path::new(".")))
    }

    /// The number of steps of this run of the stage, if it is done.
    pub fn finished(&self) -> Result<Option<u64>, Diag> {
        let path = self.finished_file();
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| failed("read", &path, &e))?,
        };
        let about: Finished = serde_json::from_str(&text).map_err(|e| {
            let message = format!("`{}` is no JSON of ours: {e}", path.display());
            Diag::error(message).help("remove it: the stage then goes on from its newest checkpoint")
        })?;
        Ok((about.identity == self.identity).then_some(about.steps))
    }

    fn finished_file(&self) -> PathBuf {
        self.folder.with_file_name(FINISHED)
    }

    /// The newest checkpoint of this run, if there is one.
    pub fn newest(&self) -> Result<Option<Checkpoint>, Diag> {
        match listed(&self.folder)?.last() {
            Some(path) => self.open(path).map(Some),
            None => Ok(None),
        }
    }

    /// Opens and checks a checkpoint of this stage.
    ///
    /// An error names the file that is not what was written, and the checkpoint before it; or what this run has other than
    /// the one that wrote it.
    pub fn open(&self, path: &Path) -> Result<Checkpoint, Diag> {
        let checkpoint = Checkpoint::open(path).map_err(|broken| before(path, broken))?;
        match checkpoint.manifest.identity.differs(&self.identity) {
            None => Ok(checkpoint),
            Some(differ) => {
                let message = format!("`{}` is of another run: {differ} differ", path.display());
                Err(Diag::error(message)
                    .help("resume with the pipeline that wrote it, or begin anew without `--resume`"))
            }
        }
    }
}

/// The folder of a stage's checkpoints.
fn folder(output_dir: &str) -> PathBuf {
    Path::new(output_dir).join("checkpoints")
}

/// The stage whose checkpoint a folder is.
pub fn stage_of(path: &Path) -> Result<String, Diag> {
    Manifest::read(path).map(|manifest| manifest.stage).map_err(|broken| before(path, broken))
}

/// What is wrong with a checkpoint, and what a run can go on from instead.
fn before(path: &Path, broken: Diag) -> Diag {
    // The path is what the user wrote, or is no checkpoint at all.
    let Some(step) = step_of(path) else { return broken };
    let all = listed(path.parent().unwrap_or(Path::new("."))).unwrap_or_default();
    match all.into_iter().rev().find(|other| step_of(other) < Some(step)) {
        Some(older) => broken.help(format!("`--resume {}` takes the one before it", older.display())),
        None => broken.help("there is none before it: without `--resume` the stage begins anew"),
    }
}

/// All checkpoints of a folder, the oldest first.
fn listed(folder: &Path) -> Result<Vec<PathBuf>, Diag> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.map_err(|e| failed("read", folder, &e))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| failed("read", folder, &e))?.path();
        if step_of(&path).is_some() {
            found.push(path);
        }
    }
    found.sort_by_key(|path| step_of(path));
    Ok(found)
}

/// The first of the checkpoints whose last evaluation is the best, if there was one.
fn best_of<'a>(best: &Best, all: &'a [PathBuf]) -> Result<Option<&'a PathBuf>, Diag> {
    let mut found: Option<(f64, &PathBuf)> = None;
    for path in all {
        let reached = Manifest::read(path)?.reached();
        let Some((_, value)) = find(&reached, &best.metric).filter(|(_, value)| !value.is_nan()) else { continue };
        let better = |other: f64| if best.greater { value > other } else { value < other };
        if found.is_none_or(|(other, _)| better(other)) {
            found = Some((value, path));
        }
    }
    Ok(found.map(|(_, path)| path))
}

/// The step of a checkpoint's folder.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

#[derive(Serialize, Deserialize)]
struct Finished {
    steps: u64,
    identity: Identity,
}

/// What stands in `checkpoint.json`.
#[derive(Serialize, Deserialize)]
struct Manifest {
    format: u32,
    stage: String,
    /// Optimizer batches that were taken.
    step: u64,
    identity: Identity,
    /// Training rows of each source.
    rows: BTreeMap<String, usize>,
    /// Optimizer steps by role.
    taken: BTreeMap<String, u64>,
    counters: Counters,
    places: BTreeMap<String, Place>,
    /// Names of the replay buffers; tensors `table/<n>/<member>`.
    tables: Vec<String>,
    /// Cached calls; tensors `cache/<n>/<member>`, whose rows are `rows`.
    caches: Vec<CacheEntry>,
    unhealthy: BTreeSet<String>,
    /// Numbers of the last evaluation, written so that NaN has a form.
    reached: BTreeMap<String, String>,
    files: BTreeMap<String, Written>,
    /// Where the parts of states are that several ranks have written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    shards: Shards,
}

#[derive(Serialize, Deserialize)]
struct CacheEntry {
    call: Call,
    source: String,
    held: bool,
    rows: Vec<usize>,
}

/// A file as it was written.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Written {
    bytes: u64,
    sha256: String,
}

/// What stands between the text of a manifest and its hash, which is that of the text and of [`END`].
const SEAL: &str = ",\n  \"sha256\": \"";
/// What stands behind a manifest's last member.
const END: &str = "\n}\n";

impl Manifest {
    /// The text of `checkpoint.json`: JSON whose last member is the hash of the text without it.
    fn sealed(&self) -> String {
        let text = json(self);
        let hash = hex(Sha256::new_with_prefix(&text));
        let members = text.strip_suffix(END).unwrap_or_else(|| panic!("bug: a manifest ends otherwise: {text}"));
        format!("{members}{SEAL}{hash}\"{END}")
    }

    /// Whether a text has its own hash; nothing if it has none.
    fn is_sealed(text: &str) -> Option<bool> {
        let (members, hash) = text.rsplit_once(SEAL)?;
        let hash = hash.strip_suffix(END)?.strip_suffix('"')?;
        Some(hex(Sha256::new_with_prefix(format!("{members}{END}"))) == hash)
    }

    fn read(path: &Path) -> Result<Manifest, Diag> {
        let file = path.join(MANIFEST);
        let text = fs::read_to_string(&file).map_err(|e| failed("read", &file, &e))?;
        let wrong = |why: String| Diag::error(format!("`{}` is no checkpoint of ours: {why}", file.display()));
        let value: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        match value["format"].as_u64() {
            Some(format) if [FORMAT, FORMAT_OF_RANKS].map(u64::from).contains(&format) => {}
            Some(format) => {
                return Err(wrong(format!("its format is {format}, expected {FORMAT} or {FORMAT_OF_RANKS}")));
            }
            None => return Err(wrong("it has no `format`".into())),
        }
        match Manifest::is_sealed(&text) {
            Some(true) => serde_json::from_value(value).map_err(|e| wrong(e.to_string())),
            Some(false) => Err(not_written(&file)),
            None => Err(wrong("it does not end with the `sha256` of what it says".into())),
        }
    }

    /// Numbers of the last evaluation.
    fn reached(&self) -> Metrics {
        self.reached.iter().map(|(name, x)| (name.clone(), x.parse().unwrap_or(f64::NAN))).collect()
    }
}

/// A checkpoint whose files are what was written.
pub struct Checkpoint {
    path: PathBuf,
    manifest: Box<Manifest>,
}

impl Checkpoint {
    fn open(path: &Path) -> Result<Checkpoint, Diag> {
        let manifest = Manifest::read(path)?;
        for (name, written) in &manifest.files {
            let file = path.join(name);
            let found = Written::of(&file)?;
            if found.bytes != written.bytes {
                let (found, expected) = (found.bytes, written.bytes);
                return Err(Diag::error(format!("`{}` has {found} bytes, expected {expected}", file.display())));
            }
            if found != *written {
                return Err(not_written(&file));
            }
        }
        Ok(Checkpoint { path: path.into(), manifest: Box::new(manifest) })
    }

    /// Optimizer batches that were taken before it.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads every tensor of a file.
    fn each(&self, file: &str, mut take: impl FnMut(&str, Tensor) -> Result<(), Diag>) -> Result<(), Diag> {
        let opened = Opened::open(&self.path.join(file))?;
        let tensors = opened.tensors()?;
        let mut names: Vec<&str> = tensors.names();
        names.sort_unstable();
        names.into_iter().try_for_each(|name| take(name, opened.read(&tensors, name)?))
    }
}

/// A file of tensors that is open.
struct Opened {
    path: PathBuf,
    map: Mmap,
}

impl Opened {
    fn open(path: &Path) -> Result<Opened, Diag> {
        let opened = File::open(path).map_err(|e| failed("read", path, &e))?;
        // SAFETY: nobody changes a checkpoint that has its name; whoever does so meanwhile breaks his own run.
        let map = unsafe { Mmap::map(&opened) }.map_err(|e| failed("read", path, &e))?;
        Ok(Opened { path: path.into(), map })
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, Diag> {
        SafeTensors::deserialize(&self.map).map_err(|e| self.wrong(&e.to_string()))
    }

    fn read(&self, tensors: &SafeTensors, name: &str) -> Result<Tensor, Diag> {
        let view = tensors.tensor(name).map_err(|e| self.wrong(&e.to_string()))?;
        read_tensor(&view).map_err(|why| self.wrong(&format!("`{name}` {why}")))
    }

    fn wrong(&self, why: &str) -> Diag {
        Diag::error(format!("`{}`: {why}", self.path.display()))
    }
}

/// Writes tensors by name; they are on the disk when this returns.
fn write_tensors(path: &Path, tensors: Vec<(String, Stored)>) -> Result<Written, Diag> {
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|e| Diag::error(format!("cannot write `{}`: {e}", path.display())))?;
    synchronise(path)?;
    Written::of(path)
}

impl Written {
    fn of(path: &Path) -> Result<Written, Diag> {
        let mut file = File::open(path).map_err(|e| failed("read", path, &e))?;
        let mut hash = Sha256::new();
        let bytes = io::copy(&mut file, &mut hash).map_err(|e| failed("read", path, &e))?;
        Ok(Written { bytes, sha256: hex(hash) })
    }
}

/// The states that training changes and a later step needs.
fn kept(program: &Program) -> Vec<StateId> {
    let stage = &program.stage;
    let adapters = stage.trainings.iter().filter_map(|t| Some(&t.lora.as_ref()?.adapter.as_ref()?.init));
    let first: BTreeSet<&String> =
        stage.roles.iter().map(|role| &role.init).chain(&stage.init).chain(adapters).collect();
    let mut written = BTreeSet::new();
    let is_piece = |graph: &str| stage.pieces.values().flatten().any(|piece| piece.graph == graph);
    for graph in program.graphs.iter().filter(|graph| !first.contains(&graph.name) && !is_piece(&graph.name)) {
        written
            .extend(graph.ops().filter_map(|(_, op)| if let Op::Write { state } = op.op { Some(state) } else { None }));
    }
    // Of pieces, those of other places count too: all ranks keep the same states.
    let pieces = stage.pieces.iter().filter(|(graph, _)| !first.contains(graph)).flat_map(|(_, pieces)| pieces);
    written.extend(pieces.flat_map(|piece| &piece.writes).filter_map(|name| program.state_named(name)));
    let lasts = |id: &StateId| matches!(program.state(*id).kind, StateKind::Param { .. } | StateKind::State);
    written.into_iter().filter(lasts).collect()
}

impl Session {
    /// Writes where the stage stands after `step` batches; gives the folder on the first rank, which writes all but the others'
    /// shares of the states.
    pub(crate) fn write_checkpoint(
        &self,
        keeper: &Keeper,
        step: u64,
        reached: &Metrics,
    ) -> Result<Option<PathBuf>, Diag> {
        assert!(self.ahead.is_empty(), "bug: a checkpoint within a step");
        let staging = keeper.folder.join(STAGING);
        self.rank.on_first(&self.program, |_| {
            // Left by a run that was killed while it wrote.
            remove(&staging)?;
            remove(&keeper.folder.join(REPLACED))?;
            fs::create_dir_all(&staging).map_err(|e| failed("create", &staging, &e))
        })?;
        let written = match self.rank.member.mesh.is_single() {
            true => (self.write_states(&staging)?, Shards::new()),
            false => self.write_shards(&staging)?,
        };
        // Others go on when it is whole.
        self.rank.on_first(&self.program, |_| self.finish_checkpoint(keeper, step, reached, written))
    }

    /// Writes all states to a file, read one by one, so that no two are on the host at once.
    fn write_states(&self, folder: &Path) -> Result<BTreeMap<String, Written>, Diag> {
        let device = self.device();
        let states = kept(&self.program).into_iter().map(|id| {
            let stored = Stored::new(&device.state(id), self.program.state(id).whole_shape(), move || {
                Cow::Owned(device.state(id))
            });
            (self.program.state(id).name.clone(), stored)
        });
        Ok(BTreeMap::from([(STATES.to_string(), write_tensors(&folder.join(STATES), states.collect())?)]))
    }

    /// Writes what is not a state, and gives the folder its name.
    fn finish_checkpoint(
        &self,
        keeper: &Keeper,
        step: u64,
        reached: &Metrics,
        (mut files, shards): (BTreeMap<String, Written>, Shards),
    ) -> Result<PathBuf, Diag> {
        let path = keeper.folder.join(format!("step-{step:08}"));
        let [staging, replaced] = [STAGING, REPLACED].map(|name| keeper.folder.join(name));
        let (tables, caches, tensors) = self.tables();
        if !tensors.is_empty() {
            let stored = |t| Stored::new(t, t.shape.clone(), move || Cow::Borrowed(t));
            let tensors = tensors.iter().map(|(name, t)| (name.clone(), stored(t)));
            files.insert(TABLES.to_string(), write_tensors(&staging.join(TABLES), tensors.collect())?);
        }
        let manifest = Manifest {
            format: if shards.is_empty() { FORMAT } else { FORMAT_OF_RANKS },
            stage: self.program.stage.name.clone(),
            step,
            identity: keeper.identity.clone(),
            rows: self.data.iter().map(|(name, data)| (name.clone(), data.len())).collect(),
            taken: self.taken.clone(),
            counters: self.counters,
            places: self.places.clone(),
            tables,
            caches,
            unhealthy: self.unhealthy.clone(),
            reached: reached.iter().map(|(name, x)| (name.clone(), format!("{x:?}"))).collect(),
            files,
            shards,
        };
        write(&staging.join(MANIFEST), &manifest.sealed())?;
        synchronise(&staging)?;
        // A run that went on from an older one comes by here again; what stands here is good until the new one is.
        if path.exists() {
            fs::rename(&path, &replaced).map_err(|e| failed("rename", &path, &e))?;
        }
        fs::rename(&staging, &path).map_err(|e| failed("rename", &staging, &e))?;
        synchronise(&keeper.folder)?;
        remove(&replaced)?;
        self.forget_older(keeper)?;
        Ok(path)
    }

    /// Removes checkpoints beyond those that are to be kept: the newest ones, and the best.
    fn forget_older(&self, keeper: &Keeper) -> Result<(), Diag> {
        let Some(keep) = keeper.keep else { return Ok(()) };
        let all = listed(&keeper.folder)?;
        let old = &all[..all.len().saturating_sub(keep as usize)];
        let best = match &keeper.best {
            Some(best) if !old.is_empty() => best_of(best, &all)?,
            _ => None,
        };
        old.iter().filter(|&old| Some(old) != best).try_for_each(|old| remove(old))
    }

    /// Names of the replay buffers, cached calls, and the tensors of both.
    fn tables(&self) -> (Vec<String>, Vec<CacheEntry>, Named) {
        let mut tensors = Named::new();
        let mut put = |prefix: String, record: Named| {
            tensors.extend(record.into_iter().map(|(member, tensor)| (format!("{prefix}/{member}"), tensor)));
        };
        for (n, table) in self.tables.values().enumerate() {
            put(format!("table/{n}"), table.clone());
        }
        let mut caches = Vec::new();
        for (n, cache) in self.caches.iter().enumerate() {
            let mut all = Named::new();
            for row in cache.rows.values() {
                values::append(&mut all, row.clone(), "").expect("rows of one call are alike");
            }
            put(format!("cache/{n}"), all);
            caches.push(CacheEntry {
                call: cache.call.clone(),
                source: cache.source.clone(),
                held: cache.held,
                rows: cache.rows.keys().copied().collect(),
            });
        }
        (self.tables.keys().cloned().collect(), caches, tensors)
    }

    /// Goes on from a checkpoint: [`Session::run`] begins with the step after it.
    ///
    /// Errors: the data has another number of rows than it had, or the checkpoint lacks a state.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<(), Diag> {
        let manifest = &checkpoint.manifest;
        for (name, data) in &self.data {
            let before = manifest.rows.get(name).copied().unwrap_or_default();
            if before != data.len() {
                let message =
                    format!("`{name}` has {} rows, and had {before} when the checkpoint was written", data.len());
                return Err(Diag::error(message).help("a run goes on with the rows that it began with"));
            }
        }
        let mut wanted: BTreeMap<String, StateId> =
            kept(&self.program).into_iter().map(|id| (self.program.state(id).name.clone(), id)).collect();
        let wrong = |why: String| Diag::error(format!("`{}`: {why}", checkpoint.path.display()));
        let (program, rank) = (&self.program, &mut self.rank);
        checkpoint.each_state(program, &rank.member.clone(), |name, tensor| {
            let id = wanted.remove(name).ok_or_else(|| wrong(format!("nothing is called `{name}` in this run")))?;
            let ty = &program.state(id).ty;
            if program.state(id).whole_shape() != tensor.shape || !tensor.fits(ty.dtype) {
                let (dtype, shape) = (tensor.dtype(), &tensor.shape);
                return Err(wrong(format!("`{name}` is {dtype}{shape:?}, expected {ty}")));
            }
            rank.set(program, id, &tensor);
            Ok(())
        })?;
        if let Some(lacking) = wanted.keys().next() {
            return Err(wrong(format!("`{lacking}` is missing")));
        }
        self.restore_tables(checkpoint)?;
        self.taken = manifest.taken.clone();
        self.counters = manifest.counters;
        self.places = manifest.places.clone();
        self.unhealthy = manifest.unhealthy.clone();
        self.begun = Some((manifest.step, manifest.reached()));
        Ok(())
    }

    fn restore_tables(&mut self, checkpoint: &Checkpoint) -> Result<(), Diag> {
        let manifest = &checkpoint.manifest;
        let mut records: BTreeMap<String, Named> = BTreeMap::new();
        if manifest.files.contains_key(TABLES) {
            checkpoint.each(TABLES, |name, tensor| {
                let parts: Vec<&str> = name.splitn(3, '/').collect();
                if let [kind, n, member] = parts[..] {
                    records.entry(format!("{kind}/{n}")).or_default().insert(member.into(), tensor);
                }
                Ok(())
            })?;
        }
        let mut take = |key: String| records.remove(&key).unwrap_or_default();
        self.tables =
            manifest.tables.iter().enumerate().map(|(n, name)| (name.clone(), take(format!("table/{n}")))).collect();
        let caches = manifest.caches.iter().enumerate().map(|(n, entry)| {
            let all = take(format!("cache/{n}"));
            let rows = entry.rows.iter().enumerate().map(|(at, &row)| (row, values::select(&all, &[at])));
            let (call, source) = (entry.call.clone(), entry.source.clone());
            Cache { call, source, held: entry.held, rows: rows.collect() }
        });
        self.caches = caches.collect();
        Ok(())
    }
}

pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json(about: &impl Serialize) -> String {
    let text = serde_json::to_string_pretty(about);
    text.unwrap_or_else(|e| panic!("bug: a checkpoint's description is no JSON: {e}")) + "\n"
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) -> Result<(), Diag> {
    if folder.exists() { fs::remove_dir_all(folder).map_err(|e| failed("remove", folder, &e)) } else { Ok(()) }
}

/// Writes a file that is on the disk when this returns.
fn write(path: &Path, text: &str) -> Result<(), Diag> {
    fs::write(path, text).map_err(|e| failed("write", path, &e))?;
    synchronise(path)
}

/// Waits until a file's bytes, or a folder's entries, are on the disk.
fn synchronise(path: &Path) -> Result<(), Diag> {
    // Windows opens no folders; its renames need no such thing.
    if cfg!(windows) && path.is_dir() {
        return Ok(());
    }
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| failed("write", path, &e))
}

/// A file with another hash than it had.
fn not_written(path: &Path) -> Diag {
    Diag::error(format!("`{}` is not what was written: its SHA-256 is another", path.display()))
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Diag {
    Diag::error(format!("cannot {what} `{}`: {error}", path.display()))
}
