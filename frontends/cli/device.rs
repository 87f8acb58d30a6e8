//! Devices by name.

use clap::ValueEnum;
use dsgc_ir::{Planned, Target};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_yaml::load;

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

    /// The device, with a planned program in it.
    pub fn open(self, planned: Planned) -> Box<dyn Device> {
        match self {
            DeviceName::Cpu => Box::new(Cpu::new(planned, threads())),
            DeviceName::Interp => Box::new(Interp::planned(planned, Precision::F32)),
            DeviceName::InterpF64 => Box::new(Interp::planned(planned, Precision::F64)),
        }
    }
}

/// A thread per core that this process may use.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
