//! Rotary positions: pairs of a head's elements, half its width apart, turn by their position times a frequency.

use super::Launch;
use super::lanes::{Element, Kernel, Kind, LANES, Lanes, by_element};
use super::memory::Ptr;

/// Runs `rope`, in place where the plan says so: both elements of a pair are read before either is written.
pub(super) fn run(l: &mut Launch, inverse: bool) {
    by_element!(l, run_of(l, inverse));
}

fn run_of<E: Element>(l: &mut Launch, inverse: bool) {
    let shape = l.shape(l.result());
    let (rows, places, heads, width) = (shape[0], shape[1], shape[2], shape[3]);
    let half = width / 2;
    let (x, positions, freq, out): (Ptr<E>, Ptr<i32>, Ptr<f32>, Ptr<E>) = (l.arg(0), l.arg(1), l.arg(2), l.out(0));
    let kind = Kind::best();
    l.threads.run(places, rows * 3 * heads * width + 20 * half, |range| {
        let (mut sin, mut cos) = (vec![0.0f32; half], vec![0.0f32; half]);
        for place in range {
            // Rows mostly have the same positions: sines and cosines of one serve all.
            let mut last = None;
            for at in (0..rows).map(|row| row * places + place) {
                // SAFETY: there is a position per row and place, and half as many frequencies as elements of a head;
                // threads have places of their own.
                unsafe {
                    let position = *positions.add(at).0;
                    if last != Some(position) {
                        last = Some(position);
                        for ((sin, cos), &freq) in sin.iter_mut().zip(&mut cos).zip(freq.slice(0, half)) {
                            let angle = f64::from(position) * f64::from(freq);
                            let (s, c) = if inverse { (-angle).sin_cos() } else { angle.sin_cos() };
                            (*sin, *cos) = (s as f32, c as f32);
                        }
                    }
                    let at = at * heads * width;
                    kind.run(Turn { x: x.add(at), out: out.add(at), heads, sin: &sin, cos: &cos });
                }
            }
        }
    });
}

/// The heads of one place.
struct Turn<'a, E> {
    x: Ptr<E>,
    out: Ptr<E>,
    heads: usize,
    /// By pairs of a head.
    sin: &'a [f32],
    cos: &'a [f32],
}

/// All heads are there, and nobody else reads or writes the results.
impl<E: Element> Kernel for Turn<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let half = self.sin.len();
        // SAFETY: the caller's.
        unsafe {
            for head in 0..self.heads {
                for i in (0..half).step_by(LANES) {
                    let (first, count) = (2 * head * half + i, half - i);
                    let [a, b] =
                        [first, first + half].map(|at| E::load_some::<L>(self.x.add(at).0.cast_const(), count));
                    let [sin, cos] = [self.sin, self.cos].map(|of| f32::load_some::<L>(of[i..].as_ptr(), count));
                    E::store_some(a * cos - b * sin, self.out.add(first).0, count);
                    E::store_some(b * cos + a * sin, self.out.add(first + half).0, count);
                }
            }
        }
    }
}
