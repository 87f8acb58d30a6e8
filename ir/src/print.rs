//! The text form, written.
//!
//! [`crate::parse`] reads it back: `print(parse(print(x))) == print(x)` for every program.

use std::collections::BTreeSet;
use std::fmt;

use crate::graph::{Buffer, Graph, Loc, Phase, Reason, Site, Value};
use crate::mesh::Placement;
use crate::op::Op;
use crate::program::{Level, Program, StateKind};
use crate::stage::Stage;

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "level {}", self.level.name())?;
        for (i, name) in self.sources.iter().enumerate() {
            writeln!(f, "source {i} {}", quoted(name))?;
        }
        if !self.mesh.is_single() {
            write!(f, "mesh {}", self.mesh)?;
            if self.mesh.pipeline > 1 {
                write!(f, " place={}", self.place)?;
            }
            writeln!(f)?;
        }
        if self.level == Level::Planned {
            let a = self.arena;
            write!(f, "arena persistent={} values={} scratch={}", a.persistent, a.values, a.scratch)?;
            if a.host > 0 {
                write!(f, " host={}", a.host)?;
            }
            if a.held > 0 {
                write!(f, " held={}", a.held)?;
            }
            if let Some(allocation) = a.allocation {
                write!(f, " allocation={allocation}")?;
            }
            writeln!(f)?;
        }
        for state in &self.states {
            let (kind, what) = match state.kind {
                StateKind::Param { trained } => ("param", if trained { " trained".into() } else { String::new() }),
                StateKind::Copy { of } => ("state", format!(" copy @{}", self.state(of).name)),
                StateKind::State => ("state", String::new()),
                StateKind::Scratch => ("state", " scratch".into()),
                StateKind::Generation => ("state", " generation".into()),
            };
            write!(f, "{kind} @{} : {}{what}", state.name, state.ty)?;
            write_placement(f, state.placement.as_ref())?;
            write!(f, "{}", if state.on_host { " on_host" } else { "" })?;
            write_buffer(f, state.buffer)?;
            if state.span.is_some() {
                let s = state.span;
                write!(f, " loc {}:{}:{}:{}", s.source, s.line, s.column, s.len)?;
            }
            writeln!(f)?;
        }
        for graph in &self.graphs {
            writeln!(f)?;
            write_graph(f, graph, self)?;
        }
        if self.stage != Stage::default() {
            let json = serde_json::to_string_pretty(&self.stage).map_err(|_| fmt::Error)?;
            writeln!(f, "\nstage {json}")?;
        }
        Ok(())
    }
}

fn write_placement(f: &mut fmt::Formatter<'_>, placement: Option<&Placement>) -> fmt::Result {
    let Some(placement) = placement else { return Ok(()) };
    write!(f, " of {:?}", placement.whole)?;
    for cut in &placement.cuts {
        write!(f, " cut {}/{}", cut.over, cut.dim)?;
    }
    if let Some(axis) = placement.partial {
        write!(f, " partial {axis}")?;
    }
    if !placement.places.is_empty() {
        write!(f, " at {:?}", placement.places)?;
    }
    Ok(())
}

/// The text form of one graph of a program.
pub struct GraphText<'a>(pub &'a Graph, pub &'a Program);

impl fmt::Display for GraphText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_graph(f, self.0, self.1)
    }
}

/// The printed name of every value: its number if it has none, else its own, with its number where that is taken or
/// looks like a number.
pub fn value_names(graph: &Graph) -> Vec<String> {
    let mut taken = BTreeSet::new();
    graph
        .values()
        .map(|v| {
            let own = graph.name_of(v);
            let mut name = match own {
                "" => v.0.to_string(),
                _ if own.parse::<u32>().is_ok() => format!("{own}.{}", v.0),
                _ => own.to_string(),
            };
            while taken.contains(&name) {
                name = format!("{name}.{}", v.0);
            }
            taken.insert(name.clone());
            name
        })
        .collect()
}

/// The printed name of one value, as in [`value_names`], for a message about it: in most graphs without those of all others.
pub fn value_name(graph: &Graph, value: Value) -> String {
    let own = graph.name_of(value);
    if own.is_empty() {
        return value.0.to_string();
    }
    // It may be what the number made of another value's name.
    if own.rsplit('.').next().is_some_and(|end| end.parse::<u32>().is_ok()) {
        return value_names(graph).swap_remove(value.0 as usize);
    }
    let is_taken = |name: &str| (0..value.0).any(|earlier| graph.name_of(Value(earlier)) == name);
    let mut name = own.to_string();
    while is_taken(&name) {
        name = format!("{name}.{}", value.0);
    }
    name
}

fn write_graph(f: &mut fmt::Formatter<'_>, graph: &Graph, program: &Program) -> fmt::Result {
    let names = value_names(graph);
    let name = |v: Value| format!("%{}", names[v.0 as usize]);
    let inputs: Vec<String> =
        graph.inputs().map(|v| format!("{}: {}{}", name(v), graph.ty(v), BufferText(graph.buffer(v)))).collect();
    writeln!(f, "graph @{}({}) {{", graph.name, inputs.join(", "))?;
    for dim in &graph.dims {
        let batch = if graph.batch.as_ref() == Some(&dim.symbol) { " batch" } else { "" };
        writeln!(f, "  dim {}: {}..{}{batch}", dim.symbol, dim.min, dim.max)?;
    }
    for (id, op) in graph.ops() {
        write!(f, "  ")?;
        let results: Vec<String> = op.results().map(name).collect();
        if !results.is_empty() {
            write!(f, "{} = ", results.join(", "))?;
        }
        match op.op {
            Op::Read { state } | Op::Write { state } => {
                write!(f, "{} @{}", op.op.name(), program.state(state).name)?;
            }
            _ => write!(f, "{}", op.op.name())?,
        }
        for (i, &arg) in op.args.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { " " } else { ", " }, name(arg))?;
        }
        if !matches!(op.op, Op::Read { .. } | Op::Write { .. }) {
            for (key, value) in op.op.attributes() {
                write!(f, " {key}={value}")?;
            }
        }
        if op.results().len() > 0 {
            let types: Vec<String> =
                op.results().map(|v| format!("{}{}", graph.ty(v), BufferText(graph.buffer(v)))).collect();
            write!(f, " : {}", types.join(", "))?;
        }
        match graph.scratch.get(id.0 as usize) {
            Some(bytes) if *bytes > 0 => write!(f, " scratch={bytes}")?,
            _ => {}
        }
        write_site(f, &op.site)?;
        writeln!(f)?;
    }
    let outputs: Vec<String> = graph.outputs.iter().map(|(n, v)| format!("{n}={}", name(*v))).collect();
    writeln!(f, "  return{}{}", if outputs.is_empty() { "" } else { " " }, outputs.join(", "))?;
    writeln!(f, "}}")
}

fn write_site(f: &mut fmt::Formatter<'_>, site: &Site) -> fmt::Result {
    if site.phase != Phase::Forward {
        write!(f, " {}", site.phase.name())?;
    }
    if let Some(tag) = &site.tag {
        write!(f, " layer {}/{}", tag.block, tag.instance)?;
    }
    let Loc { span, reason } = site.loc;
    if span.is_some() {
        let why = match reason {
            Reason::Written => "loc",
            Reason::Grad => "grad_of",
            Reason::Update => "update_of",
            Reason::Fused => "fused_at",
        };
        write!(f, " {why} {}:{}:{}:{}", span.source, span.line, span.column, span.len)?;
    }
    Ok(())
}

struct BufferText(Option<Buffer>);

impl fmt::Display for BufferText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_buffer(f, self.0)
    }
}

fn write_buffer(f: &mut fmt::Formatter<'_>, buffer: Option<Buffer>) -> fmt::Result {
    match buffer {
        Some(b) => write!(f, " in {}+{}:{}", b.region.name(), b.offset, b.bytes),
        None => Ok(()),
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
