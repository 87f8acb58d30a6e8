//! Collectives of messages between two ranks, by rings (Patarasuk and Yuan 2009): every rank sends to the next one and
//! receives from the one before, so of `n` ranks each sends `(n - 1) / n` of the data for a part of the sum or for all parts, the
//! least that can be.
//!
//! A sum's part is added up around the ring from the rank behind its owner to the owner, on every transport alike.

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
}

impl<'a> Group<'a> {
    /// The group of these ranks, in this order.
    ///
    /// # Panics
    /// If this rank is not among them.
    pub fn new(transport: &'a dyn Transport, ranks: Vec<usize>) -> Group<'a> {
        let at = ranks.iter().position(|&rank| rank == transport.rank()).expect("a rank is in its own groups");
        Group { transport, ranks, at }
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.ranks.len()
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
        self.transport.exchange(next, cast_slice(message), before, cast_slice_mut(place))
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
            self.pass(&sum[..out], &mut next[..own.len()])?;
            next[own.len()..].fill(T::zeroed());
            next.iter_mut().zip(own).for_each(|(sum, &x)| *sum = sum.plus(x));
            std::mem::swap(&mut sum, &mut next);
        }
        Ok(())
    }

    /// The sum, in the place of this rank's numbers. `work` has at least `ceil(values.len() / size)` elements.
    pub fn all_reduce<T: Number>(&self, values: &mut [T], work: &mut [T]) -> Result<(), Diag> {
        let (len, all) = (values.len().div_ceil(self.size()), values.len());
        let of = |at: usize| (at * len).min(all)..((at + 1) * len).min(all);
        for step in 1..self.size() {
            let (out, own) = (of(self.before(step)), of(self.before(step + 1)));
            let received = &mut work[..own.len()];
            self.pass(&values[out], received)?;
            values[own].iter_mut().zip(received).for_each(|(sum, &mut x)| *sum = x.plus(*sum));
        }
        for step in 0..self.size() - 1 {
            let (out, into) = (of(self.before(step)), of(self.before(step + 1)));
            let received = &mut work[..into.len()];
            self.pass(&values[out], received)?;
            values[into].copy_from_slice(received);
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

    /// Runs a function on every rank of a process, and gives what each gave.
    fn on_ranks<T: Send>(ranks: usize, run: impl Fn(Group) -> T + Sync) -> Vec<T> {
        let all = threads(ranks);
        thread::scope(|scope| {
            let run = &run;
            let started: Vec<_> = all
                .iter()
                .map(|transport| scope.spawn(move || run(Group::new(transport.as_ref(), (0..ranks).collect()))))
                .collect();
            started.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
        })
    }

    /// A number that says whose and which it is.
    fn number(rank: usize, i: usize) -> i32 {
        (rank * 1000 + i) as i32
    }

    #[test]
    fn every_collective_gives_every_rank_its_due() {
        for (ranks, len) in [1, 2, 3, 5].into_iter().flat_map(|ranks| [0, 1, 7, 12].map(|len| (ranks, len))) {
            let own = |rank: usize| -> Vec<i32> { (0..len).map(|i| number(rank, i)).collect() };
            let sum = |i: usize| (0..ranks).map(|rank| number(rank, i)).sum::<i32>();
            let part = len.div_ceil(ranks);
            let given = on_ranks(ranks, |group| {
                let at = group.at();
                let (mut all, mut scattered) = (own(at), vec![-1; part]);
                group.all_reduce(&mut all, &mut vec![0; part]).expect("nobody ends the run");
                group.reduce_scatter(&own(at), &mut scattered, &mut vec![-1; part]).expect("nobody ends the run");
                let mut gathered = vec![-1; len * ranks];
                gathered[at * len..(at + 1) * len].copy_from_slice(&own(at));
                group.all_gather(&mut gathered, len).expect("nobody ends the run");
                // The part of a whole, whose last parts are short.
                let mut cut: Vec<i32> =
                    (0..len).map(|i| if i / part.max(1) == at { number(9, i) } else { -1 }).collect();
                group.all_gather(&mut cut, part).expect("nobody ends the run");
                assert_eq!(cut, (0..len).map(|i| number(9, i)).collect::<Vec<_>>());
                let to_all: Vec<i32> = (0..ranks).flat_map(|to| vec![number(at, to); part]).collect();
                let mut from_all = vec![-1; to_all.len()];
                group.all_to_all(&to_all, &mut from_all).expect("nobody ends the run");
                let mut told = own(at);
                group.broadcast(ranks - 1, &mut told).expect("nobody ends the run");
                let messages = group.messages(&vec![at as u8; at * len]).expect("nobody ends the run");
                group.barrier().expect("nobody ends the run");
                (all, scattered, gathered, from_all, told, messages)
            });
            for (at, (all, scattered, gathered, from_all, told, messages)) in given.into_iter().enumerate() {
                assert_eq!(all, (0..len).map(sum).collect::<Vec<_>>(), "{ranks} ranks, {len}");
                let expected = (at * part..(at + 1) * part).map(|i| if i < len { sum(i) } else { 0 });
                assert_eq!(scattered, expected.collect::<Vec<_>>(), "{ranks} ranks, {len}");
                assert_eq!(gathered, (0..ranks).flat_map(own).collect::<Vec<_>>());
                assert_eq!(from_all, (0..ranks).flat_map(|from| vec![number(from, at); part]).collect::<Vec<_>>());
                assert_eq!(told, own(ranks - 1));
                assert_eq!(messages, (0..ranks).map(|rank| vec![rank as u8; rank * len]).collect::<Vec<_>>());
            }
        }
    }

    /// Floats are added in one order whatever the collective, so parts of a sum are the sum's parts to the bit.
    #[test]
    fn a_part_of_a_sum_is_the_sums_part() {
        let own = |rank: usize| -> Vec<f32> { (0..12).map(|i| ((rank * 12 + i) as f32 * 0.7).sin()).collect() };
        let given = on_ranks(3, |group| {
            let (mut all, mut part) = (own(group.at()), vec![0.0; 4]);
            group.all_reduce(&mut all, &mut [0.0; 4]).expect("nobody ends the run");
            group.reduce_scatter(&own(group.at()), &mut part, &mut [0.0; 4]).expect("nobody ends the run");
            (all, part)
        });
        for (at, (all, part)) in given.iter().enumerate() {
            assert_eq!(all, &given[0].0);
            assert_eq!(part[..], all[at * 4..(at + 1) * 4]);
        }
    }

    #[test]
    fn a_run_that_ends_on_one_rank_ends_on_all() {
        let given = on_ranks(3, |group| {
            if group.at() == 1 {
                group.transport.abort("rank 1 found no file");
                return String::new();
            }
            group.barrier().expect_err("rank 1 never comes").message
        });
        assert_eq!(given, ["rank 1 found no file", "", "rank 1 found no file"]);
    }
}
