//! Devices: what runs planned programs.
//!
//! A [`Device`] holds one program with all its state in one arena and runs its graphs. There are the interpreter
//! ([`interp`]), plain loops in f32 or f64 and the oracle of every test, the CPU ([`cpu`]), and with the features `wgpu` and
//! `cuda` GPUs (`cube`). What the passes must know of a device beforehand is its [`dsgc_ir::Target`].

use dsgc_ir::diag::Diag;
use dsgc_ir::{Bindings, Buffer, Graph, Region, StateId, Tensor};

pub mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod cube;
pub mod interp;
mod profile;
pub mod random;
pub mod ranks;
pub mod sample;

pub use profile::Launches;

/// A planned program with its state, ready to run.
pub trait Device {
    /// Name for messages and reports, e.g. `cpu`.
    fn name(&self) -> &str;

    /// Sets a parameter or state, and its copies. The tensor has the state's shape; floats of either width are taken, and
    /// rounded to the state's.
    fn set_state(&mut self, id: StateId, value: &Tensor);

    /// The same without its copies: of a state in parts, and of its copies, ranks hold parts of different shapes.
    fn set_part(&mut self, id: StateId, value: &Tensor);

    /// The current value of a parameter or state; floats in the device's width, narrow ones in f32.
    fn state(&self, id: StateId) -> Tensor;

    /// Runs a graph on named inputs and gives its named outputs. Symbolic dims are bound by the inputs' shapes;
    /// those that no input shows (such as in a graph without inputs) must not occur.
    ///
    /// Errors are the user's: a shape beyond its declared range, a token outside the vocabulary.
    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag>;

    /// Gives memory that holds nothing between two runs back to the system, until the next run needs it.
    fn rest(&mut self) {}

    /// The same as [`Device::run`] for some of the outputs: the others need not leave the device.
    fn run_for(
        &mut self,
        graph: &str,
        inputs: &[(&str, &Tensor)],
        wanted: &[&str],
    ) -> Result<Vec<(String, Tensor)>, Diag> {
        let mut outputs = self.run(graph, inputs)?;
        outputs.retain(|(name, _)| wanted.contains(&name.as_str()));
        Ok(outputs)
    }

    /// The same for several parts of a batch, one after the other; of each part what it gives. A device that runs a graph in
    /// pieces works on several parts at a time.
    fn run_parts(&mut self, graph: &str, parts: &[Vec<(&str, &Tensor)>]) -> Result<Vec<Vec<(String, Tensor)>>, Diag> {
        parts.iter().map(|inputs| self.run(graph, inputs)).collect()
    }

    /// Bytes that it has sent to other ranks for ops of graphs.
    fn sent(&self) -> u64 {
        0
    }

    /// Measures launches from now on; whether the device can. Until then it costs nothing.
    fn measure(&mut self) -> bool {
        false
    }

    /// What was measured; nothing where the device does not measure.
    fn measured(&self) -> Vec<Launches> {
        Vec::new()
    }
}

/// Fills bytes that hold nothing with a pattern that shows: as floats of either width NaN, as an integer -336_211, which is no
/// index, as a truth value neither.
fn poison(bytes: &mut [u8]) {
    const POISON: [u8; 4] = 0xFFFA_DEAD_u32.to_le_bytes();
    let (words, rest) = bytes.as_chunks_mut();
    words.fill(POISON);
    rest.copy_from_slice(&POISON[..rest.len()]);
}

/// The places of the values region, which has so many bytes, between those that a generation keeps.
fn between(kept: &[Buffer], end: usize) -> Vec<Buffer> {
    let mut kept: Vec<(usize, usize)> = kept.iter().map(|b| (b.offset, b.offset + b.bytes)).collect();
    kept.sort_unstable();
    let begins = std::iter::once(0).chain(kept.iter().map(|k| k.1));
    let ends = kept.iter().map(|k| k.0).chain([end]);
    let gap = |(begin, end): (usize, usize)| Buffer { region: Region::Values, offset: begin, bytes: end - begin };
    begins.zip(ends).map(gap).collect()
}

/// The values of a graph's symbols from the shapes of its inputs, checked against the declared types and ranges.
pub fn bind(graph: &Graph, inputs: &[(&str, &Tensor)]) -> Result<Bindings, Diag> {
    let mut bindings = Bindings::new();
    let wrong = |why: String| Diag::error(format!("graph @{}: {why}", graph.name));
    let find = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, t)| *t);
    if let Some((odd, _)) = inputs.iter().find(|(n, _)| graph.input_named(n).is_none()) {
        return Err(wrong(format!("no input is called `{odd}`")));
    }
    // Symbols are bound where they stand alone or times a number; every other place is checked afterwards.
    for value in graph.inputs() {
        let (name, ty) = (graph.name_of(value), graph.ty(value));
        let tensor = find(name).ok_or_else(|| wrong(format!("input `{name}` is missing")))?;
        if !tensor.fits(ty.dtype) || tensor.shape.len() != ty.rank() {
            let found = format!("{}{:?}", tensor.dtype(), tensor.shape);
            return Err(wrong(format!("input `{name}` is {found}, expected {ty}")));
        }
        for (dim, &extent) in ty.dims.iter().zip(&tensor.shape) {
            if let Some((factor, symbol)) = dim.as_scaled_symbol()
                && factor > 0
                && extent as i64 % factor == 0
            {
                bindings.entry(symbol.clone()).or_insert(extent as i64 / factor);
            }
        }
    }
    for range in &graph.dims {
        if let Some(&n) = bindings.get(&range.symbol)
            && !(range.min..=range.max).contains(&n)
        {
            let (symbol, min, max) = (&range.symbol, range.min, range.max);
            return Err(wrong(format!("{symbol} is {n}, planned for {min} to {max}")));
        }
    }
    for value in graph.inputs() {
        let (name, ty) = (graph.name_of(value), graph.ty(value));
        let expected = ty.shape(&bindings).map_err(|s| wrong(format!("no input shows how large `{s}` is")))?;
        let found = find(name).map(|t| t.shape.clone()).unwrap_or_default();
        if found != expected {
            return Err(wrong(format!("input `{name}` has the shape {found:?}, expected {ty} = {expected:?}")));
        }
    }
    Ok(bindings)
}
