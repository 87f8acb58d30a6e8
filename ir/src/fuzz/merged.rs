//! Ops over many operands, and the ops apart that the pass `merge` makes them of.

use super::{Draw, plain};
use crate::dim::Dim;
use crate::graph::Value;
use crate::op::Op;
use crate::types::{DType, Type};

impl Draw<'_> {
    /// Products with one operand in common, in one op or apart.
    pub(super) fn contract_each(&mut self) {
        let x = self.any_with_dims(DType::F32);
        let dims = self.ty(x).dims;
        let own: String = ('a'..='z').take(dims.len()).collect();
        let kept = self.rng.below(dims.len());
        let (summed, out) = own.split_at(own.len() - kept);
        let common = self.rng.below(2);
        let other = format!("z{summed}");
        let (lhs, rhs) = if common == 0 { (&own, &other) } else { (&other, &own) };
        let spec = format!("{lhs},{rhs}->{out}z");
        let mut others = Vec::new();
        for _ in 0..self.rng.between(1, 3) {
            let first = self.dim();
            let ty = Type::new(DType::F32, [&[first], &dims[..summed.len()]].concat());
            others.push(self.value_of(&ty));
        }
        if self.rng.once_in(2) {
            self.push(Op::ContractEach { spec, common }, &[vec![x], others].concat());
        } else {
            for other in others {
                let args = if common == 0 { [x, other] } else { [other, x] };
                self.push(Op::Contract { spec: spec.clone() }, &args);
            }
        }
    }

    /// Products with one operand in common that are finished by bodies.
    pub(super) fn contract_fused(&mut self) {
        let x = self.any_with_dims(DType::F32);
        let dims = self.ty(x).dims;
        let own: String = ('a'..='z').take(dims.len()).collect();
        let kept = self.rng.below(dims.len());
        let (summed, out) = own.split_at(own.len() - kept);
        let common = self.rng.below(2);
        let other = format!("z{summed}");
        let (lhs, rhs) = if common == 0 { (&own, &other) } else { (&other, &own) };
        let out = if self.rng.once_in(2) { format!("{out}z") } else { format!("z{out}") };
        let spec = format!("{lhs},{rhs}->{out}");
        let (mut others, mut operands, mut bodies) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.rng.between(1, 3) {
            let first = self.dim();
            let kept = &dims[summed.len()..];
            let rows = if out.starts_with('z') {
                [std::slice::from_ref(&first), kept].concat()
            } else {
                [kept, std::slice::from_ref(&first)].concat()
            };
            if !self.fits(&Type::new(DType::F32, rows.clone())) {
                return;
            }
            others.push(self.value_of(&Type::new(DType::F32, [&[first], &dims[..summed.len()]].concat())));
            let mut dtypes = vec![DType::F32];
            for _ in 0..self.rng.below(3) {
                let from = self.rng.below(rows.len() + 1);
                let dtype = self.rng.choose(&[DType::F32, DType::F32, DType::I32, DType::Bool]);
                operands.push(self.value_of(&Type::new(dtype, &rows[from..])));
                dtypes.push(dtype);
            }
            bodies.push(super::region::random_body(self.rng, &dtypes, None));
        }
        self.push(Op::ContractFused { spec, common, bodies }, &[vec![x], others, operands].concat());
    }

    /// A sum of sums of squares, in one op or apart.
    pub(super) fn sum_squares(&mut self) {
        let tensors: Vec<Value> = (0..self.rng.between(1, 4)).map(|_| self.any(DType::F32)).collect();
        if self.rng.once_in(2) {
            self.push(Op::SumSquares {}, &tensors);
            return;
        }
        let mut sums = tensors.into_iter().map(|x| {
            let shape = vec![self.ty(x).len()];
            let flat = self.must(Op::Reshape { shape }, &[x]);
            self.must(Op::Contract { spec: "a,a->".into() }, &[flat, flat])
        });
        let sums: Vec<Value> = sums.by_ref().collect();
        let mut sum = sums[0];
        for &more in &sums[1..] {
            let args = if self.rng.once_in(2) { [sum, more] } else { [more, sum] };
            sum = self.must(Op::Add {}, &args);
        }
    }

    /// A table with rows added to it, in one op or apart.
    pub(super) fn add_rows(&mut self) {
        let rows = Dim::from(self.rng.between(1, 4));
        let grad = self.any_with_dims(DType::F32);
        let (width, lead) =
            self.ty(grad).dims.split_last().map(|(w, lead)| (w.clone(), lead.to_vec())).expect("it has dims");
        let indices = self.value_of(&Type::new(DType::I32, lead));
        let indices = self.below(indices, rows.constant().expect("it is a number"));
        let x = self.value_of(&Type::new(DType::F32, [rows.clone(), width]));
        if self.rng.once_in(2) {
            self.push(Op::AddRows {}, &[x, indices, grad]);
        } else {
            let added = self.must(Op::EmbedGrad { rows }, &[indices, grad]);
            let args = if self.rng.once_in(2) { [x, added] } else { [added, x] };
            self.push(plain("add"), &args);
        }
    }

    /// Log-probabilities of a head, in one op or apart; with gradients whose own gradient is known beforehand, or is not.
    pub(super) fn head_logp(&mut self, grad: bool) {
        let x = self.any_with_dims(DType::F32);
        // Single precision holds few digits of the probabilities of large logits, and fewer of gradients that sum to zero.
        let x = self.must(Op::Tanh {}, &[x]);
        let dims = self.ty(x).dims;
        let (width, lead) = dims.split_last().expect("it has dims");
        let vocabulary = self.rng.between(1, 4);
        let head = self.value_of(&Type::new(DType::F32, [Dim::from(vocabulary), width.clone()]));
        let head = self.must(Op::Tanh {}, &[head]);
        let tokens = self.value_of(&Type::new(DType::I32, lead));
        let tokens = self.below(tokens, vocabulary);
        let of_logp = self.value_of(&Type::new(DType::F32, lead));
        let of_logp = self.must(Op::Tanh {}, &[of_logp]);
        if !self.fits(&Type::new(DType::F32, [lead, &[Dim::from(vocabulary)]].concat())) {
            return;
        }
        if self.rng.once_in(2) {
            let op = if grad { Op::HeadLogpGrad { head: self.rng.once_in(2) } } else { Op::HeadLogp {} };
            self.push(op, &[x, head, tokens, of_logp][..if grad { 4 } else { 3 }]);
            return;
        }
        let spec = |text: &str| text.replace('_', &"abcefgh"[..lead.len()]);
        let logits = self.must(Op::Contract { spec: spec("_d,vd->_v") }, &[x, head]);
        let logp = self.must(Op::TokenLogp {}, &[logits, tokens]);
        if grad {
            // The loss may be anything of the log-probabilities; only its gradient must not.
            let loss = self.must(Op::Tanh {}, &[logp]);
            let of_logp = if self.rng.once_in(4) { loss } else { of_logp };
            let gradient = self.must(Op::TokenLogpGrad {}, &[logits, tokens, of_logp]);
            self.must(Op::Contract { spec: spec("_v,vd->_d") }, &[gradient, head]);
            if self.rng.once_in(2) {
                self.must(Op::Contract { spec: spec("_v,_d->vd") }, &[gradient, x]);
            }
        }
    }

    /// An optimizer's step for one or more parameters, in one op or apart.
    pub(super) fn adamw(&mut self) {
        let (rate, clip) = (self.value_of(&Type::scalar(DType::F32)), self.value_of(&Type::scalar(DType::F32)));
        let step = self.value_of(&Type::scalar(DType::I32));
        let settings = [rate, self.at_least_one(step), clip];
        let op = Op::Adamw { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: self.rng.choose(&[0.0, 0.1]) };
        let each: Vec<[Value; 4]> = (0..self.rng.between(1, 3))
            .map(|_| {
                let param = self.any(DType::F32);
                let (grad, first, second) = (self.same_as(param), self.same_as(param), self.same_as(param));
                [param, grad, first, self.tame(Op::Abs {}, second)]
            })
            .collect();
        if self.rng.once_in(2) {
            self.push(op, &[&each.concat()[..], &settings].concat());
        } else {
            for of in each {
                self.push(op.clone(), &[&of[..], &settings].concat());
            }
        }
    }
}
