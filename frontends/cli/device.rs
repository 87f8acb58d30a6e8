//! Devices by name.

use std::hint::black_box;

use clap::ValueEnum;
use dsgc_ir::diag::Diag;
use dsgc_ir::{Planned, Target};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_yaml::load;

use crate::report::size;

/// A device to compile for and run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// All cores of this machine.
    Cpu,
    /// The interpreter in single precision: slow, and what every device is tested against.
    Interp,
    /// The interpreter in double precision.
    InterpF64,
}

impl From<load::Device> for DeviceName {
    fn from(device: load::Device) -> DeviceName {
        match device {
            load::Device::Cpu => DeviceName::Cpu,
            load::Device::Interp => DeviceName::Interp,
        }
    }
}

impl DeviceName {
    /// What passes must know of it.
    pub fn target(self) -> Box<dyn Target> {
        match self {
            DeviceName::Cpu => Box::new(CpuTarget { threads: threads() }),
            DeviceName::Interp | DeviceName::InterpF64 => Box::new(InterpTarget),
        }
    }

    /// The device, with a planned program in it; an error where this machine does not give it the memory.
    pub fn open(self, planned: Planned) -> Result<Box<dyn Device>, Diag> {
        let bytes = planned.arena.total();
        // An allocation that fails within the device would end the program; the box keeps this trial from being
        // optimised away.
        let mut trial = Vec::<u8>::new();
        if black_box(&mut trial).try_reserve_exact(bytes).is_err() {
            let stage = &planned.stage.name;
            let message = format!("stage `{stage}` needs {} of memory, more than this machine gives", size(bytes));
            let help = "a smaller `micro_batch_size` or `max_length` needs less; `dsgc compile` says what takes it";
            return Err(Diag::error(message).help(help));
        }
        drop(trial);
        Ok(match self {
            DeviceName::Cpu => Box::new(Cpu::new(planned, threads())),
            DeviceName::Interp => Box::new(Interp::planned(planned, Precision::F32)),
            DeviceName::InterpF64 => Box::new(Interp::planned(planned, Precision::F64)),
        })
    }
}

/// A thread per core that this process may use.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
