//! What a folder's weights are kept in, for commands that run its model.

use dsgc_ir::{DType, Program};

/// How many bits a weight has.
#[derive(clap::Args)]
pub struct WeightsArgs {
    /// What the weights of layers are kept in: fewer bits take less memory and are read faster, and change numbers.
    #[arg(long, default_value = "f32", value_name = "TYPE", value_parser = DType::OF_WEIGHTS)]
    weights: String,
    /// Weights of a row that have a scale in common in int8 and int4.
    #[arg(long, default_value = "64", value_name = "N", value_parser = ["32", "64", "128"])]
    weights_group: String,
}

impl WeightsArgs {
    /// Says so in a program, for all its roles.
    pub fn set(&self, program: &mut Program) {
        let group = self.weights_group.parse().unwrap_or_default();
        let dtype = DType::of_weights(&self.weights, group).filter(|dtype| *dtype != DType::F32);
        program.stage.roles.iter_mut().for_each(|role| role.weights = dtype);
    }
}
