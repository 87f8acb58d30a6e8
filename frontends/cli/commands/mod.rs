//! The commands, one file each.

pub mod check;
pub mod compile;
pub mod library;
pub mod opt;
pub mod run;
pub mod score;

use std::path::Path;

use dsgc_ir::{Planned, Program};
use dsgc_passes::{Pass, PassContext};
use dsgc_yaml::load::{Loaded, Options, load};

use crate::console::{Failure, show};
use crate::device::DeviceName;
use crate::host::Disk;

/// How a command ends.
pub type Done = Result<(), Failure>;

/// Loads a pipeline and shows its warnings.
fn open(file: &Path, sets: &[String], stage: Option<&str>) -> Result<Loaded, Failure> {
    let options = Options { sets: sets.to_vec(), stage: stage.map(String::from) };
    let loaded = load(file, &options, &Disk)?;
    show(&loaded.warnings, &loaded.sources);
    Ok(loaded)
}

/// Runs all passes on a stage's program.
fn plan(
    program: &Program,
    loaded: &Loaded,
    device: DeviceName,
    observe: &mut dyn FnMut(&Pass, &Program, &Program),
) -> Result<Planned, Failure> {
    let target = device.target();
    let context = PassContext { target: target.as_ref() };
    dsgc_passes::compile(program.clone(), &context, observe).map_err(|e| Failure::new(e, &loaded.sources))
}
