//! Reports of a compiled stage. Every figure is computed by a stated formula; none is measured.

use std::collections::BTreeMap;
use std::fmt;
use std::iter::Sum;
use std::ops::Add;

use dsgc_ir::cost::{Sending, graph_cost, graph_sending, handed_on};
use dsgc_ir::stage::{CallSteps, Role, Rows, Statement, TermSteps, UpdateSteps};
use dsgc_ir::verify::last_uses;
use dsgc_ir::{Class, DType, Dim, Graph, Mesh, Planned, Program, Region, State, StateId, StateKind, Target, Type};
use dsgc_passes::{Step, live_bytes};
use serde_json::{Value, json};

use crate::places::PlacesReport;

/// What became of one stage.
pub struct StageReport {
    name: String,
    recipe: String,
    mesh: Mesh,
    /// Numbers in parameters: all, and those that are trained.
    parameters: (u64, u64),
    roles: Vec<RoleSize>,
    work: Work,
    passes: Vec<PassReport>,
    /// Per graph: ops, and bytes of its values.
    graphs: Vec<(String, usize, usize)>,
    /// What the device's kernels are, where it says so.
    kernels: Vec<KernelUse>,
    /// Bytes of parameters and state, values, workspace.
    memory: [usize; 3],
    /// Bytes of parameters and state in the host's memory.
    host: usize,
    /// Where ranks have different layers, what they have.
    places: Option<PlacesReport>,
}

/// Ops of one name that become kernels of one kind.
struct KernelUse {
    op: &'static str,
    /// The target's words.
    lowering: String,
    /// How many such ops there are in all graphs.
    count: usize,
    /// Most bytes of workspace of one of them.
    workspace: usize,
}

impl KernelUse {
    /// Of all graphs, in the order of names.
    fn all(program: &Program, target: &dyn Target) -> Vec<KernelUse> {
        let mut found: BTreeMap<(&'static str, String), (usize, usize)> = BTreeMap::new();
        for graph in &program.graphs {
            let bounds = graph.upper_bounds();
            for (id, op) in graph.ops() {
                let types: Vec<Type> = op.args.iter().map(|&arg| graph.ty(arg).clone()).collect();
                if let Some(lowering) = target.lowering(&op.op, &types, &bounds) {
                    let (count, workspace) = found.entry((op.op.name(), lowering)).or_default();
                    *count += 1;
                    *workspace = (*workspace).max(graph.scratch[id.0 as usize]);
                }
            }
        }
        let one = |((op, lowering), (count, workspace))| KernelUse { op, lowering, count, workspace };
        found.into_iter().map(one).collect()
    }
}

/// Numbers in the parameters of a role.
struct RoleSize {
    name: String,
    trained: u64,
    /// Its own ones that are not trained.
    frozen: u64,
    /// Those of the role that it is a snapshot of.
    shared: u64,
    /// Rank of its low-rank factors and how many weights have some, if it is trained by LoRA.
    lora: Option<(usize, usize)>,
    /// How many of its parameters a training leaves as they are.
    left: usize,
    /// What it computes in, if that is not f32.
    precision: Option<DType>,
    /// What the weights of its layers are kept in, if that is not f32.
    weights: Option<DType>,
    /// Whether it is trained, so that they are kept so to generate only.
    is_trained: bool,
    /// Whether parameters are kept so themselves, or copies of them.
    kept: [bool; 2],
    /// Bytes of copies in fewer bits beside parameters in f32.
    copies: usize,
    /// Bytes that parameters without f32 need less.
    saved: usize,
}

impl RoleSize {
    fn new(program: &Program, role: &Role) -> RoleSize {
        let mut size = RoleSize {
            name: role.name.clone(),
            trained: 0,
            frozen: 0,
            shared: 0,
            lora: None,
            left: 0,
            precision: role.precision,
            weights: role.weights,
            is_trained: role.trained,
            kept: [false; 2],
            copies: 0,
            saved: 0,
        };
        let training = program.stage.trainings.iter().find(|training| training.role == role.name);
        size.lora = training
            .and_then(|training| training.lora.as_ref())
            .and_then(|lora| Some((lora.r, lora.adapter.as_ref()?.modules.len())));
        for (id, name) in program.all_params_of(&role.name) {
            let state = program.state(id);
            let part = match state.kind {
                _ if role.shared.contains(&name) => &mut size.shared,
                StateKind::Param { trained: true } => &mut size.trained,
                _ => &mut size.frozen,
            };
            *part += numbers(state);
            let is_left = state.kind == StateKind::Param { trained: false } && !role.shared.contains(&name);
            size.left += usize::from(is_left && training.is_some());
            let kept = |id: StateId| Some(program.state(id).ty.dtype) == role.weights;
            size.kept[0] |= kept(id);
            size.kept[1] |= program.copies_of(id).any(kept);
            size.copies += program.copies_of(id).map(|copy| program.state(copy).bytes()).sum::<usize>();
            let wide = State { ty: state.ty.with(DType::F32), ..state.clone() };
            size.saved += wide.bytes() - state.bytes();
        }
        size
    }
}

impl fmt::Display for RoleSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(self.trained, "trained"), (self.frozen, "frozen"), (self.shared, "shared")];
        let parts = parts.iter().filter(|(count, _)| *count > 0);
        let parts: Vec<String> = parts.map(|(count, what)| format!("{} {what}", grouped(*count))).collect();
        write!(f, "{:<13} {}", self.name, parts.join(", "))?;
        let precision = self.precision.map(|dtype| format!("computes in {dtype}"));
        let weights = self.weights.and_then(|dtype| match self.kept {
            [true, _] => Some(format!("weights in {dtype}")),
            [_, true] => Some(format!("generates with weights in {dtype}")),
            _ => None,
        });
        let trains = match self.lora {
            Some((rank, weights)) => Some(format!("trains factors of rank {rank} beside {weights} weights")),
            None if self.left > 0 => Some(format!("leaves {} parameters as they are", self.left)),
            None => None,
        };
        let changes: Vec<String> = precision.into_iter().chain(weights).chain(trains).collect();
        if !changes.is_empty() {
            write!(f, "; changes numbers: {}", changes.join(", "))?;
        }
        for (bytes, what) in [(self.copies, "of copies"), (self.saved, "saved")] {
            if bytes > 0 {
                write!(f, ", {} {what}", self::size(bytes))?;
            }
        }
        if let (Some(dtype), [false, false]) = (self.weights, self.kept) {
            let why = if self.is_trained { ", as it is trained and never generates" } else { "" };
            write!(f, "; has no weights in {dtype}{why}")?;
        }
        Ok(())
    }
}

/// Numbers in a state, those of all ranks together.
fn numbers(state: &State) -> u64 {
    Dim::product(&state.whole_dims()).constant().unwrap_or(0) as u64
}

/// What a pass made of a stage.
pub struct PassReport {
    name: &'static str,
    before: Extent,
    after: Extent,
    /// What it matched, and how often.
    matched: BTreeMap<String, usize>,
}

/// How large the graphs of a program are together.
#[derive(Clone, Copy)]
struct Extent {
    ops: usize,
    /// Ops that run a kernel.
    kernels: usize,
    /// Bytes that one run of each graph reads and writes, at the largest dims.
    bytes: u64,
    /// Bytes of the values that are needed at one time, of the graph that needs most, as the planner counts them.
    live: u64,
}

impl PassReport {
    /// Reads the report off a pass that has run after another one, which left it what it says.
    pub fn new(step: &Step, last: Option<&PassReport>, target: &dyn Target) -> PassReport {
        let before = last.map_or_else(|| Extent::of(step.before, target), |last| last.after);
        // Many passes find nothing to do, and to see that is cheaper than to count.
        let after = if step.before.graphs == step.after.graphs { before } else { Extent::of(step.after, target) };
        PassReport { name: step.pass.name, before, after, matched: step.notes.matched.clone() }
    }
}

impl Extent {
    fn of(program: &Program, target: &dyn Target) -> Extent {
        let kernels =
            |g: &Graph| g.ops().filter(|(_, op)| !matches!(op.op.class(), Class::View | Class::State)).count();
        let bytes = |g: &Graph| graph_cost(g, &g.upper_bounds()).map_or(0, |c| c.bytes);
        Extent {
            ops: program.graphs.iter().map(Graph::len).sum(),
            kernels: program.graphs.iter().map(kernels).sum(),
            bytes: program.graphs.iter().map(bytes).fold(0, u64::saturating_add),
            live: program.graphs.iter().map(|g| live_bytes(g, program, target)).max().unwrap_or(0) as u64,
        }
    }
}

impl StageReport {
    /// Reads the report off the planned programs of all places along `pipeline`, and what passes made of the first.
    pub fn new(places: &[Planned], passes: Vec<PassReport>, target: &dyn Target) -> StageReport {
        let program = &places[0];
        let count = |trained_only: bool| {
            let params = program.states.iter().filter(|s| match s.kind {
                StateKind::Param { trained } => trained || !trained_only,
                StateKind::Copy { .. } | StateKind::State | StateKind::Scratch | StateKind::Generation => false,
            });
            params.map(numbers).sum()
        };
        let mut work = Work::default();
        work.collect(program, &program.stage.plan, 1, 1);
        let graphs = program
            .graphs
            .iter()
            .map(|g| {
                let ends = g.values().filter_map(|v| g.buffer(v)).filter(|b| b.region == Region::Values);
                (g.name.clone(), g.len(), ends.map(|b| b.offset + b.bytes).max().unwrap_or(0))
            })
            .collect();
        let arena = program.arena;
        let places = (places.len() > 1).then(|| PlacesReport::new(places));
        StageReport {
            name: program.stage.name.clone(),
            recipe: program.stage.recipe.clone(),
            mesh: program.mesh,
            parameters: (count(false), count(true)),
            roles: program.stage.roles.iter().map(|role| RoleSize::new(program, role)).collect(),
            work,
            passes,
            graphs,
            kernels: KernelUse::all(program, target),
            memory: [arena.persistent, arena.values, arena.scratch],
            places,
            host: arena.host,
        }
    }

    /// The report as JSON; sizes in bytes.
    pub fn json(&self) -> Value {
        let updates: Vec<Value> = self
            .work
            .updates
            .iter()
            .map(|(role, graph, done)| {
                json!({
                    "role": role, "graph": graph, "flops_per_step": done.flops,
                    "sent_bytes_per_step": done.sending.bytes, "messages_per_step": done.sending.messages,
                })
            })
            .collect();
        let calls: Vec<Value> = self
            .work
            .calls
            .iter()
            .map(|(what, done)| {
                json!({
                    "what": what, "flops_per_batch": done.flops,
                    "sent_bytes_per_batch": done.sending.bytes, "messages_per_batch": done.sending.messages,
                })
            })
            .collect();
        let passes: Vec<Value> = self
            .passes
            .iter()
            .map(|p| {
                json!({
                    "pass": p.name, "ops_before": p.before.ops, "ops_after": p.after.ops,
                    "kernels_before": p.before.kernels, "kernels_after": p.after.kernels,
                    "bytes_before": p.before.bytes, "bytes_after": p.after.bytes,
                    "live_bytes_before": p.before.live, "live_bytes_after": p.after.live, "matched": p.matched,
                })
            })
            .collect();
        let graphs: Vec<Value> = self
            .graphs
            .iter()
            .map(|(name, ops, bytes)| json!({"graph": name, "ops": ops, "value_bytes": bytes}))
            .collect();
        let roles: Vec<Value> = self
            .roles
            .iter()
            .map(|r| {
                let mut role = json!({"role": r.name, "trained": r.trained, "frozen": r.frozen, "shared": r.shared});
                if let Some(dtype) = r.precision {
                    role["precision"] = json!(dtype.name());
                }
                if let Some(dtype) = r.weights {
                    role["weights"] = json!(dtype.name());
                }
                if let Some((rank, weights)) = r.lora {
                    role["lora"] = json!({"rank": rank, "weights": weights});
                }
                if r.precision.or(r.weights).is_some() {
                    role["copies_bytes"] = json!(r.copies);
                    role["saved_bytes"] = json!(r.saved);
                }
                role
            })
            .collect();
        let kernels: Vec<Value> = self
            .kernels
            .iter()
            .map(|k| json!({"op": k.op, "lowering": k.lowering, "count": k.count, "workspace_bytes": k.workspace}))
            .collect();
        let [persistent, values, scratch] = self.memory;
        let mut report = json!({
            "stage": self.name,
            "recipe": self.recipe,
            "mesh": self.mesh,
            "parameters": self.parameters.0,
            "trained_parameters": self.parameters.1,
            "roles": roles,
            "updates": updates,
            "calls": calls,
            "passes": passes,
            "graphs": graphs,
            "kernels": kernels,
            "memory": {
                "persistent": persistent, "values": values, "scratch": scratch, "peak": persistent + values + scratch,
                "host": self.host,
            },
        });
        if let Some(places) = &self.places {
            report["pipeline"] = places.json();
        }
        report
    }
}

impl fmt::Display for StageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "stage {} (recipe {})", self.name, self.recipe)?;
        let (all, trained) = self.parameters;
        writeln!(f, "  parameters      {} ({} trained)", grouped(all), grouped(trained))?;
        for role in &self.roles {
            writeln!(f, "    {role}")?;
        }
        if !self.mesh.is_single() {
            let which = if self.places.is_some() { "the first" } else { "one" };
            writeln!(f, "  ranks           {}: {}; what follows is of {which} of them", self.mesh.ranks(), self.mesh)?;
        }
        for (what, done) in &self.work.calls {
            writeln!(f, "  {what:<15} {done} per full batch")?;
        }
        for (role, graph, done) in &self.work.updates {
            writeln!(f, "  update          {role} on {graph}: {done} per step of a full batch")?;
        }
        writeln!(f, "  passes          ops before -> after, kernels, bytes moved, most bytes live at once")?;
        for PassReport { name, before, after, matched } in &self.passes {
            let (ops, kernels) =
                (format!("{} -> {}", before.ops, after.ops), format!("{} -> {}", before.kernels, after.kernels));
            let both = |before: u64, after: u64| format!("{} -> {}", size(before as usize), size(after as usize));
            let (bytes, live) = (both(before.bytes, after.bytes), both(before.live, after.live));
            writeln!(f, "    {name:<13} {ops:<14} {kernels:<14} {bytes:<24} {live}")?;
            for (rule, times) in matched {
                writeln!(f, "      {times:>4} x {rule}")?;
            }
        }
        writeln!(f, "  graphs          ops, memory of values")?;
        for (name, ops, bytes) in &self.graphs {
            writeln!(f, "    {name:<24} {ops:>6}  {:>10}", size(*bytes))?;
        }
        if !self.kernels.is_empty() {
            writeln!(f, "  kernels         ops, what they become, workspace")?;
        }
        for KernelUse { op, lowering, count, workspace } in &self.kernels {
            let workspace = if *workspace > 0 { format!("; {} of workspace", size(*workspace)) } else { String::new() };
            writeln!(f, "    {count:>4} x {op:<18} {lowering}{workspace}")?;
        }
        let [persistent, values, scratch] = self.memory;
        write!(
            f,
            "  peak memory     {} = parameters and state {} + values {} + workspace {}",
            size(persistent + values + scratch),
            size(persistent),
            size(values),
            size(scratch)
        )?;
        if self.host > 0 {
            write!(f, "\n  host memory     {}", size(self.host))?;
        }
        self.places.iter().try_for_each(|places| write!(f, "\n{places}"))
    }
}

/// What one rank does.
#[derive(Clone, Copy, Default)]
struct Amount {
    /// Floating-point operations.
    flops: u64,
    /// What graphs send to other ranks.
    sending: Sending,
}

impl Amount {
    fn times(self, n: u64) -> Amount {
        Amount { flops: self.flops.saturating_mul(n), sending: self.sending.times(n) }
    }
}

impl Add for Amount {
    type Output = Amount;
    fn add(self, other: Amount) -> Amount {
        Amount { flops: self.flops.saturating_add(other.flops), sending: self.sending + other.sending }
    }
}

impl Sum for Amount {
    fn sum<I: Iterator<Item = Amount>>(all: I) -> Amount {
        all.fold(Amount::default(), Add::add)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} GFLOP", self.flops as f64 / 1e9)?;
        let Sending { messages, bytes } = self.sending;
        if bytes > 0 {
            write!(f, " and {} sent in {} messages", size(bytes as usize), grouped(messages))
        } else {
            Ok(())
        }
    }
}

/// Work of a plan by statement, by the formulas of `dsgc_ir::cost` at the upper bounds of all dims, of one rank.
#[derive(Default)]
struct Work {
    /// Role, loss graphs, one optimizer step at the largest batch.
    updates: Vec<(String, String, Amount)>,
    /// Graphs that train nothing, and models that generate: what it is, for the largest batch.
    calls: Vec<(String, Amount)>,
}

impl Work {
    /// Adds statements whose batch has this many rows, in calls of `micro`.
    fn collect(&mut self, program: &Program, plan: &[Statement], rows: usize, micro: usize) {
        let of = |name: &String| {
            let own = |graph: &str| {
                let graph = program.graph(graph).expect("the passes made it");
                let bounds = graph.upper_bounds();
                let flops = graph_cost(graph, &bounds).map_or(0, |c| c.flops);
                Amount { flops, sending: graph_sending(graph, &bounds, &program.mesh).unwrap_or_default() }
            };
            let Some(pieces) = program.stage.pieces.get(name) else { return own(name) };
            let here = pieces.iter().enumerate().filter(|(_, piece)| piece.place == program.place);
            let handed = |at: usize| {
                let bounds = program.graph(&pieces[at].graph).expect("the pass made it").upper_bounds();
                let by_place = handed_on(program, pieces, at, &bounds).unwrap_or_default().into_iter().enumerate();
                let to_others = by_place.filter(|&(place, bytes)| place != program.place && bytes > 0);
                to_others.fold(Sending::default(), |sum, (_, bytes)| sum + Sending { messages: 1, bytes })
            };
            here.map(|(at, piece)| own(&piece.graph) + Amount { flops: 0, sending: handed(at) }).sum()
        };
        let all = |names: &[String]| names.iter().map(of).sum::<Amount>();
        // Ranks with different rows have equal shares of them.
        let rows_of_rank = rows.div_ceil(program.mesh.data);
        let parts = rows_of_rank.div_ceil(micro.max(1)) as u64;
        for statement in plan {
            match statement {
                Statement::For { rows: Rows::Source(source), body, .. } => {
                    let source = program.stage.sources.iter().find(|s| s.name == *source);
                    let (rows, micro) = source.map_or((1, 1), |s| (s.batch_size, s.micro_batch_size));
                    self.collect(program, body, rows, micro);
                }
                Statement::For { rows: Rows::Minibatches { size, .. }, body, .. } => {
                    self.collect(program, body, *size, micro);
                }
                Statement::Repeat { body, .. } => self.collect(program, body, rows, micro),
                Statement::Update(update) => {
                    let graphs: Vec<&str> = update.terms.iter().map(|t| t.graph.as_str()).collect();
                    let total = match update.steps.as_ref().expect("the passes filled it in") {
                        UpdateSteps::Whole { step } => of(step),
                        UpdateSteps::Split { terms, squares, apply } => {
                            let term = |t: &TermSteps| (all(&t.count) + of(&t.grad)).times(parts) + of(&t.finish);
                            let last = of(apply) + squares.as_ref().map(of).unwrap_or_default();
                            terms.iter().map(term).sum::<Amount>() + last
                        }
                    };
                    self.updates.push((update.role.clone(), graphs.join(" + "), total));
                }
                Statement::Call(call) => {
                    let total = match call.steps.as_ref().expect("the passes filled it in") {
                        CallSteps::Whole => of(&call.graph),
                        CallSteps::Joined(joined) => {
                            self.calls.push((format!("{} with updates", call.graph), of(&joined.graph)));
                            of(&call.graph)
                        }
                        CallSteps::Split { count, rows, finish } => {
                            (all(count) + of(rows)).times(parts) + finish.as_ref().map(of).unwrap_or_default()
                        }
                    };
                    self.calls.push((format!("call {}", call.graph), total));
                }
                Statement::Generate(generate) => {
                    let steps = generate.steps.as_ref().expect("the passes filled it in");
                    let tokens = generate.max_new_tokens as u64;
                    let after = if generate.samples > 1 { generate.samples as u64 * tokens } else { tokens - 1 };
                    let one = of(&steps.prefill) + of(&steps.step).times(after);
                    let calls = rows_of_rank.div_ceil(generate.rows.max(1)) as u64;
                    let gather = steps.gather.as_ref().map(of).unwrap_or_default();
                    self.calls.push((format!("generate {}", generate.role), one.times(calls) + gather));
                }
                Statement::Next { .. } | Statement::Join { .. } | Statement::Recent { .. } => {}
            }
        }
    }
}

/// Where every value of a program lies.
pub struct MemoryTable(Vec<MemoryRow>);

struct MemoryRow {
    graph: String,
    name: String,
    ty: String,
    region: &'static str,
    offset: usize,
    bytes: usize,
    /// First and last op that needs it; inputs are there from the beginning.
    live: (u32, u32),
}

/// The table of a planned program: states first, then the values of every graph that have bytes of their own.
pub fn memory_table(program: &Planned) -> MemoryTable {
    let mut rows = Vec::new();
    for state in &program.states {
        let buffer = state.buffer.expect("a planned program has a buffer for every state");
        rows.push(MemoryRow {
            graph: String::new(),
            name: format!("@{}", state.name),
            ty: state.ty.to_string(),
            region: buffer.region.name(),
            offset: buffer.offset,
            bytes: buffer.bytes,
            live: (0, u32::MAX),
        });
    }
    for graph in &program.graphs {
        let names = dsgc_ir::print::value_names(graph);
        let last = last_uses(graph);
        let mut of_graph: Vec<MemoryRow> = graph
            .values()
            .filter_map(|value| {
                let buffer = graph.buffer(value).filter(|b| b.region == Region::Values)?;
                Some(MemoryRow {
                    graph: graph.name.clone(),
                    name: format!("%{}", names[value.0 as usize]),
                    ty: graph.ty(value).to_string(),
                    region: buffer.region.name(),
                    offset: buffer.offset,
                    bytes: buffer.bytes,
                    live: (graph.def(value).map_or(0, |d| d.0), last[value.0 as usize]),
                })
            })
            .collect();
        of_graph.sort_by_key(|r| (r.offset, r.live));
        rows.append(&mut of_graph);
    }
    MemoryTable(rows)
}

impl MemoryTable {
    /// The table as JSON.
    pub fn json(&self) -> Value {
        let row = |r: &MemoryRow| {
            json!({
                "graph": r.graph, "value": r.name, "type": r.ty, "region": r.region, "offset": r.offset,
                "bytes": r.bytes, "from": r.live.0, "to": r.live.1,
            })
        };
        Value::Array(self.0.iter().map(row).collect())
    }
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut graph = None;
        for (i, row) in self.0.iter().enumerate() {
            if graph != Some(&row.graph) {
                graph = Some(&row.graph);
                match row.graph.as_str() {
                    "" => writeln!(f, "parameters and state")?,
                    name => writeln!(f, "graph @{name}, by offset; ops from..to")?,
                }
            }
            let live = if row.graph.is_empty() { String::new() } else { format!("  {}..{}", row.live.0, row.live.1) };
            let end = if i + 1 < self.0.len() { "\n" } else { "" };
            write!(f, "  {:>12} {:>12}  {} : {}{live}{end}", row.offset, row.bytes, row.name, row.ty)?;
        }
        Ok(())
    }
}

/// `1,234,567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// `1.25 KiB`.
pub fn size(bytes: usize) -> String {
    indicatif::BinaryBytes(bytes as u64).to_string()
}
