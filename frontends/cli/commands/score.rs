//! `dsgc score`: what a model makes of given texts.

use std::fs;
use std::path::{Path, PathBuf};

use dsgc_hf::Tokenizer;
use dsgc_ir::diag::{Diag, Sources, Span};
use dsgc_ir::{Data, Tensor};
use dsgc_passes::PassContext;
use dsgc_runtime::Scorer;
use dsgc_yaml::load;
use serde::Deserialize;
use serde_json::json;

use super::Done;
use crate::console::{Failure, say};
use crate::device::DeviceName;
use crate::host::Disk;

/// Arguments of `dsgc score`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face folder.
    model: PathBuf,
    /// Rows, one JSON object per line, with `tokens` (a list of ids) or `text`.
    #[arg(long)]
    input: PathBuf,
    /// Also write the logits: a safetensors file with a tensor `row.<n>` of shape [T, V] per row, from 0.
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    /// The device to run on.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
}

/// A line of the input.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    tokens: Option<Vec<i32>>,
    text: Option<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let rows = read(args)?;
    let length = rows.iter().map(Vec::len).max().unwrap_or(2);
    let program = load::score(&args.model, 1, length, &Disk)?;
    let target = args.device.target();
    let context = PassContext { target: target.as_ref() };
    let planned = dsgc_passes::compile(program, &context, &mut |_, _, _| {})?;
    let mut scorer = Scorer::open(planned.clone(), args.device.open(planned), &args.model)?;
    let mut logits = Vec::new();
    for (i, tokens) in rows.iter().enumerate() {
        let score = scorer.score(tokens).map_err(|diag| in_row(diag, i))?;
        let logp: Vec<f64> = score.logp.iter().copied().map(shortest).collect();
        say(json!({ "logp": logp }));
        if args.logits.is_some() {
            logits.push(score.logits);
        }
    }
    match &args.logits {
        Some(path) => write(path, &logits).map_err(Failure::from),
        None => Ok(()),
    }
}

/// A number of single precision as the double that prints with as few digits; others as they are.
fn shortest(x: f64) -> f64 {
    let single = x as f32;
    if f64::from(single) == x { single.to_string().parse().unwrap_or(x) } else { x }
}

fn in_row(mut diag: Diag, row: usize) -> Diag {
    diag.message = format!("row {row}: {}", diag.message);
    // The place is a line of the model's document, which the user did not write.
    diag.labels.clear();
    diag
}

/// The tokens of all rows. All mistakes come at once.
fn read(args: &Args) -> Result<Vec<Vec<i32>>, Failure> {
    let name = args.input.display().to_string();
    let text = fs::read_to_string(&args.input).map_err(|e| Diag::error(format!("cannot read `{name}`: {e}")))?;
    let mut sources = Sources::default();
    let source = sources.add(&name, &text);
    let (mut rows, mut errors, mut tokenizer) = (Vec::new(), Vec::new(), None);
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = |column: usize| Span { source, line: i as u32 + 1, column: column.max(1) as u32, len: 1 };
        let found = match serde_json::from_str::<Row>(line) {
            Ok(Row { tokens: Some(tokens), text: None }) => Ok(tokens),
            Ok(Row { tokens: None, text: Some(text) }) => {
                if tokenizer.is_none() {
                    tokenizer = Some(Tokenizer::load(&args.model)?);
                }
                let tokenizer = tokenizer.as_ref().expect("it was just loaded");
                tokenizer.encode(&text).map(|e| e.ids)
            }
            Ok(_) => Err(Diag::error("expected either `tokens` or `text`")),
            Err(error) => {
                errors.push(Diag::error(format!("found no such row: {error}")).label(at(error.column()), ""));
                continue;
            }
        };
        match found {
            Ok(tokens) if tokens.len() < 2 => {
                let diag = Diag::error(format!("found {} tokens, expected at least 2", tokens.len()));
                errors.push(diag.label(at(1), "").help("there is no next token to score"));
            }
            Ok(tokens) => rows.push(tokens),
            Err(diag) => errors.push(diag.label(at(1), "")),
        }
    }
    if errors.is_empty() && rows.is_empty() {
        errors.push(Diag::error(format!("found no row in `{name}`")));
    }
    if errors.is_empty() { Ok(rows) } else { Err(Failure::new(errors, &sources)) }
}

/// Writes logits in single precision.
fn write(path: &Path, logits: &[Tensor]) -> Result<(), Diag> {
    let bytes: Vec<Vec<u8>> = logits
        .iter()
        .map(|tensor| match &tensor.clone().single().data {
            Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            other => panic!("bug: logits are {other:?}"),
        })
        .collect();
    let views = logits.iter().zip(&bytes).enumerate().map(|(i, (tensor, bytes))| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, tensor.shape.clone(), bytes);
        (format!("row.{i}"), view.expect("the bytes are those of the shape"))
    });
    safetensors::serialize_to_file(views, None, path)
        .map_err(|e| Diag::error(format!("cannot write `{}`: {e}", path.display())))
}
