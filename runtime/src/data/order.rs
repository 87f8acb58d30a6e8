//! Which rows a stage takes, and in which order.
//!
//! Splits and shuffles repeat DeepSpeed-Chat's to the row, which are numpy's legacy shuffle and torch's `randperm`; both
//! draw from MT19937 (Matsumoto and Nishimura 1998). A run here and a run there then see the same rows.

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Source;

/// Cuts `rows` into those to train on and those held out, each in the order of `rows`.
pub(super) fn hold_out(
    source: &Source,
    share: f64,
    seed: u64,
    rows: &[usize],
) -> Result<(Vec<usize>, Vec<usize>), Diag> {
    if !(share > 0.0 && share < 1.0) {
        return Err(Diag::error(format!("found a held-out share of {share}, expected one between 0 and 1"))
            .label(source.span, "")
            .help("write e.g. `eval: 0.05`, or the path of a file with held-out rows"));
    }
    let shuffled = numpy_shuffle(&mut seeded(seed), rows.len());
    let cut = bounds(&[1.0 - share, share], rows.len())[1];
    let part = |numbers: &[usize]| {
        let mut numbers = numbers.to_vec();
        numbers.sort_unstable();
        numbers.into_iter().map(|n| rows[n]).collect::<Vec<_>>()
    };
    let (train, eval) = (part(&shuffled[..cut]), part(&shuffled[cut..]));
    if train.is_empty() || eval.is_empty() {
        let what = if eval.is_empty() { "held out" } else { "left to train on" };
        return Err(Diag::error(format!(
            "with a held-out share of {share}, none of the {} rows of `{}` is {what}",
            rows.len(),
            source.path
        ))
        .label(source.span, "")
        .help("name another share, or a file with held-out rows"));
    }
    Ok((train, eval))
}

/// The part of `rows` that the source's `split` gives to this stage; all of them without one.
pub(super) fn take(source: &Source, seed: u64, rows: Vec<usize>) -> Result<Vec<usize>, Diag> {
    let Some(split) = &source.split else { return Ok(rows) };
    let sound = split.parts.iter().all(|p| p.is_finite() && *p >= 0.0) && split.parts.iter().sum::<f64>() > 0.0;
    if !sound || split.part >= split.parts.len() {
        return Err(Diag::error(format!(
            "found part {} of the split {:?}, expected proportions from 0 and one of their positions, from 0",
            split.part, split.parts
        ))
        .label(source.span, ""));
    }
    let bounds = bounds(&split.parts, rows.len());
    let numbers = &numpy_shuffle(&mut seeded(seed), rows.len())[bounds[split.part]..bounds[split.part + 1]];
    if numbers.is_empty() {
        return Err(Diag::error(format!(
            "part {} of the split {:?} of {} rows has no row",
            split.part,
            split.parts,
            rows.len()
        ))
        .label(source.span, "")
        .help("give it a larger proportion, or more rows"));
    }
    Ok(numbers.iter().map(|&n| rows[n]).collect())
}

/// The training order of an epoch; see [`super::Dataset::epoch`].
pub(super) fn of_epoch(seed: u64, epoch: u64, size: usize) -> Vec<usize> {
    let words = [seed as u32, (seed >> 32) as u32, epoch as u32, (epoch >> 32) as u32];
    numpy_shuffle(&mut Mt19937::from_words(&words), size)
}

/// The order of a table's rows in a loop over its minibatches, which are counted from 0: numpy's shuffle as of
/// [`of_epoch`], seeded with a fifth word, so that no loop has the order of an epoch.
pub(crate) fn of_loop(seed: u64, count: u64, size: usize) -> Vec<usize> {
    let words = [seed as u32, (seed >> 32) as u32, count as u32, (count >> 32) as u32, 1];
    numpy_shuffle(&mut Mt19937::from_words(&words), size)
}

/// `torch.randperm(size)` after `manual_seed(seed)`, for fewer than 2^32 / 20 rows: what torch's
/// `DistributedSampler` shuffles with.
pub(super) fn torch_randperm(seed: u32, size: usize) -> Vec<usize> {
    let mut random = Mt19937::new(seed);
    let mut order: Vec<usize> = (0..size).collect();
    for i in 0..size.saturating_sub(1) {
        let z = random.next() as usize % (size - i);
        order.swap(i, i + z);
    }
    order
}

/// Where the parts of a split begin and end.
///
/// Each part's size is rounded, half to even, and the surplus over `size` is taken off every boundary, not only off the
/// last, as in DeepSpeed-Chat; boundaries stay within the rows, which matters only for splits of a handful of them.
fn bounds(parts: &[f64], size: usize) -> Vec<usize> {
    let sum: f64 = parts.iter().sum();
    let mut bounds = vec![0i64];
    for part in parts {
        let rows = (part / sum * size as f64).round_ties_even() as i64;
        bounds.push(bounds[bounds.len() - 1] + rows);
    }
    let surplus = bounds[bounds.len() - 1] - size as i64;
    for bound in &mut bounds[1..] {
        *bound = (*bound - surplus).clamp(0, size as i64);
    }
    bounds.into_iter().map(|b| b as usize).collect()
}

/// What `numpy.random.RandomState(..).shuffle` makes of `0..size`.
fn numpy_shuffle(random: &mut Mt19937, size: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..size).collect();
    for i in (1..size).rev() {
        let mask = usize::MAX >> i.leading_zeros();
        let j = loop {
            let draw = random.next() as usize & mask;
            if draw <= i {
                break draw;
            }
        };
        order.swap(i, j);
    }
    order
}

/// numpy's `RandomState(seed)`; seeds over 32 bits, which numpy refuses, are `RandomState([low word, high word])`.
fn seeded(seed: u64) -> Mt19937 {
    match u32::try_from(seed) {
        Ok(seed) => Mt19937::new(seed),
        Err(_) => Mt19937::from_words(&[seed as u32, (seed >> 32) as u32]),
    }
}

const N: usize = 624;

/// The Mersenne Twister with 32-bit words. The `rand` crates have it as well, but not numpy's seeding by one integer and
/// by a list side by side, which is what has to be repeated here.
struct Mt19937 {
    state: [u32; N],
    at: usize,
}

impl Mt19937 {
    /// Seeded by one word (`init_genrand`, after Knuth).
    fn new(seed: u32) -> Mt19937 {
        let mut state = [seed; N];
        for i in 1..N {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, at: N }
    }

    /// Seeded by a list of words (`init_by_array`).
    fn from_words(words: &[u32]) -> Mt19937 {
        let mut random = Mt19937::new(19_650_218);
        let state = &mut random.state;
        let mut i = 1;
        let mut step = |factor: u32, change: &dyn Fn(u32, usize) -> u32| {
            let last = state[i - 1];
            state[i] = change(state[i] ^ (last ^ (last >> 30)).wrapping_mul(factor), i);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        };
        for k in 0..N.max(words.len()) {
            let j = k % words.len();
            step(1_664_525, &|x, _| x.wrapping_add(words[j]).wrapping_add(j as u32));
        }
        for _ in 1..N {
            step(1_566_083_941, &|x, i| x.wrapping_sub(i as u32));
        }
        state[0] = 1 << 31;
        random
    }

    fn next(&mut self) -> u32 {
        if self.at == N {
            for i in 0..N {
                let y = (self.state[i] & (1 << 31)) | (self.state[(i + 1) % N] & !(1 << 31));
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % N] ^ (y >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsgc_ir::stage::Split;
    use sha2::{Digest, Sha256};

    fn shuffled(seed: u64, size: usize) -> Vec<usize> {
        numpy_shuffle(&mut seeded(seed), size)
    }

    #[test]
    fn numpy_shuffles() {
        assert_eq!(shuffled(1234, 10), [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]);
        assert_eq!(shuffled(1234, 20), [3, 13, 2, 16, 14, 5, 4, 0, 8, 18, 17, 11, 10, 9, 7, 1, 19, 12, 6, 15]);
        let all = shuffled(1234, 76256);
        assert_eq!(all[..8], [52824, 66562, 19769, 48382, 52418, 68085, 72559, 42520]);
        assert_eq!((all[15252], all[45754], all[76255]), (68187, 23562, 58067));
        let bytes: Vec<u8> = all.iter().flat_map(|&i| (i as u32).to_le_bytes()).collect();
        let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digest, "69e7d5425c26ee002dbbb808dc313406dad43e3862f8bbea633f063b1e1f4bb3");
    }

    #[test]
    fn torch_permutations() {
        assert_eq!(torch_randperm(0, 10), [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]);
        assert_eq!(torch_randperm(0, 16), [12, 10, 9, 6, 11, 8, 13, 5, 2, 14, 15, 0, 4, 3, 7, 1]);
        assert_eq!(torch_randperm(0, 58879)[..5], [33037, 10252, 42968, 38675, 56342]);
        assert!(torch_randperm(0, 0).is_empty());
    }

    #[test]
    fn lists_of_words_seed_as_in_the_reference() {
        // The first lines of mt19937ar.out, the output published with the algorithm.
        let mut random = Mt19937::from_words(&[0x123, 0x234, 0x345, 0x456]);
        let expect = [1067595299, 955945823, 477289528, 4107218783, 4228976476];
        assert_eq!(expect.map(|_| random.next()), expect);
    }

    #[test]
    fn split_boundaries() {
        let check = |parts: &[f64], size, expect: &[usize]| assert_eq!(bounds(parts, size), expect);
        check(&[2.0, 4.0, 4.0], 5, &[0, 1, 3, 5]);
        check(&[2.0, 4.0, 4.0], 7, &[0, 1, 4, 7]);
        check(&[2.0, 4.0, 4.0], 11, &[0, 3, 7, 11]);
        check(&[2.0, 4.0, 4.0], 13, &[0, 3, 8, 13]);
        check(&[2.0, 4.0, 4.0], 5103, &[0, 1021, 3062, 5103]);
        check(&[2.0, 4.0, 4.0], 76256, &[0, 15252, 45754, 76256]);
        check(&[9.0, 1.0], 5, &[0, 5, 5]);
        check(&[9.0, 1.0], 33143, &[0, 29829, 33143]);
        // Where DeepSpeed-Chat's boundaries would leave the rows.
        check(&[1.0; 10], 6, &[0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn epochs_differ_and_repeat() {
        let (first, second) = (of_epoch(7, 0, 50), of_epoch(7, 1, 50));
        assert_ne!(first, second);
        assert_eq!(first, of_epoch(7, 0, 50));
        assert_ne!(first, of_epoch(8, 0, 50));
        let mut sorted = second;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }

    fn split(parts: &[f64], part: usize) -> Source {
        Source { split: Some(Split { parts: parts.to_vec(), part }), ..Source::default() }
    }

    #[test]
    fn parts_are_slices_of_one_shuffle() {
        let parts: Vec<usize> =
            (0..3).flat_map(|p| take(&split(&[2.0, 4.0, 4.0], p), 1234, (0..10).collect()).unwrap()).collect();
        assert_eq!(parts, [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]);
    }

    #[test]
    fn empty_parts_and_senseless_shares_are_errors() {
        let error = |source: Source| take(&source, 0, (0..5).collect()).unwrap_err().message;
        assert_eq!(error(split(&[9.0, 1.0], 1)), "part 1 of the split [9.0, 1.0] of 5 rows has no row");
        assert!(error(split(&[1.0], 1)).starts_with("found part 1 of the split [1.0]"));
        assert!(error(split(&[f64::NAN], 0)).starts_with("found part 0 of the split [NaN]"));
        let held = |share| hold_out(&Source::default(), share, 0, &[0, 1, 2, 3]).map_err(|e| e.message);
        assert_eq!(held(0.5), held(0.5));
        assert_eq!(held(0.25).map(|(t, e)| (t.len(), e.len())), Ok((3, 1)));
        assert!(held(0.01).unwrap_err().contains("none of the 4 rows of `` is held out"));
        assert!(held(1.5).unwrap_err().contains("found a held-out share of 1.5"));
    }
}
