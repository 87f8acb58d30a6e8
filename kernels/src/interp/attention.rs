//! Attention, its gradient, and attention over a cache, query by query and key by key.

use dsgc_ir::Tensor;
use dsgc_ir::segment::sees;

use super::composite::{Results, sum};
use super::eval::{floats, ints, place, tensor};
use super::real::Real;

/// What all three have in common: which query sees which key, where their rows begin, and their score.
pub(super) struct Heads<'a, F> {
    rows: usize,
    /// Places of queries, and of keys.
    places: [usize; 2],
    /// Heads of queries, and of keys.
    heads: [usize; 2],
    width: usize,
    /// The place among keys of the first query.
    first: usize,
    q: &'a [F],
    k: &'a [F],
    v: &'a [F],
    segment: &'a [i32],
    /// Per head of queries.
    slopes: Option<&'a [F]>,
    causal: bool,
    scale: F,
    window: usize,
}

/// A query: its row of the batch, head, and place among queries.
type Query = (usize, usize, usize);

impl<'a, F: Real> Heads<'a, F> {
    /// For the operands of `attention` or `attention_grad`.
    pub(super) fn new(args: &[&'a Tensor], causal: bool, scale: f64, window: usize) -> Heads<'a, F> {
        let (q, k) = (&args[0].shape, &args[1].shape);
        Heads {
            rows: q[0],
            places: [q[1], k[1]],
            heads: [q[2], k[2]],
            width: q[3],
            first: 0,
            q: floats(args[0]),
            k: floats(args[1]),
            v: floats(args[2]),
            segment: ints(args[3]),
            // The gradient's stand behind both results and their gradient.
            slopes: [4, 7].iter().find(|&&n| args.len() == n + 1).map(|&n| floats(args[n])),
            causal,
            scale: F::of(scale),
            window,
        }
    }

    /// The places of the keys that a query sees: its own text, or from padding all text.
    fn seen(&self, (b, _, i): Query) -> Vec<usize> {
        let t = self.first + i;
        let segment = &self.segment[b * self.places[1]..][..self.places[1]];
        let visible = |s: usize| sees(segment[t], segment[s]);
        let near = |s: usize| self.window == 0 || s.abs_diff(t) < self.window;
        let end = if self.causal { t + 1 } else { self.places[1] };
        (0..end).filter(|&s| visible(s) && near(s)).collect()
    }

    fn queries(&self) -> impl Iterator<Item = Query> + use<F> {
        let (rows, places, heads) = (self.rows, self.places[0], self.heads[0]);
        (0..rows).flat_map(move |b| (0..heads).flat_map(move |h| (0..places).map(move |i| (b, h, i))))
    }

    /// Where the elements of a query lie.
    fn query(&self, (b, h, i): Query) -> usize {
        ((b * self.places[0] + i) * self.heads[0] + h) * self.width
    }

    /// Where those of the key at a place lie: several heads of queries share one of keys.
    fn key(&self, (b, h, _): Query, s: usize) -> usize {
        let head = h / (self.heads[0] / self.heads[1]);
        ((b * self.places[1] + s) * self.heads[1] + head) * self.width
    }

    fn dot(&self, a: &[F], at: usize, b: &[F], bt: usize) -> F {
        sum((0..self.width).map(|i| a[at + i] * b[bt + i]))
    }

    fn score(&self, query: Query, s: usize) -> F {
        let product = self.scale * self.dot(self.q, self.query(query), self.k, self.key(query, s));
        match self.slopes {
            Some(slopes) => product - slopes[query.1] * F::of(s.abs_diff(self.first + query.2) as f64),
            None => product,
        }
    }

    /// The result, and the log of the divisor. Rows that see nothing are 0 in both.
    pub(super) fn forward(&self, args: &[&Tensor]) -> Results {
        let mut out = vec![F::zero(); self.q.len()];
        let mut log_divisor = vec![F::zero(); self.rows * self.heads[0] * self.places[0]];
        for (n, query) in self.queries().enumerate() {
            let (seen, at) = (self.seen(query), self.query(query));
            if seen.is_empty() {
                continue;
            }
            let scores: Vec<F> = seen.iter().map(|&s| self.score(query, s)).collect();
            let most = scores.iter().fold(F::of(f64::NEG_INFINITY), |a, &b| a.larger(b));
            let divisor = sum(scores.iter().map(|&s| (s - most).exp()));
            for (&s, &score) in seen.iter().zip(&scores) {
                let (p, value) = ((score - most).exp() / divisor, self.key(query, s));
                for i in 0..self.width {
                    out[at + i] = out[at + i] + p * self.v[value + i];
                }
            }
            log_divisor[n] = most + divisor.ln();
        }
        Ok(vec![tensor(&args[0].shape, out), tensor(&[self.rows, self.heads[0], self.places[0]], log_divisor)])
    }

    /// `dq, dk, dv` from the result, the log of the divisor and the gradient, with `p = exp(score - log divisor)`:
    /// `dv = p g`, `ds = p (g v - g result)`, `dq = scale ds k`, `dk = scale ds q`.
    pub(super) fn backward(&self, args: &[&Tensor]) -> Results {
        let (out, log_divisor, grad) = (floats::<F>(args[4]), floats::<F>(args[5]), floats::<F>(args[6]));
        let mut dq = vec![F::zero(); self.q.len()];
        let (mut dk, mut dv) = (vec![F::zero(); self.k.len()], vec![F::zero(); self.v.len()]);
        for (n, query) in self.queries().enumerate() {
            let at = self.query(query);
            let delta = self.dot(grad, at, out, at);
            for s in self.seen(query) {
                let key = self.key(query, s);
                let p = (self.score(query, s) - log_divisor[n]).exp();
                let ds = self.scale * p * (self.dot(grad, at, self.v, key) - delta);
                for i in 0..self.width {
                    dv[key + i] = dv[key + i] + p * grad[at + i];
                    dq[at + i] = dq[at + i] + ds * self.k[key + i];
                    dk[key + i] = dk[key + i] + ds * self.q[at + i];
                }
            }
        }
        Ok(vec![tensor(&args[0].shape, dq), tensor(&args[1].shape, dk), tensor(&args[2].shape, dv)])
    }
}

/// `q, k, v, segment, place, slopes or nothing -> result`: causal attention of the columns from `place` on.
pub(super) fn cached<F: Real>(args: &[&Tensor], scale: f64, window: usize) -> Results {
    let first = place(args[4], args[0].shape[1], args[1].shape[1])?;
    let operands = [&args[..4], &args[5..]].concat();
    let heads = Heads::<F> { first, ..Heads::new(&operands, true, scale, window) };
    Ok(heads.forward(args)?.into_iter().take(1).collect())
}
