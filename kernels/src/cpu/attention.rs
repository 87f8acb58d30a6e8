//! Attention and its gradient in blocks of queries and keys (Dao et al. 2022): scores of a block live in the cache only.
//!
//! The forward pass keeps the largest score and the divisor of each query so far and corrects the result when a later
//! block has a larger one. The gradient computes the scores again from the stored log of the divisor. Blocks of which
//! nothing is seen (later ones, outside of the window, other texts, padding) are left out, and of a block that is seen
//! in part as many keys as no query of [`LANES`] sees. Scores lie with the keys in rows, so that the queries of a row are
//! the lanes of vectors.
//!
//! A key that a query does not see gives it nothing, whatever its values are: where they may be no numbers, products
//! leave it out, since 0 times infinity is not 0.

mod scores;

use super::Launch;
use super::memory::Ptr;
use super::small::{LANES, Product};
use scores::{BLOCK, Group, Running, all_finite, dot, gradients, soften, transpose};

/// Bytes that all threads need at once, for heads so wide.
pub(super) fn workspace(width: usize, gradient: bool, threads: usize) -> usize {
    threads.max(1) * per_thread(width, gradient) * size_of::<f32>()
}

/// Elements that a thread needs: queries in columns and scores; the same of gradients.
fn per_thread(width: usize, gradient: bool) -> usize {
    (width + BLOCK) * BLOCK * if gradient { 2 } else { 1 }
}

/// Extents, settings and operands of one launch.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub rows: usize,
    /// Places of queries in a row.
    pub queries: usize,
    /// Places of keys in a row.
    pub columns: usize,
    /// The place among keys of the first query.
    pub first: usize,
    /// Heads of queries, and of keys.
    pub heads: usize,
    pub groups: usize,
    pub width: usize,
    pub causal: bool,
    pub scale: f32,
    /// 0 for none.
    pub window: usize,
    pub q: Ptr<f32>,
    pub k: Ptr<f32>,
    pub v: Ptr<f32>,
    pub segments: Ptr<i32>,
    pub slopes: Option<Ptr<f32>>,
}

/// Up to [`BLOCK`] places.
#[derive(Clone, Copy)]
struct Block {
    from: usize,
    count: usize,
}

impl Block {
    /// The block with this number among so many places.
    fn nth(number: usize, places: usize) -> Block {
        Block { from: number * BLOCK, count: BLOCK.min(places - number * BLOCK) }
    }
}

/// Queries and keys of two blocks that may see each other: per [`LANES`] queries a range of keys.
struct Sight {
    keys: [(usize, usize); BLOCK / LANES],
    /// Whether some of the range is hidden from some of the queries.
    masked: [bool; BLOCK / LANES],
}

impl Sight {
    /// Ranges of queries (in whole vectors) with the range of keys that is the same for all of them.
    fn parts(&self) -> impl Iterator<Item = (usize, usize, usize, usize)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < self.keys.len() {
                let (begin, keys) = (at, self.keys[at]);
                while at < self.keys.len() && self.keys[at] == keys {
                    at += 1;
                }
                if keys.0 < keys.1 {
                    return Some((begin * LANES, at * LANES, keys.0, keys.1));
                }
            }
            None
        })
    }
}

/// Smallest and largest.
fn range(segments: &[i32]) -> (i32, i32) {
    segments.iter().fold((i32::MAX, i32::MIN), |(low, high), &s| (low.min(s), high.max(s)))
}

impl Heads {
    /// For the operands of `attention` or `attention_grad`, of which slopes would be number `slopes`.
    pub(super) fn new(l: &mut Launch, slopes: usize, causal: bool, scale: f64, window: usize) -> Heads {
        let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
        Heads {
            rows: q[0],
            queries: q[1],
            columns: k[1],
            first: 0,
            heads: q[2],
            groups: k[2],
            width: q[3],
            causal,
            scale: scale as f32,
            window,
            q: l.arg(0),
            k: l.arg(1),
            v: l.arg(2),
            segments: l.arg(3),
            slopes: (l.op.args.len() > slopes).then(|| l.arg(slopes)),
        }
    }

    /// Whether there is nothing to compute.
    pub(super) fn is_empty(&self) -> bool {
        self.rows * self.queries * self.heads * self.width == 0
    }

    /// Elements from one place of queries to the next.
    pub(super) fn q_stride(&self) -> usize {
        self.heads * self.width
    }

    /// Elements from one place of keys to the next.
    pub(super) fn k_stride(&self) -> usize {
        self.groups * self.width
    }

    /// Where the first query of a block lies.
    fn q_at(&self, row: usize, head: usize, place: usize) -> usize {
        (row * self.queries + place) * self.q_stride() + head * self.width
    }

    /// Where a key that a head of queries uses lies.
    fn k_at(&self, row: usize, head: usize, place: usize) -> usize {
        (row * self.columns + place) * self.k_stride() + head / (self.heads / self.groups) * self.width
    }

    /// Segments of a row's keys.
    ///
    /// # Safety
    /// The row is one of the batch.
    pub(super) unsafe fn segments_of<'a>(&self, row: usize) -> &'a [i32] {
        // SAFETY: the caller's; nobody writes segments meanwhile.
        unsafe { self.segments.slice(row * self.columns, self.columns) }
    }

    /// How much less a score is per place of distance.
    ///
    /// # Safety
    /// The head is one of the queries'.
    pub(super) unsafe fn slope(&self, head: usize) -> f32 {
        // SAFETY: the caller's.
        self.slopes.map_or(0.0, |slopes| unsafe { *slopes.add(head).0 })
    }

    /// Blocks of keys that a block of queries may see by their places.
    fn key_blocks(&self, queries: Block) -> std::ops::Range<usize> {
        let (begin, end) = (self.first + queries.from, self.first + queries.from + queries.count);
        let far = if self.window == 0 { usize::MAX } else { self.window - 1 };
        let from = begin.saturating_sub(far);
        let to = if self.causal { end } else { end.saturating_add(far) }.min(self.columns);
        from / BLOCK..to.div_ceil(BLOCK)
    }

    /// What of a block of keys is seen; nothing if there is no such key.
    fn sight(&self, segments: &[i32], queries: Block, keys: Block) -> Option<Sight> {
        let place = self.first + queries.from;
        let (low, high) = range(&segments[keys.from..keys.from + keys.count]);
        let (least, most) = range(&segments[place..place + queries.count]);
        if (low, high) == (0, 0) || least > 0 && (high < least || low > most) {
            return None;
        }
        let same_text = low == high && least == most && (least == low || least == 0);
        let mut sight = Sight { keys: Default::default(), masked: Default::default() };
        for (g, (range, masked)) in sight.keys.iter_mut().zip(&mut sight.masked).enumerate() {
            if g * LANES >= queries.count {
                break;
            }
            // Places of the first and last query, counted from the first key.
            let begin = (place + g * LANES) as isize - keys.from as isize;
            let end = begin + LANES.min(queries.count - g * LANES) as isize - 1;
            let far = if self.window == 0 {
                (self.first + self.queries + self.columns) as isize
            } else {
                self.window as isize - 1
            };
            let after = if self.causal { 0 } else { far };
            let (from, to) = ((begin - far).max(0), (end + after + 1).min(keys.count as isize));
            if from < to {
                *range = (from as usize, to as usize);
                *masked = !same_text || end - far > from || begin + after + 1 < to;
            }
        }
        sight.keys.iter().any(|(from, to)| from < to).then_some(sight)
    }

    /// The queries with number `g` among the vectors of a block, and the keys that `sight` gives them.
    fn group<'a>(
        &self,
        segments: &'a [i32],
        queries: Block,
        keys: Block,
        sight: &Sight,
        g: usize,
        slope: f32,
    ) -> Group<'a> {
        let ((from, to), place) = (sight.keys[g], self.first + queries.from + g * LANES);
        let mut own = [0; LANES];
        let count = LANES.min(queries.count - g * LANES);
        own[..count].copy_from_slice(&segments[place..place + count]);
        Group {
            own,
            distance: place as i32 - (keys.from + from) as i32,
            segments: &segments[keys.from + from..keys.from + to],
            masked: sight.masked[g],
            causal: self.causal,
            window: self.window.min(i32::MAX as usize) as i32,
            slope,
        }
    }

    /// Whether a query sees a key, both by their places among keys.
    fn sees(&self, segments: &[i32], t: usize, s: usize) -> bool {
        (segments[s] != 0 && (segments[s] == segments[t] || segments[t] == 0))
            && (!self.causal || s <= t)
            && (self.window == 0 || s.abs_diff(t) < self.window)
    }

    /// The pairs of a query and a key that see each other, counted from the blocks' first.
    fn pairs<'a>(
        &'a self,
        segments: &'a [i32],
        queries: Block,
        keys: Block,
    ) -> impl Iterator<Item = (usize, usize)> + 'a {
        let place = self.first + queries.from;
        (0..queries.count)
            .flat_map(move |i| (0..keys.count).map(move |s| (i, s)))
            .filter(move |&(i, s)| self.sees(segments, place + i, keys.from + s))
    }

    /// Runs `task(number, thread)` for so many tasks, each thread a range of them.
    pub(super) fn run(&self, l: &Launch, tasks: usize, work: impl Fn(usize, usize) + Sync) {
        let weight = 4 * self.rows * self.queries * self.columns * self.heads * self.width;
        // A thread needs a workspace of its own, and the range of its tasks tells it which.
        let parts = l.threads.count().min(tasks.max(1));
        l.threads.run(parts, weight / parts, |range| {
            for part in range {
                for task in tasks * part / parts..tasks * (part + 1) / parts {
                    work(task, part);
                }
            }
        });
    }

    /// The result for all queries of [`BLOCK`] or fewer at a time, and the logs of their divisors.
    pub(super) fn forward(&self, l: &mut Launch, divisors: Option<Ptr<f32>>) {
        let (out, scratch): (Ptr<f32>, Ptr<f32>) = (l.out(0), l.workspace());
        let blocks = self.queries.div_ceil(BLOCK);
        self.run(l, self.rows * self.heads * blocks, |task, thread| {
            let (row, head) = (task / blocks / self.heads, task / blocks % self.heads);
            let queries = Block::nth(task % blocks, self.queries);
            // SAFETY: offsets come from the shapes of the operands; a task writes the results of its own queries, and
            // uses the workspace of its own thread.
            unsafe {
                let work = scratch.add(thread * per_thread(self.width, false));
                let done = self.attend(row, head, queries, out, work);
                if let Some(divisors) = divisors {
                    let at = (row * self.heads + head) * self.queries + queries.from;
                    divisors.slice_mut(at, queries.count).copy_from_slice(&done[..queries.count]);
                }
            }
        });
    }

    /// The result of a block of queries; gives the logs of the divisors.
    ///
    /// # Safety
    /// The block is one of the head's queries; nobody else uses their result or the workspace of `per_thread`.
    unsafe fn attend(&self, row: usize, head: usize, queries: Block, out: Ptr<f32>, work: Ptr<f32>) -> [f32; BLOCK] {
        let (qs, ks, width) = (self.q_stride(), self.k_stride(), self.width);
        // SAFETY: the caller's, and the shapes of the operands.
        unsafe {
            let (segments, slope) = (self.segments_of(row), self.slope(head));
            let at = self.q_at(row, head, queries.from);
            let (by_column, scores) = (work, work.add(width * BLOCK));
            transpose(self.q.add(at), qs, queries.count, width, self.scale, by_column);
            let out = out.add(at);
            for i in 0..queries.count {
                out.slice_mut(i * qs, width).fill(0.0);
            }
            let mut running = [Running::default(); BLOCK / LANES];
            for number in self.key_blocks(queries) {
                let keys = Block::nth(number, self.columns);
                let Some(sight) = self.sight(segments, queries, keys) else { continue };
                let at = self.k_at(row, head, keys.from);
                let (key, value) = (self.k.add(at), self.v.add(at));
                for (i, end, from, to) in sight.parts() {
                    score((i, end, from, to), width, by_column, (key, ks), scores);
                }
                for (g, running) in running.iter_mut().enumerate() {
                    let (from, to) = sight.keys[g];
                    if from < to {
                        let group = self.group(segments, queries, keys, &sight, g, slope);
                        let factor =
                            soften(&group, scores.slice_mut(from * BLOCK + g * LANES, reach(to - from)), running);
                        for (i, &factor) in (g * LANES..queries.count).zip(&factor).filter(|(_, f)| **f != 1.0) {
                            out.slice_mut(i * qs, width).iter_mut().for_each(|x| *x *= factor);
                        }
                    }
                }
                if sight.masked.contains(&true) && !all_finite(value, ks, keys.count, width) {
                    for (i, s) in self.pairs(segments, queries, keys) {
                        add(out.slice_mut(i * qs, width), *scores.add(s * BLOCK + i).0, value.slice(s * ks, width));
                    }
                    continue;
                }
                for (i, end, from, to) in sight.parts() {
                    let size = (end.min(queries.count) - i, width, to - from);
                    let (p, value) = ((scores.add(from * BLOCK + i), 1, BLOCK), (value.add(from * ks), ks));
                    Product { size, out: (out.add(i * qs), qs), add: true, a: p, b: value }.run();
                }
            }
            let mut divisors = [0.0; BLOCK];
            for (i, divisor) in divisors[..queries.count].iter_mut().enumerate() {
                let (most, sum) = running[i / LANES].of(i % LANES);
                let t = self.first + queries.from + i;
                let line = out.slice_mut(i * qs, width);
                if sum == 0.0 {
                    // Nothing is seen, or what is seen has no softmax.
                    let seen = (0..self.columns).any(|s| self.sees(segments, t, s));
                    *divisor = if seen { f32::NAN } else { 0.0 };
                    line.fill(*divisor);
                } else {
                    *divisor = most + sum.ln();
                    let inverse = 1.0 / sum;
                    line.iter_mut().for_each(|x| *x *= inverse);
                }
            }
            divisors
        }
    }
}

/// Elements from the first lane of the first of so many rows of scores to the last of the last.
fn reach(rows: usize) -> usize {
    (rows - 1) * BLOCK + LANES
}

/// Scores of queries `i..end` (in columns) with keys `from..to` of a block.
///
/// # Safety
/// They are of the block, and the scores are the caller's.
unsafe fn score(
    (i, end, from, to): (usize, usize, usize, usize),
    width: usize,
    by_column: Ptr<f32>,
    (key, stride): (Ptr<f32>, usize),
    scores: Ptr<f32>,
) {
    // SAFETY: the caller's.
    unsafe {
        let out = (scores.add(from * BLOCK + i), BLOCK);
        let (a, b) = ((key.add(from * stride), stride, 1), (by_column.add(i), BLOCK));
        Product { size: (to - from, end - i, width), out, add: false, a, b }.run();
    }
}

/// `out += factor * x`.
fn add(out: &mut [f32], factor: f32, x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x);
}

/// Runs `attention`.
pub(super) fn forward(l: &mut Launch, causal: bool, scale: f64, window: usize) {
    let heads = Heads::new(l, 4, causal, scale, window);
    if !heads.is_empty() {
        let divisors = l.out(1);
        heads.forward(l, Some(divisors));
    }
}

/// Runs `attention_grad`: with `p` the probabilities and `g` the result's gradient, `dv = p^T g`, `dp = g v^T`,
/// `ds = scale * p * (dp - sum(g * out))`, `dq = ds k`, `dk = ds^T q`.
pub(super) fn backward(l: &mut Launch, causal: bool, scale: f64, window: usize) {
    let h = Heads::new(l, 7, causal, scale, window);
    if h.is_empty() {
        return;
    }
    let given = Given { out: l.arg(4), divisors: l.arg(5), grad: l.arg(6) };
    let (dq, dk, dv): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.out(0), l.out(1), l.out(2));
    let scratch: Ptr<f32> = l.workspace();
    // Heads that share keys add to the same gradients, so they are one task.
    h.run(l, h.rows * h.groups, |task, thread| {
        let (row, shared) = (task / h.groups, h.heads / h.groups);
        // SAFETY: offsets come from the shapes of the operands; a task writes the results of its own row and heads, and
        // uses the workspace of its own thread.
        unsafe {
            let work = scratch.add(thread * per_thread(h.width, true));
            for head in task % h.groups * shared..(task % h.groups + 1) * shared {
                let at = h.k_at(row, head, 0);
                if head % shared == 0 {
                    for s in 0..h.columns {
                        dk.slice_mut(at + s * h.k_stride(), h.width).fill(0.0);
                        dv.slice_mut(at + s * h.k_stride(), h.width).fill(0.0);
                    }
                }
                for number in 0..h.queries.div_ceil(BLOCK) {
                    let queries = Block::nth(number, h.queries);
                    h.grad_of(row, head, queries, &given, (dq, dk.add(at), dv.add(at)), work);
                }
            }
        }
    });
}

/// What the gradient has besides the operands of the forward pass.
struct Given {
    out: Ptr<f32>,
    divisors: Ptr<f32>,
    grad: Ptr<f32>,
}

impl Heads {
    /// The gradient of a block of queries, and what it adds to the gradients of keys and values, which are given from
    /// the row's first key on.
    ///
    /// # Safety
    /// As for `attend`; nobody else uses the gradients of the row's keys.
    unsafe fn grad_of(
        &self,
        row: usize,
        head: usize,
        queries: Block,
        given: &Given,
        (dq, dk, dv): (Ptr<f32>, Ptr<f32>, Ptr<f32>),
        work: Ptr<f32>,
    ) {
        let (qs, ks, width) = (self.q_stride(), self.k_stride(), self.width);
        // SAFETY: the caller's, and the shapes of the operands.
        unsafe {
            let (segments, slope) = (self.segments_of(row), self.slope(head));
            let at = self.q_at(row, head, queries.from);
            let (q, grad, out, dq) = (self.q.add(at), given.grad.add(at), given.out.add(at), dq.add(at));
            let (by_column, grad_by_column) = (work, work.add(width * BLOCK));
            let (scores, dp) = (work.add(2 * width * BLOCK), work.add((2 * width + BLOCK) * BLOCK));
            transpose(q, qs, queries.count, width, self.scale, by_column);
            transpose(grad, qs, queries.count, width, 1.0, grad_by_column);
            let (mut divisors, mut deltas) = ([0.0; BLOCK], [0.0; BLOCK]);
            let stored = (row * self.heads + head) * self.queries + queries.from;
            divisors[..queries.count].copy_from_slice(given.divisors.slice(stored, queries.count));
            for (i, delta) in deltas[..queries.count].iter_mut().enumerate() {
                *delta = dot(grad.slice(i * qs, width), out.slice(i * qs, width));
                dq.slice_mut(i * qs, width).fill(0.0);
            }
            let finite = all_finite(q, qs, queries.count, width) && all_finite(grad, qs, queries.count, width);
            for number in self.key_blocks(queries) {
                let keys = Block::nth(number, self.columns);
                let Some(sight) = self.sight(segments, queries, keys) else { continue };
                let at = self.k_at(row, head, keys.from);
                let (key, value) = (self.k.add(at), self.v.add(at));
                let (dk, dv) = (dk.add(keys.from * ks), dv.add(keys.from * ks));
                for part in sight.parts() {
                    score(part, width, by_column, (key, ks), scores);
                    score(part, width, grad_by_column, (value, ks), dp);
                }
                for (g, &(from, to)) in sight.keys.iter().enumerate().filter(|(_, (from, to))| from < to) {
                    let group = self.group(segments, queries, keys, &sight, g, slope);
                    let (at, len) = (from * BLOCK + g * LANES, reach(to - from));
                    let lanes = |all: &[f32; BLOCK]| std::array::from_fn(|j| all[g * LANES + j]);
                    let (scores, dp) = (scores.slice_mut(at, len), dp.slice_mut(at, len));
                    gradients(&group, scores, dp, &lanes(&divisors), &lanes(&deltas), self.scale);
                }
                if sight.masked.contains(&true) && !(finite && all_finite(key, ks, keys.count, width)) {
                    for (i, s) in self.pairs(segments, queries, keys) {
                        let (p, ds) = (*scores.add(s * BLOCK + i).0, *dp.add(s * BLOCK + i).0);
                        add(dq.slice_mut(i * qs, width), ds, key.slice(s * ks, width));
                        add(dk.slice_mut(s * ks, width), ds, q.slice(i * qs, width));
                        add(dv.slice_mut(s * ks, width), p, grad.slice(i * qs, width));
                    }
                    continue;
                }
                for (i, end, from, to) in sight.parts() {
                    let (m, n) = (end.min(queries.count) - i, to - from);
                    let at = from * BLOCK + i;
                    let into = |out: Ptr<f32>| (out.add(from * ks), ks);
                    let (by_query, by_key) = ((dp.add(at), 1, BLOCK), (dp.add(at), BLOCK, 1));
                    let (out, b) = ((dq.add(i * qs), qs), (key.add(from * ks), ks));
                    Product { size: (m, width, n), out, add: true, a: by_query, b }.run();
                    let b = (q.add(i * qs), qs);
                    Product { size: (n, width, m), out: into(dk), add: true, a: by_key, b }.run();
                    let (a, b) = ((scores.add(at), BLOCK, 1), (grad.add(i * qs), qs));
                    Product { size: (n, width, m), out: into(dv), add: true, a, b }.run();
                }
            }
        }
    }
}
