//! What ranks send beside what they compute: a thread that runs collectives one after the other, in the order in which they
//! begin.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// What a collective gives: bytes that were sent, or why the run has ended.
pub(super) type Sent = Result<u64, String>;

/// A collective that can run on any thread. The plan leaves its buffers alone until it is over.
pub(super) type Job = Box<dyn FnOnce() -> Sent + Send>;

/// The thread, which starts with the first job and ends with this.
#[derive(Default)]
pub(super) struct Beside {
    thread: Option<(Sender<Job>, Receiver<Sent>)>,
    /// Jobs that have begun, and those of them that are known to be over.
    begun: u64,
    over: u64,
    /// Bytes that they have sent.
    sent: u64,
}

/// Starts the thread: where it takes jobs, and where it says what they gave.
fn start() -> Result<(Sender<Job>, Receiver<Sent>), String> {
    let ((jobs, to_do), (done, results)) = (channel::<Job>(), channel());
    let work = move || to_do.into_iter().map(|job| job()).try_for_each(|sent| done.send(sent));
    let started = thread::Builder::new().name("dsgc-sends".into()).spawn(work);
    started.map_err(|e| format!("the system starts no thread that sends: {e}"))?;
    Ok((jobs, results))
}

impl Beside {
    /// Begins a job, behind those that have begun before, and gives its number.
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub(super) fn begin(&mut self, job: Job) -> Result<u64, String> {
        let (jobs, _) = match &mut self.thread {
            Some(thread) => thread,
            none => none.insert(start()?),
        };
        jobs.send(job).expect("bug: the thread of collectives has ended");
        self.begun += 1;
        Ok(self.begun)
    }

    /// Waits until the job of this number is over.
    ///
    /// # Errors
    /// Why the run has ended, if it has.
    pub(super) fn wait(&mut self, number: u64) -> Result<(), String> {
        while self.over < number {
            let (_, results) = self.thread.as_ref().expect("bug: no job has begun");
            let sent = results.recv().expect("bug: the thread of collectives has ended");
            self.over += 1;
            self.sent += sent?;
        }
        Ok(())
    }

    /// Whether all jobs are known to be over.
    pub(super) fn is_idle(&self) -> bool {
        self.over == self.begun
    }

    /// Bytes that jobs have sent since this was asked last.
    pub(super) fn take_sent(&mut self) -> u64 {
        std::mem::take(&mut self.sent)
    }
}
