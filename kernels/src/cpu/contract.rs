//! Products: every contraction as matrix products with strides, without copies.
//!
//! The letters of `contract` fall into four groups: in both operands and the result (batch), in the left operand and
//! the result (m), in the right operand and the result (n), in both operands only (k). Letters of a group that lie one
//! behind the other in memory are joined; the largest of each group is the dim of a matrix product, what is left over
//! is a loop around it.

use dsgc_ir::DType;
use dsgc_ir::infer::Contraction;
use half::bf16;

use super::Launch;
use super::gemm::{self, Element, Matrix, Product};
use super::memory::{ALIGNMENT, Ptr};
use super::narrow::round;
use super::parallel::Threads;
use super::reduce;
use super::skinny::{self, Source};
use super::structure::strides;

/// A letter: its extent, and its strides in the left operand, the right operand and the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Letter {
    pub(super) extent: usize,
    pub(super) left: usize,
    pub(super) right: usize,
    pub(super) out: usize,
}

/// Independent products from which on every one is a task of its own.
const MANY: usize = 8;

/// The letters of a contraction by the matrix products that it is.
pub(super) struct Groups {
    /// Loops around all products.
    loops: Vec<Letter>,
    pub(super) m: Letter,
    pub(super) n: Letter,
    pub(super) k: Letter,
    /// Sums of products.
    sums: Vec<Letter>,
}

impl Groups {
    pub(super) fn new(labels: &Contraction, a: &[usize], b: &[usize]) -> Groups {
        let extent = |letter| {
            let left = labels.lhs.iter().position(|&x| x == letter).map(|i| a[i]);
            left.or_else(|| labels.rhs.iter().position(|&x| x == letter).map(|i| b[i])).unwrap_or(1)
        };
        let c: Vec<usize> = labels.out.iter().map(|&x| extent(x)).collect();
        let stride = |side: &[char], shape: &[usize], letter| {
            side.iter().position(|&x| x == letter).map_or(0, |i| strides(shape)[i])
        };
        let letter = |x: char| Letter {
            extent: extent(x),
            left: stride(&labels.lhs, a, x),
            right: stride(&labels.rhs, b, x),
            out: stride(&labels.out, &c, x),
        };
        let group = |all: &[char], keep: &dyn Fn(char) -> bool| {
            join(all.iter().copied().filter(|&x| keep(x)).map(letter).filter(|x| x.extent != 1).collect())
        };
        let (in_left, in_right, in_out) =
            (|x| labels.lhs.contains(&x), |x| labels.rhs.contains(&x), |x| labels.out.contains(&x));
        let mut loops = group(&labels.out, &|x| in_left(x) && in_right(x));
        let (m, more_m) = largest(group(&labels.out, &|x| in_left(x) && !in_right(x)));
        let (n, more_n) = largest(group(&labels.out, &|x| !in_left(x) && in_right(x)));
        let summed = group(&labels.lhs, &|x| !in_out(x));
        // A sum over nothing is one product of matrices without inner dim: zeros.
        let (k, sums) = if summed.iter().any(|x| x.extent == 0) { Default::default() } else { largest(summed) };
        loops.extend(more_m);
        loops.extend(more_n);
        Groups { loops, m, n, k, sums }
    }

    /// What no product of these letters exceeds, nor one of smaller extents, where other letters may be joined.
    fn most(&self) -> gemm::Size {
        let Groups { loops, m, n, k, sums } = self;
        let extents = |letters: &[Letter]| letters.iter().map(|x| x.extent).product::<usize>();
        let own = |side: fn(&Letter) -> usize| {
            let more = loops.iter().filter(|x| side(x) == 0);
            more.map(|x| x.extent).product::<usize>()
        };
        (m.extent * own(|x| x.right), n.extent * own(|x| x.left), k.extent * extents(sums))
    }

    /// Whether it is one product whose sums can be finished block by block. The sums of a longer one are several.
    pub(super) fn in_blocks(&self) -> bool {
        let Groups { loops, m, n, k, sums } = self;
        loops.is_empty()
            && sums.is_empty()
            && k.extent <= gemm::LONGEST
            && !self.is_dot()
            && !self.has_few_rows()
            && (m.out == 1 || n.out == 1)
    }

    /// Elements of a product that is at most so large, where it may not come in blocks.
    pub(super) fn whole(&self) -> usize {
        let Groups { loops, m, n, .. } = self;
        if self.in_blocks() {
            return (m.extent * n.extent).min(skinny::ROWS * m.extent.max(n.extent));
        }
        loops.iter().chain([m, n]).map(|x| x.extent).product()
    }

    /// Whether it is a sum of products of two rows.
    fn is_dot(&self) -> bool {
        let Groups { loops, m, n, k, sums } = self;
        loops.is_empty() && sums.is_empty() && (m.extent, n.extent) == (1, 1) && (k.left, k.right) == (1, 1)
    }

    /// Whether it is a product of a few rows with a large matrix.
    fn has_few_rows(&self) -> bool {
        let Groups { loops, m, n, k, sums } = self;
        let dense = (k.left, k.right, n.out) == (1, 1, 1);
        loops.is_empty() && sums.is_empty() && dense && skinny::fits(m.extent, n.extent, k.extent)
    }

    /// Whether a narrow result must not be added to, as it would be rounded each time.
    fn rounds_once(&self, labels: &Contraction, operands: DType) -> bool {
        !self.sums.is_empty() && operands.is_narrow() && !labels.wide
    }
}

/// Bytes of workspace: of a sum of products, and of products in blocks; behind that, of a result that is rounded once.
pub(super) fn workspace(spec: &str, dtype: DType, left: &[usize], right: &[usize], threads: usize) -> usize {
    let Ok(labels) = Contraction::parse(spec) else { return 0 };
    let groups = Groups::new(&labels, left, right);
    let out: usize = groups.loops.iter().chain([&groups.m, &groups.n]).map(|x| x.extent).product();
    let own = own_workspace(&groups, left.iter().product(), threads);
    if groups.rounds_once(&labels, dtype) { own + out * size_of::<f32>() } else { own }
}

/// The same without a result that is rounded once, of a left operand of so many elements.
fn own_workspace(groups: &Groups, left: usize, threads: usize) -> usize {
    reduce::workspace(left).max(gemm::workspace(groups.most(), threads)).next_multiple_of(ALIGNMENT)
}

/// Runs a contraction.
pub(super) fn run(l: &mut Launch, spec: &str) -> Result<(), String> {
    let out = l.out(0);
    run_into(l, spec, out)
}

/// Runs a contraction, and puts what it gives there.
pub(super) fn run_into(l: &mut Launch, spec: &str, out: Ptr<u8>) -> Result<(), String> {
    let labels = Contraction::parse(spec)?;
    let groups = Groups::new(&labels, &l.shape(l.op.args[0]), &l.shape(l.op.args[1]));
    if l.len(l.result()) == 0 {
        return Ok(());
    }
    let operands = l.dtype(l.op.args[0]);
    match (operands, labels.wide) {
        (DType::Bf16, false) if groups.rounds_once(&labels, operands) => {
            let [left, n] = [l.op.args[0], l.result()].map(|v| l.len(v));
            let own = own_workspace(&groups, left, l.threads.count());
            // SAFETY: the result in f32 lies behind the rest of the workspace, which is larger only for larger extents.
            let wide: Ptr<f32> = unsafe { Ptr(l.workspace::<u8>().add(own).0.cast()) };
            products::<bf16, f32>(l, &groups, wide);
            l.threads.run(n, 1, |r| {
                // SAFETY: both places hold `n` elements; ranges of threads are apart.
                unsafe { round(DType::Bf16, wide.add(r.start).0, out.add(2 * r.start).0, r.len()) };
            });
        }
        (DType::Bf16, false) => products::<bf16, bf16>(l, &groups, Ptr(out.0.cast())),
        (DType::Bf16, true) => products::<bf16, f32>(l, &groups, Ptr(out.0.cast())),
        _ if groups.is_dot() => {
            let (left, right) = (l.arg(0), l.arg(1));
            reduce::dot(l, left, right, Ptr(out.0.cast()), groups.k.extent);
        }
        _ => products::<f32, f32>(l, &groups, Ptr(out.0.cast())),
    }
    Ok(())
}

/// Runs products of matrices of `T` into a place.
fn products<T: Source, O: Element>(l: &mut Launch, groups: &Groups, out: Ptr<O>) {
    let Groups { loops: batch, m, n, k, sums: more_k } = groups;
    let (left, right): (Ptr<T>, Ptr<T>) = (l.arg(0), l.arg(1));
    if groups.has_few_rows() {
        let part = skinny::Part { n: n.extent, w: (right, n.right), out: (out, m.out) };
        // SAFETY: extents and strides are those of the operands and the result.
        return unsafe { skinny::run(l.threads, (m.extent, k.extent), (left, m.left), &[part], l.workspace()) };
    }
    let loops: usize = batch.iter().map(|x| x.extent).product();
    let sums: usize = more_k.iter().map(|x| x.extent).product();
    let scratch = l.workspace::<u8>();
    let product = |i: usize, threads: Option<&Threads>, scratch: Ptr<u8>| {
        let at = offsets(batch, i);
        for s in 0..sums {
            let sum = offsets(more_k, s);
            // SAFETY: all offsets come from the extents and strides of the operands and the result, which hold their
            // elements; products of different `i` write different elements of the result.
            unsafe {
                let product = Product {
                    threads,
                    size: (m.extent, n.extent, k.extent),
                    left: Matrix { at: left.add(at.left + sum.left), row: m.left, column: k.left },
                    right: Matrix { at: right.add(at.right + sum.right), row: k.right, column: n.right },
                    out: Matrix { at: out.add(at.out), row: m.out, column: n.out },
                    accumulate: s > 0,
                    finish: None,
                    scratch,
                };
                product.run();
            }
        }
    };
    // Decided by the number of products alone, so that results do not depend on the number of threads.
    if loops >= MANY {
        let weight = 2 * m.extent * n.extent * k.extent * sums;
        let (parts, bytes) = (l.threads.count().min(loops), gemm::workspace_alone(groups.most()));
        l.threads.run(parts, loops.div_ceil(parts) * weight, |r| {
            for part in r {
                // SAFETY: the workspace has so many bytes for every thread.
                let scratch = unsafe { scratch.add(part * bytes) };
                (loops * part / parts..loops * (part + 1) / parts).for_each(|i| product(i, None, scratch));
            }
        });
    } else {
        (0..loops).for_each(|i| product(i, Some(l.threads), scratch));
    }
}

/// Joins letters that lie one behind the other in all three tensors.
fn join(letters: Vec<Letter>) -> Vec<Letter> {
    let mut joined: Vec<Letter> = Vec::new();
    for next in letters {
        match joined.last_mut() {
            Some(last)
                if last.left == next.left * next.extent
                    && last.right == next.right * next.extent
                    && last.out == next.out * next.extent =>
            {
                *last = Letter { extent: last.extent * next.extent, ..next };
            }
            _ => joined.push(next),
        }
    }
    joined
}

/// The letter with the largest extent, and the others.
fn largest(mut letters: Vec<Letter>) -> (Letter, Vec<Letter>) {
    let Some(at) = (0..letters.len()).max_by_key(|&i| letters[i].extent) else {
        return (Letter { extent: 1, ..Letter::default() }, letters);
    };
    (letters.remove(at), letters)
}

/// Where product `i` of all loops begins in the three tensors.
fn offsets(loops: &[Letter], i: usize) -> Letter {
    let (mut rest, mut at) = (i, Letter::default());
    for x in loops.iter().rev() {
        let here = rest % x.extent;
        rest /= x.extent;
        at.left += here * x.left;
        at.right += here * x.right;
        at.out += here * x.out;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Workspaces are planned for the largest extents, and where in them things lie is computed for those of a launch.
    #[test]
    fn smaller_products_need_no_more_workspace() {
        let specs = [
            ("btd,vd->btv", "btdv"),
            ("btv,vd->btd", "btvd"),
            ("btv,btd->vd", "btvd"),
            ("bthd,bshd->bhts", "bthds"),
            ("ambn,abc->mnc", "ambnc"),
        ];
        for (spec, letters) in specs {
            let labels = Contraction::parse(spec).expect("it is one");
            let of = |extents: &[usize], dtype: DType| {
                let shape = |side: &[char]| -> Vec<usize> {
                    side.iter().map(|&x| extents[letters.find(x).expect("a letter")]).collect()
                };
                workspace(spec, dtype, &shape(&labels.lhs), &shape(&labels.rhs), 3)
            };
            for largest in [[5, 6, 7, 8, 9], [9, 40, 3, 70, 2], [1, 600, 20, 30, 11]] {
                for dtype in [DType::F32, DType::Bf16] {
                    let planned = of(&largest, dtype);
                    for smaller in 0..3usize.pow(5) {
                        let extent =
                            |i: usize| [1, largest[i].div_ceil(2), largest[i]][smaller / 3usize.pow(i as u32) % 3];
                        let extents = [0, 1, 2, 3, 4].map(extent);
                        let needed = of(&extents, dtype);
                        assert!(
                            needed <= planned,
                            "{spec} of {dtype}, {extents:?} in {largest:?}: {needed} > {planned}"
                        );
                    }
                }
            }
        }
    }

    /// Panels, and sums of a thread and of all, are about as large as the operands and the result.
    #[test]
    fn tiny_products_need_little_workspace() {
        let (threads, floats) = (2, 64 * 64);
        let bytes = workspace("bd,vd->bv", DType::F32, &[64, 64], &[64, 64], threads);
        assert!(bytes <= 4 * floats * size_of::<f32>() * (1 + threads), "{bytes}");
    }
}
