//! Weights in few bits: whole numbers with a scale for every group of neighbours.
//!
//! Elements of the last dim stand in groups, of which the last of a row may be shorter. A group has the scale
//! `max |w| / m`, as bf16, with `m = 127` for 8 bits and 7 for 4; an element is `w / scale` as a whole number, of two that
//! are next the even one, between `-m` and `m`, and stands for that number times the scale. So an element is off by half a
//! scale at most, and a group of zeros stays one. This is the symmetric rounding to nearest that LLM.int8 (Dettmers et al.
//! 2022) does by rows, and GPTQ and AWQ by groups. A group with a number that is not finite is NaN throughout.
//!
//! The largest of a group is always `m` or `-m`, and since a scale has 8 bits its products with elements are exact in f32:
//! what was rounded once stays as it is when it is rounded again.
//!
//! In memory a row is the scales of its groups as f32, in which they are multiplied, filled up to whole lines of 16 bytes;
//! then its elements, filled up with zeros to whole groups: bytes with a sign; or 4 bits that hold the element plus 8, where byte `i` of every 16 holds the
//! elements `i` (low) and `i + 16` of 32.

use half::bf16;

/// How many bits an element has, and how many elements have a scale in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantized {
    bits: u8,
    group: u8,
}

/// Elements of 4 bits that are stored together: byte `i` holds number `i` and number `i + HALF`.
const BLOCK: usize = 32;
const HALF: usize = BLOCK / 2;
/// Bytes that the scales of a row are a multiple of.
const LINE: usize = 16;

impl Quantized {
    /// All of them.
    pub const ALL: [Quantized; 6] = [
        Quantized { bits: 8, group: 32 },
        Quantized { bits: 8, group: 64 },
        Quantized { bits: 8, group: 128 },
        Quantized { bits: 4, group: 32 },
        Quantized { bits: 4, group: 64 },
        Quantized { bits: 4, group: 128 },
    ];

    /// The one of so many bits with groups of this size, if there is one.
    pub fn new(bits: usize, group: usize) -> Option<Quantized> {
        Quantized::ALL.into_iter().find(|q| (q.bits(), q.group()) == (bits, group))
    }

    /// Bits of an element: 8 or 4.
    pub fn bits(self) -> usize {
        usize::from(self.bits)
    }

    /// Elements of a group: 32, 64 or 128.
    pub fn group(self) -> usize {
        usize::from(self.group)
    }

    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match (self.bits, self.group) {
            (8, 32) => "int8x32",
            (8, 64) => "int8x64",
            (8, _) => "int8x128",
            (_, 32) => "int4x32",
            (_, 64) => "int4x64",
            (_, _) => "int4x128",
        }
    }

    /// The largest element.
    fn most(self) -> f32 {
        if self.bits == 8 { 127.0 } else { 7.0 }
    }

    /// Bytes of the scales of a row of `k` elements, behind which its elements begin.
    pub fn scale_bytes(self, k: usize) -> usize {
        (k.div_ceil(self.group()) * size_of::<f32>()).next_multiple_of(LINE)
    }

    /// Bytes of a row of `k` elements.
    pub fn row_bytes(self, k: usize) -> usize {
        self.scale_bytes(k) + k.next_multiple_of(self.group()) * self.bits() / 8
    }

    /// The scale of a group.
    fn scale(self, group: &[f32]) -> f32 {
        let most = group.iter().fold(0f32, |most, x| most.max(x.abs()));
        let finite = group.iter().all(|x| x.is_finite());
        if finite { bf16::from_f32(most / self.most()).to_f32() } else { f32::NAN }
    }

    /// An element. Of a scale that is 0 or NaN all elements are 0.
    fn element(self, x: f32, scale: f32) -> f32 {
        // Adding so much leaves no place for digits behind the point, so the sum is rounded as numbers are, to even ones.
        const WHOLE: f32 = (3 << 22) as f32;
        let whole = (x / scale + WHOLE) - WHOLE;
        if scale > 0.0 { whole.clamp(-self.most(), self.most()) } else { 0.0 }
    }

    /// Replaces the numbers of rows of `k` elements by those that they are stored as.
    pub fn round(self, rows: &mut [f32], k: usize) {
        for row in rows.chunks_mut(k.max(1)) {
            for group in row.chunks_mut(self.group()) {
                let scale = self.scale(group);
                group.iter_mut().for_each(|x| *x = self.element(*x, scale) * scale);
            }
        }
    }

    /// Stores rows of `k` elements.
    ///
    /// # Panics
    /// If `to` is not as long as they are.
    pub fn pack(self, rows: &[f32], k: usize, to: &mut [u8]) {
        if k == 0 {
            return;
        }
        assert_eq!(rows.len() / k * self.row_bytes(k), to.len(), "bug: rows and their place differ");
        for (row, to) in rows.chunks(k).zip(to.chunks_mut(self.row_bytes(k))) {
            let (scales, elements) = to.split_at_mut(self.scale_bytes(k));
            scales.fill(0);
            let bytes = self.group() * self.bits() / 8;
            let places = scales.chunks_mut(size_of::<f32>()).zip(elements.chunks_mut(bytes));
            for (group, (scale_at, to)) in row.chunks(self.group()).zip(places) {
                let scale = self.scale(group);
                scale_at.copy_from_slice(&scale.to_le_bytes());
                let element = |i: usize| group.get(i).map_or(0.0, |&x| self.element(x, scale)) as i8;
                for (i, byte) in to.iter_mut().enumerate() {
                    let low = i / HALF * BLOCK + i % HALF;
                    *byte = match self.bits {
                        8 => element(i) as u8,
                        _ => (element(low) + 8) as u8 | ((element(low + HALF) + 8) as u8) << 4,
                    };
                }
            }
        }
    }

    /// The numbers that stored rows of `k` elements stand for.
    ///
    /// # Panics
    /// If `rows` is not as long as they are.
    pub fn unpack(self, from: &[u8], k: usize, rows: &mut [f32]) {
        if k == 0 {
            return;
        }
        assert_eq!(rows.len() / k * self.row_bytes(k), from.len(), "bug: rows and their place differ");
        for (row, from) in rows.chunks_mut(k).zip(from.chunks(self.row_bytes(k))) {
            let (scales, elements) = from.split_at(self.scale_bytes(k));
            let bytes = self.group() * self.bits() / 8;
            let places = scales.chunks(size_of::<f32>()).zip(elements.chunks(bytes));
            for (group, (scale, from)) in row.chunks_mut(self.group()).zip(places) {
                let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
                for (i, x) in group.iter_mut().enumerate() {
                    let element = match self.bits {
                        8 => from[i] as i8,
                        _ => {
                            let byte = from[i / BLOCK * HALF + i % HALF];
                            let four = if i % BLOCK < HALF { byte & 0xF } else { byte >> 4 };
                            four as i8 - 8
                        }
                    };
                    *x = f32::from(element) * scale;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Rng;

    /// Rows of all sizes: zeros, ties, large and small ones.
    fn rows(k: usize, n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        let mut rows: Vec<f32> =
            (0..n * k).map(|i| (rng.unit() as f32 - 0.5) * 10f32.powi((i / 40) as i32 % 9 - 4)).collect();
        let zeros = k.min(rows.len());
        rows[..zeros].fill(0.0);
        rows
    }

    #[test]
    fn elements_are_off_by_half_a_scale_at_most() {
        for q in Quantized::ALL {
            for k in [1, 31, 32, 64, 100, 128, 300] {
                let rows = rows(k, 5, k as u64);
                let mut rounded = rows.clone();
                q.round(&mut rounded, k);
                for (row, rounded) in rows.chunks(k).zip(rounded.chunks(k)) {
                    for (group, rounded) in row.chunks(q.group()).zip(rounded.chunks(q.group())) {
                        let scale = q.scale(group);
                        for (x, y) in group.iter().zip(rounded) {
                            // A few units of the last place, as the quotient is rounded.
                            assert!((x - y).abs() <= scale * (0.5 + 1e-5), "{x} is {y} in {}", q.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_stored_is_what_was_rounded_and_stays() {
        for q in Quantized::ALL {
            for k in [1, 31, 32, 64, 100, 128, 300] {
                let rows = rows(k, 5, k as u64);
                let mut rounded = rows.clone();
                q.round(&mut rounded, k);
                let mut bytes = vec![0xAA; 5 * q.row_bytes(k)];
                q.pack(&rows, k, &mut bytes);
                let mut unpacked = vec![f32::NAN; rows.len()];
                q.unpack(&bytes, k, &mut unpacked);
                assert_eq!(unpacked, rounded, "{} of {k}", q.name());
                q.round(&mut rounded, k);
                assert_eq!(unpacked, rounded, "{} of {k}, rounded again", q.name());
            }
        }
    }

    #[test]
    fn ties_go_to_even_numbers() {
        let q = Quantized::new(4, 32).unwrap();
        let mut row = [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -7.0];
        q.round(&mut row, 7);
        assert_eq!(row, [7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -7.0]);
    }

    #[test]
    fn what_is_not_finite_shows() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let q = Quantized::new(8, 32).unwrap();
            let mut ones = vec![1.0; 32];
            q.round(&mut ones, 32);
            let mut row = vec![1.0; 64];
            row[3] = bad;
            q.round(&mut row, 64);
            assert!(row[..32].iter().all(|x| x.is_nan()) && row[32..] == ones);
            let mut bytes = vec![0; q.row_bytes(64)];
            q.pack(&row, 64, &mut bytes);
            let mut back = vec![0.0; 64];
            q.unpack(&bytes, 64, &mut back);
            assert!(back[..32].iter().all(|x| x.is_nan()) && back[32..] == ones);
        }
    }
}
