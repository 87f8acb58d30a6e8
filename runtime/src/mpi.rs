//! Ranks that are processes, started and connected by MPI.
//!
//! MPI's library is opened when a launcher (`mpirun`, `srun`) has started this process, so one program works with every MPI and
//! without any. `launcher` finds out which one it was, `library` opens what fits it; of MPI's functions only
//! messages between two ranks are used, and [`Group`] makes collectives of them, so numbers are those of ranks as threads to the
//! bit.
//!
//! A process that ends without [`finalize`] ends the whole job, which is what an error needs; so nothing calls that
//! but a good end, least of all a destructor, which would wait for ranks that wait for this one.

mod launcher;
mod library;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{hint, thread};

use dsgc_ir::diag::Diag;
use dsgc_kernels::ranks::{Group, Transport, Watch, wait_limit};

use launcher::Launcher;
use library::{Library, Status};

pub use launcher::{rank_here, ranks_here};
pub use library::found;

/// The exit code of a job that one rank has ended.
pub const ABORTED: u8 = 4;

/// Bytes of a message that are on their way as one: so adding up a part overlaps the receiving of the next, and both
/// stay in a cache.
const CHUNK: usize = 1 << 20;

/// How many chunks are on their way at a time, in each direction.
const WINDOW: usize = 2;

/// There is one MPI per process, and it can be begun once.
static CONNECTED: OnceLock<Arc<Mpi>> = OnceLock::new();

/// Connects this process with the other ranks; nothing where no launcher of MPI has started it.
///
/// # Errors
/// Where the launcher's MPI is not to be found, or is not the one that is found: then every process would be a job of its
/// own. Where the environment's limit on waiting is no number.
pub fn connect() -> Result<Option<Arc<dyn Transport>>, Diag> {
    let least = wait_limit()?;
    if let Some(mpi) = CONNECTED.get() {
        return Ok(Some(mpi.clone()));
    }
    let Some(launcher) = Launcher::find(&|name| std::env::var(name).ok())? else { return Ok(None) };
    let library = Library::open(launcher.candidates(), launcher.sign)?;
    let mut mpi = Mpi::begin(library, &launcher, least)?;
    let mut threads = vec![0; mpi.size];
    threads[mpi.rank] = thread::available_parallelism().map_or(1, |n| n.get()) / ranks_here().unwrap_or(mpi.size);
    Group::new(&mpi, (0..mpi.size).collect()).all_gather(&mut threads, 1)?;
    mpi.threads = threads.into_iter().min().unwrap_or_default().max(1);
    Ok(Some(CONNECTED.get_or_init(|| Arc::new(mpi)).clone()))
}

/// The version that the MPI of this process gives itself, if it is connected.
pub fn library() -> Option<String> {
    CONNECTED.get().map(|mpi| mpi.library.version())
}

/// How many threads each rank of the job takes, if this process is one of them: as many as there are on the machine that has
/// the fewest for one, since a plan is made for a number of threads and all ranks must plan alike.
pub fn threads() -> Option<usize> {
    CONNECTED.get().map(|mpi| mpi.threads)
}

/// Ends MPI in this process at the good end of all ranks, for which it waits; nothing where there is none.
pub fn finalize() {
    if let Some(mpi) = CONNECTED.get() {
        mpi.library.finalize();
    }
}

/// Ends the job of all ranks with an exit code; returns where there is no job. For what has been said already, as a panic.
pub fn end_job(code: u8) {
    if let Some(mpi) = CONNECTED.get() {
        mpi.library.abort(code);
    }
}

struct Mpi {
    library: Library,
    rank: usize,
    size: usize,
    /// Threads of each rank.
    threads: usize,
    watch: Watch,
    /// Where chunks arrive that are taken one by one: words, since they hold numbers.
    chunks: Mutex<Vec<u64>>,
    /// Messages that are on their way without anybody waiting, with MPI's handles of their chunks.
    posted: Mutex<Vec<Posted>>,
}

/// A message that MPI reads until all of its chunks are sent.
struct Posted {
    /// Its length, which goes before it.
    _head: Box<[u8; size_of::<u64>()]>,
    _message: Vec<u8>,
    requests: Vec<usize>,
}

/// What happens to bytes that arrive.
enum Arrival<'a> {
    /// They lie where they belong.
    Place(*mut u8),
    /// They lie in a buffer of chunks, and are taken from there.
    Taken(*mut u8, &'a mut dyn FnMut(usize, &[u8])),
}

/// A chunk on its way: its place in the message, its length, and MPI's handle.
struct Chunk {
    first: usize,
    len: usize,
    request: usize,
}

impl Mpi {
    fn begin(library: Library, launcher: &Launcher, least: Duration) -> Result<Mpi, Diag> {
        library.init();
        let (rank, size) = (library.rank(), library.size());
        if let Some(started) = launcher.size.filter(|&started| started != size) {
            let message = format!(
                "the launcher started {started} ranks (`{}`), but the MPI in `{}` sees {size}",
                launcher.sign, library.name
            );
            let help = "the launcher is of another MPI; `DSGC_MPI` may name the library that belongs to it";
            return Err(Diag::error(message).help(help));
        }
        Ok(Mpi {
            library,
            rank,
            size,
            threads: 1,
            watch: Watch::new(rank, least),
            chunks: Mutex::default(),
            posted: Mutex::default(),
        })
    }

    /// Sends and receives in chunks, a few at a time, and asks MPI again and again how far they are: only such calls move
    /// messages on, and a wait within MPI would never end where the other rank has.
    fn transfer(&self, to: usize, message: &[u8], from: usize, bytes: usize, mut arrival: Arrival) {
        let mut unfinished = Unfinished { mpi: self, finished: false };
        let (mut sending, mut receiving) = (VecDeque::new(), VecDeque::new());
        let (mut sent, mut received, mut taken) = (0, 0, 0);
        let mut waited = Wait::begin();
        loop {
            while sent < message.len() && sending.len() < WINDOW {
                let len = CHUNK.min(message.len() - sent);
                // SAFETY: the message is borrowed until all of it has been sent.
                let request = unsafe { self.library.send(message.as_ptr().add(sent).cast(), len, to) };
                sending.push_back(Chunk { first: sent, len, request });
                sent += len;
            }
            while received < bytes && receiving.len() < WINDOW {
                let len = CHUNK.min(bytes - received);
                let place = match &arrival {
                    // SAFETY: within the place, which is as long as the message.
                    Arrival::Place(place) => unsafe { place.add(received) },
                    // SAFETY: the buffer has as many chunks as may be on their way; one is taken before it is used again.
                    Arrival::Taken(chunks, _) => unsafe { chunks.add(received / CHUNK % WINDOW * CHUNK) },
                };
                // SAFETY: nobody else uses the place until this has arrived.
                let request = unsafe { self.library.receive(place.cast(), len, from) };
                receiving.push_back(Chunk { first: received, len, request });
                received += len;
            }
            if sending.is_empty() && receiving.is_empty() {
                break;
            }
            let mut moved = false;
            if let Some(chunk) = receiving.front_mut()
                && let Some(status) = self.library.test(&mut chunk.request)
            {
                self.is_whole(&status, chunk, from);
                if let Arrival::Taken(chunks, take) = &mut arrival {
                    // SAFETY: the chunk lies there.
                    let place = unsafe { chunks.add(chunk.first / CHUNK % WINDOW * CHUNK) };
                    // SAFETY: as above, and nothing else arrives there before the chunk is taken.
                    take(chunk.first, unsafe { std::slice::from_raw_parts(place, chunk.len) });
                }
                taken += chunk.len;
                receiving.pop_front();
                moved = true;
            }
            if let Some(chunk) = sending.front_mut()
                && self.library.test(&mut chunk.request).is_some()
            {
                sending.pop_front();
                moved = true;
            }
            if moved {
                waited.end(&self.watch);
                waited = Wait::begin();
            } else if self.watch.is_late(waited.since.elapsed()) {
                let what = match receiving.front() {
                    Some(_) => format!("{} of {bytes} bytes from rank {from}", bytes - taken),
                    None => format!("rank {to} to take {} bytes", message.len()),
                };
                self.abort(&self.watch.late(waited.since.elapsed(), &what));
            } else {
                waited.pause();
            }
        }
        unfinished.finished = true;
    }

    /// A rank that sends less than another expects runs another program.
    fn is_whole(&self, status: &Status, chunk: &Chunk, from: usize) {
        let found = self.library.bytes(status);
        if found != chunk.len {
            let expected = chunk.len;
            self.abort(&format!("bug: rank {from} sent {found} bytes, expected {expected}{}", self.watch.place()));
        }
    }
}

/// A wait for MPI.
struct Wait {
    since: Instant,
}

impl Wait {
    fn begin() -> Wait {
        Wait { since: Instant::now() }
    }

    fn end(&self, watch: &Watch) {
        watch.waited(self.since.elapsed());
    }

    /// Waits a little. A small message takes less than the first pauses; what takes longer waits for a rank that computes,
    /// perhaps on this core, and who sleeps gets it back at once, where one who yields it waits for the others' turns.
    fn pause(&self) {
        if self.since.elapsed() < Duration::from_micros(30) {
            hint::spin_loop();
        } else {
            thread::sleep(Duration::from_micros(20));
        }
    }
}

/// While MPI uses buffers that it does not own. Unwinding would free them.
struct Unfinished<'a> {
    mpi: &'a Mpi,
    finished: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.mpi.abort("a panic while messages were on their way");
        }
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, to: usize, message: &[u8], from: usize, place: &mut [u8]) -> Result<(), Diag> {
        self.transfer(to, message, from, place.len(), Arrival::Place(place.as_mut_ptr()));
        Ok(())
    }

    fn exchange_with(
        &self,
        to: usize,
        message: &[u8],
        from: usize,
        bytes: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Diag> {
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.resize(WINDOW * CHUNK / size_of::<u64>(), 0);
        self.transfer(to, message, from, bytes, Arrival::Taken(chunks.as_mut_ptr().cast(), take));
        Ok(())
    }

    fn post(&self, to: usize, message: Vec<u8>) -> Result<(), Diag> {
        let head = Box::new((message.len() as u64).to_ne_bytes());
        // SAFETY: both lie on the heap, where they stay until MPI has sent them.
        let mut requests = vec![unsafe { self.library.send(head.as_ptr().cast(), head.len(), to) }];
        requests.extend(
            // SAFETY: as above.
            message.chunks(CHUNK).map(|chunk| unsafe { self.library.send(chunk.as_ptr().cast(), chunk.len(), to) }),
        );
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        posted.push(Posted { _head: head, _message: message, requests });
        for message in posted.iter_mut() {
            message.requests.retain_mut(|request| self.library.test(request).is_none());
        }
        posted.retain(|message| !message.requests.is_empty());
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>, Diag> {
        let mut head = [0; size_of::<u64>()];
        self.exchange(self.rank, &[], from, &mut head)?;
        let mut message = vec![0; u64::from_ne_bytes(head) as usize];
        self.exchange(self.rank, &[], from, &mut message)?;
        Ok(message)
    }

    fn begin(&self, what: &str) {
        self.watch.begin(what);
    }

    fn note(&self, what: &str) {
        self.watch.note(what);
    }

    fn abort(&self, why: &str) {
        eprintln!("error: rank {} of {}: {why}", self.rank, self.size);
        self.library.abort(ABORTED);
    }
}
