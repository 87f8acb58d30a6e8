//! Every kind of registers beside plain loops in doubles: shapes with partial blocks and vectors, masks, ALiBi and groups.

use half::bf16;

use super::super::lanes::Kind;
use super::backward::{self, Backward, Operands};
use super::forward::{self, Forward};
use super::*;

const ROWS: usize = 2;
const PLACES: usize = 150;
const HEADS: usize = 4;
const GROUPS: usize = 2;
const WIDTH: usize = 24;
const SCALE: f32 = 0.3;

fn floats(n: usize, seed: usize) -> Vec<f32> {
    // Numbers that bf16 has too.
    (0..n).map(|i| ((i * 37 + seed * 11) % 61) as f32 / 32.0 - 1.0).collect()
}

trait FromFloat: Element {
    fn of(x: f32) -> Self;
    fn float(self) -> f64;
}

impl FromFloat for f32 {
    fn of(x: f32) -> f32 {
        x
    }
    fn float(self) -> f64 {
        f64::from(self)
    }
}

impl FromFloat for bf16 {
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn float(self) -> f64 {
        f64::from(self.to_f32())
    }
}

/// Results of one kind of registers: outputs, logs of divisors, gradients of queries, keys and values.
fn run<E: FromFloat>(kind: Kind, causal: bool, window: usize, slopes: &[f32], segments: &[i32]) -> [Vec<f64>; 5] {
    let (n, m) = (ROWS * PLACES * HEADS * WIDTH, ROWS * PLACES * GROUPS * WIDTH);
    let of = |n: usize, seed: usize| -> Vec<E> { floats(n, seed).into_iter().map(E::of).collect() };
    let (mut q, mut k, mut v, mut grad) = (of(n, 1), of(m, 2), of(m, 3), of(n, 4));
    let (mut out, mut dq, mut dk, mut dv) = (of(n, 5), of(n, 6), of(m, 7), of(m, 8));
    let (mut segments, mut slopes) = (segments.to_vec(), slopes.to_vec());
    let mut divisors = vec![0.0f32; ROWS * HEADS * PLACES];
    let heads = Heads {
        rows: ROWS,
        queries: PLACES,
        columns: PLACES,
        first: 0,
        heads: HEADS,
        groups: GROUPS,
        width: WIDTH,
        causal,
        scale: SCALE,
        window,
        q: Ptr(q.as_mut_ptr()),
        k: Ptr(k.as_mut_ptr()),
        v: Ptr(v.as_mut_ptr()),
        segments: Ptr(segments.as_mut_ptr()),
        slopes: (!slopes.is_empty()).then_some(Ptr(slopes.as_mut_ptr())),
        kind,
    };
    let (shape, shape_k) = ([ROWS, PLACES, HEADS, WIDTH], [ROWS, PLACES, GROUPS, WIDTH]);
    let bytes = forward::workspace(PLACES, WIDTH, 1).max(backward::workspace(&shape, &shape_k, 1));
    let mut work = vec![f32::NAN; bytes / 4];
    let work = Ptr(work.as_mut_ptr());
    let (result, logs) = (Ptr(out.as_mut_ptr()), Ptr(divisors.as_mut_ptr()));
    let operands = Operands {
        out: result,
        divisors: logs,
        grad: Ptr(grad.as_mut_ptr()),
        dq: Ptr(dq.as_mut_ptr()),
        dk: Ptr(dk.as_mut_ptr()),
        dv: Ptr(dv.as_mut_ptr()),
    };
    for row in 0..ROWS {
        for head in 0..HEADS {
            // One block alone, and two together.
            for blocks in [0..1, 1..PLACES.div_ceil(BLOCK)] {
                let task = Forward { heads: &heads, row, head, blocks, out: result, divisors: Some(logs), work };
                // SAFETY: all vectors are as long as the shapes say.
                unsafe { kind.run(task) };
            }
        }
        for group in 0..GROUPS {
            // SAFETY: as above.
            unsafe { kind.run(Backward { heads: &heads, row, group, operands, work }) };
        }
    }
    let wide = |all: Vec<E>| all.into_iter().map(E::float).collect();
    [wide(out), divisors.into_iter().map(f64::from).collect(), wide(dq), wide(dk), wide(dv)]
}

/// The same by the formulas.
fn expected(causal: bool, window: usize, slopes: &[f32], segments: &[i32]) -> [Vec<f64>; 5] {
    let (n, m) = (ROWS * PLACES * HEADS * WIDTH, ROWS * PLACES * GROUPS * WIDTH);
    let of = |n: usize, seed: usize| -> Vec<f64> { floats(n, seed).into_iter().map(f64::from).collect() };
    let (q, k, v, grad) = (of(n, 1), of(m, 2), of(m, 3), of(n, 4));
    let (mut out, mut logs) = (vec![0.0; n], vec![0.0; ROWS * HEADS * PLACES]);
    let (mut dq, mut dk, mut dv) = (vec![0.0; n], vec![0.0; m], vec![0.0; m]);
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let add = |out: &mut [f64], factor: f64, x: &[f64]| out.iter_mut().zip(x).for_each(|(o, x)| *o += factor * x);
    let scale = f64::from(SCALE);
    for (row, head, t) in (0..ROWS * HEADS * PLACES).map(|i| (i / PLACES / HEADS, i / PLACES % HEADS, i % PLACES)) {
        let of_query =
            |t: usize| ((row * PLACES + t) * HEADS + head) * WIDTH..((row * PLACES + t) * HEADS + head + 1) * WIDTH;
        let group = head / (HEADS / GROUPS);
        let of_key =
            |s: usize| ((row * PLACES + s) * GROUPS + group) * WIDTH..((row * PLACES + s) * GROUPS + group + 1) * WIDTH;
        let seen: Vec<usize> = (0..PLACES)
            .filter(|&s| segment::sees(segments[row * PLACES + t], segments[row * PLACES + s]))
            .filter(|&s| (!causal || s <= t) && (window == 0 || s.abs_diff(t) < window))
            .collect();
        let slope = slopes.get(head).map_or(0.0, |&slope| f64::from(slope));
        let score = |s: usize| scale * dot(&q[of_query(t)], &k[of_key(s)]) - slope * s.abs_diff(t) as f64;
        let sum: f64 = seen.iter().map(|&s| score(s).exp()).sum();
        logs[(row * HEADS + head) * PLACES + t] = if seen.is_empty() { 0.0 } else { sum.ln() };
        for &s in &seen {
            add(&mut out[of_query(t)], score(s).exp() / sum, &v[of_key(s)]);
        }
        let delta = dot(&grad[of_query(t)], &out[of_query(t)]);
        for &s in &seen {
            let p = score(s).exp() / sum;
            let ds = scale * p * (dot(&grad[of_query(t)], &v[of_key(s)]) - delta);
            add(&mut dq[of_query(t)], ds, &k[of_key(s)]);
            add(&mut dk[of_key(s)], ds, &q[of_query(t)]);
            add(&mut dv[of_key(s)], p, &grad[of_query(t)]);
        }
    }
    [out, logs, dq, dk, dv]
}

fn assert_near(found: &[Vec<f64>; 5], expected: &[Vec<f64>; 5], tolerance: f64, what: &str) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (at, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{what}: {at} of result {i} is {a}, expected {b}");
        }
    }
}

#[test]
fn every_kind_of_registers_gives_attention_and_its_gradient() {
    let whole = vec![1; ROWS * PLACES];
    let packed: Vec<i32> =
        (0..ROWS * PLACES).map(|i| if i % PLACES < 9 { 0 } else { 1 + (i % PLACES / 47) as i32 }).collect();
    for (causal, window, slopes, segments) in
        [(true, 0, vec![], &whole), (true, 70, vec![0.5, 0.25, 0.125, 0.0625], &packed), (false, 90, vec![], &packed)]
    {
        let expected = expected(causal, window, &slopes, segments);
        for kind in Kind::all() {
            let what = format!("{kind:?} causal={causal} window={window}");
            assert_near(&run::<f32>(kind, causal, window, &slopes, segments), &expected, 2e-5, &what);
            // The result is rounded before its gradient is taken, and each gradient once more.
            assert_near(
                &run::<bf16>(kind, causal, window, &slopes, segments),
                &expected,
                1.2e-2,
                &format!("{what} bf16"),
            );
        }
    }
}
