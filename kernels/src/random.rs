//! Random numbers: threefry2x32 with 20 rounds, and what is drawn from its words.
//!
//! Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). A block cipher of the counter
//! under the key: no state, so an element's number does not depend on who draws it or when. All devices share these
//! functions; one that computes in another width rounds their result.
//!
//! A key is either folded or drawn from: the counter of [`fold`] and the counters of elements are one space.

/// A key: two words.
pub type Key = [u32; 2];

/// The cipher: two random words from a key and a counter.
pub fn threefry2x32(key: Key, counter: [u32; 2]) -> [u32; 2] {
    // Rotations and parity constant are the algorithm's own, chosen by its authors for diffusion.
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    const PARITY: u32 = 0x1BD1_1BDA;
    let schedule = [key[0], key[1], key[0] ^ key[1] ^ PARITY];
    let [mut a, mut b] = [counter[0].wrapping_add(schedule[0]), counter[1].wrapping_add(schedule[1])];
    for group in 0..5usize {
        for rotation in ROTATIONS[group % 2] {
            a = a.wrapping_add(b);
            b = b.rotate_left(rotation) ^ a;
        }
        a = a.wrapping_add(schedule[(group + 1) % 3]);
        b = b.wrapping_add(schedule[(group + 2) % 3]).wrapping_add(group as u32 + 1);
    }
    [a, b]
}

/// Another key from a key and a number.
pub fn fold(key: Key, data: u64) -> Key {
    threefry2x32(key, [(data >> 32) as u32, data as u32])
}

/// The words of an element: the counter is (first coordinate, linear index of the rest), so cutting a tensor along
/// its first dim leaves every number unchanged. `inner` is the product of all extents but the first.
pub fn words(key: Key, linear: usize, inner: usize) -> [u32; 2] {
    let inner = inner.max(1);
    threefry2x32(key, [(linear / inner) as u32, (linear % inner) as u32])
}

/// The words of an element of a row that has a number, wherever the row stands; `rest` is the linear index in the row.
pub fn row_words(key: Key, row: i32, rest: usize) -> [u32; 2] {
    threefry2x32(key, [row as u32, rest as u32])
}

/// The top 24 bits of a word as a number of `[0, 1)`: as many as single precision holds, so that every width starts
/// from the same number.
fn unit(word: u32) -> f64 {
    f64::from(word >> 8) / f64::from(1 << 24)
}

/// A number of `[low, high)`, evenly distributed.
pub fn uniform(words: [u32; 2], low: f64, high: f64) -> f64 {
    let x = low + unit(words[0]) * (high - low);
    // Rounding may reach the bound.
    if x < high { x } else { high.next_down().max(low) }
}

/// As [`uniform`], rounded to single precision and still below `high`.
pub fn uniform_f32(words: [u32; 2], low: f64, high: f64) -> f32 {
    let x = uniform(words, low, high) as f32;
    if f64::from(x) < high { x } else { x.next_down().max(low as f32) }
}

/// A normally distributed number, by Box and Muller (1958).
pub fn normal(words: [u32; 2], mean: f64, std: f64) -> f64 {
    // 1 - u lies in (0, 1], where the logarithm is finite.
    let radius = (-2.0 * (1.0 - unit(words[0])).ln()).sqrt();
    mean + std * radius * (std::f64::consts::TAU * unit(words[1])).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threefry_gives_its_published_answers() {
        // Random123's kat_vectors for `threefry2x32 20`: counter, key, result.
        const KNOWN: [[[u32; 2]; 3]; 3] = [
            [[0, 0], [0, 0], [0x6b20_0159, 0x99ba_4efe]],
            [[u32::MAX, u32::MAX], [u32::MAX, u32::MAX], [0x1cb9_96fc, 0xbb00_2be7]],
            [[0x243f_6a88, 0x85a3_08d3], [0x1319_8a2e, 0x0370_7344], [0xc492_3a9c, 0x483d_f7a0]],
        ];
        for [counter, key, expected] in KNOWN {
            assert_eq!(threefry2x32(key, counter), expected);
        }
    }

    #[test]
    fn folding_gives_other_keys() {
        let key = [1, 2];
        assert_ne!(fold(key, 0), fold(key, 1));
        assert_ne!(fold(key, 1), fold(key, 1 << 32));
        assert_eq!(fold(key, 7), threefry2x32(key, [0, 7]));
    }

    #[test]
    fn numbers_have_their_moments() {
        const N: usize = 20_000;
        let mean_and_variance = |draw: &dyn Fn(usize) -> f64| {
            let all: Vec<f64> = (0..N).map(draw).collect();
            let mean = all.iter().sum::<f64>() / N as f64;
            (mean, all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / N as f64)
        };
        let (mean, variance) = mean_and_variance(&|i| normal(words([3, 4], i, 10), 2.0, 3.0));
        assert!((mean - 2.0).abs() < 0.1 && (variance - 9.0).abs() < 0.3, "{mean} {variance}");
        let (mean, variance) = mean_and_variance(&|i| uniform(words([3, 4], i, 10), -1.0, 3.0));
        assert!((mean - 1.0).abs() < 0.05 && (variance - 16.0 / 12.0).abs() < 0.05, "{mean} {variance}");
    }

    #[test]
    fn uniform_numbers_stay_below_their_bound() {
        let most = [u32::MAX, 0];
        assert!(uniform(most, 1.0, 2.0) < 2.0 && uniform_f32(most, 1.0, 2.0) < 2.0);
        assert!(uniform_f32(most, 1e8, 1e8 + 16.0) < 1e8 + 16.0);
        assert_eq!(uniform([0, 0], 1.0, 2.0), 1.0);
    }
}
