//! The optimizer, and random numbers.

use dsgc_ir::Op;
use multiversion::multiversion;

use super::Launch;
use super::memory::Ptr;
use crate::random::{self, Key};

/// Elements that are loaded before any result is stored: results lie where operands do.
const BLOCK: usize = 32;

/// Factors of AdamW that are the same for all elements.
#[derive(Clone, Copy)]
struct Factors {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    eps: f32,
    /// On the gradient.
    clip: f32,
    /// On the parameter: `1 - lr * decay`.
    keep: f32,
    /// `lr / (1 - beta1^t)`.
    step: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root: f32,
}

#[inline(always)]
fn element(f: Factors, p: f32, g: f32, m: f32, v: f32) -> (f32, f32, f32) {
    let g = g * f.clip;
    let m = f.beta1 * m + f.rest1 * g;
    let v = f.beta2 * v + f.rest2 * g * g;
    (p * f.keep - f.step * m / (v.sqrt() * f.root + f.eps), m, v)
}

/// # Safety
/// All pointers have `n` elements; a result is apart from all operands or the same as one.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
unsafe fn adamw_part(f: Factors, given: [*const f32; 4], made: [*mut f32; 3], n: usize) {
    let mut i = 0;
    while i + BLOCK <= n {
        // SAFETY: the caller's promise; all operands are loaded before any result is stored.
        unsafe {
            let load = |x: *const f32| x.add(i).cast::<[f32; BLOCK]>().read_unaligned();
            let (p, g, m, v) = (load(given[0]), load(given[1]), load(given[2]), load(given[3]));
            let (mut np, mut nm, mut nv) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
            for j in 0..BLOCK {
                (np[j], nm[j], nv[j]) = element(f, p[j], g[j], m[j], v[j]);
            }
            for (to, block) in made.into_iter().zip([np, nm, nv]) {
                to.add(i).cast::<[f32; BLOCK]>().write_unaligned(block);
            }
        }
        i += BLOCK;
    }
    while i < n {
        // SAFETY: as above.
        unsafe {
            let load = |x: *const f32| x.add(i).read();
            let (p, m, v) = element(f, load(given[0]), load(given[1]), load(given[2]), load(given[3]));
            for (to, x) in made.into_iter().zip([p, m, v]) {
                to.add(i).write(x);
            }
        }
        i += 1;
    }
}

/// A parameter of several whose elements lie one after the other in thought.
struct Part {
    /// Its first element there.
    first: usize,
    /// Parameter, gradient, moments.
    given: [Ptr<f32>; 4],
    /// Parameter, moments.
    made: [Ptr<f32>; 3],
}

/// Runs `adamw`.
pub(super) fn adamw(l: &mut Launch) {
    let Op::Adamw { beta1, beta2, eps, decay } = l.op.op else { panic!("bug: `{}` is no adamw", l.op.op) };
    let tensors = l.op.args.len() / 4;
    let (lr, t, clip): (Ptr<f32>, Ptr<i32>, Ptr<f32>) =
        (l.arg(4 * tensors), l.arg(4 * tensors + 1), l.arg(4 * tensors + 2));
    // SAFETY: these operands are scalars.
    let (lr, t, clip) = unsafe { (f64::from(*lr.0), f64::from(*t.0), *clip.0) };
    let factors = Factors {
        beta1: beta1 as f32,
        rest1: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        rest2: (1.0 - beta2) as f32,
        eps: eps as f32,
        clip,
        keep: (1.0 - lr * decay) as f32,
        step: (lr / (1.0 - beta1.powf(t))) as f32,
        root: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
    };
    let mut all: Vec<Part> = Vec::with_capacity(tensors);
    let mut total = 0;
    for i in 0..tensors {
        let given = [0, 1, 2, 3].map(|j| l.arg(4 * i + j));
        all.push(Part { first: total, given, made: [0, 1, 2].map(|j| l.out(3 * i + j)) });
        total += l.len(l.op.args[4 * i]);
    }
    l.threads.run(total, 4, |r| {
        let ends = all[1..].iter().map(|part| part.first).chain([total]);
        for (&Part { first, given, made }, end) in all.iter().zip(ends) {
            let (from, to) = (r.start.max(first), r.end.min(end));
            if from < to {
                let at = from - first;
                // SAFETY: the buffers of a parameter hold all its elements; ranges of threads are apart.
                unsafe {
                    adamw_part(factors, given.map(|x| x.add(at).0.cast_const()), made.map(|x| x.add(at).0), to - from);
                }
            }
        }
    });
}

/// Runs `fold`, `random_normal`, `random_uniform` and `row_uniform`.
pub(super) fn random(l: &mut Launch) {
    let shape = l.shape(l.result());
    let n: usize = shape.iter().product();
    let inner: usize = shape.iter().skip(1).product();
    let keys: Ptr<Key> = l.arg(0);
    match l.op.op {
        Op::Fold { data } => {
            let out: Ptr<Key> = l.out(0);
            // SAFETY: operand and result hold `n` keys.
            (0..n).for_each(|i| unsafe { *out.add(i).0 = random::fold(*keys.add(i).0, data) });
        }
        Op::RandomNormal { mean, std, .. } => {
            fill(l, n, |key, i| random::normal(random::words(key, i, inner), mean, std) as f32)
        }
        Op::RandomUniform { low, high, .. } => {
            fill(l, n, |key, i| random::uniform_f32(random::words(key, i, inner), low, high));
        }
        Op::RowUniform { .. } => {
            let rows: Ptr<i32> = l.arg(1);
            fill(l, n, |key, i| {
                // SAFETY: the operand has a number for each of the `n / inner` rows.
                let row = unsafe { *rows.add(i / inner).0 };
                random::uniform_f32(random::row_words(key, row, i % inner), 0.0, 1.0)
            });
        }
        ref other => panic!("bug: `{other}` draws no numbers"),
    }
}

fn fill(l: &mut Launch, n: usize, number: impl Fn(Key, usize) -> f32 + Sync) {
    let (key, out): (Ptr<Key>, Ptr<f32>) = (l.arg(0), l.out(0));
    // SAFETY: the key is a scalar.
    let key = unsafe { *key.0 };
    l.threads.run(n, 32, |r| {
        for i in r {
            // SAFETY: element `i` belongs to this thread.
            unsafe { *out.add(i).0 = number(key, i) };
        }
    });
}
