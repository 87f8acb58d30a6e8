//! Kernels against the limits of this machine, all in one run.
//!
//! A kernel can be no faster than its multiply-adds at the rate of a loop on registers, nor than its bytes at the rate of
//! a plain copy. Both are measured again before and after every kernel, since others may use the machine too; the limit
//! is the best that was seen by then. Operations and bytes are those of [`dsgc_ir::cost`]; of a program of several ops,
//! no more bytes than go in and come out.
//!
//! Runs go round copies of a kernel's memory that together are larger than the last-level cache: in a step of training,
//! too, most operands come from memory.

mod cases;

use std::time::{Duration, Instant};

use dsgc_ir::cost::{Cost, graph_cost};
use dsgc_ir::diag::Diag;
use dsgc_ir::{Bindings, Op, Planned};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::limits::{Arrays, MultiplyAdds, last_level_cache};
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::PassContext;

use cases::{Case, Model, graph};

/// The shapes that are measured: OPT-125m and a Llama of 15 million parameters, in the batches of the README's table; in
/// bf16 their products.
const MODELS: [Model; 4] = [
    OPT,
    LLAMA,
    Model { name: "opt-125m bf16", float: "bf16", ..OPT },
    Model { name: "llama-15m bf16", float: "bf16", ..LLAMA },
];

const OPT: Model = Model {
    name: "opt-125m",
    float: "f32",
    batch: 4,
    length: 256,
    hidden: 768,
    ffn: 3072,
    vocab: 50272,
    heads: 12,
    llama: false,
};

const LLAMA: Model = Model {
    name: "llama-15m",
    float: "f32",
    batch: 8,
    length: 256,
    hidden: 288,
    ffn: 768,
    vocab: 32000,
    heads: 6,
    llama: true,
};

/// Fewest timed runs of a kernel.
const RUNS: usize = 3;

/// Part of a kernel's time for which each limit is measured beside it.
const LIMIT_SHARE: u32 = 8;

/// Bytes of a last-level cache that is not known.
const CACHE: usize = 64 << 20;

/// Most bytes of all copies of a kernel's memory.
const COPIES: usize = 1 << 30;

/// Best and median of what was measured several times.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    fn sorted(&self) -> Vec<f64> {
        let mut all = self.0.clone();
        all.sort_by(f64::total_cmp);
        all
    }

    /// The smallest.
    pub fn least(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(f64::NAN)
    }

    /// The largest.
    pub fn most(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    /// The one in the middle; of two, the larger.
    pub fn median(&self) -> f64 {
        self.sorted().get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// What this machine can do at most, as often as it was measured. Operations and bytes per second.
pub struct Limits {
    /// With which instructions the multiply-adds run.
    pub f32_how: &'static str,
    pub f32_one: Series,
    pub f32_all: Series,
    /// Where the CPU has an instruction for it: which, and the rates of one thread and of all.
    pub bf16: Option<(&'static str, Series, Series)>,
    /// Bytes of an array that is copied or read.
    pub array: usize,
    pub copy_one: Series,
    pub copy_all: Series,
    pub read_one: Series,
    pub read_all: Series,
}

/// A limit of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Multiply-adds.
    MultiplyAdds,
    /// Bytes.
    Copy,
}

impl Bound {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Bound::MultiplyAdds => "FMA",
            Bound::Copy => "copy",
        }
    }
}

/// A measured kernel.
pub struct Measured {
    pub model: &'static str,
    pub family: &'static str,
    pub name: String,
    pub shape: String,
    pub float: &'static str,
    /// Seconds of each run.
    pub seconds: Series,
    pub work: Cost,
    /// What bounds it, and the best rate of that limit by then: operations or bytes per second.
    pub bound: Bound,
    pub limit: f64,
    /// Whether what it moves may still have been in a cache, since no more copies had room; then a copy is no limit.
    pub cached: bool,
}

impl Measured {
    /// How much of the limit the best run reached.
    pub fn share(&self) -> f64 {
        let work = match self.bound {
            Bound::MultiplyAdds => self.work.flops,
            Bound::Copy => self.work.bytes,
        };
        work as f64 / self.seconds.least() / self.limit
    }
}

/// What measures, and what it has found of the limits.
pub struct Bench {
    threads: usize,
    /// How long each kernel runs.
    time: Duration,
    arrays: Arrays,
    limits: Limits,
}

impl Bench {
    /// For kernels on so many threads, each for so long.
    pub fn new(threads: usize, time: Duration) -> Bench {
        let arrays = Arrays::default();
        let none = Series::default;
        let limits = Limits {
            f32_how: MultiplyAdds::f32().how,
            f32_one: none(),
            f32_all: none(),
            bf16: MultiplyAdds::bf16().map(|adds| (adds.how, none(), none())),
            array: arrays.bytes(),
            copy_one: none(),
            copy_all: none(),
            read_one: none(),
            read_all: none(),
        };
        Bench { threads, time, arrays, limits }
    }

    /// Measures all kernels whose title holds `filter`, and tells each as soon as it is known.
    pub fn run(mut self, filter: &str, tell: &mut dyn FnMut(&Measured)) -> Result<(Limits, Vec<Measured>), Diag> {
        let chosen: Vec<Case> =
            MODELS.iter().flat_map(cases::cases).filter(|case| case.title().contains(filter)).collect();
        if chosen.is_empty() {
            let title = |case: &Case| case.title();
            let all: Vec<String> = MODELS.iter().flat_map(cases::cases).map(|case| title(&case)).collect();
            let help = format!("kernels are {}", all.join("; "));
            return Err(Diag::error(format!("no kernel has `{filter}` in its name")).help(help));
        }
        self.measure_all_limits();
        let mut all = Vec::new();
        for case in &chosen {
            let measured = self.measure(case)?;
            tell(&measured);
            all.push(measured);
        }
        self.measure_all_limits();
        Ok((self.limits, all))
    }

    fn measure_all_limits(&mut self) {
        let (time, limits) = (self.time / LIMIT_SHARE, &mut self.limits);
        let threads = self.threads;
        limits.f32_one.0.push(MultiplyAdds::f32().rate(1, time));
        if let (Some((_, one, all)), Some(adds)) = (&mut limits.bf16, MultiplyAdds::bf16()) {
            one.0.push(adds.rate(1, time));
            all.0.push(adds.rate(threads, time));
        }
        limits.copy_one.0.push(self.arrays.copy(1, time));
        limits.read_one.0.push(self.arrays.read(1, time));
        limits.read_all.0.push(self.arrays.read(threads, time));
        self.measure_limits("f32");
    }

    /// Multiply-adds of an element type and copies, on all threads: the limits of a kernel.
    fn measure_limits(&mut self, float: &str) -> (f64, f64) {
        let (time, limits) = (self.time / LIMIT_SHARE, &mut self.limits);
        limits.copy_all.0.push(self.arrays.copy(self.threads, time));
        let adds = match (&mut limits.bf16, MultiplyAdds::bf16()) {
            (Some((_, _, all)), Some(adds)) if float == "bf16" => {
                all.0.push(adds.rate(self.threads, time));
                all
            }
            _ => {
                limits.f32_all.0.push(MultiplyAdds::f32().rate(self.threads, time));
                &limits.f32_all
            }
        };
        (adds.most(), limits.copy_all.most())
    }

    fn measure(&mut self, case: &Case) -> Result<Measured, Diag> {
        let one = plan(case, 1, self.threads)?;
        let work = work(&one);
        let cache = last_level_cache().unwrap_or(CACHE);
        // What is read and then written over is in its bytes twice, and of a table only a part is touched.
        let (memory, touched) = (one.arena.total().max(1), one.arena.total().min(work.bytes as usize).max(1));
        let copies = (4 * cache).div_ceil(touched).clamp(1, (COPIES / memory).max(1));
        let planned = plan(case, copies, self.threads)?;
        self.measure_limits(case.float);
        let seconds = time(case, planned, copies, self.threads, self.time)?;
        let (adds, copy) = self.measure_limits(case.float);
        let (bound, limit) = if work.flops as f64 / adds > work.bytes as f64 / copy {
            (Bound::MultiplyAdds, adds)
        } else {
            (Bound::Copy, copy)
        };
        let cached = copies * touched <= 2 * cache;
        let Case { model, family, float, .. } = *case;
        let (name, shape) = (case.name.clone(), case.shape.clone());
        Ok(Measured { model, family, name, shape, float, seconds, work, bound, limit, cached })
    }
}

/// The program of so many copies of a case for this machine, by all passes.
fn plan(case: &Case, copies: usize, threads: usize) -> Result<Planned, Diag> {
    let target = CpuTarget { threads };
    let first = |mut diags: Vec<Diag>| diags.swap_remove(0);
    dsgc_passes::compile(case.program(copies), &PassContext::new(&target), &mut |_| {}).map_err(first)
}

/// What the kernels of a case must compute and move: states that are read and written, if ops in between move more.
fn work(planned: &Planned) -> Cost {
    let graph = planned.graph(&graph(0)).expect("passes keep graphs that the plan does not name");
    let none = Bindings::new();
    let cost = graph_cost(graph, &none).expect("all dims are numbers");
    let states = graph.ops().map(|(_, op)| match op.op {
        Op::Read { state } | Op::Write { state } => planned.state(state).ty.bytes(&none).expect("so are these") as u64,
        _ => 0,
    });
    Cost { bytes: cost.bytes.min(states.sum()), ..cost }
}

/// Seconds of each run of a case, after one of each copy that is not counted: it touches the memory for the first time.
fn time(case: &Case, planned: Planned, copies: usize, threads: usize, time: Duration) -> Result<Series, Diag> {
    let states: Vec<_> = case
        .values(copies)
        .into_iter()
        .map(|(name, value)| (planned.state_named(&name).expect("passes keep states that are read"), value))
        .collect();
    let mut device = Cpu::new(planned, threads);
    states.into_iter().for_each(|(id, value)| device.set_state(id, &value));
    let graphs: Vec<String> = (0..copies).map(graph).collect();
    for graph in &graphs {
        device.run(graph, &[])?;
    }
    let (mut seconds, started) = (Vec::new(), Instant::now());
    for graph in graphs.iter().cycle() {
        if seconds.len() >= RUNS && started.elapsed() >= time {
            break;
        }
        let run = Instant::now();
        device.run(graph, &[])?;
        seconds.push(run.elapsed().as_secs_f64());
    }
    Ok(Series(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsgc_ir::Class;

    /// A result that is copied into its state would be measured as a slow kernel.
    #[test]
    fn every_case_compiles_and_writes_in_place() {
        for model in &MODELS {
            for case in cases::cases(model) {
                let planned = plan(&case, 2, 2).unwrap_or_else(|e| panic!("{}: {e}", case.title()));
                let graph = planned.graph(&graph(1)).expect("it is kept");
                let mut kernels = 0;
                for (_, op) in graph.ops() {
                    kernels += usize::from(!matches!(op.op.class(), Class::View | Class::State));
                    if let Op::Write { state } = op.op {
                        let (from, to) = (graph.buffer(op.args[0]), planned.state(state).buffer);
                        let place = |b: Option<dsgc_ir::Buffer>| b.map(|b| (b.region, b.offset));
                        assert_eq!(place(from), place(to), "{}\n{}", case.title(), *planned);
                    }
                }
                assert!(kernels > 0, "{}\n{}", case.title(), *planned);
                let work = work(&planned);
                assert!(work.bytes > 0, "{}", case.title());
            }
        }
    }

    #[test]
    fn work_is_what_must_be_done() {
        let all: Vec<Case> = cases::cases(&MODELS[0]);
        let of = |title: &str| {
            let case = all.iter().find(|c| c.title() == title).unwrap_or_else(|| panic!("{title}"));
            work(&plan(case, 1, 2).unwrap_or_else(|e| panic!("{e}")))
        };
        let (rows, hidden, ffn, vocab) = (1024, 768, 3072, 50272);
        let product = of("opt-125m product ffn up");
        assert_eq!(
            product,
            Cost { flops: 2 * rows * hidden * ffn, bytes: 4 * (rows * hidden + hidden * ffn + rows * ffn) }
        );
        // Only the rows that are asked for, and the tokens that ask.
        assert_eq!(of("opt-125m embedding embed").bytes, 4 * (2 * rows * hidden + rows));
        // All of the gradient is written, and what is added to it is read.
        assert_eq!(of("opt-125m embedding embed_grad").bytes, 4 * (vocab * hidden + rows * hidden + rows));
        // In one pass at best, whatever the ops move.
        assert_eq!(of("opt-125m reduction softmax of ops").bytes, 2 * 4 * (4 * 12 * 256 * 256));
        // Seven arrays, and three numbers.
        assert_eq!(of("opt-125m optimizer adamw of ffn").bytes, 4 * (7 * hidden * ffn + 3));
        // Of all pairs of places those that a causal mask leaves: two products forwards, five backwards.
        let pairs = 4 * 256 * 257 / 2;
        assert_eq!(of("opt-125m attention attention").flops, 2 * 2 * hidden * pairs);
        assert_eq!(of("opt-125m attention attention_grad").flops, 5 * 2 * hidden * pairs);
    }
}
