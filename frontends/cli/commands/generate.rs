//! `dsgc generate`: continues a text.

use std::path::PathBuf;

use dsgc_hf::{Tokenizer, end_tokens};
use dsgc_ir::diag::Diag;
use dsgc_yaml::load::FolderModel;

use super::Done;
use crate::answers::{Printer, SamplingArgs};
use crate::console::say;
use crate::host::Disk;
use crate::profile;

/// Arguments of `dsgc generate`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face folder.
    model: PathBuf,
    /// What is continued; the answer is printed as text.
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// The same as ids of tokens; the answer is printed as ids.
    #[arg(long, value_delimiter = ',', value_name = "ID,ID,...")]
    tokens: Option<Vec<i32>>,
    /// Most tokens of the answer, which ends earlier at an end token; 128 unless given, or what the model has room for.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: Option<u32>,
    /// Print after the answer which ops took how long.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Most new tokens where nobody says.
const NEW_TOKENS: usize = 128;
/// Most columns of the prompt that are computed at once.
const AT_ONCE: usize = 512;

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let model = FolderModel::open(&args.model, &Disk)?;
    let tokenizer = args.prompt.as_ref().map(|_| Tokenizer::load(&args.model)).transpose()?;
    let mut tokens = match (&args.prompt, &tokenizer) {
        (Some(prompt), Some(tokenizer)) => tokenizer.encode(prompt)?.ids,
        _ => args.tokens.clone().unwrap_or_default(),
    };
    if tokens.is_empty() {
        return Err(Diag::error("found an empty prompt, expected a token or more").into());
    }
    let room = model.positions().map_or(usize::MAX, |all| all.saturating_sub(tokens.len()));
    let new = match args.max_new_tokens {
        Some(new) => new as usize,
        None => NEW_TOKENS.min(room),
    };
    if new > room || new == 0 {
        let positions = model.positions().unwrap_or_default();
        let message = format!(
            "found a prompt of {} tokens and {new} new ones, but `{}` has {positions} positions",
            tokens.len(),
            args.model.display()
        );
        return Err(Diag::error(message).help("a shorter prompt, or a smaller `--max-new-tokens`").into());
    }
    let ends = end_tokens(&args.model)?;
    let length = tokens.len() + new;
    let mut generator = args.sampling.open(model, &args.model, length, tokens.len().min(AT_ONCE), args.profile)?;
    let begin = tokens.len();
    let mut printer = tokenizer.as_ref().map(Printer::new);
    while tokens.len() < length {
        let next = generator.next(&tokens)?;
        if ends.contains(&next) {
            break;
        }
        tokens.push(next);
        if let Some(printer) = &mut printer {
            printer.push(next)?;
        }
    }
    match printer {
        Some(printer) => drop(printer.end()?),
        None => say(tokens[begin..].iter().map(i32::to_string).collect::<Vec<_>>().join(",")),
    }
    if args.profile {
        profile::show(generator.device());
    }
    Ok(())
}
