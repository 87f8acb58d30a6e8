//! Log-probabilities of a row of logits, and their gradient: the row is read once from memory, and again from the cache.

use super::lanes::{Kernel, LANES, Lanes, for_vectors, prefetch, widest};

/// Vectors that a loop takes at a time, each with a sum of its own.
const TALL: usize = 4;
/// Elements from what is read to what is asked for, so that memory works while `exp` is computed.
const AHEAD: usize = 2048;

/// What is known of the logits so far: the largest, and sums of `exp` of their distances from it.
#[derive(Clone, Copy)]
struct Running<L> {
    most: L,
    sums: [L; TALL],
}

impl<L: Lanes> Running<L> {
    /// With more logits. Where a larger one turns up, the sums are scaled to it.
    #[inline(always)]
    fn with(self, block: [L; TALL]) -> Running<L> {
        let Running { mut most, mut sums } = self;
        let largest = block[0].at_least(block[1]).at_least(block[2].at_least(block[3]));
        if largest.any_above(most) {
            let new = most.all(largest.largest());
            let factor = (most - new).exp();
            for sum in &mut sums {
                *sum = *sum * factor;
            }
            most = new;
        }
        for (sum, &x) in sums.iter_mut().zip(&block) {
            *sum = *sum + (x - most).exp();
        }
        Running { most, sums }
    }
}

/// The largest logit, and the log of the softmax's divisor beyond it, in one pass. Apart, because their sum would lose the
/// digits in which a likely token differs from the largest.
///
/// # Safety
/// There are `n` logits, and the machine has the instructions of `L`.
#[inline(always)]
unsafe fn divisor<L: Lanes>(row: *const f32, n: usize) -> (f32, f32) {
    // SAFETY: the caller's.
    unsafe {
        // Not minus infinity, from which a logit that is one has no distance.
        let mut all = Running { most: L::splat(f32::MIN), sums: [L::splat(0.0); TALL] };
        let mut i = 0;
        while i + TALL * LANES <= n {
            let at = row.add(i);
            for j in 0..TALL {
                prefetch(at.wrapping_add(AHEAD + j * LANES));
            }
            let block = [L::load(at), L::load(at.add(LANES)), L::load(at.add(2 * LANES)), L::load(at.add(3 * LANES))];
            all = all.with(block);
            i += TALL * LANES;
        }
        // What is not there adds nothing.
        let none = L::splat(f32::NEG_INFINITY);
        for_vectors!((j, len) in n - i => all = all.with([none.take(row.add(i + j), len), none, none, none]));
        let [a, b, c, d] = all.sums;
        (all.most.to_array()[0], ((a + b) + (c + d)).sum().ln())
    }
}

/// Writes `grad * (one at the token - softmax)`.
///
/// # Safety
/// `out` has as many elements as `row`, and is either apart from it or the same; the token is one of them; and the machine
/// has the instructions of `L`.
#[inline(always)]
unsafe fn write_grad<L: Lanes>(
    row: *const f32,
    n: usize,
    token: usize,
    grad: f32,
    (most, beyond): (f32, f32),
    out: *mut f32,
) {
    // SAFETY: the caller's; a vector is loaded before it is stored.
    unsafe {
        let (most, beyond, factor) = (L::splat(most), L::splat(beyond), L::splat(-grad));
        for_vectors!((i, len) in n => (factor * (most.take(row.add(i), len) - most - beyond).exp()).put(out.add(i), len));
        *out.add(token) += grad;
    }
}

struct Logp<'a> {
    row: &'a [f32],
    token: usize,
}

impl Kernel for Logp<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        // SAFETY: a slice is as long as it says.
        let (most, beyond) = unsafe { divisor::<L>(self.row.as_ptr(), self.row.len()) };
        self.row[self.token] - most - beyond
    }
}

/// The log-probability of a token of a row.
pub(super) fn logp_row(row: &[f32], token: usize) -> f32 {
    // SAFETY: the kernel asks for nothing.
    unsafe { widest(Logp { row, token }) }
}

struct LogpGrad {
    row: *const f32,
    n: usize,
    token: usize,
    grad: f32,
    out: *mut f32,
}

impl Kernel for LogpGrad {
    type Output = f32;
    /// # Safety
    /// As for `logp_and_grad_row`.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let LogpGrad { row, n, token, grad, out } = self;
        // SAFETY: the caller's.
        unsafe {
            let (most, beyond) = divisor::<L>(row, n);
            let logp = *row.add(token) - most - beyond;
            if grad == 0.0 {
                // A row that no loss looks at, such as padding; its gradient is 0 whatever the logits are.
                std::slice::from_raw_parts_mut(out, n).fill(0.0);
            } else {
                write_grad::<L>(row, n, token, grad, (most, beyond), out);
            }
            logp
        }
    }
}

/// The log-probability of a token; its gradient, `grad * (one at the token - softmax)`, goes to `out`.
///
/// # Safety
/// `row` and `out` have `n` elements, are apart or the same, and nobody else touches them; the token is one of them.
pub(super) unsafe fn logp_and_grad_row(row: *const f32, n: usize, token: usize, grad: f32, out: *mut f32) -> f32 {
    // SAFETY: the caller's.
    unsafe { widest(LogpGrad { row, n, token, grad, out }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::every;

    /// The log-probability and its gradient in doubles.
    fn exact(row: &[f32], token: usize, grad: f32) -> (f64, Vec<f64>) {
        let most = row.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(f64::from(x)));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - most).exp()).sum();
        let logp = |i: usize| f64::from(row[i]) - most - sum.ln();
        let gradient = |i: usize| f64::from(grad) * (f64::from(u8::from(i == token)) - logp(i).exp());
        (logp(token), (0..row.len()).map(gradient).collect())
    }

    /// A larger logit late in a row, or ever larger ones, scale what was added before.
    #[test]
    fn a_row_gives_its_softmax_wherever_its_largest_logit_is() {
        let wave = |i: usize| 5.0 * ((i * 37 % 101) as f32 / 101.0 - 0.5);
        for n in [1, 15, 16, 17, 64, 65, 200, 1000] {
            let rising: Vec<f32> = (0..n).map(|i| 0.3 * i as f32 - 40.0).collect();
            let falling: Vec<f32> = rising.iter().rev().copied().collect();
            let mut masked: Vec<f32> = (0..n).map(wave).collect();
            masked[..n / 2].fill(f32::NEG_INFINITY);
            let mut late: Vec<f32> = (0..n).map(wave).collect();
            late[n - 1] = 30.0;
            for row in [(0..n).map(wave).collect(), rising, falling, masked, late] {
                let token = n - 1;
                let (logp, gradient) = exact(&row, token, 0.5);
                for found in every(|| Logp { row: &row, token }) {
                    assert!((f64::from(found) - logp).abs() <= 4e-7 * logp.abs().max(1.0), "{found}, expected {logp}");
                }
                let results = every(|| Copied { row: &row, token });
                for (found, out) in results {
                    assert!((f64::from(found) - logp).abs() <= 4e-7 * logp.abs().max(1.0), "{found}, expected {logp}");
                    for (a, b) in out.iter().zip(&gradient) {
                        assert!((f64::from(*a) - b).abs() <= 1e-6 * b.abs() + 1e-7, "{a}, expected {b}");
                    }
                }
            }
        }
    }

    /// The gradient in the place of a copy of the row.
    struct Copied<'a> {
        row: &'a [f32],
        token: usize,
    }

    impl Kernel for Copied<'_> {
        type Output = (f32, Vec<f32>);
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> (f32, Vec<f32>) {
            let mut out = self.row.to_vec();
            let (row, n) = (out.as_ptr(), out.len());
            // SAFETY: the row has so many elements, and the token is one of them.
            let logp = unsafe { LogpGrad { row, n, token: self.token, grad: 0.5, out: out.as_mut_ptr() }.run::<L>() };
            (logp, out)
        }
    }
}
