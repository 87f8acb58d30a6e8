//! Ranks of one process, a thread each.
//!
//! A message is not stored: the sender says where it lies and waits until the receiver has used it, so each byte is read
//! once, by whoever copies it or adds it up.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{hint, slice, thread};

use dsgc_ir::diag::Diag;

use super::watch::DEFAULT;
use super::{Transport, Watch, wait_limit};

/// Connects so many ranks of this process, one for each thread that runs one.
pub fn threads(ranks: usize) -> Vec<Arc<dyn Transport>> {
    threads_within(ranks, wait_limit().unwrap_or(DEFAULT))
}

/// The same with the least time of a wait that ends the run.
pub fn threads_within(ranks: usize, least: Duration) -> Vec<Arc<dyn Transport>> {
    let pairs = (0..ranks * ranks).map(|_| Pair::default()).collect();
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    let hub = Arc::new(Hub { ranks, pairs, ended: OnceLock::new(), over: AtomicBool::new(false), spin: ranks <= cores });
    let connect = |rank| Arc::new(Threads { rank, watch: Watch::new(rank, least), hub: hub.clone() });
    (0..ranks).map(|rank| connect(rank) as Arc<dyn Transport>).collect()
}

struct Threads {
    rank: usize,
    watch: Watch,
    hub: Arc<Hub>,
}

struct Hub {
    ranks: usize,
    /// The ways from one rank to another, by `from * ranks + to`.
    pairs: Vec<Pair>,
    /// Why the run has ended, if it has.
    ended: OnceLock<String>,
    /// Whether it has.
    over: AtomicBool,
    /// Whether every rank may have a core, so one that waits takes it from nobody.
    spin: bool,
}

/// The way from one rank to another.
#[derive(Default)]
struct Pair {
    /// What `offer` is, for those who look before they wait.
    state: AtomicU8,
    offer: Mutex<Offer>,
    changed: Condvar,
}

/// A message on its way.
#[derive(Clone, Copy, Default)]
enum Offer {
    /// There is none.
    #[default]
    Nothing,
    /// It lies at this address, this long.
    Message(usize, usize),
    /// The receiver reads it.
    Taking,
}

impl Offer {
    fn state(self) -> u8 {
        match self {
            Offer::Nothing => NOTHING,
            Offer::Message(..) => MESSAGE,
            Offer::Taking => TAKING,
        }
    }
}

const NOTHING: u8 = 0;
const MESSAGE: u8 = 1;
const TAKING: u8 = 2;

/// How often a waiting rank looks before it sleeps, some 10 microseconds: less than a thread needs to wake up.
const LOOKS: usize = 400;

impl Pair {
    // Nothing is left half done while the lock is held.
    fn offer(&self) -> MutexGuard<'_, Offer> {
        self.offer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mut offer: MutexGuard<'_, Offer>, to: Offer) {
        *offer = to;
        self.state.store(to.state(), Ordering::Release);
        drop(offer);
        self.changed.notify_all();
    }
}

/// A message of this rank that another may read. It is this rank's again when this is dropped.
struct Sent<'a>(&'a Pair);

impl Drop for Sent<'_> {
    fn drop(&mut self) {
        let mut offer = self.0.offer();
        while matches!(*offer, Offer::Taking) {
            offer = self.0.changed.wait(offer).unwrap_or_else(PoisonError::into_inner);
        }
        self.0.set(offer, Offer::Nothing);
    }
}

/// A message of another rank while this one reads it.
struct Taken<'a>(&'a Pair);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.offer(), Offer::Nothing);
    }
}

impl Threads {
    /// Waits until an offer is in a state, or the run has ended. `what` is waited for.
    fn wait<'a>(&self, pair: &'a Pair, state: u8, what: &dyn Fn() -> String) -> Result<MutexGuard<'a, Offer>, Diag> {
        let ready = || pair.state.load(Ordering::Acquire) == state;
        if self.hub.spin {
            (0..LOOKS).take_while(|_| !ready()).for_each(|_| hint::spin_loop());
        }
        let mut offer = pair.offer();
        let since = Instant::now();
        loop {
            if offer.state() == state {
                self.watch.waited(since.elapsed());
                return Ok(offer);
            }
            if self.hub.over.load(Ordering::Acquire) {
                return Err(Diag::error(self.hub.ended.get().cloned().unwrap_or_default()));
            }
            // What is being read is progress.
            if self.watch.is_late(since.elapsed()) && offer.state() != TAKING {
                drop(offer);
                self.abort(&self.watch.late(since.elapsed(), what()));
                offer = pair.offer();
                continue;
            }
            let left = self.watch.least().saturating_sub(since.elapsed()).max(Duration::from_millis(100));
            (offer, _) = pair.changed.wait_timeout(offer, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Transport for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hub.ranks
    }

    fn exchange(&self, to: usize, message: &[u8], from: usize, place: &mut [u8]) -> Result<(), Diag> {
        self.exchange_with(to, message, from, place.len(), &mut |_, found| place.copy_from_slice(found))
    }

    fn exchange_with(
        &self,
        to: usize,
        message: &[u8],
        from: usize,
        bytes: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Diag> {
        let (out, into) = (&self.hub.pairs[self.rank * self.hub.ranks + to], &self.hub.pairs[from * self.hub.ranks + self.rank]);
        let sent = (!message.is_empty()).then(|| {
            out.set(out.offer(), Offer::Message(message.as_ptr() as usize, message.len()));
            Sent(out)
        });
        if bytes > 0 {
            let offer = self.wait(into, MESSAGE, &|| format!("{bytes} bytes from rank {from}"))?;
            let Offer::Message(address, len) = *offer else { panic!("bug: an offer that is none") };
            into.set(offer, Offer::Taking);
            let taken = Taken(into);
            assert!(len == bytes, "bug: rank {from} sent {len} bytes to rank {}, expected {bytes}", self.rank);
            // SAFETY: the sender keeps the message until it is no more being taken.
            take(0, unsafe { slice::from_raw_parts(address as *const u8, len) });
            drop(taken);
        }
        if let Some(sent) = sent {
            drop(self.wait(out, NOTHING, &|| format!("rank {to} to take {} bytes", message.len()))?);
            std::mem::forget(sent);
        }
        Ok(())
    }

    fn note(&self, what: &str) {
        self.watch.note(what);
    }

    fn abort(&self, why: &str) {
        self.hub.ended.get_or_init(|| why.to_string());
        self.hub.over.store(true, Ordering::Release);
        for pair in &self.hub.pairs {
            // Whoever has looked and not yet begun to wait holds the lock.
            drop(pair.offer());
            pair.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_rank_that_never_comes_ends_on_all() {
        let ranks = threads_within(3, Duration::from_millis(20));
        let wait = |rank: usize| {
            ranks[rank].note("`all_gather` %w in @sft.grad");
            ranks[rank].exchange(2, &[1; 5], 2, &mut [0; 5]).expect_err("rank 2 never comes").message
        };
        let (a, b) = thread::scope(|scope| {
            let other = scope.spawn(|| wait(1));
            (wait(0), other.join().expect("no rank panics"))
        });
        assert_eq!(a, b);
        assert!(a.contains("for 5 bytes from rank 2, at `all_gather` %w in @sft.grad"), "{a}");
        assert_eq!(ranks[2].exchange(0, &[1], 0, &mut [0]).expect_err("the run has ended").message, a);
    }

    /// The sender's buffer may go away as soon as it has its answer, also where the run ends meanwhile.
    #[test]
    fn what_nobody_takes_is_the_senders_again() {
        let ranks = threads(2);
        let error = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let message = vec![7u8; 1 << 16];
                ranks[0].exchange(1, &message, 1, &mut []).expect_err("nobody takes it").message
            });
            ranks[1].abort("rank 1 found no file");
            sender.join().expect("no rank panics")
        });
        assert_eq!(error, "rank 1 found no file");
    }
}
