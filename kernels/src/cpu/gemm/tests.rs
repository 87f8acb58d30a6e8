//! Every tile of this machine against f64: layouts, awkward sizes, threads, what must stay untouched.

use dsgc_ir::fuzz::Rng;
use half::bf16;

use super::*;

/// How a matrix lies: rows, columns, or neither one behind the other.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Rows,
    Columns,
    Apart,
}
use Layout::{Apart, Columns, Rows};

impl Layout {
    /// Strides of rows and columns, and all elements with those between.
    fn strides(self, rows: usize, columns: usize) -> (usize, usize, usize) {
        match self {
            Rows => (columns + 3, 1, rows * (columns + 3)),
            Columns => (1, rows + 5, columns * (rows + 5)),
            Apart => (2 * columns + 1, 2, rows * (2 * columns + 1)),
        }
    }
}

fn matrix<T>(numbers: &mut [T], layout: Layout, rows: usize, columns: usize) -> Matrix<T> {
    let (row, column, _) = layout.strides(rows, columns);
    Matrix { at: Ptr(numbers.as_mut_ptr()), row, column }
}

fn random<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| T::nearest((rng.between(-4096, 4096) as f32) / 1024.0)).collect()
}

/// Which tile it is.
fn named<T>(micro: &Micro<T>) -> String {
    format!("{} x {} of {}", micro.rows, micro.columns, micro.depth)
}

/// A product with everything it needs.
#[derive(Clone, Copy, Debug)]
struct Case {
    size: (usize, usize, usize),
    layouts: (Layout, Layout, Layout),
    accumulate: bool,
}

/// The result's memory after the product on so many threads; none: on this one.
fn run<T: Element, O: Element>(case: Case, micro: &Micro<T>, threads: Option<usize>) -> Vec<O> {
    let (m, n, k) = case.size;
    let (left, right, out) = case.layouts;
    let mut a: Vec<T> = random(left.strides(m, k).2, 1);
    let mut b: Vec<T> = random(right.strides(k, n).2, 2);
    let mut c: Vec<O> = random(out.strides(m, n).2, 3);
    let pool = threads.map(Threads::new);
    let bytes = match threads {
        Some(threads) => workspace(case.size, threads),
        None => workspace_alone(case.size),
    };
    // What is behind the workspace must not change; what is in it may be anything.
    let mut scratch = vec![[0xFFu8; 64]; bytes / 64 + 2];
    scratch[bytes / 64..].fill([0xA5; 64]);
    let at: *mut u8 = scratch.as_mut_ptr().cast();
    let product = Product {
        threads: pool.as_ref(),
        size: case.size,
        left: matrix(&mut a, left, m, k),
        right: matrix(&mut b, right, k, n),
        out: matrix(&mut c, out, m, n),
        accumulate: case.accumulate,
        finish: None,
        scratch: Ptr(unsafe { at.add(at.align_offset(64)) }),
    };
    // SAFETY: all matrices have their elements, and are apart.
    unsafe { product.run_on(micro) };
    assert_eq!(scratch.last(), Some(&[0xA5; 64]), "{case:?}: writes behind the workspace");
    c
}

/// Runs a case on a tile and compares it with f64; gives the largest share of the bound that was used.
fn check<T: Element, O: Element>(case: Case, micro: &Micro<T>, step: f64) -> f64 {
    let (m, n, k) = case.size;
    let (left, right, out) = case.layouts;
    let (a, b): (Vec<T>, Vec<T>) = (random(left.strides(m, k).2, 1), random(right.strides(k, n).2, 2));
    let before: Vec<O> = random(out.strides(m, n).2, 3);
    let after: Vec<O> = run(case, micro, Some(1));
    // A thread alone cuts longer sums than this into shorter chains.
    let alone = if k <= ALONE.k { Some(None) } else { None };
    for threads in [Some(2), Some(3)].into_iter().chain(alone) {
        let same: Vec<O> = run(case, micro, threads);
        let bits = |c: &[O]| c.iter().map(|x| x.wide().to_bits()).collect::<Vec<_>>();
        assert!(bits(&same) == bits(&after), "{case:?}, {}: threads {threads:?} differ", named(micro));
    }
    let wide = |x: &[T], at: usize| f64::from(x[at].wide());
    let (a_at, b_at, c_at) = (left.strides(m, k), right.strides(k, n), out.strides(m, n));
    let (mut untouched, mut worst) = (vec![true; before.len()], 0.0f64);
    for i in 0..m {
        for j in 0..n {
            let terms = (0..k).map(|l| wide(&a, i * a_at.0 + l * a_at.1) * wide(&b, l * b_at.0 + j * b_at.1));
            let (mut sum, mut size) = terms.fold((0.0, 0.0), |(s, z), x| (s + x, z + x.abs()));
            let at = i * c_at.0 + j * c_at.1;
            untouched[at] = false;
            if case.accumulate {
                sum += f64::from(before[at].wide());
                size += f64::from(before[at].wide()).abs();
            }
            let bound = (k + 2) as f64 * 2f64.powi(-24) * size + step * sum.abs();
            let error = (f64::from(after[at].wide()) - sum).abs();
            assert!(error <= bound, "{case:?}, {}, at {i}, {j}: {} for {sum}", named(micro), after[at].wide());
            worst = worst.max(if bound > 0.0 { error / bound } else { 0.0 });
        }
    }
    for (at, _) in untouched.iter().enumerate().filter(|(_, u)| **u) {
        assert_eq!(after[at].wide(), before[at].wide(), "{case:?}, {}: writes between elements", named(micro));
    }
    worst
}

/// All of one pair of types.
fn check_all<T: Element, O: Element>(step: f64) {
    for micro in T::tiles() {
        let mut worst = 0.0f64;
        let sizes = [
            (1, 1, 1),
            (1, 33, 2),
            (37, 1, 7),
            (14, 32, 0),
            (15, 33, 1),
            (29, 65, 9),
            (28, 64, 64),
            (20, 290, 3),
            (290, 9, 5),
            (17, 35, 801),
        ];
        for size in sizes {
            for accumulate in [false, true] {
                for left in [Rows, Columns, Apart] {
                    for right in [Rows, Columns, Apart] {
                        let case = Case { size, layouts: (left, right, Rows), accumulate };
                        worst = worst.max(check::<T, O>(case, &micro, step));
                    }
                }
                for out in [Columns, Apart] {
                    worst = worst.max(check::<T, O>(
                        Case { size, layouts: (Rows, Columns, out), accumulate },
                        &micro,
                        step,
                    ));
                }
            }
        }
        assert!(worst > 0.0, "{}: sums of random numbers are never all exact", named(&micro));
    }
}

#[test]
fn products_of_f32_are_near_those_of_f64() {
    check_all::<f32, f32>(0.0);
}

#[test]
fn products_of_bf16_are_near_those_of_f64() {
    check_all::<bf16, f32>(0.0);
}

#[test]
fn results_in_bf16_are_rounded_once() {
    check_all::<bf16, bf16>(2f64.powi(-8));
}

/// In the result, in the workspace as a whole, and in parts.
#[test]
fn sums_longer_than_a_chain_go_on() {
    let case = |m, n, out| Case { size: (m, n, TEAM.k + 3), layouts: (Rows, Columns, out), accumulate: true };
    for micro in f32::tiles() {
        check::<f32, f32>(case(3, 5, Rows), &micro, 0.0);
        check::<f32, f32>(case(3, 5, Apart), &micro, 0.0);
    }
    for micro in bf16::tiles() {
        check::<bf16, f32>(case(3, 5, Rows), &micro, 0.0);
    }
    check::<f32, f32>(case(33, 40, Apart), &f32::tiles()[0], 0.0);
}

#[test]
fn lanes_beyond_a_block_of_the_shared_operand_go_on() {
    let n = TEAM.lanes + 100;
    let case = Case { size: (2 * n, n, 2), layouts: (Rows, Rows, Rows), accumulate: true };
    check::<f32, f32>(case, &f32::tiles()[0], 0.0);
    check::<bf16, bf16>(case, &bf16::tiles()[0], 2f64.powi(-8));
}

/// Denormal numbers may count as zero, infinities and NaN may not.
#[test]
fn special_numbers_of_bf16() {
    let tiny = bf16::from_bits(1);
    for micro in bf16::tiles() {
        for (special, other, expected) in [
            (bf16::INFINITY, bf16::ONE, f32::INFINITY),
            (bf16::NEG_INFINITY, bf16::ONE, f32::NEG_INFINITY),
            (bf16::NAN, bf16::ONE, f32::NAN),
            (bf16::INFINITY, bf16::ZERO, f32::NAN),
            (tiny, bf16::ONE, 0.0),
            (bf16::MAX, bf16::MAX, f32::INFINITY),
        ] {
            let (mut a, mut b, mut c) = ([bf16::ZERO; 5], [bf16::ONE; 5], [7.0f32]);
            (a[3], b[3]) = (special, other);
            let mut scratch = vec![[0u8; 64]; workspace_alone((1, 1, 5)) / 64 + 1];
            let at: *mut u8 = scratch.as_mut_ptr().cast();
            let matrix = |at: *mut bf16, row, column| Matrix { at: Ptr(at), row, column };
            let product = Product {
                threads: None,
                size: (1, 1, 5),
                left: matrix(a.as_mut_ptr(), 5, 1),
                right: matrix(b.as_mut_ptr(), 1, 1),
                out: Matrix { at: Ptr(c.as_mut_ptr()), row: 1, column: 1 },
                accumulate: false,
                finish: None,
                scratch: Ptr(unsafe { at.add(at.align_offset(64)) }),
            };
            // SAFETY: all matrices have their elements.
            unsafe { product.run_on(&micro) };
            let near = c[0] == expected || (c[0] - expected).abs() <= tiny.to_f32();
            assert!(near || (c[0].is_nan() && expected.is_nan()), "{}: {special} * {other} is {}", named(&micro), c[0]);
        }
    }
}

/// Sums of a product, taken block by block from the result or from apart, are those that it has without.
fn check_finished<T: Element>(size: (usize, usize, usize), micro: &Micro<T>) {
    let (m, n, k) = size;
    let (mut a, mut b): (Vec<T>, Vec<T>) = (random(m * k, 1), random(k * n, 2));
    let mut whole = Vec::new();
    for (threads, apart) in [(1, None), (1, Some(false)), (2, Some(false)), (3, Some(true)), (1, Some(true))] {
        let (mut c, mut taken) = (vec![0.0f32; m * n], vec![0.0f32; m * n]);
        let mut scratch = vec![[0xFFu8; 64]; workspace(size, threads) / 64 + 2];
        let at: *mut u8 = scratch.as_mut_ptr().cast();
        let to = Ptr(taken.as_mut_ptr());
        let take = |thread: usize, sums: Ptr<f32>, stride: usize, rows: Range<usize>, columns: Range<usize>| {
            assert!(thread < threads);
            for row in rows.clone() {
                for column in columns.clone() {
                    // SAFETY: blocks of the result are apart; a second time would be seen.
                    unsafe {
                        let sum = *sums.add((row - rows.start) * stride + column - columns.start).0;
                        *to.add(row * n + column).0 += sum;
                    }
                }
            }
        };
        let pool = Threads::new(threads);
        let product = Product {
            threads: Some(&pool),
            size,
            left: Matrix { at: Ptr(a.as_mut_ptr()), row: k, column: 1 },
            right: Matrix { at: Ptr(b.as_mut_ptr()), row: 1, column: k },
            out: Matrix { at: Ptr(c.as_mut_ptr()), row: n, column: 1 },
            accumulate: false,
            finish: apart.map(|apart| Finish { run: &take, apart }),
            scratch: Ptr(unsafe { at.add(at.align_offset(64)) }),
        };
        // SAFETY: all matrices have their elements, and are apart.
        unsafe { product.run_on(micro) };
        match apart {
            None => whole = c,
            Some(apart) => {
                assert!(taken == whole, "{size:?}, {}: {threads} threads, apart {apart}", named(micro));
                assert!(!apart || c.iter().all(|&x| x == 0.0), "{size:?}, {}: a sum is in the result", named(micro));
            }
        }
    }
}

#[test]
fn sums_are_finished_once() {
    for size in [(1, 1, 1), (5, 7, 0), (33, 5, 800), (5, 300, 800), (300, 70, 40), (40, 700, 3300)] {
        f32::tiles().iter().for_each(|micro| check_finished(size, micro));
        bf16::tiles().iter().for_each(|micro| check_finished(size, micro));
    }
}
