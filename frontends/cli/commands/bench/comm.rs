//! `dsgc bench comm`: how fast ranks send, by collective and size.
//!
//! Columns and formulas are those of DeepSpeedExamples' `benchmarks/communication`, and nccl-tests' for `reduce_scatter`,
//! which is not among them. Every collective's values are checked at every size before it is timed.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsgc_ir::diag::Diag;
use dsgc_kernels::ranks::{self, Group, Transport};
use dsgc_runtime::mpi;
use serde_json::{Value, json};

use super::seconds;
use crate::commands::Done;
use crate::console::say;

/// Arguments of `dsgc bench comm`.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Ranks as threads of this process, where no launcher started it: 2 unless given. Under one, how many it must have
    /// started.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..))]
    ranks: Option<u16>,
    /// Only collectives with this in their name.
    #[arg(long, value_name = "NAME", default_value = "")]
    filter: String,
    /// The largest size: 2^P elements times the number of ranks.
    #[arg(long, value_name = "P", default_value = "23", value_parser = clap::value_parser!(u8).range(1..=28))]
    largest: u8,
    /// How long each collective runs at each size: from 3 trials to 50.
    #[arg(long, value_name = "S", default_value = "0.2", value_parser = seconds)]
    seconds: Duration,
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    if let Some(transport) = mpi::connect()? {
        let started = transport.size();
        let wanted = args.ranks.map_or(started, usize::from);
        if started != wanted || started < 2 {
            let message = format!("the launcher started {started} ranks, expected {}", wanted.max(2));
            return Err(Diag::error(message).into());
        }
        let by = format!("MPI, {}", mpi::library().unwrap_or_default());
        let measured = measure(transport.as_ref(), args, &by);
        if let Err(error) = &measured {
            transport.abort(&error.message);
        }
        return Ok(measured?);
    }
    let ranks = args.ranks.map_or(2, usize::from);
    ranks::enough_threads(ranks)?;
    let all = ranks::threads(ranks);
    let measured: Vec<Result<(), Diag>> = thread::scope(|scope| {
        let run = |transport: Arc<dyn Transport>| {
            let measured = measure(transport.as_ref(), args, "threads of one process");
            if let Err(error) = &measured {
                transport.abort(&error.message);
            }
            measured
        };
        let started: Vec<_> = all.into_iter().map(|transport| scope.spawn(move || run(transport))).collect();
        started.into_iter().map(|rank| rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    Ok(measured.into_iter().collect::<Result<_, _>>()?)
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// The limit of this machine's memory: each rank copies its own numbers.
    Copy,
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
    Broadcast,
    PointToPoint,
}

const ALL: [What; 7] = [
    What::Copy,
    What::AllReduce,
    What::AllGather,
    What::ReduceScatter,
    What::AllToAll,
    What::Broadcast,
    What::PointToPoint,
];

/// Trials that are not timed.
const WARM_UP: usize = 5;

/// One line of the table.
struct Measured {
    what: What,
    /// Bytes that the table calls the size.
    bytes: usize,
    /// Elements of a rank's operand.
    elements: usize,
    trials: usize,
    /// Of one trial, on the slowest rank, on the average.
    seconds: f64,
    /// Bytes per second.
    throughput: f64,
    /// Bytes per second over the slowest link of a ring.
    bus: f64,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Copy => "copy",
            What::AllReduce => "all_reduce",
            What::AllGather => "all_gather",
            What::ReduceScatter => "reduce_scatter",
            What::AllToAll => "all_to_all",
            What::Broadcast => "broadcast",
            What::PointToPoint => "pt2pt",
        }
    }

    /// Size, throughput and bus bandwidth of `s` bytes per rank on `n` ranks.
    fn rates(self, s: usize, n: usize, seconds: f64) -> (usize, f64, f64) {
        let (bytes, ranks) = (s as f64, n as f64);
        let share = (ranks - 1.0) / ranks;
        match self {
            What::AllReduce => (s, 2.0 * bytes / seconds, 2.0 * bytes * share / seconds),
            What::AllGather => (n * s, ranks * bytes / seconds, ranks * bytes * share / seconds),
            What::ReduceScatter | What::AllToAll => (s, bytes / seconds, bytes * share / seconds),
            What::Copy | What::Broadcast | What::PointToPoint => (s, bytes / seconds, bytes / seconds),
        }
    }
}

/// A number that says whose and which it is; sums of them are exact.
fn number(rank: usize, i: usize) -> f32 {
    ((rank * 31 + i * 7) % 1021) as f32
}

/// Operand and results of one collective on one rank.
struct Buffers {
    own: Vec<f32>,
    result: Vec<f32>,
    work: Vec<f32>,
}

impl Buffers {
    /// For operands of so many elements, which all ranks can share out equally.
    fn new(what: What, elements: usize, ranks: usize) -> Buffers {
        let (result, work) = match what {
            What::AllGather => (elements * ranks, 0),
            What::ReduceScatter => (elements / ranks, elements / ranks),
            What::Copy | What::AllToAll => (elements, 0),
            What::AllReduce | What::Broadcast | What::PointToPoint => (0, 0),
        };
        Buffers { own: vec![0.0; elements], result: vec![0.0; result], work: vec![0.0; work] }
    }

    fn run(&mut self, what: What, transport: &dyn Transport, group: &Group) -> Result<(), Diag> {
        let Buffers { own, result, work } = self;
        match what {
            What::Copy => result.copy_from_slice(own),
            What::AllReduce => group.all_reduce(own)?,
            What::AllGather => {
                let first = group.at() * own.len();
                result[first..first + own.len()].copy_from_slice(own);
                group.all_gather(result, own.len())?;
            }
            What::ReduceScatter => group.reduce_scatter(own, result, work)?,
            What::AllToAll => group.all_to_all(own, result)?,
            What::Broadcast => group.broadcast(0, own)?,
            What::PointToPoint => {
                let bytes = bytemuck::cast_slice_mut(own);
                match transport.rank() {
                    0 => transport.exchange(1, bytes, 1, &mut [])?,
                    1 => transport.exchange(0, &[], 0, bytes)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Runs it on numbers whose results are known.
    fn check(&mut self, what: What, transport: &dyn Transport, group: &Group) -> Result<(), Diag> {
        let (rank, ranks, len) = (group.at(), group.size(), self.own.len());
        self.own.iter_mut().enumerate().for_each(|(i, x)| *x = number(rank, i));
        self.result.fill(-1.0);
        self.run(what, transport, group)?;
        let part = len / ranks;
        let sum = |i: usize| (0..ranks).map(|of| number(of, i)).sum::<f32>();
        let in_place = matches!(what, What::AllReduce | What::Broadcast | What::PointToPoint);
        let found = if in_place { &self.own } else { &self.result };
        for (i, &found) in found.iter().enumerate() {
            let expected = match what {
                What::Copy => number(rank, i),
                What::AllReduce => sum(i),
                What::AllGather => number(i / len, i % len),
                What::ReduceScatter => sum(rank * part + i),
                What::AllToAll => number(i / part, rank * part + i % part),
                What::Broadcast => number(0, i),
                What::PointToPoint => number(if rank == 1 { 0 } else { rank }, i),
            };
            if found != expected {
                let message = format!("{} of {len} elements: element {i} is {found}, expected {expected}", what.name());
                return Err(Diag::error(format!("{message}, on rank {rank} of {ranks}")));
            }
        }
        Ok(())
    }
}

/// Measures all on one rank; rank 0 prints.
fn measure(transport: &dyn Transport, args: &Args, by: &str) -> Result<(), Diag> {
    let ranks = transport.size();
    let group = Group::new(transport, (0..ranks).collect());
    let first = transport.rank() == 0;
    let mut all: Vec<Measured> = Vec::new();
    if first && !args.json {
        say(format_args!("{ranks} ranks: {by}"));
    }
    for what in ALL.into_iter().filter(|what| what.name().contains(&args.filter)) {
        if first && !args.json {
            say(format_args!("\n---- {}\n{HEAD}", what.name()));
        }
        for power in 1..=args.largest {
            let measured = time(what, ranks << power, transport, &group, args.seconds)?;
            if first && !args.json {
                say(row(&measured));
            }
            all.push(measured);
        }
    }
    if first && args.json {
        let rows: Vec<Value> = all.iter().map(row_json).collect();
        let document = json!({"ranks": ranks, "transport": by, "collectives": rows});
        say(serde_json::to_string_pretty(&document).expect("values have string keys"));
    }
    Ok(())
}

/// Checks and times one collective at one size.
fn time(
    what: What,
    elements: usize,
    transport: &dyn Transport,
    group: &Group,
    limit: Duration,
) -> Result<Measured, Diag> {
    let mut buffers = Buffers::new(what, elements, group.size());
    buffers.check(what, transport, group)?;
    // Zeros stay what they are, however often they are added up.
    buffers.own.fill(0.0);
    group.barrier()?;
    let started = Instant::now();
    for _ in 0..WARM_UP {
        buffers.run(what, transport, group)?;
    }
    // All must try equally often.
    let fit = limit.as_secs_f64() / (started.elapsed().as_secs_f64() / WARM_UP as f64).max(1e-9);
    let mut trials = [fit.clamp(3.0, 50.0) as u64];
    group.broadcast(0, &mut trials)?;
    let trials = trials[0] as usize;
    group.barrier()?;
    let started = Instant::now();
    for _ in 0..trials {
        buffers.run(what, transport, group)?;
    }
    let mut times = vec![0.0; group.size()];
    times[group.at()] = started.elapsed().as_secs_f64() / trials as f64;
    group.all_gather(&mut times, 1)?;
    let seconds = times.into_iter().fold(0.0, f64::max);
    let (bytes, throughput, bus) = what.rates(elements * size_of::<f32>(), group.size(), seconds);
    Ok(Measured { what, bytes, elements, trials, seconds, throughput, bus })
}

const HEAD: &str = "\
Size (Bytes)     Description            Duration     Throughput (Gbps)     BusBW (Gbps)";

fn row(m: &Measured) -> String {
    let description = format!("{}x{}", m.elements, size_of::<f32>());
    let duration = if m.seconds < 1e-3 { (m.seconds * 1e6, "us") } else { (m.seconds * 1e3, "ms") };
    format!(
        "{:<16} {description:<18} {:>9.3} {} {:>21.3} {:>16.3}",
        m.bytes,
        duration.0,
        duration.1,
        m.throughput * 8.0 / 1e9,
        m.bus * 8.0 / 1e9,
    )
}

fn row_json(m: &Measured) -> Value {
    json!({
        "collective": m.what.name(), "size_bytes": m.bytes, "elements": m.elements, "element_bytes": size_of::<f32>(),
        "trials": m.trials, "seconds": m.seconds, "throughput_gbps": m.throughput * 8.0 / 1e9,
        "bus_gbps": m.bus * 8.0 / 1e9,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_suite() {
        // 4 ranks, 1,000 bytes each, in 1 s.
        let all: Vec<(usize, f64, f64)> = ALL.iter().map(|what| what.rates(1000, 4, 1.0)).collect();
        let simple = (1000, 1000.0, 1000.0);
        let expected = [
            simple,
            (1000, 2000.0, 1500.0),
            (4000, 4000.0, 3000.0),
            (1000, 1000.0, 750.0),
            (1000, 1000.0, 750.0),
            simple,
            simple,
        ];
        assert_eq!(all, expected);
    }
}
