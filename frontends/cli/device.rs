//! Devices by name.

use std::hint::black_box;

use clap::ValueEnum;
use dsgc_ir::diag::Diag;
use dsgc_ir::{Mesh, Planned, Target};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_kernels::ranks::Member;
use dsgc_runtime::mpi;
use dsgc_yaml::load;

use crate::console::note;
use crate::report::size;

/// A device to compile for and run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// All cores of this machine.
    Cpu,
    /// A GPU through Vulkan.
    Wgpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The best that this machine has of these three.
    Auto,
    /// The interpreter in single precision: slow, and what every device is tested against.
    Interp,
    /// The interpreter in double precision.
    InterpF64,
}

impl From<load::Device> for DeviceName {
    fn from(device: load::Device) -> DeviceName {
        match device {
            load::Device::Cpu => DeviceName::Cpu,
            load::Device::Wgpu => DeviceName::Wgpu,
            load::Device::Cuda => DeviceName::Cuda,
            load::Device::Interp => DeviceName::Interp,
        }
    }
}

impl DeviceName {
    /// The device that it names, which is another where the choice is this program's; it says which.
    pub fn chosen(self) -> DeviceName {
        if self != DeviceName::Auto {
            return self;
        }
        let best = gpu::best().unwrap_or(DeviceName::Cpu);
        note(format_args!("the device is `{}`", best.to_possible_value().expect("it has a name").get_name()));
        best
    }

    /// What passes must know of it, where these ranks run on this machine; an error where this program was built without it.
    pub fn target(self, mesh: &Mesh) -> Result<Box<dyn Target>, Diag> {
        Ok(match self {
            DeviceName::Cpu | DeviceName::Auto => Box::new(CpuTarget { threads: threads_of_rank(mesh) }),
            DeviceName::Interp | DeviceName::InterpF64 => Box::new(InterpTarget),
            DeviceName::Wgpu | DeviceName::Cuda => return gpu::target(self),
        })
    }

    /// The device as a rank, with a planned program in it; an error where this machine does not give it the memory.
    pub fn open(self, planned: Planned, member: Member) -> Result<Box<dyn Device>, Diag> {
        if let DeviceName::Wgpu | DeviceName::Cuda = self {
            return gpu::open(self, planned, member);
        }
        let ranks = ranks_here(&member.mesh);
        let bytes = (planned.arena.total() + planned.arena.host).saturating_mul(ranks);
        // An allocation that fails within the device would end the program; the box keeps this trial from being
        // optimised away.
        let mut trial = Vec::<u8>::new();
        if black_box(&mut trial).try_reserve_exact(bytes).is_err() {
            let stage = &planned.stage.name;
            let on = if ranks > 1 { format!(" on {ranks} ranks together") } else { String::new() };
            let message = format!("stage `{stage}` needs {} of memory{on}, more than this machine gives", size(bytes));
            let help = "a smaller `micro_batch_size` or `max_length` needs less; `dsgc compile` says what takes it";
            return Err(Diag::error(message).help(help));
        }
        drop(trial);
        Ok(match self {
            DeviceName::Interp => Box::new(Interp::planned(planned, Precision::F32).as_member(member)),
            DeviceName::InterpF64 => Box::new(Interp::planned(planned, Precision::F64).as_member(member)),
            _ => Box::new(Cpu::new(planned, threads_of_rank(&member.mesh)).as_member(member)),
        })
    }
}

/// A thread per core that this process may use.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Threads of each of these ranks: those of one machine share its cores.
pub fn threads_of_rank(mesh: &Mesh) -> usize {
    mpi::threads().unwrap_or_else(|| (threads() / ranks_here(mesh)).max(1))
}

/// Ranks on this machine: all of them, where no launcher says otherwise.
fn ranks_here(mesh: &Mesh) -> usize {
    mpi::ranks_here().unwrap_or_else(|| mesh.ranks())
}

/// GPUs, where this program was built with them.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod gpu {
    use dsgc_ir::diag::Diag;
    use dsgc_ir::{Planned, Target};
    use dsgc_kernels::Device;
    use dsgc_kernels::cube::{self, Platform};
    use dsgc_kernels::ranks::Member;
    use dsgc_runtime::mpi;

    use super::DeviceName;

    /// All platforms, the best first.
    pub const PLATFORMS: [(DeviceName, Platform); 2] =
        [(DeviceName::Cuda, Platform::Cuda), (DeviceName::Wgpu, Platform::Wgpu)];

    fn platform(name: DeviceName) -> Platform {
        if name == DeviceName::Cuda { Platform::Cuda } else { Platform::Wgpu }
    }

    pub(super) fn best() -> Option<DeviceName> {
        PLATFORMS.into_iter().find(|(_, platform)| cube::has_hardware(*platform)).map(|(name, _)| name)
    }

    pub(super) fn target(name: DeviceName) -> Result<Box<dyn Target>, Diag> {
        let platform = platform(name);
        cube::built(platform)?;
        Ok(Box::new(cube::target(platform)))
    }

    pub(super) fn open(name: DeviceName, planned: Planned, member: Member) -> Result<Box<dyn Device>, Diag> {
        let at = mpi::connect()?.and_then(|_| mpi::rank_here());
        cube::open(platform(name), planned, member, at)
    }

    /// A line for each platform: what is there, or why nothing is.
    pub fn lines() -> Vec<String> {
        let line = |(_, platform): (DeviceName, Platform)| match cube::describe(platform) {
            Ok(found) => {
                let features = if found.features.is_empty() { "none".into() } else { found.features.join(", ") };
                let size = |bytes: u64| crate::report::size(bytes as usize);
                let left = found.left.map_or(String::new(), |bytes| format!("{} left, ", size(bytes)));
                let at_once = size(found.at_once);
                format!("{}: {}, {left}{at_once} at once, features beyond f32: {features}", platform.name(), found.name)
            }
            Err(why) => format!("{}: not here, {}", platform.name(), why.message),
        };
        PLATFORMS.into_iter().map(line).collect()
    }
}

/// GPUs, where this program was built without them.
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
pub mod gpu {
    use dsgc_ir::diag::Diag;
    use dsgc_ir::{Planned, Target};
    use dsgc_kernels::Device;
    use dsgc_kernels::ranks::Member;

    use super::DeviceName;

    pub(super) fn best() -> Option<DeviceName> {
        None
    }

    pub(super) fn target(name: DeviceName) -> Result<Box<dyn Target>, Diag> {
        Err(missing(name))
    }

    pub(super) fn open(name: DeviceName, _: Planned, _: Member) -> Result<Box<dyn Device>, Diag> {
        Err(missing(name))
    }

    /// A line for each platform: why nothing is there.
    pub fn lines() -> Vec<String> {
        [DeviceName::Cuda, DeviceName::Wgpu].map(|name| missing(name).message).into()
    }

    fn missing(name: DeviceName) -> Diag {
        let name = if name == DeviceName::Cuda { "cuda" } else { "wgpu" };
        Diag::error(format!("this dsgc was built without the device `{name}`"))
            .help(format!("build it with `cargo build --release --features {name}`, or write `--device cpu`"))
    }
}
