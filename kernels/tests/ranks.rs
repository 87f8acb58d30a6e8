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

/// Several arrays in one message have the bits, and the bytes, that each has alone: of uneven lengths, of fewer elements than
/// there are ranks, of none.
#[test]
fn arrays_sent_together_are_what_they_are_apart() {
    const LENS: [usize; 5] = [7, 1, 0, 12, 5];
    for ranks in [1, 2, 3, 5] {
        on_ranks(ranks, |group| {
            let (others, at) = (group.sent(), group.at() as f32);
            let numbers = |len: usize| -> Vec<f32> { (0..len).map(|i| (at + 1.3).powi(i as i32 % 5) / 3.0).collect() };
            let part = |len: usize| len.div_ceil(ranks);
            let own: Vec<Vec<f32>> = LENS.iter().map(|&len| numbers(len)).collect();
            let mut work = vec![f32::NAN; 2 * LENS.iter().sum::<usize>()];
            let bits = |all: &[Vec<f32>]| -> Vec<Vec<u32>> {
                all.iter().map(|array| array.iter().map(|x| x.to_bits()).collect()).collect()
            };
            let parts_of = |group: &Group| group.sent() - others;
            let mut apart: [Vec<Vec<f32>>; 3] = Default::default();
            for array in &own {
                let mut sum = array.clone();
                group.all_reduce(&mut sum).expect("all ranks are there");
                apart[0].push(sum);
                let len = part(array.len());
                let (mut of_sum, mut ring) = (vec![0.0; len], vec![0.0; len]);
                group.reduce_scatter(array, &mut of_sum, &mut ring).expect("all ranks are there");
                apart[1].push(of_sum);
                let mut all = array.clone();
                group.all_gather(&mut all, len).expect("all ranks are there");
                apart[2].push(all);
            }
            let sent = parts_of(group);
            let mut together: [Vec<Vec<f32>>; 3] =
                [own.clone(), own.iter().map(|a| vec![0.0; part(a.len())]).collect(), own.clone()];
            let [sums, parts, wholes] = &mut together;
            let mut sums: Vec<&mut [f32]> = sums.iter_mut().map(Vec::as_mut_slice).collect();
            group.all_reduce_each(&mut sums, &mut work).expect("all ranks are there");
            let given: Vec<&[f32]> = own.iter().map(Vec::as_slice).collect();
            let mut parts: Vec<&mut [f32]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
            group.reduce_scatter_each(&given, &mut parts, &mut work).expect("all ranks are there");
            let mut wholes: Vec<&mut [f32]> = wholes.iter_mut().map(Vec::as_mut_slice).collect();
            let lens: Vec<usize> = LENS.iter().map(|&len| part(len)).collect();
            group.all_gather_each(&mut wholes, &lens, &mut work).expect("all ranks are there");
            assert_eq!(parts_of(group), 2 * sent);
            for (together, apart) in together.iter().zip(&apart) {
                assert_eq!(bits(together), bits(apart), "{ranks} ranks");
            }
        });
    }
}
