//! What of a block of keys a block of queries sees: a matrix of bits, with queries or keys as the lanes of vectors.

use dsgc_ir::segment;

use super::super::lanes::{Element, LANES};
use super::{BLOCK, Block, Heads};

/// Vectors of a block's lanes.
pub(super) const VECTORS: usize = BLOCK / LANES;

/// What lies in the lanes of vectors; the other one is the rows of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Queries,
    Keys,
}

/// Which lanes see, or are seen by, which rows.
pub(super) struct Sight {
    /// Per row a bit for each lane; lanes beyond the block's places have it set.
    pub bits: [u64; BLOCK],
    /// Per vector of lanes, the rows from the first to the last in which a bit is set.
    pub rows: [(usize, usize); VECTORS],
    /// Per vector of lanes, whether some bits in these rows are not set.
    pub masked: [bool; VECTORS],
}

/// Ones from a bit on to another, as far as there are bits.
fn ones(from: isize, to: isize) -> u64 {
    let below = |n: isize| if n >= 64 { u64::MAX } else { (1u64 << n.max(0)) - 1 };
    below(to) & !below(from)
}

impl Sight {
    /// All lanes see all rows.
    fn whole(rows: usize, lanes: usize) -> Sight {
        let mut sight = Sight { bits: [u64::MAX; BLOCK], rows: Default::default(), masked: Default::default() };
        sight.rows[..lanes.div_ceil(LANES)].fill((0, rows));
        sight
    }

    /// Whether all see all.
    pub(super) fn is_masked(&self) -> bool {
        self.masked.contains(&true)
    }

    /// Ranges of lanes (in whole vectors) with the range of rows that is the same for all of them.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < self.rows.len() {
                let (begin, rows) = (at, self.rows[at]);
                while at < self.rows.len() && self.rows[at] == rows {
                    at += 1;
                }
                if rows.0 < rows.1 {
                    return Some(Part {
                        lane: begin * LANES,
                        lanes: (at - begin) * LANES,
                        row: rows.0,
                        rows: rows.1 - rows.0,
                    });
                }
            }
            None
        })
    }

    /// All rows, as many at a time as a vector has lanes where some bits are not set, with the lanes from the first to the
    /// last that any of them has, of so many.
    pub(super) fn bands(&self, rows: usize, lanes: usize) -> impl Iterator<Item = Part> + '_ {
        let step = if self.is_masked() { LANES } else { BLOCK };
        (0..rows).step_by(step).filter_map(move |row| {
            let rows = step.min(rows - row);
            let seen = self.bits[row..row + rows].iter().fold(0, |all, bits| all | bits) & ones(0, lanes as isize);
            let lane = seen.trailing_zeros() as usize;
            (seen != 0).then(|| Part { lane, lanes: 64 - seen.leading_zeros() as usize - lane, row, rows })
        })
    }
}

/// A rectangle of a block.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub lane: usize,
    pub lanes: usize,
    pub row: usize,
    pub rows: usize,
}

impl Part {
    /// Where it begins in a block of scores, and in how many numbers.
    pub(super) fn at(&self) -> usize {
        self.row * BLOCK + self.lane
    }

    /// The same rows in whole vectors.
    pub(super) fn padded(&self) -> Part {
        let lane = self.lane / LANES * LANES;
        Part { lane, lanes: (self.lane + self.lanes).next_multiple_of(LANES) - lane, ..*self }
    }
}

impl<E: Element> Heads<E> {
    /// What of a block of keys is seen by a block of queries of a row; nothing if there is no such key.
    pub(super) fn sight(&self, segments: &[i32], queries: Block, keys: Block, lanes: Side) -> Option<Sight> {
        let ((least, most), place) = (self.near(), self.first + queries.from);
        // How many places the first key is before the first query.
        let begin = place as isize - keys.from as isize;
        let (nearest, farthest) = (begin + 1 - keys.count as isize, begin + queries.count as isize - 1);
        if farthest < least || nearest > most {
            return None;
        }
        let all_near = least <= nearest && farthest <= most;
        let of_queries = &segments[place..place + queries.count];
        let of_keys = &segments[keys.from..keys.from + keys.count];
        let (query, key) = (of_queries[0], of_keys[0]);
        let alike = of_queries.iter().fold(true, |same, &s| same & (s == query))
            && of_keys.iter().fold(true, |same, &s| same & (s == key));
        if alike && !segment::sees(query, key) {
            return None;
        }
        let (rows, count) = match lanes {
            Side::Queries => (keys.count, queries.count),
            Side::Keys => (queries.count, keys.count),
        };
        let mut sight = Sight::whole(rows, count);
        if alike && all_near {
            return Some(sight);
        }
        let mut texts = (0, u64::MAX);
        for (row, bits) in sight.bits[..rows].iter_mut().enumerate() {
            let r = row as isize;
            *bits = match lanes {
                Side::Queries => ones(r - begin + least, r - begin + most + 1),
                Side::Keys => ones(begin + r - most, begin + r - least + 1),
            };
            if !alike {
                let own = if lanes == Side::Queries { of_keys[row] } else { of_queries[row] };
                // Neighbours mostly belong together.
                if row == 0 || own != texts.0 {
                    let seen = |fold: u64, (j, sees): (usize, bool)| fold | u64::from(sees) << j;
                    texts = match lanes {
                        Side::Queries => {
                            (own, of_queries.iter().map(|&s| segment::sees(s, own)).enumerate().fold(0, seen))
                        }
                        Side::Keys => (own, of_keys.iter().map(|&s| segment::sees(own, s)).enumerate().fold(0, seen)),
                    };
                }
                *bits &= texts.1;
            }
        }
        let valid = ones(0, count as isize);
        for (vector, (range, masked)) in sight.rows.iter_mut().zip(&mut sight.masked).enumerate() {
            let of = |bits: &u64| (bits & valid) >> (vector * LANES) & 0xFFFF;
            let seen = |bits: &u64| of(bits) != 0;
            let all = of(&u64::MAX);
            let Some(from) = sight.bits[..rows].iter().position(seen) else {
                *range = (0, 0);
                continue;
            };
            let to = rows - sight.bits[..rows].iter().rev().position(seen).unwrap_or(0);
            *range = (from, to);
            *masked = sight.bits[from..to].iter().any(|bits| of(bits) != all);
        }
        sight.bits[..rows].iter_mut().for_each(|bits| *bits |= !valid);
        sight.rows.iter().any(|(from, to)| from < to).then_some(sight)
    }
}
