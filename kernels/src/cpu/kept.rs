//! Products with weights that are kept in fewer bits than they are computed in.
//!
//! Those of a few rows ([`skinny`]) read the weights as they lie, and widen them in registers, so that a step of decoding
//! takes as long as so few bytes do. Others have them widened to the workspace first, once per product, which is little
//! beside their arithmetic. Both give an element the same number, so they differ by the order of sums only.

mod lanes;

use dsgc_ir::infer::{Contraction, product_type};
use dsgc_ir::{Bindings, Buffer, DType, Op, Planned, Region, Type, Value};
use half::bf16;
use lanes::{Brain, Half, Int4, Int8, Kept, Lanes, STEP, Wide};
pub(super) use lanes::{Column, Plain};

use super::contract_each::is_linear;
use super::gemm::Element;
use super::memory::{ALIGNMENT, Ptr};
use super::narrow::{round, widen};
use super::skinny::{self, Kernel, Part, Product, Products, Source};
use super::{Launch, own_workspace};

/// Whether a product has operands of two types.
pub(super) fn is_product(op: &Op, operands: &[DType]) -> bool {
    matches!(op, Op::Contract { .. } | Op::ContractEach { .. }) && operands.iter().any(|dtype| *dtype != operands[0])
}

/// The type that a product of these operands computes in.
fn computes(operands: &[DType]) -> DType {
    let other = operands.iter().find(|dtype| **dtype != operands[0]).unwrap_or(&operands[0]);
    product_type(operands[0], *other).expect("operands were verified")
}

/// Whether all weights can be read as they lie, for operands of these types and a first one of this shape.
fn is_skinny(op: &Op, operands: &[DType], first: &[usize]) -> bool {
    let (spec, common) = match op {
        Op::Contract { spec } => (spec, 0),
        Op::ContractEach { spec, common } => (spec, *common),
        _ => return false,
    };
    let (Some((&k, rows)), computes) = (first.split_last(), computes(operands)) else { return false };
    let m = rows.iter().fold(1usize, |m, &n| m.saturating_mul(n));
    common == 0
        && operands[0] == computes
        && computes != DType::F16
        && operands[1..].iter().all(|dtype| *dtype == operands[1])
        && Contraction::parse(spec).is_ok_and(|labels| is_linear(&labels))
        && skinny::fits_kept(m, k)
}

/// Bytes of workspace for an op's kernel, with that of weights that are widened behind it.
pub(super) fn workspace(op: &Op, args: &[Type], bounds: &Bindings, threads: usize) -> usize {
    let types: Vec<DType> = args.iter().map(|ty| ty.dtype).collect();
    if !is_product(op, &types) {
        return own_workspace(op, args, bounds, threads);
    }
    let own = before_weights(op, args, bounds, threads);
    if is_skinny(op, &types, &args[0].shape(bounds).unwrap_or_default()) {
        return own;
    }
    let computes = computes(&types);
    let kept = args.iter().filter(|ty| ty.dtype != computes);
    let place = if computes == DType::F16 { DType::F32 } else { computes };
    let wide = kept.map(|ty| ty.with(place).bytes(bounds).unwrap_or(usize::MAX));
    wide.fold(own, |sum, bytes| sum.next_multiple_of(ALIGNMENT).saturating_add(bytes))
}

/// Bytes of workspace for the kernel itself, of few rows or many.
fn before_weights(op: &Op, args: &[Type], bounds: &Bindings, threads: usize) -> usize {
    let k = args[0].dims.last().and_then(|dim| dim.eval(bounds).ok()).unwrap_or(0);
    own_workspace(op, args, bounds, threads).max(skinny::workspace(k.max(0) as usize))
}

/// Runs such a product.
pub(super) fn run(l: &mut Launch, program: &Planned) -> Result<(), String> {
    let types: Vec<DType> = l.op.args.iter().map(|&a| l.graph.ty(a).dtype).collect();
    if is_skinny(&l.op.op, &types, &l.shape(l.op.args[0])) {
        match (types[0], l.dtype(l.op.results().next().expect("a product has a result"))) {
            (DType::Bf16, DType::Bf16) => few_rows::<bf16, bf16>(l, types[1]),
            (DType::Bf16, _) => few_rows::<bf16, f32>(l, types[1]),
            _ => few_rows::<f32, f32>(l, types[1]),
        }
        return Ok(());
    }
    let bounds = l.graph.upper_bounds();
    let args: Vec<Type> = l.op.args.iter().map(|&a| l.graph.ty(a).clone()).collect();
    let declared = computes(&types);
    let place = if declared == DType::F16 { DType::F32 } else { declared };
    let mut offset = before_weights(&l.op.op, &args, &bounds, l.threads.count());
    let values: Vec<Value> = l.op.args.clone();
    for (value, dtype) in values.into_iter().zip(types).filter(|(_, dtype)| *dtype != declared) {
        if l.moved.iter().any(|m| m.0 == value) {
            continue;
        }
        offset = offset.next_multiple_of(ALIGNMENT);
        let (n, width) = l.rows(value);
        let buffer = Buffer { region: Region::Scratch, offset, bytes: n * width * place.bytes() };
        offset += buffer.bytes;
        let (from, to): (Ptr<u8>, Ptr<u8>) = (l.memory.at(l.buffer(value)), l.memory.at(buffer));
        l.threads.run(n, width, |rows| {
            // SAFETY: both buffers hold `n` rows; those of threads are apart.
            unsafe { unpack(dtype, (declared, place), width, (from, to), rows) };
        });
        l.moved.push((value, buffer, place));
    }
    l.unpacked = true;
    l.run(program)
}

/// A product of a few rows with one or more matrices that lie as `kept`.
fn few_rows<T: Source, O: Element>(l: &mut Launch, kept: DType) {
    let (m, k) = l.rows(l.op.args[0]);
    let (matrices, (_, bytes)) = (l.op.args.len() - 1, rows(kept, k));
    let part = |i: usize| {
        let n = l.shape(l.op.args[1 + i])[0];
        Part { n, w: (l.arg(1 + i), bytes), out: (l.out(i), n) }
    };
    let parts: Vec<Part<u8, O>> = (0..matrices).map(part).collect();
    // SAFETY: extents are those of the operands and the results, whose rows lie one behind the other.
    unsafe { skinny::run_kept::<T, O>(kept, l.threads, (m, k), (l.arg(0), k), &parts, l.workspace()) };
}

/// Runs a cast from or to a quantised type.
pub(super) fn cast(l: &mut Launch) {
    let (from, to) = (l.dtype(l.op.args[0]), l.dtype(l.result()));
    let (n, width) = l.rows(l.result());
    let (x, out): (Ptr<u8>, Ptr<u8>) = (l.arg(0), l.out(0));
    l.threads.run(n, width, |rows| {
        // SAFETY: both buffers hold `n` rows of `width` elements; those of threads are apart.
        unsafe {
            let DType::Quantized(quantized) = to else { return unpack(from, (to, to), width, (x, out), rows) };
            let bytes = quantized.row_bytes(width);
            let numbers = Ptr(x.0.cast::<f32>()).slice(rows.start * width, rows.len() * width);
            quantized.pack(numbers, width, out.slice_mut(rows.start * bytes, rows.len() * bytes));
        }
    });
}

/// Elements that are widened at a time; they stay in the first-level cache, and groups do not cross them.
const BLOCK: usize = 256;

/// Widens rows of `width` elements that are kept as `kept`: each becomes a number of the first type, and lies as one of the
/// second, which holds all of that.
///
/// # Safety
/// Both places hold the rows, and are apart.
unsafe fn unpack(
    kept: DType,
    (number, place): (DType, DType),
    width: usize,
    (from, to): (Ptr<u8>, Ptr<u8>),
    rows: std::ops::Range<usize>,
) {
    let (format, bytes) = self::rows(kept, width);
    let decode = decoder(kept);
    let (mut wide, mut halves) = ([0f32; BLOCK], [0u16; BLOCK]);
    for row in rows {
        for at in (0..width).step_by(BLOCK) {
            let n = BLOCK.min(width - at);
            // SAFETY: the caller's; blocks have room for whole steps.
            unsafe {
                decode(from.add(row * bytes).0, format, at, n, &mut wide);
                let to = to.add((row * width + at) * place.bytes()).0;
                match (number.is_narrow(), place.is_narrow()) {
                    (false, _) => Ptr(to.cast::<f32>()).slice_mut(0, n).copy_from_slice(&wide[..n]),
                    (true, true) => round(number, wide.as_ptr(), to, n),
                    (true, false) => {
                        round(number, wide.as_ptr(), halves.as_mut_ptr().cast(), n);
                        widen(number, halves.as_ptr().cast(), to.cast(), n);
                    }
                }
            }
        }
    }
}

/// Where in a row elements and scales are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Format {
    /// Bytes before the first element, which hold the scales.
    elements: usize,
    /// The number of elements of a group is 2 to the power of this.
    group: u32,
}

/// The format of rows of `k` elements, and their bytes.
pub(super) fn rows(kept: DType, k: usize) -> (Format, usize) {
    match kept {
        DType::Quantized(q) => (Format { elements: q.scale_bytes(k), group: q.group().ilog2() }, q.row_bytes(k)),
        _ => (Format::default(), k * kept.bytes()),
    }
}

/// Widens elements `at..at + n` of a row, and behind them to a whole step.
type Decoder = unsafe fn(row: *const u8, format: Format, at: usize, n: usize, to: &mut [f32; BLOCK]);

/// # Safety
/// The row has the elements, and the machine what `L` needs.
#[inline(always)]
unsafe fn decode<K: Kept, L: Lanes>(row: *const u8, format: Format, at: usize, n: usize, to: &mut [f32; BLOCK]) {
    let whole = if K::PADDED { n.next_multiple_of(STEP) } else { n / STEP * STEP };
    // SAFETY: the caller's.
    unsafe {
        for i in (0..whole).step_by(STEP) {
            K::load::<L>(row, format, at + i).store(to.as_mut_ptr().add(i));
        }
        for (i, number) in to[..n].iter_mut().enumerate().skip(whole) {
            *number = K::one(row, at + i);
        }
    }
}

/// Kernels for some machines, and what tells whether this is one.
#[cfg(target_arch = "x86_64")]
mod machine {
    use std::arch::x86_64::{__m256, __m512};

    use half::bf16;

    use super::super::skinny::x86::Pairs;
    use super::lanes::{Column, Kept, Wide};
    use super::{BLOCK, Element, Format, Product, Products, decode};

    /// AVX-512F; with the features of its sets that every machine with it has.
    pub(super) fn has_avx512() -> bool {
        is_x86_feature_detected!("avx512f")
    }

    /// AVX2 with what came with it.
    pub(super) fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    pub(super) fn has_pairs() -> bool {
        has_avx512() && is_x86_feature_detected!("avx512bf16")
    }

    impl<T: Element, O: Element> Product<T, O> {
        #[target_feature(enable = "avx512f")]
        pub(super) unsafe fn kept_avx512<C: Column<T, Wide<[__m512; 2]>>>(&self, from: usize, to: usize)
        where
            Wide<[__m512; 2]>: Products<T>,
        {
            // SAFETY: the caller's.
            unsafe { self.part::<Wide<[__m512; 2]>, C>(from, to) }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        pub(super) unsafe fn kept_avx2<C: Column<T, Wide<[__m256; 4]>>>(&self, from: usize, to: usize)
        where
            Wide<[__m256; 4]>: Products<T>,
        {
            // SAFETY: the caller's.
            unsafe { self.part::<Wide<[__m256; 4]>, C>(from, to) }
        }
    }

    impl<O: Element> Product<bf16, O> {
        #[target_feature(enable = "avx512f,avx512bf16")]
        pub(super) unsafe fn kept_pairs<C: Column<bf16, Pairs>>(&self, from: usize, to: usize) {
            // SAFETY: the caller's.
            unsafe { self.part::<Pairs, C>(from, to) }
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn decode_avx512<K: Kept>(
        row: *const u8,
        format: Format,
        at: usize,
        n: usize,
        to: &mut [f32; BLOCK],
    ) {
        // SAFETY: the caller's.
        unsafe { decode::<K, [__m512; 2]>(row, format, at, n, to) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn decode_avx2<K: Kept>(
        row: *const u8,
        format: Format,
        at: usize,
        n: usize,
        to: &mut [f32; BLOCK],
    ) {
        // SAFETY: the caller's.
        unsafe { decode::<K, [__m256; 4]>(row, format, at, n, to) }
    }
}

/// Calls a function with what stands for a type that weights are kept in.
macro_rules! by_kept {
    ($kept:expr, $f:ident $(, $more:ty)?) => {
        match $kept {
            DType::Bf16 => $f::<Brain $(, $more)?>(),
            DType::F16 => $f::<Half $(, $more)?>(),
            DType::Quantized(q) if q.bits() == 8 => $f::<Int8 $(, $more)?>(),
            DType::Quantized(_) => $f::<Int4 $(, $more)?>(),
            DType::F32 | DType::I32 | DType::Bool | DType::Key => panic!("bug: weights kept as {}", $kept),
        }
    };
}

/// What this machine has to widen elements, the fastest first.
fn decoders<K: Kept>() -> Vec<Decoder> {
    let mut all: Vec<Decoder> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if machine::has_avx512() {
            all.push(machine::decode_avx512::<K>);
        }
        if machine::has_avx2() {
            all.push(machine::decode_avx2::<K>);
        }
    }
    all.push(decode::<K, [f32; STEP]>);
    all
}

fn decoder(kept: DType) -> Decoder {
    by_kept!(kept, decoders)[0]
}

/// What this machine has for rows of f32, the fastest first.
pub(super) fn kernels_of_f32<O: Element>(kept: DType) -> Vec<Kernel<f32, O>> {
    fn kernels<K: Kept, O: Element>() -> Vec<Kernel<f32, O>> {
        let mut all: Vec<Kernel<f32, O>> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if machine::has_avx512() {
                all.push(Kernel { part: Product::kept_avx512::<K>, step: STEP, padded: K::PADDED });
            }
            if machine::has_avx2() {
                all.push(Kernel { part: Product::kept_avx2::<K>, step: STEP, padded: K::PADDED });
            }
        }
        all.push(Kernel { part: Product::part::<Wide<[f32; STEP]>, K>, step: STEP, padded: K::PADDED });
        all
    }
    by_kept!(kept, kernels, O)
}

/// What this machine has for rows of bf16, the fastest first.
pub(super) fn kernels_of_bf16<O: Element>(kept: DType) -> Vec<Kernel<bf16, O>> {
    fn kernels<K: Kept, O: Element>() -> Vec<Kernel<bf16, O>> {
        let mut all: Vec<Kernel<bf16, O>> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if machine::has_pairs() {
                all.push(Kernel { part: Product::kept_pairs::<K>, step: STEP, padded: K::PADDED });
            }
            if machine::has_avx512() {
                all.push(Kernel { part: Product::kept_avx512::<K>, step: STEP, padded: K::PADDED });
            }
            if machine::has_avx2() {
                all.push(Kernel { part: Product::kept_avx2::<K>, step: STEP, padded: K::PADDED });
            }
        }
        all.push(Kernel { part: Product::part::<Wide<[f32; STEP]>, K>, step: STEP, padded: K::PADDED });
        all
    }
    by_kept!(kept, kernels, O)
}

#[cfg(test)]
mod tests {
    use dsgc_ir::Quantized;
    use dsgc_ir::fuzz::Rng;

    use super::super::memory::Zeros;
    use super::super::parallel::Threads;
    use super::*;

    /// Everything that weights can be kept in.
    fn all() -> impl Iterator<Item = DType> {
        [DType::Bf16, DType::F16].into_iter().chain(Quantized::ALL.map(DType::Quantized))
    }

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..len).map(|_| (rng.between(-4096, 4096) as f32) / 1024.0).collect()
    }

    /// Rows of `k` elements as they are kept, and what they stand for.
    fn keep(kept: DType, mut numbers: Vec<f32>, k: usize) -> (Vec<u8>, Vec<f32>) {
        let (_, bytes) = rows(kept, k);
        let mut packed = vec![0; numbers.len() / k * bytes];
        match kept {
            DType::Quantized(q) => {
                q.pack(&numbers, k, &mut packed);
                q.round(&mut numbers, k);
            }
            // SAFETY: both have the numbers.
            _ => unsafe {
                round(kept, numbers.as_ptr(), packed.as_mut_ptr(), numbers.len());
                widen(kept, packed.as_ptr(), numbers.as_mut_ptr(), numbers.len());
            },
        }
        (packed, numbers)
    }

    #[test]
    fn every_decoder_gives_the_numbers() {
        for kept in all() {
            for k in [1, 31, 32, 64, 100, 129, 300, 512] {
                let (packed, numbers) = keep(kept, random(3 * k, k as u64), k);
                let (format, bytes) = rows(kept, k);
                for decode in by_kept!(kept, decoders) {
                    for row in 0..3 {
                        for at in (0..k).step_by(BLOCK) {
                            let (n, mut found) = (BLOCK.min(k - at), [f32::NAN; BLOCK]);
                            // SAFETY: the row has the elements, and the decoder is one of the machine's.
                            unsafe { decode(packed.as_ptr().add(row * bytes), format, at, n, &mut found) };
                            assert_eq!(found[..n], numbers[row * k + at..row * k + at + n], "{kept}, {k}");
                        }
                    }
                }
            }
        }
    }

    /// Every kernel against f64; the first row alone has the same bits, at any number of threads.
    fn check<T: Source, O: Element>(kept: DType, step: f64) {
        let computes = if T::WIDE { DType::F32 } else { DType::Bf16 };
        for (m, n, k) in [(1, 4, 32), (2, 5, 33), (3, 3, 31), (4, 9, 64), (5, 8, 100), (7, 1, 1), (16, 37, 301)] {
            let (mut packed, numbers) = keep(kept, random(n * k, 2), k);
            let numbers: Vec<f32> = numbers.into_iter().map(|w| computes.round(w)).collect();
            let mut x: Vec<T> = random(m * k, 1).into_iter().map(T::nearest).collect();
            for kernel in T::kernels_of_kept::<O>(kept) {
                let mut run = |m: usize, threads: usize| {
                    let mut out = vec![O::nearest(7.0); m * n];
                    let mut scratch = Zeros::new(skinny::workspace(k));
                    scratch.bytes.fill(0xFF);
                    let (format, bytes) = rows(kept, k);
                    let part = Part { n, w: (Ptr(packed.as_mut_ptr()), bytes), out: (Ptr(out.as_mut_ptr()), n) };
                    let (x, at) = ((Ptr(x.as_mut_ptr()), k), Ptr(scratch.bytes.as_mut_ptr()));
                    // SAFETY: all have their rows, and the kernel is one of the machine's.
                    unsafe { skinny::run_on((kernel, format), &Threads::new(threads), (m, k), x, &[part], at) };
                    out.iter().map(|x| x.wide()).collect::<Vec<f32>>()
                };
                let out = run(m, 1);
                assert_eq!(out, run(m, 2));
                assert_eq!(out, run(m, 3));
                assert_eq!(out[..n], run(1, 1)[..n], "a row alone, {kept}, {m} {n} {k}");
                for (i, &found) in out.iter().enumerate() {
                    let (x, w) = (&x[i / n * k..][..k], &numbers[i % n * k..][..k]);
                    let terms = x.iter().zip(w).map(|(x, &w)| f64::from(x.wide()) * f64::from(w));
                    let (sum, size) = terms.fold((0.0, 0.0), |(s, z), x| (s + x, z + x.abs()));
                    let bound = (k + 2) as f64 * 2f64.powi(-24) * size + step * sum.abs();
                    assert!((f64::from(found) - sum).abs() <= bound, "{kept}, {m} {n} {k}: {found} for {sum}");
                }
            }
        }
    }

    #[test]
    fn few_rows_read_weights_as_they_lie() {
        for kept in all() {
            check::<f32, f32>(kept, 0.0);
            if kept.is_quantized() {
                check::<bf16, f32>(kept, 0.0);
                check::<bf16, bf16>(kept, 2f64.powi(-8));
            }
        }
    }
}
