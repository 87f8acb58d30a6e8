//! A stage that runs: its models in a device, its data, its plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use dsgc_hf::{Folder, Tokenizer, read_params, save};
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Origin, Role, Source, Statement, Update};
use dsgc_ir::{Bindings, Data, Planned, StateId, Tensor};
use dsgc_kernels::Device;

use crate::calls::{self, Named, combine, inputs_of};
use crate::data::{Batch, DataReport, Dataset};
use crate::schedule::learning_rate;

/// Numbers by name, in the order of the names.
pub type Metrics = BTreeMap<String, f64>;

/// What happens while a stage runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Rows of a source were read.
    Data {
        /// The source.
        source: String,
        /// What became of its rows.
        train: DataReport,
        /// What became of its held-out rows.
        eval: Option<DataReport>,
    },
    /// The held-out rows were evaluated.
    Evaluated {
        /// Optimizer steps before it.
        step: u64,
        /// Optimizer steps of the whole stage.
        steps: u64,
        /// Outputs of the evaluated graphs.
        metrics: Metrics,
        /// Seconds that it took.
        seconds: f64,
    },
    /// An optimizer step was taken.
    Step {
        /// Its number, from 1.
        step: u64,
        /// How many there are.
        steps: u64,
        /// Passes over the data so far.
        epoch: f64,
        /// `loss` and the other outputs of the loss graph, `grad_norm`, `lr`.
        metrics: Metrics,
        /// Tokens of the batch, without padding.
        tokens: u64,
        /// Seconds that it took.
        seconds: f64,
    },
    /// A model was written.
    Saved {
        /// The role.
        role: String,
        /// Where.
        folder: PathBuf,
    },
}

/// Who wants to know what happens.
pub type Observer<'a> = &'a mut dyn FnMut(&Event) -> Result<(), Diag>;

/// A planned stage with its models and data.
pub struct Session {
    program: Planned,
    device: Box<dyn Device>,
    data: BTreeMap<String, Dataset>,
    /// Optimizer steps taken, by role.
    taken: BTreeMap<String, u64>,
}

impl Session {
    /// Reads or makes the weights of all roles and reads all data.
    pub fn open(program: Planned, mut device: Box<dyn Device>, observer: Observer) -> Result<Session, Vec<Diag>> {
        let mut errors = Vec::new();
        for role in &program.stage.roles {
            if let Err(mut found) = load_role(&program, device.as_mut(), role) {
                errors.append(&mut found);
            }
        }
        let mut data = BTreeMap::new();
        for source in &program.stage.sources {
            match open_source(source, program.stage.seed) {
                Ok(dataset) => {
                    let (train, eval) = (*dataset.report(), dataset.eval_report().copied());
                    observer(&Event::Data { source: source.name.clone(), train, eval }).map_err(|e| vec![e])?;
                    data.insert(source.name.clone(), dataset);
                }
                Err(mut found) => errors.append(&mut found),
            }
        }
        if errors.is_empty() { Ok(Session { program, device, data, taken: BTreeMap::new() }) } else { Err(errors) }
    }

    /// The device, to look at states.
    pub fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// Runs the whole stage: evaluates, trains, evaluates, and writes its models.
    pub fn run(&mut self, observer: Observer) -> Result<(), Diag> {
        self.evaluate(0, observer)?;
        let plan = self.program.stage.plan.clone();
        for statement in &plan {
            match statement {
                Statement::For { source, body, .. } => self.train(source, body, observer)?,
                Statement::Repeat { .. } | Statement::Update(_) => {
                    return Err(Diag::error("found a statement outside of `for`, expected every update inside one"));
                }
            }
        }
        let steps = self.steps();
        if !steps.is_multiple_of(self.program.stage.eval_steps.unwrap_or(steps + 1)) {
            self.evaluate(steps, observer)?;
        }
        self.save(observer)
    }

    /// Optimizer batches of the stage: those of all epochs, or `max_steps`.
    pub fn steps(&self) -> u64 {
        let stage = &self.program.stage;
        let outermost = stage.plan.iter().find_map(|s| match s {
            Statement::For { source, .. } => Some(source),
            _ => None,
        });
        let Some(source) = outermost.and_then(|name| self.source(name)) else { return 0 };
        let per_epoch = self.data[&source.name].len().div_ceil(source.batch_size) as f64;
        let steps = (stage.num_epochs * per_epoch).ceil() as u64;
        stage.max_steps.unwrap_or(steps)
    }

    fn source(&self, name: &str) -> Option<&Source> {
        self.program.stage.sources.iter().find(|s| s.name == name)
    }

    fn train(&mut self, source: &str, body: &[Statement], observer: Observer) -> Result<(), Diag> {
        let source = self.source(source).expect("the verifier of the plan saw the source").clone();
        let steps = self.steps();
        let (eval_steps, per_epoch) =
            (self.program.stage.eval_steps, self.data[&source.name].len().div_ceil(source.batch_size) as u64);
        let mut step = 0;
        for epoch in 0.. {
            let order = self.data[&source.name].epoch(epoch);
            for rows in order.chunks(source.batch_size) {
                if step == steps {
                    return Ok(());
                }
                step += 1;
                let started = Instant::now();
                let batch = self.data[&source.name].batch(rows);
                let mut metrics = Metrics::new();
                self.statements(body, &source, &batch, steps, &mut metrics)?;
                let (tokens, seconds) = (tokens(&batch), started.elapsed().as_secs_f64());
                let epoch = step as f64 / per_epoch as f64;
                let bad = metrics.iter().find(|m| m.0.ends_with("loss") && !m.1.is_finite());
                let bad = bad.map(|(name, value)| (name.clone(), *value));
                observer(&Event::Step { step, steps, epoch, metrics, tokens, seconds })?;
                if let Some((name, value)) = bad {
                    let stage = &self.program.stage.name;
                    return Err(Diag::error(format!("`{name}` is {value} at step {step} of the stage `{stage}`"))
                        .help("a smaller `learning_rate`, or a `max_grad_norm`, usually keeps it finite; NaN at once means that no token of the batch is a target"));
                }
                if eval_steps.is_some_and(|every| step.is_multiple_of(every)) {
                    self.evaluate(step, observer)?;
                }
            }
        }
        Ok(())
    }

    fn statements(
        &mut self,
        body: &[Statement],
        source: &Source,
        batch: &Batch,
        steps: u64,
        metrics: &mut Metrics,
    ) -> Result<(), Diag> {
        for statement in body {
            match statement {
                Statement::For { .. } => {
                    return Err(Diag::error("found a `for` inside a `for`, which is not part of this version"));
                }
                Statement::Repeat { times, body } => {
                    for _ in 0..*times {
                        self.statements(body, source, batch, steps, metrics)?;
                    }
                }
                Statement::Update(update) => {
                    let of_role = updates_of(&self.program.stage.plan, &update.role);
                    self.update(update, source, batch, steps * of_role, metrics)?;
                }
            }
        }
        Ok(())
    }

    /// One optimizer step; `total` is how many the role takes in all.
    fn update(
        &mut self,
        update: &Update,
        source: &Source,
        batch: &Batch,
        total: u64,
        metrics: &mut Metrics,
    ) -> Result<(), Diag> {
        let training = self.program.stage.trainings.iter().find(|t| t.role == update.role);
        let training = training.unwrap_or_else(|| panic!("bug: `{}` is updated without settings", update.role));
        let taken = self.taken.entry(update.role.clone()).or_default();
        let lr = learning_rate(&training.schedule, *taken, total);
        *taken += 1;
        let settings = Named::from([
            ("lr".to_string(), Tensor::f64(&[], vec![lr])),
            ("t".to_string(), Tensor::i32(&[], vec![i32::try_from(*taken).unwrap_or(i32::MAX)])),
        ]);
        let steps = update.steps.as_ref().unwrap_or_else(|| panic!("bug: `autodiff` left an update as it was"));
        let inputs = inputs_of(batch, &update.args);
        let outputs =
            calls::update(self.device.as_mut(), &self.program, steps, &inputs, source.micro_batch_size, &settings)?;
        // Where several roles are trained, their numbers are told apart by the role.
        let prefix = if self.program.stage.trainings.len() > 1 { format!("{}/", update.role) } else { String::new() };
        metrics.extend(outputs.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value.scalar())));
        metrics.insert(format!("{prefix}lr"), lr);
        Ok(())
    }

    /// Evaluates all held-out rows, if there are any.
    fn evaluate(&mut self, step: u64, observer: Observer) -> Result<(), Diag> {
        let started = Instant::now();
        let mut metrics = Metrics::new();
        for evaluate in &self.program.stage.evaluate {
            let source = self.source(&evaluate.source).expect("the loader saw the source");
            let data = &self.data[&source.name];
            let steps = evaluate.steps.as_ref().unwrap_or_else(|| panic!("bug: `autodiff` left an evaluation"));
            let mut totals = Named::new();
            let rows: Vec<usize> = (0..data.eval_len()).collect();
            for rows in rows.chunks(source.micro_batch_size) {
                let inputs = inputs_of(&data.eval_batch(rows), &evaluate.args);
                combine(&mut totals, calls::call(self.device.as_mut(), &self.program, &steps.sums, &[&inputs])?);
            }
            let outputs = calls::call(self.device.as_mut(), &self.program, &steps.finish, &[&totals])?;
            metrics.extend(outputs.into_iter().map(|(name, value)| (name, value.scalar())));
        }
        if metrics.is_empty() {
            return Ok(());
        }
        observer(&Event::Evaluated { step, steps: self.steps(), metrics, seconds: started.elapsed().as_secs_f64() })
    }

    /// Writes the models that the stage leaves, as Hugging Face folders.
    fn save(&self, observer: Observer) -> Result<(), Diag> {
        let stage = &self.program.stage;
        for name in &stage.save {
            let role = stage.roles.iter().find(|r| r.name == *name).expect("the loader saw the role");
            let folder = match stage.save.len() {
                1 => PathBuf::from(&stage.output_dir),
                _ => Path::new(&stage.output_dir).join(name),
            };
            let params: Vec<(String, Tensor)> = self
                .program
                .params_of(name)
                .map(|(id, param)| (param.to_string(), self.device.state(id).single()))
                .collect();
            let params: Vec<(String, &Tensor)> = params.iter().map(|(n, t)| (n.clone(), t)).collect();
            save(&folder, &role.model, &params, role.tokenizer.as_deref().map(Path::new))?;
            observer(&Event::Saved { role: name.clone(), folder })?;
        }
        Ok(())
    }
}

/// Optimizer steps of a role per batch of the outermost source.
fn updates_of(plan: &[Statement], role: &str) -> u64 {
    plan.iter()
        .map(|statement| match statement {
            Statement::For { body, .. } => updates_of(body, role),
            Statement::Repeat { times, body } => times * updates_of(body, role),
            Statement::Update(update) => u64::from(update.role == role),
        })
        .sum()
}

/// Tokens of a batch without padding.
fn tokens(batch: &Batch) -> u64 {
    let segments = batch.tensors.iter().filter(|(name, _)| name.ends_with(".segment"));
    let count = |tensor: &Tensor| match &tensor.data {
        Data::I32(v) => v.iter().filter(|&&s| s != 0).count() as u64,
        _ => 0,
    };
    segments.map(|(_, tensor)| count(tensor)).sum()
}

fn open_source(source: &Source, seed: u64) -> Result<Dataset, Vec<Diag>> {
    let tokenizer = Tokenizer::load(&source.tokenizer).map_err(|e| vec![e.label(source.span, "for these rows")])?;
    Dataset::open(source, seed, &tokenizer)
}

/// Puts a role's weights into the device.
fn load_role(program: &Planned, device: &mut dyn Device, role: &Role) -> Result<(), Vec<Diag>> {
    let folder = match &role.origin {
        Origin::Random { init } => {
            let seed = program.stage.seed;
            let key = Tensor::key([(seed >> 32) as u32, seed as u32]);
            let graph = program.graph(init).unwrap_or_else(|| panic!("bug: the program does not have @{init}"));
            let name = graph.inputs().next().map_or("", |input| graph.name_of(input));
            return device.run(init, &[(name, &key)]).map(drop).map_err(|e| vec![e]);
        }
        Origin::Folder(folder) => folder,
        Origin::Stage(folder) if Path::new(folder).join("config.json").is_file() => folder,
        Origin::Stage(folder) => {
            let diag = Diag::error(format!("found no model in `{folder}`, which an earlier stage writes"));
            return Err(vec![diag.help("run the whole pipeline, or that stage first with `--stage`")]);
        }
    };
    load_params(program, device, &role.name, &role.model.tensors, Path::new(folder))
}

/// Puts the weights of a Hugging Face folder into the parameters of a role.
pub(crate) fn load_params(
    program: &Planned,
    device: &mut dyn Device,
    role: &str,
    rules: &dsgc_ir::stage::TensorRules,
    folder: &Path,
) -> Result<(), Vec<Diag>> {
    let folder = Folder::open(folder).map_err(|e| vec![e])?;
    let (ids, wanted): (Vec<StateId>, Vec<(String, Vec<usize>)>) = program
        .params_of(role)
        .map(|(id, name)| {
            let shape = program.state(id).ty.shape(&Bindings::new()).expect("states have constant dims");
            (id, (name.to_string(), shape))
        })
        .unzip();
    for (id, tensor) in ids.into_iter().zip(read_params(&folder, rules, &wanted)?) {
        device.set_state(id, &tensor);
    }
    Ok(())
}
