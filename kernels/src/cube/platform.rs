//! The devices of this machine, and a client for one: a machine without driver or adapter is an error, never a panic.

use dsgc_ir::Planned;
use dsgc_ir::diag::Diag;

#[cfg(feature = "cuda")]
use super::collective::Direct;
use super::memory::Gives;
#[cfg(feature = "cuda")]
use super::nccl::Nccl;
use super::target::ALIGNMENT;
use super::{Cube, CubeTarget, Platform};
use crate::Device;
use crate::ranks::Member;

/// A device that programs can run on.
#[derive(Clone, Debug)]
pub struct Description {
    /// The runtime.
    pub platform: Platform,
    /// What its maker calls it.
    pub name: String,
    /// The most bytes that it gives at once.
    pub at_once: u64,
    /// The bytes that it has left, where it says so.
    pub left: Option<u64>,
    /// What kernels could use beyond what every GPU has.
    pub features: Vec<&'static str>,
}

/// Puts a planned program into a platform's best device, as a rank; of several CUDA devices, ranks take one each in turn. A
/// rank that is a process by itself is the so manieth of its machine. All ranks do this together. An error where this binary
/// was built without the platform or this machine has no such device.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // Only of CUDA's are there several.
pub fn open(platform: Platform, program: Planned, member: Member, at: Option<usize>) -> Result<Box<dyn Device>, Diag> {
    present(platform)?;
    match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => {
            let client = wgpu::client();
            let gives = wgpu::gives(&client);
            Ok(Box::new(Cube::new(program, target(platform), client, gives, member, None)?))
        }
        #[cfg(feature = "cuda")]
        Platform::Cuda => {
            let device = at.unwrap_or_else(|| member.rank()) % cuda::devices().max(1);
            let client = cuda::client(device);
            let gives = cuda::gives(&client, device);
            let direct = if at.is_some() && !member.mesh.is_single() { Nccl::new(&member, device)? } else { None };
            let direct = direct.map(|nccl| Box::new(nccl) as Box<dyn Direct<_>>);
            Ok(Box::new(Cube::new(program, target(platform), client, gives, member, direct)?))
        }
        #[allow(unreachable_patterns)] // Where both are there.
        _ => Err(not_built(platform)),
    }
}

/// What is known of a platform's best device.
pub fn describe(platform: Platform) -> Result<Description, Diag> {
    present(platform)?;
    match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => {
            let client = wgpu::client();
            Ok(description(platform, wgpu::name(), &client, wgpu::gives(&client)))
        }
        #[cfg(feature = "cuda")]
        Platform::Cuda => {
            let client = cuda::client(0);
            Ok(description(platform, cuda::name(), &client, cuda::gives(&client, 0)))
        }
        #[allow(unreachable_patterns)]
        _ => Err(not_built(platform)),
    }
}

/// A platform as passes must know it to make programs for this machine's device, or for one of these years where there is
/// none.
pub fn target(platform: Platform) -> CubeTarget {
    let allocation: Option<u64> = match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => wgpu::at_once(),
        _ => None,
    };
    let cores = match platform {
        #[cfg(feature = "cuda")]
        Platform::Cuda => cuda::present().is_err() || cuda::cores(),
        _ => platform == Platform::Cuda,
    };
    CubeTarget { platform, allocation: allocation.map(|bytes| bytes as usize / ALIGNMENT * ALIGNMENT), cores }
}

/// An error where this binary was built without the platform.
pub fn built(platform: Platform) -> Result<(), Diag> {
    let there = match platform {
        Platform::Wgpu => cfg!(feature = "wgpu"),
        Platform::Cuda => cfg!(feature = "cuda"),
    };
    if there { Ok(()) } else { Err(not_built(platform)) }
}

/// Whether a platform has a device here that is more than a program on the CPU.
pub fn has_hardware(platform: Platform) -> bool {
    match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => wgpu::has_hardware(),
        #[cfg(feature = "cuda")]
        Platform::Cuda => cuda::present().is_ok(),
        #[allow(unreachable_patterns)]
        _ => false,
    }
}

/// Whether programs can run on a platform here, or what is missing. No client is made, as one that cannot be panics.
pub fn present(platform: Platform) -> Result<(), Diag> {
    match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => wgpu::present(),
        #[cfg(feature = "cuda")]
        Platform::Cuda => cuda::present(),
        #[allow(unreachable_patterns)]
        _ => Err(not_built(platform)),
    }
}

fn not_built(platform: Platform) -> Diag {
    let name = platform.name();
    Diag::error(format!("this dsgc was built without the device `{name}`"))
        .help(format!("build it with `cargo build --release --features {name}`, or write `--device cpu`"))
}

/// Gives back what programs before this one had.
fn clean<R: cubecl::Runtime>(client: &cubecl::client::ComputeClient<R>) {
    client.memory_cleanup();
    // What is wrong with the device is told when values are read.
    cubecl::future::block_on(client.sync()).ok();
}

fn description<R: cubecl::Runtime>(
    platform: Platform,
    name: String,
    client: &cubecl::client::ComputeClient<R>,
    gives: Gives,
) -> Description {
    use cubecl::ir::features::{Plane, TypeUsage};
    use cubecl::ir::{ElemType, FloatKind};
    let properties = client.properties();
    let float = |kind| properties.type_usage(ElemType::Float(kind).into()).contains(TypeUsage::Arithmetic);
    let features = [
        ("f16", float(FloatKind::F16)),
        ("bf16", float(FloatKind::BF16)),
        ("subgroups", properties.features.plane.contains(Plane::Ops)),
        ("tensor cores", target(platform).cores),
    ];
    let features = features.into_iter().filter(|feature| feature.1).map(|feature| feature.0).collect();
    Description { platform, name, at_once: gives.at_once, left: gives.in_all, features }
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use std::sync::OnceLock;

    use cubecl::Runtime;
    use cubecl::client::ComputeClient;
    use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime};
    use dsgc_ir::diag::Diag;
    use wgpu::{Backends, DeviceType, Instance, InstanceDescriptor, PowerPreference, RequestAdapterOptions};

    use crate::cube::memory::Gives;

    /// The adapter that programs run on: its name, what it is, and the most bytes that a kernel can have of one allocation.
    struct Adapter {
        name: String,
        kind: DeviceType,
        at_once: u64,
    }

    /// The adapter that CubeCL takes, asked for as it does; once, and of one interface, since drivers of those that are not
    /// there write to standard error.
    fn adapter() -> Option<&'static Adapter> {
        static ONE: OnceLock<Option<Adapter>> = OnceLock::new();
        let find = || {
            let backends = Backends::from(AutoGraphicsApi::backend());
            let instance =
                Instance::new(InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() });
            let power_preference = PowerPreference::HighPerformance;
            let options = RequestAdapterOptions { power_preference, ..RequestAdapterOptions::default() };
            let adapter = cubecl::future::block_on(instance.request_adapter(&options)).ok()?;
            let (info, limits) = (adapter.get_info(), adapter.limits());
            let at_once = limits.max_buffer_size.min(limits.max_storage_buffer_binding_size);
            Some(Adapter { name: info.name, kind: info.device_type, at_once })
        };
        ONE.get_or_init(find).as_ref()
    }

    pub(super) fn present() -> Result<(), Diag> {
        if adapter().is_none() {
            let help = "install the GPU's Vulkan driver (or `mesa-vulkan-drivers`, which computes on the CPU), or write \
                        `--device cpu`";
            return Err(Diag::error("the device `wgpu` finds no Vulkan adapter on this machine").help(help));
        }
        Ok(())
    }

    /// Whether it is a GPU, with memory of its own or without.
    pub(super) fn has_hardware() -> bool {
        adapter().is_some_and(|one| matches!(one.kind, DeviceType::DiscreteGpu | DeviceType::IntegratedGpu))
    }

    pub(super) fn at_once() -> Option<u64> {
        adapter().map(|one| one.at_once)
    }

    pub(super) fn name() -> String {
        adapter().map_or_else(String::new, |one| one.name.clone())
    }

    pub(super) fn gives(client: &ComputeClient<WgpuRuntime>) -> Gives {
        super::clean(client);
        let own = client.properties().memory.max_page_size;
        Gives { at_once: at_once().map_or(own, |bytes| bytes.min(own)), in_all: None }
    }

    pub(super) fn client() -> ComputeClient<WgpuRuntime> {
        WgpuRuntime::client(&WgpuDevice::default())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use cubecl::Runtime;
    use cubecl::client::ComputeClient;
    use cubecl::cuda::install::cuda_path;
    use cubecl::cuda::{CudaDevice, CudaRuntime};
    use cudarc::driver::CudaContext;
    use dsgc_ir::diag::Diag;

    use crate::cube::memory::Gives;

    /// What kernels for tensor cores include.
    const HEADERS: [&str; 4] = ["mma.h", "crt/mma.h", "cuda_bf16.h", "cuda_fp16.h"];

    fn has_header(name: &str) -> bool {
        cuda_path().is_some_and(|path| path.join("include").join(name).is_file())
    }

    pub(super) fn present() -> Result<(), Diag> {
        let missing = |what: &str, help: &str| {
            Err(Diag::error(format!("the device `cuda` finds no {what} on this machine"))
                .help(format!("{help}, or write `--device cpu`")))
        };
        // SAFETY: both only try to load a library.
        let (driver, compiler) =
            unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::nvrtc::sys::is_culib_present()) };
        if !driver {
            return missing("libcuda", "install NVIDIA's driver");
        }
        if devices() == 0 {
            return missing("GPU", "look whether `nvidia-smi` lists one");
        }
        if !compiler {
            return missing("NVRTC", "install CUDA's runtime compiler (`libnvrtc`, of the CUDA toolkit 12 or later)");
        }
        // Every kernel includes this one, and CubeCL ends the program where it finds no toolkit.
        if !has_header("cuda_runtime.h") {
            return missing("headers of CUDA", "install the CUDA toolkit, or let `CUDA_PATH` name its folder");
        }
        Ok(())
    }

    /// How many devices there are.
    pub(super) fn devices() -> usize {
        let count = cudarc::driver::result::init().and_then(|()| cudarc::driver::result::device::get_count());
        count.ok().and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
    }

    /// Whether products run on tensor cores: devices have those of bf16 from compute capability 8.0 on, and kernels for them
    /// need headers of the toolkit.
    pub(super) fn cores() -> bool {
        let capability = CudaContext::new(0).and_then(|context| context.compute_capability());
        capability.is_ok_and(|(major, _)| major >= 8) && HEADERS.iter().all(|name| has_header(name))
    }

    /// What the driver calls the device that runs.
    pub(super) fn name() -> String {
        CudaContext::new(0).and_then(|context| context.name()).unwrap_or_else(|_| "a GPU".into())
    }

    /// What the driver has left: CubeCL knows a quarter of the memory only, which bounds its pools.
    pub(super) fn gives(client: &ComputeClient<CudaRuntime>, at: usize) -> Gives {
        super::clean(client);
        let left = CudaContext::new(at).and_then(|context| context.mem_get_info()).ok().map(|(free, _)| free as u64);
        Gives { at_once: left.unwrap_or(client.properties().memory.max_page_size), in_all: left }
    }

    pub(super) fn client(at: usize) -> ComputeClient<CudaRuntime> {
        CudaRuntime::client(&CudaDevice::new(at))
    }
}
