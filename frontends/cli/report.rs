//! Reports of a compiled stage. Every figure is computed by a stated formula; none is measured.

use std::fmt;

use dsgc_ir::cost::graph_cost;
use dsgc_ir::stage::{Stage, Statement, UpdateSteps};
use dsgc_ir::verify::last_uses;
use dsgc_ir::{Planned, Program, Region, StateKind};
use serde_json::{Value, json};

/// What became of one stage.
pub struct StageReport {
    name: String,
    recipe: String,
    /// Numbers in parameters: all, and those that are trained.
    parameters: (u64, u64),
    /// Per update: role, loss graph, operations of one optimizer step at the largest batch.
    updates: Vec<(String, String, u64)>,
    /// Per pass: ops of all graphs before and after.
    passes: Vec<(&'static str, usize, usize)>,
    /// Per graph: ops, and bytes of its values.
    graphs: Vec<(String, usize, usize)>,
    /// Bytes of parameters and state, values, workspace.
    memory: [usize; 3],
}

impl StageReport {
    /// Reads the report off a planned program.
    pub fn new(program: &Planned, passes: Vec<(&'static str, usize, usize)>) -> StageReport {
        let count = |trained_only: bool| {
            let params = program.states.iter().filter(|s| match s.kind {
                StateKind::Param { trained } => trained || !trained_only,
                StateKind::State => false,
            });
            params.map(|s| s.ty.len().constant().unwrap_or(0) as u64).sum()
        };
        let mut updates = Vec::new();
        collect_updates(program, &program.stage.plan, 1, &mut updates);
        let graphs = program
            .graphs
            .iter()
            .map(|g| {
                let ends = g.values().filter_map(|v| g.buffer(v)).filter(|b| b.region == Region::Values);
                (g.name.clone(), g.len(), ends.map(|b| b.offset + b.bytes).max().unwrap_or(0))
            })
            .collect();
        let arena = program.arena;
        StageReport {
            name: program.stage.name.clone(),
            recipe: program.stage.recipe.clone(),
            parameters: (count(false), count(true)),
            updates,
            passes,
            graphs,
            memory: [arena.persistent, arena.values, arena.scratch],
        }
    }

    /// The report as JSON; sizes in bytes.
    pub fn json(&self) -> Value {
        let updates: Vec<Value> = self
            .updates
            .iter()
            .map(|(role, graph, flops)| json!({"role": role, "graph": graph, "flops_per_step": flops}))
            .collect();
        let passes: Vec<Value> = self
            .passes
            .iter()
            .map(|(name, before, after)| json!({"pass": name, "ops_before": before, "ops_after": after}))
            .collect();
        let graphs: Vec<Value> = self
            .graphs
            .iter()
            .map(|(name, ops, bytes)| json!({"graph": name, "ops": ops, "value_bytes": bytes}))
            .collect();
        let [persistent, values, scratch] = self.memory;
        json!({
            "stage": self.name,
            "recipe": self.recipe,
            "parameters": self.parameters.0,
            "trained_parameters": self.parameters.1,
            "updates": updates,
            "passes": passes,
            "graphs": graphs,
            "memory": {
                "persistent": persistent, "values": values, "scratch": scratch, "peak": persistent + values + scratch,
            },
        })
    }
}

impl fmt::Display for StageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "stage {} (recipe {})", self.name, self.recipe)?;
        let (all, trained) = self.parameters;
        writeln!(f, "  parameters      {} ({} trained)", grouped(all), grouped(trained))?;
        for (role, graph, flops) in &self.updates {
            writeln!(
                f,
                "  update          {role} on {graph}: {:.3} GFLOP per step of a full batch",
                *flops as f64 / 1e9
            )?;
        }
        writeln!(f, "  passes          ops before -> after")?;
        for (name, before, after) in &self.passes {
            writeln!(f, "    {name:<13} {before} -> {after}")?;
        }
        writeln!(f, "  graphs          ops, memory of values")?;
        for (name, ops, bytes) in &self.graphs {
            writeln!(f, "    {name:<24} {ops:>6}  {:>10}", size(*bytes))?;
        }
        let [persistent, values, scratch] = self.memory;
        write!(
            f,
            "  peak memory     {} = parameters and state {} + values {} + workspace {}",
            size(persistent + values + scratch),
            size(persistent),
            size(values),
            size(scratch)
        )
    }
}

/// Operations of every update of the plan, by the formulas of `dsgc_ir::cost` at the upper bounds of all dims.
fn collect_updates(program: &Program, plan: &[Statement], calls: u64, found: &mut Vec<(String, String, u64)>) {
    for statement in plan {
        match statement {
            Statement::For { source, body, .. } => {
                let parts = program
                    .stage
                    .sources
                    .iter()
                    .find(|s| s.name == *source)
                    .map_or(1, |s| s.batch_size.div_ceil(s.micro_batch_size.max(1)) as u64);
                collect_updates(program, body, parts, found);
            }
            Statement::Repeat { body, .. } => collect_updates(program, body, calls, found),
            Statement::Update(update) => {
                let flops = |name: &String| {
                    let graph = program.graph(name).expect("the passes made it");
                    graph_cost(graph, &graph.upper_bounds()).map_or(0, |c| c.flops)
                };
                let total = match update.steps.as_ref().expect("the passes filled it in") {
                    UpdateSteps::Whole { step } => flops(step),
                    UpdateSteps::Split { count, grad, finish, apply } => {
                        let part = count.as_ref().map_or(0, flops) + flops(grad);
                        calls.saturating_mul(part).saturating_add(flops(finish) + flops(apply))
                    }
                };
                found.push((update.role.clone(), update.graph.clone(), total));
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

/// The plan of a stage, as a reader would tell it.
pub fn plan_text(stage: &Stage) -> String {
    let mut lines = vec![format!("stage {} -> {}", stage.name, stage.output_dir)];
    for role in &stage.roles {
        let trained = if role.trained { "trained" } else { "frozen" };
        lines.push(format!("  role {}: {} ({trained}) from {:?}", role.name, role.model.family, role.origin));
    }
    for source in &stage.sources {
        let accumulation = source.batch_size.div_ceil(source.micro_batch_size.max(1));
        lines.push(format!(
            "  source {}: {}, {} rows per step = {} x micro-batches of {}, up to {} tokens",
            source.name, source.path, source.batch_size, accumulation, source.micro_batch_size, source.max_length
        ));
    }
    for evaluate in &stage.evaluate {
        let steps = evaluate.steps.as_ref().expect("the passes filled it in");
        lines.push(format!(
            "  evaluate on {}: call {} per micro-batch, then {}",
            evaluate.source, steps.sums, steps.finish
        ));
    }
    statements(&stage.plan, 1, &mut lines);
    for role in &stage.save {
        lines.push(format!("  save {role}"));
    }
    lines.join("\n")
}

fn statements(plan: &[Statement], depth: usize, lines: &mut Vec<String>) {
    let indent = "  ".repeat(depth);
    for statement in plan {
        match statement {
            Statement::For { batch, source, body } => {
                lines.push(format!("{indent}for {batch} in {source}"));
                statements(body, depth + 1, lines);
            }
            Statement::Repeat { times, body } => {
                lines.push(format!("{indent}repeat {times}"));
                statements(body, depth + 1, lines);
            }
            Statement::Update(update) => {
                lines.push(format!("{indent}update {} on {}", update.role, update.graph));
                match update.steps.as_ref().expect("the passes filled it in") {
                    UpdateSteps::Whole { step } => lines.push(format!("{indent}  call {step}")),
                    UpdateSteps::Split { count, grad, finish, apply } => {
                        for graph in count.iter().chain([grad]) {
                            lines.push(format!("{indent}  call {graph} per micro-batch"));
                        }
                        lines.extend([finish, apply].map(|graph| format!("{indent}  call {graph}")));
                    }
                }
            }
        }
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
