//! One rank of a run: its device, and what it has in common with the others.
//!
//! All that the host holds is equal on all ranks; what a device holds is the rank's own. So states go in and out whole: a
//! rank keeps its part of what it is given, and all ranks send theirs when one of them is to have the whole.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};
use std::thread;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Mesh, Placement, Program, StateId, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::ranks::{Group, Member, pack, threads, unpack};

use crate::calls::Named;

/// A device, and the rank whose part of a program it runs.
pub(crate) struct Rank {
    pub device: Box<dyn Device>,
    pub member: Member,
}

/// What the first rank says when it needs no more states.
const DONE: u64 = u64::MAX;

impl Rank {
    /// The only one.
    pub fn alone(device: Box<dyn Device>) -> Rank {
        Rank { device, member: Member::alone() }
    }

    /// Sets a state and its copies, of which the rank keeps its parts.
    pub fn set(&mut self, program: &Program, id: StateId, whole: &Tensor) {
        if self.member.mesh.is_single() {
            return self.device.set_state(id, whole);
        }
        for id in [id].into_iter().chain(program.copies_of(id)) {
            match placement(program, id) {
                Some(placement) => {
                    self.device.set_part(id, &placement.part(&self.member.mesh, self.member.rank(), whole));
                }
                None => self.device.set_part(id, whole),
            }
        }
    }

    /// The whole of a state. Where ranks have parts of it, all of them call this.
    pub fn get(&self, program: &Program, id: StateId) -> Result<Tensor, Diag> {
        let Some(placement) = placement(program, id) else { return Ok(self.device.state(id)) };
        // A state may be as large as all else, so each form of it goes as the next one comes.
        let parts = self.parts(program, id)?.into_iter().map(|part| unpack(&part).0).collect::<Vec<Tensor>>();
        Ok(placement.whole(&self.member.mesh, &parts))
    }

    /// What all ranks have of a state, as they send it. All of them call this.
    fn parts(&self, program: &Program, id: StateId) -> Result<Vec<Vec<u8>>, Diag> {
        let all = self.member.all();
        all.note(&format!("the parts of `{}`", program.state(id).name));
        let own = pack(&self.device.state(id));
        all.messages(&own)
    }

    /// Does something on the first rank only, which can read whole states there; what it gives, on that rank. The others send
    /// their parts of states meanwhile.
    pub fn on_first<T>(
        &self,
        program: &Program,
        run: impl FnOnce(&Wholes) -> Result<T, Diag>,
    ) -> Result<Option<T>, Diag> {
        if self.member.rank() > 0 {
            loop {
                match self.told(DONE)? {
                    DONE => return Ok(None),
                    id => drop(self.parts(program, StateId(id as u32))?),
                }
            }
        }
        let made = run(&Wholes { rank: self, program })?;
        self.told(DONE)?;
        Ok(Some(made))
    }

    /// What the first rank says to all others.
    fn told(&self, by_first: u64) -> Result<u64, Diag> {
        let (mut told, all) = ([by_first], self.member.all());
        all.note("what the first rank does alone");
        all.broadcast(0, &mut told)?;
        Ok(told[0])
    }
}

/// Whether this holds on any rank. An error, on all of them, where they do not agree on facts, which have names; a rank may
/// lack one.
pub(crate) fn agree(member: &Member, facts: &BTreeMap<String, String>, here: bool) -> Result<bool, Diag> {
    if member.mesh.is_single() {
        return Ok(here);
    }
    let all = member.all();
    all.note("what all ranks must have alike");
    let message = serde_json::to_vec(&(here, facts)).unwrap_or_else(|e| panic!("bug: texts are no JSON: {e}"));
    let read =
        |message: &Vec<u8>| serde_json::from_slice(message).unwrap_or_else(|e| panic!("bug: a rank sent no JSON: {e}"));
    let all: Vec<(bool, BTreeMap<String, String>)> = all.messages(&message)?.iter().map(read).collect();
    for (rank, (_, theirs)) in all.iter().enumerate() {
        for (name, other) in theirs {
            let first = all.iter().position(|(_, facts)| facts.contains_key(name)).unwrap_or(rank);
            let one = &all[first].1[name];
            if one != other {
                let message = format!("ranks differ in {name}: {one} on rank {first}, {other} on rank {rank}");
                return Err(Diag::error(message).help(
                    "all ranks run one pipeline on the same files with one build of dsgc; where they do, a device or \
                     its memory is broken",
                ));
            }
        }
    }
    Ok(all.iter().any(|(here, _)| *here))
}

/// Whether this holds on any rank of a group.
pub(crate) fn any(group: &Group, here: bool) -> Result<bool, Diag> {
    group.note("whether other ranks go on");
    let mut all = vec![0u8; group.size()];
    all[group.at()] = u8::from(here);
    group.all_gather(&mut all, 1)?;
    Ok(all.contains(&1))
}

/// What ranks hold of a state, where it is not all of it.
fn placement(program: &Program, id: StateId) -> Option<&Placement> {
    let state = program.state(id);
    let placement = state.placement.as_ref()?;
    assert!(placement.partial.is_none(), "bug: `{}` is a sum over ranks, which nobody sets or reads", state.name);
    Some(placement)
}

/// Whole states, for the first rank while the others wait for it.
pub(crate) struct Wholes<'a> {
    rank: &'a Rank,
    program: &'a Program,
}

impl Wholes<'_> {
    /// A state; an error if another rank has ended the run meanwhile.
    pub fn get(&self, id: StateId) -> Result<Tensor, Diag> {
        if placement(self.program, id).is_some() {
            self.rank.told(u64::from(id.0))?;
        }
        self.rank.get(self.program, id)
    }
}

/// The parts of a rank among so many rows. Ranks have contiguous shares in their order, as equal as can be, and all of them
/// equally many parts of at most `size` rows, the last of which may have fewer, or none.
pub(crate) fn parts_of(rows: usize, size: usize, group: &Group) -> Vec<Range<usize>> {
    let share = |at: usize| rows * at / group.size();
    let (first, last) = (share(group.at()), share(group.at() + 1));
    let place = |k: usize| (first + k * size).min(last);
    (0..rows.div_ceil(group.size()).div_ceil(size)).map(|k| place(k)..place(k + 1)).collect()
}

/// What all ranks of a group made of their parts, in the order of the rows. Ranks have equally many parts, and the outputs of all
/// parts have the same names.
pub(crate) fn of_all_parts(group: &Group, made: Vec<Named>) -> Result<Vec<Named>, Diag> {
    let Some(first) = made.first().filter(|_| group.size() > 1) else { return Ok(made) };
    let names: Vec<&String> = first.keys().collect();
    let message: Vec<u8> = made.iter().flat_map(|part| part.values()).flat_map(pack).collect();
    let mut all = Vec::new();
    group.note("what other ranks made of their rows");
    for message in group.messages(&message)? {
        let mut rest = message.as_slice();
        for _ in 0..made.len() {
            let mut part = Named::new();
            for &name in &names {
                let (tensor, after) = unpack(rest);
                part.insert(name.clone(), tensor);
                rest = after;
            }
            all.push(part);
        }
    }
    Ok(all)
}

/// Runs all ranks of a mesh in this process, a thread for each; what each gives, in their order, or the error of the one that
/// failed first, which ends the others.
///
/// # Panics
/// If a rank does, once the others have ended.
pub fn on_threads<T: Send, E: Send>(
    mesh: Mesh,
    run: impl Fn(Member) -> Result<T, E> + Sync,
    message: impl Fn(&E) -> String + Sync,
) -> Result<Vec<T>, E> {
    if mesh.is_single() {
        return Ok(vec![run(Member::alone())?]);
    }
    let failed: Mutex<Option<E>> = Mutex::new(None);
    let rank = |member: Member| {
        let transport = member.transport.clone();
        match panic::catch_unwind(AssertUnwindSafe(|| run(member))) {
            Ok(Ok(made)) => Some(made),
            Ok(Err(error)) => {
                let why = message(&error);
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                transport.abort(&why);
                None
            }
            Err(panic) => {
                transport.abort(&format!("rank {} has ended by a bug: {}", transport.rank(), said(panic.as_ref())));
                panic::resume_unwind(panic)
            }
        }
    };
    let made: Vec<thread::Result<Option<T>>> = thread::scope(|scope| {
        let ranks = threads(mesh.ranks()).into_iter().map(|transport| Member { mesh, transport });
        let started: Vec<_> = ranks.map(|member| scope.spawn(|| rank(member))).collect();
        started.into_iter().map(|rank| rank.join()).collect()
    });
    let made: Vec<Option<T>> =
        made.into_iter().map(|rank| rank.unwrap_or_else(|panic| panic::resume_unwind(panic))).collect();
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(made.into_iter().map(|made| made.expect("every rank that did not fail gave something")).collect()),
    }
}

/// The message of a panic.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Shares are in order and cover all rows, and no part is too large.
    #[test]
    fn every_rank_has_equally_many_parts() {
        for (rows, size, ranks) in (0..14).flat_map(|rows| (1..6).flat_map(move |s| (1..5).map(move |r| (rows, s, r))))
        {
            let all = threads(ranks);
            let of = |rank: usize| {
                let member =
                    Member { mesh: Mesh { data: ranks, ..Mesh::default() }, transport: Arc::clone(&all[rank]) };
                parts_of(rows, size, &member.all())
            };
            let parts: Vec<Vec<Range<usize>>> = (0..ranks).map(of).collect();
            assert!(parts.iter().all(|own| own.len() == parts[0].len()));
            let flat: Vec<Range<usize>> = parts.into_iter().flatten().collect();
            assert!(flat.iter().all(|part| part.len() <= size), "{flat:?}");
            assert_eq!(flat.into_iter().flatten().collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_first_error_ends_all_ranks() {
        let mesh = Mesh { data: 3, ..Mesh::default() };
        let run = |member: Member| match member.rank() {
            1 => Err(Diag::error("rank 1 found no file")),
            _ => member.all().barrier(),
        };
        let failed = on_threads(mesh, run, |diag| diag.message.clone()).expect_err("rank 1 fails");
        assert_eq!(failed.message, "rank 1 found no file");
    }

    #[test]
    fn a_panic_ends_all_ranks() {
        let mesh = Mesh { data: 3, ..Mesh::default() };
        let run = |member: Member| {
            assert_ne!(member.rank(), 2, "rank 2 is wrong");
            member.all().barrier()
        };
        let panic = panic::catch_unwind(AssertUnwindSafe(|| on_threads(mesh, run, |diag| diag.message.clone())));
        assert!(said(panic.expect_err("rank 2 panics").as_ref()).contains("rank 2 is wrong"));
    }
}
