//! Ops that move elements without arithmetic, for every type of element.

use dsgc_ir::{DType, Data, Tensor};

use super::real::Real;

/// Distances between neighbours along each dim of a row-major tensor.
pub(crate) fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect()
}

/// The offset of every place of `shape` in row-major order, under any strides.
pub(crate) fn offsets(shape: &[usize], strides: &[usize]) -> Vec<usize> {
    let mut all = vec![0];
    for (&extent, &stride) in shape.iter().zip(strides) {
        let mut inner = Vec::with_capacity(all.len() * extent);
        all.iter().for_each(|base| inner.extend((0..extent).map(|i| base + i * stride)));
        all = inner;
    }
    all
}

/// Products of the extents before and after a dim.
pub(crate) fn around(shape: &[usize], axis: usize) -> (usize, usize) {
    (shape[..axis].iter().product(), shape[axis + 1..].iter().product())
}

/// Zeros, false, or keys of zeros.
pub(crate) fn zeros<F: Real>(dtype: DType, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    let data = match dtype {
        DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => F::into_data(vec![F::zero(); n]),
        DType::I32 => Data::I32(vec![0; n]),
        DType::Bool => Data::Bool(vec![false; n]),
        DType::Key => Data::Key(vec![[0; 2]; n]),
    };
    Tensor::new(shape, data)
}

/// A tensor whose element `i` is element `from[i]` of another, or zero.
fn pick(tensor: &Tensor, shape: &[usize], from: &[Option<usize>]) -> Tensor {
    fn each<T: Copy + Default>(all: &[T], from: &[Option<usize>]) -> Vec<T> {
        from.iter().map(|at| at.map_or(T::default(), |i| all[i])).collect()
    }
    let data = match &tensor.data {
        Data::F32(v) => Data::F32(each(v, from)),
        Data::F64(v) => Data::F64(each(v, from)),
        Data::I32(v) => Data::I32(each(v, from)),
        Data::Bool(v) => Data::Bool(each(v, from)),
        Data::Key(v) => Data::Key(each(v, from)),
    };
    Tensor::new(shape, data)
}

fn pick_all(tensor: &Tensor, shape: &[usize], from: Vec<usize>) -> Tensor {
    pick(tensor, shape, &from.into_iter().map(Some).collect::<Vec<_>>())
}

pub(crate) fn reshape(x: &Tensor, shape: &[usize]) -> Tensor {
    Tensor::new(shape, x.data.clone())
}

/// Stretches dims that are 1 and adds leading ones.
pub(crate) fn broadcast(x: &Tensor, shape: &[usize]) -> Tensor {
    let own = strides(&x.shape);
    let lead = shape.len() - x.shape.len();
    let steps: Vec<usize> =
        (0..shape.len()).map(|i| if i < lead || x.shape[i - lead] == 1 { 0 } else { own[i - lead] }).collect();
    pick_all(x, shape, offsets(shape, &steps))
}

pub(crate) fn transpose(x: &Tensor, shape: &[usize], order: &[usize]) -> Tensor {
    let own = strides(&x.shape);
    let steps: Vec<usize> = order.iter().map(|&i| own[i]).collect();
    pick_all(x, shape, offsets(shape, &steps))
}

/// The places from `start` on along one dim; as many as the result has there. Places outside of the operand are
/// zeros, so a negative start pads.
pub(crate) fn window(x: &Tensor, shape: &[usize], axis: usize, start: i64) -> Tensor {
    let (outer, inner) = around(&x.shape, axis);
    let (extent, own) = (shape[axis], x.shape[axis]);
    let mut from = Vec::with_capacity(outer * extent * inner);
    for o in 0..outer {
        for i in 0..extent {
            let place = usize::try_from(start + i as i64).ok().filter(|&p| p < own);
            from.extend((0..inner).map(|k| place.map(|p| (o * own + p) * inner + k)));
        }
    }
    pick(x, shape, &from)
}

/// `x` with the places from `first` along `axis` replaced by all of `new`.
pub(crate) fn replaced(x: &Tensor, new: &Tensor, axis: usize, first: usize) -> Tensor {
    fn each<T: Copy>(x: &[T], new: &[T], (extent, len, first, inner): (usize, usize, usize, usize)) -> Vec<T> {
        let mut out = x.to_vec();
        for (i, block) in new.chunks((len * inner).max(1)).enumerate() {
            let at = (i * extent + first) * inner;
            out[at..at + block.len()].copy_from_slice(block);
        }
        out
    }
    let (_, inner) = around(&x.shape, axis);
    let sizes = (x.shape[axis], new.shape[axis], first, inner);
    let data = match (&x.data, &new.data) {
        (Data::F32(x), Data::F32(new)) => Data::F32(each(x, new, sizes)),
        (Data::F64(x), Data::F64(new)) => Data::F64(each(x, new, sizes)),
        (Data::I32(x), Data::I32(new)) => Data::I32(each(x, new, sizes)),
        (Data::Bool(x), Data::Bool(new)) => Data::Bool(each(x, new, sizes)),
        (Data::Key(x), Data::Key(new)) => Data::Key(each(x, new, sizes)),
        _ => panic!("bug: `write_at` of operands of two types"),
    };
    Tensor::new(&x.shape, data)
}

pub(crate) fn concat<F: Real>(args: &[&Tensor], shape: &[usize], axis: usize) -> Tensor {
    let (outer, inner) = around(shape, axis);
    // All operands in one row, of which each outer place then takes its part.
    let mut bases = Vec::new();
    let mut all = zeros::<F>(args[0].dtype(), &[0]);
    for arg in args {
        bases.push(all.len());
        append(&mut all.data, &arg.data);
    }
    all.shape = vec![all.len()];
    let mut from = Vec::new();
    for o in 0..outer {
        for (arg, base) in args.iter().zip(&bases) {
            let part = arg.shape[axis] * inner;
            from.extend((0..part).map(|i| base + o * part + i));
        }
    }
    pick_all(&all, shape, from)
}

fn append(to: &mut Data, more: &Data) {
    match (to, more) {
        (Data::F32(to), Data::F32(more)) => to.extend(more),
        (Data::F64(to), Data::F64(more)) => to.extend(more),
        (Data::I32(to), Data::I32(more)) => to.extend(more),
        (Data::Bool(to), Data::Bool(more)) => to.extend(more),
        (Data::Key(to), Data::Key(more)) => to.extend(more),
        (to, more) => panic!("bug: joins {to:?} and {more:?}"),
    }
}

/// `a` where the condition holds, else `b`.
pub(crate) fn choose(condition: &[bool], a: &Tensor, b: &Tensor) -> Tensor {
    let mut both = a.clone();
    append(&mut both.data, &b.data);
    both.shape = vec![both.len()];
    let n = a.len();
    pick_all(&both, &a.shape, condition.iter().enumerate().map(|(i, &c)| if c { i } else { n + i }).collect())
}
