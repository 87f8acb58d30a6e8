//! What is measured: a small program per kernel family, at the shapes of a model's steps.
//!
//! A program reads its operands from states and writes its results to states, so that a run moves nothing but what the
//! kernels move, and it is compiled as every program is.

use dsgc_ir::{Program, Tensor, parse};

/// A model, and the batch of one of its steps.
pub struct Model {
    pub name: &'static str,
    /// Element type of what products, norms and activations work on.
    pub float: &'static str,
    /// Rows of a batch, and tokens of a row.
    pub batch: usize,
    pub length: usize,
    /// Widths: of the stream, inside of the feed-forward part, of the vocabulary.
    pub hidden: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub heads: usize,
    /// Whether it is built as Llama is (RMSNorm, rotary positions, gated SiLU), otherwise as OPT.
    pub llama: bool,
}

/// A program of one kernel family.
pub struct Case {
    pub model: &'static str,
    pub family: &'static str,
    pub name: String,
    /// Extents, as a reader would say them.
    pub shape: String,
    pub float: &'static str,
    states: Vec<State>,
    /// Lines of the graph between reads and writes.
    body: String,
    /// States and what is written to them.
    writes: Vec<(&'static str, &'static str)>,
}

struct State {
    name: &'static str,
    ty: String,
    shape: Vec<usize>,
    fill: Fill,
    /// Whether the graph reads it.
    read: bool,
}

/// What a state holds in the beginning.
#[derive(Clone, Copy)]
enum Fill {
    /// Floats between -1 and 1.
    Floats,
    /// Floats a little over 0.
    Positive,
    /// Integers below a number.
    Below(usize),
    /// The same integer everywhere.
    All(i32),
    /// 0, 1, 2, ... below a number, again and again.
    Count(usize),
    /// Every third one is false.
    Mask,
}

/// The graph that runs a copy of a case.
pub fn graph(copy: usize) -> String {
    format!("run.{copy}")
}

/// A copy's state.
fn state_of(copy: usize, name: &str) -> String {
    format!("{copy}/{name}")
}

impl Case {
    /// Model, family and kernel in one, which `--filter` looks into.
    pub fn title(&self) -> String {
        format!("{} {} {}", self.model, self.family, self.name)
    }

    /// The program in text form: so many copies of the case, each a graph with states of its own.
    pub fn text(&self, copies: usize) -> String {
        let mut text = String::from("level logical\n");
        for copy in 0..copies {
            for state in &self.states {
                text += &format!("state @{} : {}\n", state_of(copy, state.name), state.ty);
            }
        }
        for copy in 0..copies {
            text += &format!("graph @{}() {{\n", graph(copy));
            for state in self.states.iter().filter(|s| s.read) {
                text += &format!("  %{} = read @{}\n", state.name, state_of(copy, state.name));
            }
            text += &self.body;
            for (state, value) in &self.writes {
                text += &format!("  write @{} {value}\n", state_of(copy, state));
            }
            text += "  return\n}\n";
        }
        text
    }

    /// The program, as a frontend would make it.
    ///
    /// # Panics
    /// If the text is wrong, which is a bug here.
    pub fn program(&self, copies: usize) -> Program {
        parse(&self.text(copies)).unwrap_or_else(|e| panic!("bug: {}: {e}\n{}", self.title(), self.text(1)))
    }

    /// The values of all states that are read, by name, of as many copies.
    pub fn values(&self, copies: usize) -> Vec<(String, Tensor)> {
        let read = self.states.iter().filter(|s| s.read);
        read.flat_map(|s| (0..copies).map(move |copy| (state_of(copy, s.name), s.value()))).collect()
    }

    fn new(model: &Model, family: &'static str, name: impl Into<String>, shape: &[usize]) -> Case {
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let (model, float, name) = (model.name, model.float, name.into());
        Case { model, family, name, shape, float, states: Vec::new(), body: String::new(), writes: Vec::new() }
    }

    fn state(mut self, name: &'static str, dtype: &str, shape: &[usize], fill: Fill, read: bool) -> Case {
        let ty = format!("{dtype}{shape:?}");
        self.states.push(State { name, ty, shape: shape.to_vec(), fill, read });
        self
    }

    /// An operand.
    fn operand(self, name: &'static str, dtype: &str, shape: &[usize], fill: Fill) -> Case {
        self.state(name, dtype, shape, fill, true)
    }

    /// An operand in the model's floats.
    fn floats(self, name: &'static str, shape: &[usize]) -> Case {
        let float = self.float;
        self.operand(name, float, shape, Fill::Floats)
    }

    /// Where a result goes.
    fn result(self, name: &'static str, dtype: &str, shape: &[usize]) -> Case {
        self.state(name, dtype, shape, Fill::Floats, false)
    }

    /// A line of the graph.
    fn line(mut self, line: &str) -> Case {
        self.body += &format!("  {line}\n");
        self
    }

    /// The end of the graph: values by the name of the state that they go to.
    fn writes(mut self, results: &[(&'static str, &'static str)]) -> Case {
        self.writes.extend(results);
        self
    }

    /// The end of a graph of one op with one result `%y`, which goes to a state of its own.
    fn gives(self, shape: &[usize], line: &str) -> Case {
        let float = self.float;
        self.result("y", float, shape).line(&format!("%y.1 = {line}")).writes(&[("y", "%y.1")])
    }
}

impl State {
    fn value(&self) -> Tensor {
        let n: usize = self.shape.iter().product();
        // A multiplicative hash: nothing here asks for better numbers than these.
        let number = |i: usize| (i as u32).wrapping_mul(0x9E37_79B1) >> 8;
        let unit = |i: usize| number(i) as f32 / (1 << 24) as f32;
        match self.fill {
            Fill::Floats => Tensor::f32(&self.shape, (0..n).map(|i| 2.0 * unit(i) - 1.0).collect()),
            Fill::Positive => Tensor::f32(&self.shape, (0..n).map(|i| 1e-3 + 1e-3 * unit(i)).collect()),
            Fill::Below(end) => Tensor::i32(&self.shape, (0..n).map(|i| (number(i) as usize % end) as i32).collect()),
            Fill::All(value) => Tensor::i32(&self.shape, vec![value; n]),
            Fill::Count(end) => Tensor::i32(&self.shape, (0..n).map(|i| (i % end) as i32).collect()),
            Fill::Mask => Tensor::bool(&self.shape, (0..n).map(|i| i % 3 != 0).collect()),
        }
    }
}

/// All cases of a model.
pub fn cases(model: &Model) -> Vec<Case> {
    let mut all = products(model);
    if model.float != "f32" {
        // What else is narrow moves fewer bytes by the same kernels.
        return all;
    }
    all.extend(elementwise(model));
    all.extend(norms(model));
    all.extend(attention(model));
    all.extend(vocabulary(model));
    all.extend(movement(model));
    all.push(adamw(model, "adamw of ffn", &[model.ffn, model.hidden]));
    all.push(adamw(model, "adamw of embedding", &[model.vocab, model.hidden]));
    all
}

/// Products of a step: forwards, for the gradient of the input, for the gradient of the weight; and of a step of decoding.
fn products(m: &Model) -> Vec<Case> {
    let rows = m.batch * m.length;
    let linear = [
        ("projection", m.hidden, m.hidden),
        ("ffn up", m.hidden, m.ffn),
        ("ffn down", m.ffn, m.hidden),
        ("logits", m.hidden, m.vocab),
    ];
    let mut all = Vec::new();
    for (name, from, to) in linear {
        let new = |way: &str, shape: [usize; 3]| Case::new(m, "product", format!("{name}{way}"), &shape);
        all.push(
            new("", [rows, from, to])
                .floats("x", &[rows, from])
                .floats("w", &[to, from])
                .gives(&[rows, to], "contract %x, %w spec=bi,oi->bo"),
        );
        all.push(
            new(", input gradient", [rows, to, from])
                .floats("g", &[rows, to])
                .floats("w", &[to, from])
                .gives(&[rows, from], "contract %g, %w spec=bo,oi->bi"),
        );
        all.push(
            new(", weight gradient", [to, rows, from])
                .floats("g", &[rows, to])
                .floats("x", &[rows, from])
                .result("y", "f32", &[to, from])
                .line(&format!("%y.1 = contract %g, %x spec=bo,bi->oi{}", if m.float == "f32" { "" } else { ":f32" }))
                .writes(&[("y", "%y.1")]),
        );
    }
    for (name, from, to) in linear {
        all.push(
            Case::new(m, "decoding", name, &[m.batch, from, to])
                .floats("x", &[m.batch, from])
                .floats("w", &[to, from])
                .gives(&[m.batch, to], "contract %x, %w spec=bi,oi->bo"),
        );
    }
    all
}

fn elementwise(m: &Model) -> Vec<Case> {
    let (inner, outer) = ([m.batch * m.length, m.ffn], [m.batch * m.length, m.hidden]);
    let new = |name: &str, shape: &[usize]| Case::new(m, "fused", name, shape);
    let residual = new("bias and residual", &outer)
        .floats("x", &outer)
        .floats("h", &outer)
        .floats("bias", &[m.hidden])
        .line(&format!("%b = broadcast %bias shape={outer:?}"))
        .line("%s = add %h, %b")
        .gives(&outer, "add %x, %s");
    let mut all = vec![residual];
    if m.llama {
        all.push(
            new("gated silu", &inner)
                .floats("gate", &inner)
                .floats("up", &inner)
                .line("%s = silu %gate")
                .gives(&inner, "mul %s, %up"),
        );
        all.push(
            new("gradient of gated silu", &inner)
                .floats("gate", &inner)
                .floats("up", &inner)
                .floats("g", &inner)
                .result("dgate", m.float, &inner)
                .result("dup", m.float, &inner)
                .line(&format!("%one = const value=1.0 dtype={}", m.float))
                .line(&format!("%ones = broadcast %one shape={inner:?}"))
                .line("%sigma = sigmoid %gate")
                .line("%s = mul %gate, %sigma")
                .line("%du = mul %g, %s")
                .line("%off = sub %ones, %sigma")
                .line("%rise = mul %s, %off")
                .line("%slope = add %sigma, %rise")
                .line("%gu = mul %g, %up")
                .line("%dg = mul %gu, %slope")
                .writes(&[("dgate", "%dg"), ("dup", "%du")]),
        );
    } else {
        all.push(
            new("bias and relu", &inner)
                .floats("x", &inner)
                .floats("bias", &[m.ffn])
                .line(&format!("%b = broadcast %bias shape={inner:?}"))
                .line("%s = add %x, %b")
                .gives(&inner, "relu %s"),
        );
        all.push(
            new("gradient of relu", &inner)
                .floats("x", &inner)
                .floats("g", &inner)
                .line(&format!("%zero = const value=0.0 dtype={}", m.float))
                .line(&format!("%zeros = broadcast %zero shape={inner:?}"))
                .line("%on = lt %zeros, %x")
                .gives(&inner, "where %on, %g, %zeros"),
        );
        all.push(
            new("bias and gelu", &inner)
                .floats("x", &inner)
                .floats("bias", &[m.ffn])
                .line(&format!("%b = broadcast %bias shape={inner:?}"))
                .line("%s = add %x, %b")
                .gives(&inner, "gelu %s"),
        );
    }
    all
}

fn norms(m: &Model) -> Vec<Case> {
    let shape = [m.batch * m.length, m.hidden];
    let new = |name: &str| Case::new(m, "norm", name, &shape).floats("x", &shape).floats("w", &[m.hidden]);
    if m.llama {
        return vec![
            new("rms_norm").gives(&shape, "rms_norm %x, %w eps=1e-5"),
            new("rms_norm_grad")
                .floats("g", &shape)
                .result("dx", m.float, &shape)
                .result("dw", m.float, &[m.hidden])
                .line("%a, %b = rms_norm_grad %x, %w, %g eps=1e-5")
                .writes(&[("dx", "%a"), ("dw", "%b")]),
        ];
    }
    vec![
        new("layer_norm").floats("bias", &[m.hidden]).gives(&shape, "layer_norm %x, %w, %bias eps=1e-5"),
        new("layer_norm_grad")
            .floats("g", &shape)
            .result("dx", m.float, &shape)
            .result("dw", m.float, &[m.hidden])
            .result("db", m.float, &[m.hidden])
            .line("%a, %b, %c = layer_norm_grad %x, %w, %g eps=1e-5")
            .writes(&[("dx", "%a"), ("dw", "%b"), ("db", "%c")]),
    ]
}

fn attention(m: &Model) -> Vec<Case> {
    let (batch, length, width) = (m.batch, m.length, m.hidden / m.heads);
    let whole = [batch, length, m.heads, width];
    let (one, divisor) = ([batch, 1, m.heads, width], [batch, m.heads, length]);
    let scale = 1.0 / (width as f64).sqrt();
    let new = |name: &str| Case::new(m, "attention", name, &whole);
    let operands = |case: Case| {
        let case = case.floats("q", &whole).floats("k", &whole).floats("v", &whole);
        case.operand("segment", "i32", &[batch, length], Fill::All(1))
    };
    let mut all = vec![
        operands(new("attention"))
            .result("out", m.float, &whole)
            .result("divisor", "f32", &divisor)
            .line(&format!("%o, %d = attention %q, %k, %v, %segment causal=true scale={scale:?} window=0"))
            .writes(&[("out", "%o"), ("divisor", "%d")]),
        operands(new("attention_grad"))
            .floats("out", &whole)
            .operand("divisor", "f32", &divisor, Fill::Positive)
            .floats("g", &whole)
            .result("dq", m.float, &whole)
            .result("dk", m.float, &whole)
            .result("dv", m.float, &whole)
            .line(&format!(
                "%a, %b, %c = attention_grad %q, %k, %v, %segment, %out, %divisor, %g causal=true scale={scale:?} window=0"
            ))
            .writes(&[("dq", "%a"), ("dk", "%b"), ("dv", "%c")]),
        Case::new(m, "decoding", "cached_attention", &whole)
            .floats("q", &one)
            .floats("k", &whole)
            .floats("v", &whole)
            .operand("segment", "i32", &[batch, length], Fill::All(1))
            .operand("place", "i32", &[], Fill::All(length as i32 - 1))
            .gives(&one, &format!("cached_attention %q, %k, %v, %segment, %place scale={scale:?} window=0")),
    ];
    if m.llama {
        all.push(
            new("rope")
                .floats("x", &whole)
                .operand("at", "i32", &[batch, length], Fill::Count(length))
                .operand("frequency", "f32", &[width / 2], Fill::Positive)
                .gives(&whole, "rope %x, %at, %frequency inverse=false"),
        );
    }
    all
}

fn vocabulary(m: &Model) -> Vec<Case> {
    let rows = m.batch * m.length;
    let (logits, table, hidden) = ([rows, m.vocab], [m.vocab, m.hidden], [rows, m.hidden]);
    let tokens = |case: Case| case.operand("tokens", "i32", &[rows], Fill::Below(m.vocab));
    vec![
        tokens(Case::new(m, "cross entropy", "token_logp", &logits).floats("x", &logits))
            .result("y", "f32", &[rows])
            .line("%y.1 = token_logp %x, %tokens")
            .writes(&[("y", "%y.1")]),
        // Over its operand, as in a step, where the logits are needed no more.
        tokens(Case::new(m, "cross entropy", "token_logp_grad", &logits).floats("x", &logits))
            .operand("g", "f32", &[rows], Fill::Positive)
            .line("%y.1 = token_logp_grad %x, %tokens, %g")
            .writes(&[("x", "%y.1")]),
        tokens(Case::new(m, "embedding", "embed", &[rows, m.vocab, m.hidden]).floats("table", &table))
            .gives(&hidden, "embed %table, %tokens"),
        tokens(Case::new(m, "embedding", "embed_grad", &[rows, m.vocab, m.hidden]).floats("g", &hidden))
            .gives(&table, &format!("embed_grad %tokens, %g rows={}", m.vocab)),
    ]
}

/// What reduces or only moves.
fn movement(m: &Model) -> Vec<Case> {
    let rows = m.batch * m.length;
    let scores = [m.batch * m.heads * m.length, m.length];
    let column = [scores[0], 1];
    let hidden = [rows, m.hidden];
    let (inner, weight) = ([rows, m.ffn], [m.ffn, m.hidden]);
    let (split, heads) =
        ([m.batch, m.length, m.heads, m.hidden / m.heads], [m.batch, m.heads, m.length, m.hidden / m.heads]);
    vec![
        Case::new(m, "reduction", "gradient of a bias", &inner)
            .floats("x", &inner)
            .gives(&[m.ffn], "reduce_sum %x axes=[0]"),
        Case::new(m, "reduction", "sum of squares", &weight)
            .floats("x", &weight)
            .line("%s = mul %x, %x")
            .gives(&[], "reduce_sum %s axes=[0, 1]"),
        Case::new(m, "reduction", "softmax of ops", &scores)
            .floats("x", &scores)
            .line("%m = reduce_max %x axes=[1]")
            .line(&format!("%m.1 = reshape %m shape={column:?}"))
            .line(&format!("%m.2 = broadcast %m.1 shape={scores:?}"))
            .line("%c = sub %x, %m.2")
            .line("%e = exp %c")
            .line("%s = reduce_sum %e axes=[1]")
            .line(&format!("%s.1 = reshape %s shape={column:?}"))
            .line(&format!("%s.2 = broadcast %s.1 shape={scores:?}"))
            .gives(&scores, "div %e, %s.2"),
        Case::new(m, "reduction", "norm of ops", &hidden)
            .floats("x", &hidden)
            .floats("w", &[m.hidden])
            .line("%s = mul %x, %x")
            .line("%s.1 = reduce_sum %s axes=[1]")
            .line(&format!("%n = const value={:?} dtype=f32", 1.0 / m.hidden as f64))
            .line(&format!("%n.1 = broadcast %n shape=[{rows}]"))
            .line("%mean = mul %s.1, %n.1")
            .line("%root = sqrt %mean")
            .line(&format!("%r.1 = reshape %root shape={:?}", [rows, 1]))
            .line(&format!("%r.2 = cast %r.1 dtype={}", m.float))
            .line(&format!("%r.3 = broadcast %r.2 shape={hidden:?}"))
            .line("%normed = div %x, %r.3")
            .line(&format!("%w.1 = broadcast %w shape={hidden:?}"))
            .gives(&hidden, "mul %normed, %w.1"),
        Case::new(m, "movement", "transpose", &weight)
            .floats("x", &weight)
            .gives(&[m.hidden, m.ffn], "transpose %x order=[1, 0]"),
        Case::new(m, "movement", "heads first", &split)
            .floats("x", &split)
            .gives(&heads, "transpose %x order=[0, 2, 1, 3]"),
        Case::new(m, "movement", "cast i32", &inner)
            .operand("x", "i32", &inner, Fill::Below(100))
            .gives(&inner, &format!("cast %x dtype={}", m.float)),
        Case::new(m, "movement", "cast bool", &inner)
            .operand("x", "bool", &inner, Fill::Mask)
            .gives(&inner, &format!("cast %x dtype={}", m.float)),
    ]
}

/// The optimizer on one parameter: always in f32.
fn adamw(m: &Model, name: &str, shape: &[usize]) -> Case {
    Case::new(m, "optimizer", name, shape)
        .operand("p", "f32", shape, Fill::Floats)
        .operand("g", "f32", shape, Fill::Floats)
        .operand("m", "f32", shape, Fill::Floats)
        .operand("v", "f32", shape, Fill::Positive)
        .operand("lr", "f32", &[], Fill::Positive)
        .operand("t", "i32", &[], Fill::All(10))
        .operand("factor", "f32", &[], Fill::Positive)
        .line("%a, %b, %c = adamw %p, %g, %m, %v, %lr, %t, %factor beta1=0.9 beta2=0.95 eps=1e-8 decay=0.1")
        .writes(&[("p", "%a"), ("m", "%b"), ("v", "%c")])
}
