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
