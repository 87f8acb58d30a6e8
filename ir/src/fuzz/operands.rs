//! Operands and attributes that fit.

use super::Draw;
use crate::dim::Dim;
use crate::graph::Value;
use crate::op::Op;
use crate::types::{DType, Type};

impl Draw<'_> {
    /// A value of any type; mostly a late one, so that ops meet.
    pub(super) fn value(&mut self) -> Value {
        self.find(|_| true).expect("there are inputs")
    }

    /// A value for which something holds, if there is one.
    pub(super) fn find(&mut self, holds: impl Fn(&Type) -> bool) -> Option<Value> {
        let all: Vec<Value> =
            self.graph.values().filter(|v| holds(self.graph.ty(*v)) && !self.hidden.contains(v)).collect();
        (!all.is_empty()).then(|| {
            let among = self.rng.choose(&[all.len(), all.len().min(6), 1]);
            all[all.len() - 1 - self.rng.below(among)]
        })
    }

    pub(super) fn any(&mut self, dtype: DType) -> Value {
        self.find(|ty| ty.dtype == dtype).expect("there is an input of every element type")
    }

    pub(super) fn any_with_dims(&mut self, dtype: DType) -> Value {
        self.find(|ty| ty.dtype == dtype && ty.rank() > 0).expect("`x` and `tokens` have dims")
    }

    pub(super) fn number(&mut self) -> Value {
        let dtype = self.rng.choose(&[DType::F32, DType::F32, DType::I32]);
        self.any_or_constant(dtype)
    }

    pub(super) fn number_or_truth(&mut self) -> Value {
        let dtype = self.rng.choose(&[DType::F32, DType::I32, DType::Bool]);
        self.any_or_constant(dtype)
    }

    pub(super) fn any_or_constant(&mut self, dtype: DType) -> Value {
        if self.rng.once_in(5) { self.constant(dtype) } else { self.any(dtype) }
    }

    pub(super) fn same_as(&mut self, value: Value) -> Value {
        self.value_of(&self.ty(value))
    }

    /// A value of a type: one that is there, or a stretched smaller one.
    pub(super) fn value_of(&mut self, ty: &Type) -> Value {
        if !self.rng.once_in(4)
            && let Some(found) = self.find(|t| t == ty)
        {
            return found;
        }
        let stretches = |t: &Type| t.dtype == ty.dtype && crate::infer::broadcasts(&t.dims, &ty.dims).is_ok();
        let small = match self.find(stretches) {
            Some(found) if !self.rng.once_in(3) || ty.dtype == DType::Key => found,
            _ => self.constant(ty.dtype),
        };
        if self.ty(small) == *ty {
            return small;
        }
        self.must(Op::Broadcast { shape: ty.dims.clone() }, &[small])
    }

    pub(super) fn constant(&mut self, dtype: DType) -> Value {
        let value = match dtype {
            DType::Bool => self.rng.choose(&[0.0, 1.0]),
            DType::I32 => self.rng.between(-2, 3) as f64,
            DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) | DType::Key => {
                self.rng.choose(&[0.0, -0.0, 1.0, -1.0, 2.0, 0.1, -1.75])
            }
        };
        self.must(Op::Const { value, dtype }, &[])
    }

    /// Integers clamped to `0..rows`.
    pub(super) fn below(&mut self, indices: Value, rows: i64) -> Value {
        let dims = self.ty(indices).dims;
        let [low, high] = [0, rows - 1].map(|n| {
            let scalar = self.must(Op::Const { value: n as f64, dtype: DType::I32 }, &[]);
            self.must(Op::Broadcast { shape: dims.clone() }, &[scalar])
        });
        let indices = self.must(Op::Max {}, &[indices, low]);
        self.must(Op::Min {}, &[indices, high])
    }

    pub(super) fn at_least_one(&mut self, x: Value) -> Value {
        let scalar = self.must(Op::Const { value: 1.0, dtype: DType::I32 }, &[]);
        let one = self.must(Op::Broadcast { shape: self.ty(x).dims }, &[scalar]);
        self.must(Op::Max {}, &[x, one])
    }

    /// Mostly applies an op that keeps numbers where the next op is finite; else most outputs would be NaN.
    pub(super) fn tame(&mut self, op: Op, x: Value) -> Value {
        if self.rng.once_in(5) { x } else { self.must(op, &[x]) }
    }

    // Attributes.

    pub(super) fn dim(&mut self) -> Dim {
        match self.rng.below(6) {
            0 => Dim::symbol("B"),
            1 | 2 => Dim::symbol("T"),
            3 => Dim::symbol("N"),
            _ => Dim::from(self.rng.between(1, 3)),
        }
    }

    pub(super) fn dims(&mut self) -> Vec<Dim> {
        (0..self.rng.below(4)).map(|_| self.dim()).collect()
    }

    pub(super) fn axis(&mut self, x: Value) -> Option<usize> {
        let rank = self.ty(x).rank();
        (rank > 0).then(|| self.rng.below(rank))
    }

    /// A permutation, the identity now and then.
    pub(super) fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.rng.below(i + 1));
        }
        order
    }

    /// Other dims with the same elements: neighbours joined, ones put in.
    pub(super) fn regrouped(&mut self, dims: &[Dim]) -> Vec<Dim> {
        let mut out: Vec<Dim> = Vec::new();
        for dim in dims {
            match out.last_mut() {
                Some(last) if self.rng.once_in(2) => *last = &*last * dim,
                _ => out.push(dim.clone()),
            }
        }
        if self.rng.once_in(3) {
            out.insert(self.rng.below(out.len() + 1), Dim::from(1i64));
        }
        out
    }
}
