//! The limits of this machine, measured: multiply-adds that never leave the registers, and bytes that only move.
//!
//! Kernels are measured against these, by `dsgc bench kernels`. A rate is the best of many short windows, since other
//! programs only ever make one lower. A multiply-add counts as two operations; a copied byte counts twice, read and
//! written.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use multiversion::multiversion;

use super::memory::Zeros;
use super::skinny::{LINE, fetch};

/// Multiply-adds in a row of the loops below, per accumulator: about 100 microseconds.
const ROUNDS: usize = 20_000;

/// Bytes of an array whose last-level cache is not known.
const ARRAY: usize = 256 << 20;

/// Most bytes of an array, whatever the cache.
const LARGEST_ARRAY: usize = 1 << 30;

/// Bytes between a line that is read and one that is asked for.
const AHEAD: usize = 2048;

/// The instruction sets of this machine that kernels know of, by their Linux names.
pub fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! present {
            ($($name:tt),*) => { [$((is_x86_feature_detected!($name), $name)),*] };
        }
        let all = present!("sse4.2", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16");
        let amx = (super::machine::has_matrix_registers(), "amx_bf16");
        all.into_iter().chain([amx]).filter(|(here, _)| *here).map(|(_, name)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        vec![]
    }
}

/// Bytes of the last-level cache, where the system says so.
pub fn last_level_cache() -> Option<usize> {
    let size = |index: usize| {
        let file = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(file).ok()?;
        let text = text.trim();
        let (digits, unit) = match text.strip_suffix('K') {
            Some(digits) => (digits, 1 << 10),
            None => (text.strip_suffix('M')?, 1 << 20),
        };
        Some(digits.parse::<usize>().ok()? * unit)
    };
    (0..8).filter_map(size).max()
}

/// A loop of multiply-adds on registers.
#[derive(Clone, Copy)]
pub struct MultiplyAdds {
    /// With which instructions.
    pub how: &'static str,
    /// Operations of a window.
    work: usize,
    window: fn(),
}

impl MultiplyAdds {
    /// In f32, by the widest vectors of this machine.
    pub fn f32() -> MultiplyAdds {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the machine has these instructions.
                return MultiplyAdds { how: "AVX-512 FMA", work: x86::WORK_512, window: || unsafe { x86::f32_512() } };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the machine has these instructions.
                return MultiplyAdds { how: "AVX2 FMA", work: x86::WORK_256, window: || unsafe { x86::f32_256() } };
            }
        }
        MultiplyAdds { how: "portable loop", work: PORTABLE_WORK, window: portable }
    }

    /// Products of bf16 that are added in f32; nothing where the CPU has no instruction for it, or where its f32 is
    /// faster.
    pub fn bf16() -> Option<MultiplyAdds> {
        #[cfg(target_arch = "x86_64")]
        if super::machine::has_matrix_registers() {
            // SAFETY: the machine has these instructions.
            let window = || unsafe { super::gemm::micro::amx::window(ROUNDS) };
            return Some(MultiplyAdds { how: "tdpbf16ps", work: ROUNDS * super::gemm::micro::amx::WORK, window });
        }
        #[cfg(target_arch = "x86_64")]
        if super::machine::has_fast_bf16_pairs() {
            // SAFETY: the machine has these instructions.
            let window = || unsafe { x86::bf16_512() };
            return Some(MultiplyAdds { how: "vdpbf16ps", work: 2 * x86::WORK_512, window });
        }
        None
    }

    /// Operations per second of so many threads together, in so much time, at least one window of each.
    pub fn rate(self, threads: usize, time: Duration) -> f64 {
        let begin = Barrier::new(threads.max(1));
        let one = || {
            begin.wait();
            let (started, mut best) = (Instant::now(), Duration::MAX);
            loop {
                let window = Instant::now();
                (self.window)();
                best = best.min(window.elapsed());
                if started.elapsed() >= time {
                    return self.work as f64 / best.as_secs_f64().max(f64::MIN_POSITIVE);
                }
            }
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(one)).collect();
            let own = one();
            own + others.into_iter().map(|t| t.join().expect("the loop does not panic")).sum::<f64>()
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::ROUNDS;

    /// Two units of a latency of 4 or 5 cycles are busy with 10 sums that do not wait for each other; half the registers.
    const SUMS: usize = 16;
    pub(super) const WORK_512: usize = ROUNDS * SUMS * 16 * 2;
    /// With 16 registers in all, 12 are left for sums.
    const SUMS_256: usize = 12;
    pub(super) const WORK_256: usize = ROUNDS * SUMS_256 * 8 * 2;

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32_512() {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [y; SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_256() {
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [y; SUMS_256];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_512() {
        let (x, y) = (_mm512_set1_ps(black_box(0.001)), _mm512_set1_ps(black_box(0.001)));
        let (a, b) = (_mm512_cvtne2ps_pbh(x, y), _mm512_cvtne2ps_pbh(y, x));
        let mut sums = [x; SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }
}

/// Sums of the portable loop: as many as the least of x86-64 holds in registers, in vectors of 128 bits.
const PORTABLE_SUMS: usize = 48;
const PORTABLE_WORK: usize = ROUNDS * PORTABLE_SUMS * 2;

/// What any CPU can do: a fused multiply-add only where every CPU of the architecture has one.
fn portable() {
    let (x, y) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = [y; PORTABLE_SUMS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = if cfg!(target_arch = "aarch64") { sum.mul_add(x, y) } else { *sum * x + y };
        }
    }
    black_box(sums);
}

/// Two arrays that are several times larger than the last-level cache, in memory such as the arena's.
pub struct Arrays {
    from: Zeros,
    to: Zeros,
}

impl Default for Arrays {
    fn default() -> Arrays {
        Arrays::new(last_level_cache().map_or(ARRAY, |cache| (4 * cache).min(LARGEST_ARRAY)))
    }
}

impl Arrays {
    fn new(bytes: usize) -> Arrays {
        let [mut from, mut to] = [bytes, bytes].map(Zeros::new);
        // Other than zero, since zeroed memory is one page of the system's until it is written.
        from.bytes.fill(1);
        to.bytes.fill(2);
        Arrays { from, to }
    }

    /// Bytes of one of them.
    pub fn bytes(&self) -> usize {
        self.from.bytes.len()
    }

    /// Bytes read and written per second while so many threads copy one to the other, in so much time, at least once.
    pub fn copy(&mut self, threads: usize, time: Duration) -> f64 {
        let bytes = 2 * self.bytes();
        let part = self.part(threads);
        let parts = self.to.bytes.chunks_mut(part).zip(self.from.bytes.chunks(part)).collect();
        bytes as f64 / fastest_pass(parts, time, |(to, from): &mut (&mut [u8], &[u8])| to.copy_from_slice(from))
    }

    /// Bytes read per second while so many threads add up an array, in so much time, at least once.
    pub fn read(&self, threads: usize, time: Duration) -> f64 {
        let parts = self.from.bytes.chunks(self.part(threads)).collect();
        let work = |from: &mut &[u8]| {
            black_box(sum(from.as_chunks().0));
        };
        self.bytes() as f64 / fastest_pass(parts, time, work)
    }

    /// Bytes of a thread's part, in whole pages.
    fn part(&self, threads: usize) -> usize {
        self.bytes().div_ceil(threads.max(1)).next_multiple_of(4096)
    }
}

/// Seconds of the fastest pass in which every part is worked on by a thread of its own.
fn fastest_pass<T: Send>(parts: Vec<T>, time: Duration, work: impl Fn(&mut T) + Sync) -> f64 {
    let (gate, done) = (Barrier::new(parts.len()), AtomicBool::new(false));
    let passes = |mut part: T, leads: bool| {
        let (started, mut best) = (Instant::now(), Duration::MAX);
        loop {
            gate.wait();
            if done.load(Ordering::Acquire) {
                return best.as_secs_f64().max(f64::MIN_POSITIVE);
            }
            let pass = Instant::now();
            work(&mut part);
            gate.wait();
            best = best.min(pass.elapsed());
            // All others wait at the gate until this thread comes.
            if leads && started.elapsed() >= time {
                done.store(true, Ordering::Release);
            }
        }
    };
    thread::scope(|scope| {
        let mut parts = parts.into_iter();
        let first = parts.next().expect("an array has a part");
        let passes = &passes;
        parts.for_each(|part| drop(scope.spawn(move || passes(part, false))));
        passes(first, true)
    })
}

/// The sum of all words. Lines of the cache are asked for before the hardware does, which begins anew at every page.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn sum(from: &[[u8; LINE]]) -> u64 {
    let mut sums = [0u64; LINE / 8];
    for line in from {
        fetch(line.as_ptr().wrapping_add(AHEAD));
        for (sum, word) in sums.iter_mut().zip(line.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_rates() {
        let threads = 2;
        let loops = [Some(MultiplyAdds::f32()), MultiplyAdds::bf16()];
        for adds in loops.into_iter().flatten() {
            let rate = adds.rate(threads, Duration::ZERO);
            assert!(rate.is_finite() && rate > 1e8, "{}: {rate}", adds.how);
        }
        let mut arrays = Arrays::new(1 << 20);
        for rate in [arrays.copy(threads, Duration::ZERO), arrays.read(threads, Duration::ZERO)] {
            assert!(rate.is_finite() && rate > 1e7, "{rate}");
        }
        assert_eq!(arrays.to.bytes[..], arrays.from.bytes[..], "every part was copied");
        assert_eq!(sum(arrays.from.bytes.as_chunks().0), 0x0101_0101_0101_0101 << 17);
    }
}
