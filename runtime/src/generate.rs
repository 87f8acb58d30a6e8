//! Continuing sequences by one token after the other.
//!
//! ```text
//! prompt [N, P] --calls of `rows`--> prefill(P columns) -> step -> step ...
//! ```
//!
//! Of several answers to a prompt, each goes on from all of its columns but the last, which are computed once.
//!
//! The graphs and what they take are those of [`GenerateSteps`]. A [`Decoder`] keeps track of columns; keys and values
//! stay in the device's states, where a new sequence overwrites those of the one before.

use std::ops::Range;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Generate, GenerateSteps};
use dsgc_ir::{Axis, Class, Data, Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::random::{Key, fold};

use crate::calls::{self, Named, graph_named};
use crate::rank::{Rank, any, of_all_parts, parts_of};
use crate::values;

/// A set of rows that a model continues together.
#[derive(Clone, Debug)]
pub struct Decoder {
    steps: GenerateSteps,
    /// `B`: rows of a call.
    rows: usize,
    /// `C`: columns that there is room for.
    width: usize,
    /// Most columns of one call.
    most: usize,
    /// Columns so far.
    place: usize,
    /// `[B, C]`: 1 where there is a token.
    segment: Vec<i32>,
}

/// What a model says after the last column.
#[derive(Clone, Debug)]
pub struct Next {
    /// `[B, V]`, in the device's width.
    pub logits: Tensor,
    /// The token that was chosen for each row.
    pub tokens: Vec<i32>,
}

impl Decoder {
    /// A decoder without columns, for graphs of this program, with the parameters that the device has: where `reshard` gathers
    /// them once for a generation, it is here.
    ///
    /// Errors are the device's.
    ///
    /// # Panics
    /// If the graphs are not what the pass `decode` makes.
    pub fn new(device: &mut dyn Device, program: &Program, steps: &GenerateSteps) -> Result<Decoder, Diag> {
        if let Some(gather) = &steps.gather {
            calls::call(device, program, gather, &[])?;
        }
        let graph = graph_named(program, &steps.prefill);
        let most_of = |input: &str, at: usize| {
            let value = graph.input_named(input).unwrap_or_else(|| panic!("bug: @{} has no `{input}`", graph.name));
            let dim = &graph.ty(value).dims[at];
            dim.eval(&graph.upper_bounds()).unwrap_or_else(|s| panic!("bug: @{} has no range of `{s}`", graph.name))
                as usize
        };
        let (rows, width, most) = (most_of("segment", 0), most_of("segment", 1), most_of("tokens", 1));
        Ok(Decoder { steps: steps.clone(), rows, width, most, place: 0, segment: vec![0; rows * width] })
    }

    /// Rows of a call; those that are not needed have segment 0.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Most columns of one call.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Columns that there is room for after those so far.
    pub fn room(&self) -> usize {
        self.width - self.place
    }

    /// Forgets all columns.
    pub fn reset(&mut self) {
        self.rewind(0);
    }

    /// Forgets all columns but the first ones, of which there are at least so many.
    pub fn rewind(&mut self, columns: usize) {
        debug_assert!(columns <= self.place, "bug: {columns} columns of {}", self.place);
        self.place = columns;
        self.segment.chunks_mut(self.width).for_each(|row| row[columns..].fill(0));
    }

    /// Adds columns, as [`Decoder::extend`], and gives the tokens alone: scores stay in the device.
    #[allow(clippy::too_many_arguments)] // Those of `extend`.
    pub fn tokens(
        &mut self,
        device: &mut dyn Device,
        program: &Program,
        tokens: &[i32],
        segment: &[i32],
        key: Key,
        row: &[i32],
    ) -> Result<Vec<i32>, Diag> {
        let mut outputs = self.add(device, program, (tokens, segment), key, row, &["token"])?;
        Ok(chosen(&mut outputs))
    }

    /// Adds columns: `tokens` and `segment` are `[B, Q]`, row-major, with segment 0 where there is none. `row` numbers
    /// the rows for sampling: what is drawn depends on the key, this number and the column only.
    ///
    /// Errors are the user's: more columns than there is room for, a token that the model does not know.
    pub fn extend(
        &mut self,
        device: &mut dyn Device,
        program: &Program,
        tokens: &[i32],
        segment: &[i32],
        key: Key,
        row: &[i32],
    ) -> Result<Next, Diag> {
        let mut outputs = self.add(device, program, (tokens, segment), key, row, &["token", "logits"])?;
        let logits = outputs.remove("logits").unwrap_or_else(|| panic!("bug: decoding does not give `logits`"));
        Ok(Next { logits, tokens: chosen(&mut outputs) })
    }

    /// Adds columns and gives the outputs that are wanted.
    fn add(
        &mut self,
        device: &mut dyn Device,
        program: &Program,
        (tokens, segment): (&[i32], &[i32]),
        key: Key,
        row: &[i32],
        wanted: &[&str],
    ) -> Result<Named, Diag> {
        let (rows, columns) = (self.rows, tokens.len() / self.rows);
        if columns > self.room() || columns > self.most {
            let most = self.room().min(self.most);
            return Err(Diag::error(format!("found {columns} more columns, and there is room for {most}")));
        }
        for (new, all) in segment.chunks(columns).zip(self.segment.chunks_mut(self.width)) {
            all[self.place..self.place + columns].copy_from_slice(new);
        }
        let graph = if columns == 1 { &self.steps.step } else { &self.steps.prefill };
        let inputs = Named::from([
            ("tokens".to_string(), Tensor::i32(&[rows, columns], tokens.to_vec())),
            ("segment".to_string(), Tensor::i32(&[rows, self.width], self.segment.clone())),
            ("place".to_string(), Tensor::i32(&[], vec![self.place as i32])),
            ("key".to_string(), Tensor::key(key)),
            ("row".to_string(), Tensor::i32(&[rows], row.to_vec())),
        ]);
        let outputs = calls::call_for(device, program, graph, &[&inputs], wanted)?;
        self.place += columns;
        Ok(outputs)
    }
}

/// The tokens among what decoding gives.
fn chosen(outputs: &mut Named) -> Vec<i32> {
    match outputs.remove("token").map(|t| t.data) {
        Some(Data::I32(tokens)) => tokens,
        _ => panic!("bug: decoding does not give `token`"),
    }
}

/// Runs a [`Generate`] on its prompt; `number` counts these calls and gives each its own random numbers.
///
/// Answers do not depend on how many rows a call has, so ranks share the prompts. Where the graphs move something between
/// them, all ranks make the same calls.
pub(crate) fn generate(
    rank: &mut Rank,
    program: &Program,
    generate: &Generate,
    prompt: &Named,
    seed: Key,
    number: u64,
) -> Result<Named, Diag> {
    let Rank { device, member } = rank;
    let ranks = member.group(Axis::Data);
    let device = device.as_mut();
    let steps = generate.steps.as_ref().unwrap_or_else(|| panic!("bug: `decode` left a generation as it was"));
    let graphs = [&steps.prefill, &steps.step].map(|graph| graph_named(program, graph));
    // Of graphs in pieces, other ranks along `pipeline` may have pieces that do.
    let collective = program.mesh.data > 1 && program.mesh.pipeline > 1
        || graphs.iter().any(|graph| graph.ops().any(|(_, op)| op.op.class() == Class::Collective));
    let mut decoder = Decoder::new(device, program, steps)?;
    let (ids, segments) = (member_of(generate, prompt, "tokens")?, member_of(generate, prompt, "segment")?);
    let width = prompt["tokens"].shape[1];
    let (prompts, samples) = (prompt["tokens"].shape[0], generate.samples);
    let total = width + generate.max_new_tokens;
    let key = fold(seed, number);
    let rows = decoder.rows();
    let groups = parts_of(prompts, rows, &ranks);
    // This rank's prompts: rows of its answers are counted from the first one.
    let begin = groups.first().map_or(0, |group| group.start);
    let answers = groups.last().map_or(0, |group| group.end - begin) * samples;
    let mut result = Answers {
        tokens: vec![generate.pad; answers * total],
        segment: vec![0; answers * total],
        answer: vec![false; answers * generate.max_new_tokens],
    };
    // The last column chooses the first token of an answer, by the answer's own random numbers.
    let common = if samples > 1 { width.saturating_sub(1) } else { 0 };
    for group in groups.into_iter().filter(|group| collective || !group.is_empty()) {
        let first = group.start;
        let numbers =
            |sample: usize| -> Vec<i32> { (first..first + rows).map(|p| (p * samples + sample) as i32).collect() };
        // Rows that the last call has too many are padding from the first column on.
        let columns = |of: Range<usize>| {
            let mut all = (vec![generate.pad; rows * of.len()], vec![0; rows * of.len()]);
            for (i, prompt) in group.clone().enumerate() {
                let (from, here) = (prompt * width + of.start, i * of.len());
                all.0[here..here + of.len()].copy_from_slice(&ids[from..from + of.len()]);
                all.1[here..here + of.len()].copy_from_slice(&segments[from..from + of.len()]);
            }
            all
        };
        decoder.reset();
        if common > 0 {
            let (tokens, segment) = columns(0..common);
            decoder.tokens(device, program, &tokens, &segment, key, &numbers(0))?;
        }
        for sample in 0..samples {
            decoder.rewind(common);
            let answer_of = |i: usize| (first - begin + i) * samples + sample;
            for i in 0..group.len() {
                let (from, to) = ((first + i) * width, answer_of(i) * total);
                result.tokens[to..to + width].copy_from_slice(&ids[from..from + width]);
                result.segment[to..to + width].copy_from_slice(&segments[from..from + width]);
            }
            let (mut tokens, mut segment) = columns(common..width);
            let row = numbers(sample);
            let mut live: Vec<bool> = (0..rows).map(|i| i < group.len()).collect();
            for column in 0..generate.max_new_tokens {
                let next = decoder.tokens(device, program, &tokens, &segment, key, &row)?;
                for i in (0..group.len()).filter(|&i| live[i]) {
                    let answer = answer_of(i);
                    result.tokens[answer * total + width + column] = next[i];
                    result.segment[answer * total + width + column] = 1;
                    result.answer[answer * generate.max_new_tokens + column] = true;
                }
                live.iter_mut().zip(&next).for_each(|(live, token)| *live &= Some(*token) != generate.stop);
                let going = live.contains(&true);
                if !(if collective { any(&ranks, going)? } else { going }) {
                    break;
                }
                tokens =
                    next.iter().zip(&live).map(|(&token, &live)| if live { token } else { generate.pad }).collect();
                segment = live.iter().map(|&live| i32::from(live)).collect();
            }
        }
    }
    let own = result.record(answers, width, generate.max_new_tokens);
    let mut record = Named::new();
    for rows in of_all_parts(&ranks, vec![own])? {
        values::append(&mut record, rows, "answers")?;
    }
    Ok(record)
}

/// What is made, row-major.
struct Answers {
    tokens: Vec<i32>,
    segment: Vec<i32>,
    answer: Vec<bool>,
}

impl Answers {
    fn record(self, rows: usize, prompt: usize, most: usize) -> Named {
        let width = prompt + most;
        let mut trained = vec![false; rows * width];
        for row in 0..rows {
            trained[row * width + prompt..][..most].copy_from_slice(&self.answer[row * most..][..most]);
        }
        let sequence = [
            ("tokens", Tensor::i32(&[rows, width], self.tokens)),
            ("segment", Tensor::i32(&[rows, width], self.segment)),
            ("trained", Tensor::bool(&[rows, width], trained)),
        ];
        let mut record = Named::from([("answer".to_string(), Tensor::bool(&[rows, most], self.answer))]);
        for (name, tensor) in sequence {
            record.insert(format!("seq.{name}"), tensor.clone());
            record.insert(name.to_string(), tensor);
        }
        record
    }
}

/// A member of the prompt: `i32[N, P]`.
fn member_of<'a>(generate: &Generate, prompt: &'a Named, name: &str) -> Result<&'a [i32], Diag> {
    match prompt.get(name) {
        Some(Tensor { shape, data: Data::I32(v) }) if shape.len() == 2 => Ok(v),
        _ => Err(Diag::error(format!(
            "found no `{}.{name}` of i32[N, P] for the answers of `{}`",
            generate.prompt, generate.role
        ))),
    }
}
