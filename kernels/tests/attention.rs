//! Attention, its gradient and attention over a cache on the CPU, against the interpreter in doubles: shapes around the
//! blocks, masks of every kind, numbers of threads, and values that nobody may see.

#[path = "check/mod.rs"]
#[allow(dead_code)] // The tests of ops use the rest.
mod check;

use check::{near, plan, program};
use dsgc_ir::fuzz::Rng;
use dsgc_ir::{DType, Data, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::Cpu;
use dsgc_kernels::interp::{Interp, Precision};

/// Which texts a row holds.
#[derive(Clone, Copy, Debug)]
enum Rows {
    /// One text.
    Whole,
    /// Padding before it.
    Left,
    /// Padding after it.
    Right,
    /// Three texts and padding on both sides.
    Packed,
    /// A number in no order per place.
    Random,
}

impl Rows {
    fn segments(self, rows: usize, places: usize) -> Vec<i32> {
        let mut rng = Rng::new(5);
        let of = |row: usize, t: usize, random: i64| match self {
            Rows::Whole => 1,
            Rows::Left => i32::from(t >= (places / 3 + row * 7).min(places)),
            Rows::Right => i32::from(t < places - (places / 3 + row * 7).min(places)),
            Rows::Packed if t < places / 8 || t >= places - places / 5 => 0,
            Rows::Packed => 1 + (3 * t / places.max(1)) as i32,
            Rows::Random => random as i32,
        };
        (0..rows * places).map(|i| of(i / places, i % places, rng.between(0, 3))).collect()
    }
}

const ROWS: [Rows; 5] = [Rows::Whole, Rows::Left, Rows::Right, Rows::Packed, Rows::Random];

fn floats(shape: &[usize], rng: &mut Rng) -> Tensor {
    let n = shape.iter().product();
    Tensor::f32(shape, (0..n).map(|_| (2.0 * rng.unit() - 1.0) as f32).collect())
}

type Named = Vec<(&'static str, Tensor)>;

/// Results on the CPU with 1, 2 and 3 threads, bitwise equal, and in doubles.
fn both(lines: &str, inputs: &Named) -> [Vec<Tensor>; 2] {
    let declared: Vec<String> = inputs
        .iter()
        .map(|(name, t)| format!("%{name}: {}{:?}", if t.dtype() == DType::I32 { "i32" } else { "f32" }, t.shape))
        .collect();
    let program = program(&declared.join(", "), lines);
    let named: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
    let run = |mut device: Box<dyn Device>| -> Vec<Tensor> {
        let results = device.run("g", &named).unwrap_or_else(|e| panic!("{e:?}\n{lines}"));
        results.into_iter().map(|(_, t)| t).collect()
    };
    let exact = run(Box::new(Interp::new(program.clone(), Precision::F64)));
    let bits = |all: &[Tensor]| -> Vec<u32> {
        all.iter()
            .flat_map(|t| match &t.data {
                Data::F32(v) => v.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                other => panic!("found {other:?}"),
            })
            .collect()
    };
    let found = run(Box::new(Cpu::poisoned(plan(&program, 1), 1)));
    for threads in [2, 3] {
        let other = run(Box::new(Cpu::poisoned(plan(&program, threads), threads)));
        assert_eq!(bits(&found), bits(&other), "{threads} threads change bits of\n{lines}");
    }
    [found, exact]
}

fn assert_equal(lines: &str, inputs: &Named, what: &str) {
    let [found, exact] = both(lines, inputs);
    for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
        assert_eq!(found.shape, exact.shape, "{what}");
        for (at, (a, b)) in found.to_f64().into_iter().zip(exact.to_f64()).enumerate() {
            assert!(near(a, b, 2e-5), "{what}: element {at} of result {i} is {a}, expected {b}\n{lines}");
        }
    }
}

/// The forward op, and after it the gradient: `program` returns the results of the last line.
fn lines(causal: bool, window: usize, slopes: bool) -> [String; 2] {
    let more = if slopes { ", %a" } else { "" };
    let attributes = format!("causal={causal} scale=0.35 window={window}");
    let forward = format!("%o, %l = attention %q, %k, %v, %s{more} {attributes}");
    let backward = format!("{forward}\n%x, %y, %z = attention_grad %q, %k, %v, %s, %o, %l, %g{more} {attributes}");
    [forward, backward]
}

/// Operands of `lines`.
fn operands([b, t, h, k, d]: [usize; 5], rows: Rows, slopes: bool) -> Named {
    let mut rng = Rng::new(b as u64 + 7 * t as u64);
    let mut inputs = vec![
        ("q", floats(&[b, t, h, d], &mut rng)),
        ("k", floats(&[b, t, k, d], &mut rng)),
        ("v", floats(&[b, t, k, d], &mut rng)),
        ("s", Tensor::i32(&[b, t], rows.segments(b, t))),
        ("g", floats(&[b, t, h, d], &mut rng)),
    ];
    if slopes {
        inputs.push(("a", Tensor::f32(&[h], (0..h).map(|i| 0.5f32.powi(i as i32)).collect())));
    }
    inputs
}

/// Rows, places, heads of queries, heads of keys, width.
const SHAPES: [[usize; 5]; 6] =
    [[2, 1, 1, 1, 4], [1, 65, 2, 1, 8], [3, 130, 4, 2, 16], [2, 64, 3, 3, 5], [1, 200, 2, 1, 72], [1, 0, 1, 1, 4]];

#[test]
fn every_shape_mask_and_bias() {
    for shape in SHAPES {
        for rows in ROWS {
            for (causal, window, slopes) in [
                (true, 0, false),
                (false, 0, false),
                (true, 1, false),
                (true, 20, true),
                (true, 64, false),
                (true, 100, false),
                (true, 0, true),
                (false, 30, false),
                (false, 90, true),
            ] {
                for lines in lines(causal, window, slopes) {
                    assert_equal(&lines, &operands(shape, rows, slopes), &format!("{shape:?} {rows:?}"));
                }
            }
        }
    }
}

/// Fills some places of an operand `[B, T, .., ..]` with a number.
fn spoil(inputs: &mut Named, name: &str, with: f32, place: impl Fn(usize, usize) -> bool) {
    let (_, tensor) = inputs.iter_mut().find(|(n, _)| *n == name).expect("the operand is there");
    let (places, inner) = (tensor.shape[1], tensor.shape[2] * tensor.shape[3]);
    let Data::F32(all) = &mut tensor.data else { panic!("floats are single") };
    for (i, row) in all.chunks_mut(inner).enumerate() {
        if place(i / places, i % places) {
            row.fill(with);
        }
    }
}

/// Keys and values of padding, which nobody sees, and all of the last place, whose only query is its own.
#[test]
fn what_is_not_seen_does_not_show() {
    let shape = [2, 150, 2, 1, 16];
    for rows in [Rows::Left, Rows::Right, Rows::Packed] {
        let segments = rows.segments(shape[0], shape[1]);
        for with in [f32::NAN, f32::INFINITY] {
            for (causal, window, slopes) in [(true, 0, false), (true, 20, true), (false, 0, true)] {
                let mut inputs = operands(shape, rows, slopes);
                for name in ["k", "v"] {
                    spoil(&mut inputs, name, with, |row, t| segments[row * shape[1] + t] == 0);
                }
                for lines in lines(causal, window, slopes) {
                    let [found, exact] = both(&lines, &inputs);
                    assert!(exact.iter().all(|t| t.to_f64().iter().all(|x| x.is_finite())), "the case is one");
                    assert!(found.iter().all(|t| t.to_f64().iter().all(|x| x.is_finite())), "{rows:?}\n{lines}");
                    assert_equal(&lines, &inputs, &format!("{rows:?}"));
                }
            }
        }
    }
    // A query that is no number spoils what it sees, and nothing else; so does a key.
    for (name, at) in [("q", 70), ("k", 70), ("v", 70), ("g", 70)] {
        let mut inputs = operands(shape, Rows::Packed, false);
        spoil(&mut inputs, name, f32::NAN, |_, t| t == at);
        for window in [0, 9] {
            for lines in lines(true, window, false) {
                assert_equal(&lines, &inputs, &format!("NaN in {name}"));
            }
        }
    }
}

#[test]
fn new_columns_over_a_cache() {
    for [b, new, columns, h, k, d] in
        [[2, 1, 9, 2, 1, 4], [3, 1, 70, 4, 2, 17], [1, 5, 70, 3, 3, 16], [2, 130, 140, 2, 2, 8], [1, 1, 100, 8, 2, 64]]
    {
        for rows in ROWS {
            for (window, slopes) in [(0, false), (1, false), (7, true), (80, false), (0, true)] {
                for place in [0, (columns - new) / 2, columns - new] {
                    let mut inputs = operands([b, columns, h, k, d], rows, slopes);
                    inputs.retain(|(name, _)| *name != "g");
                    inputs[0].1 = floats(&[b, new, h, d], &mut Rng::new(3));
                    inputs.push(("p", Tensor::i32(&[], vec![place as i32])));
                    // What is behind the new columns is not there yet.
                    for name in ["k", "v"] {
                        spoil(&mut inputs, name, f32::NAN, |_, t| t >= place + new);
                    }
                    let more = if slopes { ", %a" } else { "" };
                    let line = format!("%y = cached_attention %q, %k, %v, %s, %p{more} scale=0.35 window={window}");
                    assert_equal(&line, &inputs, &format!("{b} {new} {columns} {h} {k} {d} {rows:?} {place}"));
                }
            }
        }
    }
}

/// A step over the cache is the last place of attention over all of it.
#[test]
fn a_step_is_the_last_place_of_the_whole() {
    let shape = [2, 90, 4, 2, 16];
    for (rows, window, slopes) in [(Rows::Left, 0, true), (Rows::Whole, 16, false), (Rows::Packed, 40, true)] {
        let mut inputs = operands(shape, rows, slopes);
        let [whole, _] = both(&lines(true, window, slopes)[0], &inputs);
        let query = inputs[0].1.to_f64();
        let inner = shape[2] * shape[4];
        let last = |all: &[f64]| -> Vec<f64> {
            (0..shape[0]).flat_map(|b| all[(b * shape[1] + shape[1] - 1) * inner..][..inner].to_vec()).collect()
        };
        let new = last(&query).into_iter().map(|x| x as f32).collect();
        inputs[0].1 = Tensor::f32(&[shape[0], 1, shape[2], shape[4]], new);
        inputs.retain(|(name, _)| *name != "g");
        inputs.push(("p", Tensor::i32(&[], vec![shape[1] as i32 - 1])));
        let more = if slopes { ", %a" } else { "" };
        let line = format!("%y = cached_attention %q, %k, %v, %s, %p{more} scale=0.35 window={window}");
        let [step, _] = both(&line, &inputs);
        for (a, b) in step[0].to_f64().into_iter().zip(last(&whole[0].to_f64())) {
            assert!(near(a, b, 1e-5), "{rows:?}: {a}, expected {b}");
        }
    }
}
