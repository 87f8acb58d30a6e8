//! The mesh of ranks that run a program together, and what each of them holds of a state.
//!
//! Ranks are numbered along the mesh, the last axis fastest: `(pipeline * data + d) * tensor + t`. Inside a group, the ranks
//! that differ along one axis only, collectives put parts in this order.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::tensor::{Data, Tensor};

/// An axis of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Ranks with different rows of a batch.
    Data,
    /// Ranks that share every layer.
    Tensor,
    /// Ranks with different layers.
    Pipeline,
}

impl Axis {
    /// All of them, the slowest first.
    pub const ALL: [Axis; 3] = [Axis::Pipeline, Axis::Data, Axis::Tensor];

    /// The name in the text form and in YAML.
    pub fn name(self) -> &'static str {
        match self {
            Axis::Data => "data",
            Axis::Tensor => "tensor",
            Axis::Pipeline => "pipeline",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many ranks there are along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Ranks with different rows of a batch.
    pub data: usize,
    /// Ranks that share every layer.
    pub tensor: usize,
    /// Ranks with different layers.
    pub pipeline: usize,
}

impl Default for Mesh {
    fn default() -> Mesh {
        Mesh { data: 1, tensor: 1, pipeline: 1 }
    }
}

impl Mesh {
    /// Ranks along an axis.
    pub fn size(&self, axis: Axis) -> usize {
        match axis {
            Axis::Data => self.data,
            Axis::Tensor => self.tensor,
            Axis::Pipeline => self.pipeline,
        }
    }

    /// All ranks.
    pub fn ranks(&self) -> usize {
        self.data * self.tensor * self.pipeline
    }

    /// Whether there is one rank only.
    pub fn is_single(&self) -> bool {
        self.ranks() == 1
    }

    /// How far the ranks that differ by one along an axis are apart.
    fn stride(&self, axis: Axis) -> usize {
        match axis {
            Axis::Tensor => 1,
            Axis::Data => self.tensor,
            Axis::Pipeline => self.tensor * self.data,
        }
    }

    /// Where a rank stands along an axis.
    pub fn place(&self, axis: Axis, rank: usize) -> usize {
        rank / self.stride(axis) % self.size(axis)
    }

    /// The ranks that differ from this one along an axis only, itself among them, in the order of their places.
    pub fn group(&self, axis: Axis, rank: usize) -> Vec<usize> {
        let (stride, place) = (self.stride(axis), self.place(axis, rank));
        (0..self.size(axis)).map(|at| rank - place * stride + at * stride).collect()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes: Vec<String> = Axis::ALL.iter().map(|&a| format!("{a}={}", self.size(a))).collect();
        f.write_str(&axes.join(" "))
    }
}

/// A dim that is cut into one part for each rank along an axis.
///
/// Parts are equally long, `ceil(places / ranks)`: what the last ones have beyond the end is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The axis.
    pub over: Axis,
    /// The dim.
    pub dim: usize,
}

/// What each rank holds of a state, where it is not all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Extents of the whole.
    pub whole: Vec<usize>,
    /// The cuts, one after the other: a later one cuts what an earlier one leaves.
    pub cuts: Vec<Cut>,
    /// An axis over which the ranks' values are added up to the value that is meant.
    pub partial: Option<Axis>,
    /// Places along `pipeline` that have it, in their order; none where all have. A rank of another place has a part
    /// without elements, whose first dim is 0.
    pub places: Vec<usize>,
}

impl Placement {
    /// The whole on every rank.
    pub fn of_whole(whole: Vec<usize>) -> Placement {
        Placement { whole, cuts: Vec::new(), partial: None, places: Vec::new() }
    }

    /// Whether ranks of a place along `pipeline` have some of it.
    pub fn is_at(&self, place: usize) -> bool {
        self.places.is_empty() || self.places.contains(&place)
    }

    /// Extents of the part of a rank of a place along `pipeline`.
    pub fn local_at(&self, mesh: &Mesh, place: usize) -> Vec<usize> {
        let mut shape = self.local(mesh);
        if !self.is_at(place) {
            shape[0] = 0;
        }
        shape
    }

    /// Extents of the part of a rank that has some of it.
    pub fn local(&self, mesh: &Mesh) -> Vec<usize> {
        let mut shape = self.whole.clone();
        for cut in &self.cuts {
            shape[cut.dim] = shape[cut.dim].div_ceil(mesh.size(cut.over));
        }
        shape
    }

    /// The places of each dim that a rank holds, without what lies beyond the end.
    pub fn region(&self, mesh: &Mesh, rank: usize) -> Vec<Range<usize>> {
        let mut region: Vec<Range<usize>> = self.whole.iter().map(|&extent| 0..extent).collect();
        let mut local = self.whole.clone();
        for cut in &self.cuts {
            let (held, len) = (&mut region[cut.dim], local[cut.dim].div_ceil(mesh.size(cut.over)));
            let first = (held.start + mesh.place(cut.over, rank) * len).min(held.end);
            *held = first..(first + len).min(held.end);
            local[cut.dim] = len;
        }
        if !self.is_at(mesh.place(Axis::Pipeline, rank)) {
            region[0] = 0..0;
        }
        region
    }

    /// Places of the first dim that ranks with different rows share, where they do.
    pub fn cut_of_data(&self, mesh: &Mesh) -> Option<usize> {
        let at = self.cuts.iter().position(|cut| *cut == Cut { over: Axis::Data, dim: 0 })?;
        let before = Placement { cuts: self.cuts[..at].to_vec(), ..self.clone() };
        before.local(mesh).first().copied()
    }

    /// A rank's part of a tensor.
    ///
    /// # Panics
    /// If the tensor has other extents than the whole.
    pub fn part(&self, mesh: &Mesh, rank: usize, tensor: &Tensor) -> Tensor {
        assert_eq!(tensor.shape, self.whole, "a part of another tensor");
        let mut part = tensor.clone();
        for cut in &self.cuts {
            part = part.shard(cut.dim, mesh.size(cut.over), mesh.place(cut.over, rank));
        }
        if self.is_at(mesh.place(Axis::Pipeline, rank)) { part } else { part.rows(0..0) }
    }

    /// The whole from the parts of all ranks, in their order.
    ///
    /// # Panics
    /// If there are not as many parts as ranks.
    pub fn whole(&self, mesh: &Mesh, parts: &[Tensor]) -> Tensor {
        assert_eq!(parts.len(), mesh.ranks(), "a part of every rank");
        let mut whole = Tensor::zeros_like(&self.whole, &parts[0]);
        let mut put: Vec<Vec<usize>> = Vec::new();
        for (rank, part) in parts.iter().enumerate() {
            let region = self.region(mesh, rank);
            let first: Vec<usize> = region.iter().map(|places| places.start).collect();
            let extents: Vec<usize> = region.iter().map(|places| places.len()).collect();
            // Of what several ranks have, the first one's counts.
            if !extents.contains(&0) && !put.contains(&first) {
                let own = if part.shape == extents { part } else { &part.beginning(&extents) };
                whole.put(&first, own);
                put.push(first);
            }
        }
        whole
    }
}

impl Tensor {
    /// Zeros of the same kind as another tensor's elements.
    pub fn zeros_like(shape: &[usize], like: &Tensor) -> Tensor {
        let len = shape.iter().product();
        let data = match &like.data {
            Data::F32(_) => Data::F32(vec![0.0; len]),
            Data::F64(_) => Data::F64(vec![0.0; len]),
            Data::I32(_) => Data::I32(vec![0; len]),
            Data::Bool(_) => Data::Bool(vec![false; len]),
            Data::Key(_) => Data::Key(vec![[0; 2]; len]),
        };
        Tensor::new(shape, data)
    }

    /// The first places of all dims.
    pub fn beginning(&self, extents: &[usize]) -> Tensor {
        extents.iter().enumerate().fold(self.clone(), |t, (dim, &extent)| Tensor::unshard(dim, &[&t], extent))
    }

    /// Writes another tensor into this one, where `first` is the place of its first element.
    ///
    /// # Panics
    /// If it is of another kind, or does not fit there.
    pub fn put(&mut self, first: &[usize], part: &Tensor) {
        fn of<T: Copy>(whole: &mut [T], shape: &[usize], first: &[usize], part: &[T], extents: &[usize]) {
            let ([first, inner_first @ ..], [extent, inner @ ..]) = (first, extents) else {
                return whole.copy_from_slice(part);
            };
            let row: usize = shape[1..].iter().product();
            let places = &mut whole[first * row..(first + extent) * row];
            if shape[1..] == *inner {
                return places.copy_from_slice(part);
            }
            let own: usize = inner.iter().product();
            for (place, part) in places.chunks_mut(row).zip(part.chunks(own)) {
                of(place, &shape[1..], inner_first, part, inner);
            }
        }
        if part.is_empty() {
            return;
        }
        let Tensor { shape, data } = self;
        match (data, &part.data) {
            (Data::F32(v), Data::F32(part_v)) => of(v, shape, first, part_v, &part.shape),
            (Data::F64(v), Data::F64(part_v)) => of(v, shape, first, part_v, &part.shape),
            (Data::I32(v), Data::I32(part_v)) => of(v, shape, first, part_v, &part.shape),
            (Data::Bool(v), Data::Bool(part_v)) => of(v, shape, first, part_v, &part.shape),
            (Data::Key(v), Data::Key(part_v)) => of(v, shape, first, part_v, &part.shape),
            _ => panic!("a part of another kind of elements"),
        }
    }

    /// Part `at` of as many equally long ones along a dim as there are ranks; what lies beyond the end is 0.
    pub fn shard(&self, dim: usize, ranks: usize, at: usize) -> Tensor {
        fn of<T: Copy + Default>(v: &[T], inner: usize, extent: usize, from: usize, len: usize) -> Vec<T> {
            let row = |row: &[T]| {
                let (first, last) = (from.min(extent) * inner, (from + len).min(extent) * inner);
                let mut part = row[first..last].to_vec();
                part.resize(len * inner, T::default());
                part
            };
            v.chunks(extent * inner).flat_map(row).collect()
        }
        let (extent, inner) = (self.shape[dim], self.shape[dim + 1..].iter().product::<usize>());
        let len = extent.div_ceil(ranks);
        let mut shape = self.shape.clone();
        shape[dim] = len;
        if self.is_empty() {
            return Tensor { shape, data: self.data.clone() };
        }
        let from = at * len;
        let data = match &self.data {
            Data::F32(v) => Data::F32(of(v, inner, extent, from, len)),
            Data::F64(v) => Data::F64(of(v, inner, extent, from, len)),
            Data::I32(v) => Data::I32(of(v, inner, extent, from, len)),
            Data::Bool(v) => Data::Bool(of(v, inner, extent, from, len)),
            Data::Key(v) => Data::Key(of(v, inner, extent, from, len)),
        };
        Tensor { shape, data }
    }

    /// The first `extent` places along a dim of tensors that stand one after the other: what [`Tensor::shard`] cut.
    ///
    /// # Panics
    /// If they are of different kinds or extents, or there is none.
    pub fn unshard(dim: usize, parts: &[&Tensor], extent: usize) -> Tensor {
        fn of<T: Copy>(parts: &[&[T]], row: usize, wanted: usize) -> Vec<T> {
            let rows = parts[0].len().checked_div(row).unwrap_or(0);
            let joined = |at: usize| parts.iter().flat_map(move |p| &p[at * row..(at + 1) * row]).take(wanted).copied();
            (0..rows).flat_map(joined).collect()
        }
        macro_rules! joined {
            ($kind:ident, $row:expr, $wanted:expr) => {{
                let all = parts.iter().map(|part| match &part.data {
                    Data::$kind(v) => v.as_slice(),
                    _ => panic!("parts of different kinds of elements"),
                });
                Data::$kind(of(&all.collect::<Vec<_>>(), $row, $wanted))
            }};
        }
        assert!(parts.iter().all(|part| part.shape == parts[0].shape), "parts of different extents");
        let inner: usize = parts[0].shape[dim + 1..].iter().product();
        let (row, wanted) = (parts[0].shape[dim] * inner, extent * inner);
        let mut shape = parts[0].shape.clone();
        shape[dim] = extent;
        let data = match &parts[0].data {
            Data::F32(_) => joined!(F32, row, wanted),
            Data::F64(_) => joined!(F64, row, wanted),
            Data::I32(_) => joined!(I32, row, wanted),
            Data::Bool(_) => joined!(Bool, row, wanted),
            Data::Key(_) => joined!(Key, row, wanted),
        };
        Tensor::new(&shape, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_places_and_groups() {
        let mesh = Mesh { pipeline: 2, data: 3, tensor: 2 };
        let places = |rank| Axis::ALL.map(|axis| mesh.place(axis, rank));
        assert_eq!((places(0), places(1), places(2), places(11)), ([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 2, 1]));
        assert_eq!(mesh.group(Axis::Data, 3), [1, 3, 5]);
        assert_eq!(mesh.group(Axis::Pipeline, 8), [2, 8]);
        for (axis, rank) in Axis::ALL.into_iter().flat_map(|axis| (0..mesh.ranks()).map(move |rank| (axis, rank))) {
            assert_eq!(mesh.group(axis, rank)[mesh.place(axis, rank)], rank);
        }
    }

    #[test]
    fn places_that_have_nothing_have_no_elements() {
        let mesh = Mesh { pipeline: 3, data: 2, tensor: 1 };
        let tensor = Tensor::i32(&[3, 2], (1..=6).collect());
        let cuts = vec![Cut { over: Axis::Data, dim: 0 }];
        let placement = Placement { cuts, places: vec![1, 2], ..Placement::of_whole(vec![3, 2]) };
        let parts: Vec<Tensor> = (0..6).map(|rank| placement.part(&mesh, rank, &tensor)).collect();
        let shapes: Vec<&[usize]> = parts.iter().map(|part| part.shape.as_slice()).collect();
        assert_eq!(shapes, [[0, 2], [0, 2], [2, 2], [2, 2], [2, 2], [2, 2]]);
        for (rank, part) in parts.iter().enumerate() {
            assert_eq!(part.shape, placement.local_at(&mesh, mesh.place(Axis::Pipeline, rank)));
            assert_eq!(placement.region(&mesh, rank)[0].is_empty(), rank < 2);
        }
        assert_eq!(placement.whole(&mesh, &parts), tensor);
    }

    /// Uneven dims, one cut after the other on one dim, and cuts of two dims.
    #[test]
    fn parts_of_all_ranks_are_the_whole() {
        let mesh = Mesh { pipeline: 1, data: 3, tensor: 2 };
        let cut = |over, dim| Cut { over, dim };
        let all = [
            vec![cut(Axis::Data, 0)],
            vec![cut(Axis::Tensor, 1)],
            vec![cut(Axis::Tensor, 0), cut(Axis::Data, 0)],
            vec![cut(Axis::Tensor, 1), cut(Axis::Data, 0)],
        ];
        for (cuts, shape) in all.into_iter().flat_map(|c| [[7, 5], [6, 4], [2, 3]].map(move |s| (c.clone(), s))) {
            let tensor = Tensor::i32(&shape, (1..=(shape[0] * shape[1]) as i32).collect());
            let placement = Placement { cuts, ..Placement::of_whole(shape.to_vec()) };
            let parts: Vec<Tensor> = (0..6).map(|rank| placement.part(&mesh, rank, &tensor)).collect();
            assert!(parts.iter().all(|part| part.shape == placement.local(&mesh)));
            assert_eq!(placement.whole(&mesh, &parts), tensor, "{placement:?}");
            let mut whole = Tensor::i32(&shape, vec![0; tensor.len()]);
            for (rank, part) in parts.iter().enumerate() {
                let region = placement.region(&mesh, rank);
                let extents: Vec<usize> = region.iter().map(|places| places.len()).collect();
                let first: Vec<usize> = region.iter().map(|places| places.start).collect();
                whole.put(&first, &part.beginning(&extents));
            }
            assert_eq!(whole, tensor, "{placement:?}");
        }
    }
}
