//! Matrix products at the shapes of training steps, beside the peak of the machine and the `gemm` crate.
//!
//! `cargo bench --bench gemm [PART OF A NAME]` prints GFLOP/s, best and median of interleaved runs, and the best as a share
//! of the peak: a loop of multiply-adds (f32, and pairs of bf16) that never leaves the registers, measured in between,
//! times the threads. Layouts are those of a linear layer with its weight as `[out, in]`: forward (NT), the gradient of its
//! input (NN) and of its weight (TN).

use std::hint::black_box;
use std::time::Instant;

use dsgc_kernels::cpu::gemm::measure::{
    Layout::{self, Columns, Rows},
    Products,
};
use half::bf16;

/// Name, rows, columns, sums, and how both operands lie.
type Shape = (&'static str, usize, usize, usize, Layout, Layout);

const SHAPES: [Shape; 19] = [
    ("OPT-125m attention forward", 1024, 768, 768, Rows, Columns),
    ("OPT-125m attention weight", 768, 768, 1024, Columns, Rows),
    ("OPT-125m up forward", 1024, 3072, 768, Rows, Columns),
    ("OPT-125m up input", 1024, 768, 3072, Rows, Rows),
    ("OPT-125m up weight", 3072, 768, 1024, Columns, Rows),
    ("OPT-125m down forward", 1024, 768, 3072, Rows, Columns),
    ("OPT-125m down input", 1024, 3072, 768, Rows, Rows),
    ("OPT-125m down weight", 768, 3072, 1024, Columns, Rows),
    ("OPT-125m head forward", 1020, 50272, 768, Rows, Columns),
    ("OPT-125m head input", 1020, 768, 50272, Rows, Rows),
    ("OPT-125m head weight", 50272, 768, 1020, Columns, Rows),
    ("LLaMA-15M attention forward", 2048, 288, 288, Rows, Columns),
    ("LLaMA-15M attention weight", 288, 288, 2048, Columns, Rows),
    ("LLaMA-15M up forward", 2048, 768, 288, Rows, Columns),
    ("LLaMA-15M down forward", 2048, 288, 768, Rows, Columns),
    ("LLaMA-15M up weight", 768, 288, 2048, Columns, Rows),
    ("LLaMA-15M head forward", 2048, 32000, 288, Rows, Columns),
    ("LLaMA-15M head input", 2048, 288, 32000, Rows, Rows),
    ("LLaMA-15M head weight", 32000, 288, 2048, Columns, Rows),
];

/// Seconds that the runs of a shape take together, about.
const SECONDS: f64 = 2.0;

/// Rounds of sixteen multiply-adds of a register in a loop that measures the peak.
const ROUNDS: usize = 50_000;

/// GFLOP/s of one thread that multiplies and adds in registers; nothing where the machine has no AVX-512 for it.
#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;

    use super::{ROUNDS, black_box, seconds};

    /// Sums that do not wait for each other.
    const SUMS: usize = 16;

    #[target_feature(enable = "avx512f")]
    fn wide(a: __m512) -> f32 {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, a, *sum);
            }
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pairs(a: __m512bh) -> f32 {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    fn rate(flops_of_one: usize, loop_once: impl FnMut()) -> f64 {
        (ROUNDS * SUMS * flops_of_one) as f64 / seconds(loop_once) / 1e9
    }

    pub fn f32() -> Option<f64> {
        // SAFETY: the machine was asked, and any bits are a number.
        is_x86_feature_detected!("avx512f").then(|| {
            rate(32, || {
                black_box(unsafe { wide(black_box(std::mem::zeroed())) });
            })
        })
    }

    pub fn bf16() -> Option<f64> {
        // SAFETY: as above.
        is_x86_feature_detected!("avx512bf16").then(|| {
            rate(64, || {
                black_box(unsafe { pairs(black_box(std::mem::zeroed())) });
            })
        })
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod peak {
    pub fn f32() -> Option<f64> {
        None
    }
    pub fn bf16() -> Option<f64> {
        None
    }
}

fn seconds(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// A slice as the crate wants it: its start, and strides of columns and rows.
fn strided<T>(slice: &[T], layout: Layout, rows: usize, columns: usize) -> (*const T, isize, isize) {
    let (column, row) = if layout == Rows { (1, columns) } else { (rows, 1) };
    (slice.as_ptr(), column as isize, row as isize)
}

/// Elements that begin at a line of the cache, as a device's do.
fn aligned<T: Copy>(len: usize, value: impl Fn(usize) -> T) -> (Vec<T>, usize) {
    let all: Vec<T> = (0..len + 64 / size_of::<T>()).map(value).collect();
    let start = all.as_ptr().align_offset(64);
    (all, start)
}

fn larger(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.into_iter().chain(b).reduce(f64::max)
}

fn row(name: &str, flops: f64, times: &mut [f64], peak: Option<f64>) -> String {
    times.sort_by(f64::total_cmp);
    let (best, median) = (flops / times[0] / 1e9, flops / times[times.len() / 2] / 1e9);
    let share = peak.map_or(String::new(), |peak| format!(" {:3.0} %", 100.0 * best / peak));
    format!(" | {name} {best:6.1} {median:6.1}{share}")
}

fn measure(threads: usize, &(name, m, n, k, left_layout, right_layout): &Shape) {
    let number = |i: usize| (i * 2_654_435_761 % 1000) as f32 / 1000.0 - 0.5;
    let (left, left_at) = aligned(m * k, number);
    let (right, right_at) = aligned(k * n, number);
    let (narrow_left, narrow_left_at) = aligned(m * k, |i| bf16::from_f32(number(i)));
    let (narrow_right, narrow_right_at) = aligned(k * n, |i| bf16::from_f32(number(i)));
    let (mut out, out_at) = aligned(m * n, |_| 0.0f32);
    let (left, right) = (&left[left_at..][..m * k], &right[right_at..][..k * n]);
    let narrow_left = &narrow_left[narrow_left_at..][..m * k];
    let narrow_right = &narrow_right[narrow_right_at..][..k * n];
    let out = &mut out[out_at..][..m * n];

    let mut products = Products::new(threads, (m, n, k));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("the system starts threads");
    let library = |out: &mut [f32]| {
        let (left, left_column, left_row) = strided(left, left_layout, m, k);
        let (right, right_column, right_row) = strided(right, right_layout, k, n);
        let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
        // SAFETY: the strides are those of the slices, which are apart.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                left,
                left_column,
                left_row,
                right,
                right_column,
                right_row,
                1.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    };

    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    let runs = ((SECONDS * 1e11 * threads as f64 / flops / 3.0) as usize).clamp(5, 200);
    let (mut times, mut peaks) = ([Vec::new(), Vec::new(), Vec::new()], [None, None]);
    for _ in 0..runs {
        peaks = [larger(peaks[0], peak::f32()), larger(peaks[1], peak::bf16())];
        times[0].push(seconds(|| {
            products.f32((m, n, k), (left, left_layout), (right, right_layout), out);
        }));
        let (left, right) = ((narrow_left, left_layout), (narrow_right, right_layout));
        times[1].push(seconds(|| products.bf16((m, n, k), left, right, out)));
        // The crate's threads are those of the pool in which it runs.
        times[2].push(seconds(|| pool.install(|| library(&mut *out))));
    }
    let [ours, narrow, library] = &mut times;
    let peaks = peaks.map(|peak| peak.map(|peak| peak * threads as f64));
    let columns = [
        row("f32", flops, ours, peaks[0]),
        row("gemm crate", flops, library, peaks[0]),
        row("bf16", flops, narrow, peaks[1]),
    ];
    println!("{threads} {name:27} {m:>5} {n:>5} {k:>5}{}", columns.concat());
}

fn main() {
    let part = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!("threads, shape (rows, columns, sums) | GFLOP/s: best, median, best as a share of the peak");
    for threads in [1, 2] {
        SHAPES.iter().filter(|shape| shape.0.contains(&part)).for_each(|shape| measure(threads, shape));
    }
}
