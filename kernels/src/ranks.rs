//! Ranks: how devices that run one program together reach each other.
//!
//! A [`Transport`] moves bytes between two ranks, and nothing else; [`Group`] makes collectives of that, the same for every
//! transport, so results do not depend on it. [`threads()`] connects ranks of one process; others live where the
//! processes are started.

mod collectives;
mod messages;
pub(crate) mod ops;
mod threads;
mod watch;

use std::sync::Arc;

use dsgc_ir::diag::Diag;
use dsgc_ir::print::value_name;
use dsgc_ir::{Axis, Graph, Mesh, OpData};

pub use collectives::{Group, Number};
pub use messages::{pack, unpack};
pub use threads::{enough_threads, threads, threads_within};
pub use watch::{Watch, wait_limit};

/// The way of one rank to all others. Between two ranks, messages arrive in the order in which they were sent.
///
/// An error says that the run has ended elsewhere, with the reason of the rank that ended it: nothing more can be sent.
pub trait Transport: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Sends a message to one rank and receives one from another, at the same time: a ring of ranks that all do so does not
    /// wait for itself. The message that is received must be as long as its place. An empty message is not sent. It may return
    /// only when the other rank receives, so two ranks that send first and receive later may wait forever.
    fn exchange(&self, to: usize, message: &[u8], from: usize, place: &mut [u8]) -> Result<(), Diag> {
        let bytes = place.len();
        let copy = &mut |first: usize, part: &[u8]| place[first..first + part.len()].copy_from_slice(part);
        self.exchange_with(to, message, from, bytes, copy)
    }

    /// The same, but what is received, `bytes` long, is given to `take` part by part with the place where each begins, in
    /// order, while more is on its way. Parts are aligned as numbers of 8 bytes are, if the message is.
    fn exchange_with(
        &self,
        to: usize,
        message: &[u8],
        from: usize,
        bytes: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Diag>;

    /// Sends a message of any length and keeps it until the other rank takes it by [`Transport::receive`], so nobody waits.
    fn post(&self, to: usize, message: Vec<u8>) -> Result<(), Diag>;

    /// The oldest message that a rank has posted to this one and this one has not received; waits for it.
    fn receive(&self, from: usize) -> Result<Vec<u8>, Diag>;

    /// What this rank does until it says otherwise, which a message says where it waits too long: `` step 3 of `sft` ``.
    fn begin(&self, what: &str);

    /// What it sends or waits for within that: `` `all_reduce` %157 in @grad ``.
    fn note(&self, what: &str);

    /// Ends the run of all ranks: whatever others wait for fails with this reason.
    fn abort(&self, why: &str);
}

/// The only rank of a run.
struct Alone;

impl Transport for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn exchange_with(
        &self,
        _: usize,
        message: &[u8],
        _: usize,
        _: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Diag> {
        take(0, message);
        Ok(())
    }

    fn post(&self, _: usize, _: Vec<u8>) -> Result<(), Diag> {
        panic!("bug: the only rank posts a message");
    }

    fn receive(&self, _: usize) -> Result<Vec<u8>, Diag> {
        panic!("bug: the only rank waits for a message");
    }

    fn begin(&self, _: &str) {}

    fn note(&self, _: &str) {}

    fn abort(&self, _: &str) {}
}

/// A rank of a mesh.
#[derive(Clone)]
pub struct Member {
    /// The mesh.
    pub mesh: Mesh,
    /// The way to the other ranks.
    pub transport: Arc<dyn Transport>,
}

impl Member {
    /// The only rank of a run.
    pub fn alone() -> Member {
        Member { mesh: Mesh::default(), transport: Arc::new(Alone) }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.transport.rank()
    }

    /// The ranks that differ from this one along an axis only.
    pub fn group(&self, over: Axis) -> Group<'_> {
        Group::new(self.transport.as_ref(), self.mesh.group(over, self.rank()))
    }

    /// Notes what this rank begins ([`Member::naming`]).
    pub(crate) fn note(&self, what: &str) {
        self.transport.note(what);
    }

    /// An op of a graph in words, for a message about it: with its first result as the text form of the graph names it.
    pub(crate) fn naming(&self, graph: &Graph, op: &OpData) -> String {
        let result = op.results().next().map(|value| format!("%{} ", value_name(graph, value))).unwrap_or_default();
        format!("`{}` {result}in @{}", op.op.name(), graph.name)
    }

    /// All ranks.
    pub fn all(&self) -> Group<'_> {
        Group::new(self.transport.as_ref(), (0..self.transport.size()).collect())
    }
}

impl Default for Member {
    fn default() -> Member {
        Member::alone()
    }
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.mesh)
    }
}
