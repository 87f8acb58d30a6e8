//! Rotary positions, the optimizer, and random numbers.

use cubecl::prelude::*;
use dsgc_ir::{Op, Value};

use super::target::MOST_TENSORS;
use super::{Launch, math, numbers};

/// Pairs turned by their angles; a unit has both of a pair, so the result may take the operand's place.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn turn(
    x: &Array<f32>,
    positions: &Array<u32>,
    frequencies: &Array<f32>,
    out: &mut Array<f32>,
    pairs: u32,
    heads: u32,
    half: u32,
    #[comptime] inverse: bool,
) {
    let i = ABSOLUTE_POS as u32;
    if i < pairs {
        let row = i / half;
        let pair = i % half;
        let (sin, cos) = math::turned(positions[(row / heads) as usize], frequencies[pair as usize]);
        let sin = if comptime!(inverse) { -sin } else { sin };
        let at = row * half * 2u32 + pair;
        let (a, b) = (x[at as usize], x[(at + half) as usize]);
        out[at as usize] = a * cos - b * sin;
        out[(at + half) as usize] = b * cos + a * sin;
    }
}

/// The numbers of an optimizer.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Rates {
    beta1: f32,
    rest1: f32,
    log1: f32,
    beta2: f32,
    rest2: f32,
    log2: f32,
    eps: f32,
    decay: f32,
}

/// As `torch.optim.AdamW`, of several parameters, which have so many elements: a unit has an element of one of them. `given`
/// are the gradients, and parameters and moments if results do not take their places.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn adamw(
    given: &Sequence<Array<f32>>,
    results: &mut Sequence<Array<f32>>,
    rate: &Array<f32>,
    step: &Array<u32>,
    factor: &Array<f32>,
    lens: &Sequence<u32>,
    rates: &Rates,
    #[comptime] count: usize,
    #[comptime] in_place: bool,
) {
    let mut i = ABSOLUTE_POS as u32;
    #[unroll]
    for k in 0..count {
        if i < lens[k] {
            let at = i as usize;
            let (p, m, v) = if comptime!(in_place) {
                (results[comptime!(3 * k)][at], results[comptime!(3 * k + 1)][at], results[comptime!(3 * k + 2)][at])
            } else {
                (
                    given[comptime!(count + 3 * k)][at],
                    given[comptime!(count + 3 * k + 1)][at],
                    given[comptime!(count + 3 * k + 2)][at],
                )
            };
            let steps = f32::cast_from(step[0]);
            let size = rate[0] / math::one_minus_exp(steps * rates.log1);
            let root = math::one_minus_exp(steps * rates.log2).sqrt();
            let g = given[k][at] * factor[0];
            let m = rates.beta1 * m + rates.rest1 * g;
            let v = rates.beta2 * v + rates.rest2 * g * g;
            let p = p * (1.0f32 - rate[0] * rates.decay) - size * m / (v.sqrt() / root + rates.eps);
            let parameter = results.index_mut(comptime!(3 * k));
            parameter[at] = p;
            let first = results.index_mut(comptime!(3 * k + 1));
            first[at] = m;
            let second = results.index_mut(comptime!(3 * k + 2));
            second[at] = v;
        }
        // Those of the parameters behind; a unit that is done wraps to what none has.
        i -= lens[k];
    }
}

/// What is drawn for an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Drawn {
    Uniform,
    Normal,
}

#[cube]
fn mix(a: u32, b: u32, #[comptime] rotation: u32) -> (u32, u32) {
    let a = a + b;
    (a, ((b << rotation) | (b >> comptime!(32u32 - rotation))) ^ a)
}

#[cube]
fn four(a: u32, b: u32, #[comptime] odd: bool) -> (u32, u32) {
    let (a, b) = mix(a, b, comptime!(if odd { 17u32 } else { 13u32 }));
    let (a, b) = mix(a, b, comptime!(if odd { 29u32 } else { 15u32 }));
    let (a, b) = mix(a, b, comptime!(if odd { 16u32 } else { 26u32 }));
    mix(a, b, comptime!(if odd { 24u32 } else { 6u32 }))
}

/// [`crate::random::threefry2x32`].
#[cube]
pub(super) fn threefry2x32(key0: u32, key1: u32, counter0: u32, counter1: u32) -> (u32, u32) {
    let key2 = key0 ^ key1 ^ 0x1bd1_1bdau32;
    let (a, b) = four(counter0 + key0, counter1 + key1, false);
    let (a, b) = four(a + key1, b + key2 + 1u32, true);
    let (a, b) = four(a + key2, b + key0 + 2u32, false);
    let (a, b) = four(a + key0, b + key1 + 3u32, true);
    let (a, b) = four(a + key1, b + key2 + 4u32, false);
    (a + key2, b + key0 + 5u32)
}

/// The top 24 bits of a word as a number of `[0, 1)`.
#[cube]
pub(super) fn unit(word: u32) -> f32 {
    f32::cast_from(word >> 8u32) * comptime!(1.0f32 / 16_777_216.0f32)
}

/// A number for each element: `base + scale u`, below `most`, with `u` evenly or normally distributed. The counter is row and
/// place in the row; rows have numbers, or are counted.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn draw(
    key: &Array<u32>,
    rows: &Array<u32>,
    out: &mut Array<f32>,
    len: u32,
    inner: u32,
    base: f32,
    scale: f32,
    most: f32,
    #[comptime] what: Drawn,
    #[comptime] numbered: bool,
) {
    let i = ABSOLUTE_POS as u32;
    if i < len {
        let mut row = i / inner;
        if comptime!(numbered) {
            row = rows[(i / inner) as usize];
        }
        let (first, second) = threefry2x32(key[0], key[1], row, i % inner);
        match what {
            Drawn::Uniform => {
                out[i as usize] = min(base + unit(first) * scale, most);
            }
            Drawn::Normal => {
                let radius = (-2.0f32 * math::log(1.0f32 - unit(first))).sqrt();
                let turn = unit(second);
                let (_, cos) = math::sin_cos((turn - turn.round()) * std::f32::consts::TAU);
                out[i as usize] = base + scale * radius * cos;
            }
        }
    }
}

#[cube(launch_unchecked)]
fn fold(keys: &Array<u32>, out: &mut Array<u32>, len: u32, high: u32, low: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < len {
        let at = (2u32 * i) as usize;
        let (a, b) = threefry2x32(keys[at], keys[at + 1], high, low);
        out[at] = a;
        out[at + 1] = b;
    }
}

/// Rotary positions.
pub(super) fn rope<R: Runtime>(l: &Launch<R>, inverse: bool) {
    let shape = l.shape(l.op.args[0]);
    let (heads, half) = (shape[2], shape[3] / 2);
    let pairs = shape[0] * shape[1] * heads * half;
    if pairs == 0 {
        return;
    }
    let (cubes, cube) = l.units(pairs);
    // SAFETY: units beyond the last pair do nothing.
    unsafe {
        turn::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(0),
            l.arg(1),
            l.arg(2),
            l.out(0),
            pairs as u32,
            heads as u32,
            half as u32,
            inverse,
        );
    }
}

/// The optimizer: as many parameters by a launch as it takes tensors of.
pub(super) fn optimizer<R: Runtime>(l: &Launch<R>) {
    let Op::Adamw { beta1, beta2, eps, decay } = l.op.op else { panic!("bug: no update") };
    let (all, results): (usize, Vec<Value>) = (l.op.args.len() / 4, l.op.results().collect());
    let place = |value: Value| (l.buffer(value).region, l.buffer(value).offset);
    // Of parameter `i`: parameter and moments.
    let olds = |i: usize| [0, 2, 3].map(|part| l.op.args[4 * i + part]);
    let in_place = (0..all).all(|i| (0..3).all(|part| place(olds(i)[part]) == place(results[3 * i + part])));
    let most = (MOST_TENSORS - 3) / if in_place { 4 } else { 7 };
    let filled: Vec<usize> = (0..all).filter(|&i| l.len(l.op.args[4 * i]) > 0).collect();
    for some in filled.chunks(most) {
        let lens: Vec<usize> = some.iter().map(|&i| l.len(l.op.args[4 * i])).collect();
        let olds = some.iter().flat_map(|&i| olds(i)).filter(|_| !in_place);
        let given = some.iter().map(|&i| l.op.args[4 * i + 1]).chain(olds);
        let news = some.iter().flat_map(|&i| results[3 * i..3 * i + 3].to_vec());
        let (cubes, cube) = l.units(lens.iter().sum());
        let rates = RatesLaunch::new(
            beta1 as f32,
            (1.0 - beta1) as f32,
            beta1.ln() as f32,
            beta2 as f32,
            (1.0 - beta2) as f32,
            beta2.ln() as f32,
            eps as f32,
            decay as f32,
        );
        // SAFETY: units beyond the last element do nothing.
        unsafe {
            adamw::launch_unchecked::<R>(
                l.client,
                cubes,
                cube,
                given.map(|value| l.words(value)).collect(),
                news.map(|value| l.words(value)).collect(),
                l.arg(4 * all),
                l.arg(4 * all + 1),
                l.arg(4 * all + 2),
                numbers(&lens),
                rates,
                some.len(),
                in_place,
            );
        }
    }
}

/// Random numbers, and keys from keys.
pub(super) fn random<R: Runtime>(l: &Launch<R>) {
    let shape = l.shape(l.op.result());
    let len: usize = shape.iter().product();
    if len == 0 {
        return;
    }
    let (cubes, cube) = l.units(len);
    let uniform = |low: f64, high: f64| {
        let most = if f64::from(high as f32) < high { high as f32 } else { (high as f32).next_down().max(low as f32) };
        (low as f32, (high - low) as f32, most, Drawn::Uniform, false)
    };
    let (base, scale, most, what, numbered) = match l.op.op {
        Op::Fold { data } => {
            let words = [(data >> 32) as u32, data as u32];
            // SAFETY: units beyond the last key do nothing.
            return unsafe {
                fold::launch_unchecked::<R>(l.client, cubes, cube, l.arg(0), l.out(0), len as u32, words[0], words[1]);
            };
        }
        Op::RandomUniform { low, high, .. } => uniform(low, high),
        Op::RandomNormal { mean, std, .. } => (mean as f32, std as f32, f32::MAX, Drawn::Normal, false),
        Op::RowUniform { .. } => (0.0, 1.0, 1.0, Drawn::Uniform, true),
        ref other => panic!("bug: no GPU has a kernel for `{other}`"),
    };
    let inner: usize = shape.iter().skip(1).product();
    // SAFETY: units beyond the last element do nothing.
    unsafe {
        draw::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(0),
            l.arg(usize::from(numbered)),
            l.out(0),
            len as u32,
            inner.max(1) as u32,
            base,
            scale,
            most,
            what,
            numbered,
        );
    }
}
