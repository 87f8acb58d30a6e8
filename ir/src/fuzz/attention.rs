//! Attention, its gradient, and attention over a cache.

use super::Draw;
use crate::dim::Dim;
use crate::graph::Value;
use crate::op::Op;
use crate::types::{DType, Type};

impl Draw<'_> {
    pub(super) fn cached_attention(&mut self) {
        let (heads, group) = (self.rng.between(1, 2), self.rng.between(1, 2));
        let (new, columns) = (self.rng.between(1, 2), self.rng.between(2, 4));
        let (rows, width) = (self.dim(), self.dim());
        let split = |places: i64, heads: i64| {
            Type::new(DType::F32, [rows.clone(), Dim::from(places), Dim::from(heads), width.clone()])
        };
        let (queries, keys) = (split(new, heads * group), split(columns, heads));
        if !self.fits(&queries) || !self.fits(&keys) {
            return;
        }
        let segment = Type::new(DType::I32, [rows.clone(), Dim::from(columns)]);
        let mut args: Vec<Value> = [&queries, &keys, &keys, &segment].into_iter().map(|ty| self.value_of(ty)).collect();
        let place = self.value_of(&Type::scalar(DType::I32));
        args.push(self.below(place, columns - new + 1));
        args.extend(self.slopes(heads * group));
        let (scale, window) = (self.rng.choose(&[0.5, 1.0]), self.rng.below(3));
        self.push(Op::CachedAttention { scale, window }, &args);
    }

    pub(super) fn attention(&mut self, grad: bool) {
        let (heads, group) = (self.rng.between(1, 2), self.rng.between(1, 2));
        let (lead, width) = ([self.dim(), self.dim()], self.dim());
        let split = |n| Type::new(DType::F32, [&lead[..], &[Dim::from(n), width.clone()]].concat());
        let (queries, keys) = (split(heads * group), split(heads));
        let segment = Type::new(DType::I32, lead.to_vec());
        if !self.fits(&queries) {
            return;
        }
        let (causal, scale) = (self.rng.once_in(2), self.rng.choose(&[0.5, 1.0]));
        let mut args: Vec<Value> = [&queries, &keys, &keys, &segment].into_iter().map(|ty| self.value_of(ty)).collect();
        let (window, slopes) = (self.rng.below(3), self.slopes(heads * group));
        args.extend(slopes);
        let forward = self.push(Op::Attention { causal, scale, window }, &args);
        // The logarithm of its divisor is there for the gradient, and has none itself.
        self.hidden.extend(forward.get(1));
        if grad && !forward.is_empty() {
            args.truncate(4);
            args.extend(forward);
            args.push(self.value_of(&queries));
            args.extend(slopes);
            self.push(Op::AttentionGrad { causal, scale, window }, &args);
        }
    }

    /// Slopes of so many heads, or nothing. They are settings, which have no gradient.
    pub(super) fn slopes(&mut self, heads: i64) -> Option<Value> {
        self.rng.once_in(2).then(|| {
            let slopes = self.value_of(&Type::new(DType::F32, [Dim::from(heads)]));
            self.must(Op::Stop {}, &[slopes])
        })
    }
}
