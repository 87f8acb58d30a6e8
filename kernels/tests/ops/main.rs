//! Values of every op, by hand or computed independently in plain Python (`math.exp`, sums by `fsum`; gradients by
//! fourth-order differences).

#[path = "../check/mod.rs"]
#[allow(dead_code)] // The tests of the CPU use the rest.
mod check;

use check::{modes, near, numbers, program, run};
use dsgc_ir::fuzz::is_of_layout;
use dsgc_ir::op::ROWS;

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

/// An op, the graph that shows it, inputs, and the results of its last line.
type Case = (&'static str, &'static str, &'static str, &'static [&'static [f64]], &'static [&'static [f64]]);

mod composites;
use composites::COMPOSITES;

#[cfg(feature = "wgpu")]
mod gpu;

#[rustfmt::skip]
const PLAIN: &[Case] = &[
    ("const", "", "%y = const value=1.5 dtype=f32", &[], &[&[1.5]]),
    ("const", "", "%y = const value=-2.0 dtype=i32", &[], &[&[-2.0]]),
    ("const", "", "%y = const value=2.0 dtype=bool", &[], &[&[1.0]]),
    ("const", "", "%y = const value=-inf dtype=f32", &[], &[&[-INF]]),
    ("size", "%x: f32[2, 3]", "%y = size dim=7 dtype=i32", &[&[0.0; 6]], &[&[7.0]]),
    ("iota", "", "%y = iota len=4", &[], &[&[0.0, 1.0, 2.0, 3.0]]),
    ("iota", "", "%y = iota len=0", &[], &[&[]]),

    ("cast", "%x: f32[6]", "%y = cast %x dtype=i32", &[&[1.9, -1.9, 0.0, 1e20, -1e20, NAN]], &[&[1.0, -1.0, 0.0, 2147483647.0, -2147483648.0, 0.0]]),
    ("cast", "%x: f32[3]", "%y = cast %x dtype=bool", &[&[0.0, -0.5, NAN]], &[&[0.0, 1.0, 1.0]]),
    ("cast", "%x: bool[2]", "%y = cast %x dtype=f32", &[&[0.0, 1.0]], &[&[0.0, 1.0]]),
    ("cast", "%x: i32[2]", "%y = cast %x dtype=f32", &[&[-3.0, 5.0]], &[&[-3.0, 5.0]]),
    ("broadcast", "%x: f32[2, 1]", "%y = broadcast %x shape=[2, 2, 3]", &[&[1.0, 2.0]], &[&[1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]),
    ("broadcast", "%x: bool[]", "%y = broadcast %x shape=[2]", &[&[1.0]], &[&[1.0, 1.0]]),
    ("reshape", "%x: f32[2, 3]", "%y = reshape %x shape=[3, 2]", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]),
    ("transpose", "%x: f32[2, 3]", "%y = transpose %x order=[1, 0]", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]]),
    ("transpose", "%x: i32[1, 2, 3]", "%y = transpose %x order=[2, 0, 1]", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]]),
    ("slice", "%x: f32[2, 3]", "%y = slice %x axis=1 start=1 end=3", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[2.0, 3.0, 5.0, 6.0]]),
    ("slice", "%x: key[3]", "%y = slice %x axis=0 start=2 end=3", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[5.0, 6.0]]),
    ("pad", "%x: f32[2, 2]", "%y = pad %x axis=1 before=1 after=2", &[&[1.0, 2.0, 3.0, 4.0]], &[&[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]]),
    ("pad", "%x: bool[1]", "%y = pad %x axis=0 before=0 after=1", &[&[1.0]], &[&[1.0, 0.0]]),
    ("concat", "%a: f32[2, 1], %b: f32[2, 2]", "%y = concat %a, %b axis=1", &[&[1.0, 2.0], &[3.0, 4.0, 5.0, 6.0]], &[&[1.0, 3.0, 4.0, 2.0, 5.0, 6.0]]),
    ("concat", "%a: i32[1], %b: i32[0], %c: i32[1]", "%y = concat %a, %b, %c axis=0", &[&[1.0], &[], &[2.0]], &[&[1.0, 2.0]]),
    ("stop", "%x: f32[2]", "%y = stop %x", &[&[1.0, 2.0]], &[&[1.0, 2.0]]),
    ("dropout", "%x: f32[2]", "%y = dropout %x p=0.5 role=model stream=0", &[&[1.0, 2.0]], &[&[1.0, 2.0]]),

    ("add", "%a: f32[3], %b: f32[3]", "%y = add %a, %b", &[&[1.0, 2.0, -1.0], &[0.5, -2.0, INF]], &[&[1.5, 0.0, INF]]),
    ("add", "%a: i32[2], %b: i32[2]", "%y = add %a, %b", &[&[1.0, 2147483647.0], &[2.0, 1.0]], &[&[3.0, -2147483648.0]]),
    ("sub", "%a: f32[2], %b: f32[2]", "%y = sub %a, %b", &[&[1.0, 2.0], &[0.5, -2.0]], &[&[0.5, 4.0]]),
    ("sub", "%a: i32[1], %b: i32[1]", "%y = sub %a, %b", &[&[3.0], &[5.0]], &[&[-2.0]]),
    ("mul", "%a: f32[2], %b: f32[2]", "%y = mul %a, %b", &[&[1.5, -2.0], &[0.5, 3.0]], &[&[0.75, -6.0]]),
    ("mul", "%a: i32[1], %b: i32[1]", "%y = mul %a, %b", &[&[3.0], &[-5.0]], &[&[-15.0]]),
    ("div", "%a: f32[3], %b: f32[3]", "%y = div %a, %b", &[&[1.0, -1.0, 0.0], &[4.0, 0.0, 0.0]], &[&[0.25, -INF, NAN]]),
    ("div", "%a: i32[3], %b: i32[3]", "%y = div %a, %b", &[&[7.0, -7.0, -2147483648.0], &[2.0, 2.0, -1.0]], &[&[3.0, -3.0, -2147483648.0]]),
    ("max", "%a: f32[4], %b: f32[4]", "%y = max %a, %b", &[&[1.0, 3.0, NAN, 1.0], &[2.0, -3.0, 1.0, NAN]], &[&[2.0, 3.0, NAN, NAN]]),
    ("max", "%a: i32[2], %b: i32[2]", "%y = max %a, %b", &[&[1.0, 3.0], &[2.0, -3.0]], &[&[2.0, 3.0]]),
    ("min", "%a: f32[4], %b: f32[4]", "%y = min %a, %b", &[&[1.0, 3.0, NAN, 1.0], &[2.0, -3.0, 1.0, NAN]], &[&[1.0, -3.0, NAN, NAN]]),
    ("min", "%a: i32[2], %b: i32[2]", "%y = min %a, %b", &[&[1.0, 3.0], &[2.0, -3.0]], &[&[1.0, -3.0]]),
    ("pow", "%a: f32[4], %b: f32[4]", "%y = pow %a, %b", &[&[2.0, 9.0, 0.0, 2.0], &[3.0, 0.5, 0.0, -1.5]], &[&[8.0, 3.0, 1.0, 0.3535533905932738]]),
    ("neg", "%x: f32[2]", "%y = neg %x", &[&[1.5, -2.0]], &[&[-1.5, 2.0]]),
    ("neg", "%x: i32[2]", "%y = neg %x", &[&[1.0, -2147483648.0]], &[&[-1.0, -2147483648.0]]),
    ("abs", "%x: f32[2]", "%y = abs %x", &[&[1.5, -2.0]], &[&[1.5, 2.0]]),
    ("abs", "%x: i32[2]", "%y = abs %x", &[&[1.0, -2.0]], &[&[1.0, 2.0]]),
    ("exp", "%x: f32[4]", "%y = exp %x", &[&[-1.5, 0.0, 0.25, 2.0]], &[&[0.22313016014842982, 1.0, 1.2840254166877414, 7.38905609893065]]),
    ("log", "%x: f32[4]", "%y = log %x", &[&[0.25, 1.0, 2.0, 0.0]], &[&[-1.3862943611198906, 0.0, std::f64::consts::LN_2, -INF]]),
    ("sqrt", "%x: f32[4]", "%y = sqrt %x", &[&[0.25, 1.0, 2.0, -1.0]], &[&[0.5, 1.0, std::f64::consts::SQRT_2, NAN]]),
    ("tanh", "%x: f32[4]", "%y = tanh %x", &[&[-1.5, 0.0, 0.25, 2.0]], &[&[-0.9051482536448664, 0.0, 0.24491866240370913, 0.9640275800758169]]),
    ("sigmoid", "%x: f32[5]", "%y = sigmoid %x", &[&[-1.5, 0.0, 0.25, 2.0, -1000.0]], &[&[0.18242552380635635, 0.5, 0.5621765008857981, 0.8807970779778823, 0.0]]),
    ("log_sigmoid", "%x: f32[6]", "%y = log_sigmoid %x", &[&[-1.5, 0.0, 0.25, 2.0, -1000.0, 1000.0]], &[&[-1.7014132779827524, -std::f64::consts::LN_2, -0.5759394198788437, -0.12692801104297263, -1000.0, 0.0]]),
    ("relu", "%x: f32[4]", "%y = relu %x", &[&[-1.5, 0.0, 2.0, NAN]], &[&[0.0, 0.0, 2.0, NAN]]),
    ("gelu", "%x: f32[4]", "%y = gelu %x", &[&[-1.5, 0.0, 0.25, 2.0]], &[&[-0.10021080190328713, 0.0, 0.14967658142073093, 1.9544997361036416]]),
    ("gelu_tanh", "%x: f32[4]", "%y = gelu_tanh %x", &[&[-1.5, 0.0, 0.25, 2.0]], &[&[-0.10042842301976707, 0.0, 0.149675350701685, 1.954597694087775]]),
    ("silu", "%x: f32[4]", "%y = silu %x", &[&[-1.5, 0.0, 0.25, 2.0]], &[&[-0.2736382857095345, 0.0, 0.14054412522144952, 1.7615941559557646]]),
    ("erf", "%x: f32[4]", "%y = erf %x", &[&[-1.5, 0.0, 0.25, 2.0]], &[&[-0.9661051464753108, 0.0, 0.2763263901682369, 0.9953222650189527]]),

    ("eq", "%a: f32[3], %b: f32[3]", "%y = eq %a, %b", &[&[1.0, 2.0, NAN], &[1.0, 3.0, NAN]], &[&[1.0, 0.0, 0.0]]),
    ("eq", "%a: bool[2], %b: bool[2]", "%y = eq %a, %b", &[&[1.0, 0.0], &[1.0, 1.0]], &[&[1.0, 0.0]]),
    ("ne", "%a: i32[2], %b: i32[2]", "%y = ne %a, %b", &[&[1.0, 2.0], &[1.0, 3.0]], &[&[0.0, 1.0]]),
    ("ne", "%a: f32[1], %b: f32[1]", "%y = ne %a, %b", &[&[NAN], &[NAN]], &[&[1.0]]),
    ("lt", "%a: f32[4], %b: f32[4]", "%y = lt %a, %b", &[&[1.0, 2.0, 3.0, NAN], &[2.0, 2.0, 2.0, 1.0]], &[&[1.0, 0.0, 0.0, 0.0]]),
    ("le", "%a: i32[3], %b: i32[3]", "%y = le %a, %b", &[&[1.0, 2.0, 3.0], &[2.0, 2.0, 2.0]], &[&[1.0, 1.0, 0.0]]),
    ("le", "%a: f32[1], %b: f32[1]", "%y = le %a, %b", &[&[NAN], &[1.0]], &[&[0.0]]),
    ("and", "%a: bool[4], %b: bool[4]", "%y = and %a, %b", &[&[0.0, 0.0, 1.0, 1.0], &[0.0, 1.0, 0.0, 1.0]], &[&[0.0, 0.0, 0.0, 1.0]]),
    ("or", "%a: bool[4], %b: bool[4]", "%y = or %a, %b", &[&[0.0, 0.0, 1.0, 1.0], &[0.0, 1.0, 0.0, 1.0]], &[&[0.0, 1.0, 1.0, 1.0]]),
    ("not", "%a: bool[2]", "%y = not %a", &[&[0.0, 1.0]], &[&[1.0, 0.0]]),
    ("where", "%c: bool[3], %a: f32[3], %b: f32[3]", "%y = where %c, %a, %b", &[&[1.0, 0.0, 1.0], &[1.0, NAN, 3.0], &[4.0, 5.0, INF]], &[&[1.0, 5.0, 3.0]]),
    ("where", "%c: bool[2], %a: i32[2], %b: i32[2]", "%y = where %c, %a, %b", &[&[1.0, 0.0], &[1.0, 2.0], &[3.0, 4.0]], &[&[1.0, 4.0]]),

    ("fused", "%a: f32[2, 3], %b: f32[3]", "%y = fused %a, %b shape=[2, 3] body={$2 = mul $0, $1; $3 = const value=0.5 dtype=f32; $4 = add $2, $3; return $4}", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, 10.0, -1.0]], &[&[1.5, 20.5, -2.5, 4.5, 50.5, -5.5]]),
    ("fused", "%a: bool[2, 1], %b: i32[], %c: f32[3]", "%y, %z = fused %a, %b, %c shape=[2, 3] body={$3 = cast $1 dtype=f32; $4 = where $0, $2, $3; $5 = lt $4, $2; return $5, $4}", &[&[1.0, 0.0], &[7.0], &[1.0, 8.0, NAN]], &[&[0.0, 0.0, 0.0, 0.0, 1.0, 0.0], &[1.0, 8.0, NAN, 7.0, 7.0, 7.0]]),

    ("fused", "%a: f32[2, 3], %n: f32[2, 1], %w: f32[3]", "%y, %z = fused %a, %n, %w shape=[2, 3] body={$3 = mul $0, $0; $4 = reduce_sum $3 axes=[1]; $5 = const value=1.0 dtype=f32; $6 = add $4, $5; $7 = mul $6, $1; $8 = add $0, $7; $9 = mul $8, $2; return $7, $9}", &[&[1.0, 2.0, 3.0, 0.0, -1.0, 2.0], &[1.0, 10.0], &[1.0, 10.0, -1.0]], &[&[15.0, 60.0], &[16.0, 170.0, -18.0, 60.0, 590.0, -62.0]]),
    ("fused", "%a: f32[2, 3]", "%y, %z = fused %a shape=[2, 3] body={$1 = neg $0; $2 = reduce_max $1 axes=[0]; return $1, $2}", &[&[1.0, 2.0, NAN, 4.0, -5.0, 6.0]], &[&[-1.0, -2.0, NAN, -4.0, 5.0, -6.0], &[-1.0, 5.0, NAN]]),
    ("fused", "%a: i32[2, 2, 2], %b: i32[2]", "%y, %z = fused %a, %b shape=[2, 2, 2] body={$2 = add $0, $1; $3 = reduce_sum $2 axes=[0, 1, 2]; $4 = neg $2; return $4, $3}", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], &[1.0, -1.0]], &[&[-2.0, -1.0, -4.0, -3.0, -6.0, -5.0, -8.0, -7.0], &[36.0]]),
    ("fused", "%a: f32[2, 0]", "%y, %z = fused %a shape=[2, 0] body={$1 = reduce_min $0 axes=[1]; $2 = sub $0, $1; return $2, $1}", &[&[]], &[&[], &[INF, INF]]),

    ("contract", "%a: f32[2, 3], %b: f32[3, 2]", "%y = contract %a, %b spec=ik,kj->ij", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, 0.0, -1.0, 2.0, 0.5, 1.0]], &[&[0.5, 7.0, 2.0, 16.0]]),
    ("contract", "%a: f32[2, 2], %b: f32[2, 3]", "%y = contract %a, %b spec=bi,bj->jib", &[&[1.0, 2.0, 3.0, 4.0], &[1.0, 10.0, 100.0, 2.0, 20.0, 200.0]], &[&[1.0, 6.0, 2.0, 8.0, 10.0, 60.0, 20.0, 80.0, 100.0, 600.0, 200.0, 800.0]]),
    ("contract", "%a: f32[2, 2], %b: f32[2, 2]", "%y = contract %a, %b spec=ij,ji->", &[&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]], &[&[69.0]]),
    ("contract", "%a: f32[2, 0], %b: f32[0]", "%y = contract %a, %b spec=ij,j->i", &[&[], &[]], &[&[0.0, 0.0]]),
    ("reduce_sum", "%x: f32[2, 3]", "%y = reduce_sum %x axes=[1]", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[6.0, 15.0]]),
    ("reduce_sum", "%x: f32[2, 2, 2]", "%y = reduce_sum %x axes=[0, 2]", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], &[&[14.0, 22.0]]),
    ("reduce_sum", "%x: i32[3]", "%y = reduce_sum %x axes=[0]", &[&[1.0, 2.0, 3.0]], &[&[6.0]]),
    ("reduce_sum", "%x: f32[0]", "%y = reduce_sum %x axes=[0]", &[&[]], &[&[0.0]]),
    ("reduce_max", "%x: f32[2, 3]", "%y = reduce_max %x axes=[0]", &[&[1.0, 5.0, NAN, 4.0, 2.0, 6.0]], &[&[4.0, 5.0, NAN]]),
    ("reduce_max", "%x: f32[0]", "%y = reduce_max %x axes=[0]", &[&[]], &[&[-INF]]),
    ("reduce_max", "%x: i32[2]", "%y = reduce_max %x axes=[0]", &[&[-3.0, -2.0]], &[&[-2.0]]),
    ("reduce_min", "%x: f32[2, 3]", "%y = reduce_min %x axes=[1]", &[&[1.0, 5.0, 3.0, 4.0, NAN, 6.0]], &[&[1.0, NAN]]),
    ("reduce_min", "%x: f32[0]", "%y = reduce_min %x axes=[0]", &[&[]], &[&[INF]]),
    ("reduce_min", "%x: i32[2]", "%y = reduce_min %x axes=[0]", &[&[-3.0, -2.0]], &[&[-3.0]]),
    ("cumsum", "%x: f32[2, 3]", "%y = cumsum %x axis=1 reverse=false", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[1.0, 3.0, 6.0, 4.0, 9.0, 15.0]]),
    ("cumsum", "%x: i32[3, 2]", "%y = cumsum %x axis=0 reverse=true", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[9.0, 12.0, 8.0, 10.0, 5.0, 6.0]]),
    ("cumsum", "%x: f32[0]", "%y = cumsum %x axis=0 reverse=true", &[&[]], &[&[]]),
    ("recurrence", "%x: f32[2, 3]", "%y = recurrence %x axis=1 decay=0.5 reverse=false", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], &[&[1.0, 2.5, 4.25, 4.0, 7.0, 9.5]]),
    ("recurrence", "%x: f32[3, 1]", "%y = recurrence %x axis=0 decay=2.0 reverse=true", &[&[1.0, 2.0, 3.0]], &[&[17.0, 8.0, 3.0]]),
    ("slice_at", "%x: f32[2, 3], %p: i32[]", "%y = slice_at %x, %p axis=1 len=2", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0]], &[&[2.0, 3.0, 5.0, 6.0]]),
    ("slice_at", "%x: bool[3], %p: i32[]", "%y = slice_at %x, %p axis=0 len=1", &[&[1.0, 0.0, 1.0], &[1.0]], &[&[0.0]]),
    ("write_at", "%x: f32[2, 3], %n: f32[2, 2], %p: i32[]", "%y = write_at %x, %n, %p axis=1", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[-1.0, -2.0, -3.0, -4.0], &[0.0]], &[&[-1.0, -2.0, 3.0, -3.0, -4.0, 6.0]]),
    ("write_at", "%x: i32[3, 2], %n: i32[1, 2], %p: i32[]", "%y = write_at %x, %n, %p axis=0", &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[7.0, 8.0], &[2.0]], &[&[1.0, 2.0, 3.0, 4.0, 7.0, 8.0]]),
    ("sample", "%l: f32[2, 3], %k: key[], %r: i32[2], %p: i32[]", "%y = sample %l, %k, %r, %p temperature=0.0 top_k=0 top_p=1.0", &[&[1.0, 3.0, 3.0, 2.0, -1.0, 0.0], &[5.0, 6.0], &[0.0, 1.0], &[4.0]], &[&[1.0, 0.0]]),
    ("sample", "%l: f32[2, 3], %k: key[], %r: i32[2], %p: i32[]", "%y = sample %l, %k, %r, %p temperature=1.0 top_k=1 top_p=1.0", &[&[1.0, 3.0, 2.0, 2.0, -1.0, 0.0], &[5.0, 6.0], &[0.0, 1.0], &[4.0]], &[&[1.0, 0.0]]),
];

#[test]
fn ops_have_their_values() {
    for (op, params, lines, given, expected) in PLAIN.iter().chain(COMPOSITES) {
        let program = program(params, lines);
        assert!(program.op_counts().contains_key(op), "the case of `{op}` does not use it:\n{lines}");
        for (mode, tolerance, interp) in modes(&program) {
            let found: Vec<Vec<f64>> = match run(interp, given) {
                Ok(all) => all.iter().map(numbers).collect(),
                Err(why) => panic!("`{op}` in {mode}: {why}\n{program}"),
            };
            let equal = found.len() == expected.len()
                && found
                    .iter()
                    .zip(*expected)
                    .all(|(a, b)| a.len() == b.len() && a.iter().zip(*b).all(|(&a, &b)| near(a, b, tolerance)));
            assert!(equal, "`{op}` in {mode}: found {found:?}, expected {expected:?}\n{program}");
        }
    }
}

#[test]
fn every_row_of_the_table_has_a_case() {
    // State has no result to show in a case; its own tests are in `sessions.rs`.
    let elsewhere = ["read", "write"];
    for row in ROWS {
        let cases = PLAIN.iter().chain(COMPOSITES).filter(|c| c.0 == row.name).count();
        // What ranks do is tested on ranks: `tests/partition.rs`, `tests/ranks.rs`.
        let fine = cases > 0 || elsewhere.contains(&row.name) || is_of_layout(row);
        assert!(fine, "`{}` has no test", row.name);
    }
}

/// Parameters, lines, inputs that are wrong, and what is said of them.
const WRONG: &[(&str, &str, &[&[f64]], &str)] = &[
    ("%t: f32[2, 3], %i: i32[1]", "%y = embed %t, %i", &[&[0.0; 6], &[2.0]], "found index 2, expected one of 0 to 1"),
    ("%t: f32[2, 3], %i: i32[1]", "%y = embed %t, %i", &[&[0.0; 6], &[-1.0]], "found index -1, expected one of 0 to 1"),
    (
        "%i: i32[1], %g: f32[1, 3]",
        "%y = embed_grad %i, %g rows=2",
        &[&[5.0], &[0.0; 3]],
        "found index 5, expected one of 0 to 1",
    ),
    (
        "%l: f32[1, 3], %i: i32[1]",
        "%y = token_logp %l, %i",
        &[&[0.0; 3], &[3.0]],
        "found token 3, expected one of 0 to 2",
    ),
    ("%a: i32[1], %b: i32[1]", "%y = div %a, %b", &[&[1.0], &[0.0]], "an integer is divided by zero"),
    (
        "%x: f32[3], %p: i32[]",
        "%y = slice_at %x, %p axis=0 len=2",
        &[&[0.0; 3], &[2.0]],
        "found place 2 for 2 of 3 places",
    ),
    (
        "%l: f32[1, 2], %k: key[], %r: i32[1], %p: i32[]",
        "%y = sample %l, %k, %r, %p temperature=1.0 top_k=0 top_p=1.0",
        &[&[0.0, NAN], &[1.0, 2.0], &[7.0], &[0.0]],
        "found the logit NaN in row 7, expected finite numbers",
    ),
];

#[test]
fn wrong_numbers_are_errors() {
    for (params, lines, given, expected) in WRONG {
        for (mode, _, interp) in modes(&program(params, lines)) {
            let found = run(interp, given).expect_err("the numbers are wrong");
            assert!(found.contains(expected), "in {mode}: found `{found}`, expected `{expected}`");
        }
    }
}
