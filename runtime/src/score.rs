//! Scoring: the log-probability of every next token of given texts.

use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Planned, Tensor};
use dsgc_kernels::Device;

use crate::rank::Rank;
use crate::roles::load_folder;

/// What a model says of one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Log-probability of token `t + 1`, as seen from `t`: one fewer than there are tokens.
    pub logp: Vec<f64>,
    /// `[T, V]`, in the device's width.
    pub logits: Tensor,
}

/// Scores texts one at a time; the program is that of the recipe `score`, whose graph `score` takes `tokens` and
/// `segment` and gives `logits` and `logp`.
pub struct Scorer {
    rank: Rank,
    /// Number of tokens that the model knows.
    vocab: usize,
}

impl Scorer {
    /// Reads the weights of the program's only role from a Hugging Face folder.
    pub fn open(program: Planned, device: Box<dyn Device>, folder: &Path) -> Result<Scorer, Vec<Diag>> {
        let graph = program.graph("score").expect("the recipe `score` has this graph");
        let logits = graph.output_named("logits").map(|v| graph.ty(v).dims.last().and_then(|d| d.constant()));
        let vocab = logits
            .flatten()
            .and_then(|v| usize::try_from(v).ok())
            .expect("the last dim of logits is the model's vocabulary");
        let mut rank = Rank::alone(device);
        let role = program.stage.roles.first().expect("the recipe `score` has a role");
        if let Some(param) = load_folder(&program, &mut rank, role, folder)?.first() {
            let diag = Diag::error(format!("found no tensor for parameter `{param}` in `{}`", folder.display()));
            return Err(vec![diag.help("train the model before it is scored")]);
        }
        Ok(Scorer { rank, vocab })
    }

    /// Whether a text can be scored: it has at least two tokens, all of them known to the model.
    pub fn check(&self, tokens: &[i32]) -> Result<(), Diag> {
        if tokens.len() < 2 {
            let diag = Diag::error(format!("found {} tokens, expected at least 2", tokens.len()));
            return Err(diag.help("there is no next token to score"));
        }
        match tokens.iter().find(|t| usize::try_from(**t).map_or(true, |t| t >= self.vocab)) {
            Some(wrong) => {
                Err(Diag::error(format!("found the token {wrong}, expected one of 0 to {}", self.vocab - 1)))
            }
            None => Ok(()),
        }
    }

    /// Scores one text that [`Scorer::check`] lets pass.
    pub fn score(&mut self, tokens: &[i32]) -> Result<Score, Diag> {
        self.check(tokens)?;
        let shape = [1, tokens.len()];
        let given =
            [("tokens", Tensor::i32(&shape, tokens.to_vec())), ("segment", Tensor::i32(&shape, vec![1; tokens.len()]))];
        let inputs: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (*n, t)).collect();
        let outputs = self.rank.device.run("score", &inputs)?;
        let output = |name: &str| {
            let found = outputs.iter().find(|(n, _)| n == name).map(|(_, t)| t.rows(0..1));
            found.unwrap_or_else(|| panic!("bug: `score` has no output `{name}`"))
        };
        let mut logits = output("logits");
        logits.shape.remove(0);
        Ok(Score { logp: output("logp").to_f64(), logits })
    }
}
