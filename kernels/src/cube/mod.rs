//! GPUs: planned graphs as kernel launches over one arena, through CubeCL.
//!
//! Everything that knows CubeCL lives in this folder. One code serves every runtime: [`Cube`] is generic over it, and
//! kernels are written once. Kernels are given parts of the arena by offset, in the order of the plan, and nothing waits for
//! the device until values are read. What goes wrong in a kernel (a token outside of the vocabulary) is written to a place of
//! its own, which is read together with the next values.
//!
//! Memory is seen as 32-bit words. Four truth values share one, and two narrow floats, so a unit of a kernel makes all that
//! share a word. Kernels that know f32 only find narrow floats widened in the workspace.
//! Reductions have fixed orders and there are no atomics: results depend on the sizes alone.
//!
//! An operand whose place a result may take ([`Op::in_place`]) is a mutable array of its kernel, though nothing is written
//! through it: of the others CUDA's compiler is told that nobody writes to them, and may read them as late as it likes.

mod attention;
mod collective;
mod contract;
mod cores;
mod head;
mod index;
mod kept;
mod lowering;
mod math;
mod memory;
mod movement;
#[cfg(feature = "cuda")]
mod nccl;
mod norm;
mod platform;
mod reduce;
mod region;
mod steps;
mod target;
mod tokens;
mod update;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use cubecl::client::ComputeClient;
use cubecl::prelude::*;
use dsgc_ir::diag::Diag;
use dsgc_ir::op::Class;
use dsgc_ir::stage::Sampling;
use dsgc_ir::{Bindings, Buffer, DType, Dim, Graph, Op, OpData, Planned, Region, StateId, Tensor, Type, Value};

use crate::profile::Profile;
use crate::ranks::Member;
use crate::{Device, Launches, bind};
use attention::Look;
use collective::Direct;
use memory::{Gives, Memory};
pub use platform::{Description, built, describe, has_hardware, open, present, target};
pub use target::{CubeTarget, Platform};

/// Units of a cube of kernels in which every unit works alone.
const UNITS: u32 = 256;

/// Cubes along one dim of a launch: what every runtime allows.
const MOST_CUBES: usize = 65535;

/// A planned program in the memory of a GPU.
pub struct Cube<R: Runtime> {
    platform: Platform,
    program: Arc<Planned>,
    client: ComputeClient<R>,
    memory: Memory<R>,
    member: Member,
    /// Whether products run on tensor cores.
    cores: bool,
    direct: Option<Box<dyn Direct<R>>>,
    /// Bytes that collectives have sent.
    sent: Cell<u64>,
    profile: Option<Profile>,
}

impl<R: Runtime> Cube<R> {
    /// Takes a program that was planned for [`CubeTarget`]. All states are zero. An error where the device does not give
    /// so much memory.
    fn new(
        program: Planned,
        target: CubeTarget,
        client: ComputeClient<R>,
        gives: Gives,
        member: Member,
        direct: Option<Box<dyn Direct<R>>>,
    ) -> Result<Cube<R>, Diag> {
        let memory = Memory::new(&client, program.arena, gives)?;
        let (program, CubeTarget { platform, cores, .. }) = (Arc::new(program), target);
        Ok(Cube { platform, program, client, memory, member, cores, direct, sent: Cell::new(0), profile: None })
    }

    /// What a code of [`Launch::code`] names.
    fn launched(&self, code: u32) -> Option<(&Graph, &OpData)> {
        let mut before = 1;
        self.program.graphs.iter().find_map(|graph| {
            let own = code.checked_sub(before)?;
            before += graph.len() as u32;
            graph.ops().find(|(id, _)| id.0 == own).map(|(_, op)| (graph, op))
        })
    }

    /// An error for what a kernel wrote into the place for faults.
    fn fault(&self, words: [u32; 3]) -> Result<(), Diag> {
        let Some((graph, op)) = self.launched(words[0]) else { return Ok(()) };
        self.memory.clear_faults(&self.client);
        let found = words[1].cast_signed();
        let dims = |value: Value| &graph.ty(value).dims;
        let outside = |what: &str, rows: &Dim| match rows.eval(&Bindings::new()) {
            Ok(n) => format!("found {what} {found}, expected one of 0 to {} ({n} rows)", n - 1),
            Err(_) => format!("found {what} {found}, expected one of 0 to {rows} - 1"),
        };
        let place =
            |len: &Dim, axis: usize| format!("found place {found} for {len} of {} places", dims(op.args[0])[axis]);
        let why = match &op.op {
            Op::Embed {} | Op::AddRows {} => outside("index", &dims(op.args[0])[0]),
            Op::EmbedGrad { rows } => outside("index", rows),
            Op::TokenLogp {} | Op::TokenLogpGrad {} => {
                outside("token", dims(op.args[0]).last().expect("logits have a dim"))
            }
            Op::SliceAt { axis, len } => place(len, *axis),
            Op::WriteAt { axis } => place(&dims(op.args[1])[*axis], *axis),
            Op::CachedAttention { .. } => {
                format!("found place {found} for {} of {} places", dims(op.args[0])[1], dims(op.args[1])[1])
            }
            Op::Sample { .. } => {
                let (logit, row) = (f32::from_bits(words[1]), words[2].cast_signed());
                format!("found the logit {logit} in row {row}, expected finite numbers")
            }
            Op::Div {} => "an integer is divided by zero".into(),
            other => panic!("bug: `{}` found something wrong", other.name()),
        };
        let what = format!("`{}` in graph @{}: {why}", op.op.name(), graph.name);
        Err(Diag::error(what).label(op.site.loc.span, ""))
    }

    fn run_graph(
        &mut self,
        name: &str,
        inputs: &[(&str, &Tensor)],
        wanted: Option<&[&str]>,
    ) -> Result<Vec<(String, Tensor)>, Diag> {
        let program = Arc::clone(&self.program);
        let Some(at) = program.graphs.iter().position(|g| g.name == name) else {
            return Err(Diag::error(format!("the program has no graph @{name}")));
        };
        let graph = &program.graphs[at];
        let dims = bind(graph, inputs)?;
        let buffer = |value: Value| graph.buffer(value).expect("a planned program has a buffer for every value");
        let given = graph.inputs().map(|input| {
            let tensor = inputs.iter().find(|(n, _)| *n == graph.name_of(input)).map(|(_, t)| *t);
            (buffer(input), graph.ty(input).dtype, tensor.expect("`bind` saw every input"))
        });
        self.memory.write(&self.client, &given.collect::<Vec<_>>());
        let begun = self.now()?;
        let before: usize = program.graphs[..at].iter().map(Graph::len).sum();
        for (id, op) in graph.ops() {
            let started = self.now()?;
            let launch = Launch {
                client: &self.client,
                memory: &self.memory,
                member: &self.member,
                cores: self.cores,
                direct: self.direct.as_deref(),
                sent: &self.sent,
                graph,
                op,
                scratch: graph.scratch[id.0 as usize],
                dims: &dims,
                code: (1 + before) as u32 + id.0,
                wide: Vec::new(),
            };
            launch.run_wide(&program).map_err(|why| {
                let what = format!("`{}` in graph @{}: {why}", op.op.name(), graph.name);
                Diag::error(what).label(op.site.loc.span, "")
            })?;
            if let Some(started) = started {
                let ended = self.now()?.unwrap_or(started);
                let profile = self.profile.as_mut().expect("it measures");
                profile.launched((at, id.0), graph, op, &dims, ended - started);
            }
        }
        if let (Some(profile), Some(begun)) = (&mut self.profile, begun) {
            profile.ran(at, begun.elapsed());
        }
        let wanted = |name: &str| wanted.is_none_or(|all| all.contains(&name));
        let outputs: Vec<(&String, Value)> =
            graph.outputs.iter().filter(|(name, _)| wanted(name)).map(|(name, value)| (name, *value)).collect();
        if outputs.is_empty() {
            return Ok(Vec::new());
        }
        let parts: Vec<_> = outputs
            .iter()
            .map(|&(_, value)| {
                let shape = graph.ty(value).shape(&dims).expect("every dim that a value needs is bound");
                (buffer(value), graph.ty(value).dtype, shape)
            })
            .collect();
        let (tensors, faults) = self.memory.read(&self.client, &parts).map_err(|why| self.failed(&why))?;
        self.fault(faults)?;
        Ok(outputs.into_iter().map(|(name, _)| name.clone()).zip(tensors).collect())
    }

    /// Sets states to the same numbers.
    fn set_states(&mut self, all: &[StateId], value: &Tensor) {
        let part = |&id: &StateId| {
            let state = self.program.state(id);
            let shape = state.ty.shape(&Bindings::new()).expect("states have constant dims");
            assert!(value.fits(state.ty.dtype) && value.shape == shape, "bug: `@{}` is {}", state.name, state.ty);
            (state.buffer.expect("a planned program has a buffer for every state"), state.ty.dtype, value)
        };
        let parts: Vec<_> = all.iter().map(part).collect();
        self.memory.write(&self.client, &parts);
    }

    /// The time, when all that was launched is done, if launches are measured.
    fn now(&self) -> Result<Option<Instant>, Diag> {
        if self.profile.is_none() {
            return Ok(None);
        }
        cubecl::future::block_on(self.client.sync()).map_err(|why| self.failed(&memory::explained(why)))?;
        Ok(Some(Instant::now()))
    }

    fn failed(&self, why: &str) -> Diag {
        Diag::error(format!("the device `{}` failed: {why}", self.platform.name()))
    }
}

impl<R: Runtime> Device for Cube<R> {
    fn name(&self) -> &str {
        self.platform.name()
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        let all: Vec<StateId> = [id].into_iter().chain(self.program.copies_of(id)).collect();
        self.set_states(&all, value);
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.set_states(&[id], value);
    }

    fn state(&self, id: StateId) -> Tensor {
        let state = self.program.state(id);
        let shape = state.ty.shape(&Bindings::new()).expect("states have constant dims");
        let buffer = state.buffer.expect("a planned program has a buffer for every state");
        let read = self.memory.read(&self.client, &[(buffer, state.ty.dtype, shape)]);
        let (mut tensors, _) = read.unwrap_or_else(|why| panic!("the device `{}` failed: {why}", self.platform.name()));
        tensors.remove(0)
    }

    fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// The host waits for each launch from now on.
    fn measure(&mut self) -> bool {
        self.profile = Some(Profile::default());
        true
    }

    fn measured(&self) -> Vec<Launches> {
        self.profile.as_ref().map_or(Vec::new(), |profile| profile.launches(&self.program.graphs))
    }

    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag> {
        self.run_graph(graph, inputs, None)
    }

    fn run_for(
        &mut self,
        graph: &str,
        inputs: &[(&str, &Tensor)],
        wanted: &[&str],
    ) -> Result<Vec<(String, Tensor)>, Diag> {
        self.run_graph(graph, inputs, Some(wanted))
    }
}

/// An op that is launched under the bound dims.
struct Launch<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    memory: &'a Memory<R>,
    member: &'a Member,
    cores: bool,
    direct: Option<&'a dyn Direct<R>>,
    sent: &'a Cell<u64>,
    graph: &'a Graph,
    op: &'a OpData,
    /// Bytes of workspace.
    scratch: usize,
    dims: &'a Bindings,
    /// Names the op among those of all graphs, from 1.
    code: u32,
    /// Narrow floats that the kernel finds in single precision in the workspace.
    wide: Vec<(Value, Buffer)>,
}

impl<R: Runtime> Launch<'_, R> {
    /// Runs the op, with narrow floats widened before it and rounded after it where its kernels know f32 only.
    fn run_wide(mut self, program: &Planned) -> Result<(), String> {
        // Behind the kernel's own workspace, as `workspace` says.
        let mut end = self.scratch;
        let types: Vec<Type> = self.op.args.iter().map(|&arg| self.graph.ty(arg).clone()).collect();
        let (reads, writes) = target::knows_narrow(&self.op.op, &types);
        let operands = self.op.args.iter().copied().filter(|_| !reads);
        let values: Vec<Value> = operands.chain(self.op.results().filter(|_| !writes)).collect();
        for value in values {
            if self.dtype(value).is_narrow() && self.wide.iter().all(|(known, _)| *known != value) {
                let bytes = 4 * self.len(value);
                end -= bytes.next_multiple_of(target::ALIGNMENT);
                self.wide.push((value, Buffer { region: Region::Scratch, offset: end, bytes }));
            }
        }
        let wide = std::mem::take(&mut self.wide);
        let (before, after): (Vec<_>, Vec<_>) =
            wide.iter().copied().partition(|(value, _)| self.op.args.contains(value));
        for (value, buffer) in before {
            region::cast(&self, region::Operand::of(&self, value), buffer, DType::F32);
        }
        self.scratch = end;
        self.wide = wide;
        self.run(program)?;
        self.wide.clear();
        for (value, buffer) in after {
            let from = region::Operand { buffer, shape: self.shape(value), dtype: DType::F32 };
            region::cast(&self, from, self.buffer(value), self.dtype(value));
        }
        Ok(())
    }

    fn run(&self, program: &Planned) -> Result<(), String> {
        // A dim that is negative is a slice beyond its operand; the interpreter's words.
        for value in self.op.results() {
            for dim in &self.graph.ty(value).dims {
                self.extent(dim)?;
            }
        }
        match &self.op.op {
            Op::Read { .. } => {}
            Op::Write { state } => {
                let to = program.state(*state).buffer.expect("a planned program has a buffer for every state");
                let from = self.buffer(self.op.args[0]);
                if (from.region, from.offset) != (to.region, to.offset) {
                    self.memory.copy(self.client, from, to);
                }
            }
            op if op.class() == Class::View => {}
            op if op.class() == Class::Collective => collective::run(self)?,
            Op::Shard { .. } => collective::run(self)?,
            Op::Cast { dtype } if dtype.is_quantized() || self.dtype(self.op.args[0]).is_quantized() => {
                kept::cast(self)
            }
            op if op.class() == Class::Elementwise => region::single(self),
            Op::Fused { shape, body } => {
                let shape = shape.iter().map(|dim| self.extent(dim)).collect::<Result<Vec<usize>, String>>()?;
                region::fused(self, &shape, body);
            }
            Op::Contract { spec } => contract::run(self, spec, [0, 1], 0),
            Op::ContractEach { spec, common } => {
                for i in 1..self.op.args.len() {
                    let mut pair = [0, i];
                    pair.rotate_left(*common);
                    contract::run(self, spec, pair, i - 1);
                }
            }
            Op::ContractFused { spec, common, bodies } => contract::finished(self, spec, *common, bodies),
            Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => reduce::run(self, axes),
            Op::SumSquares {} => reduce::sum_squares(self),
            Op::Cumsum { axis, reverse } => reduce::along(self, *axis, 1.0, *reverse),
            Op::Recurrence { axis, decay, reverse } => reduce::along(self, *axis, *decay, *reverse),
            Op::LayerNorm { eps } => norm::run(self, *eps, true),
            Op::RmsNorm { eps } => norm::run(self, *eps, false),
            Op::LayerNormGrad { eps } => norm::gradient(self, *eps, true),
            Op::RmsNormGrad { eps } => norm::gradient(self, *eps, false),
            &Op::Attention { causal, scale, window } => attention::run(self, Look { causal, scale, window }),
            &Op::CachedAttention { scale, window } => attention::run(self, Look { causal: true, scale, window }),
            &Op::AttentionGrad { causal, scale, window } => attention::gradient(self, Look { causal, scale, window }),
            Op::Embed {} => tokens::embed(self),
            Op::EmbedGrad { .. } | Op::AddRows {} => tokens::embed_grad(self),
            Op::TokenLogp {} | Op::TokenLogpGrad {} => tokens::log_probabilities(self),
            Op::HeadLogp {} | Op::HeadLogpGrad { .. } => head::run(self),
            &Op::Sample { temperature, top_k, top_p } => {
                tokens::sample(self, &Sampling { temperature, top_k, top_p });
            }
            Op::PositionIn {} => tokens::position_in(self),
            Op::Rope { inverse } => update::rope(self, *inverse),
            Op::Adamw { .. } => update::optimizer(self),
            Op::Fold { .. } | Op::RandomNormal { .. } | Op::RandomUniform { .. } | Op::RowUniform { .. } => {
                update::random(self);
            }
            _ => movement::run(self)?,
        }
        Ok(())
    }

    /// Of a value's elements, as the kernel finds them.
    fn dtype(&self, value: Value) -> DType {
        if self.widened(value).is_some() { DType::F32 } else { self.graph.ty(value).dtype }
    }

    fn widened(&self, value: Value) -> Option<Buffer> {
        self.wide.iter().find(|(wide, _)| *wide == value).map(|(_, buffer)| *buffer)
    }

    fn shape(&self, value: Value) -> Vec<usize> {
        self.graph.ty(value).shape(self.dims).expect("every dim that a value needs is bound")
    }

    fn len(&self, value: Value) -> usize {
        self.shape(value).iter().product()
    }

    fn extent(&self, dim: &Dim) -> Result<usize, String> {
        let n = dim.eval(self.dims).map_err(|symbol| format!("no input shows how large `{symbol}` is"))?;
        usize::try_from(n).map_err(|_| format!("`{dim}` is {n}, expected at least 0"))
    }

    /// A value's elements, for a kernel.
    fn words(&self, value: Value) -> ArrayArg<R> {
        self.memory.words(self.buffer(value))
    }

    fn buffer(&self, value: Value) -> Buffer {
        let planned = || self.graph.buffer(value).expect("a planned program has a buffer for every value");
        self.widened(value).unwrap_or_else(planned)
    }

    /// Operand `i`.
    fn arg(&self, i: usize) -> ArrayArg<R> {
        self.words(self.op.args[i])
    }

    /// Result `i`.
    fn out(&self, i: usize) -> ArrayArg<R> {
        self.words(self.op.results().nth(i).expect("the op has this result"))
    }

    /// The code of an op that found something wrong, and what it found.
    fn faults(&self) -> ArrayArg<R> {
        self.memory.faults()
    }

    /// The kernel's workspace.
    fn workspace(&self) -> ArrayArg<R> {
        self.memory.words(self.scratch())
    }

    fn scratch(&self) -> Buffer {
        Buffer { region: Region::Scratch, offset: 0, bytes: self.scratch }
    }

    /// Cubes for so many units that work alone.
    fn units(&self, n: usize) -> (CubeCount, CubeDim) {
        units(n)
    }
}

/// Cubes for so many units that work alone.
fn units(n: usize) -> (CubeCount, CubeDim) {
    (cubes(n.div_ceil(UNITS as usize)), CubeDim::new_1d(UNITS))
}

/// So many cubes or a few more, in two dims where one does not hold them.
fn cubes(n: usize) -> CubeCount {
    let x = n.clamp(1, MOST_CUBES);
    CubeCount::Static(x as u32, n.div_ceil(x) as u32, 1)
}

/// Shapes and strides for a kernel.
fn numbers<R: Runtime>(all: &[usize]) -> SequenceArg<R, u32> {
    all.iter().map(|&n| n as u32).collect()
}
