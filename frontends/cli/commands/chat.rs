//! `dsgc chat`: a conversation with a model.

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use dsgc_hf::{ChatTemplate, Message, PLAIN_TEMPLATE, Tokenizer, end_tokens};
use dsgc_ir::diag::Diag;
use dsgc_runtime::Generator;
use dsgc_yaml::load::FolderModel;

use super::Done;
use crate::answers::{Printer, SamplingArgs};
use crate::console::{Failure, note, say_part, show};
use crate::host::Disk;

/// Arguments of `dsgc chat`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face folder.
    model: PathBuf,
    /// What the model is told before the conversation, if its template has a place for it.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// A Jinja template of conversations, instead of the folder's.
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Most tokens of the conversation, of which the oldest are forgotten; at most the model's positions.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..))]
    context: u32,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Most columns that are computed at once.
const AT_ONCE: usize = 256;

/// Runs the command.
pub fn run(args: &Args) -> Done {
    let model = FolderModel::open(&args.model, &Disk)?;
    let tokenizer = Tokenizer::load(&args.model)?;
    let text = match &args.template {
        Some(path) => fs::read_to_string(path)
            .map_err(|e| Diag::error(format!("cannot read the template `{}`: {e}", path.display())))?,
        None => ChatTemplate::of_folder(&args.model)?.unwrap_or_else(|| {
            note(format_args!(
                "`{}` has no chat template: turns are written as `Human: ...` and `Assistant: ...`",
                args.model.display()
            ));
            PLAIN_TEMPLATE.into()
        }),
    };
    let context = model.positions().unwrap_or(usize::MAX).min(args.context as usize);
    let ends = end_tokens(&args.model)?;
    let generator = args.sampling.open(model, &args.model, context, AT_ONCE.min(context), false)?;
    let most = args.max_new_tokens as usize;
    let template = ChatTemplate::new(text, &tokenizer);
    let mut chat = Chat { tokenizer: &tokenizer, template, ends, generator, context, most, said: Vec::new() };
    let system = args.system.iter().map(|text| Message { role: "system", content: text.clone() });
    chat.said.extend(system.clone());
    // A template that has no place for it says so before the first question.
    if args.system.is_some() {
        chat.template.render(&chat.said)?;
    }

    let asks = io::stdin().is_terminal();
    if asks {
        note("`/clear` begins anew, `/quit` or the end of input ends");
    }
    let mut lines = io::stdin().lock().lines();
    loop {
        if asks {
            say_part("> ");
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(|e| Diag::error(format!("cannot read the standard input: {e}")))?;
        match line.trim() {
            "" => continue,
            "/quit" => break,
            "/clear" => chat.said = system.clone().collect(),
            question => {
                // What cannot be answered is told, and the conversation goes on without it.
                if let Err(diag) = chat.turn(question) {
                    if !asks {
                        return Err(Failure::from(diag));
                    }
                    show(&[diag], &Default::default());
                }
            }
        }
    }
    Ok(())
}

/// A conversation.
struct Chat<'t> {
    tokenizer: &'t Tokenizer,
    template: ChatTemplate,
    /// Tokens that end an answer.
    ends: Vec<i32>,
    generator: Generator,
    /// Most tokens in all.
    context: usize,
    /// Most tokens of an answer.
    most: usize,
    said: Vec<Message>,
}

impl Chat<'_> {
    /// Answers a question; the conversation is as before if it cannot.
    fn turn(&mut self, question: &str) -> Result<(), Diag> {
        let before = self.said.clone();
        self.said.push(Message { role: "user", content: question.into() });
        let answered = self.answer();
        if answered.is_err() {
            self.said = before;
        }
        answered
    }

    fn answer(&mut self) -> Result<(), Diag> {
        let mut tokens = self.tokens()?;
        let begin = tokens.len();
        let mut printer = Printer::new(self.tokenizer);
        while tokens.len() < self.context && tokens.len() - begin < self.most {
            let next = self.generator.next(&tokens)?;
            if self.ends.contains(&next) {
                break;
            }
            tokens.push(next);
            printer.push(next)?;
        }
        let content = printer.end()?.trim().to_string();
        self.said.push(Message { role: "assistant", content });
        Ok(())
    }

    /// The tokens of the conversation; its oldest turns are forgotten where it would leave no room for an answer.
    fn tokens(&mut self) -> Result<Vec<i32>, Diag> {
        let mut forgotten = 0;
        loop {
            let tokens = self.tokenizer.encode_whole(&self.template.render(&self.said)?)?;
            if tokens.len() < self.context {
                if forgotten > 0 {
                    note(format_args!("the oldest of the conversation is forgotten: {forgotten} messages"));
                }
                return Ok(tokens);
            }
            // A system message stays; after it a question goes together with its answer.
            let first = self.said.iter().position(|m| m.role == "user").unwrap_or(0);
            if first + 2 >= self.said.len() {
                let found = tokens.len();
                let message = format!("found a message of {found} tokens, but there is room for {}", self.context - 1);
                return Err(Diag::error(message).help("a larger `--context`, up to the model's positions"));
            }
            self.said.drain(first..first + 2);
            forgotten += 2;
        }
    }
}
