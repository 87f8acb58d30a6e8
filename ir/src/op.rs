//! The op table: one row per op.
//!
//! Names, attributes, arity and documentation live here and nowhere else; printer, parser, verifier, cost report and
//! fuzzer read the table. Result types are in [`mod@crate::infer`], one arm per op. Meaning is given by the
//! interpreter, gradients by the pass `autodiff`.

use std::fmt::Display;

use crate::body::{Body, ProductPart, product_parts};
use crate::dim::Dim;
use crate::graph::StateId;
use crate::mesh::Axis;
use crate::types::{DType, DimList};

/// What kind of work an op is; kernels, planner and reports group by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// One result element from the elements of the operands at the same place.
    Elementwise,
    /// Moves elements without arithmetic.
    Structure,
    /// The operand's bytes under another type; costs nothing.
    View,
    /// Sums of products.
    Contraction,
    /// Fewer elements out than in.
    Reduction,
    /// Kept whole because kernel and gradient are better whole.
    Composite,
    /// A region of elementwise ops, around a reduction or not, in one kernel.
    Fused,
    /// Draws random numbers from a key.
    Random,
    /// The optimizer.
    Update,
    /// Reads or writes state.
    State,
    /// Ranks send each other something; all ranks of a group run the same ones in the same order.
    Collective,
}

/// How many operands an op takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Exactly this many.
    Exactly(usize),
    /// This many, and one more that may be left out.
    Optional(usize),
    /// At least one.
    Many,
}

/// A row of the table, for everything that must know all ops.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Name in the text form and in YAML.
    pub name: &'static str,
    /// Kind of work.
    pub class: Class,
    /// Number of operands.
    pub arity: Arity,
    /// Names of the attributes in printed order.
    pub attributes: &'static [&'static str],
    /// The op's documentation.
    pub doc: &'static str,
}

/// Attributes of an op as text: `axis=1 start=0`.
pub type AttributeText = Vec<(&'static str, String)>;

/// A value that can stand as an attribute in the text form.
pub trait Attribute: Sized {
    /// Writes it.
    fn show(&self) -> String;
    /// Reads what [`Attribute::show`] wrote, or says what is wrong.
    fn read(text: &str) -> Result<Self, String>;
}

macro_rules! attribute_from_str {
    ($($t:ty),*) => { $(
        impl Attribute for $t {
            fn show(&self) -> String { self.to_string() }
            fn read(text: &str) -> Result<Self, String> {
                text.parse().map_err(|_| format!("`{text}` is no {}", stringify!($t)))
            }
        }
    )* };
}
attribute_from_str!(usize, u64, bool, String);

impl Attribute for f64 {
    fn show(&self) -> String {
        // `{:?}` prints the shortest text that reads back to the same number.
        format!("{self:?}")
    }
    fn read(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is no number"))
    }
}

impl Attribute for DType {
    fn show(&self) -> String {
        self.to_string()
    }
    fn read(text: &str) -> Result<Self, String> {
        DType::try_from(text.to_string())
    }
}

impl Attribute for Dim {
    fn show(&self) -> String {
        self.to_string()
    }
    fn read(text: &str) -> Result<Self, String> {
        Dim::parse(text)
    }
}

impl Attribute for Axis {
    fn show(&self) -> String {
        self.to_string()
    }
    fn read(text: &str) -> Result<Self, String> {
        let found = Axis::ALL.into_iter().find(|axis| axis.name() == text);
        found.ok_or_else(|| format!("`{text}` is no axis of a mesh"))
    }
}

fn list_items(text: &str) -> Result<Vec<&str>, String> {
    let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).ok_or(format!("`{text}` is no list"))?;
    Ok(inner.split(',').map(str::trim).filter(|t| !t.is_empty()).collect())
}

impl Attribute for Vec<Dim> {
    fn show(&self) -> String {
        DimList(self).to_string()
    }
    fn read(text: &str) -> Result<Self, String> {
        list_items(text)?.into_iter().map(Dim::parse).collect()
    }
}

impl Attribute for Vec<usize> {
    fn show(&self) -> String {
        format!("{self:?}")
    }
    fn read(text: &str) -> Result<Self, String> {
        list_items(text)?.into_iter().map(usize::read).collect()
    }
}

impl Attribute for StateId {
    fn show(&self) -> String {
        self.0.to_string()
    }
    fn read(text: &str) -> Result<Self, String> {
        text.parse().map(StateId).map_err(|_| format!("`{text}` is no state"))
    }
}

impl Attribute for Body {
    fn show(&self) -> String {
        self.to_string()
    }
    fn read(text: &str) -> Result<Self, String> {
        Body::parse(text)
    }
}

impl Attribute for Vec<Body> {
    fn show(&self) -> String {
        format!("[{}]", self.iter().map(Body::show).collect::<Vec<_>>().join(", "))
    }
    fn read(text: &str) -> Result<Self, String> {
        let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).ok_or(format!("`{text}` is no list"))?;
        inner.split_inclusive('}').map(|body| Body::parse(body.trim_start_matches([',', ' ']))).collect()
    }
}

macro_rules! ops {
    ($( $(#[doc = $doc:literal])+ $variant:ident $text:literal $class:ident $arity:tt
        { $( $(#[doc = $attr_doc:literal])* $attr:ident: $ty:ty ),* } )+) => {
        /// An op with its attributes. Operands stand in [`crate::OpData`].
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op {
            $( $(#[doc = $doc])+ $variant { $( $(#[doc = $attr_doc])* $attr: $ty ),* }, )+
        }

        /// All rows, in the order of the table.
        pub const ROWS: &[Row] = &[
            $( Row {
                name: $text,
                class: Class::$class,
                arity: ops!(@arity $arity),
                attributes: &[$(stringify!($attr)),*],
                doc: concat!($($doc, "\n"),+),
            }, )+
        ];

        impl Op {
            /// The op's place in [`ROWS`].
            fn index(&self) -> usize {
                let mut at = 0;
                $( if let Op::$variant { .. } = self { return at; } at += 1; )+
                unreachable!("the table has {at} rows and none is this op")
            }

            /// The attributes as text, in printed order.
            pub fn attributes(&self) -> AttributeText {
                match self {
                    $( Op::$variant { $($attr),* } => vec![$( (stringify!($attr), $attr.show()) ),*], )+
                }
            }

            /// An op from its name and attributes as text.
            pub fn from_text(name: &str, attributes: &[(String, String)]) -> Result<Op, String> {
                let known: &[&str] = ROWS.iter().find(|r| r.name == name).map_or(&[], |r| r.attributes);
                if let Some((odd, _)) = attributes.iter().find(|(k, _)| !known.contains(&k.as_str())) {
                    return Err(format!("`{name}` has no attribute `{odd}`"));
                }
                if let Some(i) = (1..attributes.len()).find(|&i| attributes[..i].iter().any(|a| a.0 == attributes[i].0)) {
                    return Err(format!("`{name}` has its attribute `{}` twice", attributes[i].0));
                }
                #[allow(unused)]
                let find = |key: &str| {
                    attributes.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
                        .ok_or_else(|| format!("`{name}` misses its attribute `{key}`"))
                };
                match name {
                    $( $text => Ok(Op::$variant { $( $attr: <$ty as Attribute>::read(find(stringify!($attr))?)? ),* }), )+
                    _ => Err(match crate::diag::nearest(name, ROWS.iter().map(|r| r.name)) {
                        Some(near) => format!("no op is called `{name}`; the nearest is `{near}`"),
                        None => format!("no op is called `{name}`"),
                    }),
                }
            }
        }
    };
    (@arity many) => { Arity::Many };
    (@arity [$n:literal]) => { Arity::Optional($n) };
    (@arity $n:literal) => { Arity::Exactly($n) };
}

ops! {
    // Scalars and sequences.
    /// A scalar constant.
    Const "const" Structure 0 { /// Its value; not 0 is true.
        value: f64, /// Its type.
        dtype: DType }
    /// The value of a dim at launch, as a scalar.
    Size "size" Structure 0 { /// The dim.
        dim: Dim, /// `i32` or `f32`.
        dtype: DType }
    /// `0, 1, 2, ...` in one dimension.
    Iota "iota" Structure 0 { /// How many.
        len: Dim }

    // Structure.
    /// Numbers to another type: floats to integers by truncation, anything to `bool` by `!= 0`.
    Cast "cast" Elementwise 1 { /// The new type.
        dtype: DType }
    /// Stretches dims that are 1 and adds leading ones, aligned from the right.
    Broadcast "broadcast" Structure 1 { /// The result's dims.
        shape: Vec<Dim> }
    /// The same elements in the same order under other dims.
    Reshape "reshape" View 1 { /// The result's dims.
        shape: Vec<Dim> }
    /// Reorders dims: result dim `i` is operand dim `order[i]`.
    Transpose "transpose" Structure 1 { /// A permutation.
        order: Vec<usize> }
    /// The part from `start` to before `end` along one dim.
    Slice "slice" Structure 1 { /// The dim.
        axis: usize, /// First place.
        start: Dim, /// Place after the last.
        end: Dim }
    /// Puts zeros (false) around one dim.
    Pad "pad" Structure 1 { /// The dim.
        axis: usize, /// How many before.
        before: Dim, /// How many after.
        after: Dim }
    /// The operand, in the host's memory: only [`Op::FromHost`] takes it. Made by the pass `offload_activations`.
    ToHost "to_host" Structure 1 {}
    /// What lies in the host's memory, on the device.
    FromHost "from_host" Structure 1 {}
    /// Operands one after the other along one dim.
    Concat "concat" Structure many { /// The dim.
        axis: usize }
    /// The `len` places along one dim from a place that is known when it runs: operands x, place `i32[]`.
    SliceAt "slice_at" Structure 2 { /// The dim.
        axis: usize, /// How many places.
        len: Dim }
    /// An operand with some of its places along one dim replaced: operands x, what replaces them, first place `i32[]`.
    WriteAt "write_at" Structure 3 { /// The dim.
        axis: usize }
    /// The operand; no gradient flows through.
    Stop "stop" View 1 { }
    /// The operand; where an update trains the role, its elements are 0 with the probability `p`, and divided by `1 - p`
    /// otherwise (Srivastava et al. 2014). The pass `autodiff` writes that out.
    Dropout "dropout" View 1 { /// The probability.
        p: f64, /// The role that computes this.
        role: String, /// What tells its numbers from those of other dropouts in the graph.
        stream: u64 }

    // Elementwise arithmetic.
    /// `a + b`.
    Add "add" Elementwise 2 { }
    /// `a - b`.
    Sub "sub" Elementwise 2 { }
    /// `a * b`.
    Mul "mul" Elementwise 2 { }
    /// `a / b`; integers truncate.
    Div "div" Elementwise 2 { }
    /// The larger.
    Max "max" Elementwise 2 { }
    /// The smaller.
    Min "min" Elementwise 2 { }
    /// `a` to the power of `b`.
    Pow "pow" Elementwise 2 { }
    /// `-x`.
    Neg "neg" Elementwise 1 { }
    /// Absolute value.
    Abs "abs" Elementwise 1 { }
    /// `e` to the power of `x`.
    Exp "exp" Elementwise 1 { }
    /// Natural logarithm.
    Log "log" Elementwise 1 { }
    /// Square root.
    Sqrt "sqrt" Elementwise 1 { }
    /// Hyperbolic tangent.
    Tanh "tanh" Elementwise 1 { }
    /// `1 / (1 + exp(-x))`.
    Sigmoid "sigmoid" Elementwise 1 { }
    /// `log(sigmoid(x))`, finite for every finite `x`.
    LogSigmoid "log_sigmoid" Elementwise 1 { }
    /// `max(x, 0)`.
    Relu "relu" Elementwise 1 { }
    /// `x * Phi(x)` with the normal distribution function (Hendrycks and Gimpel 2016), by `erf`.
    Gelu "gelu" Elementwise 1 { }
    /// GELU by the tanh formula of the same paper: `x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`.
    GeluTanh "gelu_tanh" Elementwise 1 { }
    /// `x * sigmoid(x)`.
    Silu "silu" Elementwise 1 { }
    /// Gauss's error function.
    Erf "erf" Elementwise 1 { }

    // Elementwise comparison and choice.
    /// `a == b`.
    Eq "eq" Elementwise 2 { }
    /// `a != b`.
    Ne "ne" Elementwise 2 { }
    /// `a < b`.
    Lt "lt" Elementwise 2 { }
    /// `a <= b`.
    Le "le" Elementwise 2 { }
    /// Both.
    And "and" Elementwise 2 { }
    /// Either.
    Or "or" Elementwise 2 { }
    /// The opposite.
    Not "not" Elementwise 1 { }
    /// `a` where the condition holds, else `b`: operands condition, a, b.
    Where "where" Elementwise 3 { }

    // Regions, made by the pass `fuse`.
    /// A region of elementwise ops around at most one reduction: operands are stretched to the region's dims as by
    /// [`Op::Broadcast`], and the body is computed for every element; what is of the row ([`crate::body`]), for every row. Each
    /// step rounds to its type, so values are those of the ops apart.
    Fused "fused" Fused many { /// Dims of the region, and of all results that are for every element.
        shape: Vec<Dim>, /// What is computed for one element.
        body: Body }

    // Contraction and reduction.
    /// A sum of products in einsum letters, e.g. `btd,vd->btv`. Of narrow floats it is taken in f32, and rounded to their
    /// type unless the labels end with `:f32`. An operand may be weights that are kept in fewer bits than the other one has;
    /// they are made numbers of its type first ([`crate::infer::product_type`]).
    Contract "contract" Contraction 2 { /// Labels of both operands and the result.
        spec: String }
    /// Several [`Op::Contract`] with one operand in common: operands that one, then the others; a result for each of those.
    /// Made by the pass `merge`.
    ContractEach "contract_each" Contraction many { /// Labels of both operands and the result, of every one.
        spec: String, /// Which operand they have in common: 0 the first, 1 the second.
        common: usize }
    /// [`Op::ContractEach`], of one product or several, each finished by a body before it is stored: operands the one in
    /// common, the others, and per body its operands but the first, which is the product. They are stretched to the
    /// product's dims. Results of all bodies, one after the other. Made by the pass `fuse`.
    ContractFused "contract_fused" Contraction many { /// Labels of both operands and the product, of every one.
        spec: String, /// Which operand they have in common: 0 the first, 1 the second.
        common: usize, /// What is computed for one element of each product.
        bodies: Vec<Body> }
    /// Sum over dims, which go away; that of narrow floats is f32.
    ReduceSum "reduce_sum" Reduction 1 { /// The dims, ascending.
        axes: Vec<usize> }
    /// Largest element over dims, which go away.
    ReduceMax "reduce_max" Reduction 1 { /// The dims, ascending.
        axes: Vec<usize> }
    /// Smallest element over dims, which go away.
    ReduceMin "reduce_min" Reduction 1 { /// The dims, ascending.
        axes: Vec<usize> }
    /// The squares of all elements of an operand summed, and these sums of all operands added from the first to the last.
    /// Made by the pass `merge`.
    SumSquares "sum_squares" Reduction many { }
    /// Running sum along a dim; from the end if `reverse`.
    Cumsum "cumsum" Composite 1 { /// The dim.
        axis: usize, /// Whether it runs from the end.
        reverse: bool }
    /// `y[t] = x[t] + decay * y[t - 1]` along a dim; from the end if `reverse`. Generalised advantages are one.
    Recurrence "recurrence" Composite 1 { /// The dim.
        axis: usize, /// Factor on the result before.
        decay: f64, /// Whether it runs from the end.
        reverse: bool }

    // Composites.
    /// Rows of a table: operands table `[V, D]` and indices `i32[..]`; result `[.., D]`.
    Embed "embed" Composite 2 { }
    /// Gradient of [`Op::Embed`] for the table: operands indices `[..]` and result gradient `[.., D]`; f32, as sums are.
    EmbedGrad "embed_grad" Composite 2 { /// Rows of the table.
        rows: Dim }
    /// `x + embed_grad(indices, gradient)`: operands x `[V, D]`, indices `i32[..]`, gradient `[.., D]`. A device may leave
    /// rows that no index names as they are, so that a -0 stays one. Made by the pass `merge`.
    AddRows "add_rows" Composite 3 { }
    /// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dim: operands x, weight, bias.
    LayerNorm "layer_norm" Composite 3 { /// Added to the variance.
        eps: f64 }
    /// Gradients of [`Op::LayerNorm`] for x, weight, bias: operands x, weight, result gradient.
    LayerNormGrad "layer_norm_grad" Composite 3 { /// Added to the variance.
        eps: f64 }
    /// `x / sqrt(mean(x^2) + eps) * weight` over the last dim: operands x, weight (Zhang and Sennrich 2019).
    RmsNorm "rms_norm" Composite 2 { /// Added to the mean square.
        eps: f64 }
    /// Gradients of [`Op::RmsNorm`] for x and weight: operands x, weight, result gradient.
    RmsNormGrad "rms_norm_grad" Composite 3 { /// Added to the mean square.
        eps: f64 }
    /// Rotary positions (Su et al. 2021) in Hugging Face's order: operands x `[B, T, H, D]`, positions `i32[B, T]`,
    /// frequencies `f32[D/2]`. The pair `(x[i], x[i + D/2])` turns by the angle `position * freq[i]`.
    Rope "rope" Composite 3 { /// Turns back: the gradient.
        inverse: bool }
    /// `softmax(scale * q k^T) v`: operands q `[B, T, H, D]`, k and v `[B, T, K, D]` with `H` a multiple of `K`
    /// (grouped queries), segment `i32[B, T]`, and slopes `f32[H]` or nothing. A query sees keys of its own segment, not
    /// after itself if `causal`, and less than `window` places away unless that is 0. Segment 0 is padding: nobody sees
    /// it, and it sees all text, as in Hugging Face's models, whose scores on padding some losses read. Texts may have
    /// branches ([`crate::segment`]). A query that sees nothing gives 0. With slopes, a head's score is less by its slope times the places between query and key (ALiBi,
    /// Press et al. 2022). Results: `[B, T, H, D]`, and the log of the softmax's divisor `f32[B, H, T]` for the gradient.
    Attention "attention" Composite [4] { /// Whether later keys are hidden.
        causal: bool, /// Factor on the scores.
        scale: f64, /// Keys from this distance on are hidden; 0 for none.
        window: usize }
    /// Gradients of [`Op::Attention`] for q, k, v: operands q, k, v, segment, both results, result gradient, and slopes
    /// where the forward op has them.
    AttentionGrad "attention_grad" Composite [7] { /// As in the forward op.
        causal: bool, /// As in the forward op.
        scale: f64, /// As in the forward op.
        window: usize }
    /// [`Op::Attention`], causal, of new columns over all columns so far: operands q `[B, Q, H, D]`, k and v
    /// `[B, C, K, D]`, segment `i32[B, C]`, place `i32[]`, and slopes `f32[H]` or nothing. Query `i` stands at column
    /// `place + i`; columns after it are not read. Result `[B, Q, H, D]`.
    CachedAttention "cached_attention" Composite [5] { /// Factor on the scores.
        scale: f64, /// Keys from this distance on are hidden; 0 for none.
        window: usize }
    /// Log-probability `f32[..]` of a token: operands logits `[.., V]` and tokens `i32[..]`; the softmax is never stored.
    TokenLogp "token_logp" Composite 2 { }
    /// Gradient of [`Op::TokenLogp`] for the logits: operands logits, tokens, result gradient.
    TokenLogpGrad "token_logp_grad" Composite 3 { }
    /// [`Op::TokenLogp`] of a linear head: operands x `[.., D]`, head `[V, D]`, tokens `i32[..]`; its logits are `x head^T`,
    /// and never stored whole. Made by the pass `merge`.
    HeadLogp "head_logp" Composite 3 { }
    /// [`Op::HeadLogp`] with gradients, where the result's is known beforehand: operands x, head, tokens, result gradient
    /// `[..]`. Results: log-probabilities, gradients of x and, if wanted, of the head. Made by the pass `merge`.
    HeadLogpGrad "head_logp_grad" Composite 4 { /// Whether the head's gradient is wanted.
        head: bool }
    /// Place of each token inside its text: operand segment `i32[B, T]`; counts from 0 in every segment of a row, and
    /// goes on from the beginning of a text in each of its branches ([`crate::segment`]). On padding it is the column.
    PositionIn "position_in" Composite 1 { }

    // Random.
    /// Another key from a key and a number.
    Fold "fold" Random 1 { /// The number.
        data: u64 }
    /// Normally distributed numbers; an element depends on the key and its coordinates only.
    RandomNormal "random_normal" Random 1 { /// Dims of the result.
        shape: Vec<Dim>, /// Mean.
        mean: f64, /// Standard deviation.
        std: f64 }
    /// Evenly distributed numbers in `[low, high)`; an element depends on the key and its coordinates only.
    RandomUniform "random_uniform" Random 1 { /// Dims of the result.
        shape: Vec<Dim>, /// Smallest.
        low: f64, /// Bound never reached.
        high: f64 }
    /// Evenly distributed numbers in `[0, 1)` for rows that have numbers: operands key and `i32[R]`; result `[R, ..]`. An
    /// element depends on the key, its row's number and its other coordinates only, so it is the same in any batch.
    RowUniform "row_uniform" Random 2 { /// Dims of the result.
        shape: Vec<Dim> }
    /// A token per row by its probability: operands logits `[B, V]`, key, row `i32[B]`, place `i32[]`; result `i32[B]`.
    /// The number drawn depends on key, row and place only, so it is the same in any batch.
    Sample "sample" Random 4 { /// Divides the logits; 0 takes the most likely token, of equal ones the first.
        temperature: f64, /// Only this many most likely tokens; 0 for all.
        top_k: usize, /// Only the most likely tokens that together have this probability; 1 for all.
        top_p: f64 }

    // Optimizer.
    /// AdamW with bias correction, of one or more parameters: operands parameter, gradient, both moments for each of them,
    /// then learning rate `f32[]`, step from 1 `i32[]`, factor on the gradient `f32[]` (clipping). Results: parameter, both
    /// moments for each. `p - lr * (m_hat / (sqrt(v_hat) + eps) + decay * p)`, Loshchilov and Hutter 2019.
    Adamw "adamw" Update many { /// Decay rate of the first moment.
        beta1: f64, /// Decay rate of the second moment.
        beta2: f64, /// Added to the root of the second moment.
        eps: f64, /// Decoupled weight decay.
        decay: f64 }

    // Ranks. Made by the pass `partition`. Places are numbered along the axis as in [`crate::mesh`].
    /// The sum of the operands of all ranks along an axis of the mesh, on each of them; that of narrow floats is taken in f32.
    AllReduce "all_reduce" Collective many { /// The axis of the mesh.
        over: Axis }
    /// Of each operand, the parts of all ranks along an axis of the mesh one after the other, and of that the first places.
    AllGather "all_gather" Collective many { /// The axis of the mesh.
        over: Axis, /// The dim.
        axis: usize, /// How many places, of each operand.
        lens: Vec<usize> }
    /// Of each operand, a rank's part of the sum over all ranks along an axis of the mesh; parts as in [`crate::mesh::Cut`].
    ReduceScatter "reduce_scatter" Collective many { /// The axis of the mesh.
        over: Axis, /// The dim.
        axis: usize, /// Ranks along the axis of the mesh.
        ranks: usize }
    /// What a collective gives, when it has come: the first operand, which nothing else uses. The others are what the
    /// collective needs until then. A collective that is waited for runs beside the ops in between, where the device can.
    /// Made by the pass `prefetch`.
    Wait "wait" View many {}
    /// A rank's part of the operand, which all ranks along an axis of the mesh have; parts as in [`crate::mesh::Cut`].
    Shard "shard" Structure 1 { /// The axis of the mesh.
        over: Axis, /// The dim.
        axis: usize, /// Ranks along the axis of the mesh.
        ranks: usize }

    // State.
    /// The value of a parameter or state when the graph began.
    Read "read" State 0 { /// Which.
        state: StateId }
    /// Makes the operand the value of a parameter or state when the graph ends; at most one per graph and state.
    Write "write" State 1 { /// Which.
        state: StateId }
}

impl Op {
    /// The op's row.
    pub fn row(&self) -> &'static Row {
        &ROWS[self.index()]
    }

    /// Name in the text form.
    pub fn name(&self) -> &'static str {
        self.row().name
    }

    /// Kind of work.
    pub fn class(&self) -> Class {
        self.row().class
    }

    /// The dims among the attributes.
    pub fn dims(&self) -> Vec<&Dim> {
        match self {
            Op::Size { dim: d, .. } | Op::Iota { len: d } | Op::EmbedGrad { rows: d } | Op::SliceAt { len: d, .. } => {
                vec![d]
            }
            Op::Broadcast { shape }
            | Op::Reshape { shape }
            | Op::Fused { shape, .. }
            | Op::RandomNormal { shape, .. }
            | Op::RandomUniform { shape, .. }
            | Op::RowUniform { shape } => shape.iter().collect(),
            Op::Slice { start: a, end: b, .. } | Op::Pad { before: a, after: b, .. } => vec![a, b],
            // All others have none.
            _ => vec![],
        }
    }

    /// Pairs of a result and an operand that may share a buffer if the operand dies here and both have as many elements
    /// of one size.
    /// Every device's kernel must allow it: an element is written after the last read of the operand's element there.
    pub fn in_place(&self, operands: usize) -> Vec<(usize, usize)> {
        match self {
            Op::TokenLogpGrad {} => vec![(0, 0)],
            Op::Adamw { .. } => (0..operands / 4)
                .flat_map(|i| [0, 2, 3].into_iter().enumerate().map(move |(r, a)| (3 * i + r, 4 * i + a)))
                .collect(),
            Op::Cast { .. } | Op::WriteAt { .. } | Op::Rope { .. } | Op::AddRows {} => vec![(0, 0)],
            Op::AllReduce { .. } => (0..operands).map(|i| (i, i)).collect(),
            Op::Fused { body, .. } => {
                (0..body.results().len()).flat_map(|result| (0..operands).map(move |arg| (result, arg))).collect()
            }
            Op::ContractFused { bodies, .. } => {
                let pairs = |part: ProductPart| {
                    part.results.flat_map(move |result| part.operands.clone().map(move |arg| (result, arg)))
                };
                product_parts(bodies).into_iter().flat_map(pairs).collect()
            }
            _ if self.class() == Class::Elementwise => (0..operands).map(|arg| (0, arg)).collect(),
            _ => vec![],
        }
    }
}

impl Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.name())?;
        for (key, value) in self.attributes() {
            write!(f, " {key}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_used_once() {
        for (i, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..i].iter().all(|r| r.name != row.name), "{} twice", row.name);
        }
    }

    #[test]
    fn attributes_read_back() {
        let op = Op::Slice { axis: 1, start: Dim::from(0i64), end: Dim::parse("T-1").unwrap() };
        let text: Vec<(String, String)> = op.attributes().into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        assert_eq!(Op::from_text("slice", &text), Ok(op));
        assert_eq!(Op::from_text("slcie", &[]), Err("no op is called `slcie`; the nearest is `slice`".into()));
    }
}
