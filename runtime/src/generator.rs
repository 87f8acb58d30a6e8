//! Continuing one sequence after the other with a model of a folder, as `dsgc generate` and `dsgc chat` do.

use std::path::Path;

use dsgc_ir::Planned;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Statement;
use dsgc_kernels::Device;
use dsgc_kernels::random::Key;

use crate::calls::graph_named;
use crate::generate::Decoder;
use crate::rank::Rank;
use crate::roles::{key_of, load_folder};

/// A model that continues one sequence. Keys and values of what it has seen stay in the device.
pub struct Generator {
    program: Planned,
    rank: Rank,
    decoder: Decoder,
    /// The tokens whose keys and values the device has.
    seen: Vec<i32>,
    key: Key,
    vocab: usize,
}

impl Generator {
    /// Reads the weights of the program's only role from a Hugging Face folder. The program is one whose plan is one
    /// generation of one row; its seed is the stage's.
    pub fn open(program: Planned, device: Box<dyn Device>, folder: &Path) -> Result<Generator, Vec<Diag>> {
        let Some(Statement::Generate(generate)) = program.stage.plan.first() else {
            panic!("bug: the plan of `{}` is no generation", program.stage.name);
        };
        let steps = generate.steps.as_ref().unwrap_or_else(|| panic!("bug: `decode` left a generation as it was"));
        let graph = graph_named(&program, &steps.step);
        let logits = graph.output_named("logits").and_then(|v| graph.ty(v).dims.last()?.constant());
        let vocab = logits.and_then(|v| usize::try_from(v).ok()).unwrap_or_else(|| panic!("bug: no vocabulary"));
        let mut rank = Rank::alone(device);
        let role = program.stage.roles.first().unwrap_or_else(|| panic!("bug: a generation without a role"));
        if let Some(param) = load_folder(&program, &mut rank, role, folder)?.first() {
            let diag = Diag::error(format!("found no tensor for parameter `{param}` in `{}`", folder.display()));
            return Err(vec![diag.help("train the model before it is asked")]);
        }
        let key = key_of(&program.stage);
        let decoder = Decoder::new(rank.device.as_mut(), &program, steps).map_err(|e| vec![e])?;
        Ok(Generator { program, rank, decoder, seen: Vec::new(), key, vocab })
    }

    /// What runs it.
    pub fn device(&self) -> &dyn Device {
        self.rank.device.as_ref()
    }

    /// Whether the model knows all of these tokens.
    pub fn check(&self, tokens: &[i32]) -> Result<(), Diag> {
        match tokens.iter().find(|t| usize::try_from(**t).map_or(true, |t| t >= self.vocab)) {
            Some(odd) => Err(Diag::error(format!("found the token {odd}, expected one of 0 to {}", self.vocab - 1))),
            None => Ok(()),
        }
    }

    /// The token after these. Columns that are as in the call before are not computed again.
    ///
    /// Errors are the user's: no token, an unknown one, more than there is room for.
    pub fn next(&mut self, tokens: &[i32]) -> Result<i32, Diag> {
        self.check(tokens)?;
        if tokens.is_empty() {
            return Err(Diag::error("found no token to begin with").help("write a prompt of one token or more"));
        }
        let same = self.seen.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        // The last column says what comes after it, so at least that one is computed.
        let kept = same.min(tokens.len() - 1);
        self.decoder.rewind(kept);
        self.seen.truncate(kept);
        let mut next = None;
        for piece in tokens[kept..].chunks(self.decoder.most()) {
            let segment = vec![1; piece.len()];
            let made =
                self.decoder.tokens(self.rank.device.as_mut(), &self.program, piece, &segment, self.key, &[0])?;
            self.seen.extend(piece);
            next = made.first().copied();
        }
        Ok(next.expect("there is at least one piece"))
    }
}
