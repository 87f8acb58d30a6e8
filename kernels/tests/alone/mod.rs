//! An elementwise op alone and as a step of a region.

use dsgc_ir::{Program, Tensor, Value};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::Cpu;

use super::check;

/// What ran, on what, and the bits of the op's results on both lists of operands; NaN is one number.
#[allow(dead_code)] // One of the two tests asks for the bits only.
pub struct Ran {
    pub program: Program,
    pub inputs: Vec<(String, Tensor)>,
    pub bits: [Vec<u64>; 2],
}

/// Runs an op on two lists of operands alone and in a region, on all pairs of some numbers for `A` and `B`, and a mask
/// `C`. Twice in one region, so that arithmetic is compiled. The region has the bits of the op.
pub fn same_bits(dtype: &str, numbers: &[f64], [name, attribute]: [&str; 2], operands: [&str; 2]) -> Ran {
    let n = numbers.len() * numbers.len();
    let named =
        |text: &str, names: [&str; 3]| text.replace('A', names[0]).replace('B', names[1]).replace('C', names[2]);
    let [x, y] = operands.map(|o| named(o, ["%a", "%b", "%c"]));
    // The region uses all its operands.
    let [in_x, in_y] = operands.map(|o| named(o, ["$0", "$1", "$2"]));
    let (args, first) = if x.contains("%c") { ("%a, %b, %c", 3) } else { ("%a, %b", 2) };
    let second = first + 1;
    let text = format!(
        "graph @g(%a: {dtype}[{n}], %b: {dtype}[{n}], %c: bool[{n}]) {{
           %p = {name} {x} {attribute}
           %q = {name} {y} {attribute}
           %r, %s = fused {args} shape=[{n}] body={{${first} = {name} {in_x} {attribute}; ${second} = {name} {in_y} {attribute}; return ${first}, ${second}}}
           return p=%p, q=%q, r=%r, s=%s
         }}"
    );
    let program = dsgc_ir::parse(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
    let all = |pick: &dyn Fn(usize) -> f64| (0..n).map(pick).collect::<Vec<f64>>();
    let given = [
        all(&|i| numbers[i / numbers.len()]),
        all(&|i| numbers[i % numbers.len()]),
        all(&|i| f64::from(u8::from(i % 3 == 0))),
    ];
    let graph = &program.graphs[0];
    let tensor =
        |(v, numbers): (Value, &Vec<f64>)| (graph.name_of(v).to_string(), check::tensor(graph.ty(v), numbers).single());
    let inputs: Vec<(String, Tensor)> = graph.inputs().zip(&given).map(tensor).collect();
    let outputs = Cpu::new(check::plan(&program, 1), 1).run("g", &by_name(&inputs)).unwrap_or_else(|e| panic!("{e:?}"));
    let [p, q, r, s] = [0, 1, 2, 3].map(|i| bits(&outputs[i].1));
    assert_eq!((&p, &q), (&r, &s), "{name} {attribute} of {dtype}");
    Ran { program, inputs, bits: [p, q] }
}

/// Inputs as a device takes them.
pub fn by_name(inputs: &[(String, Tensor)]) -> Vec<(&str, &Tensor)> {
    inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect()
}

/// The bits of a tensor's numbers, with one NaN.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    tensor.to_f64().iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() }).collect()
}
