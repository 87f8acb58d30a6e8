//! What `generate` and `chat` have in common: how tokens are chosen, a model of a folder, text as it comes.

use std::path::Path;

use dsgc_hf::Tokenizer;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Sampling;
use dsgc_kernels::ranks::Member;
use dsgc_passes::PassContext;
use dsgc_runtime::Generator;
use dsgc_yaml::load::FolderModel;

use crate::console::{Failure, say_part};
use crate::device::DeviceName;
use crate::profile;
use crate::weights::WeightsArgs;

/// How the next token is chosen, and where.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Divides the scores before a token is drawn; 0 takes the most likely one.
    #[arg(long, default_value_t = 0.0, value_parser = temperature)]
    temperature: f64,
    /// Draw from so many most likely tokens only; 0 for all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the most likely tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, value_parser = probability)]
    top_p: f64,
    /// Of what is drawn.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// The device to run on.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    #[command(flatten)]
    weights: WeightsArgs,
}

fn temperature(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|t| t.is_finite() && *t >= 0.0);
    number.ok_or_else(|| "expected a number of 0 or more".into())
}

fn probability(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|p| *p > 0.0 && *p <= 1.0);
    number.ok_or_else(|| "expected a number of more than 0 and at most 1".into())
}

impl SamplingArgs {
    /// The model, planned for `length` tokens of which up to `most` are read at once; its launches measured if asked for.
    pub fn open(
        &self,
        model: FolderModel<'_>,
        folder: &Path,
        length: usize,
        most: usize,
        profiled: bool,
    ) -> Result<Generator, Failure> {
        let sampling = Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p };
        let mut program = model.generation(length, most, sampling)?;
        program.stage.seed = self.seed;
        self.weights.set(&mut program);
        let chosen = self.device.chosen();
        let target = chosen.target(&program.mesh)?;
        let planned = dsgc_passes::compile(program, &PassContext::new(target.as_ref()), &mut |_| {})?;
        let mut device = chosen.open(planned.clone(), Member::alone())?;
        if profiled {
            profile::begin(device.as_mut())?;
        }
        Ok(Generator::open(planned, device, folder)?)
    }
}

/// Tokens printed as text, as soon as their text is whole.
pub struct Printer<'t> {
    tokenizer: &'t Tokenizer,
    tokens: Vec<i32>,
    /// Bytes of the text that are printed.
    printed: usize,
}

impl<'t> Printer<'t> {
    /// A printer of an answer that begins here.
    pub fn new(tokenizer: &'t Tokenizer) -> Printer<'t> {
        Printer { tokenizer, tokens: Vec::new(), printed: 0 }
    }

    /// Prints what a token adds. A token may hold a part of a character only: it waits for the next ones.
    pub fn push(&mut self, token: i32) -> Result<(), Diag> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        if !text.ends_with('\u{fffd}') {
            say_part(text.get(self.printed..).unwrap_or_default());
            self.printed = text.len();
        }
        Ok(())
    }

    /// Prints what waits, and ends the line. The whole text.
    pub fn end(self) -> Result<String, Diag> {
        let text = self.tokenizer.decode(&self.tokens)?;
        say_part(text.get(self.printed..).unwrap_or_default());
        say_part("\n");
        Ok(text)
    }
}
