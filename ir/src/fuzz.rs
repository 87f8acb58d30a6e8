//! Random programs for tests, made from the op table.
//!
//! [`random_program`] draws ops of all rows on values that fit, so every program verifies and runs without an error
//! for every value of its dims; [`random_inputs`] gives a graph something to run on. Equal seeds give equal programs.

use crate::body::Along;
use crate::diag::Span;
use crate::dim::{Bindings, Dim, Symbol};
use crate::graph::{DimRange, Graph, Loc, Phase, Reason, Site, StateId, Tag, Value};
use crate::infer::infer;
use crate::op::{Class, Op, ROWS, Row};
use crate::program::{Program, StateKind};
use crate::tensor::{Data, Tensor};
use crate::types::{DType, Type};

mod attention;
mod merged;
mod operands;
mod region;
mod training;

pub use training::random_training;

/// Elements of the largest value: enough for every structure, small enough for thousands of graphs a second.
const MOST_ELEMENTS: i64 = 512;

/// What norms add to a variance. Rows of equal numbers are frequent here, whose distances from their mean are nothing but
/// roundings; a small number would magnify them beyond all other values.
const EPS: f64 = 1.0;

/// Random numbers: splitmix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// A number of `low..=high`.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as usize) as i64
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A number of `[0, 1)` with all 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of the given things.
    pub fn choose<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// A program of up to three graphs with about `size` drawn ops each (operands may need more), over shared states.
///
/// Dims are `B` (the batch), `T`, and `N` with one value only. Every value that nothing uses is an output.
pub fn random_program(seed: u64, size: usize) -> Program {
    let mut rng = Rng::new(seed);
    let mut program = Program { sources: vec!["random.yaml".into()], ..Program::default() };
    for i in 0..rng.between(1, 4) {
        let dims: Vec<Dim> = (0..rng.below(3)).map(|_| Dim::from(rng.between(1, 4))).collect();
        let span = if rng.once_in(2) { Span { source: 0, line: 1 + i as u32, column: 3, len: 2 } } else { Span::NONE };
        let ty = Type::new(rng.choose(&[DType::F32, DType::F32, DType::F32, DType::I32, DType::Bool]), dims);
        let kind = if ty.dtype.is_float() && rng.once_in(2) {
            StateKind::Param { trained: rng.once_in(2) }
        } else {
            StateKind::State
        };
        program.declare(format!("model/layers.{i}.weight"), ty, kind, span);
    }
    draw_graphs(&mut rng, &mut program, size, 0);
    program
}

/// As [`random_program`], with four matrices that are parameters of `model` and stand in many products.
pub fn random_model(seed: u64, size: usize) -> Program {
    let mut rng = Rng::new(seed);
    let mut program = Program { sources: vec!["random.yaml".into()], ..Program::default() };
    for i in 0..4_usize {
        let ty = Type::new(DType::F32, [2 + i % 2, 2 + i / 2].map(Dim::from));
        let kind = StateKind::Param { trained: rng.once_in(2) };
        program.declare(format!("model/layers.{i}.weight"), ty, kind, Span::NONE);
    }
    draw_graphs(&mut rng, &mut program, size, 4);
    program
}

/// Up to three graphs, of whose ops one in `products` is a product with a parameter; none if that is 0.
fn draw_graphs(rng: &mut Rng, program: &mut Program, size: usize, products: usize) {
    for i in 0..rng.between(1, 3) {
        let graph = Draw::new(rng, program, &format!("g{i}"), 1).graph(size, products);
        program.graphs.push(graph);
    }
}

/// Values of a graph's dims, each in its range.
pub fn random_bindings(graph: &Graph, seed: u64) -> Bindings {
    let mut rng = Rng::new(seed);
    graph.dims.iter().map(|d| (d.symbol.clone(), rng.between(d.min, d.max))).collect()
}

/// Tensors for all inputs of a graph: doubles of `[-2, 2)`, integers 0 to 2 (segments, tokens), truth values, keys.
///
/// # Panics
/// If a dim of an input is not bound.
pub fn random_inputs(graph: &Graph, bindings: &Bindings, seed: u64) -> Vec<(String, Tensor)> {
    let mut rng = Rng::new(seed);
    let named = graph.inputs().map(|v| (graph.name_of(v).to_string(), random_tensor(graph.ty(v), bindings, &mut rng)));
    named.collect()
}

/// A tensor of a type, as [`random_inputs`] gives.
///
/// # Panics
/// If a dim is not bound.
pub fn random_tensor(ty: &Type, bindings: &Bindings, rng: &mut Rng) -> Tensor {
    let shape = ty.shape(bindings).unwrap_or_else(|s| panic!("`{s}` is not bound"));
    let n: usize = shape.iter().product();
    let data = match ty.dtype {
        DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => {
            Data::F64((0..n).map(|_| 4.0 * rng.unit() - 2.0).collect())
        }
        DType::I32 => Data::I32((0..n).map(|_| rng.below(3) as i32).collect()),
        DType::Bool => Data::Bool((0..n).map(|_| rng.once_in(2)).collect()),
        DType::Key => Data::Key((0..n).map(|_| [rng.bits() as u32, rng.bits() as u32]).collect()),
    };
    Tensor::new(&shape, data)
}

/// Whether an op says where things are, on several ranks or in two memories, as random programs do not.
pub fn is_of_layout(row: &Row) -> bool {
    row.class == Class::Collective || matches!(row.name, "shard" | "wait" | "to_host" | "from_host")
}

/// A graph that is being drawn.
struct Draw<'a> {
    rng: &'a mut Rng,
    program: &'a Program,
    graph: Graph,
    /// All combinations of values of the dims.
    bindings: Vec<Bindings>,
    /// Values that no further op takes.
    hidden: Vec<Value>,
}

impl<'a> Draw<'a> {
    /// A graph without ops, which takes at least so many rows.
    fn new(rng: &'a mut Rng, program: &'a Program, name: &str, least_rows: i64) -> Draw<'a> {
        let mut graph = Graph::new(name);
        for (symbol, min, max) in [("B", least_rows, 3), ("T", 2, 5), ("N", 3, 3)] {
            graph.dims.push(DimRange { symbol: symbol.into(), min, max });
        }
        graph.batch = Some(Symbol::from("B"));
        let mut bindings = vec![Bindings::new()];
        for d in &graph.dims {
            let with =
                |b: &Bindings, n| b.iter().map(|(s, v)| (s.clone(), *v)).chain([(d.symbol.clone(), n)]).collect();
            bindings = bindings.iter().flat_map(|b| (d.min..=d.max).map(move |n| with(b, n))).collect();
        }
        Draw { rng, program, graph, bindings, hidden: Vec::new() }
    }

    /// Inputs of every element type.
    fn inputs(&mut self) {
        let [b, t, n] = ["B", "T", "N"].map(Dim::symbol);
        // The first input shows all dims.
        let mut input = |name: &str, dtype, dims: &[&Dim]| {
            self.graph.input(name, Type::new(dtype, dims.iter().copied().cloned().collect::<Vec<_>>()))
        };
        input("x", DType::F32, &[&b, &t, &n]);
        input("tokens", DType::I32, &[&b, &t]);
        input("text.segment", DType::I32, &[&b, &t]);
        input("trained", DType::Bool, &[&b, &t]);
        input("row", DType::F32, &[&n]);
        input("key", DType::Key, &[]);
    }

    fn graph(mut self, size: usize, products: usize) -> Graph {
        self.inputs();
        // One rank has nobody to send anything to.
        let rows: Vec<&Row> = ROWS.iter().filter(|row| !is_of_layout(row)).collect();
        let mut row = self.rng.choose(&rows).name;
        while self.graph.len() < size {
            if products > 0 && self.rng.once_in(products) {
                self.product_with_param();
            }
            // Equal ops in a row meet rules that join them.
            if !self.rng.once_in(3) {
                row = self.rng.choose(&rows).name;
            }
            self.draw(row);
        }
        self.write_states();
        self.give_outputs();
        self.graph
    }

    /// Writes come after all reads. Old values of written states may be outputs.
    fn write_states(&mut self) {
        for (id, state) in self.program.state_ids() {
            if self.rng.once_in(2) {
                let value = self.value_of(&state.ty);
                self.push_with(Op::Write { state: id }, &[value], Some(&state.ty));
            }
        }
    }

    fn give_outputs(&mut self) {
        let mut used = vec![false; self.graph.values().len()];
        for (_, op) in self.graph.ops() {
            op.args.iter().for_each(|a| used[a.0 as usize] = true);
        }
        let free: Vec<Value> = self.graph.values().filter(|v| !used[v.0 as usize]).collect();
        for (i, v) in free.into_iter().enumerate() {
            self.graph.outputs.push((format!("out{i}"), v));
        }
    }

    // Ops.

    /// Draws an op of a row with operands that fit. Nothing happens where the result would be too large.
    fn draw(&mut self, row: &str) {
        match row {
            "const" => {
                let dtype = self.rng.choose(&[DType::F32, DType::I32, DType::Bool]);
                self.constant(dtype);
            }
            "size" => {
                let op = Op::Size { dim: self.dim(), dtype: self.rng.choose(&[DType::F32, DType::I32]) };
                self.push(op, &[]);
            }
            "iota" => {
                let len = self.dim();
                self.push(Op::Iota { len }, &[]);
            }
            "cast" => {
                let x = self.number_or_truth();
                let dtype = self.rng.choose(&[DType::F32, DType::F32, DType::I32, DType::Bool]);
                self.push(Op::Cast { dtype }, &[x]);
            }
            "broadcast" => {
                let x = self.value();
                let mut shape = self.ty(x).dims;
                for dim in shape.iter_mut().filter(|d| d.constant() == Some(1)) {
                    *dim = if self.rng.once_in(2) { self.dim() } else { dim.clone() };
                }
                let lead: Vec<Dim> = (0..self.rng.below(2)).map(|_| self.dim()).collect();
                self.push(Op::Broadcast { shape: [lead, shape].concat() }, &[x]);
            }
            "reshape" => {
                let x = self.value();
                let shape = self.regrouped(&self.ty(x).dims);
                self.push(Op::Reshape { shape }, &[x]);
            }
            "transpose" => {
                let x = self.value();
                let order = self.order(self.ty(x).rank());
                self.push(Op::Transpose { order }, &[x]);
            }
            "slice" => {
                let x = self.value();
                self.slice(x);
            }
            "pad" => {
                let x = self.value();
                if let Some(axis) = self.axis(x) {
                    let mut extent = || if self.rng.once_in(2) { Dim::default() } else { self.dim() };
                    let (before, after) = (extent(), extent());
                    self.push(Op::Pad { axis, before, after }, &[x]);
                }
            }
            "concat" => {
                let x = self.value();
                if let Some(axis) = self.axis(x) {
                    let mut ty = self.ty(x);
                    let mut args = vec![x];
                    for _ in 0..self.rng.below(3) {
                        ty.dims[axis] = self.dim();
                        args.push(self.value_of(&ty));
                    }
                    self.push(Op::Concat { axis }, &args);
                }
            }
            "stop" => {
                let x = self.value();
                self.push(Op::Stop {}, &[x]);
            }
            "dropout" => {
                // What is left out depends on the row.
                let rows = Dim::symbol("B");
                let x = self.find(|ty| ty.dtype == DType::F32 && ty.dims.first() == Some(&rows)).expect("`x` has rows");
                let stream = self.rng.bits();
                self.push(Op::Dropout { p: 0.5, role: "model".into(), stream }, &[x]);
            }
            "add" | "sub" | "mul" | "max" | "min" => {
                let a = self.number();
                let b = self.same_as(a);
                let args = if self.rng.once_in(2) { [a, b] } else { [b, a] };
                self.push(plain(row), &args);
            }
            "div" => {
                let a = self.number();
                let b = self.same_as(a);
                // Integers must not be divided by zero.
                let b = if self.ty(a).dtype == DType::I32 { self.at_least_one(b) } else { b };
                self.push(Op::Div {}, &[a, b]);
            }
            "pow" => {
                let a = self.any(DType::F32);
                let b = self.same_as(a);
                let a = self.tame(Op::Abs {}, a);
                self.push(Op::Pow {}, &[a, b]);
            }
            "neg" | "abs" => {
                let x = self.number();
                self.push(plain(row), &[x]);
            }
            "exp" => {
                let x = self.any(DType::F32);
                let x = self.tame(Op::Tanh {}, x);
                self.push(Op::Exp {}, &[x]);
            }
            "log" | "sqrt" => {
                let x = self.any(DType::F32);
                let mut x = self.tame(Op::Abs {}, x);
                // Near 0 their slope is so steep that the last digit of a difference becomes the first.
                if row == "log" {
                    let least = self.must(Op::Const { value: 0.1, dtype: DType::F32 }, &[]);
                    let least = self.must(Op::Broadcast { shape: self.ty(x).dims }, &[least]);
                    x = self.must(Op::Max {}, &[x, least]);
                }
                self.push(plain(row), &[x]);
            }
            "tanh" | "sigmoid" | "log_sigmoid" | "relu" | "gelu" | "gelu_tanh" | "silu" | "erf" => {
                let x = self.any(DType::F32);
                self.push(plain(row), &[x]);
            }
            "eq" | "ne" => {
                let a = self.number_or_truth();
                let b = self.same_as(a);
                self.push(plain(row), &[a, b]);
            }
            "lt" | "le" => {
                let a = self.number();
                let b = self.same_as(a);
                self.push(plain(row), &[a, b]);
            }
            "and" | "or" => {
                let a = self.any(DType::Bool);
                let b = self.same_as(a);
                self.push(plain(row), &[a, b]);
            }
            "not" => {
                let x = self.any(DType::Bool);
                self.push(Op::Not {}, &[x]);
            }
            "where" => {
                let a = self.value();
                let b = self.same_as(a);
                let condition = self.value_of(&self.ty(a).with(DType::Bool));
                self.push(Op::Where {}, &[condition, a, b]);
            }
            "fused" => self.fused(),
            "contract" => self.contract(),
            "contract_each" => self.contract_each(),
            "contract_fused" => self.contract_fused(),
            "sum_squares" => self.sum_squares(),
            "add_rows" => self.add_rows(),
            "reduce_sum" | "reduce_max" | "reduce_min" => {
                let x = self.number();
                let axes: Vec<usize> = (0..self.ty(x).rank()).filter(|_| self.rng.once_in(2)).collect();
                let kept: Vec<Dim> = (0..self.ty(x).rank())
                    .map(|i| if axes.contains(&i) { Dim::from(1i64) } else { self.ty(x).dims[i].clone() })
                    .collect();
                let op = match row {
                    "reduce_sum" => Op::ReduceSum { axes },
                    "reduce_max" => Op::ReduceMax { axes },
                    _ => Op::ReduceMin { axes },
                };
                let reduced = self.push(op, &[x]);
                // Often it goes back to what was reduced.
                if let ([reduced], true) = (&reduced[..], self.rng.once_in(2)) {
                    let mut value = *reduced;
                    if self.rng.once_in(2) {
                        let other = self.same_as(value);
                        value = self.must(Op::Max {}, &[value, other]);
                    }
                    value = self.must(Op::Reshape { shape: kept }, &[value]);
                    if self.rng.once_in(2) {
                        value = self.must(Op::Neg {}, &[value]);
                    }
                    value = self.must(Op::Broadcast { shape: self.ty(x).dims }, &[value]);
                    self.push(Op::Sub {}, &[x, value]);
                }
            }
            "cumsum" => {
                let x = self.number();
                if let Some(axis) = self.axis(x) {
                    let reverse = self.rng.once_in(2);
                    self.push(Op::Cumsum { axis, reverse }, &[x]);
                }
            }
            "recurrence" => {
                let x = self.any_with_dims(DType::F32);
                let x = self.tame(Op::Tanh {}, x);
                if let Some(axis) = self.axis(x) {
                    let (decay, reverse) = (self.rng.choose(&[0.0, 0.5, 0.95]), self.rng.once_in(2));
                    self.push(Op::Recurrence { axis, decay, reverse }, &[x]);
                }
            }
            "slice_at" | "write_at" => self.at_place(row == "write_at"),
            "embed" => {
                let rows = self.rng.between(1, 4);
                let table = Type::new(DType::F32, [Dim::from(rows), self.dim()]);
                let (table, indices) = (self.value_of(&table), self.any(DType::I32));
                let indices = self.below(indices, rows);
                self.push(Op::Embed {}, &[table, indices]);
            }
            "embed_grad" => {
                let rows = self.rng.between(1, 4);
                let grad = self.any_with_dims(DType::F32);
                let dims = self.ty(grad).dims;
                let indices = self.value_of(&Type::new(DType::I32, &dims[..dims.len() - 1]));
                let indices = self.below(indices, rows);
                self.push(Op::EmbedGrad { rows: Dim::from(rows) }, &[indices, grad]);
            }
            "layer_norm" | "layer_norm_grad" => {
                let x = self.any_with_dims(DType::F32);
                let row_ty = Type::new(DType::F32, &self.ty(x).dims[self.ty(x).rank() - 1..]);
                let weight = self.value_of(&row_ty);
                if row == "layer_norm" {
                    let bias = self.value_of(&row_ty);
                    self.push(Op::LayerNorm { eps: EPS }, &[x, weight, bias]);
                } else {
                    // Most of the gradient cancels: of large numbers only what was rounded is left.
                    let grad = self.same_as(x);
                    let [weight, grad] = [weight, grad].map(|value| self.must(Op::Tanh {}, &[value]));
                    self.push(Op::LayerNormGrad { eps: EPS }, &[x, weight, grad]);
                }
            }
            "rms_norm" | "rms_norm_grad" => {
                let x = self.any_with_dims(DType::F32);
                let weight = self.value_of(&Type::new(DType::F32, &self.ty(x).dims[self.ty(x).rank() - 1..]));
                if row == "rms_norm" {
                    self.push(Op::RmsNorm { eps: EPS }, &[x, weight]);
                } else {
                    let grad = self.same_as(x);
                    self.push(Op::RmsNormGrad { eps: EPS }, &[x, weight, grad]);
                }
            }
            "rope" => {
                let half = Dim::from(self.rng.between(1, 2));
                let lead = [self.dim(), self.dim()];
                let rest = [Dim::from(self.rng.between(1, 2)), &half + &half];
                let x = Type::new(DType::F32, [&lead[..], &rest[..]].concat());
                if self.fits(&x) {
                    let positions = Type::new(DType::I32, lead.to_vec());
                    let [x, positions, frequencies] =
                        [x, positions, Type::new(DType::F32, [half])].map(|ty| self.value_of(&ty));
                    // Settings, which have no gradient.
                    let args = [x, positions, self.must(Op::Stop {}, &[frequencies])];
                    let inverse = self.rng.once_in(2);
                    self.push(Op::Rope { inverse }, &args);
                }
            }
            "cached_attention" => self.cached_attention(),
            "sample" => {
                // Whole numbers: always finite, and equal on every device.
                let rows = Type::new(DType::I32, [self.dim()]);
                let scores = self.value_of(&Type::new(DType::I32, [rows.dims[0].clone(), Dim::from(3i64)]));
                let logits = self.must(Op::Cast { dtype: DType::F32 }, &[scores]);
                let args = [&Type::scalar(DType::Key), &rows, &Type::scalar(DType::I32)].map(|ty| self.value_of(ty));
                let temperature = self.rng.choose(&[0.0, 1.0]);
                let (top_k, top_p) = (self.rng.below(3), self.rng.choose(&[0.5, 1.0]));
                self.push(Op::Sample { temperature, top_k, top_p }, &[logits, args[0], args[1], args[2]]);
            }
            "attention" => self.attention(false),
            "attention_grad" => self.attention(true),
            "token_logp" | "token_logp_grad" => {
                let vocabulary = self.rng.between(1, 4);
                let lead = self.any(DType::I32);
                let tokens = self.below(lead, vocabulary);
                let lead = self.ty(tokens).dims;
                let logits = Type::new(DType::F32, [lead.clone(), vec![Dim::from(vocabulary)]].concat());
                let logits = self.value_of(&logits);
                if row == "token_logp" {
                    self.push(Op::TokenLogp {}, &[logits, tokens]);
                } else {
                    let grad = self.value_of(&Type::new(DType::F32, lead));
                    self.push(Op::TokenLogpGrad {}, &[logits, tokens, grad]);
                }
            }
            "head_logp" | "head_logp_grad" => self.head_logp(row == "head_logp_grad"),
            "position_in" => {
                let ty = Type::new(DType::I32, [self.dim(), self.dim()]);
                let segment = self.value_of(&ty);
                self.push(Op::PositionIn {}, &[segment]);
            }
            "fold" => {
                let key = self.any(DType::Key);
                let data = self.rng.bits() >> self.rng.below(64);
                self.push(Op::Fold { data }, &[key]);
            }
            "random_normal" | "random_uniform" => {
                let key = self.value_of(&Type::scalar(DType::Key));
                let shape = self.dims();
                let op = match row {
                    "random_normal" => Op::RandomNormal { shape, mean: 0.5, std: 2.0 },
                    _ => Op::RandomUniform { shape, low: -1.0, high: 1.0 },
                };
                self.push(op, &[key]);
            }
            "row_uniform" => {
                let key = self.value_of(&Type::scalar(DType::Key));
                let shape = [vec![self.dim()], self.dims()].concat();
                let rows = self.value_of(&Type::new(DType::I32, [shape[0].clone()]));
                self.push(Op::RowUniform { shape }, &[key, rows]);
            }
            "adamw" => self.adamw(),
            "read" => {
                let id = StateId(self.rng.below(self.program.states.len()) as u32);
                self.push_with(Op::Read { state: id }, &[], Some(&self.program.state(id).ty));
            }
            // Writes come after all reads.
            "write" => {}
            _ => panic!("the fuzzer does not know the op `{row}`"),
        }
    }

    fn slice(&mut self, x: Value) {
        let Some(axis) = self.axis(x) else { return };
        let dim = self.ty(x).dims[axis].clone();
        // One symbol's worth, or constants off both ends.
        let symbols = dim.symbols();
        let (start, end) = if !symbols.is_empty() && self.rng.once_in(3) {
            let part = Dim::symbol(&self.rng.choose(&symbols));
            if self.rng.once_in(2) { (part, dim.clone()) } else { (Dim::default(), part) }
        } else {
            (Dim::from(self.rng.between(0, 2)), &dim - &Dim::from(self.rng.between(0, 2)))
        };
        let fits = |b: &Bindings| {
            let [start, end, dim] = [&start, &end, &dim].map(|d| d.eval(b).unwrap_or(-1));
            0 <= start && start <= end && end <= dim
        };
        if self.bindings.iter().all(fits) {
            self.push(Op::Slice { axis, start, end }, &[x]);
        }
    }

    /// A region on an operand of its dims and others that stretch to them, with a reduction or not.
    fn fused(&mut self) {
        let x = self.number_or_truth();
        let shape = self.ty(x).dims;
        let mut args = vec![x];
        let rank = shape.len();
        let axes: Vec<usize> = match self.rng.below(rank + 1) {
            0 => vec![],
            n if self.rng.once_in(2) => (rank - n..rank).collect(),
            n => (0..n).collect(),
        };
        let reduction = Along::of(&axes, rank).map(|along| (along, axes.clone()));
        if !axes.is_empty() && self.rng.once_in(2) {
            let dim = |(i, dim): (usize, &Dim)| if axes.contains(&i) { Dim::from(1i64) } else { dim.clone() };
            let of_row = Type::new(DType::F32, shape.iter().enumerate().map(dim).collect::<Vec<_>>());
            args.push(self.value_of(&of_row));
        }
        for _ in 0..self.rng.below(3) {
            let kept = self.rng.below(shape.len() + 1);
            let dtype = self.rng.choose(&[DType::F32, DType::F32, DType::I32, DType::Bool]);
            let arg = self.value_of(&Type::new(dtype, &shape[kept..]));
            if !args.contains(&arg) {
                args.push(arg);
            }
        }
        let dtypes: Vec<DType> = args.iter().map(|&a| self.ty(a).dtype).collect();
        let body = region::random_body(self.rng, &dtypes, reduction);
        self.push(Op::Fused { shape, body }, &args);
    }

    fn contract(&mut self) {
        let x = self.any(DType::F32);
        let dims = self.ty(x).dims;
        let lhs: Vec<char> = ('a'..='z').take(dims.len()).collect();
        let (mut rhs, mut rhs_dims, mut out) = (Vec::new(), Vec::new(), Vec::new());
        for (&letter, dim) in lhs.iter().zip(dims) {
            let shared = self.rng.once_in(2);
            if shared {
                rhs.push(letter);
                rhs_dims.push(dim);
            }
            // What one operand has alone stays.
            if !shared || self.rng.once_in(2) {
                out.push(letter);
            }
        }
        for letter in ['y', 'z'].into_iter().take(self.rng.below(3)) {
            rhs.push(letter);
            rhs_dims.push(self.dim());
            out.push(letter);
        }
        let order = self.order(rhs.len());
        let rhs_dims: Vec<Dim> = order.iter().map(|&i| rhs_dims[i].clone()).collect();
        let rhs: String = order.iter().map(|&i| rhs[i]).collect();
        let out: String = self.order(out.len()).into_iter().map(|i| out[i]).collect();
        let y = self.value_of(&Type::new(DType::F32, rhs_dims));
        self.push(Op::Contract { spec: format!("{},{rhs}->{out}", String::from_iter(lhs)) }, &[x, y]);
    }

    /// A product over the first dim of a parameter, or over none where no value ends with such a dim.
    fn product_with_param(&mut self) {
        let state = StateId(self.rng.below(self.program.states.len()) as u32);
        let ty = self.program.state(state).ty.clone();
        let [weight] = self.push_with(Op::Read { state }, &[], Some(&ty))[..] else { return };
        let fits = |t: &Type| t.dtype == DType::F32 && t.rank() < 6 && t.dims.last() == Some(&ty.dims[0]);
        let found = self.find(fits).filter(|_| !self.rng.once_in(3));
        let x = found.unwrap_or_else(|| self.any_with_dims(DType::F32));
        let own: String = ('a'..='w').take(self.ty(x).rank()).collect();
        let spec = match own.char_indices().next_back() {
            Some((at, last)) if found.is_some() => format!("{own},{last}z->{}z", &own[..at]),
            _ => format!("{own},yz->{own}yz"),
        };
        self.push(Op::Contract { spec }, &[x, weight]);
    }

    /// A part at a place that fits whatever the dims are, and the part written elsewhere.
    fn at_place(&mut self, write: bool) {
        let x = self.value();
        let Some(axis) = self.axis(x) else { return };
        let dim = self.ty(x).dims[axis].clone();
        let least = self.bindings.iter().map(|b| dim.eval(b).unwrap_or(0)).min().unwrap_or(0);
        if least < 1 {
            return;
        }
        let len = self.rng.between(1, least);
        let mut place = || {
            let place = self.value_of(&Type::scalar(DType::I32));
            self.below(place, least - len + 1)
        };
        let (from, to) = (place(), place());
        let part = self.push(Op::SliceAt { axis, len: Dim::from(len) }, &[x, from]);
        if let ([part], true) = (&part[..], write) {
            self.push(Op::WriteAt { axis }, &[x, *part, to]);
        }
    }

    fn ty(&self, value: Value) -> Type {
        self.graph.ty(value).clone()
    }

    fn fits(&self, ty: &Type) -> bool {
        let len = ty.len();
        let within = |b: &Bindings| len.eval(b).is_ok_and(|n| (0..=MOST_ELEMENTS).contains(&n));
        self.bindings.iter().all(within) && ty.rank() <= 5
    }

    fn push(&mut self, op: Op, args: &[Value]) -> Vec<Value> {
        let types: Vec<Type> = args.iter().map(|&a| self.ty(a)).collect();
        let results = infer(&op, &types, None).unwrap_or_else(|why| panic!("the fuzzer drew `{op}` that fails: {why}"));
        if !results.iter().all(|ty| self.fits(ty)) {
            return vec![];
        }
        self.push_with(op, args, None)
    }

    /// One result of any size.
    fn must(&mut self, op: Op, args: &[Value]) -> Value {
        self.push_with(op, args, None)[0]
    }

    fn push_with(&mut self, op: Op, args: &[Value], state: Option<&Type>) -> Vec<Value> {
        let site = self.site();
        let shown = op.to_string();
        let id = self.graph.try_push(op, args, state, site);
        let id = id.unwrap_or_else(|why| panic!("the fuzzer drew `{shown}` that fails: {why}"));
        let results: Vec<Value> = self.graph.op(id).results().collect();
        for &value in &results {
            if self.rng.once_in(4) {
                // Names need not be unique, and may look like the numbers that others are printed with.
                let name = self.rng.choose(&["hidden", "logits", "fc1.weight", "x", "9", "x.8"]);
                self.graph.set_name(value, name);
            }
        }
        results
    }

    fn site(&mut self) -> Site {
        let tag = Tag { block: "model.decoder.layers".into(), instance: self.rng.below(2) as u32 };
        let span = Span { source: 0, line: self.rng.below(9) as u32, column: 1 + self.rng.below(9) as u32, len: 1 };
        let reason = self.rng.choose(&[Reason::Written, Reason::Grad, Reason::Update, Reason::Fused]);
        // A reason is of a place; without one there is none.
        let loc = if span.is_some() { Loc { span, reason } } else { Loc::default() };
        Site {
            phase: if self.rng.once_in(4) { self.rng.choose(&Phase::ALL) } else { Phase::Forward },
            loc,
            tag: if self.rng.once_in(4) { Some(tag) } else { None },
        }
    }
}

/// A row without attributes.
fn plain(name: &str) -> Op {
    Op::from_text(name, &[])
        .unwrap_or_else(|why| panic!("the fuzzer takes `{name}` for an op without attributes: {why}"))
}
