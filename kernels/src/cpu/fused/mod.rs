//! Fused regions: many elementwise ops, around a reduction or not ([`reduced`]), in one pass over memory.
//!
//! A region runs block by block. The elements of a block go through all stages of the region's [`Plan`] while they are
//! in the cache nearest to the core: arithmetic in code that Cranelift compiles when the program is loaded ([`jit`]),
//! functions in the kernels of their ops. Bits are those of the ops apart. What is compiled is kept until the process
//! ends, so a body that another stage of a pipeline has as well costs nothing.

mod jit;
mod plan;
mod reduced;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dsgc_ir::body::{ProductPart, product_parts};
use dsgc_ir::infer::Contraction;
use dsgc_ir::{Bindings, Body, DType, Dim, Graph, Op, OpData, Type, Value};

use super::Launch;
use super::elementwise::{Row, row};
use super::lanes::{fence, stream_copy, streams};
use super::memory::Ptr;
use super::narrow::round;
use super::parallel::{GRAIN, Threads};
use super::structure::strides;
use jit::{Code, LANES};
use plan::{Home, Plan, Stage, step_args};
use reduced::Reduced;

/// Elements of a block: ten blocks of floats are in a first-level cache of 48 KiB at once.
const BLOCK: usize = 1024;

/// A region that is ready to run.
pub(super) struct Region {
    body: Body,
    plan: Plan,
    stages: Vec<Compiled>,
    /// Kernels of the steps of the row, in order.
    row_steps: Vec<Row>,
}

/// A stage that is ready to run; values are numbers of the body's values.
enum Compiled {
    Row {
        kernel: Row,
        args: Vec<usize>,
        to: usize,
    },
    Code {
        code: Code,
        from: Vec<usize>,
        to: Vec<usize>,
    },
    /// Of elements that come from more than one block: [`reduced`] does it.
    Reduce,
}

/// What was compiled since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompileTime {
    /// Regions with code of their own.
    pub regions: usize,
    /// Time in the compiler.
    pub spent: Duration,
}

impl std::ops::Sub for CompileTime {
    type Output = CompileTime;
    fn sub(self, before: CompileTime) -> CompileTime {
        CompileTime { regions: self.regions - before.regions, spent: self.spent - before.spent }
    }
}

struct Cache {
    regions: BTreeMap<String, Arc<Region>>,
    time: CompileTime,
}

static CACHE: Mutex<Cache> =
    Mutex::new(Cache { regions: BTreeMap::new(), time: CompileTime { regions: 0, spent: Duration::ZERO } });

/// How many fused regions this process has compiled, and in what time.
pub fn compile_time() -> CompileTime {
    CACHE.lock().unwrap_or_else(PoisonError::into_inner).time
}

/// Bytes of workspace that a region of these dims needs, after a product too.
pub(super) fn workspace((shape, body): (&[Dim], &Body), args: &[Type], bounds: &Bindings, threads: usize) -> usize {
    let operands: Vec<DType> = args.iter().map(|a| a.dtype).collect();
    let plan = Plan::new(body, &operands, &of_rows(shape, body, args), jit::available());
    let stretched = may_stretch(shape, args).into_iter().filter(|&may| may).count();
    let rounded = usize::from(args[0].dtype.is_narrow());
    let extents: Vec<usize> = shape.iter().map(|d| d.eval(bounds).map_or(0, |n| n.max(0) as usize)).collect();
    let block = reduced::largest_block(body, &extents) * size_of::<f32>();
    let buffers = plan.buffers + stretched + body.results().len() + rounded + reduced::buffers(body, &plan);
    (buffers * block * threads.max(1)).saturating_add(reduced::partial_bytes(body, &extents))
}

/// Which values of a body are of the row.
fn of_rows(shape: &[Dim], body: &Body, args: &[Type]) -> Vec<bool> {
    body.of_rows(shape.len(), |arg, from_last| {
        args[arg].dims.iter().rev().nth(from_last).is_none_or(|dim| dim.constant() == Some(1))
    })
}

/// Which operands may stay in place along a row of the region and then need a buffer: all that are not as large as the
/// region, but for those that surely have its last dim.
fn may_stretch(shape: &[Dim], args: &[Type]) -> Vec<bool> {
    let last = shape.last().filter(|d| d.constant().is_some_and(|n| n > 1));
    args.iter().map(|arg| arg.dims != shape && (last.is_none() || arg.dims.last() != last)).collect()
}

/// The bodies of an op, each with the types of its operands, and which of its values are of the row.
fn bodies<'g>(graph: &Graph, op: &'g OpData) -> Vec<(&'g Body, Vec<DType>, Vec<bool>)> {
    let types = |args: &[Value]| args.iter().map(|&a| graph.ty(a).dtype).collect::<Vec<DType>>();
    match &op.op {
        Op::Fused { shape, body } => {
            let args: Vec<Type> = op.args.iter().map(|&a| graph.ty(a).clone()).collect();
            vec![(body, types(&op.args), of_rows(shape, body, &args))]
        }
        Op::ContractFused { spec, bodies, .. } => {
            let product = product_type(spec, graph.ty(op.args[0]).dtype);
            let parts = product_parts(bodies).into_iter().zip(bodies);
            let part = |(part, body): (ProductPart, &'g Body)| {
                let rows = vec![false; body.operands() + body.steps().len()];
                (body, [&[product], &types(&op.args[part.operands])[..]].concat(), rows)
            };
            parts.map(part).collect()
        }
        _ => vec![],
    }
}

/// The element type of a product.
fn product_type(spec: &str, operands: DType) -> DType {
    let wide = Contraction::parse(spec).is_ok_and(|labels| labels.wide);
    if wide { DType::F32 } else { operands }
}

/// The regions of some graphs, by graph, op and body; compiles those that this process has not met yet.
pub(super) fn load(graphs: &[Graph]) -> Vec<Vec<Vec<Arc<Region>>>> {
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut new: BTreeMap<String, (Body, Plan)> = BTreeMap::new();
    let key = |body: &Body, operands: &[DType], rows: &[bool]| {
        let rows: Vec<usize> = (0..rows.len()).filter(|&v| rows[v]).collect();
        format!("{operands:?} {body} {rows:?}")
    };
    for graph in graphs {
        for (body, operands, rows) in graph.ops().flat_map(|(_, op)| bodies(graph, op)) {
            let key = key(body, &operands, &rows);
            if !cache.regions.contains_key(&key) {
                let plan = || Plan::new(body, &operands, &rows, jit::available());
                new.entry(key).or_insert_with(|| (body.clone(), plan()));
            }
        }
    }
    let started = Instant::now();
    let loops: Vec<(&Body, &Plan, &[usize])> = new
        .values()
        .flat_map(|(body, plan)| {
            plan.stages.iter().filter(|s| matches!(s, Stage::Code(_))).map(move |s| (body, plan, s.values()))
        })
        .collect();
    let mut code = jit::compile(&loops).into_iter();
    if code.len() > 0 {
        cache.time.spent += started.elapsed();
        cache.time.regions +=
            new.values().filter(|(_, p)| p.stages.iter().any(|s| matches!(s, Stage::Code(_)))).count();
    }
    for (key, (body, plan)) in new {
        let stages = plan.stages.iter().map(|stage| ready(&body, &plan, stage, &mut code)).collect();
        let row_steps = plan.row_steps.iter().map(|&value| kernel(&body, &plan, value)).collect();
        cache.regions.insert(key, Arc::new(Region { body, plan, stages, row_steps }));
    }
    let find = |graph: &Graph, op: &OpData| {
        let all = bodies(graph, op).into_iter();
        all.map(|(body, operands, rows)| Arc::clone(&cache.regions[&key(body, &operands, &rows)])).collect()
    };
    graphs.iter().map(|graph| graph.ops().map(|(_, op)| find(graph, op)).collect()).collect()
}

/// The kernel of the op that gives a value.
fn kernel(body: &Body, plan: &Plan, value: usize) -> Row {
    let step = &body.steps()[value - body.operands()];
    let types: Vec<DType> = step.args.iter().map(|&a| plan.dtypes[a]).collect();
    row(&step.op, &types)
}

fn ready(body: &Body, plan: &Plan, stage: &Stage, code: &mut impl Iterator<Item = Code>) -> Compiled {
    match stage {
        Stage::Row(value) => {
            let args = step_args(body, *value).to_vec();
            Compiled::Row { kernel: kernel(body, plan, *value), args, to: *value }
        }
        Stage::Reduce(_) => Compiled::Reduce,
        Stage::Code(values) => {
            let in_memory = |v: &usize| plan.homes[*v] != Home::Nowhere;
            let mut from: Vec<usize> = values.iter().flat_map(|&v| step_args(body, v)).copied().collect();
            from.sort_unstable();
            from.dedup();
            from.retain(|v| in_memory(v) && !values.contains(v));
            let to = values.iter().copied().filter(in_memory).collect();
            Compiled::Code { code: code.next().expect("a loop was compiled for every stage of code"), from, to }
        }
    }
}

/// Where a region's elements lie: rows of `inner` elements, in which an operand either runs along or stays.
struct Space {
    /// Extents of the dims around the rows, with the distances of every operand, in elements.
    outer: Vec<(usize, Vec<usize>)>,
    inner: usize,
    /// Whether each operand runs along a row.
    runs: Vec<bool>,
}

impl Space {
    /// Dims in which all operands lie alike are joined.
    fn new(shape: &[usize], operands: &[Vec<usize>]) -> Space {
        let steps: Vec<Vec<usize>> = operands
            .iter()
            .map(|own| {
                let (lead, dense) = (shape.len() - own.len(), strides(own));
                let step = |i: usize| if i < lead || own[i - lead] != shape[i] { 0 } else { dense[i - lead] };
                (0..shape.len()).map(step).collect()
            })
            .collect();
        let mut dims: Vec<(usize, Vec<usize>)> = Vec::new();
        for (i, &extent) in shape.iter().enumerate().filter(|&(_, &extent)| extent != 1) {
            let here: Vec<usize> = steps.iter().map(|s| s[i]).collect();
            match dims.last_mut() {
                Some((all, last)) if last.iter().zip(&here).all(|(&l, &h)| l == h * extent) => {
                    *all *= extent;
                    *last = here;
                }
                _ => dims.push((extent, here)),
            }
        }
        let (inner, runs) = dims.pop().unwrap_or_else(|| (1, vec![1; operands.len()]));
        Space { outer: dims, inner, runs: runs.into_iter().map(|step| step != 0).collect() }
    }

    fn rows(&self) -> usize {
        self.outer.iter().map(|d| d.0).product()
    }

    /// Where a row begins in an operand.
    fn start(&self, row: usize, operand: usize) -> usize {
        let (mut rest, mut at) = (row, 0);
        for (extent, steps) in self.outer.iter().rev() {
            at += rest % extent * steps[operand];
            rest /= extent;
        }
        at
    }
}

/// Runs a region.
pub(super) fn run(l: &mut Launch) {
    let op = l.op;
    let operands = (0..op.args.len()).map(|i| (Some(l.arg(i)), op.args[i])).collect();
    let (regions, results) = (l.regions, 0..op.results().len());
    if let Some(run) = Run::new(l, &regions[0], operands, results, 0) {
        match &run.reduced {
            Some(reduced) => run.reduce(reduced, l.threads),
            None => run.all(l.threads),
        }
    }
}

/// A region over a whole tensor, or over parts of one.
pub(super) struct Run<'a> {
    region: &'a Region,
    space: Space,
    /// None for a product that comes block by block.
    operands: Vec<Option<Ptr<u8>>>,
    results: Vec<Ptr<u8>>,
    /// Per operand, the buffer in which it is stretched where it stays in place along a row.
    stretched: Vec<Option<usize>>,
    /// Per result, the buffer from which it goes past the caches if it is that large.
    streamed: Vec<Option<usize>>,
    /// The buffer of a block of a product that is rounded before the region reads it.
    rounded: Option<usize>,
    /// What the region's reduction goes over.
    reduced: Option<Reduced>,
    workspace: Ptr<u8>,
    /// Elements of a block.
    block: usize,
    /// Bytes of a thread's part of the workspace.
    part: usize,
}

impl<'a> Run<'a> {
    /// A run on operands, each with its place and a value of its type, for some results of the op, in the workspace behind
    /// so many bytes; nothing if there are no elements. Only the first operand may have no place: a product that
    /// [`Run::finish`] is given.
    pub(super) fn new(
        l: &mut Launch,
        region: &'a Region,
        operands: Vec<(Option<Ptr<u8>>, Value)>,
        results: Range<usize>,
        used: usize,
    ) -> Option<Run<'a>> {
        let result = l.op.results().nth(results.start).expect("a region has a result");
        let dims: Vec<Dim> = match &l.op.op {
            Op::Fused { shape, .. } => shape.clone(),
            _ => l.graph.ty(result).dims.clone(),
        };
        let shape: Vec<usize> =
            dims.iter().map(|d| l.extent(d).expect("a launch has seen its results' dims")).collect();
        let shapes: Vec<Vec<usize>> = operands.iter().map(|&(_, value)| l.shape(value)).collect();
        let space = Space::new(&shape, &shapes);
        if region.body.reduction().is_none() && shape.contains(&0) {
            return None;
        }
        let types: Vec<Type> = operands.iter().map(|&(_, value)| l.graph.ty(value).clone()).collect();
        let mut buffers = region.plan.buffers;
        let stretched = may_stretch(&dims, &types).into_iter().map(|may| {
            buffers += usize::from(may);
            may.then(|| buffers - 1)
        });
        let stretched = stretched.collect();
        let operands: Vec<Option<Ptr<u8>>> = operands.into_iter().map(|(at, _)| at).collect();
        let results: Vec<Ptr<u8>> = results.map(|i| l.out(i)).collect();
        let streamed = results.iter().zip(region.body.results()).enumerate().map(|(i, (result, &value))| {
            let row = space.inner * region.plan.dtypes[value].bytes();
            if !matches!(region.plan.homes[value], Home::Buffer(_) | Home::Result(_))
                || region.plan.row_homes[value].is_some()
            {
                return None;
            }
            // Where an operand was, or sums of a product may be, the cache has the line already.
            let apart = operands.iter().all(|operand| operand.is_some_and(|operand| operand.0 != result.0));
            (apart && streams(result.0, space.rows() * row, row)).then_some(buffers + i)
        });
        let streamed = streamed.collect();
        buffers += results.len();
        let rounded = (operands[0].is_none() && region.plan.dtypes[0].is_narrow()).then_some(buffers);
        buffers += usize::from(rounded.is_some());
        let reduced = Reduced::new(&region.body, &region.plan, &shape, &shapes, buffers);
        buffers += reduced::buffers(&region.body, &region.plan);
        let block = reduced::block(&region.body, &shape);
        let part = buffers * block * size_of::<f32>();
        let needed = used + part * l.threads.count() + reduced::partial_bytes(&region.body, &shape);
        assert!(needed <= l.scratch, "bug: a region has too little workspace");
        // SAFETY: there are more bytes, if any are needed.
        let workspace = unsafe { l.workspace::<u8>().add(used) };
        Some(Run { region, space, operands, results, stretched, streamed, rounded, reduced, workspace, block, part })
    }

    /// Runs over all elements.
    pub(super) fn all(&self, threads: &Threads) {
        let units = self.space.rows() * self.blocks();
        self.shared(threads, units, |units, thread| self.units(units, thread));
    }

    /// Shares units of the region's work out to the threads.
    fn shared(&self, threads: &Threads, units: usize, run: impl Fn(Range<usize>, usize) + Sync) {
        let work = self.space.rows() * self.space.inner * self.region.body.work();
        // A thread needs a workspace of its own: threads take whole ranges, and the range tells them apart.
        let parts = if work < GRAIN { 1 } else { threads.count().min(units) };
        threads.run(parts, GRAIN, |range| {
            for part in range {
                run(units * part / parts..units * (part + 1) / parts, part);
            }
            if self.streamed.iter().any(Option::is_some) {
                fence();
            }
        });
    }

    /// Finishes a block of a product of `width` columns: its sums, whose rows lie so many elements apart, are the first
    /// operand. The thread has this number.
    pub(super) fn finish(
        &self,
        thread: usize,
        (sums, stride): (Ptr<f32>, usize),
        rows: Range<usize>,
        columns: Range<usize>,
        width: usize,
    ) {
        let mut places = self.places(thread);
        let mut row_before = usize::MAX;
        for row in rows.clone() {
            let mut column = columns.start;
            while column < columns.end {
                let first = row * width + column;
                let (now, from) = (first / self.space.inner, first % self.space.inner);
                let n = BLOCK.min(self.space.inner - from).min(columns.end - column);
                self.move_operands(&mut places, (now, from), now != row_before, thread);
                row_before = now;
                // SAFETY: the sums are those of these rows and columns; a buffer holds a block.
                unsafe {
                    let sums = sums.add((row - rows.start) * stride + column - columns.start).0;
                    places[0] = sums.cast();
                    if let Some(rounded) = self.rounded {
                        places[0] = self.buffer(thread, rounded).0;
                        round(self.region.plan.dtypes[0], sums, places[0], n);
                    }
                }
                self.block(&mut places, first, n, thread);
                column += n;
            }
        }
    }

    /// Blocks of a row.
    fn blocks(&self) -> usize {
        self.space.inner.div_ceil(BLOCK)
    }

    /// A buffer of a thread.
    fn buffer(&self, thread: usize, i: usize) -> Ptr<u8> {
        // SAFETY: the workspace is as large as `workspace` says, which is a part per thread.
        unsafe { self.workspace.add(thread * self.part + i * self.block * size_of::<f32>()) }
    }

    /// Runs blocks, counted through all rows, in the workspace of a thread.
    fn units(&self, range: Range<usize>, thread: usize) {
        let mut places = self.places(thread);
        let mut row = usize::MAX;
        for unit in range {
            let (now, from) = (unit / self.blocks(), unit % self.blocks() * BLOCK);
            let n = BLOCK.min(self.space.inner - from);
            self.move_operands(&mut places, (now, from), now != row, thread);
            row = now;
            self.block(&mut places, now * self.space.inner + from, n, thread);
        }
    }

    /// The places of all values in buffers of a thread, which hold constants already.
    fn places(&self, thread: usize) -> Vec<*mut u8> {
        let plan = &self.region.plan;
        let mut places: Vec<*mut u8> = vec![std::ptr::null_mut(); plan.homes.len()];
        for (value, home) in plan.homes.iter().enumerate() {
            if let Home::Buffer(i) = home {
                places[value] = self.buffer(thread, *i).0;
                if let Op::Const { value: constant, dtype } = self.step(value) {
                    // SAFETY: a buffer holds a block of elements of any type of a region.
                    unsafe { fill_constant(self.buffer(thread, *i), *constant, *dtype, self.block) };
                }
            }
        }
        places
    }

    /// Moves to an element of a row, in which nobody was before if it is new.
    fn move_operands(&self, places: &mut [*mut u8], (row, from): (usize, usize), new: bool, thread: usize) {
        for (i, operand) in self.operands.iter().enumerate() {
            let Some(operand) = operand else { continue };
            let width = self.region.plan.dtypes[i].bytes();
            let at = self.space.start(row, i);
            // SAFETY: the offset lies in the operand, whose dims it comes from; a buffer holds a block.
            unsafe {
                if self.space.runs[i] {
                    places[i] = operand.add((at + from) * width).0;
                } else if new {
                    let to = self.buffer(thread, self.stretched[i].expect("the operand may be stretched"));
                    places[i] = to.0;
                    stretch(operand.add(at * width), to, width, self.space.inner.min(self.block));
                }
            }
        }
    }

    /// Runs all stages on `n` elements from `first` on.
    fn block(&self, places: &mut [*mut u8], first: usize, n: usize, thread: usize) {
        self.place_results(places, first, thread);
        self.region.stages.iter().for_each(|stage| stage.run(&self.region.plan, places, n));
        self.store(places, first, n);
    }

    /// Where elements of a result from `first` on lie.
    fn result(&self, i: usize, first: usize, width: usize) -> *mut u8 {
        // SAFETY: results are dense and have the region's dims; elements of threads are apart.
        unsafe { self.results[i].add(first * width) }.0
    }

    /// Says where the stages put their results from `first` on.
    fn place_results(&self, places: &mut [*mut u8], first: usize, thread: usize) {
        let plan = &self.region.plan;
        for (value, home) in plan.homes.iter().enumerate() {
            if let Home::Result(i) = home {
                places[value] = match self.streamed[*i] {
                    Some(from) => self.buffer(thread, from).0,
                    None => self.result(*i, first, plan.dtypes[value].bytes()),
                };
            }
        }
    }

    /// Copies what stages put elsewhere into results, `n` elements from `first` on.
    fn store(&self, places: &[*mut u8], first: usize, n: usize) {
        let plan = &self.region.plan;
        let streamed = plan.homes.iter().enumerate().filter_map(|(value, home)| match home {
            Home::Result(i) if self.streamed[*i].is_some() => Some((value, *i)),
            _ => None,
        });
        for (value, i) in plan.copies.iter().copied().chain(streamed) {
            let width = plan.dtypes[value].bytes();
            let to = self.result(i, first, width);
            // SAFETY: both hold `n` elements, and the workspace is no result; a streamed result has rows of whole lines.
            unsafe {
                match self.streamed[i] {
                    Some(_) => stream_copy(places[value], to, n * width),
                    None => std::ptr::copy_nonoverlapping(places[value], to, n * width),
                }
            }
        }
    }

    /// The op that gives a value of the body which is no operand.
    fn step(&self, value: usize) -> &Op {
        &self.region.body.steps()[value - self.region.body.operands()].op
    }
}

impl Compiled {
    /// Runs the stage on `n` elements at the places of all values.
    fn run(&self, plan: &Plan, places: &[*mut u8], n: usize) {
        match self {
            Compiled::Row { kernel, args, to } => {
                let mut from = [std::ptr::null(); 3];
                for (from, &arg) in from.iter_mut().zip(args) {
                    *from = places[arg].cast_const();
                }
                kernel(&from[..args.len()], places[*to], n);
            }
            Compiled::Reduce => {}
            Compiled::Code { code, from, to } => {
                let whole = n - n % LANES;
                // SAFETY: every place that the code uses holds `n` elements, or four in `rest`.
                unsafe {
                    if whole > 0 {
                        code(places.as_ptr(), whole);
                    }
                    if whole < n {
                        rest(*code, plan, places, (from, to), whole..n);
                    }
                }
            }
        }
    }
}

/// Runs code on the last elements, fewer than it takes, through copies.
///
/// # Safety
/// Every place that the code reads (`from`) or writes (`to`) holds the elements of the range.
unsafe fn rest(code: Code, plan: &Plan, places: &[*mut u8], (from, to): (&[usize], &[usize]), range: Range<usize>) {
    let mut copies = vec![[0u8; LANES * size_of::<f32>()]; places.len()];
    let table: Vec<*mut u8> = copies.iter_mut().map(|copy| copy.as_mut_ptr()).collect();
    let bytes = |value: usize| plan.dtypes[value].bytes() * range.len();
    // SAFETY: the caller's promise; a copy holds as many elements as the code takes.
    unsafe {
        let place = |value: usize| places[value].add(range.start * plan.dtypes[value].bytes());
        for &value in from {
            std::ptr::copy_nonoverlapping(place(value), table[value], bytes(value));
        }
        code(table.as_ptr(), LANES);
        for &value in to {
            std::ptr::copy_nonoverlapping(table[value], place(value), bytes(value));
        }
    }
}

/// Fills `n` elements with the first element of an operand.
///
/// # Safety
/// Both places hold what is read and written, aligned for elements of this width.
unsafe fn stretch(from: Ptr<u8>, to: Ptr<u8>, width: usize, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match width {
            1 => to.slice_mut(0, n).fill(*from.0),
            2 => Ptr(to.0.cast::<u16>()).slice_mut(0, n).fill(*from.0.cast::<u16>()),
            _ => Ptr(to.0.cast::<u32>()).slice_mut(0, n).fill(*from.0.cast::<u32>()),
        }
    }
}

/// Fills `n` elements with a constant.
///
/// # Safety
/// The place holds so many elements of the type.
unsafe fn fill_constant(to: Ptr<u8>, value: f64, dtype: DType, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::F32 => Ptr(to.0.cast::<f32>()).slice_mut(0, n).fill(value as f32),
            DType::Bf16 | DType::F16 => {
                let mut bits = 0u16;
                round(dtype, &(value as f32), (&raw mut bits).cast(), 1);
                Ptr(to.0.cast::<u16>()).slice_mut(0, n).fill(bits);
            }
            DType::I32 => Ptr(to.0.cast::<i32>()).slice_mut(0, n).fill(value as i32),
            DType::Bool => to.slice_mut(0, n).fill(u8::from(value != 0.0)),
            DType::Key | DType::Quantized(_) => panic!("bug: a constant {dtype}"),
        }
    }
}
