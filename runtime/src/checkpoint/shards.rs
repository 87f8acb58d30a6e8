//! States that several ranks write, each its share, and that any number of ranks reads.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Axis, Program, StateId, Tensor};
use dsgc_kernels::ranks::Member;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::tensors::Stored;
use super::{Checkpoint, Opened, STATES, Written, kept, write_tensors};
use crate::session::Session;

/// States by their names.
pub(super) type Shards = BTreeMap<String, Shard>;

/// Where a state is.
#[derive(Serialize, Deserialize)]
pub(super) struct Shard {
    /// Extents of the whole.
    shape: Vec<usize>,
    parts: Vec<Part>,
}

/// A part of a state, in a file under the state's name.
#[derive(Serialize, Deserialize)]
struct Part {
    file: String,
    /// The place of its first element in the whole, dim by dim.
    first: Vec<usize>,
    shape: Vec<usize>,
}

/// The places of each dim that a rank holds of a state.
fn region(program: &Program, member: &Member, id: StateId, rank: usize) -> Vec<Range<usize>> {
    match &program.state(id).placement {
        Some(placement) => placement.region(&member.mesh, rank),
        None => program.state(id).whole_shape().into_iter().map(|extent| 0..extent).collect(),
    }
}

fn extents(region: &[Range<usize>]) -> Vec<usize> {
    region.iter().map(|places| places.len()).collect()
}

impl Session {
    /// Writes this rank's share: its parts of states, of which every one is written by one of those who hold it, in turn. Gives
    /// the files of all ranks, and where states are. All ranks call this.
    pub(super) fn write_shards(&self, folder: &Path) -> Result<(BTreeMap<String, Written>, Shards), Diag> {
        let (program, member, device) = (&self.program, &self.rank.member, self.device());
        let own = member.rank();
        // Ranks at other places of a pipeline hold other states.
        let at = |rank: usize| member.mesh.place(Axis::Pipeline, rank);
        let file = format!("states.{own}.safetensors");
        let (mut shards, mut stored) = (Shards::new(), Vec::new());
        for (turn, id) in kept(program).into_iter().enumerate() {
            let held = region(program, member, id, own);
            let ranks = (0..member.mesh.ranks()).filter(|&rank| at(rank) == at(own));
            let holders: Vec<usize> = ranks.filter(|&rank| region(program, member, id, rank) == held).collect();
            let (shape, name) = (extents(&held), &program.state(id).name);
            if holders[turn % holders.len()] != own || shape.contains(&0) {
                continue;
            }
            let first = held.iter().map(|places| places.start).collect();
            let part = Part { file: file.clone(), first, shape: shape.clone() };
            shards.insert(name.clone(), Shard { shape: program.state(id).whole_shape(), parts: vec![part] });
            let read = move || device.state(id).beginning(&extents(&held));
            stored.push((name.clone(), Stored::new(&device.state(id), shape, move || Cow::Owned(read()))));
        }
        let mut files = BTreeMap::new();
        if !stored.is_empty() {
            files.insert(file.clone(), write_tensors(&folder.join(&file), stored)?);
        }
        let message = serde_json::to_vec(&(&files, &shards)).unwrap_or_else(|e| panic!("bug: shards are no JSON: {e}"));
        let (mut files, mut shards) = (BTreeMap::new(), Shards::new());
        let all = member.all();
        all.note("where other ranks have written their shares");
        for message in all.messages(&message)? {
            let read = serde_json::from_slice::<(BTreeMap<String, Written>, Shards)>(&message);
            let (written, theirs) = read.unwrap_or_else(|e| panic!("bug: a rank sent no shards: {e}"));
            files.extend(written);
            for (name, Shard { shape, parts }) in theirs {
                let all = &mut shards.entry(name).or_insert(Shard { shape, parts: vec![] }).parts;
                // Of what two places of a pipeline hold, the first one's counts.
                let new: Vec<Part> =
                    parts.into_iter().filter(|part| all.iter().all(|other| other.first != part.first)).collect();
                all.extend(new);
            }
        }
        Ok((files, shards))
    }
}

impl Checkpoint {
    /// Reads every state; of one that ranks have in parts, what a rank of this program holds of it, and zeros elsewhere.
    pub(super) fn each_state(
        &self,
        program: &Program,
        member: &Member,
        mut take: impl FnMut(&str, Tensor) -> Result<(), Diag>,
    ) -> Result<(), Diag> {
        let shards = &self.manifest.shards;
        if shards.is_empty() {
            return self.each(STATES, take);
        }
        let names = self.manifest.files.keys().filter(|name| shards.values().any(|shard| shard.is_in(name)));
        let files: BTreeMap<&String, Opened> =
            names.map(|name| Ok((name, Opened::open(&self.path.join(name))?))).collect::<Result<_, Diag>>()?;
        let tensors: BTreeMap<&String, SafeTensors> =
            files.iter().map(|(name, file)| Ok((*name, file.tensors()?))).collect::<Result<_, Diag>>()?;
        for (name, shard) in shards {
            let wrong = |why: &str| Diag::error(format!("`{}`: {why} of `{name}`", self.path.display()));
            if !shard.is_whole() {
                return Err(wrong("the parts are not the whole"));
            }
            let needed = program.state_named(name).and_then(|id| needed(program, member, id));
            let mut whole: Option<Tensor> = None;
            for part in &shard.parts {
                if whole.is_some() && needed.as_ref().is_some_and(|needed| !part.meets(needed)) {
                    continue;
                }
                let lies = files.get(&part.file).zip(tensors.get(&part.file));
                let (file, tensors) = lies.ok_or_else(|| wrong("no file has a part"))?;
                let tensor = file.read(tensors, name)?;
                if tensor.shape != part.shape {
                    return Err(wrong("a file has another part"));
                }
                let whole = whole.get_or_insert_with(|| Tensor::zeros_like(&shard.shape, &tensor));
                if whole.dtype() != tensor.dtype() {
                    return Err(wrong("files have several kinds"));
                }
                whole.put(&part.first, &tensor);
            }
            take(name, whole.ok_or_else(|| wrong("no file has a part"))?)?;
        }
        Ok(())
    }
}

/// What a rank holds of a state and of its copies, if that is the same.
fn needed(program: &Program, member: &Member, id: StateId) -> Option<Vec<Range<usize>>> {
    let of = |id| region(program, member, id, member.rank());
    program.copies_of(id).into_iter().all(|copy| of(copy) == of(id)).then(|| of(id))
}

impl Shard {
    fn is_in(&self, file: &str) -> bool {
        self.parts.iter().any(|part| part.file == file)
    }

    /// Whether its parts lie within the whole, and are as many elements.
    fn is_whole(&self) -> bool {
        let count = |shape: &[usize]| shape.iter().try_fold(1usize, |all, &extent| all.checked_mul(extent));
        let within = |part: &Part| {
            let ranks = part.first.len() == self.shape.len() && part.shape.len() == self.shape.len();
            let ends = part.first.iter().zip(&part.shape).map(|(first, extent)| first.checked_add(*extent));
            ranks && ends.zip(&self.shape).all(|(end, whole)| end.is_some_and(|end| end <= *whole))
        };
        let parts = self.parts.iter().try_fold(0usize, |all, part| all.checked_add(count(&part.shape)?));
        self.parts.iter().all(within) && parts.is_some() && parts == count(&self.shape)
    }
}

impl Part {
    /// Whether it has elements in a region.
    fn meets(&self, region: &[Range<usize>]) -> bool {
        let (first, shape) = (self.first.iter(), self.shape.iter());
        first
            .zip(shape)
            .zip(region)
            .all(|((first, extent), places)| *first < places.end && places.start < first + extent)
    }
}
