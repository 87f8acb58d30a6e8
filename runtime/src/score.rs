//! Scoring: the log-probability of every next token of given texts.

use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::TensorRules;
use dsgc_ir::{Planned, Tensor};
use dsgc_kernels::Device;

use crate::session::load_params;

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
    device: Box<dyn Device>,
}

impl Scorer {
    /// Reads the weights of the program's only role from a Hugging Face folder.
    pub fn open(program: Planned, mut device: Box<dyn Device>, folder: &Path) -> Result<Scorer, Vec<Diag>> {
        let role = program.stage.roles.first().cloned();
        let (name, rules) = role.map_or(("model".into(), TensorRules::default()), |r| (r.name, r.model.tensors));
        load_params(&program, device.as_mut(), &name, &rules, folder)?;
        Ok(Scorer { device })
    }

    /// Scores one text of at least two tokens.
    pub fn score(&mut self, tokens: &[i32]) -> Result<Score, Diag> {
        let shape = [1, tokens.len()];
        let given =
            [("tokens", Tensor::i32(&shape, tokens.to_vec())), ("segment", Tensor::i32(&shape, vec![1; tokens.len()]))];
        let inputs: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (*n, t)).collect();
        let outputs = self.device.run("score", &inputs)?;
        let output = |name: &str| {
            let found = outputs.iter().find(|(n, _)| n == name).map(|(_, t)| t.rows(0..1));
            found.unwrap_or_else(|| panic!("bug: `score` has no output `{name}`"))
        };
        let mut logits = output("logits");
        logits.shape.remove(0);
        Ok(Score { logp: output("logp").to_f64(), logits })
    }
}
