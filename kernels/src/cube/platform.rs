//! The devices of this machine, and a client for one: a machine without driver or adapter is an error, never a panic.

use dsgc_ir::Planned;
use dsgc_ir::diag::Diag;

use super::{Cube, Platform};
use crate::Device;

/// A device that programs can run on.
#[derive(Clone, Debug)]
pub struct Description {
    /// The runtime.
    pub platform: Platform,
    /// The most bytes that it gives at once.
    pub memory: u64,
    /// What kernels could use beyond what every GPU has.
    pub features: Vec<&'static str>,
}

/// Puts a planned program into a platform's best device. An error where this binary was built without the platform or this
/// machine has no such device.
pub fn open(platform: Platform, program: Planned) -> Result<Box<dyn Device>, Diag> {
    present(platform)?;
    match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => Ok(Box::new(Cube::new(program, platform, wgpu::client())?)),
        #[cfg(feature = "cuda")]
        Platform::Cuda => Ok(Box::new(Cube::new(program, platform, cuda::client())?)),
        #[allow(unreachable_patterns)] // Where both are there.
        _ => Err(not_built(platform)),
    }
}

/// What is known of a platform's best device.
pub fn describe(platform: Platform) -> Result<Description, Diag> {
    present(platform)?;
    match platform {
        #[cfg(feature = "wgpu")]
        Platform::Wgpu => Ok(description(platform, &wgpu::client())),
        #[cfg(feature = "cuda")]
        Platform::Cuda => Ok(description(platform, &cuda::client())),
        #[allow(unreachable_patterns)]
        _ => Err(not_built(platform)),
    }
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

fn description<R: cubecl::Runtime>(platform: Platform, client: &cubecl::client::ComputeClient<R>) -> Description {
    use cubecl::ir::features::{Plane, TypeUsage};
    use cubecl::ir::{ElemType, FloatKind};
    let properties = client.properties();
    let float = |kind| properties.type_usage(ElemType::Float(kind).into()).contains(TypeUsage::Arithmetic);
    let features = [
        ("f16", float(FloatKind::F16)),
        ("bf16", float(FloatKind::BF16)),
        ("subgroups", properties.features.plane.contains(Plane::Ops)),
        ("tensor cores", !properties.features.matmul.cmma.is_empty()),
    ];
    let features = features.into_iter().filter(|feature| feature.1).map(|feature| feature.0).collect();
    Description { platform, memory: properties.memory.max_page_size, features }
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use std::sync::OnceLock;

    use cubecl::Runtime;
    use cubecl::client::ComputeClient;
    use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime};
    use dsgc_ir::diag::Diag;
    use wgpu::{Backends, DeviceType, Instance, InstanceDescriptor};

    /// What the adapters are of the one interface that programs run on; asked for once, and no other interface, since drivers
    /// of those that are not there write to standard error.
    fn devices() -> &'static [DeviceType] {
        static ALL: OnceLock<Vec<DeviceType>> = OnceLock::new();
        ALL.get_or_init(|| {
            let backends = Backends::from(AutoGraphicsApi::backend());
            let instance =
                Instance::new(InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() });
            let adapters = cubecl::future::block_on(instance.enumerate_adapters(backends));
            adapters.iter().map(|adapter| adapter.get_info().device_type).collect()
        })
    }

    pub(super) fn present() -> Result<(), Diag> {
        if devices().is_empty() {
            let help = "install the GPU's Vulkan driver (or `mesa-vulkan-drivers`, which computes on the CPU), or write \
                        `--device cpu`";
            return Err(Diag::error("the device `wgpu` finds no Vulkan adapter on this machine").help(help));
        }
        Ok(())
    }

    /// Whether there is a GPU, with memory of its own or without.
    pub(super) fn has_hardware() -> bool {
        devices().iter().any(|device| matches!(device, DeviceType::DiscreteGpu | DeviceType::IntegratedGpu))
    }

    pub(super) fn client() -> ComputeClient<WgpuRuntime> {
        WgpuRuntime::client(&WgpuDevice::default())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use cubecl::Runtime;
    use cubecl::client::ComputeClient;
    use cubecl::cuda::{CudaDevice, CudaRuntime};
    use dsgc_ir::diag::Diag;

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
        let count = cudarc::driver::result::init().and_then(|()| cudarc::driver::result::device::get_count());
        if count.unwrap_or(0) == 0 {
            return missing("GPU", "look whether `nvidia-smi` lists one");
        }
        if !compiler {
            return missing("NVRTC", "install CUDA's runtime compiler (`libnvrtc`, of the CUDA toolkit 12 or later)");
        }
        Ok(())
    }

    pub(super) fn client() -> ComputeClient<CudaRuntime> {
        CudaRuntime::client(&CudaDevice::default())
    }
}
