//! The statements of a plan, one after the other.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Call, CallSteps, Joined, Operand, Operands, Rows, Statement, Update, UpdateSteps};
use dsgc_ir::{DType, Data, Tensor};
use dsgc_kernels::random;
use serde::{Deserialize, Serialize};

use crate::calls::{self, Named, Parts};
use crate::data::order;
use crate::generate::generate;
use crate::rank::Rank;
use crate::roles::key_of;
use crate::schedule::learning_rate;
use crate::session::{Event, Metrics, Session};
use crate::steps::updates_of;
use crate::values::{self, Origin, Values};

/// What a batch of the outermost source leaves: its numbers, and what the user is to be told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub metrics: Metrics,
    pub events: Vec<Event>,
}

/// Folded into the stage's key for dropout, so that it has other numbers than all else.
const DROPOUTS: u64 = 0xd409;

/// Loops and generations so far: each has its own random numbers.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Counters {
    loops: u64,
    generations: u64,
}

/// Outputs of a cached call by the number of their row.
pub(crate) struct Cache {
    pub call: Call,
    pub source: String,
    pub held: bool,
    pub rows: BTreeMap<usize, Named>,
}

/// Where the batches of a `next` stand.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Place {
    epoch: u64,
    /// Row numbers of the epoch in its order, and how many of them have been taken.
    order: Vec<usize>,
    taken: usize,
}

impl Session {
    /// Runs statements; `steps` is the number of the outermost source's batches in all.
    pub(crate) fn statements(
        &mut self,
        body: &[Statement],
        values: &mut Values,
        steps: u64,
        told: &mut Told,
    ) -> Result<(), Diag> {
        let mut done = 0;
        while let Some(statement) = body.get(done) {
            let mut next = done + 1;
            match statement {
                Statement::For { rows: Rows::Source(source), .. } => {
                    panic!("bug: `open` let a `for` over `{source}` inside a `for` pass")
                }
                Statement::For { batch, rows: Rows::Minibatches { table, size, keep, shuffle }, body } => {
                    let record = values.record(table)?;
                    let order = self.minibatches(table, &record, (keep.as_deref(), *shuffle, *size), values, told)?;
                    for rows in order.chunks(*size) {
                        let mut inner = values.clone();
                        inner.bind(batch, values::select(&record, rows));
                        self.statements(body, &mut inner, steps, told)?;
                    }
                }
                Statement::Repeat { times, body } => {
                    for _ in 0..*times {
                        self.statements(body, values, steps, told)?;
                    }
                }
                Statement::Call(call) => self.call(call, values, steps, told)?,
                Statement::Generate(plan) => {
                    let prompt = values.record(&plan.prompt)?;
                    let (seed, number) = (key_of(&self.program.stage), self.counters.generations);
                    self.counters.generations += 1;
                    let record = generate(&mut self.rank, &self.program, plan, &prompt, seed, number)?;
                    values.bind(&plan.name, record);
                }
                Statement::Next { name, source } => {
                    let rows = self.next_rows(source);
                    let batch = self.data[source].batch(&rows);
                    values.bind_rows(name, batch.tensors, Origin { source: source.clone(), held: false, rows });
                }
                Statement::Join { name, parts } => values.bind(name, values.join(parts)?),
                Statement::Recent { name, table, rows } => {
                    let record = self.recent(name, table, *rows, values)?;
                    values.bind(name, record);
                }
                Statement::Update(_) => {
                    let group = Update::together(&body[done..]);
                    next = done + group.len();
                    self.updates(&group, values, steps, told)?;
                }
            }
            done = next;
        }
        Ok(())
    }

    /// The rows of a table that take part in a loop over its minibatches, in their order.
    fn minibatches(
        &mut self,
        table: &str,
        record: &Named,
        (keep, shuffle, size): (Option<&str>, bool, usize),
        values: &Values,
        told: &mut Told,
    ) -> Result<Vec<usize>, Diag> {
        let all = values::rows_of(table, record)?;
        let rows: Vec<usize> = match keep {
            None => (0..all).collect(),
            Some(path) => match values.tensor(path)? {
                Tensor { shape, data: Data::Bool(keep) } if *shape == [all] => {
                    (0..all).filter(|&row| keep[row]).collect()
                }
                other => {
                    let found = format!("{}{:?}", other.dtype(), other.shape);
                    return Err(Diag::error(format!("found {found} as `{path}`, expected bool[{all}]"))
                        .help(format!("it says for each row of `{table}` whether it takes part")));
                }
            },
        };
        let count = self.counters.loops;
        self.counters.loops += 1;
        if rows.is_empty() {
            told.events.push(Event::NoRows { table: table.into(), rows: all });
        }
        if !shuffle || rows.len() <= size {
            return Ok(rows);
        }
        Ok(order::of_loop(self.program.stage.seed, count, rows.len()).into_iter().map(|at| rows[at]).collect())
    }

    /// The rows of the next batch of a source, in the order of its epochs. An epoch's last batch may be smaller.
    fn next_rows(&mut self, source: &str) -> Vec<usize> {
        let size = self.source(source).expect("the loader saw the source").batch_size;
        let data = &self.data[source];
        let place =
            self.places.entry(source.into()).or_insert_with(|| Place { order: data.epoch(0), ..Place::default() });
        if place.taken == place.order.len() {
            let epoch = place.epoch + 1;
            *place = Place { epoch, order: data.epoch(epoch), taken: 0 };
        }
        let end = (place.taken + size).min(place.order.len());
        let rows = place.order[place.taken..end].to_vec();
        place.taken = end;
        rows
    }

    /// Adds the rows of a table to a replay buffer, and gives its newest ones.
    fn recent(&mut self, name: &str, table: &str, most: usize, values: &Values) -> Result<Named, Diag> {
        let record = values.record(table)?;
        values::rows_of(table, &record)?;
        let buffer = self.tables.entry(name.into()).or_default();
        values::append(buffer, record, &format!("`{table}`"))?;
        let all = values::rows_of(table, buffer)?;
        if all > most {
            *buffer = values::select(buffer, &(all - most..all).collect::<Vec<_>>());
        }
        Ok(buffer.clone())
    }

    /// The inputs that operands say.
    pub(crate) fn inputs(&self, args: &Operands, values: &Values) -> Result<Named, Diag> {
        let one = |(input, operand): &(String, Operand)| {
            let tensor = match operand {
                Operand::Path(path) => values.tensor(path)?.clone(),
                Operand::Number(number) => Tensor::f64(&[], vec![*number]),
                Operand::State(name) => {
                    let id = self.program.state_named(&format!("state/{name}"));
                    let id = id.unwrap_or_else(|| panic!("bug: the program has no state `{name}`"));
                    self.rank.get(&self.program, id)?
                }
            };
            Ok((input.clone(), tensor))
        };
        args.iter().map(one).collect()
    }

    fn call(&mut self, call: &Call, values: &mut Values, steps: u64, told: &mut Told) -> Result<(), Diag> {
        let outputs = if call.cached {
            self.cached(call, values)?
        } else {
            let inputs = self.inputs(&call.args, values)?;
            match &call.steps {
                Some(CallSteps::Joined(joined)) if self.all_rows(call, joined, &inputs)? => {
                    self.run_joined(call, joined, inputs, values, steps)?
                }
                _ => self.run_call(call, &inputs)?,
            }
        };
        self.tell(&outputs, "", told);
        if let Some(name) = &call.name {
            values.bind(name, outputs);
        }
        Ok(())
    }

    /// Runs a call on all of its rows.
    fn run_call(&mut self, call: &Call, inputs: &Named) -> Result<Named, Diag> {
        let steps = call.steps.as_ref().unwrap_or_else(|| panic!("bug: `autodiff` left a call of @{}", call.graph));
        let Rank { device, member } = &mut self.rank;
        let outputs = match Parts::of_call(steps) {
            None => calls::call(device.as_mut(), &self.program, &call.graph, &[inputs])?,
            Some(parts) => {
                let cut = parts.cut(&self.program, member, inputs);
                let made = parts.run(device.as_mut(), &self.program, member, &cut)?;
                let mut outputs = made.whole;
                for rows in made.rows {
                    values::append(&mut outputs, rows, &format!("`{}`", call.graph))?;
                }
                outputs
            }
        };
        self.assert(&call.graph, outputs)
    }

    /// Whether all rows of a call take part in the updates that it is joined with, and there are some.
    fn all_rows(&mut self, call: &Call, joined: &Joined, inputs: &Named) -> Result<bool, Diag> {
        if calls::rows_of(calls::graph_named(&self.program, &call.graph), inputs) == 0 {
            return Ok(false);
        }
        let Some(keep) = &joined.keep else { return Ok(true) };
        let kept = calls::call(self.rank.device.as_mut(), &self.program, keep, &[inputs])?;
        Ok(kept["keep"].to_f64().iter().all(|&keep| keep != 0.0))
    }

    /// Runs a call with the updates after it. What they give waits until the plan comes to them.
    fn run_joined(
        &mut self,
        call: &Call,
        joined: &Joined,
        mut inputs: Named,
        values: &Values,
        steps: u64,
    ) -> Result<Named, Diag> {
        for (k, update) in joined.updates.iter().enumerate() {
            let total = steps * updates_of(&self.program.stage, &update.role);
            let (lr, t) = self.settings(update, total);
            let takes = calls::graph_named(&self.program, &joined.graph);
            let own = |(input, _): &&(String, Operand)| takes.input_named(&Joined::name(k, input)).is_some();
            let own: Operands = update.terms[0].args.iter().filter(own).cloned().collect();
            let own = self.inputs(&own, values)?.into_iter().chain([("lr".to_string(), lr), ("t".to_string(), t)]);
            inputs.extend(own.map(|(name, tensor)| (Joined::name(k, &name), tensor)));
        }
        let mut made = calls::call(self.rank.device.as_mut(), &self.program, &joined.graph, &[&inputs])?;
        for (k, update) in joined.updates.iter().enumerate() {
            let prefix = Joined::name(k, "");
            let of_update = made.extract_if(.., |name, _| name.starts_with(&prefix));
            let of_update = of_update.map(|(name, tensor)| (name[prefix.len()..].to_string(), tensor)).collect();
            let of_update = self.assert(&update.terms[0].graph, of_update)?;
            self.ahead.push_back((update.clone(), of_update));
        }
        self.assert(&call.graph, made)
    }

    /// Learning rate `f32[]` and number `i32[]` of the next step of a role, which takes `total` in all.
    fn settings(&self, update: &Update, total: u64) -> (Tensor, Tensor) {
        let training = self.program.stage.trainings.iter().find(|t| t.role == update.role);
        let training = training.unwrap_or_else(|| panic!("bug: `{}` is updated without settings", update.role));
        let taken = self.taken.get(&update.role).copied().unwrap_or_default();
        let lr = learning_rate(&training.schedule, taken, total);
        (Tensor::f64(&[], vec![lr]), Tensor::i32(&[], vec![i32::try_from(taken + 1).unwrap_or(i32::MAX)]))
    }

    /// Outputs of a cached call: those of rows that it has seen before are kept from then.
    ///
    /// Kept are the rows of outputs, so there is one per row of the batch, and its shape does not depend on how the
    /// batch is padded.
    fn cached(&mut self, call: &Call, values: &Values) -> Result<Named, Diag> {
        let wrong = |why: String| Diag::error(format!("`{}` cannot be cached: {why}", call.graph));
        let paths = call.args.iter().filter_map(|(_, operand)| match operand {
            Operand::Path(path) => Some(path),
            Operand::State(_) | Operand::Number(_) => None,
        });
        let mut origin: Option<(&str, &Origin)> = None;
        for path in paths {
            match (values.origin(path), origin) {
                (Some(found), None) => origin = Some(found),
                (Some(found), Some(first)) if found.0 == first.0 => {}
                _ => return Err(wrong(format!("`{path}` is no part of the only batch that it takes"))),
            }
        }
        let (_, Origin { source, held, rows }) = origin.ok_or_else(|| wrong("it takes no batch of a source".into()))?;
        let same = |c: &Cache| c.call == *call && c.source == *source && c.held == *held;
        let at = self.caches.iter().position(same).unwrap_or_else(|| {
            let (call, source) = (call.clone(), source.clone());
            self.caches.push(Cache { call, source, held: *held, rows: BTreeMap::new() });
            self.caches.len() - 1
        });
        let new: Vec<usize> = (0..rows.len()).filter(|&i| !self.caches[at].rows.contains_key(&rows[i])).collect();
        if !new.is_empty() {
            let inputs = values::select(&self.inputs(&call.args, values)?, &new);
            let outputs = self.run_call(call, &inputs)?;
            if let Some((name, other)) = outputs.iter().find(|(_, t)| t.shape.first() != Some(&new.len())) {
                let shape = &other.shape;
                return Err(wrong(format!("`{name}` has the shape {shape:?}, expected one row per row of the batch")));
            }
            for (i, at_batch) in new.iter().enumerate() {
                self.caches[at].rows.insert(rows[*at_batch], values::select(&outputs, &[i]));
            }
        }
        let mut outputs = Named::new();
        for row in rows {
            values::append(&mut outputs, self.caches[at].rows[row].clone(), &format!("`{}`", call.graph))?;
        }
        Ok(outputs)
    }

    /// Optimizer steps of updates that are taken together; `steps` is the number of the outermost source's batches in all.
    fn updates(&mut self, group: &[&Update], values: &Values, steps: u64, told: &mut Told) -> Result<(), Diag> {
        let mut begun = Vec::new();
        for &update in group {
            let (lr, t) = self.settings(update, steps * updates_of(&self.program.stage, &update.role));
            let settings = Named::from([("lr".to_string(), lr), ("t".to_string(), t)]);
            *self.taken.entry(update.role.clone()).or_default() += 1;
            let outputs = match self.ahead.pop_front() {
                Some((of, outputs)) if of == *update => outputs,
                Some((of, _)) => panic!("bug: `{}` was computed ahead, and `{}` comes first", of.role, update.role),
                None => self.begin(update, values, &settings)?,
            };
            begun.push((settings, outputs));
        }
        let mut squares = Vec::new();
        for update in group {
            let graph = update.squares();
            let made =
                graph.map(|graph| calls::call(self.rank.device.as_mut(), &self.program, graph, &[])).transpose()?;
            squares.push(made.map_or(0.0, |made| made["squares"].scalar()));
        }
        // Where several roles are trained, their numbers are told apart by the role.
        let several = self.program.stage.trainings.len() > 1;
        for (i, (update, (mut settings, mut outputs))) in group.iter().zip(begun).enumerate() {
            if let Some(UpdateSteps::Split { apply, .. }) = &update.steps {
                let others = squares.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, squares)| squares).sum();
                settings.insert("squares".into(), Tensor::f64(&[], vec![others]));
                outputs.extend(calls::call(self.rank.device.as_mut(), &self.program, apply, &[&settings])?);
            }
            // A step that the loss scale skipped is none: the optimizer and the learning rate stand where they were.
            if outputs.get("overflow").is_some_and(|overflow| overflow.scalar() != 0.0) {
                self.taken.entry(update.role.clone()).and_modify(|taken| *taken -= 1);
            }
            let prefix = if several { format!("{}/", update.role) } else { String::new() };
            self.tell(&outputs, &prefix, told);
            told.metrics.insert(format!("{prefix}lr"), settings["lr"].scalar());
        }
        Ok(())
    }

    /// Runs an update up to its role's `apply`, if it has one.
    fn begin(&mut self, update: &Update, values: &Values, settings: &Named) -> Result<Named, Diag> {
        let mut inputs: Vec<Named> =
            update.terms.iter().map(|term| self.inputs(&term.args, values)).collect::<Result<_, _>>()?;
        let taken = self.taken[&update.role];
        for (number, inputs) in inputs.iter_mut().enumerate() {
            self.add_dropout(update, number, taken, inputs);
        }
        match update.steps.as_ref().unwrap_or_else(|| panic!("bug: `autodiff` left an update as it was")) {
            UpdateSteps::Whole { step } => {
                let made = calls::call(self.rank.device.as_mut(), &self.program, step, &[&inputs[0], settings])?;
                self.assert(&update.terms[0].graph, made)
            }
            UpdateSteps::Split { terms, .. } => {
                let mut outputs = Named::new();
                let several = terms.len() > 1;
                let mut loss = 0.0;
                for ((term, steps), inputs) in update.terms.iter().zip(terms).zip(&inputs) {
                    let parts = Parts::of_term(steps);
                    let Rank { device, member } = &mut self.rank;
                    let cut = parts.cut(&self.program, member, inputs);
                    let made = parts.run(device.as_mut(), &self.program, member, &cut)?.whole;
                    let made = self.assert(&term.graph, made)?;
                    loss += term.weight * made["loss"].scalar();
                    let prefix = if several { format!("{}/", term.graph) } else { String::new() };
                    outputs.extend(made.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
                }
                outputs.insert("loss".into(), Tensor::f64(&[], vec![loss]));
                Ok(outputs)
            }
        }
    }

    /// What a term's graph needs to know which elements its dropout leaves out: a key of this update and term, and the
    /// numbers of its rows.
    fn add_dropout(&self, update: &Update, term: usize, taken: u64, inputs: &mut Named) {
        let graph = match &update.steps {
            Some(UpdateSteps::Whole { step }) => step,
            Some(UpdateSteps::Split { terms, .. }) => &terms[term].grad,
            None => return,
        };
        let graph = calls::graph_named(&self.program, graph);
        if graph.input_named("dropout.key").is_none() {
            return;
        }
        let role = self.program.stage.roles.iter().position(|role| role.name == update.role).unwrap_or_default();
        let parts = [DROPOUTS, role as u64, taken, term as u64];
        let key = parts.into_iter().fold(key_of(&self.program.stage), random::fold);
        let rows = calls::rows_of(graph, inputs) as i32;
        inputs.insert("dropout.key".into(), Tensor::key(key));
        inputs.insert("dropout.row".into(), Tensor::i32(&[rows as usize], (0..rows).collect()));
    }

    /// Outputs that are one number are metrics.
    pub(crate) fn tell(&self, outputs: &Named, prefix: &str, told: &mut Told) {
        let number = |(_, t): &(&String, &Tensor)| t.shape.is_empty() && t.dtype() == DType::F32;
        let numbers = outputs.iter().filter(number);
        told.metrics.extend(numbers.map(|(name, t)| (format!("{prefix}{name}"), t.scalar())));
    }

    /// Looks at what a graph demands of its inputs; the outputs that say so are left out.
    pub(crate) fn assert(&self, graph: &str, mut outputs: Named) -> Result<Named, Diag> {
        for assert in self.program.stage.asserts.iter().filter(|a| a.graph == graph) {
            if outputs.remove(&assert.output).is_some_and(|holds| holds.scalar() == 0.0) {
                return Err(Diag::error(assert.message.clone())
                    .label(assert.span, format!("this does not hold for a batch of `{graph}`")));
            }
        }
        Ok(outputs)
    }
}
