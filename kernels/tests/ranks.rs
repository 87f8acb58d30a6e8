//! Ranks of one process, beside what every transport must do. Those of MPI are in `tests/mpi.rs` of the program.

#[path = "ranks/suite.rs"]
mod suite;

use std::thread;

use dsgc_kernels::ranks::{Group, threads};

/// Runs a function on every rank of a process, and gives what each gave.
fn on_ranks<T: Send>(ranks: usize, run: impl Fn(&Group) -> T + Sync) -> Vec<T> {
    let all = threads(ranks);
    thread::scope(|scope| {
        let run = &run;
        let started: Vec<_> = all
            .iter()
            .map(|transport| scope.spawn(move || run(&Group::new(transport.as_ref(), (0..ranks).collect()))))
            .collect();
        started.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

#[test]
fn every_collective_gives_every_rank_its_due() {
    for ranks in [1, 2, 3, 5] {
        on_ranks(ranks, suite::check);
    }
}

#[test]
fn sums_are_equal_on_all_ranks() {
    let all = on_ranks(3, suite::bits);
    assert!(all.iter().all(|bits| *bits == all[0]));
}
