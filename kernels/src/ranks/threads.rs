//! Ranks of one process, a thread each.
//!
//! A large message is not stored: the sender says where it lies and waits until the receiver has used it, so each byte is
//! read once, by whoever copies it or adds it up. A small one is copied, so that nobody waits.

use std::collections::VecDeque;
use std::slice;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dsgc_ir::diag::Diag;

use super::watch::DEFAULT;
use super::{Transport, Watch, wait_limit};

/// Most ranks of one process: far more than a machine has cores.
const MOST: usize = 256;

/// An error where these are more ranks than one process has.
pub fn enough_threads(ranks: usize) -> Result<(), Diag> {
    if ranks <= MOST {
        return Ok(());
    }
    let diag = Diag::error(format!("found {ranks} ranks, and one process has at most {MOST}"));
    Err(diag.help("start one process for each, with `mpirun` or `srun`"))
}

/// Connects so many ranks of this process, one for each thread that runs one.
pub fn threads(ranks: usize) -> Vec<Arc<dyn Transport>> {
    threads_within(ranks, wait_limit().unwrap_or(DEFAULT))
}

/// The same with the least time of a wait that ends the run.
pub fn threads_within(ranks: usize, least: Duration) -> Vec<Arc<dyn Transport>> {
    let pairs = (0..ranks * ranks).map(|_| Pair::default()).collect();
    let hub = Arc::new(Hub { ranks, pairs, ended: OnceLock::new() });
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
}

/// Bytes up to which a message is copied: less work than it is to wake a thread that waits, and a cache holds it.
const SMALL: usize = 64 << 10;

/// How many small messages may be on the way from one rank to another.
const STORED: usize = 8;

/// The way from one rank to another.
#[derive(Default)]
struct Pair {
    mail: Mutex<Mail>,
    changed: Condvar,
}

/// Messages on their way from one rank to another.
#[derive(Default)]
struct Mail {
    /// In the order in which they were sent.
    queue: VecDeque<Message>,
    /// Whether the receiver reads a message that is lent.
    taking: bool,
    /// Buffers for small messages.
    spare: Vec<Vec<u64>>,
    /// Messages that wait until they are received, however many.
    posted: VecDeque<Vec<u8>>,
}

enum Message {
    /// A copy, so many bytes long. Words, since it may hold numbers.
    Stored(Vec<u64>, usize),
    /// It lies at this address, this long. The sender waits, so it is the last one.
    Lent(usize, usize),
}

impl Mail {
    fn count(&self) -> usize {
        self.queue.len() + usize::from(self.taking)
    }
}

impl Pair {
    // Nothing is left half done while the lock is held.
    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets others see what has changed.
    fn publish(&self, mail: MutexGuard<'_, Mail>) {
        drop(mail);
        self.changed.notify_all();
    }
}

/// A message of this rank that another may read. It is this rank's again when this is dropped.
struct Lent<'a>(&'a Pair);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut mail = self.0.mail();
        while mail.taking {
            mail = self.0.changed.wait(mail).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(Message::Lent(..)) = mail.queue.back() {
            mail.queue.pop_back();
        }
        self.0.publish(mail);
    }
}

/// A message of another rank while this one reads it.
struct Taken<'a>(&'a Pair);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut mail = self.0.mail();
        mail.taking = false;
        self.0.publish(mail);
    }
}

impl Threads {
    /// Waits until so many messages are on a way, or the run has ended. `what` is waited for.
    fn wait<'a>(
        &self,
        pair: &'a Pair,
        ready: impl Fn(&Mail) -> bool,
        what: impl Fn() -> String,
    ) -> Result<MutexGuard<'a, Mail>, Diag> {
        let mut mail = pair.mail();
        let since = Instant::now();
        loop {
            if let Some(why) = self.hub.ended.get() {
                return Err(Diag::error(why.clone()));
            }
            if ready(&mail) {
                self.watch.waited(since.elapsed());
                return Ok(mail);
            }
            // What is being read is progress.
            if self.watch.is_late(since.elapsed()) && !mail.taking {
                drop(mail);
                self.abort(&self.watch.late(since.elapsed(), what()));
                mail = pair.mail();
                continue;
            }
            let left = self.watch.least().saturating_sub(since.elapsed()).max(Duration::from_millis(100));
            (mail, _) = pair.changed.wait_timeout(mail, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends a message; one that is lent is to be waited for.
    fn send<'a>(&self, pair: &'a Pair, to: usize, message: &[u8]) -> Result<Option<Lent<'a>>, Diag> {
        if message.len() > SMALL {
            let mut mail = pair.mail();
            mail.queue.push_back(Message::Lent(message.as_ptr() as usize, message.len()));
            pair.publish(mail);
            return Ok(Some(Lent(pair)));
        }
        let mut mail =
            self.wait(pair, |mail| mail.count() < STORED, || format!("rank {to} to take {STORED} messages"))?;
        let mut copy = mail.spare.pop().unwrap_or_default();
        copy.resize(message.len().div_ceil(size_of::<u64>()).max(copy.len()), 0);
        bytemuck::cast_slice_mut(&mut copy)[..message.len()].copy_from_slice(message);
        mail.queue.push_back(Message::Stored(copy, message.len()));
        pair.publish(mail);
        Ok(None)
    }

    /// Receives a message.
    fn take(&self, pair: &Pair, from: usize, bytes: usize, take: &mut dyn FnMut(usize, &[u8])) -> Result<(), Diag> {
        let is_whole =
            |len| assert!(len == bytes, "bug: rank {from} sent {len} bytes to rank {}, expected {bytes}", self.rank);
        let mut mail =
            self.wait(pair, |mail| mail.count() > 0, || format!("{bytes} of {bytes} bytes from rank {from}"))?;
        match mail.queue.pop_front().expect("there is a message") {
            Message::Stored(copy, len) => {
                pair.publish(mail);
                is_whole(len);
                take(0, &bytemuck::cast_slice(&copy)[..len]);
                pair.mail().spare.push(copy);
            }
            Message::Lent(address, len) => {
                mail.taking = true;
                drop(mail);
                let _taken = Taken(pair);
                is_whole(len);
                // SAFETY: the sender keeps the message until it is no more being taken.
                take(0, unsafe { slice::from_raw_parts(address as *const u8, len) });
            }
        }
        Ok(())
    }
}

impl Transport for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hub.ranks
    }

    fn exchange_with(
        &self,
        to: usize,
        message: &[u8],
        from: usize,
        bytes: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Diag> {
        let way = |from: usize, to: usize| &self.hub.pairs[from * self.hub.ranks + to];
        let (out, into) = (way(self.rank, to), way(from, self.rank));
        let lent = if message.is_empty() { None } else { self.send(out, to, message)? };
        if bytes > 0 {
            self.take(into, from, bytes, take)?;
        }
        if lent.is_some() {
            drop(self.wait(out, |mail| mail.count() == 0, || format!("rank {to} to take {} bytes", message.len()))?);
        }
        Ok(())
    }

    fn post(&self, to: usize, message: Vec<u8>) -> Result<(), Diag> {
        let pair = &self.hub.pairs[self.rank * self.hub.ranks + to];
        let mut mail = pair.mail();
        mail.posted.push_back(message);
        pair.publish(mail);
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>, Diag> {
        let pair = &self.hub.pairs[from * self.hub.ranks + self.rank];
        let mut mail = self.wait(pair, |mail| !mail.posted.is_empty(), || format!("a message from rank {from}"))?;
        Ok(mail.posted.pop_front().expect("there is a message"))
    }

    fn begin(&self, what: &str) {
        self.watch.begin(what);
    }

    fn note(&self, what: &str) {
        self.watch.note(what);
    }

    fn abort(&self, why: &str) {
        self.hub.ended.get_or_init(|| why.to_string());
        for pair in &self.hub.pairs {
            // Whoever has looked and not yet begun to wait holds the lock.
            drop(pair.mail());
            pair.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

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
        assert!(a.contains("for 5 of 5 bytes from rank 2, at `all_gather` %w in @sft.grad"), "{a}");
        assert_eq!(ranks[2].exchange(0, &[1], 0, &mut [0]).expect_err("the run has ended").message, a);
    }

    /// Both post first, however much, and receive in the order of posting.
    #[test]
    fn posted_messages_wait_for_nobody() {
        let ranks = threads(2);
        for (from, to) in [(0, 1), (1, 0)] {
            for part in 0..2 * STORED {
                ranks[from].post(to, vec![part as u8; SMALL + part]).expect("the run goes on");
            }
        }
        for (from, to) in [(0, 1), (1, 0)] {
            for part in 0..2 * STORED {
                let found = ranks[to].receive(from).expect("the run goes on");
                assert_eq!(found, vec![part as u8; SMALL + part]);
            }
        }
        ranks[1].abort("rank 1 found no file");
        assert_eq!(ranks[0].receive(1).expect_err("the run has ended").message, "rank 1 found no file");
    }

    /// The sender's buffer may go away as soon as it has its answer, also where the run ends meanwhile.
    #[test]
    fn what_nobody_takes_is_the_senders_again() {
        let ranks = threads(2);
        let error = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let message = vec![7u8; SMALL + 1];
                ranks[0].exchange(1, &message, 1, &mut []).expect_err("nobody takes it").message
            });
            ranks[1].abort("rank 1 found no file");
            sender.join().expect("no rank panics")
        });
        assert_eq!(error, "rank 1 found no file");
    }
}
