//! Where the layers of a model are cut: as many contiguous runs as there are places, none of them empty.
//!
//! A batch of `m` parts takes the time of one part through all places, which no cut changes, and `m - 1` times that of the
//! slowest place; so the slowest one is made as fast as can be.

use std::ops::Add;

/// What a layer takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layer {
    /// Time, in any unit.
    pub time: u64,
    /// Bytes of its states.
    pub bytes: u64,
    /// Bytes that gradients need of it, for each part of a batch under way.
    pub kept: u64,
}

impl Add for Layer {
    type Output = Layer;
    fn add(self, other: Layer) -> Layer {
        Layer {
            time: self.time.saturating_add(other.time),
            bytes: self.bytes.saturating_add(other.bytes),
            kept: self.kept.saturating_add(other.kept),
        }
    }
}

/// What places have room for.
pub(super) struct Room<'a> {
    /// Most bytes of a place.
    pub most: u64,
    /// How many parts of a batch are under way at a place, by its number.
    pub under_way: &'a dyn Fn(usize) -> u64,
}

impl Room<'_> {
    fn has(&self, place: usize, run: Layer) -> bool {
        let kept = run.kept.saturating_mul((self.under_way)(place));
        run.bytes.saturating_add(kept) <= self.most
    }
}

/// The number of layers at each place: the fastest cut for whose places there is room, and of equally fast
/// ones that with the earliest cuts. Without a `room` there is always enough. `before` and `after` stand beside the first and the last layer.
///
/// `None` if there are fewer layers than places, or no cut has room.
pub(super) fn cut(
    layers: &[Layer],
    before: Layer,
    after: Layer,
    places: usize,
    room: Option<&Room>,
) -> Option<Vec<usize>> {
    let count = layers.len();
    // Of the layers `from..to`.
    let run = |from: usize, to: usize| {
        let ends = [(from == 0).then_some(before), (to == count).then_some(after)];
        let all = layers[from..to].iter().copied().chain(ends.into_iter().flatten());
        all.fold(Layer::default(), Layer::add)
    };
    // Per count of places from the end and first layer there: the slowest place, and the layers of the first one.
    let mut best: Vec<Vec<Option<(u64, usize)>>> = vec![vec![None; count + 1]; places + 1];
    best[0][count] = Some((0, 0));
    for left in 1..=places {
        for from in 0..count {
            let ends = (from + 1..=count).filter_map(|to| {
                let (rest, _) = best[left - 1][to]?;
                let own = run(from, to);
                room.is_none_or(|room| room.has(places - left, own)).then_some((own.time.max(rest), to - from))
            });
            best[left][from] = ends.min();
        }
    }
    let (mut cut, mut from) = (Vec::new(), 0);
    for left in (1..=places).rev() {
        let (_, own) = best[left][from]?;
        cut.push(own);
        from += own;
    }
    Some(cut)
}

#[cfg(test)]
mod tests {
    use dsgc_ir::fuzz::Rng;

    use super::*;

    /// Every cut of so many layers.
    fn all(layers: usize, places: usize) -> Vec<Vec<usize>> {
        if places == 1 {
            return if layers > 0 { vec![vec![layers]] } else { vec![] };
        }
        let first = |own: usize| all(layers - own, places - 1).into_iter().map(move |rest| [vec![own], rest].concat());
        (1..layers).flat_map(first).collect()
    }

    #[test]
    fn no_cut_is_faster_that_has_room() {
        let mut rng = Rng::new(1);
        let mut without = 0;
        for _ in 0..300 {
            let mut layer =
                || Layer { time: rng.below(9) as u64, bytes: rng.below(9) as u64, kept: rng.below(3) as u64 };
            let (before, after) = (layer(), layer());
            let layers: Vec<Layer> = (0..8).map(|_| layer()).collect();
            let layers = &layers[..1 + rng.below(8)];
            let (places, most) = (1 + rng.below(4), 8 + rng.below(40) as u64);
            // As `1f1b` has them.
            let under_way = |place: usize| (places - place) as u64;
            let slowest = |cut: &[usize]| {
                let mut from = 0;
                let mut slowest = 0;
                for (at, &own) in cut.iter().enumerate() {
                    let mut run = layers[from..from + own].to_vec();
                    run.extend((at == 0).then_some(before));
                    run.extend((at + 1 == cut.len()).then_some(after));
                    if run.iter().map(|l| l.bytes + under_way(at) * l.kept).sum::<u64>() > most {
                        return None;
                    }
                    slowest = slowest.max(run.iter().map(|l| l.time).sum::<u64>());
                    from += own;
                }
                Some(slowest)
            };
            let expected = all(layers.len(), places).iter().filter_map(|cut| slowest(cut)).min();
            let found = cut(layers, before, after, places, Some(&Room { most, under_way: &under_way }));
            without += usize::from(found.is_none());
            assert_eq!(found.as_deref().map(|cut| slowest(cut).expect("it has room")), expected);
        }
        assert!((20..280).contains(&without), "{without} have no cut");
    }
}
