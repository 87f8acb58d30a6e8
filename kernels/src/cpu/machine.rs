//! What kernels ask about the machine, beyond which instructions it has.

/// Whether `vdpbf16ps`, which multiplies pairs of bf16 and adds in f32, does more operations in a second than
/// multiply-adds of f32: twice as many on AMD's cores (Zen 4 and 5), half as many on Intel's (measured on Sapphire
/// Rapids by the loops of `limits`). Where it does not, bf16 is widened as it is read.
pub(super) fn has_fast_bf16_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") && !made_by_intel()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

#[cfg(target_arch = "x86_64")]
fn made_by_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

/// Whether the machine has AMX's registers for products of bf16, and the system lets this process use them. That is asked for once,
/// since what the system keeps of every thread is larger then (`arch_prctl(2)`).
pub(super) fn has_matrix_registers() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static HERE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *HERE.get_or_init(|| amx::is_known() && amx::is_allowed())
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    {
        false
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// Intel's manual, volume 2, `CPUID` leaf 7: `AMX-BF16` and `AMX-TILE`; volume 1, 13.3: the system keeps both states.
    pub(super) fn is_known() -> bool {
        const SAVED: u32 = 1 << 27;
        const TILES: u32 = 1 << 22 | 1 << 24;
        const STATES: u64 = 0b11 << 17;
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & SAVED == 0 || __cpuid_count(7, 0).edx & TILES != TILES {
            return false;
        }
        // SAFETY: the system keeps extended states.
        unsafe { saved_states() & STATES == STATES }
    }

    /// # Safety
    /// The system keeps extended states.
    #[target_feature(enable = "xsave")]
    unsafe fn saved_states() -> u64 {
        // SAFETY: the caller's.
        unsafe { _xgetbv(0) }
    }

    pub(super) fn is_allowed() -> bool {
        const REQUEST_PERMISSION: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call changes nothing but what this process may do.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
    }
}
