//! The commands, one file each.

pub mod bench;
pub mod chat;
pub mod check;
pub mod compile;
pub mod doctor;
pub mod generate;
pub mod launch;
pub mod library;
pub mod merge;
pub mod opt;
pub mod run;
pub mod score;

use std::path::PathBuf;

use dsgc_ir::{Planned, Program};
use dsgc_passes::PassContext;
use dsgc_yaml::load::{Loaded, Options, load};

use crate::console::{Failure, show};
use crate::device::DeviceName;
use crate::host::Disk;

/// How a command ends.
pub type Done = Result<(), Failure>;

/// A pipeline, and what the command line says of it.
#[derive(clap::Args)]
struct PipelineArgs {
    /// A pipeline.
    file: PathBuf,
    /// Only this stage; what it needs of earlier ones must be there to run it.
    #[arg(long)]
    stage: Option<String>,
    /// The device, instead of the pipeline's.
    #[arg(long)]
    device: Option<DeviceName>,
    /// Another value for a setting: `stages.sft.learning_rate=1e-4`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl PipelineArgs {
    /// Loads the pipeline and shows its warnings.
    fn open(&self) -> Result<(Loaded, DeviceName), Failure> {
        self.open_as(Options { sets: self.sets.clone(), stage: self.stage.clone(), smoke: false })
    }

    /// The same with other options.
    fn open_as(&self, options: Options) -> Result<(Loaded, DeviceName), Failure> {
        let loaded = load(&self.file, &options, &Disk)?;
        show(&loaded.warnings, &loaded.sources);
        let device = self.device.unwrap_or(loaded.device.into()).chosen();
        Ok((loaded, device))
    }
}

/// Runs all passes on a stage's program, for each of these places along `pipeline`.
fn plan(program: &Program, loaded: &Loaded, device: DeviceName, places: &[usize]) -> Result<Vec<Planned>, Failure> {
    let target = device.target(&program.mesh)?;
    let context = PassContext::new(target.as_ref());
    let fail = |errors| Failure::new(errors, &loaded.sources);
    let common = dsgc_passes::common(program.clone(), &context, &mut |_| {}).map_err(fail)?;
    places.iter().map(|&place| common.at(place, &context, &mut |_| {}).map_err(fail)).collect()
}
