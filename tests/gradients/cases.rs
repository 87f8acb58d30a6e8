//! The cases: every op that gradients flow through, alone or with what gives it operands of symbolic dims.

/// Where the numbers of a case's parameters lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// On both sides of 0.
    Any,
    /// Above 0.
    Positive,
}
use Domain::{Any, Positive};

/// A graph whose last value is `%y`. Params are float operands; inputs the rest, `B` is 2 and `T` is 3.
pub struct Case {
    /// The op that is shown.
    pub op: &'static str,
    /// `name: type; name: type`.
    pub params: &'static str,
    /// As in the text form; integers are 0 to 2, `segment` is [`super::SEGMENT`].
    pub inputs: &'static str,
    /// Ops, as in the text form.
    pub lines: &'static str,
    /// Where numbers lie.
    pub domain: Domain,
}

const fn case(
    op: &'static str,
    params: &'static str,
    inputs: &'static str,
    lines: &'static str,
    domain: Domain,
) -> Case {
    Case { op, params, inputs, lines, domain }
}

const PAIR: &str = "a: f32[2, 3]; b: f32[2, 3]";
const ONE: &str = "a: f32[2, 3]";
const HEADS: &str = "q: f32[2, 4, 1, 2]; k: f32[2, 4, 1, 2]; v: f32[2, 4, 1, 2]";
const GROUPS: &str = "q: f32[1, 3, 4, 1]; k: f32[1, 3, 2, 1]; v: f32[1, 3, 2, 1]";

/// All cases.
#[rustfmt::skip]
pub const CASES: &[Case] = &[
    case("read", ONE, "", "  %y = neg %a", Any),
    case("cast", ONE, "", "  %i = cast %a dtype=i32\n  %f = cast %i dtype=f32\n  %u = add %a, %f\n  %y = mul %a, %u", Any),
    case("cast", ONE, "", "  %f = cast %a dtype=f32\n  %y = mul %a, %f", Any),
    case("broadcast", "a: f32[3, 1]", "", "  %y = broadcast %a shape=[2, 3, 4]", Any),
    case("broadcast", "a: f32[3]", "%x: f32[B, T]", "  %y = broadcast %a shape=[B, T, 3]", Any),
    case("broadcast", "a: f32[]", "%x: f32[B, T]", "  %y = broadcast %a shape=[B, T-1]", Any),
    case("broadcast", "a: f32[1]", "%x: f32[B, T]", "  %y = broadcast %a shape=[T]", Any),
    case("reshape", ONE, "", "  %y = reshape %a shape=[3, 1, 2]", Any),
    case("reshape", "a: f32[4]", "%x: f32[B, T]", "  %b = broadcast %a shape=[B, T, 4]\n  %c = mul %b, %b\n  %y = reshape %c shape=[B*T, 2, 2]", Any),
    case("transpose", "a: f32[2, 3, 4]", "", "  %y = transpose %a order=[2, 0, 1]", Any),
    case("slice", "a: f32[2, 5]", "", "  %y = slice %a axis=1 start=1 end=4", Any),
    case("slice", "a: f32[2]", "%x: f32[B, T]", "  %b = broadcast %a shape=[B, T, 2]\n  %c = cumsum %b axis=1 reverse=false\n  %y = slice %c axis=1 start=1 end=T-1", Any),
    case("pad", ONE, "", "  %y = pad %a axis=1 before=2 after=1", Any),
    case("pad", ONE, "%x: f32[B, T]", "  %y = pad %a axis=0 before=T after=B", Any),
    case("concat", "a: f32[2, 1]; b: f32[2, 3]; c: f32[2, 2]", "", "  %y = concat %a, %b, %c axis=1", Any),
    case("concat", "a: f32[2]; b: f32[2]", "", "  %y = concat %a, %b, %a axis=0", Any),
    case("add", PAIR, "", "  %y = add %a, %b", Any),
    case("add", ONE, "", "  %y = add %a, %a", Any),
    case("sub", PAIR, "", "  %y = sub %a, %b", Any),
    case("mul", PAIR, "", "  %y = mul %a, %b", Any),
    case("mul", ONE, "", "  %y = mul %a, %a", Any),
    case("div", PAIR, "", "  %y = div %a, %b", Any),
    case("max", PAIR, "", "  %y = max %a, %b", Any),
    case("min", PAIR, "", "  %y = min %a, %b", Any),
    case("pow", PAIR, "", "  %y = pow %a, %b", Positive),
    case("neg", ONE, "", "  %y = neg %a", Any),
    case("abs", ONE, "", "  %y = abs %a", Any),
    case("exp", ONE, "", "  %y = exp %a", Any),
    case("log", ONE, "", "  %y = log %a", Positive),
    case("sqrt", ONE, "", "  %y = sqrt %a", Positive),
    case("tanh", ONE, "", "  %y = tanh %a", Any),
    case("sigmoid", ONE, "", "  %y = sigmoid %a", Any),
    case("log_sigmoid", ONE, "", "  %y = log_sigmoid %a", Any),
    case("relu", ONE, "", "  %y = relu %a", Any),
    case("gelu", ONE, "", "  %y = gelu %a", Any),
    case("gelu_tanh", ONE, "", "  %y = gelu_tanh %a", Any),
    case("silu", ONE, "", "  %y = silu %a", Any),
    case("erf", ONE, "", "  %y = erf %a", Any),
    case("eq", PAIR, "", "  %m = max %a, %b\n  %c = eq %a, %m\n  %d = where %c, %a, %b\n  %y = mul %d, %b", Any),
    case("ne", PAIR, "", "  %m = min %a, %b\n  %c = ne %a, %m\n  %d = where %c, %a, %b\n  %y = mul %d, %b", Any),
    case("lt", PAIR, "", "  %c = lt %a, %b\n  %y = where %c, %a, %b", Any),
    case("le", PAIR, "", "  %c = le %a, %b\n  %y = where %c, %a, %b", Any),
    case("where", PAIR, "%c: bool[2, 3]", "  %y = where %c, %a, %b", Any),

    case("contract", "a: f32[2, 3]; b: f32[4, 3]", "", "  %y = contract %a, %b spec=ik,jk->ij", Any),
    case("contract", "a: f32[2, 3, 2]; b: f32[2, 2, 3]", "", "  %y = contract %a, %b spec=bik,kbj->jbi", Any),
    case("contract", "a: f32[3]; b: f32[2]", "", "  %y = contract %a, %b spec=i,j->ji", Any),
    case("contract", "a: f32[2, 3]; b: f32[2, 3]", "", "  %y = contract %a, %b spec=ij,ij->", Any),
    case("contract", ONE, "", "  %y = contract %a, %a spec=ik,jk->ij", Any),
    case("contract", "a: f32[4]; b: f32[5, 4]", "%x: f32[B, T]", "  %c = broadcast %a shape=[B, T, 4]\n  %y = contract %c, %b spec=btd,vd->btv", Any),
    case("reduce_sum", "a: f32[2, 3, 2]", "", "  %y = reduce_sum %a axes=[0, 2]", Any),
    case("reduce_sum", ONE, "", "  %s = reduce_sum %a axes=[0, 1]\n  %b = broadcast %s shape=[2, 3]\n  %y = mul %a, %b", Any),
    case("reduce_max", "a: f32[2, 3, 2]", "", "  %y = reduce_max %a axes=[0, 2]", Any),
    case("reduce_max", ONE, "", "  %y = reduce_max %a axes=[1]", Any),
    case("reduce_min", "a: f32[2, 3, 2]", "", "  %y = reduce_min %a axes=[1]", Any),
    case("cumsum", ONE, "", "  %y = cumsum %a axis=1 reverse=false", Any),
    case("cumsum", "a: f32[3, 2]", "", "  %y = cumsum %a axis=0 reverse=true", Any),

    case("slice_at", "a: f32[2, 5]", "%p: i32[]", "  %y = slice_at %a, %p axis=1 len=2", Any),
    case("write_at", "a: f32[2, 5]; b: f32[2, 2]", "%p: i32[]", "  %y = write_at %a, %b, %p axis=1", Any),
    case("recurrence", ONE, "", "  %y = recurrence %a axis=1 decay=0.7 reverse=false", Any),
    case("recurrence", "a: f32[3, 2]", "", "  %y = recurrence %a axis=0 decay=1.5 reverse=true", Any),

    case("embed", "table: f32[3, 2]", "%i: i32[B, T]", "  %y = embed %table, %i", Any),
    case("layer_norm", "x: f32[2, 4]; w: f32[4]; b: f32[4]", "", "  %y = layer_norm %x, %w, %b eps=1e-5", Any),
    case("layer_norm", "x: f32[2, 2, 3]; w: f32[3]; b: f32[3]", "", "  %y = layer_norm %x, %w, %b eps=0.5", Any),
    case("rms_norm", "x: f32[2, 4]; w: f32[4]", "", "  %y = rms_norm %x, %w eps=1e-5", Any),
    case("rms_norm", "x: f32[2, 2, 3]; w: f32[3]", "", "  %y = rms_norm %x, %w eps=0.5", Any),
    case("rope", "x: f32[2, 3, 2, 4]", "%p: i32[2, 3], %f: f32[2]", "  %y = rope %x, %p, %f inverse=false", Any),
    case("rope", "x: f32[2, 3, 1, 2]", "%p: i32[2, 3], %f: f32[1]", "  %y = rope %x, %p, %f inverse=true", Any),
    case("attention", HEADS, "%segment: i32[2, 4]", "  %y, %z = attention %q, %k, %v, %segment causal=true scale=0.7 window=0", Any),
    case("attention", HEADS, "%segment: i32[2, 4]", "  %y, %z = attention %q, %k, %v, %segment causal=false scale=1.0 window=0", Any),
    case("attention", GROUPS, "%s: bool[1, 3]", "  %o = eq %s, %s\n  %t = cast %o dtype=i32\n  %y, %z = attention %q, %k, %v, %t causal=true scale=0.5 window=0", Any),
    case("attention", HEADS, "%segment: i32[2, 4]", "  %y, %z = attention %q, %k, %v, %segment causal=true scale=0.7 window=2", Any),
    case("attention", HEADS, "%segment: i32[2, 4]", "  %y, %z = attention %q, %k, %v, %segment causal=false scale=0.7 window=2", Any),
    case("attention", HEADS, "%segment: i32[2, 4], %a: f32[1]", "  %y, %z = attention %q, %k, %v, %segment, %a causal=true scale=0.7 window=0", Any),
    case("attention", HEADS, "%segment: i32[2, 4], %a: f32[1]", "  %y, %z = attention %q, %k, %v, %segment, %a causal=false scale=0.7 window=3", Any),
    case("attention", GROUPS, "%s: bool[1, 3], %a: f32[4]", "  %o = eq %s, %s\n  %t = cast %o dtype=i32\n  %y, %z = attention %q, %k, %v, %t, %a causal=true scale=0.5 window=2", Any),
    case("token_logp", "l: f32[2, 3, 4]", "%i: i32[2, 3]", "  %y = token_logp %l, %i", Any),
];

/// Ops without a case, and why.
#[rustfmt::skip]
pub const WITHOUT: &[(&str, &str)] = &[
    ("const", "no operand"),
    ("size", "no operand"),
    ("iota", "no operand"),
    ("stop", "stops gradients: a test of its own"),
    ("and", "no float operand"),
    ("or", "no float operand"),
    ("not", "no float operand"),
    ("position_in", "no float operand"),
    ("fold", "no float operand"),
    ("random_normal", "no float operand"),
    ("random_uniform", "no float operand"),
    ("row_uniform", "no float operand"),
    ("dropout", "random where it is trained: tests/adapt"),
    ("sample", "no slope"),
    ("all_reduce", "made by partition, after autodiff"),
    ("all_gather", "made by partition, after autodiff"),
    ("reduce_scatter", "made by partition, after autodiff"),
    ("shard", "made by partition, after autodiff"),
    ("to_host", "made by offload_activations, after autodiff"),
    ("from_host", "made by offload_activations, after autodiff"),
    ("wait", "made by prefetch, after autodiff"),
    ("fused", "made by fuse, after autodiff"),
    ("cached_attention", "made by decode, for graphs that are not trained"),
    ("rms_norm_grad", "made by autodiff only"),
    ("embed_grad", "made by autodiff only"),
    ("add_rows", "made by merge only"),
    ("contract_each", "made by merge only"),
    ("contract_fused", "made by fuse only"),
    ("head_logp", "made by merge only"),
    ("head_logp_grad", "made by merge only"),
    ("sum_squares", "made by merge only"),
    ("layer_norm_grad", "made by autodiff only"),
    ("attention_grad", "made by autodiff only"),
    ("token_logp_grad", "made by autodiff only"),
    ("adamw", "ends a step"),
    ("write", "ends a graph"),
];
