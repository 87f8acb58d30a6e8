//! Texts to tokens, and rows of tokens to tensors.
//!
//! A sequence is tokenised as one text, prefix and separators included, because the tokens at a joint depend on both
//! sides. The end-of-conversation token is appended as an id, since its text need not be a token of the vocabulary.

use std::collections::BTreeMap;

use dsgc_hf::Tokenizer;
use dsgc_ir::Tensor;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Longer, Packing, Part, Sequence, Side, Source};

use sha2::{Digest, Sha256};

use super::DataReport;
use super::pack::{cut, pack};

/// Rows that are tokenised at a time: enough for all cores, and few enough that their texts are no second data set.
const CHUNK: usize = 4096;

/// The tensors of some rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Number of rows, the tensors' first dimension.
    pub rows: usize,
    /// `<sequence>.tokens` and `<sequence>.segment` of i32 and `<sequence>.trained` of bool, all `[rows, T]`.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Rows as tokens, and how they came about.
#[derive(Default)]
pub(super) struct Tokenised {
    /// For each row its sequences, in the source's order.
    pub rows: Vec<Vec<Tokens>>,
    pub report: DataReport,
}

impl Tokenised {
    /// Adds all tokens, and what they are, to a hash.
    pub fn hash(&self, hash: &mut Sha256) {
        hash.update(self.rows.len().to_le_bytes());
        for tokens in self.rows.iter().flatten() {
            hash.update(tokens.len().to_le_bytes());
            let words = tokens.ids.iter().chain(&tokens.segment).flat_map(|word| word.to_le_bytes());
            hash.update(words.chain(tokens.trained.iter().map(|&trained| u8::from(trained))).collect::<Vec<u8>>());
        }
    }
}

/// One sequence of one row.
#[derive(Clone)]
pub(super) struct Tokens {
    ids: Vec<i32>,
    trained: Vec<bool>,
    /// The text of its row that each belongs to, from 1.
    segment: Vec<i32>,
}

impl Tokens {
    fn new(ids: Vec<i32>, trained: Vec<bool>) -> Tokens {
        let segment = vec![1; ids.len()];
        Tokens { ids, trained, segment }
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    /// As the first text of a row with others. Of none of them the first token is a target: before it stands another text,
    /// or nothing.
    pub(super) fn first(mut self) -> Tokens {
        if let Some(first) = self.trained.first_mut() {
            *first = false;
        }
        self
    }

    /// Takes off what is behind the first `len` tokens.
    pub(super) fn split_off(&mut self, len: usize) -> Tokens {
        let len = len.min(self.len());
        let (ids, trained) = (self.ids.split_off(len), self.trained.split_off(len));
        Tokens { ids, trained, segment: self.segment.split_off(len) }
    }

    /// Puts a text behind those that are there.
    pub(super) fn append(&mut self, text: Tokens) {
        let number = self.segment.last().map_or(1, |last| last + 1);
        let text = text.first();
        self.segment.extend(vec![number; text.ids.len()]);
        self.ids.extend(text.ids);
        self.trained.extend(text.trained);
    }
}

/// The columns that the sequences of a source need, each once. Says if the sequences cannot be made.
pub(super) fn columns(source: &Source) -> Result<Vec<String>, Vec<Diag>> {
    let (mut columns, mut errors): (Vec<String>, Vec<Diag>) = (Vec::new(), Vec::new());
    for sequence in &source.sequences {
        let fields = fields(sequence);
        if fields.is_empty() {
            errors.push(Diag::error(format!("sequence `{}` has no field, expected one at least", sequence.name)));
        }
        if sequence.parts.iter().rev().skip(1).any(|p| matches!(p, Part::Eoc)) {
            errors.push(
                Diag::error(format!("sequence `{}` has `eoc` before its end", sequence.name))
                    .help("write it as the last part"),
            );
        }
        for field in fields {
            let column = column(source, field);
            if !columns.iter().any(|c| c == column) {
                columns.push(column.to_owned());
            }
        }
    }
    if source.max_length == 0 {
        errors.push(Diag::error("found a max_length of 0, expected 1 or more"));
    }
    if source.pad_id < 0 {
        errors.push(Diag::error(format!("found {} as the id of the padding, expected a token's id", source.pad_id)));
    }
    if errors.is_empty() { Ok(columns) } else { Err(errors.into_iter().map(|e| e.label(source.span, "")).collect()) }
}

/// Tokenises the rows `take` of `texts`, whose columns are those of [`columns`].
pub(super) fn tokenise(
    source: &Source,
    texts: &[Vec<String>],
    take: &[usize],
    tokenizer: &Tokenizer,
) -> Result<Tokenised, Vec<Diag>> {
    let columns = columns(source)?;
    let text_of = |row: usize, field: &str| {
        let column = column(source, field);
        columns.iter().position(|c| c == column).map_or("", |at| texts[row][at].as_str())
    };
    let mut done = Tokenised::default();
    done.report.rows = take.len();
    for chunk in take.chunks(CHUNK) {
        let mut rows: Vec<Vec<Tokens>> = chunk.iter().map(|_| Vec::new()).collect();
        for sequence in &source.sequences {
            let fields = fields(sequence);
            let joined: Vec<String> = chunk
                .iter()
                .map(|&row| {
                    let texts: Vec<&str> = fields.iter().map(|f| text_of(row, f)).collect();
                    format!("{}{}", source.prefix, texts.join(&source.separator))
                })
                .collect();
            let joined: Vec<&str> = joined.iter().map(String::as_str).collect();
            let encoded = tokenizer.encode_all(&joined).map_err(|e| vec![e.label(source.span, "")])?;
            for ((tokens, &row), encoded) in rows.iter_mut().zip(chunk).zip(encoded) {
                let prompt_end = match fields[..] {
                    [first, _, ..] if !source.train_on_prompt => source.prefix.len() + text_of(row, first).len(),
                    _ => 0,
                };
                let (mut ids, mut trained) = (encoded.ids, Vec::with_capacity(encoded.starts.len() + 1));
                trained.extend(encoded.starts.iter().map(|&start| start >= prompt_end));
                if sequence.parts.last() == Some(&Part::Eoc) {
                    ids.push(source.eoc_id);
                    trained.push(true);
                }
                tokens.push(Tokens::new(ids, trained));
            }
        }
        for row in rows {
            done.add(source, row);
        }
    }
    done.check(source).map_err(|e| vec![e.label(source.span, "")])?;
    let packed = match source.packing {
        Packing::None | Packing::Batch => return Ok(done),
        Packing::Texts => pack(done.rows.into_iter().flatten().collect(), source.max_length),
        Packing::Blocks => cut(done.rows.into_iter().flatten().collect(), source.max_length),
    };
    done.rows = packed.into_iter().map(|row| vec![row]).collect();
    done.report.packed = Some(done.rows.len());
    Ok(done)
}

impl Tokenised {
    fn add(&mut self, source: &Source, mut row: Vec<Tokens>) {
        let longest = if source.packing == Packing::Blocks { usize::MAX } else { source.max_length };
        if row.iter().any(|s| s.ids.len() > longest) {
            match source.longer {
                Longer::Drop => {
                    self.report.dropped += 1;
                    return;
                }
                Longer::Truncate => self.report.truncated += 1,
            }
        }
        for sequence in &mut row {
            sequence.split_off(longest);
            self.report.tokens += sequence.ids.len();
            self.report.trained_tokens += sequence.trained.iter().filter(|&&t| t).count();
        }
        if row.iter().any(|s| !s.trained.contains(&true)) {
            self.report.rows_without_trained += 1;
        }
        self.rows.push(row);
    }

    fn check(&self, source: &Source) -> Result<(), Diag> {
        let DataReport { rows, dropped, .. } = self.report;
        if self.rows.is_empty() {
            return Err(Diag::error(format!(
                "all {rows} rows of `{}` are dropped, {dropped} of them for more than {} tokens",
                source.path, source.max_length
            ))
            .help("raise `max_length`"));
        }
        if self.report.trained_tokens == 0 {
            return Err(Diag::error(format!(
                "none of the {} tokens of `{}` is a training target: with a max_length of {} nothing but prompts is left",
                self.report.tokens, source.path, source.max_length
            ))
            .help("raise `max_length`, or set `train_on_prompt: true`"));
        }
        Ok(())
    }
}

/// The tensors of the rows of these numbers; of fewer rows where texts of a batch share them.
pub(super) fn batch(source: &Source, data: &Tokenised, rows: &[usize]) -> Batch {
    let longest = |at: usize| rows.iter().map(|&r| data.rows[r][at].ids.len()).max().unwrap_or(0);
    let over_all = (0..source.sequences.len()).map(longest).max().unwrap_or(0);
    let texts = |at: usize| rows.iter().map(move |&r| &data.rows[r][at]);
    let shared = (source.packing == Packing::Batch).then(|| pack(texts(0).cloned().collect(), over_all));
    let mut tensors = BTreeMap::new();
    for (at, sequence) in source.sequences.iter().enumerate() {
        let width = if source.pad_to_max {
            source.max_length
        } else if source.same_length {
            over_all
        } else {
            longest(at)
        };
        // A dimension of 0 is no tensor that a graph could be run on.
        let width = width.max(1);
        let rows: Vec<&Tokens> = shared.as_ref().map_or_else(|| texts(at).collect(), |rows| rows.iter().collect());
        let size = rows.len() * width;
        let (mut tokens, mut segment, mut trained) = (vec![source.pad_id; size], vec![0; size], vec![false; size]);
        for (i, row) in rows.iter().enumerate() {
            let before = match source.pad {
                Side::Right => 0,
                Side::Left => width - row.ids.len(),
            };
            let place = i * width + before..i * width + before + row.ids.len();
            tokens[place.clone()].copy_from_slice(&row.ids);
            trained[place.clone()].copy_from_slice(&row.trained);
            segment[place].copy_from_slice(&row.segment);
        }
        let shape = [rows.len(), width];
        tensors.insert(format!("{}.tokens", sequence.name), Tensor::i32(&shape, tokens));
        tensors.insert(format!("{}.segment", sequence.name), Tensor::i32(&shape, segment));
        tensors.insert(format!("{}.trained", sequence.name), Tensor::bool(&shape, trained));
    }
    Batch { rows: shared.map_or(rows.len(), |shared| shared.len()), tensors }
}

/// The fields of a sequence, in order.
fn fields(sequence: &Sequence) -> Vec<&str> {
    let fields = sequence.parts.iter().filter_map(|part| match part {
        Part::Field(name) => Some(name.as_str()),
        Part::Eoc => None,
    });
    fields.collect()
}

/// The column of a field: as `fields` says, else the one of its name.
fn column<'a>(source: &'a Source, field: &'a str) -> &'a str {
    source.fields.get(field).map_or(field, String::as_str)
}
