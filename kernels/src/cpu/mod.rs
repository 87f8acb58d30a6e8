//! The CPU: planned graphs as kernel launches over one arena, on a fixed number of threads.
//!
//! The arena is all the memory there is: values lie where the plan says, kernels get their workspace from its scratch
//! region. Products run in blocks through register tiles ([`gemm`]); these and all other loops exist for AVX-512, AVX2 and
//! the least of the architecture, of which the machine's best is taken when a kernel runs. Results do not depend on the
//! number of threads: what threads share is cut by output elements, and sums run in blocks of a fixed size.
//!
//! One file per kernel family. A kernel may write its result over an operand where [`Op::in_place`] says so.

mod attention;
mod beside;
mod cached;
mod collective;
mod contract;
mod contract_each;
mod contract_fused;
mod elementwise;
mod fused;
pub mod gemm;
mod head;
mod kept;
mod lanes;
pub mod limits;
mod logp;
mod machine;
mod memory;
mod narrow;
mod norm;
mod parallel;
mod reduce;
mod rope;
mod skinny;
mod small;
mod structure;
mod tokens;
mod update;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::product_type;
use dsgc_ir::op::Class;
use dsgc_ir::stage::Sampling;
use dsgc_ir::verify::last_uses;
use dsgc_ir::{Bindings, Buffer, DType, Dim, Graph, Op, OpData, Planned, Region, StateId, Target, Tensor, Type, Value};

use crate::profile::Profile;
use crate::ranks::Member;
use crate::{Device, Launches, between, bind};
use beside::Beside;
pub use fused::{CompileTime, compile_time};
use memory::{ALIGNMENT, Memory, Ptr};
use parallel::Threads;

/// What passes must know of a CPU with this many threads.
#[derive(Clone, Copy, Debug)]
pub struct CpuTarget {
    /// Number of threads; workspaces are per thread.
    pub threads: usize,
}

impl Target for CpuTarget {
    fn name(&self) -> &str {
        "cpu"
    }

    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn missing_kernel(&self, op: &Op, args: &[Type]) -> Option<String> {
        match op {
            Op::ContractFused { bodies, .. } => contract_fused::missing(&args[..=bodies.len()]),
            _ => collective::missing(op),
        }
    }

    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        narrow::workspace(op, args, bounds, kept::workspace(op, args, bounds, self.threads))
    }

    fn memory(&self) -> Option<usize> {
        None
    }

    fn offloads(&self) -> bool {
        true
    }

    fn sends_beside(&self, op: &Op, args: &[Type]) -> bool {
        collective::runs_beside(op, args)
    }
}

/// Bytes of workspace of an op's kernel on operands in f32.
fn own_workspace(op: &Op, args: &[Type], bounds: &Bindings, threads: usize) -> usize {
    let shape = |i: usize| args[i].shape(bounds).unwrap_or_default();
    match op {
        Op::Contract { spec } => {
            let computes = product_type(args[0].dtype, args[1].dtype).unwrap_or(DType::F32);
            contract::workspace(spec, computes, &shape(0), &shape(1), threads)
        }
        Op::ReduceSum { .. } | Op::ReduceMax { .. } | Op::ReduceMin { .. } => {
            reduce::workspace(shape(0).iter().product())
        }
        Op::ContractEach { spec, common } => {
            let one = Op::Contract { spec: spec.clone() };
            let part = |other: &Type| {
                let mut pair = [args[0].clone(), other.clone()];
                pair.rotate_left(*common);
                own_workspace(&one, &pair, bounds, threads)
            };
            args[1..].iter().map(part).max().unwrap_or(0)
        }
        Op::ContractFused { spec, common, bodies } => {
            contract_fused::workspace((spec, *common, bodies), args, bounds, threads)
        }
        Op::SumSquares {} => (0..args.len()).map(|i| reduce::workspace(shape(i).iter().product())).sum(),
        Op::HeadLogp {} | Op::HeadLogpGrad { .. } => head::workspace(shape(2).iter().product(), &shape(1), threads),
        Op::AddRows {} => tokens::rows_workspace(shape(0)[1], threads),
        Op::LayerNormGrad { .. } | Op::RmsNormGrad { .. } => norm::workspace(&shape(0)),
        Op::Fused { shape, body } => fused::workspace((shape, body), args, bounds, threads),
        Op::CachedAttention { .. } => cached::workspace(&shape(0), &shape(1), threads),
        Op::TokenLogp {} | Op::TokenLogpGrad {} => {
            tokens::workspace(args[0].dtype, shape(0).last().copied().unwrap_or(0), threads)
        }
        Op::Attention { .. } => attention::workspace(shape(0)[1], shape(0)[3], threads),
        Op::AllGather { .. } | Op::AllReduce { .. } | Op::ReduceScatter { .. } => {
            collective::workspace(op, args, bounds)
        }
        Op::AttentionGrad { .. } => attention::grad_workspace(&shape(0), &shape(1), threads),
        _ => 0,
    }
}

/// A planned program in the memory of this machine.
pub struct Cpu {
    program: Arc<Planned>,
    memory: Memory,
    threads: Arc<Threads>,
    /// Per graph and op, what its bodies need to run.
    regions: Vec<Vec<Vec<Arc<fused::Region>>>>,
    /// Per graph and op, buffers that hold nothing any more afterwards; only where dead values are poisoned.
    dead: Option<Vec<Vec<Vec<Buffer>>>>,
    /// Counters of launches, while somebody wants them.
    profile: Option<Profile>,
    /// Which rank of those that run the program this is.
    member: Member,
    /// Bytes that it has sent to other ranks.
    sent: u64,
    /// What it sends beside other ops.
    beside: Beside,
}

impl Cpu {
    /// Takes a program that was planned for [`CpuTarget`] with this many threads. All states are zero.
    ///
    /// # Panics
    /// If the plan has less workspace than the kernels use: it was made for another device or for fewer threads.
    pub fn new(program: Planned, threads: usize) -> Cpu {
        let target = CpuTarget { threads };
        for graph in &program.graphs {
            let bounds = graph.upper_bounds();
            for (id, op) in graph.ops() {
                let types: Vec<Type> = op.args.iter().map(|&a| graph.ty(a).clone()).collect();
                let (needed, planned) = (target.workspace(&op.op, &types, &bounds), graph.scratch[id.0 as usize]);
                assert!(
                    needed <= planned,
                    "bug: `{}` in @{} needs {needed} bytes of workspace, and {planned} are planned",
                    op.op.name(),
                    graph.name
                );
            }
        }
        let memory = Memory::new(program.arena);
        let regions = fused::load(&program.graphs);
        let (threads, program) = (Arc::new(Threads::new(threads)), Arc::new(program));
        let (member, beside) = (Member::alone(), Beside::default());
        Cpu { memory, threads, regions, dead: None, profile: None, member, sent: 0, beside, program }
    }

    /// The same as one rank of several.
    pub fn as_member(self, member: Member) -> Cpu {
        Cpu { member, ..self }
    }

    /// The same, with all memory that holds nothing filled with NaN: a wrong plan shows in the results.
    pub fn poisoned(program: Planned, threads: usize) -> Cpu {
        let dead = program.graphs.iter().map(|graph| dead_buffers(graph, &program.kept_by_generation(graph))).collect();
        Cpu { dead: Some(dead), ..Cpu::new(program, threads) }
    }
}

/// Per op, the buffers of values that die there and whose bytes no living value shares, nor what a generation keeps.
fn dead_buffers(graph: &Graph, kept: &[Buffer]) -> Vec<Vec<Buffer>> {
    let last = last_uses(graph);
    let buffer = |v: Value| graph.buffer(v).expect("a planned program has a buffer for every value");
    let mut live: Vec<Value> = graph.inputs().collect();
    let mut dead = Vec::with_capacity(graph.len());
    for (id, op) in graph.ops() {
        live.extend(op.results());
        let (stay, die): (Vec<Value>, Vec<Value>) = live.into_iter().partition(|v| last[v.0 as usize] > id.0);
        live = stay;
        let shared = |b: Buffer| {
            live.iter()
                .map(|&v| buffer(v))
                .chain(kept.iter().copied())
                .any(|l| l.region == b.region && l.offset < b.offset + b.bytes && b.offset < l.offset + l.bytes)
        };
        dead.push(die.into_iter().map(buffer).filter(|b| b.region == Region::Values && !shared(*b)).collect());
    }
    dead
}

impl Device for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        let program = Arc::clone(&self.program);
        for id in [id].into_iter().chain(program.copies_of(id)) {
            self.set_part(id, value);
        }
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        let state = self.program.state(id);
        let shape = state.ty.shape(&Bindings::new()).expect("states have constant dims");
        assert!(value.fits(state.ty.dtype) && value.shape == shape, "bug: `@{}` is {}", state.name, state.ty);
        let buffer = state.buffer.expect("a planned program has a buffer for every state");
        self.memory.write(buffer, state.ty.dtype, value);
    }

    fn state(&self, id: StateId) -> Tensor {
        let state = self.program.state(id);
        let shape = state.ty.shape(&Bindings::new()).expect("states have constant dims");
        self.memory.read(state.buffer.expect("a planned program has a buffer for every state"), state.ty.dtype, &shape)
    }

    fn rest(&mut self) {
        self.memory.release(Region::Values);
        self.memory.release(Region::Scratch);
    }

    fn run(&mut self, name: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag> {
        let threads = Arc::clone(&self.threads);
        threads.enter(|| self.run_graph(name, inputs, None))
    }

    fn run_for(
        &mut self,
        name: &str,
        inputs: &[(&str, &Tensor)],
        wanted: &[&str],
    ) -> Result<Vec<(String, Tensor)>, Diag> {
        let threads = Arc::clone(&self.threads);
        threads.enter(|| self.run_graph(name, inputs, Some(wanted)))
    }

    fn sent(&self) -> u64 {
        self.sent
    }

    fn measure(&mut self) -> bool {
        self.profile = Some(Profile::default());
        true
    }

    fn measured(&self) -> Vec<Launches> {
        self.profile.as_ref().map_or(Vec::new(), |profile| profile.launches(&self.program.graphs))
    }
}

impl Cpu {
    /// Runs a graph; all outputs, or those that are wanted.
    fn run_graph(
        &mut self,
        name: &str,
        inputs: &[(&str, &Tensor)],
        wanted: Option<&[&str]>,
    ) -> Result<Vec<(String, Tensor)>, Diag> {
        let now = |profile: &Option<Profile>| profile.as_ref().map(|_| Instant::now());
        let begun = now(&self.profile);
        let program = Arc::clone(&self.program);
        let Some(at) = program.graphs.iter().position(|g| g.name == name) else {
            return Err(Diag::error(format!("the program has no graph @{name}")));
        };
        let graph = &program.graphs[at];
        let dims = bind(graph, inputs)?;
        if self.dead.is_some() {
            let gaps = between(&program.kept_by_generation(graph), program.arena.values);
            gaps.into_iter().for_each(|gap| self.memory.poison(gap));
        }
        for input in graph.inputs() {
            let tensor = inputs.iter().find(|(n, _)| *n == graph.name_of(input)).map(|(_, t)| *t);
            let tensor = tensor.expect("`bind` saw every input");
            let buffer = graph.buffer(input).expect("a planned program has a buffer for every value");
            self.memory.write(buffer, graph.ty(input).dtype, tensor);
        }
        // By op, the number of a collective that is on its way.
        let (beside, mut numbers) = (graph.beside(), BTreeMap::new());
        let [_, beside_bytes] = graph.workspace(&graph.scratch);
        for (id, op) in graph.ops() {
            if self.dead.is_some() {
                self.memory.poison_scratch(beside_bytes);
            }
            let started = now(&self.profile);
            let (scratch, regions) = (graph.scratch[id.0 as usize], &self.regions[at][id.0 as usize]);
            let mut launch = Launch {
                graph,
                op,
                dims: &dims,
                memory: &mut self.memory,
                threads: &self.threads,
                member: &self.member,
                sent: &mut self.sent,
                beside: &mut self.beside,
                scratch,
                is_beside: beside[id.0 as usize],
                regions,
                moved: Vec::new(),
                unpacked: false,
            };
            let done = match op.op {
                _ if launch.is_beside => collective::begin(&mut launch).map(|number| {
                    numbers.insert(id, number);
                }),
                Op::Wait {} => {
                    let sends = graph.def(op.args[0]).expect("the verifier saw what is waited for");
                    launch.beside.wait(numbers[&sends])
                }
                _ => launch.run(&program),
            };
            done.map_err(|why| {
                let what = format!("`{}` in graph @{}: {why}", op.op.name(), graph.name);
                Diag::error(what).label(op.site.loc.span, "")
            })?;
            if let (Some(profile), Some(started)) = (&mut self.profile, started) {
                profile.launched((at, id.0), graph, op, &dims, started.elapsed());
            }
            for &buffer in self.dead.iter().flat_map(|graphs| &graphs[at][id.0 as usize]) {
                self.memory.poison(buffer);
            }
        }
        self.sent += self.beside.take_sent();
        let read = |(name, value): &(String, Value)| {
            let shape = graph.ty(*value).shape(&dims).expect("every dim that a value needs is bound");
            let buffer = graph.buffer(*value).expect("a planned program has a buffer for every value");
            (name.clone(), self.memory.read(buffer, graph.ty(*value).dtype, &shape))
        };
        let wanted = |(name, _): &&(String, Value)| wanted.is_none_or(|all| all.contains(&name.as_str()));
        let outputs = graph.outputs.iter().filter(wanted).map(read).collect();
        if let (Some(profile), Some(begun)) = (&mut self.profile, begun) {
            profile.ran(at, begun.elapsed());
        }
        Ok(outputs)
    }
}

/// An op that runs now: its operands and results under the bound dims.
struct Launch<'a> {
    graph: &'a Graph,
    op: &'a OpData,
    dims: &'a Bindings,
    memory: &'a mut Memory,
    threads: &'a Threads,
    member: &'a Member,
    sent: &'a mut u64,
    beside: &'a mut Beside,
    /// Bytes of workspace.
    scratch: usize,
    /// Whether it runs beside other ops.
    is_beside: bool,
    /// What the op's bodies need to run, if it has any.
    regions: &'a [Arc<fused::Region>],
    /// Operands and results whose elements are of another type elsewhere while a kernel runs: f32 in the place of narrow
    /// ones, and what a product computes in in the place of weights that are kept in fewer bits.
    moved: Vec<(Value, Buffer, DType)>,
    /// Whether such weights have been moved.
    unpacked: bool,
}

impl Launch<'_> {
    fn run(&mut self, program: &Planned) -> Result<(), String> {
        // A dim that is negative is a slice beyond its operand; the interpreter's words.
        for value in self.op.results() {
            for dim in &self.graph.ty(value).dims {
                self.extent(dim)?;
            }
        }
        let types: Vec<DType> = self.op.args.iter().copied().chain(self.op.results()).map(|v| self.dtype(v)).collect();
        if self.moved.is_empty() && narrow::is_widened(&self.op.op, &types) {
            return narrow::run(self, program);
        }
        if !self.unpacked && kept::is_product(&self.op.op, &types) {
            return kept::run(self, program);
        }
        match &self.op.op {
            Op::Read { state } => {
                let from = program.state(*state).buffer.expect("a planned program has a buffer for every state");
                if from.region == Region::Host {
                    let to = self.buffer(self.op.result());
                    structure::copy(self, from, to);
                }
                Ok(())
            }
            Op::Write { state } => {
                let to = program.state(*state).buffer.expect("a planned program has a buffer for every state");
                let from = self.buffer(self.op.args[0]);
                if (from.region, from.offset) != (to.region, to.offset) {
                    structure::copy(self, from, to);
                }
                Ok(())
            }
            op if op.class() == Class::View => Ok(()),
            Op::Cast { .. } if types.iter().any(|dtype| dtype.is_quantized()) => {
                kept::cast(self);
                Ok(())
            }
            op if elementwise::has(op) => elementwise::run(self),
            Op::Fused { .. } => {
                fused::run(self);
                Ok(())
            }
            Op::Contract { spec } => contract::run(self, spec),
            Op::ContractEach { spec, common } => contract_each::run(self, spec, *common),
            Op::ContractFused { spec, common, bodies } => contract_fused::run(self, spec, *common, bodies),
            Op::SumSquares {} => {
                reduce::sum_squares(self);
                Ok(())
            }
            Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
                reduce::run(self, axes);
                Ok(())
            }
            Op::Cumsum { axis, reverse } => {
                reduce::cumsum(self, *axis, *reverse);
                Ok(())
            }
            Op::LayerNorm { eps } => {
                norm::forward(self, *eps);
                Ok(())
            }
            Op::LayerNormGrad { eps } => {
                norm::backward(self, *eps);
                Ok(())
            }
            Op::Attention { causal, scale, window } => {
                attention::forward(self, *causal, *scale, *window);
                Ok(())
            }
            Op::CachedAttention { scale, window } => cached::run(self, *scale, *window),
            Op::RmsNorm { eps } => {
                norm::rms_forward(self, *eps);
                Ok(())
            }
            Op::RmsNormGrad { eps } => {
                norm::rms_backward(self, *eps);
                Ok(())
            }
            Op::Rope { inverse } => {
                rope::run(self, *inverse);
                Ok(())
            }
            Op::Recurrence { axis, decay, reverse } => {
                reduce::recurrence(self, *axis, *decay as f32, *reverse);
                Ok(())
            }
            Op::Sample { temperature, top_k, top_p } => {
                tokens::sample(self, &Sampling { temperature: *temperature, top_k: *top_k, top_p: *top_p })
            }
            Op::AttentionGrad { causal, scale, window } => {
                attention::backward(self, *causal, *scale, *window);
                Ok(())
            }
            Op::Embed {} => tokens::embed(self),
            Op::EmbedGrad { .. } => tokens::embed_grad(self),
            Op::AddRows {} => tokens::add_rows(self),
            Op::TokenLogp {} => tokens::logp(self),
            Op::TokenLogpGrad {} => tokens::logp_grad(self),
            Op::HeadLogp {} => head::run(self, None),
            Op::HeadLogpGrad { head } => head::run(self, Some(*head)),
            Op::PositionIn {} => {
                tokens::position_in(self);
                Ok(())
            }
            Op::Fold { .. } | Op::RandomNormal { .. } | Op::RandomUniform { .. } | Op::RowUniform { .. } => {
                update::random(self);
                Ok(())
            }
            Op::Adamw { .. } => {
                update::adamw(self);
                Ok(())
            }
            Op::AllReduce { .. } | Op::AllGather { .. } | Op::ReduceScatter { .. } | Op::Shard { .. } => {
                collective::run(self)
            }
            _ => structure::run(self),
        }
    }

    /// A launch of a part of the op in the same workspace.
    fn part<'b>(&'b mut self, part: &'b OpData) -> Launch<'b> {
        Launch {
            graph: self.graph,
            op: part,
            dims: self.dims,
            memory: self.memory,
            threads: self.threads,
            member: self.member,
            sent: self.sent,
            beside: self.beside,
            scratch: self.scratch,
            is_beside: self.is_beside,
            regions: &[],
            moved: self.moved.clone(),
            unpacked: self.unpacked,
        }
    }

    /// The only result.
    fn result(&self) -> Value {
        self.op.result()
    }

    fn dtype(&self, value: Value) -> DType {
        let moved = self.moved.iter().find(|m| m.0 == value);
        moved.map_or(self.graph.ty(value).dtype, |m| m.2)
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

    fn buffer(&self, value: Value) -> Buffer {
        if let Some(&(_, buffer, _)) = self.moved.iter().find(|m| m.0 == value) {
            return buffer;
        }
        self.graph.buffer(value).expect("a planned program has a buffer for every value")
    }

    /// The elements of operand `i`.
    fn arg<T>(&mut self, i: usize) -> Ptr<T> {
        self.memory.at(self.buffer(self.op.args[i]))
    }

    /// The elements of result `i`.
    fn out<T>(&mut self, i: usize) -> Ptr<T> {
        let value = self.op.results().nth(i).expect("the op has this result");
        self.memory.at(self.buffer(value))
    }

    /// The kernel's workspace.
    fn workspace<T>(&mut self) -> Ptr<T> {
        self.memory.scratch(self.scratch, self.is_beside)
    }

    /// Rows of the last dim: how many, and how wide.
    fn rows(&self, value: Value) -> (usize, usize) {
        let shape = self.shape(value);
        let (width, lead) = shape.split_last().map_or((1, &[] as &[usize]), |(w, lead)| (*w, lead));
        (lead.iter().product(), width)
    }
}
