//! The plan of a stage: what the host calls in which order, and with what.

use serde::{Deserialize, Serialize};

use crate::schedule::Work;

/// A statement of the plan.
///
/// Results have names; a name stands for a record, whose tensors are found by path: `exp.rows.seq.tokens`. The first
/// dim of a tensor of a batch, a rollout or a table counts rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statement {
    /// Once for every batch of rows; the outermost one is repeated for `num_epochs`.
    For {
        /// Name of the batch in the body.
        batch: String,
        /// Where the batches come from.
        rows: Rows,
        /// The body.
        body: Vec<Statement>,
    },
    /// A fixed number of times.
    Repeat {
        /// How often.
        times: u64,
        /// The body.
        body: Vec<Statement>,
    },
    /// A graph is called; its outputs become a record, and those that are one number are metrics.
    Call(Call),
    /// A model continues sequences.
    Generate(Generate),
    /// The next batch of a source, which begins again at its end.
    Next {
        /// Name of the batch.
        name: String,
        /// The source.
        source: String,
    },
    /// Records side by side: one record with the members of all.
    Join {
        /// Name of the result.
        name: String,
        /// Paths of the records; of a path to a tensor, the last part is the member's name.
        parts: Vec<String>,
    },
    /// The newest rows of a table over all steps so far: a replay buffer.
    Recent {
        /// Name of the result.
        name: String,
        /// Path of the record whose rows are added.
        table: String,
        /// Most rows that are kept.
        rows: usize,
    },
    /// One optimizer step of a role on a loss.
    Update(Update),
}

/// Where the batches of a `for` come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// A source, in batches of its `batch_size`.
    Source(String),
    /// A table of this step, cut by rows.
    Minibatches {
        /// Path of the record.
        table: String,
        /// Rows of a batch; the last one may be smaller.
        size: usize,
        /// Path of a `bool[B]`: rows that take part.
        keep: Option<String>,
        /// Whether rows are drawn in a random order, another one each time. Where all rows are one batch they stay in
        /// theirs.
        shuffle: bool,
    },
}

/// What a graph's input gets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// A tensor by its path: `batch.text.tokens`.
    Path(String),
    /// The state of the recipe with this name: the program's state `state/<name>`.
    State(String),
    /// A number, `f32[]`.
    Number(f64),
}

/// Graph input -> what it gets, e.g. `text.tokens` -> `batch.text.tokens`.
pub type Operands = Vec<(String, Operand)>;

/// A call of a graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Name of its record of outputs.
    pub name: Option<String>,
    /// The graph.
    pub graph: String,
    /// Its inputs.
    pub args: Operands,
    /// Whether the outputs are kept per row of the source's file, and computed once only.
    pub cached: bool,
    /// How it is run on a batch that is larger than one call; filled in by the pass `autodiff`.
    pub steps: Option<CallSteps>,
}

/// The graphs that `autodiff` derives for one call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallSteps {
    /// The batch is one call of the graph itself.
    Whole,
    /// Several micro-batches.
    Split {
        /// Totals that rows depend on, each called per micro-batch in turn, with the totals before it as inputs.
        count: Vec<String>,
        /// Outputs with rows, and the other totals, per micro-batch.
        rows: String,
        /// Outputs that are one number, from the totals of all; `None` when there are none.
        finish: Option<String>,
    },
    /// The batch is one call, and so are updates that follow on its rows; filled in by the pass `join_updates`.
    Joined(Joined),
}

/// A call and the updates that follow it, in one graph: what both compute is computed once.
///
/// It runs where all rows of the call take part in the updates. Otherwise the call's own graph runs, and later the
/// updates' own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Joined {
    /// The graph. It takes what the call takes and, of update `k`, what the call does not give, as `update.<k>.<input>`; and
    /// gives what they give, named alike.
    pub graph: String,
    /// A graph of the call's inputs that gives the rows that take part, `keep: bool[B]`; `None` where all do.
    pub keep: Option<String>,
    /// The first updates that run after the call, in their order, as they stand in the plan.
    pub updates: Vec<Update>,
}

impl Joined {
    /// Name of an input or output of update `k`.
    pub fn name(k: usize, of: &str) -> String {
        format!("update.{k}.{of}")
    }
}

/// A model continues sequences by one token after the other.
///
/// The record of the result: `tokens: i32[N, P + A]` (the prompt and the answer, padded after its end),
/// `segment: i32[N, P + A]`, `trained: bool[N, P + A]` (the answer), all three again under `seq`, and `answer: bool[N, A]`
/// (up to and with the end token). The `samples` answers to a prompt stand together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// Name of the result.
    pub name: String,
    /// The role that continues.
    pub role: String,
    /// Path of a left-padded sequence, e.g. `batch.prompt`.
    pub prompt: String,
    /// Answers per prompt.
    pub samples: usize,
    /// `A`.
    pub max_new_tokens: usize,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Id of the token that ends an answer.
    pub stop: Option<i32>,
    /// Id of the token after an answer's end.
    pub pad: i32,
    /// The graph `logits(tokens, segment)` of the role, from which the pass `decode` derives `steps`.
    pub forward: String,
    /// Most columns of a prompt.
    pub prompt_width: usize,
    /// Rows per call.
    pub rows: usize,
    /// The graphs that run; filled in by the pass `decode`.
    pub steps: Option<GenerateSteps>,
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only this many most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: f64,
}

/// The graphs that the pass `decode` derives for one [`Generate`]. Both take `tokens: i32[B, Q]` (new columns),
/// `segment: i32[B, C]` (of all columns, 0 where nothing is yet), `place: i32[]` (column of the first new token),
/// `key: key[]` and `row: i32[B]` (number of the answer, for sampling), and give `logits: f32[B, V]` of the last new
/// column and `token: i32[B]`. Keys and values of earlier columns are states of the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateSteps {
    /// What runs once before the others where ranks have parts of parameters: it gathers them for all calls. Filled in by
    /// the pass `reshard`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gather: Option<String>,
    /// Any number of new columns up to the prompt's width.
    pub prefill: String,
    /// One new column.
    pub step: String,
}

/// One optimizer step: `update(role, graph(args))`, or of a sum of losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// The role that is trained.
    pub role: String,
    /// The losses that are added.
    pub terms: Vec<Term>,
    /// How it is run; filled in by the pass `autodiff`.
    pub steps: Option<UpdateSteps>,
}

impl Update {
    /// The graph that gives the squares of its gradients, if it steps together with the updates beside it.
    pub fn squares(&self) -> Option<&str> {
        match &self.steps {
            Some(UpdateSteps::Split { squares, .. }) => squares.as_deref(),
            _ => None,
        }
    }

    /// Updates that step together: those at the head of `body` that say so, one per role. One where the first does not.
    pub fn together(body: &[Statement]) -> Vec<&Update> {
        let mut group: Vec<&Update> = Vec::new();
        for statement in body {
            match statement {
                Statement::Update(update)
                    if group.is_empty()
                        || group[0].squares().is_some()
                            && update.squares().is_some()
                            && group.iter().all(|other| other.role != update.role) =>
                {
                    group.push(update);
                }
                _ => break,
            }
        }
        group
    }
}

/// A loss in a sum of losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Term {
    /// Factor on the loss.
    pub weight: f64,
    /// The loss graph; its output `loss` is differentiated, the other scalars are metrics.
    pub graph: String,
    /// Its inputs.
    pub args: Operands,
}

/// The graphs that `autodiff` derives for one update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateSteps {
    /// The optimizer batch of the only term is one call: loss, gradient and optimizer in a single graph.
    Whole {
        /// That graph.
        step: String,
    },
    /// Several micro-batches or terms: sums over the batch are accumulated and finished once (D1). Also a step that waits
    /// for others.
    Split {
        /// One per term.
        terms: Vec<TermSteps>,
        /// Where the update steps together with those beside it: the graph that gives `squares: f32[]`, not finite where
        /// the role's gradients are not; `apply` takes the sum of the others' as `squares`.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        squares: Option<String>,
        /// Clipping, optimizer, accumulators back to zero.
        apply: String,
    },
}

/// The graphs of one term.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TermSteps {
    /// Sums that do not depend on parameters, each called per micro-batch in turn, with the sums before it as inputs.
    pub count: Vec<String>,
    /// Gradients, times the term's weight, added to their accumulators, and the sums that depend on parameters, per
    /// micro-batch.
    pub grad: String,
    /// Loss and metrics from the totals of all sums.
    pub finish: String,
}

/// A piece of a graph, which the ranks of one place along `pipeline` run.
///
/// It takes the inputs of the graph, and values of other pieces by their names there. A graph in pieces is itself left with its
/// inputs alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// The graph of the piece, which only programs of its place have.
    pub graph: String,
    /// The place.
    pub place: usize,
    /// What it does.
    pub work: Work,
    /// What it takes from pieces before it, of its own place or of another.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub takes: Vec<Taken>,
    /// The outputs of the graph that it gives.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub gives: Vec<String>,
    /// The states that it writes.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub writes: Vec<String>,
}

/// What a piece takes from another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Taken {
    /// The number of that piece.
    pub piece: usize,
    /// Outputs there, and inputs here.
    pub values: Vec<String>,
}

/// Calls on all held-out rows of a source; `B` is the whole set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluate {
    /// The source whose held-out rows are used; they are the batch `<source>.eval`.
    pub source: String,
    /// Calls and generations.
    pub body: Vec<Statement>,
}
