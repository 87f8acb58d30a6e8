//! Work on all cores: a fixed pool and a static partition.

use std::ops::Range;

use rayon::prelude::*;

/// Elements below which a kernel stays on one thread: handing work over costs about as long as these take.
pub(super) const GRAIN: usize = 16 * 1024;

/// The threads of a device.
pub(super) struct Threads {
    pool: rayon::ThreadPool,
    count: usize,
}

impl Threads {
    /// A pool of `count` threads; at least one.
    ///
    /// # Panics
    /// If the system refuses to start threads.
    pub(super) fn new(count: usize) -> Threads {
        let count = count.max(1);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("dsgc-cpu-{i}"));
        Threads { pool: pool.build().expect("the system starts threads"), count }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Runs `work` on one of the threads. What it hands over is then a matter of two threads that are awake; from outside,
    /// every kernel would wait until the system wakes one of them, and then itself.
    pub(super) fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Runs `work` on `0..items`, cut into one range per thread; on this thread alone if the whole weighs less than
    /// [`GRAIN`], where an item weighs `weight`. Kernels give the same results for every cut.
    pub(super) fn run(&self, items: usize, weight: usize, work: impl Fn(Range<usize>) + Sync) {
        let parts = if items.saturating_mul(weight) < GRAIN { 1 } else { self.count.min(items) };
        if parts <= 1 {
            return work(0..items);
        }
        let cut = |part: usize| items * part / parts;
        self.pool.install(|| (0..parts).into_par_iter().with_max_len(1).for_each(|p| work(cut(p)..cut(p + 1))));
    }
}
