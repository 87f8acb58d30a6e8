//! What every transport must do, as one rank sees it.

use dsgc_kernels::ranks::Group;

/// Numbers of a rank: empty ones, fewer than ranks, uneven ones, and several chunks of a transport that cuts messages.
const LENGTHS: [usize; 5] = [0, 1, 7, 12, 800_001];

/// A number that says whose and which it is.
fn number(rank: usize, i: usize) -> i32 {
    (rank * 1000 + i) as i32
}

/// Every collective gives this rank its due. All ranks of the group call this.
pub fn check(group: &Group) {
    let (at, ranks) = (group.at(), group.size());
    for len in LENGTHS {
        let own = |rank: usize| -> Vec<i32> { (0..len).map(|i| number(rank, i)).collect() };
        let sum = |i: usize| (0..ranks).map(|rank| number(rank, i)).sum::<i32>();
        let part = len.div_ceil(ranks);
        let case = format!("{ranks} ranks, {len}");

        let mut all = own(at);
        group.all_reduce(&mut all).expect("nobody ends the run");
        assert!(all.iter().enumerate().all(|(i, &x)| x == sum(i)), "{case}");

        let mut scattered = vec![-1; part];
        group.reduce_scatter(&own(at), &mut scattered, &mut vec![-1; part]).expect("nobody ends the run");
        let expected = (at * part..(at + 1) * part).map(|i| if i < len { sum(i) } else { 0 });
        assert!(scattered.into_iter().eq(expected), "{case}");

        let mut gathered = vec![-1; len * ranks];
        gathered[at * len..(at + 1) * len].copy_from_slice(&own(at));
        group.all_gather(&mut gathered, len).expect("nobody ends the run");
        assert!(gathered.into_iter().eq((0..ranks).flat_map(own)), "{case}");

        // The part of a whole, whose last parts are short.
        let mut cut: Vec<i32> = (0..len).map(|i| if i / part.max(1) == at { number(9, i) } else { -1 }).collect();
        group.all_gather(&mut cut, part).expect("nobody ends the run");
        assert!(cut.into_iter().eq((0..len).map(|i| number(9, i))), "{case}");

        let to_all: Vec<i32> = (0..ranks).flat_map(|to| vec![number(at, to); part]).collect();
        let mut from_all = vec![-1; to_all.len()];
        group.all_to_all(&to_all, &mut from_all).expect("nobody ends the run");
        assert!(from_all.into_iter().eq((0..ranks).flat_map(|from| vec![number(from, at); part])), "{case}");

        let mut told = own(at);
        group.broadcast(ranks - 1, &mut told).expect("nobody ends the run");
        assert!(told == own(ranks - 1), "{case}");

        let messages = group.messages(&vec![at as u8; at * len]).expect("nobody ends the run");
        assert!(messages.into_iter().eq((0..ranks).map(|rank| vec![rank as u8; rank * len])), "{case}");
        group.barrier().expect("nobody ends the run");
    }
    if ranks > 1 {
        check_posts(group);
    }
}

/// Everybody posts to the next one before anybody receives, and messages come in their order.
fn check_posts(group: &Group) {
    let (at, ranks) = (group.at(), group.size());
    let message = |from: usize, len: usize| (0..3 * len).map(|i| (from * 7 + i) as u8).collect::<Vec<u8>>();
    for _ in 0..2 {
        for len in LENGTHS {
            group.post((at + 1) % ranks, message(at, len)).expect("nobody ends the run");
        }
        let from = (at + ranks - 1) % ranks;
        for len in LENGTHS {
            assert!(group.receive(from).expect("nobody ends the run") == message(from, len), "{ranks} ranks, {len}");
        }
    }
    group.barrier().expect("nobody ends the run");
}

/// Bits of sums, which depend on the order of additions: it must be the same on every transport.
///
/// Parts of a sum are the sum's parts to the bit, whatever the collective.
pub fn bits(group: &Group) -> Vec<u32> {
    let mut bits = Vec::new();
    for part in [1, 4, 250_000] {
        let len = part * group.size();
        let own: Vec<f32> = (0..len).map(|i| ((group.at() * len + i) as f32 * 0.7).sin()).collect();
        let (mut all, mut scattered) = (own.clone(), vec![0.0; part]);
        group.all_reduce(&mut all).expect("nobody ends the run");
        group.reduce_scatter(&own, &mut scattered, &mut vec![0.0; part]).expect("nobody ends the run");
        assert!(scattered == all[group.at() * part..(group.at() + 1) * part], "parts of {part}");
        bits.extend(all.into_iter().map(f32::to_bits));
    }
    bits
}
