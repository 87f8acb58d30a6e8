//! Ops with tokens and columns: embeddings, log-probabilities, positions.

use cubecl::prelude::*;
use dsgc_ir::segment::BRANCH;
use dsgc_ir::stage::Sampling;
use dsgc_ir::{Buffer, Op};

use super::index::{Store, part};
use super::reduce::{TOGETHER, With, together, words_together};
use super::update::{threefry2x32, unit as unit_number};
use super::{Launch, MOST_CUBES, cubes, math};

/// Rows of a table, a word of them by a unit. An index that it does not have is a fault, and its row zeros.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rows(
    table: &Array<u32>,
    indices: &Array<u32>,
    out: &mut Array<u32>,
    faults: &mut Array<u32>,
    len: u32,
    height: u32,
    width: u32,
    code: u32,
    #[comptime] each: u32,
) {
    let first = ABSOLUTE_POS as u32 * each;
    if first < len {
        let mut word = 0u32;
        #[unroll]
        for j in 0..each {
            let i = first + j;
            if i < len {
                let index = indices[(i / width) as usize];
                if index < height {
                    word |= part(table, index * width + i % width, each) << comptime!(j * (32 / each) % 32);
                } else {
                    faults[0] = code;
                    faults[1] = index;
                }
            }
        }
        out[(first / each) as usize] = word;
    }
}

/// No place.
const NONE: u32 = 0x7fff_ffff;

/// Marks a place whose index is at no earlier one.
const FIRST: u32 = 0x8000_0000;

/// Of each place the next one with the same index, and whether there is no earlier one. A unit has a place, and looks at
/// one word of each of the others, as its neighbours do.
#[cube(launch_unchecked)]
fn link(indices: &Array<u32>, links: &mut Array<u32>, places: u32) {
    let own = ABSOLUTE_POS as u32;
    if own < places {
        let index = indices[own as usize];
        let mut next = own + 1u32;
        // Both sides are computed, so places are kept inside.
        while next < places && indices[min(next, places - 1u32) as usize] != index {
            next += 1u32;
        }
        let mut before = own;
        while before > 0u32 && indices[(max(before, 1u32) - 1u32) as usize] != index {
            before -= 1u32;
        }
        links[own as usize] = select(next < places, next, NONE) | select(before == 0u32, FIRST, 0u32);
    }
}

/// Adds rows of a gradient to those of a table that indices name: a cube for the first place of each index, which adds the
/// rows of all its places in their order.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn add_rows(
    indices: &Array<u32>,
    grad: &Array<f32>,
    links: &Array<u32>,
    table: &mut Array<f32>,
    faults: &mut Array<u32>,
    places: u32,
    height: u32,
    width: u32,
    code: u32,
) {
    let own = CUBE_POS as u32;
    if own < places {
        let index = indices[own as usize];
        if index >= height {
            if UNIT_POS == 0u32 {
                faults[0] = code;
                faults[1] = index;
            }
        } else if links[own as usize] >= FIRST {
            let mut i = UNIT_POS;
            while i < width {
                let mut sum = 0.0f32;
                let mut place = own;
                while place != NONE {
                    sum += grad[(place * width + i) as usize];
                    place = links[place as usize] & NONE;
                }
                table[(index * width + i) as usize] += sum;
                i += TOGETHER;
            }
        }
    }
}

/// The log of the softmax's divisor of a row that the units of a cube share.
#[cube]
fn log_divisor(logits: &Array<f32>, start: u32, width: u32) -> f32 {
    let mut own = f32::reinterpret(0xff80_0000u32.runtime());
    let mut i = UNIT_POS;
    while i < width {
        own = math::larger(own, logits[(start + i) as usize]);
        i += TOGETHER;
    }
    let most = together(own, With::Max);
    let mut own = 0.0f32;
    let mut i = UNIT_POS;
    while i < width {
        own += math::exp(logits[(start + i) as usize] - most);
        i += TOGETHER;
    }
    most + math::log(together(own, With::Sum))
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn logp(
    logits: &Array<f32>,
    tokens: &Array<u32>,
    out: &mut Array<f32>,
    faults: &mut Array<u32>,
    places: u32,
    width: u32,
    code: u32,
) {
    // Cubes beyond the last place do it again, so that all units of a cube come to the same places.
    let place = min(CUBE_POS as u32, places - 1u32);
    let start = place * width;
    let divisor = log_divisor(logits, start, width);
    if UNIT_POS == 0u32 {
        let token = tokens[place as usize];
        if token < width {
            out[place as usize] = logits[(start + token) as usize] - divisor;
        } else {
            faults[0] = code;
            faults[1] = token;
        }
    }
}

/// `grad (one at the token - softmax)`, which may take the place of the logits.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn logp_grad(
    logits: &Array<f32>,
    tokens: &Array<u32>,
    grad: &Array<f32>,
    out: &mut Array<f32>,
    faults: &mut Array<u32>,
    width: u32,
    first: u32,
    code: u32,
) {
    let place = CUBE_POS as u32 + first;
    let start = place * width;
    let divisor = log_divisor(logits, start, width);
    let token = tokens[place as usize];
    let factor = grad[place as usize];
    if token >= width && UNIT_POS == 0u32 {
        faults[0] = code;
        faults[1] = token;
    }
    let mut i = UNIT_POS;
    while i < width {
        let at = (start + i) as usize;
        let one = select(i == token, 1.0f32, 0.0f32);
        out[at] = factor * (one - math::exp(logits[at] - divisor));
        i += TOGETHER;
    }
}

/// A number for each logit, in the same order.
#[cube]
fn rank(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let negative = bits > 0x8000_0000u32;
    select(negative, bits ^ 0xffff_ffffu32, bits | 0x8000_0000u32)
}

/// The logit of a rank.
#[cube]
fn of_rank(rank: u32) -> f32 {
    f32::reinterpret(select(rank >= 0x8000_0000u32, rank ^ 0x8000_0000u32, rank ^ 0xffff_ffffu32))
}

/// Logits of a row, of which every unit looks at some.
#[derive(CubeType, Clone, Copy)]
struct Row {
    start: u32,
    width: u32,
    most: f32,
    temperature: f32,
}

/// The weight of a logit.
#[cube]
fn weight(x: f32, row: &Row) -> f32 {
    math::exp((x - row.most) / row.temperature)
}

/// How many logits have this rank or more.
#[cube]
fn count_from(logits: &Array<f32>, row: &Row, least: u32) -> u32 {
    let mut own = 0u32;
    let mut i = UNIT_POS;
    while i < row.width {
        own += u32::cast_from(rank(logits[(row.start + i) as usize]) >= least);
        i += TOGETHER;
    }
    words_together(own, With::Sum, false)
}

/// The weight of all logits of this rank or more.
#[cube]
fn weight_from(logits: &Array<f32>, row: &Row, least: u32) -> f32 {
    let mut own = 0.0f32;
    let mut i = UNIT_POS;
    while i < row.width {
        let x = logits[(row.start + i) as usize];
        own += select(rank(x) >= least, weight(x, row), 0.0f32);
        i += TOGETHER;
    }
    together(own, With::Sum)
}

/// What is kept of a row, all logits above a rank, and of that rank so many, the first ones: the `top_k` most likely tokens,
/// then the most likely ones that have `top_p` of their weight. Ranks are found bit by bit.
#[cube]
fn kept(
    logits: &Array<f32>,
    row: &Row,
    top_k: u32,
    top_p: f32,
    #[comptime] by_count: bool,
    #[comptime] by_weight: bool,
) -> (u32, u32) {
    let mut least = 0u32;
    let mut count = 0xffff_ffffu32;
    if comptime!(by_count) {
        for step in 0..32u32 {
            let next = least | (0x8000_0000u32 >> step);
            if count_from(logits, row, next) >= top_k {
                least = next;
            }
        }
        // Of fewer tokens than `top_k` all are kept: no rank has so many.
        let above = count_from(logits, row, least + 1u32);
        if least > 0u32 {
            count = top_k - above;
        }
    }
    if comptime!(by_weight) {
        let mut all = weight_from(logits, row, 0u32);
        if least > 0u32 {
            all = f32::cast_from(count) * weight(of_rank(least), row);
        }
        let above = weight_from(logits, row, least + 1u32);
        if least > 0u32 {
            all += above;
        }
        let wanted = top_p * all;
        let mut enough = 0u32;
        for step in 0..32u32 {
            let next = enough | (0x8000_0000u32 >> step);
            let found = weight_from(logits, row, next);
            if next <= least || found >= wanted {
                enough = next;
            }
        }
        let above = weight_from(logits, row, enough + 1u32);
        let ties = ((wanted - above) / weight(of_rank(enough), row)).ceil();
        let ties = u32::cast_from(min(max(ties, 1.0f32), 16_777_216.0f32));
        count = select(enough == least, min(count, ties), ties);
        least = enough;
    }
    (least, count)
}

/// The weight of a logit if it is kept, and counts it among those of the last rank.
#[cube]
fn kept_weight(x: f32, row: &Row, least: u32, count: u32, before: u32, #[comptime] filtered: bool) -> (f32, u32) {
    let mut own = weight(x, row);
    let mut ties = before;
    if comptime!(filtered) {
        let rank = rank(x);
        if rank < least || (rank == least && before >= count) {
            own = 0.0f32;
        }
        ties += u32::cast_from(rank == least);
    }
    (own, ties)
}

/// A token for each row of logits, as [`crate::sample::choose`] does it, in single precision: the most likely one, of equal
/// ones the first, or one by its probability. Each unit of a cube has a run of the vocabulary.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn choose(
    logits: &Array<f32>,
    key: &Array<u32>,
    rows: &Array<u32>,
    place: &Array<u32>,
    out: &mut Array<u32>,
    faults: &mut Array<u32>,
    count: u32,
    width: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    code: u32,
    #[comptime] greedy: bool,
    #[comptime] by_count: bool,
    #[comptime] by_weight: bool,
) {
    let row = min(CUBE_POS as u32, count - 1u32);
    let start = row * width;
    let run = width.div_ceil(TOGETHER);
    let from = UNIT_POS * run;
    let to = min(width, from + run);
    let mut most = f32::reinterpret(0xff80_0000u32.runtime());
    let mut best = 0u32;
    for i in from..to {
        let x = logits[(start + i) as usize];
        if (u32::reinterpret(x) & 0x7fff_ffffu32) >= 0x7f80_0000u32 {
            faults[0] = code;
            faults[1] = u32::reinterpret(x);
            faults[2] = rows[row as usize];
        }
        if x > most {
            most = x;
            best = i;
        }
    }
    let mut values = SharedMemory::<f32>::new(comptime!(TOGETHER as usize));
    let mut places = SharedMemory::<u32>::new(comptime!(TOGETHER as usize));
    values[UNIT_POS as usize] = most;
    places[UNIT_POS as usize] = best;
    sync_cube();
    for unit in 0..TOGETHER {
        // The first of equal ones: units have earlier tokens the lower they are.
        let other = values[unit as usize];
        if other > most || (other == most && places[unit as usize] < best) {
            most = other;
            best = places[unit as usize];
        }
    }
    sync_cube();
    if comptime!(greedy) {
        if UNIT_POS == 0u32 {
            out[row as usize] = best;
        }
    } else {
        let filtered = comptime!(by_count || by_weight);
        let all = Row { start, width, most, temperature };
        let mut least = 0u32;
        let mut limit = 0u32;
        let mut before = 0u32;
        if comptime!(filtered) {
            let (found, many) = kept(logits, &all, top_k, top_p, by_count, by_weight);
            least = found;
            limit = many;
            let mut ties = 0u32;
            for i in from..to {
                ties += u32::cast_from(rank(logits[(start + i) as usize]) == least);
            }
            places[UNIT_POS as usize] = ties;
            sync_cube();
            for unit in 0..UNIT_POS {
                before += places[unit as usize];
            }
            sync_cube();
            places[UNIT_POS as usize] = before;
        }
        let mut own = 0.0f32;
        for i in from..to {
            let (weight, ties) = kept_weight(logits[(start + i) as usize], &all, least, limit, before, filtered);
            own += weight;
            before = ties;
        }
        values[UNIT_POS as usize] = own;
        sync_cube();
        if UNIT_POS == 0u32 {
            let mut sums = 0.0f32;
            for unit in 0..TOGETHER {
                sums += values[unit as usize];
            }
            let (word, _) = threefry2x32(key[0], key[1], rows[row as usize], place[0]);
            let wanted = unit_number(word) * sums;
            let mut sum = 0.0f32;
            let mut chosen = best;
            let mut found = false;
            for unit in 0..TOGETHER {
                let part = values[unit as usize];
                if !found && wanted < sum + part {
                    found = true;
                    let mut passed = false;
                    let first = unit * run;
                    let mut before = places[unit as usize];
                    for i in first..min(width, first + run) {
                        let (weight, ties) =
                            kept_weight(logits[(start + i) as usize], &all, least, limit, before, filtered);
                        before = ties;
                        if !passed && weight > 0.0f32 {
                            sum += weight;
                            chosen = i;
                            passed = wanted < sum;
                        }
                    }
                }
                if !found {
                    sum += part;
                }
            }
            out[row as usize] = chosen;
        }
    }
}

/// How many columns before each one count in its place.
#[cube(launch_unchecked)]
fn positions(segment: &Array<u32>, out: &mut Array<u32>, len: u32, columns: u32) {
    let i = ABSOLUTE_POS as u32;
    if i < len {
        let start = i - i % columns;
        let own = segment[i as usize];
        let mut count = 0u32;
        for earlier in start..i {
            count += u32::cast_from(counts(own, segment[earlier as usize]));
        }
        out[i as usize] = count;
    }
}

/// The text of a segment, 0 for padding ([`dsgc_ir::segment::text`]).
#[cube]
pub(super) fn text(segment: u32) -> u32 {
    segment & comptime!((BRANCH - 1).cast_unsigned())
}

/// The branch of a segment, 0 for the beginning ([`dsgc_ir::segment::branch`]).
#[cube]
pub(super) fn branch(segment: u32) -> u32 {
    segment & comptime!(!(BRANCH - 1).cast_unsigned())
}

/// [`dsgc_ir::segment::counts`].
#[cube]
fn counts(own: u32, earlier: u32) -> bool {
    let same_text = text(own) == text(earlier) || text(own) == 0u32;
    same_text && (branch(earlier) == 0u32 || branch(earlier) == branch(own))
}

/// Rows of a table by indices.
pub(super) fn embed<R: Runtime>(l: &Launch<R>) {
    let table = l.shape(l.op.args[0]);
    let len = l.len(l.op.result());
    if len == 0 {
        return;
    }
    let each = Store::of(l.dtype(l.op.args[0])).each() as usize;
    // Whole words move where rows consist of such.
    let (words, each) = if table[1].is_multiple_of(each) { (each, 1) } else { (1, each) };
    let sizes = [len / words, table[0], table[1] / words].map(|n| n as u32);
    let (cubes, cube) = l.units((len / words).div_ceil(each));
    // SAFETY: what the table does not have is not read.
    unsafe {
        rows::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(0),
            l.arg(1),
            l.out(0),
            l.faults(),
            sizes[0],
            sizes[1],
            sizes[2],
            l.code,
            each as u32,
        );
    }
}

/// Bytes of workspace of a table's gradient, of so many places.
pub(super) fn workspace(places: usize) -> usize {
    4 * places
}

/// The gradient of a table, or what is added to one.
pub(super) fn embed_grad<R: Runtime>(l: &Launch<R>) {
    let result = l.op.result();
    let indices = match &l.op.op {
        Op::AddRows {} => {
            let (from, to) = (l.buffer(l.op.args[0]), l.buffer(result));
            if (from.region, from.offset) != (to.region, to.offset) {
                l.memory.copy(l.client, from, to);
            }
            1
        }
        _ => {
            l.memory.clear(l.client, l.buffer(result));
            0
        }
    };
    let (table, places) = (l.shape(result), l.len(l.op.args[indices]));
    if places * table[1] == 0 {
        return;
    }
    let sizes = [places as u32, table[0] as u32, table[1] as u32];
    let (all, cube) = l.units(places);
    // SAFETY: the workspace has a word for each place; units beyond the last do nothing.
    unsafe { link::launch_unchecked::<R>(l.client, all, cube, l.arg(indices), l.workspace(), sizes[0]) }
    // SAFETY: rows that the table does not have are left out.
    unsafe {
        add_rows::launch_unchecked::<R>(
            l.client,
            cubes(places),
            CubeDim::new_1d(TOGETHER),
            l.arg(indices),
            l.arg(indices + 1),
            l.workspace(),
            l.out(0),
            l.faults(),
            sizes[0],
            sizes[1],
            sizes[2],
            l.code,
        );
    }
}

/// Log-probabilities of tokens, or their gradient.
pub(super) fn log_probabilities<R: Runtime>(l: &Launch<R>) {
    let sizes = (l.len(l.op.args[1]), l.shape(l.op.args[0]).last().copied().unwrap_or(0));
    let [logits, tokens] = [0, 1].map(|i| l.buffer(l.op.args[i]));
    let out = l.buffer(l.op.result());
    match l.op.op {
        Op::TokenLogp {} => token_logp(l, [logits, tokens, out], sizes),
        _ => token_logp_grad(l, [logits, tokens, l.buffer(l.op.args[2]), out], sizes),
    }
}

/// From logits and tokens: so many places, each with so many logits.
pub(super) fn token_logp<R: Runtime>(l: &Launch<R>, buffers: [Buffer; 3], (places, width): (usize, usize)) {
    if places == 0 {
        return;
    }
    let [logits, tokens, out] = buffers.map(|buffer| l.memory.words(buffer));
    let (cubes, cube) = (cubes(places), CubeDim::new_1d(TOGETHER));
    let (n, w) = (places as u32, width as u32);
    // SAFETY: places and columns are those of the operands.
    unsafe { logp::launch_unchecked::<R>(l.client, cubes, cube, logits, tokens, out, l.faults(), n, w, l.code) }
}

/// From logits, tokens and gradient; the result may take the place of the logits.
pub(super) fn token_logp_grad<R: Runtime>(l: &Launch<R>, buffers: [Buffer; 4], (places, width): (usize, usize)) {
    let cube = CubeDim::new_1d(TOGETHER);
    // No cube may come to a place of another, so there are exactly as many as places.
    for first in (0..places).step_by(MOST_CUBES) {
        let cubes = CubeCount::Static((places - first).min(MOST_CUBES) as u32, 1, 1);
        let [logits, tokens, grad, out] = buffers.map(|buffer| l.memory.words(buffer));
        // SAFETY: places and columns are those of the operands.
        unsafe {
            logp_grad::launch_unchecked::<R>(
                l.client,
                cubes,
                cube,
                logits,
                tokens,
                grad,
                out,
                l.faults(),
                width as u32,
                first as u32,
                l.code,
            );
        }
    }
}

/// A token for each row.
pub(super) fn sample<R: Runtime>(l: &Launch<R>, how: &Sampling) {
    let shape = l.shape(l.op.args[0]);
    if shape[0] == 0 {
        return;
    }
    let (count, width) = (shape[0] as u32, shape[1] as u32);
    // SAFETY: rows and columns are those of the logits.
    unsafe {
        choose::launch_unchecked::<R>(
            l.client,
            cubes(shape[0]),
            CubeDim::new_1d(TOGETHER),
            l.arg(0),
            l.arg(1),
            l.arg(2),
            l.arg(3),
            l.out(0),
            l.faults(),
            count,
            width,
            how.temperature as f32,
            how.top_k as u32,
            how.top_p as f32,
            l.code,
            how.temperature == 0.0,
            how.top_k > 0,
            how.top_p < 1.0,
        );
    }
}

/// Positions of columns in their texts.
pub(super) fn position_in<R: Runtime>(l: &Launch<R>) {
    let shape = l.shape(l.op.args[0]);
    let len: usize = shape.iter().product();
    if len == 0 {
        return;
    }
    let (cubes, cube) = l.units(len);
    // SAFETY: units beyond the last column do nothing.
    unsafe {
        positions::launch_unchecked::<R>(l.client, cubes, cube, l.arg(0), l.out(0), len as u32, shape[1] as u32);
    }
}
