//! The text form, read.
//!
//! A line is an item of a program or an op of a graph, so the reader goes line by line with a small cursor. Errors
//! point at the place; types are inferred and compared with the ones that stand there.

use std::collections::BTreeMap;

use crate::diag::{Diag, Span, nearest};
use crate::dim::{Dim, Symbol};
use crate::graph::{Buffer, DimRange, Graph, Loc, Phase, Reason, Region, Site, StateId, Tag, Value};
use crate::mesh::{Axis, Cut, Mesh, Placement};
use crate::op::{Attribute, Op};
use crate::program::{Arena, Level, Program, StateKind};
use crate::types::{DType, Type};

/// Reads a program from the text form. Blank lines and lines that begin with `;` are comments.
pub fn parse(text: &str) -> Result<Program, Diag> {
    let mut reader = Reader { text, at: 0, program: Program::default() };
    reader.program()?;
    Ok(reader.program)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    program: Program,
}

type Read<T> = Result<T, Diag>;

impl<'a> Reader<'a> {
    fn program(&mut self) -> Read<()> {
        loop {
            self.skip_blank_lines();
            if self.at == self.text.len() {
                return Ok(());
            }
            let at = self.here();
            match self.word()? {
                "level" => {
                    let at = self.here();
                    let name = self.word()?;
                    let all = [Level::Logical, Level::Partitioned, Level::Planned];
                    self.program.level = all
                        .into_iter()
                        .find(|l| l.name() == name)
                        .ok_or_else(|| self.unknown(at, "level", name, all.iter().map(|l| l.name())))?;
                }
                "source" => {
                    self.word()?;
                    let name = self.json()?;
                    self.program.sources.push(name);
                }
                "mesh" => {
                    let mut size = |axis: Axis| -> Read<usize> {
                        self.expect(axis.name())?;
                        self.expect("=")?;
                        self.number()
                    };
                    let [pipeline, data, tensor] = Axis::ALL.map(&mut size);
                    self.program.mesh = Mesh { pipeline: pipeline?, data: data?, tensor: tensor? };
                    if self.take_word("place") {
                        self.expect("=")?;
                        self.program.place = self.number()?;
                    }
                }
                "arena" => {
                    let mut field = |name: &str| -> Read<usize> {
                        self.expect(name)?;
                        self.expect("=")?;
                        self.number()
                    };
                    self.program.arena = Arena {
                        persistent: field("persistent")?,
                        values: field("values")?,
                        scratch: field("scratch")?,
                        ..Arena::default()
                    };
                    if self.take_word("host") {
                        self.expect("=")?;
                        self.program.arena.host = self.number()?;
                    }
                    if self.take_word("held") {
                        self.expect("=")?;
                        self.program.arena.held = self.number()?;
                    }
                    if self.take("allocation") {
                        self.expect("=")?;
                        let bytes = self.number()?;
                        if bytes == 0 {
                            return Err(self.error("found an allocation of 0 bytes, expected more"));
                        }
                        self.program.arena.allocation = Some(bytes);
                    }
                }
                kind @ ("param" | "state") => self.state(kind == "param")?,
                "graph" => self.graph()?,
                "stage" => self.program.stage = self.json()?,
                other => {
                    let items = ["level", "source", "mesh", "arena", "param", "state", "graph", "stage"];
                    return Err(self.unknown(at, "item of a program", other, items.into_iter()));
                }
            }
            self.end_of_line()?;
        }
    }

    fn state(&mut self, is_param: bool) -> Read<()> {
        self.expect("@")?;
        let name = self.name()?.to_string();
        self.expect(":")?;
        let ty = self.ty()?;
        let trained = self.take_word("trained");
        let scratch = self.take_word("scratch");
        let generation = self.take_word("generation");
        let copied = if self.take_word("copy") { Some(self.declared()?) } else { None };
        let placement = self.placement()?;
        let on_host = self.take_word("on_host");
        let buffer = self.buffer()?;
        let span = if self.take_word("loc") { self.span()? } else { Span::NONE };
        let kind = match copied {
            _ if is_param => StateKind::Param { trained },
            Some(of) => StateKind::Copy { of },
            None if scratch => StateKind::Scratch,
            None if generation => StateKind::Generation,
            None => StateKind::State,
        };
        if self.program.state_named(&name).is_some() {
            return Err(self.error(format!("`@{name}` is declared twice")));
        }
        let id = self.program.declare(name, ty, kind, span);
        let state = &mut self.program.states[id.0 as usize];
        (state.placement, state.on_host, state.buffer) = (placement, on_host, buffer);
        Ok(())
    }

    fn placement(&mut self) -> Read<Option<Placement>> {
        if !self.take_word("of") {
            return Ok(None);
        }
        let mut placement = Placement::of_whole(self.numbers()?);
        while self.take_word("cut") {
            let over = self.axis()?;
            self.expect("/")?;
            placement.cuts.push(Cut { over, dim: self.number()? });
        }
        if self.take_word("partial") {
            placement.partial = Some(self.axis()?);
        }
        if self.take_word("at") {
            placement.places = self.numbers()?;
        }
        Ok(Some(placement))
    }

    fn numbers(&mut self) -> Read<Vec<usize>> {
        let text = self.attribute_value()?;
        Vec::<usize>::read(text).map_err(|why| self.error(why))
    }

    fn axis(&mut self) -> Read<Axis> {
        let name = self.letters();
        Axis::read(name).map_err(|why| self.error(why))
    }

    /// A parameter or state that stands above.
    fn declared(&mut self) -> Read<StateId> {
        self.expect("@")?;
        let name = self.name()?.to_string();
        self.program.state_named(&name).ok_or_else(|| self.error(format!("`@{name}` is not declared above")))
    }

    fn graph(&mut self) -> Read<()> {
        self.expect("@")?;
        let mut graph = Graph::new(self.name()?);
        let mut names: BTreeMap<String, Value> = BTreeMap::new();
        self.expect("(")?;
        while !self.take(")") {
            self.expect("%")?;
            let name = self.name()?.to_string();
            self.expect(":")?;
            let value = graph.input(name.clone(), self.ty()?);
            if let Some(buffer) = self.buffer()? {
                graph.set_buffer(value, buffer);
            }
            if names.insert(name.clone(), value).is_some() {
                return Err(self.error(format!("`%{name}` is defined twice")));
            }
            self.take(",");
        }
        self.expect("{")?;
        loop {
            self.end_of_line()?;
            self.skip_blank_lines();
            if self.take_word("return") {
                break;
            }
            if self.rest().is_empty() {
                return Err(self.error("the text ends inside a graph").help("end it with `return` and `}`"));
            }
            if self.take_word("dim") {
                let symbol = Symbol::from(self.name()?);
                self.expect(":")?;
                let min = self.number()?;
                self.expect("..")?;
                let max = self.number()?;
                if self.take_word("batch") {
                    graph.batch = Some(symbol.clone());
                }
                graph.dims.push(DimRange { symbol, min, max });
            } else {
                self.op(&mut graph, &mut names)?;
            }
        }
        while !self.rest_of_line().trim().is_empty() {
            let name = self.name()?.to_string();
            self.expect("=")?;
            let value = self.value(&names)?;
            graph.outputs.push((name, value));
            self.take(",");
        }
        self.end_of_line()?;
        self.skip_blank_lines();
        self.expect("}")?;
        if self.program.graph(&graph.name).is_some() {
            return Err(self.error(format!("graph `@{}` is defined twice", graph.name)));
        }
        if self.program.level == Level::Logical {
            graph.scratch.clear();
        }
        self.program.graphs.push(graph);
        Ok(())
    }

    fn op(&mut self, graph: &mut Graph, names: &mut BTreeMap<String, Value>) -> Read<()> {
        self.skip_spaces();
        let start = self.at;
        let mut results = Vec::new();
        while self.take("%") {
            results.push(self.name()?.to_string());
            self.take(",");
        }
        if !results.is_empty() {
            self.expect("=")?;
        }
        let op_at = self.here();
        let op_name = self.word()?;
        let mut state = None;
        if self.take("@") {
            let (at, name) = (self.here(), self.name()?);
            let names = || self.program.states.iter().map(|s| s.name.as_str());
            let found = self.program.state_named(name);
            state = Some(found.ok_or_else(|| self.unknown(at, "param or state", name, names()))?);
        }
        let mut args = Vec::new();
        while self.peek("%") {
            args.push(self.value(names)?);
            self.take(",");
        }
        let (mut attributes, mut scratch) = (Vec::new(), 0);
        while let Some(key) = self.attribute_key() {
            attributes.push((key.to_string(), self.attribute_value()?.to_string()));
        }
        if let Some(StateId(id)) = state {
            attributes.push(("state".into(), id.to_string()));
        }
        let op = Op::from_text(op_name, &attributes).map_err(|why| self.error_at(op_at, why))?;
        let mut types = Vec::new();
        if self.take(":") {
            loop {
                let ty = self.ty()?;
                types.push((ty, self.buffer()?));
                if !self.take(",") {
                    break;
                }
            }
        }
        if let Some("scratch") = self.attribute_key() {
            scratch = self.number()?;
        }
        let site = self.site()?;
        let state_ty = state.map(|id| self.program.state(id).ty.clone());
        let id = graph.try_push(op, &args, state_ty.as_ref(), site).map_err(|why| self.error_at(start, why))?;
        let defined: Vec<Value> = graph.op(id).results().collect();
        if defined.len() != results.len() || (defined.len() != types.len() && !types.is_empty()) {
            return Err(self.error_at(start, format!("`{op_name}` has {} results", defined.len())));
        }
        graph.scratch.push(scratch);
        for (i, (value, name)) in defined.into_iter().zip(results).enumerate() {
            if let Some((ty, buffer)) = types.get(i) {
                if ty != graph.ty(value) {
                    let found = graph.ty(value);
                    return Err(self.error_at(start, format!("`{op_name}` gives {found}, but {ty} stands here")));
                }
                if let Some(buffer) = buffer {
                    graph.set_buffer(value, *buffer);
                }
            }
            if name.parse::<u32>() != Ok(value.0) {
                graph.set_name(value, name.clone());
            }
            if names.insert(name.clone(), value).is_some() {
                return Err(self.error_at(start, format!("`%{name}` is defined twice")));
            }
        }
        Ok(())
    }

    fn site(&mut self) -> Read<Site> {
        let mut site = Site::default();
        for phase in Phase::ALL {
            if self.take_word(phase.name()) {
                site.phase = phase;
            }
        }
        if self.take_word("layer") {
            let text = self.word()?;
            let (block, instance) = text.rsplit_once('/').ok_or_else(|| self.error("a layer is `name/number`"))?;
            let instance = instance.parse().map_err(|_| self.error("a layer is `name/number`"))?;
            site.tag = Some(Tag { block: block.into(), instance });
        }
        let words = [
            ("loc", Reason::Written),
            ("grad_of", Reason::Grad),
            ("update_of", Reason::Update),
            ("fused_at", Reason::Fused),
        ];
        for (word, reason) in words {
            if self.take_word(word) {
                site.loc = Loc { span: self.span()?, reason };
            }
        }
        Ok(site)
    }

    fn span(&mut self) -> Read<Span> {
        let mut part = || -> Read<u32> {
            let n = self.number()?;
            self.take(":");
            Ok(n)
        };
        Ok(Span { source: part()?, line: part()?, column: part()?, len: part()? })
    }

    fn buffer(&mut self) -> Read<Option<Buffer>> {
        if !self.take_word("in") {
            return Ok(None);
        }
        let (at, name) = (self.here(), self.letters());
        let region = Region::ALL.into_iter().find(|r| r.name() == name);
        let names = Region::ALL.iter().map(|r| r.name());
        let region = region.ok_or_else(|| self.unknown(at, "region", name, names))?;
        self.expect("+")?;
        let offset = self.number()?;
        self.expect(":")?;
        Ok(Some(Buffer { region, offset, bytes: self.number()? }))
    }

    fn ty(&mut self) -> Read<Type> {
        let (at, name) = (self.here(), self.letters());
        let dtype = DType::ALL.into_iter().find(|d| d.name() == name);
        let names = DType::ALL.iter().map(|d| d.name());
        let dtype = dtype.ok_or_else(|| self.unknown(at, "element type", name, names))?;
        let list = self.attribute_value()?;
        let inner = list.strip_prefix('[').and_then(|l| l.strip_suffix(']'));
        let inner = inner.ok_or_else(|| self.error("expected dims in brackets"))?;
        let dims: Result<Vec<Dim>, String> =
            inner.split(',').map(str::trim).filter(|d| !d.is_empty()).map(Dim::parse).collect();
        Ok(Type::new(dtype, dims.map_err(|why| self.error(why))?))
    }

    fn value(&mut self, names: &BTreeMap<String, Value>) -> Read<Value> {
        let at = self.here();
        self.expect("%")?;
        let name = self.name()?;
        names.get(name).copied().ok_or_else(|| {
            let diag = self.error_at(at, format!("`%{name}` is not defined before its use"));
            match nearest(name, names.keys().map(String::as_str)) {
                Some(near) => diag.help(format!("the nearest is `%{near}`")),
                None => diag,
            }
        })
    }

    // The cursor. Spaces within a line are skipped before every token.

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn rest_of_line(&self) -> &'a str {
        self.rest().split('\n').next().unwrap_or("")
    }

    fn skip_spaces(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start_matches([' ', '\t']).len();
    }

    /// Where the next token begins.
    fn here(&mut self) -> usize {
        self.skip_spaces();
        self.at
    }

    fn skip_blank_lines(&mut self) {
        loop {
            let line = self.rest_of_line();
            let trimmed = line.trim();
            if !(trimmed.is_empty() || trimmed.starts_with(';')) || self.at == self.text.len() {
                return self.skip_spaces();
            }
            self.at = (self.at + line.len() + 1).min(self.text.len());
        }
    }

    fn end_of_line(&mut self) -> Read<()> {
        self.skip_spaces();
        let rest = self.rest_of_line().trim();
        if rest.is_empty() || rest.starts_with(';') {
            self.at += self.rest_of_line().len();
            Ok(())
        } else {
            Err(self.error(format!("found `{rest}`, expected the end of the line")))
        }
    }

    fn peek(&mut self, token: &str) -> bool {
        self.skip_spaces();
        self.rest().starts_with(token)
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.peek(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// Takes a word only if it ends there.
    fn take_word(&mut self, word: &str) -> bool {
        self.skip_spaces();
        let ends =
            self.rest().strip_prefix(word).is_some_and(|r| !r.starts_with(|c: char| c.is_alphanumeric() || c == '_'));
        if ends {
            self.at += word.len();
        }
        ends
    }

    fn expect(&mut self, token: &str) -> Read<()> {
        if self.take(token) { Ok(()) } else { Err(self.error(format!("expected `{token}`"))) }
    }

    fn run(&mut self, part: impl Fn(char) -> bool) -> &'a str {
        self.skip_spaces();
        let rest = self.rest();
        let len = rest.find(|c| !part(c)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    fn letters(&mut self) -> &'a str {
        self.run(|c| c.is_ascii_alphanumeric())
    }

    fn word(&mut self) -> Read<&'a str> {
        let word = self.run(|c| !c.is_whitespace() && c != ',');
        if word.is_empty() { Err(self.error("expected a word")) } else { Ok(word) }
    }

    fn name(&mut self) -> Read<&'a str> {
        let name = self.run(|c| c.is_alphanumeric() || "._/-".contains(c));
        if name.is_empty() { Err(self.error("expected a name")) } else { Ok(name) }
    }

    fn number<N: std::str::FromStr>(&mut self) -> Read<N> {
        self.run(|c| c.is_ascii_digit()).parse().map_err(|_| self.error("expected a number"))
    }

    /// `key=` if an attribute comes next.
    fn attribute_key(&mut self) -> Option<&'a str> {
        self.skip_spaces();
        let rest = self.rest();
        let len = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'))?;
        if len > 0 && rest[len..].starts_with('=') {
            self.at += len + 1;
            return Some(&rest[..len]);
        }
        None
    }

    fn attribute_value(&mut self) -> Read<&'a str> {
        for (open, close) in [("[", "]"), ("{", "}")] {
            if self.peek(open) {
                let rest = self.rest_of_line();
                let len = rest.find(close).ok_or_else(|| self.error(format!("expected `{close}`")))? + 1;
                self.at += len;
                return Ok(&rest[..len]);
            }
        }
        Ok(self.run(|c| !c.is_whitespace()))
    }

    /// A JSON value; the cursor ends after it.
    fn json<T: serde::de::DeserializeOwned>(&mut self) -> Read<T> {
        self.skip_spaces();
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<T>();
        let value = stream.next().ok_or_else(|| self.error("expected JSON"))?;
        let value = value.map_err(|e| {
            // Its line and column count from here, and stand in its message.
            let lines = self.rest().split_inclusive('\n').take(e.line().saturating_sub(1));
            let at = self.at + lines.map(str::len).sum::<usize>() + e.column().saturating_sub(1);
            let text = e.to_string();
            self.error_at(at, text.split(" at line ").next().unwrap_or(&text))
        })?;
        self.at += stream.byte_offset();
        Ok(value)
    }

    /// A name that is none of the known ones.
    fn unknown<'b>(&self, at: usize, what: &str, name: &str, known: impl Iterator<Item = &'b str>) -> Diag {
        let known: Vec<&str> = known.collect();
        let diag = self.error_at(at, format!("no {what} is called `{name}`"));
        match nearest(name, known.iter().copied()) {
            Some(near) => diag.help(format!("the nearest is `{near}`")),
            None => diag.help(format!("there are {}", known.join(", "))),
        }
    }

    fn error(&self, message: impl Into<String>) -> Diag {
        self.error_at(self.at, message)
    }

    fn error_at(&self, at: usize, message: impl Into<String>) -> Diag {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.matches('\n').count() as u32 + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() as u32 + 1;
        let message = message.into();
        Diag::error(message).label(Span { source: 0, line, column, len: 1 }, "")
    }
}
