//! Rows of a file as batches of tokens.
//!
//! ```text
//! file --rows--> texts --order: held out, split--> this stage's texts --batch: tokenise--> Dataset
//! Dataset.epoch(n) -> row numbers in the order of that epoch;  Dataset.batch(&numbers) -> tensors
//! ```
//!
//! Which rows a stage takes is decided before tokenisation, in this order, each step with the stage's seed:
//!
//! 1. `eval: <share>` cuts the file in two as if it were a split of `[1 - share, share]`; `eval: <path>` reads another file;
//! 2. `split` takes the stage's part, of the training rows and of the held-out rows alike (as DeepSpeed-Chat does);
//! 3. rows that are too long are cut or dropped, and counted in the [`DataReport`].
//!
//! A split leaves rows in the shuffled order in which DeepSpeed-Chat has them; a share alone leaves them in the file's.
//! Everything is tokenised once, when the data set is opened, and kept in memory.

mod batch;
pub(crate) mod order;
mod pack;
mod rows;

pub use batch::Batch;
pub use rows::columns_of_file;

use dsgc_hf::Tokenizer;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Held, Shuffle, Source};

use sha2::{Digest, Sha256};

use crate::checkpoint::hex;
use batch::{Tokenised, batch, columns, tokenise};

/// The rows of a source, tokenised.
pub struct Dataset {
    source: Source,
    seed: u64,
    train: Tokenised,
    eval: Option<Tokenised>,
}

/// What became of the rows of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataReport {
    /// Rows that belong to this stage, dropped ones included.
    pub rows: usize,
    /// Rows left out because a sequence is longer than `max_length`.
    pub dropped: usize,
    /// Rows of which a sequence was cut at `max_length`.
    pub truncated: usize,
    /// Tokens of all sequences that are left, without padding.
    pub tokens: usize,
    /// Those of them that are training targets.
    pub trained_tokens: usize,
    /// Rows of which a sequence has no training target, because what was to be learnt is cut off or empty.
    pub rows_without_trained: usize,
    /// Rows that the texts were packed into, if they were.
    pub packed: Option<usize>,
}

impl Dataset {
    /// Reads and tokenises a source for a stage with this seed.
    pub fn open(source: &Source, seed: u64, tokenizer: &Tokenizer) -> Result<Dataset, Vec<Diag>> {
        let columns = columns(source)?;
        let texts = rows::read(&source.path, &columns, source.max_rows, source.span)?;
        let all: Vec<usize> = (0..texts.len()).collect();
        let (train, eval) = match &source.eval {
            None => (all, None),
            Some(Held::Share(share)) => {
                let (train, eval) = order::hold_out(source, *share, seed, &all).map_err(|e| vec![e])?;
                let eval = order::take(source, seed, eval).map_err(|e| vec![e])?;
                (train, Some(tokenise(source, &texts, &eval, tokenizer)?))
            }
            Some(Held::Path(path)) => {
                let texts = rows::read(path, &columns, source.max_rows, source.span)?;
                let eval = order::take(source, seed, (0..texts.len()).collect()).map_err(|e| vec![e])?;
                (all, Some(tokenise(source, &texts, &eval, tokenizer)?))
            }
        };
        let train = order::take(source, seed, train).map_err(|e| vec![e])?;
        let train = tokenise(source, &texts, &train, tokenizer)?;
        Ok(Dataset { source: source.clone(), seed, train, eval })
    }

    /// Number of training rows.
    pub fn len(&self) -> usize {
        self.train.rows.len()
    }

    /// Whether there is no training row; never so after [`Dataset::open`].
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of held-out rows.
    pub fn eval_len(&self) -> usize {
        self.eval.as_ref().map_or(0, |e| e.rows.len())
    }

    /// What became of the training rows.
    pub fn report(&self) -> &DataReport {
        &self.train.report
    }

    /// What became of the held-out rows, if any are held out.
    pub fn eval_report(&self) -> Option<&DataReport> {
        self.eval.as_ref().map(|e| &e.report)
    }

    /// How many rows there are, and a hash of all their tokens.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        [Some(&self.train), self.eval.as_ref()].into_iter().flatten().for_each(|rows| rows.hash(&mut hash));
        let (train, eval) = (self.len(), self.eval_len());
        format!("{train} for training and {eval} held out, whose SHA-256 is {}", hex(hash))
    }

    /// The training rows in the order of an epoch, which counts from 0.
    ///
    /// `Shuffle::EachEpoch` is what numpy's `RandomState([seed & m, seed >> 32, epoch & m, epoch >> 32]).shuffle` makes of
    /// `0..len`, with `m = 2^32 - 1`: it depends on nothing but the seed, the epoch and the number of rows.
    pub fn epoch(&self, epoch: u64) -> Vec<usize> {
        match self.source.shuffle {
            Shuffle::None => (0..self.len()).collect(),
            Shuffle::EachEpoch => order::of_epoch(self.seed, epoch, self.len()),
            Shuffle::DeepspeedChat => order::torch_randperm(0, self.len()),
        }
    }

    /// The tensors of some training rows, by number in `0..len`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn batch(&self, rows: &[usize]) -> Batch {
        batch(&self.source, &self.train, rows)
    }

    /// The tensors of some held-out rows, by number in `0..eval_len`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn eval_batch(&self, rows: &[usize]) -> Batch {
        batch(&self.source, self.eval.as_ref().expect("no rows are held out"), rows)
    }
}

#[cfg(test)]
#[path = "data/tests.rs"]
mod tests;
