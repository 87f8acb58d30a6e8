//! `dsgc score`: what a model makes of given texts.

use std::fs;
use std::path::{Path, PathBuf};

use dsgc_hf::Tokenizer;
use dsgc_ir::diag::{Diag, Sources, Span};
use dsgc_ir::{Data, Tensor};
use dsgc_kernels::ranks::Member;
use dsgc_passes::PassContext;
use dsgc_runtime::Scorer;
use dsgc_yaml::load::FolderModel;
use serde::Deserialize;
use serde_json::json;

use super::Done;
use crate::console::{Failure, say};
use crate::device::DeviceName;
use crate::host::Disk;
use crate::weights::WeightsArgs;

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
    #[command(flatten)]
    weights: WeightsArgs,
}

/// A line of the input.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    tokens: Option<Vec<i32>>,
    text: Option<String>,
}

/// What is to be scored, and where it stands.
struct Text {
    tokens: Vec<i32>,
    at: Span,
}

/// Mistakes of a file that are told one by one: enough to see a pattern, few enough to read.
const SHOWN: usize = 10;

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let name = args.input.display().to_string();
    let text = fs::read_to_string(&args.input).map_err(|e| Diag::error(format!("cannot read `{name}`: {e}")))?;
    let mut sources = Sources::default();
    let source = sources.add(&name, &text);
    let fail = |mut errors: Vec<Diag>| {
        let more = errors.len().saturating_sub(SHOWN);
        errors.truncate(SHOWN);
        if more > 0 {
            errors.push(Diag::error(format!("there are {more} more errors in `{name}`")));
        }
        Failure::new(errors, &sources)
    };
    let texts = read(&text, source, &args.model).map_err(fail)?;
    if texts.is_empty() {
        return Err(fail(vec![Diag::error(format!("found no row in `{name}`"))]));
    }
    let length = texts.iter().map(|t| t.tokens.len()).max().unwrap_or(0).max(2);
    let mut program = FolderModel::open(&args.model, &Disk)?.score(1, length)?;
    args.weights.set(&mut program);
    let chosen = args.device.chosen();
    let target = chosen.target(&program.mesh)?;
    let context = PassContext::new(target.as_ref());
    let planned = dsgc_passes::compile(program, &context, &mut |_| {})?;
    let mut scorer = Scorer::open(planned.clone(), chosen.open(planned, Member::alone())?, &args.model)?;
    let wrong: Vec<Diag> = texts.iter().filter_map(|t| Some(scorer.check(&t.tokens).err()?.label(t.at, ""))).collect();
    if !wrong.is_empty() {
        return Err(fail(wrong));
    }
    let mut logits = Vec::new();
    for text in &texts {
        let score = scorer.score(&text.tokens)?;
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

/// The tokens of all rows of a file; the tokenizer is that of the model. All mistakes come at once.
fn read(text: &str, source: u32, model: &Path) -> Result<Vec<Text>, Vec<Diag>> {
    let (mut texts, mut errors, mut tokenizer) = (Vec::new(), Vec::new(), None);
    // Editors of Windows begin files with a byte order mark.
    let text = text.trim_start_matches('\u{feff}');
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = |column: usize| Span { source, line: i as u32 + 1, column: column.max(1) as u32, len: 1 };
        let tokens = match serde_json::from_str::<Row>(line) {
            Ok(Row { tokens: Some(tokens), text: None }) => Ok(tokens),
            Ok(Row { tokens: None, text: Some(text) }) => {
                if tokenizer.is_none() {
                    tokenizer = Some(Tokenizer::load(model).map_err(|e| vec![e])?);
                }
                let tokenizer = tokenizer.as_ref().expect("it was just loaded");
                tokenizer.encode(&text).map(|e| e.ids).map_err(|e| e.label(at(1), ""))
            }
            Ok(_) => Err(Diag::error("expected either `tokens` or `text`").label(at(1), "")),
            Err(error) => {
                let message = error.to_string();
                // The place that serde_json gives is one in the line.
                let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
                Err(Diag::error(format!("found no such row: {message}")).label(at(error.column()), ""))
            }
        };
        match tokens {
            Ok(tokens) => texts.push(Text { tokens, at: at(1) }),
            Err(diag) => errors.push(diag),
        }
    }
    if errors.is_empty() { Ok(texts) } else { Err(errors) }
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
