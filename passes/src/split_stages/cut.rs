//! Where the layers of a model are cut: as many contiguous runs as there are places, none of them empty.
//!
//! A batch of `m` parts takes the time of one part through all places, which no cut changes, and `m - 1` times that of the
//! slowest place; so the slowest one is made as fast as can be.

/// What a layer takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layer {
    /// Time, in any unit.
    pub time: u64,
    /// Bytes of its states.
    pub bytes: u64,
}

/// The number of layers at each place: the fastest cut whose places have no more bytes than `most`, and of equally fast
/// ones that with the earliest cuts. `before` and `after` stand beside the first and the last layer.
///
/// `None` if there are fewer layers than places, or no cut has room.
pub(super) fn cut(layers: &[Layer], before: Layer, after: Layer, places: usize, most: u64) -> Option<Vec<usize>> {
    let count = layers.len();
    // Of the layers `from..to`.
    let run = |from: usize, to: usize| {
        let ends = [(from == 0).then_some(before), (to == count).then_some(after)];
        let all = layers[from..to].iter().copied().chain(ends.into_iter().flatten());
        all.fold(Layer::default(), |sum, layer| Layer {
            time: sum.time.saturating_add(layer.time),
            bytes: sum.bytes.saturating_add(layer.bytes),
        })
    };
    // Per count of places from the end and first layer there: the slowest place, and the layers of the first one.
    let mut best: Vec<Vec<Option<(u64, usize)>>> = vec![vec![None; count + 1]; places + 1];
    best[0][count] = Some((0, 0));
    for left in 1..=places {
        for from in 0..count {
            let ends = (from + 1..=count).filter_map(|to| {
                let (rest, _) = best[left - 1][to]?;
                let own = run(from, to);
                (own.bytes <= most).then_some((own.time.max(rest), to - from))
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
            let mut layer = || Layer { time: rng.below(9) as u64, bytes: rng.below(9) as u64 };
            let (before, after) = (layer(), layer());
            let layers: Vec<Layer> = (0..8).map(|_| layer()).collect();
            let layers = &layers[..1 + rng.below(8)];
            let (places, most) = (1 + rng.below(4), 8 + rng.below(30) as u64);
            let slowest = |cut: &[usize]| {
                let mut from = 0;
                let mut slowest = 0;
                for (at, &own) in cut.iter().enumerate() {
                    let mut run = layers[from..from + own].to_vec();
                    run.extend((at == 0).then_some(before));
                    run.extend((at + 1 == cut.len()).then_some(after));
                    if run.iter().map(|l| l.bytes).sum::<u64>() > most {
                        return None;
                    }
                    slowest = slowest.max(run.iter().map(|l| l.time).sum::<u64>());
                    from += own;
                }
                Some(slowest)
            };
            let expected = all(layers.len(), places).iter().filter_map(|cut| slowest(cut)).min();
            let found = cut(layers, before, after, places, most);
            without += usize::from(found.is_none());
            assert_eq!(found.as_deref().map(|cut| slowest(cut).expect("it has room")), expected);
        }
        assert!((20..280).contains(&without), "{without} have no cut");
    }
}
