//! Ranks of one process, a thread each.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use dsgc_ir::diag::Diag;

use super::Transport;

/// Connects so many ranks of this process, one for each thread that runs one.
pub fn threads(ranks: usize) -> Vec<Arc<dyn Transport>> {
    let hub = Arc::new(Hub { ranks, mail: Mutex::new(Mail::new(ranks)), arrived: Condvar::new() });
    (0..ranks).map(|rank| Arc::new(Threads { rank, hub: hub.clone() }) as Arc<dyn Transport>).collect()
}

struct Threads {
    rank: usize,
    hub: Arc<Hub>,
}

struct Hub {
    ranks: usize,
    mail: Mutex<Mail>,
    arrived: Condvar,
}

struct Mail {
    /// Messages on their way, by `from * ranks + to`.
    boxes: Vec<VecDeque<Vec<u8>>>,
    /// Why the run has ended, if it has.
    ended: Option<String>,
}

impl Mail {
    fn new(ranks: usize) -> Mail {
        Mail { boxes: vec![VecDeque::new(); ranks * ranks], ended: None }
    }
}

impl Hub {
    // Nothing is left half done while the lock is held.
    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
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
        if !message.is_empty() {
            let message = message.to_vec();
            self.hub.mail().boxes[self.rank * self.hub.ranks + to].push_back(message);
            self.hub.arrived.notify_all();
        }
        if place.is_empty() {
            return Ok(());
        }
        let mut mail = self.hub.mail();
        loop {
            if let Some(why) = &mail.ended {
                return Err(Diag::error(why.clone()));
            }
            if let Some(message) = mail.boxes[from * self.hub.ranks + self.rank].pop_front() {
                drop(mail);
                place.copy_from_slice(&message);
                return Ok(());
            }
            mail = self.hub.arrived.wait(mail).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn abort(&self, why: &str) {
        self.hub.mail().ended.get_or_insert_with(|| why.to_string());
        self.hub.arrived.notify_all();
    }
}
