//! What runs beside what ranks send: a step of SFT on two ranks with one thread each, as a link between them gets slower.
//!
//! `cargo bench --bench overlap` prints, for rates of an assumed link and both settings of `overlap_comm`, the best and the median
//! step. The link is a transport that sleeps as long as the bytes of each message take at that rate, each direction for
//! itself, and computes nothing meanwhile, which is what a network is to a machine. Without a link the ranks share the
//! memory of the machine, and all that they send is work of its cores.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsgc_ir::diag::Diag;
use dsgc_ir::{Mesh, Planned};
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::ranks::{Member, Transport, threads};
use dsgc_passes::PassContext;
use dsgc_runtime::{Event, Session};

use common::{Folder, OPT_125M};

/// What a smaller model has in place of OPT-125m's sizes.
const SIZES: [&str; 2] =
    ["hidden: 768, layers: 12, heads: 12, ffn: 3072", "hidden: 256, layers: 8, heads: 4, ffn: 1024"];
const STAGE: &str = "
stages:
  sft:
    model: base
    data: rows
    batch_size: 2
    micro_batch_size: 1
    max_length: 256
    learning_rate: 1e-5
    max_grad_norm: 1.0
";
const RANKS: usize = 2;
const TOKENS: usize = 256;
const STEPS: usize = 9;
/// Bytes per second of links: none, 10, 4 and 2 Gbit/s.
const LINKS: [Option<f64>; 4] = [None, Some(1.25e9), Some(0.5e9), Some(0.25e9)];

/// A transport whose messages take as long as they would over a link.
struct Link {
    ways: Arc<dyn Transport>,
    bytes_per_second: f64,
}

impl Transport for Link {
    fn rank(&self) -> usize {
        self.ways.rank()
    }
    fn size(&self) -> usize {
        self.ways.size()
    }
    fn exchange_with(
        &self,
        to: usize,
        message: &[u8],
        from: usize,
        bytes: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Diag> {
        let taken = Duration::from_secs_f64(message.len().max(bytes) as f64 / self.bytes_per_second);
        let ends = Instant::now() + taken;
        self.ways.exchange_with(to, message, from, bytes, take)?;
        std::thread::sleep(ends.saturating_duration_since(Instant::now()));
        Ok(())
    }
    fn post(&self, to: usize, message: Vec<u8>) -> Result<(), Diag> {
        self.ways.post(to, message)
    }
    fn receive(&self, from: usize) -> Result<Vec<u8>, Diag> {
        self.ways.receive(from)
    }
    fn begin(&self, what: &str) {
        self.ways.begin(what);
    }
    fn note(&self, what: &str) {
        self.ways.note(what);
    }
    fn abort(&self, why: &str) {
        self.ways.abort(why);
    }
}

fn compile(folder: &Folder, zero_stage: u8, overlap: bool) -> Planned {
    let mut program = folder.stages().swap_remove(0);
    program.mesh = Mesh { data: RANKS, ..Mesh::default() };
    program.stage.roles.iter_mut().for_each(|role| role.zero_stage = zero_stage);
    program.stage.parallel.overlap_comm = overlap;
    let target = CpuTarget { threads: 1 };
    dsgc_passes::compile(program, &PassContext::new(&target), &mut |_| {})
        .unwrap_or_else(|diags| panic!("{}", diags[0]))
}

/// Seconds of the steps of one rank.
fn steps(program: &Planned, member: Member) -> Vec<f64> {
    let device = Cpu::new(program.clone(), 1).as_member(member.clone());
    let mut session = Session::open_as(program.clone(), Box::new(device), member, &mut |_| Ok(()))
        .unwrap_or_else(|diags| panic!("{}", diags[0]));
    let mut times = Vec::new();
    let each = &mut |event: &Event| {
        if let Event::Step { seconds, .. } = event {
            times.push(*seconds);
        }
        Ok(())
    };
    session.run(each).unwrap_or_else(|diag| panic!("{diag}"));
    // The first step touches all memory for the first time.
    times.split_off(1)
}

fn main() {
    let folder = Folder::new(&format!("{}{STAGE}", OPT_125M.replace(SIZES[0], SIZES[1])), RANKS * STEPS, TOKENS, true);
    for zero_stage in [2, 3] {
        let plans = [true, false].map(|overlap| compile(&folder, zero_stage, overlap));
        for link in LINKS {
            let mut times = plans.each_ref().map(|program| {
                let ways = threads(RANKS).into_iter().map(|ways| match link {
                    Some(bytes_per_second) => Arc::new(Link { ways, bytes_per_second }) as Arc<dyn Transport>,
                    None => ways,
                });
                let member = |transport| Member { mesh: program.mesh, transport };
                let members: Vec<Member> = ways.map(member).collect();
                std::thread::scope(|scope| {
                    let all: Vec<_> = members.into_iter().map(|m| scope.spawn(|| steps(program, m))).collect();
                    all.into_iter().map(|rank| rank.join().expect("no rank panics")).next().expect("there is a rank")
                })
            });
            let link = link.map_or("no link".into(), |rate| format!("{} Gbit/s", rate * 8e-9));
            let [beside, alone] = times.each_mut().map(|times| {
                times.sort_by(f64::total_cmp);
                format!("best {:.3} s, median {:.3} s", times[0], times[times.len() / 2])
            });
            println!("zero_stage {zero_stage}, {link}: beside {beside}; one after the other {alone}");
        }
    }
}
