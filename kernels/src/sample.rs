//! Choosing a token by its probability: one function for all devices that compute on the host.

use dsgc_ir::stage::Sampling;

use crate::random::{self, Key};

/// The token for a row of logits.
///
/// Temperature 0 takes the most likely token, of equal ones the first. Otherwise the probabilities are
/// `softmax(logits / temperature)` in double precision, of which `top_k` and then `top_p` keep the most likely tokens
/// (of equal ones the first; at least one), and a number in `[0, 1)` drawn for (`row`, `place`) finds the token by the
/// running sum over the kept ones in the order of their ids. So a token depends on its own row only.
pub fn choose(
    logits: impl ExactSizeIterator<Item = f64>,
    how: &Sampling,
    key: Key,
    row: i32,
    place: i32,
) -> Result<i32, String> {
    let logits: Vec<f64> = logits.collect();
    if let Some(bad) = logits.iter().find(|x| !x.is_finite()) {
        return Err(format!("found the logit {bad} in row {row}, expected finite numbers"));
    }
    let Some(best) = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a }) else {
        return Err("found no logits to choose from".into());
    };
    if how.temperature == 0.0 {
        return Ok(best as i32);
    }
    let mut weights: Vec<f64> = logits.iter().map(|x| ((x - logits[best]) / how.temperature).exp()).collect();
    if how.top_k > 0 || how.top_p < 1.0 {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        // Stable: of equal ones the first stay first.
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        if how.top_k > 0 {
            order.truncate(how.top_k);
        }
        if how.top_p < 1.0 {
            let all: f64 = order.iter().map(|&i| weights[i]).sum();
            let mut sum = 0.0;
            let enough = order.iter().position(|&i| {
                sum += weights[i];
                sum >= how.top_p * all
            });
            order.truncate(enough.map_or(order.len(), |last| last + 1));
        }
        let mut kept = vec![false; weights.len()];
        order.iter().for_each(|&i| kept[i] = true);
        for (weight, kept) in weights.iter_mut().zip(kept) {
            if !kept {
                *weight = 0.0;
            }
        }
    }
    let all: f64 = weights.iter().sum();
    let wanted = random::uniform(random::threefry2x32(key, [row as u32, place as u32]), 0.0, 1.0) * all;
    let mut sum = 0.0;
    let mut last = best;
    for (i, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        sum += weight;
        last = i;
        if wanted < sum {
            break;
        }
    }
    Ok(last as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(logits: &[f64], temperature: f64, top_k: usize, top_p: f64, row: i32) -> i32 {
        let how = Sampling { temperature, top_k, top_p };
        choose(logits.iter().copied(), &how, [1, 2], row, 7).unwrap()
    }

    #[test]
    fn greedy_takes_the_first_of_equal_ones() {
        assert_eq!(draw(&[0.0, 3.0, 3.0], 0.0, 0, 1.0, 0), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        const N: i32 = 20_000;
        let logits = [1.0f64.ln(), 2.0f64.ln(), 5.0f64.ln(), 2.0f64.ln()];
        let shares = |top_k, top_p| {
            let mut counts = [0; 4];
            (0..N).for_each(|row| counts[draw(&logits, 1.0, top_k, top_p, row) as usize] += 1);
            counts.map(|n| f64::from(n) / f64::from(N))
        };
        let close = |found: [f64; 4], expected: [f64; 4]| {
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 0.015), "{found:?}, expected {expected:?}");
        };
        close(shares(0, 1.0), [0.1, 0.2, 0.5, 0.2]);
        // The two most likely: 5 and the first 2.
        close(shares(2, 1.0), [0.0, 2.0 / 7.0, 5.0 / 7.0, 0.0]);
        close(shares(0, 0.6), [0.0, 2.0 / 7.0, 5.0 / 7.0, 0.0]);
        close(shares(0, 0.1), [0.0, 0.0, 1.0, 0.0]);
        close(shares(3, 0.8), [0.0, 2.0 / 9.0, 5.0 / 9.0, 2.0 / 9.0]);
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        let how = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
        let why = choose([0.0, f64::NAN].into_iter(), &how, [0, 0], 3, 0).unwrap_err();
        assert_eq!(why, "found the logit NaN in row 3, expected finite numbers");
    }
}
