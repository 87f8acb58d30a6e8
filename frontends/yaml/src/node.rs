//! YAML text as a tree that knows where everything stands.
//!
//! Mappings keep their order, scalars their raw text: `on`, `y` and `no` are names, and what is a number is decided by
//! who reads it. Anchors and aliases are resolved; merge keys (`<<`), tags and second documents are errors. All that
//! is wrong is collected; only an error of YAML's own syntax ends the reading.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span};
use granit_parser::{Event, Marker, Parser, ScalarStyle, StructureStyle};

use crate::text::{Style, Text};
use crate::yaml_error;

/// A value with its place.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where it begins.
    pub span: Span,
    /// Whether it stands inside `{}` or `[]`, or is one.
    pub flow: bool,
    /// What it is.
    pub value: Value,
}

/// What a node is.
#[derive(Clone, Debug)]
pub enum Value {
    /// Text: a name, a number, an expression.
    Scalar(Text),
    /// `- a` lines or `[a, b]`.
    List(Vec<Node>),
    /// `key: value` lines or `{key: value}`, in the order of the file, each key once.
    Map(Vec<(Text, Node)>),
    /// Nothing, `~` or `null`.
    Null,
    /// Something that has been reported already; readers pass over it in silence.
    Bad,
}

impl Node {
    /// The scalar, if it is one.
    pub fn scalar(&self) -> Option<&Text> {
        match &self.value {
            Value::Scalar(text) => Some(text),
            _ => None,
        }
    }

    /// Whether this was reported already.
    pub fn is_bad(&self) -> bool {
        matches!(self.value, Value::Bad)
    }

    /// What it is, for messages: `a list`, `the text `x``.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Scalar(t) if t.text.contains('\n') => "a text of several lines".into(),
            Value::Scalar(t) => format!("`{}`", t.text),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
            Value::Null => "no value".into(),
            Value::Bad => "an error".into(),
        }
    }
}

/// Aliases may repeat what they point to, and that may contain aliases again: nine lines can mean a billion nodes.
const MAX_NODES: usize = 200_000;

/// Reads a document. `None`, with errors added, if nothing can be made of it.
pub fn parse(source: u32, text: &str, errors: &mut Vec<Diag>) -> Option<Node> {
    let mut tree =
        Tree { source, text, parser: Parser::new_from_str(text), anchors: BTreeMap::new(), nodes: 0, errors };
    match tree.document() {
        Ok(node) => node,
        Err(Stop(diag)) => {
            tree.errors.push(*diag);
            None
        }
    }
}

/// An error after which no event follows.
struct Stop(Box<Diag>);

struct Tree<'a> {
    source: u32,
    text: &'a str,
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: BTreeMap<usize, Node>,
    nodes: usize,
    errors: &'a mut Vec<Diag>,
}

type Place = granit_parser::Span;

impl<'a> Tree<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Place), Stop> {
        match self.parser.next_event() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => Err(Stop(Box::new(yaml_error::diag(&error, self.source, self.text)))),
            None => Ok((Event::StreamEnd, Place::default())),
        }
    }

    fn span(&self, at: Marker, len: usize) -> Span {
        Span { source: self.source, line: at.line() as u32, column: at.col() as u32 + 1, len: len as u32 }
    }

    fn document(&mut self) -> Result<Option<Node>, Stop> {
        let mut root = None;
        loop {
            let (event, place) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::DocumentStart(..) if root.is_some() => {
                    let diag = Diag::error("found a second document in one file")
                        .label(self.span(place.start, 3), "")
                        .help("put it in a file of its own");
                    self.errors.push(diag);
                    return Ok(root);
                }
                Event::Scalar(..) | Event::SequenceStart(..) | Event::MappingStart(..) | Event::Alias(_) => {
                    root = Some(self.node(event, place, false)?);
                }
                _ => {}
            }
        }
        if root.is_none() {
            self.errors.push(
                Diag::error("found an empty document")
                    .label(Span { source: self.source, line: 1, column: 1, len: 1 }, "")
                    .help("begin with `dsgc: 1`, `model: <name>`, `recipe: <name>` or `functions: <name>`"),
            );
        }
        Ok(root)
    }

    fn node(&mut self, event: Event<'a>, place: Place, flow: bool) -> Result<Node, Stop> {
        self.nodes += 1;
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                if tag.is_some() {
                    return Ok(self.tagged(place, flow));
                }
                let node = self.scalar(&text, style, place, flow);
                Ok(self.anchored(anchor, node))
            }
            Event::SequenceStart(style, anchor, tag) => {
                let flow = flow || style == StructureStyle::Flow;
                let span = self.span(place.start, 1);
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd | Event::StreamEnd, _) => break,
                        (event, place) => items.push(self.node(event, place, flow)?),
                    }
                }
                if tag.is_some() {
                    return Ok(self.tagged(place, flow));
                }
                if flow {
                    self.join_cut_items(&mut items);
                }
                Ok(self.anchored(anchor, Node { span, flow, value: Value::List(items) }))
            }
            Event::MappingStart(style, anchor, tag) => {
                let flow = flow || style == StructureStyle::Flow;
                let span = self.span(place.start, 1);
                let entries = self.entries(flow)?;
                if tag.is_some() {
                    return Ok(self.tagged(place, flow));
                }
                Ok(self.anchored(anchor, Node { span, flow, value: Value::Map(entries) }))
            }
            Event::Alias(id) => {
                let span = self.span(place.start, place.len());
                let Some(node) = self.anchors.get(&id).cloned() else {
                    return Ok(self.bad(Diag::error("found an alias inside the value that it stands for"), span, flow));
                };
                self.nodes += count(&node);
                if self.nodes > MAX_NODES {
                    let diag = Diag::error(format!("found aliases that repeat more than {MAX_NODES} values"));
                    return Err(Stop(Box::new(diag.label(span, ""))));
                }
                Ok(node)
            }
            _ => Ok(Node { span: self.span(place.start, 1), flow, value: Value::Null }),
        }
    }

    fn anchored(&mut self, anchor: usize, node: Node) -> Node {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        node
    }

    fn bad(&mut self, diag: Diag, span: Span, flow: bool) -> Node {
        self.errors.push(diag.label(span, ""));
        Node { span, flow, value: Value::Bad }
    }

    fn tagged(&mut self, place: Place, flow: bool) -> Node {
        let at = place.tag_start.unwrap_or(place.start);
        let tag: String = at
            .byte_offset()
            .and_then(|b| self.text.get(b..))
            .map(|rest| rest.split(char::is_whitespace).next().unwrap_or_default().to_string())
            .unwrap_or_default();
        let span = self.span(at, tag.chars().count().max(1));
        let name = tag.trim_start_matches('!');
        let help = if name.is_empty() {
            "write `not` for a negation, or put the value in quotes".to_string()
        } else {
            format!("write `not {name}` for a negation, or put the value in quotes")
        };
        self.bad(Diag::error(format!("found the YAML tag `{tag}`, expected a value")).help(help), span, flow)
    }

    fn scalar(&self, text: &str, style: ScalarStyle, place: Place, flow: bool) -> Node {
        let raw = place.slice(self.text).unwrap_or_default();
        let start = self.span(place.start, 1);
        let style = match style {
            ScalarStyle::Plain => Style::Plain,
            ScalarStyle::SingleQuoted => Style::Single,
            ScalarStyle::DoubleQuoted => Style::Double,
            ScalarStyle::Literal | ScalarStyle::Folded => Style::Block,
        };
        // The parser gives `~` where nothing stands.
        if style == Style::Plain && matches!(raw, "" | "~" | "null" | "Null" | "NULL") {
            return Node { span: Span { len: (raw.len() as u32).max(1), ..start }, flow, value: Value::Null };
        }
        let text = Text::new(text.to_string(), raw, start, style, flow);
        Node { span: text.span, flow, value: Value::Scalar(text) }
    }

    fn entries(&mut self, flow: bool) -> Result<Vec<(Text, Node)>, Stop> {
        let mut entries: Vec<(Text, Node)> = Vec::new();
        loop {
            let (event, place) = self.next()?;
            if matches!(event, Event::MappingEnd | Event::StreamEnd) {
                break;
            }
            let key = self.node(event, place, flow)?;
            let (event, place) = self.next()?;
            let value = self.node(event, place, flow)?;
            let key = match key.value {
                Value::Scalar(text) => text,
                Value::Bad => continue,
                // `null:` is a name like any other.
                Value::Null if key.span.len > 1 => Text::new("null".into(), "null", key.span, Style::Plain, flow),
                _ => {
                    let found = key.describe();
                    self.bad(Diag::error(format!("found {found} as a key, expected a name")), key.span, flow);
                    continue;
                }
            };
            entries.push((key, value));
        }
        if flow {
            self.join_cut_entries(&mut entries);
        }
        let mut kept: Vec<(Text, Node)> = Vec::with_capacity(entries.len());
        let mut seen: BTreeMap<String, Span> = BTreeMap::new();
        for (key, value) in entries {
            if key.text == "<<" && !key.is_quoted() {
                self.errors.push(
                    Diag::error("found the merge key `<<`, which is not part of the language")
                        .label(key.span, "")
                        .help("write the keys out; what several stages share stands under `defaults`"),
                );
            } else if let Some(first) = seen.get(&key.text) {
                self.errors.push(
                    Diag::error(format!("found the key `{}` twice", key.text))
                        .label(key.span, "again here")
                        .label(*first, "first here"),
                );
            } else {
                seen.insert(key.text.clone(), key.span);
                kept.push((key, value));
            }
        }
        Ok(kept)
    }

    /// `{loss: mean(x, where=m)}` reads as the value `mean(x` and a key `where=m)`. Reported here, once and as what
    /// it is; readers would report several odd keys.
    fn join_cut_entries(&mut self, entries: &mut Vec<(Text, Node)>) {
        let mut i = 0;
        while i < entries.len() {
            let (key, value) = &entries[i];
            let in_key = open_parens(Some(key));
            let mut depth = in_key + open_parens(value.scalar());
            let mut end = i + 1;
            while depth > 0 && end < entries.len() {
                depth += open_parens(Some(&entries[end].0)) + open_parens(entries[end].1.scalar());
                end += 1;
            }
            if end > i + 1 {
                let (first, span) = if in_key > 0 { (Some(key), key.span) } else { (value.scalar(), value.span) };
                self.errors.push(cut(first, span));
                let span = value.span;
                entries[i].1 = Node { span, flow: true, value: Value::Bad };
                entries.drain(i + 1..end);
                if in_key > 0 {
                    entries.remove(i);
                    continue;
                }
            }
            i += 1;
        }
    }

    fn join_cut_items(&mut self, items: &mut Vec<Node>) {
        let mut i = 0;
        while i < items.len() {
            let mut depth = open_parens(items[i].scalar());
            let mut end = i + 1;
            while depth > 0 && end < items.len() {
                depth += open_parens(items[end].scalar());
                end += 1;
            }
            if end > i + 1 {
                let span = items[i].span;
                self.errors.push(cut(items[i].scalar(), span));
                items[i] = Node { span, flow: true, value: Value::Bad };
                items.drain(i + 1..end);
            }
            i += 1;
        }
    }
}

fn cut(text: Option<&Text>, span: Span) -> Diag {
    let text = text.map(|t| t.text.as_str()).unwrap_or_default();
    Diag::error(format!("the expression `{text}` is cut at the comma")).label(span, "`(` is not closed").help(FLOW_HELP)
}

/// What to do about an expression that YAML cuts.
pub(crate) const FLOW_HELP: &str =
    "inside `{}` and `[]` a comma ends a value: write one `key: value` per line, or put the expression in quotes";

fn open_parens(text: Option<&Text>) -> i32 {
    match text {
        Some(t) if !t.is_quoted() => t
            .text
            .chars()
            .map(|c| match c {
                '(' => 1,
                ')' => -1,
                _ => 0,
            })
            .sum(),
        _ => 0,
    }
}

fn count(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(count).sum::<usize>(),
        Value::Map(entries) => 1 + entries.iter().map(|(_, v)| 1 + count(v)).sum::<usize>(),
        Value::Scalar(_) | Value::Null | Value::Bad => 1,
    }
}
