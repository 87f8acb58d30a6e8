//! A stage that runs: its models in a device, its data, its plan.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use dsgc_hf::Tokenizer;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Rows, Source, Statement, Update};
use dsgc_ir::{Axis, Planned, StateId, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::ranks::Member;
use sha2::{Digest, Sha256};

use crate::calls::{self, Named, graph_named};
use crate::checkpoint::{Keeper, hex};
use crate::data::{DataReport, Dataset};
use crate::pieces::{InPieces, Spent};
use crate::plan::{Cache, Counters, Place, Told};
use crate::rank::{Rank, agree};
use crate::roles;
use crate::values::{Origin, Values};

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
    /// A folder lacks parameters that may be new: they begin as the model says.
    New {
        /// The role.
        role: String,
        /// The parameters.
        params: Vec<String>,
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
    /// A metric has left the range in which it is healthy.
    Health {
        /// The optimizer step after which it did.
        step: u64,
        /// The metric.
        metric: String,
        /// What it is.
        value: f64,
        /// Smallest healthy value.
        low: Option<f64>,
        /// Largest healthy value.
        high: Option<f64>,
    },
    /// No row of a table takes part in the loop over its minibatches.
    NoRows {
        /// Path of the table.
        table: String,
        /// Rows that it has.
        rows: usize,
    },
    /// Ranks with different layers have waited for each other.
    Waited {
        /// For each place along `pipeline`, the share of the time of all gradients in which its ranks had nothing to do.
        places: Vec<f64>,
    },
    /// Where the stage stands was written.
    Checkpoint {
        /// Optimizer steps before it.
        step: u64,
        /// Where.
        folder: PathBuf,
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
    pub(crate) program: Planned,
    pub(crate) rank: Rank,
    /// On gradients that ranks with different layers compute together.
    spent: Rc<Cell<Spent>>,
    pub(crate) data: BTreeMap<String, Dataset>,
    /// Optimizer steps taken, by role.
    pub(crate) taken: BTreeMap<String, u64>,
    /// Updates that were computed together with the call before them, and what they gave.
    pub(crate) ahead: VecDeque<(Update, Named)>,
    pub(crate) counters: Counters,
    /// Where a `next` stands, by source.
    pub(crate) places: BTreeMap<String, Place>,
    /// Replay buffers, by the name that the plan gives them.
    pub(crate) tables: BTreeMap<String, Named>,
    pub(crate) caches: Vec<Cache>,
    /// Metrics that are outside of their ranges.
    pub(crate) unhealthy: BTreeSet<String>,
    /// The step and the numbers of the last evaluation with which a checkpoint lets it begin.
    pub(crate) begun: Option<(u64, Metrics)>,
}

/// How a stage ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It is done, and its models are written.
    Finished,
    /// The user wanted it to stop; a checkpoint was written after this step.
    Stopped(u64),
}

impl Session {
    /// Reads or makes the weights of all roles, sets the recipe's states and reads all data.
    pub fn open(program: Planned, device: Box<dyn Device>, observer: Observer) -> Result<Session, Vec<Diag>> {
        Session::open_as(program, device, Member::alone(), observer)
    }

    /// The same as one rank of the program's mesh. Every rank opens and runs the stage, and has what the device runs as; what
    /// happens is told on each of them, but for what the first one writes. After an error, [`Transport::abort`] must
    /// end the others, who wait.
    ///
    /// [`Transport::abort`]: dsgc_kernels::ranks::Transport::abort
    pub fn open_as(
        program: Planned,
        device: Box<dyn Device>,
        member: Member,
        observer: Observer,
    ) -> Result<Session, Vec<Diag>> {
        assert_eq!(program.mesh, member.mesh, "bug: a rank of another mesh than the program's");
        assert_eq!(
            program.place,
            member.mesh.place(Axis::Pipeline, member.rank()),
            "bug: a rank of another place than the program's"
        );
        member.transport.begin(&format!("the beginning of `{}`", program.stage.name));
        let (device, spent) = InPieces::wrap(device, &program, &member);
        let mut rank = Rank { device, member };
        agree(&rank.member, &planned(&program, &rank.member), false).map_err(|e| vec![e])?;
        outermost(&program.stage.plan).map_err(|e| vec![e])?;
        let mut errors = Vec::new();
        if let Err(mut found) = roles::load(&program, &mut rank, observer) {
            errors.append(&mut found);
        }
        if let Some(init) = &program.stage.init {
            let key = Tensor::key(roles::key_of(&program.stage));
            let graph = graph_named(&program, init);
            let inputs: Named = graph.inputs().map(|v| (graph.name_of(v).to_string(), key.clone())).collect();
            calls::call(rank.device.as_mut(), &program, init, &[&inputs]).map_err(|e| vec![e])?;
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
        if !errors.is_empty() {
            return Err(errors);
        }
        if !rank.member.mesh.is_single() {
            let rows = |(name, data): (&String, &Dataset)| (format!("the rows of `{name}`"), data.digest());
            agree(&rank.member, &data.iter().map(rows).collect(), false).map_err(|e| vec![e])?;
        }
        Ok(Session {
            program,
            rank,
            spent,
            data,
            taken: BTreeMap::new(),
            ahead: VecDeque::new(),
            counters: Counters::default(),
            places: BTreeMap::new(),
            tables: BTreeMap::new(),
            caches: Vec::new(),
            unhealthy: BTreeSet::new(),
            begun: None,
        })
    }

    /// The device, to look at what it holds.
    pub fn device(&self) -> &dyn Device {
        self.rank.device.as_ref()
    }

    /// The whole of a state. Where ranks have parts of it, all of them call this.
    pub fn state(&self, id: StateId) -> Result<Tensor, Diag> {
        self.rank.get(&self.program, id)
    }

    /// Runs the whole stage: evaluates, trains, evaluates, writes its models, and looks at what it must reach.
    pub fn run(&mut self, observer: Observer) -> Result<(), Diag> {
        self.run_to_end(None, observer).map(drop)
    }

    /// The same with checkpoints in between, and an end where their keeper says so.
    pub fn run_kept(&mut self, keeper: &Keeper, observer: Observer) -> Result<Ended, Diag> {
        self.run_to_end(Some(keeper), observer)
    }

    fn run_to_end(&mut self, keeper: Option<&Keeper>, observer: Observer) -> Result<Ended, Diag> {
        let begun = self.begun.as_ref().map_or(0, |(step, _)| *step);
        let mut run = BTreeMap::from([("the step that the run begins after".to_string(), begun.to_string())]);
        if let Some(keeper) = keeper {
            run.insert("what the run is".into(), keeper.identity().digest());
        }
        agree(&self.rank.member, &run, false)?;
        let plan = self.program.stage.plan.clone();
        let reached = match self.train(&plan, keeper, observer)? {
            (_, Ended::Stopped(step)) => return Ok(Ended::Stopped(step)),
            (reached, Ended::Finished) => reached,
        };
        if !self.program.stage.pieces.is_empty() {
            observer(&Event::Waited { places: self.waited()? })?;
        }
        self.begins("the end");
        // Writing needs memory of its own, which what trained before does not need any more.
        self.rank.device.rest();
        self.rank.on_first(&self.program, |states| roles::save_all(&self.program, states, observer))?;
        self.require(&reached)?;
        if let Some(keeper) = keeper {
            self.rank.on_first(&self.program, |_| keeper.finish(self.steps()))?;
        }
        Ok(Ended::Finished)
    }

    /// What of the stage begins, for the message of a rank that waits too long.
    pub(crate) fn begins(&self, what: &str) {
        self.rank.member.transport.begin(&format!("{what} of `{}`", self.program.stage.name));
    }

    /// For each place along `pipeline`, the share of the time in which its ranks waited. All ranks call this.
    fn waited(&self) -> Result<Vec<f64>, Diag> {
        let (mesh, Spent { all, waiting }) = (self.program.mesh, self.spent.get());
        let own = [all, all.saturating_sub(waiting)].map(|time| time.as_nanos() as u64).map(u64::to_ne_bytes);
        let read = |message: Vec<u8>| {
            let time = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("two times"));
            let (all, busy) = message.split_at(size_of::<u64>());
            (time(all), time(busy))
        };
        let times: Vec<(u64, u64)> = self.rank.member.all().messages(&own.concat())?.into_iter().map(read).collect();
        // A rank that has no part left goes on and waits elsewhere.
        let longest = times.iter().map(|(all, _)| *all).max().unwrap_or(0).max(1) as f64;
        let of_place = |place: usize| {
            let ranks = (0..mesh.ranks()).filter(|&rank| mesh.place(Axis::Pipeline, rank) == place);
            let busy: Vec<f64> = ranks.map(|rank| times[rank].1 as f64).collect();
            1.0 - busy.iter().sum::<f64>() / busy.len() as f64 / longest
        };
        Ok((0..mesh.pipeline).map(of_place).collect())
    }

    /// Optimizer batches of the stage: those of all epochs, or `max_steps`.
    pub fn steps(&self) -> u64 {
        let stage = &self.program.stage;
        let source = outermost(&stage.plan).ok().and_then(|(_, source, _)| self.source(source));
        let source = source.expect("the plan was looked at in `open`");
        let per_epoch = self.data[&source.name].len().div_ceil(source.batch_size) as f64;
        let steps = (stage.num_epochs * per_epoch).ceil() as u64;
        stage.max_steps.unwrap_or(steps)
    }

    pub(crate) fn source(&self, name: &str) -> Option<&Source> {
        self.program.stage.sources.iter().find(|s| s.name == name)
    }

    /// Trains, with evaluations; gives the numbers of the last one, and how it ended.
    fn train(
        &mut self,
        plan: &[Statement],
        keeper: Option<&Keeper>,
        observer: Observer,
    ) -> Result<(Metrics, Ended), Diag> {
        let (begun, mut reached) = match self.begun.take() {
            Some(begun) => begun,
            None => (0, self.evaluate(0, observer)?),
        };
        let (name, source, body) = outermost(plan)?;
        let source = self.source(source).expect("the loader saw the source").clone();
        let (steps, eval_steps) = (self.steps(), self.program.stage.eval_steps);
        let per_epoch = self.data[&source.name].len().div_ceil(source.batch_size) as u64;
        let mut step = 0;
        for epoch in 0.. {
            let order = self.data[&source.name].epoch(epoch);
            for rows in order.chunks(source.batch_size) {
                if step == steps {
                    return Ok((reached, Ended::Finished));
                }
                step += 1;
                if step <= begun {
                    continue;
                }
                let started = Instant::now();
                self.begins(&format!("step {step}"));
                let batch = self.data[&source.name].batch(rows);
                let origin = Origin { source: source.name.clone(), held: false, rows: rows.to_vec() };
                let (mut values, mut told) = (Values::default(), Told::default());
                values.bind_rows(name, batch.tensors, origin);
                let tokens = values.tokens(name);
                self.statements(body, &mut values, steps, &mut told)?;
                let (seconds, epoch) = (started.elapsed().as_secs_f64(), step as f64 / per_epoch as f64);
                let Told { metrics, mut events } = told;
                let wrong = wrong_number(&metrics);
                let facts = taken(step, &metrics);
                events.extend(self.health(step, &metrics));
                observer(&Event::Step { step, steps, epoch, metrics, tokens, seconds })?;
                for event in &events {
                    observer(event)?;
                }
                if let Some((name, value)) = wrong {
                    let stage = &self.program.stage.name;
                    return Err(Diag::error(format!("`{name}` is {value} at step {step} of the stage `{stage}`")).help(
                        "a smaller `learning_rate`, or a `max_grad_norm`, usually keeps it finite; NaN at once means \
                         that no token of the batch is a target",
                    ));
                }
                // All ranks stop after the same step, whichever is told to.
                let stops = keeper.is_some_and(|keeper| keeper.stop.load(Ordering::Relaxed));
                let stops = agree(&self.rank.member, &facts, stops)? && step < steps;
                if step == steps || eval_steps.is_some_and(|every| step.is_multiple_of(every)) {
                    reached = self.evaluate(step, observer)?;
                }
                let Some(keeper) = keeper else { continue };
                if stops || keeper.due(step) {
                    let started = Instant::now();
                    self.begins(&format!("the checkpoint after step {step}"));
                    let written = self.write_checkpoint(keeper, step, &reached)?;
                    if let Some(folder) = written {
                        observer(&Event::Checkpoint { step, folder, seconds: started.elapsed().as_secs_f64() })?;
                    }
                }
                if stops {
                    return Ok((reached, Ended::Stopped(step)));
                }
            }
        }
        Ok((reached, Ended::Finished))
    }
}

/// The outermost loop of a plan: the name of its batches, their source, and what is done with each. All other loops
/// are over minibatches.
fn outermost(plan: &[Statement]) -> Result<(&str, &str, &[Statement]), Diag> {
    fn has_source(body: &[Statement]) -> bool {
        body.iter().any(|statement| match statement {
            Statement::For { rows: Rows::Source(_), .. } => true,
            Statement::For { body, .. } | Statement::Repeat { body, .. } => has_source(body),
            _ => false,
        })
    }
    match plan {
        [Statement::For { body, .. }] if has_source(body) => {
            Err(Diag::error("found a `for` over data inside another one in the plan, expected `minibatches` in it")
                .help("`next` takes a batch of another source"))
        }
        [Statement::For { batch, rows: Rows::Source(source), body }] => Ok((batch, source, body)),
        _ => Err(Diag::error(format!(
            "found {} statements in the plan, expected one `for` over data with all others",
            plan.len()
        ))),
    }
}

/// What ranks must have planned alike: those of a pipeline's stage run one program.
fn planned(program: &Planned, member: &Member) -> BTreeMap<String, String> {
    let mesh = member.mesh;
    if mesh.is_single() {
        return BTreeMap::new();
    }
    let name = match mesh.pipeline {
        1 => "the planned program".to_string(),
        _ => format!("the planned program of stage {} of the pipeline", mesh.place(Axis::Pipeline, member.rank())),
    };
    BTreeMap::from([(name, hex(Sha256::new_with_prefix(program.to_string())))])
}

/// What ranks must have alike after a step: its number and its losses, to the bit.
fn taken(step: u64, metrics: &Metrics) -> BTreeMap<String, String> {
    let losses = metrics.iter().filter(|(name, _)| name.ends_with("loss"));
    let losses = losses.map(|(name, value)| (format!("the `{name}` of step {step}"), format!("{value:?}")));
    losses.chain([("the step that they have taken".to_string(), step.to_string())]).collect()
}

/// A loss that is not finite, or else a norm: after such a step the parameters are of no use.
fn wrong_number(metrics: &Metrics) -> Option<(String, f64)> {
    let wrong = |ending: &str| metrics.iter().find(|(name, value)| name.ends_with(ending) && !value.is_finite());
    wrong("loss").or_else(|| wrong("grad_norm")).map(|(name, value)| (name.clone(), *value))
}

fn open_source(source: &Source, seed: u64) -> Result<Dataset, Vec<Diag>> {
    let tokenizer = Tokenizer::load(&source.tokenizer).map_err(|e| vec![e.label(source.span, "for these rows")])?;
    Dataset::open(source, seed, &tokenizer)
}

#[cfg(test)]
mod tests {
    use dsgc_ir::Mesh;

    use super::*;
    use crate::rank::on_threads;

    /// Three ranks after a step, of which the last one says otherwise.
    fn after(step: u64, loss: f64, (last_step, last_loss): (u64, f64)) -> Result<Vec<bool>, Diag> {
        let mesh = Mesh { data: 3, ..Mesh::default() };
        let run = |member: Member| {
            let (step, loss) = if member.rank() == 2 { (last_step, last_loss) } else { (step, loss) };
            agree(&member, &taken(step, &Metrics::from([("loss".into(), loss), ("lr".into(), step as f64)])), false)
        };
        on_threads(mesh, run, |diag| diag.message.clone())
    }

    #[test]
    fn ranks_have_taken_the_same_step_to_the_same_loss() {
        assert_eq!(after(3, 0.5, (3, 0.5)), Ok(vec![false; 3]));
        let message = |last| after(3, 0.5, last).expect_err("they differ").message;
        assert_eq!(message((4, 0.5)), "ranks differ in the step that they have taken: 3 on rank 0, 4 on rank 2");
        assert_eq!(message((4, 0.25)), "ranks differ in the step that they have taken: 3 on rank 0, 4 on rank 2");
        let other = "ranks differ in the `loss` of step 3: 0.5 on rank 0, 0.5000000000000001 on rank 2";
        assert_eq!(message((3, 0.5 + f64::EPSILON / 2.0)), other);
    }
}
