//! One iteration of PPO: four OPT-125m (actor, reference, critic, reward model) with random weights, f32, 4 prompts of 128
//! tokens and greedy answers of 128, one optimizer step of the actor and one of the critic.
//!
//! `cargo bench --bench ppo` prints best and median of 4 iterations, and what of the time goes where. The work is that of
//! one experience and one training call of DeepSpeed-Chat's `DeepSpeedPPOTrainer`. Scoring runs with the first update, and
//! counts as training.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use dsgc_ir::diag::Diag;
use dsgc_ir::{StateId, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::PassContext;
use dsgc_runtime::{Event, Session};

use common::{Folder, OPT_125M};

const STAGE: &str = "
stages:
  ppo:
    actor: {model: base, warmup_steps: 0}
    critic: {model: base, warmup_steps: 0}
    data: rows
    batch_size: 4
    minibatch_size: 4
    micro_batch_size: 4
    max_prompt_len: 128
    max_new_tokens: 128
    greedy: true
    save: []
";
const ROWS: usize = 4;
const PROMPT: usize = 128;
const ITERATIONS: usize = 5;

/// Seconds by graph.
type Times = Rc<RefCell<BTreeMap<String, f64>>>;

/// A device that notes how long each graph takes.
struct Timed {
    device: Cpu,
    times: Times,
}

impl Device for Timed {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn set_state(&mut self, id: StateId, value: &Tensor) {
        self.device.set_state(id, value);
    }
    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.device.set_part(id, value);
    }
    fn state(&self, id: StateId) -> Tensor {
        self.device.state(id)
    }
    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag> {
        let started = Instant::now();
        let outputs = self.device.run(graph, inputs);
        *self.times.borrow_mut().entry(graph.into()).or_default() += started.elapsed().as_secs_f64();
        outputs
    }
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    // Without an end token answers have their full length.
    let folder = Folder::new(&format!("{OPT_125M}{STAGE}"), ROWS * ITERATIONS, PROMPT, false);
    let program = folder.stages().swap_remove(0);
    let target = CpuTarget { threads };
    let planned = dsgc_passes::compile(program, &PassContext::new(&target), &mut |_| {})
        .unwrap_or_else(|diags| panic!("{}", diags[0]));
    let arena = planned.arena.total() >> 20;
    let times = Times::default();
    let device = Timed { device: Cpu::new(planned.clone(), threads), times: Rc::clone(&times) };
    let mut session = Session::open(planned, Box::new(device), &mut |_| Ok(())).unwrap_or_else(|e| panic!("{}", e[0]));
    times.borrow_mut().clear();

    // Per iteration: seconds in all, and by part.
    let mut all: Vec<(f64, [f64; 3])> = Vec::new();
    session
        .run(&mut |event| {
            if let Event::Step { seconds, metrics, .. } = event {
                let mut parts = [0.0; 3];
                for (graph, seconds) in std::mem::take(&mut *times.borrow_mut()) {
                    let part = match graph.as_str() {
                        "actor.prefill" | "actor.step" => 0,
                        "experience" => 1,
                        _ => 2,
                    };
                    parts[part] += seconds;
                }
                let [generate, score, train] = parts;
                let loss = metrics["actor/loss"];
                println!("iteration {seconds:.3} s: generate {generate:.3}, score {score:.3}, train {train:.3}; actor loss {loss:.5}");
                all.push((*seconds, parts));
            }
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    // The first iteration touches all memory for the first time.
    all.remove(0);
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (best, median) = (all[0].0, all[all.len() / 2].0);
    println!("OPT-125m, {ROWS} prompts of {PROMPT} tokens, 128 new ones, f32, {threads} threads, {arena} MiB");
    println!("best {best:.3} s, median {median:.3} s");
}
