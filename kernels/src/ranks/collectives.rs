//! Collectives of messages between two ranks, by rings (Patarasuk and Yuan 2009): every rank sends to the next one and
//! receives from the one before, so of `n` ranks each sends `(n - 1) / n` of the data for a part of the sum or for all parts, the
//! least that can be.
//!
//! A sum's part is added up around the ring from the rank behind its owner to the owner, on every transport alike.

use std::cell::Cell;
use std::ops::Range;

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use dsgc_ir::diag::Diag;

use super::Transport;

/// What can be added up.
pub trait Number: Pod {
    /// The sum of two.
    fn plus(self, other: Self) -> Self;
}

impl Number for f32 {
    fn plus(self, other: f32) -> f32 {
        self + other
    }
}

impl Number for f64 {
    fn plus(self, other: f64) -> f64 {
        self + other
    }
}

impl Number for i32 {
    fn plus(self, other: i32) -> i32 {
        self.wrapping_add(other)
    }
}

/// Some ranks, one of which is this one. Each of them calls the same functions in the same order.
pub struct Group<'a> {
    transport: &'a dyn Transport,
    ranks: Vec<usize>,
    at: usize,
    sent: Cell<u64>,
}

impl<'a> Group<'a> {
    /// The group of these ranks, in this order.
    ///
    /// # Panics
    /// If this rank is not among them.
    pub fn new(transport: &'a dyn Transport, ranks: Vec<usize>) -> Group<'a> {
        let at = ranks.iter().position(|&rank| rank == transport.rank()).expect("a rank is in its own groups");
        Group { transport, ranks, at, sent: Cell::new(0) }
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.ranks.len()
    }

    /// What this rank sends next, or waits for ([`Transport::note`]).
    pub fn note(&self, what: &str) {
        self.transport.note(what);
    }

    /// Bytes that this rank has sent.
    pub fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// Place of this rank among them.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The place so many before this one, around the ring.
    fn before(&self, steps: usize) -> usize {
        (self.at + self.size() - steps % self.size()) % self.size()
    }

    /// Sends to the next rank and receives from the one before.
    fn pass<T: Pod>(&self, message: &[T], place: &mut [T]) -> Result<(), Diag> {
        let (next, before) = (self.ranks[(self.at + 1) % self.size()], self.ranks[self.before(1)]);
        self.sent.set(self.sent.get() + size_of_val(message) as u64);
        self.transport.exchange(next, cast_slice(message), before, cast_slice_mut(place))
    }

    /// The same with what to do with the elements that are received, which come part by part with the place of the first.
    fn pass_with<T: Pod>(&self, message: &[T], len: usize, mut take: impl FnMut(usize, &[T])) -> Result<(), Diag> {
        let (next, before) = (self.ranks[(self.at + 1) % self.size()], self.ranks[self.before(1)]);
        self.sent.set(self.sent.get() + size_of_val(message) as u64);
        let take = &mut |first: usize, part: &[u8]| take(first / size_of::<T>(), cast_slice(part));
        self.transport.exchange_with(next, cast_slice(message), before, len * size_of::<T>(), take)
    }

    /// Every rank's part of `len` elements, one after the other: `parts` holds them all, and this rank's is in its place. The last
    /// ones may be shorter, or nothing.
    pub fn all_gather<T: Pod>(&self, parts: &mut [T], len: usize) -> Result<(), Diag> {
        let all = parts.len();
        let of = |at: usize| (at * len).min(all)..((at + 1) * len).min(all);
        for step in 1..self.size() {
            let (out, into) = apart(parts, of(self.before(step - 1)), of(self.before(step)));
            self.pass(out, into)?;
        }
        Ok(())
    }

    /// This rank's part of the sum. Parts are `part.len()` elements each; what the last ones lack of that is 0. `work` has as
    /// many elements as `part`.
    pub fn reduce_scatter<T: Number>(&self, whole: &[T], part: &mut [T], work: &mut [T]) -> Result<(), Diag> {
        let len = part.len();
        let of = |at: usize| &whole[(at * len).min(whole.len())..((at + 1) * len).min(whole.len())];
        // The last step's sum must lie in `part`.
        let (mut sum, mut next) = if self.size().is_multiple_of(2) { (work, part) } else { (part, work) };
        let first = of(self.before(1));
        sum[..first.len()].copy_from_slice(first);
        sum[first.len()..].fill(T::zeroed());
        for step in 1..self.size() {
            let (out, own) = (of(self.before(step)).len(), of(self.before(step + 1)));
            self.pass_with(&sum[..out], own.len(), |first, part| {
                let own = &own[first..first + part.len()];
                let sums = &mut next[first..first + part.len()];
                sums.iter_mut().zip(part.iter().zip(own)).for_each(|(sum, (&x, &own))| *sum = x.plus(own));
            })?;
            next[own.len()..].fill(T::zeroed());
            std::mem::swap(&mut sum, &mut next);
        }
        Ok(())
    }

    /// The sum, in the place of this rank's numbers.
    pub fn all_reduce<T: Number>(&self, values: &mut [T]) -> Result<(), Diag> {
        let (len, all) = (values.len().div_ceil(self.size()), values.len());
        let of = |at: usize| (at * len).min(all)..((at + 1) * len).min(all);
        for step in 1..self.size() {
            let (out, own) = apart(values, of(self.before(step)), of(self.before(step + 1)));
            self.pass_with(out, own.len(), |first, part| {
                own[first..first + part.len()].iter_mut().zip(part).for_each(|(sum, &x)| *sum = x.plus(*sum));
            })?;
        }
        for step in 0..self.size() - 1 {
            let (out, into) = apart(values, of(self.before(step)), of(self.before(step + 1)));
            self.pass(out, into)?;
        }
        Ok(())
    }

    /// [`Group::all_gather`] of several arrays at once, of which parts have so many elements each. Parts of all of them that
    /// go the same way are one message; `work` has room for two such messages.
    pub fn all_gather_each<T: Pod>(&self, arrays: &mut [&mut [T]], lens: &[usize], work: &mut [T]) -> Result<(), Diag> {
        let (message, place) = work.split_at_mut(work.len() / 2);
        for step in 1..self.size() {
            let out = packed(arrays, lens, self.before(step - 1), message);
            let len = total(arrays, lens, self.before(step));
            self.pass(&message[..out], &mut place[..len])?;
            unpack(arrays, lens, self.before(step), place, |to, x| *to = x);
        }
        Ok(())
    }

    /// [`Group::reduce_scatter`] of several arrays at once, likewise; numbers are added in the same order.
    pub fn reduce_scatter_each<T: Number>(
        &self,
        wholes: &[&[T]],
        parts: &mut [&mut [T]],
        work: &mut [T],
    ) -> Result<(), Diag> {
        let lens: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let (mut sum, mut next) = work.split_at_mut(work.len() / 2);
        packed(wholes, &lens, self.before(1), sum);
        for step in 1..self.size() {
            let (out, own) = (total(wholes, &lens, self.before(step)), self.before(step + 1));
            let len = total(wholes, &lens, own);
            self.pass(&sum[..out], &mut next[..len])?;
            // What has been sent is not needed any more.
            packed(wholes, &lens, own, sum);
            next[..len].iter_mut().zip(sum.iter()).for_each(|(x, &own)| *x = x.plus(own));
            std::mem::swap(&mut sum, &mut next);
        }
        let mut first = 0;
        for (part, whole) in parts.iter_mut().zip(wholes.iter()) {
            let len = range(whole.len(), part.len(), self.at).len();
            part[..len].copy_from_slice(&sum[first..first + len]);
            part[len..].fill(T::zeroed());
            first += len;
        }
        Ok(())
    }

    /// [`Group::all_reduce`] of several arrays at once, likewise.
    pub fn all_reduce_each<T: Number>(&self, arrays: &mut [&mut [T]], work: &mut [T]) -> Result<(), Diag> {
        let lens: Vec<usize> = arrays.iter().map(|array| array.len().div_ceil(self.size())).collect();
        let (message, place) = work.split_at_mut(work.len() / 2);
        for step in 1..self.size() {
            let (out, own) = (packed(arrays, &lens, self.before(step), message), self.before(step + 1));
            let len = total(arrays, &lens, own);
            self.pass(&message[..out], &mut place[..len])?;
            unpack(arrays, &lens, own, place, |sum, x| *sum = x.plus(*sum));
        }
        for step in 0..self.size() - 1 {
            let (out, into) = (packed(arrays, &lens, self.before(step), message), self.before(step + 1));
            let len = total(arrays, &lens, into);
            self.pass(&message[..out], &mut place[..len])?;
            unpack(arrays, &lens, into, place, |to, x| *to = x);
        }
        Ok(())
    }

    /// Part `k` of this rank goes to rank `k`, and the part that rank `k` has for this one takes its place in `into`. All parts
    /// are equally long.
    pub fn all_to_all<T: Pod>(&self, parts: &[T], into: &mut [T]) -> Result<(), Diag> {
        assert!(parts.len() == into.len() && parts.len().is_multiple_of(self.size()), "bug: parts of all ranks");
        let len = parts.len() / self.size();
        let of = |at: usize| at * len..(at + 1) * len;
        into[of(self.at)].copy_from_slice(&parts[of(self.at)]);
        for step in 1..self.size() {
            let (to, from) = ((self.at + step) % self.size(), self.before(step));
            let place = cast_slice_mut(&mut into[of(from)]);
            self.sent.set(self.sent.get() + (len * size_of::<T>()) as u64);
            self.transport.exchange(self.ranks[to], cast_slice(&parts[of(to)]), self.ranks[from], place)?;
        }
        Ok(())
    }

    /// What the rank at a place has, in the place of what all others have. Along the ring, in chunks that follow each other.
    pub fn broadcast<T: Pod>(&self, root: usize, values: &mut [T]) -> Result<(), Diag> {
        const CHUNK: usize = 1 << 20;
        let (after, last) = ((self.at + self.size() - root) % self.size(), self.size() - 1);
        for chunk in values.chunks_mut((CHUNK / size_of::<T>().max(1)).max(1)) {
            if after > 0 {
                self.pass(&[], chunk)?;
            }
            if after < last {
                self.pass(chunk, &mut [])?;
            }
        }
        Ok(())
    }

    /// Sends a message to the rank at this place of the group, without waiting for it ([`Transport::post`]).
    pub fn post(&self, to: usize, message: Vec<u8>) -> Result<(), Diag> {
        self.transport.post(self.ranks[to], message)
    }

    /// The oldest message that the rank at this place of the group has posted to this one; waits for it.
    pub fn receive(&self, from: usize) -> Result<Vec<u8>, Diag> {
        self.transport.receive(self.ranks[from])
    }

    /// Waits until all ranks have come here.
    pub fn barrier(&self) -> Result<(), Diag> {
        self.all_gather(&mut vec![1u8; self.size()], 1)
    }

    /// The messages of all ranks, in their order; they may differ in length.
    pub fn messages(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Diag> {
        let mut lengths = vec![0u64; self.size()];
        lengths[self.at] = own.len() as u64;
        self.all_gather(&mut lengths, 1)?;
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&len| vec![0; len as usize]).collect();
        all[self.at].copy_from_slice(own);
        for step in 1..self.size() {
            let (out, into) = (self.before(step - 1), self.before(step));
            let message = std::mem::take(&mut all[out]);
            self.pass(&message, &mut all[into])?;
            all[out] = message;
        }
        Ok(all)
    }
}

/// The places of a rank's part, of so many elements, in an array; the last ones may be shorter.
fn range(all: usize, len: usize, at: usize) -> Range<usize> {
    (at * len).min(all)..((at + 1) * len).min(all)
}

/// Elements of a rank's parts of all arrays.
fn total<T>(arrays: &[impl AsRef<[T]>], lens: &[usize], at: usize) -> usize {
    arrays.iter().zip(lens).map(|(array, &len)| range(array.as_ref().len(), len, at).len()).sum()
}

/// Puts a rank's parts of all arrays one after the other, and says how many elements that are.
fn packed<T: Copy>(arrays: &[impl AsRef<[T]>], lens: &[usize], at: usize, message: &mut [T]) -> usize {
    let mut first = 0;
    for (array, &len) in arrays.iter().zip(lens) {
        let part = &array.as_ref()[range(array.as_ref().len(), len, at)];
        message[first..first + part.len()].copy_from_slice(part);
        first += part.len();
    }
    first
}

/// Takes a rank's parts of all arrays out of a message.
fn unpack<T: Copy>(arrays: &mut [&mut [T]], lens: &[usize], at: usize, message: &[T], take: impl Fn(&mut T, T)) {
    let mut rest = message;
    for (array, &len) in arrays.iter_mut().zip(lens) {
        let part = range(array.len(), len, at);
        let (own, after) = rest.split_at(part.len());
        array[part].iter_mut().zip(own).for_each(|(place, &x)| take(place, x));
        rest = after;
    }
}

/// Two parts that do not overlap, the second to be written.
fn apart<T>(all: &mut [T], a: Range<usize>, b: Range<usize>) -> (&[T], &mut [T]) {
    if a.start < b.start {
        let (head, tail) = all.split_at_mut(b.start);
        (&head[a], &mut tail[..b.len()])
    } else {
        let (head, tail) = all.split_at_mut(a.start);
        (&tail[..a.len()], &mut head[b])
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::threads;
    use super::*;

    #[test]
    fn a_run_that_ends_on_one_rank_ends_on_all() {
        let all = threads(3);
        let run = &|rank: usize| {
            if rank == 1 {
                all[1].abort("rank 1 found no file");
                return String::new();
            }
            let group = Group::new(all[rank].as_ref(), vec![0, 1, 2]);
            group.barrier().expect_err("rank 1 never comes").message
        };
        let given = thread::scope(|scope| {
            [0, 1, 2].map(|rank| scope.spawn(move || run(rank))).map(|rank| rank.join().expect("no rank panics"))
        });
        assert_eq!(given, ["rank 1 found no file", "", "rank 1 found no file"]);
    }
}
