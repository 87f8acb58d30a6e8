//! The composites, by their formulas.

use dsgc_ir::Tensor;
use dsgc_ir::segment::counts;

use super::eval::{floats, ints, tensor};
use super::real::Real;

pub(super) type Results = Result<Vec<Tensor>, String>;

/// The row of a table, or why there is none.
fn row_of(index: i32, rows: usize, what: &str) -> Result<usize, String> {
    usize::try_from(index)
        .ok()
        .filter(|&i| i < rows)
        .ok_or_else(|| format!("found {what} {index}, expected one of 0 to {} ({rows} rows)", rows as i64 - 1))
}

pub(super) fn embed<F: Real>(table: &Tensor, indices: &Tensor, shape: &[usize]) -> Results {
    let (rows, width) = (table.shape[0], table.shape[1]);
    let all = floats::<F>(table);
    let mut out = Vec::with_capacity(indices.len() * width);
    for &index in ints(indices) {
        let at = row_of(index, rows, "index")? * width;
        out.extend_from_slice(&all[at..at + width]);
    }
    Ok(vec![tensor(shape, out)])
}

pub(super) fn embed_grad<F: Real>(indices: &Tensor, grad: &Tensor, shape: &[usize]) -> Results {
    let (rows, width) = (shape[0], shape[1]);
    let all = floats::<F>(grad);
    let mut out = vec![F::zero(); rows * width];
    for (i, &index) in ints(indices).iter().enumerate() {
        let at = row_of(index, rows, "index")? * width;
        for k in 0..width {
            out[at + k] = out[at + k] + all[i * width + k];
        }
    }
    Ok(vec![tensor(shape, out)])
}

/// Mean and `1 / sqrt(var + eps)` of a row.
fn moments<F: Real>(row: &[F], eps: f64) -> (F, F) {
    let n = F::of(row.len() as f64);
    let mean = sum(row.iter().copied()) / n;
    let variance = sum(row.iter().map(|&x| (x - mean) * (x - mean))) / n;
    (mean, F::of(1.0) / (variance + F::of(eps)).sqrt())
}

pub(super) fn sum<F: Real>(all: impl Iterator<Item = F>) -> F {
    all.fold(F::zero(), |a, b| a + b)
}

pub(super) fn layer_norm<F: Real>(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Results {
    let (weight, bias) = (floats::<F>(weight), floats::<F>(bias));
    let mut out = Vec::with_capacity(x.len());
    for row in floats::<F>(x).chunks(weight.len().max(1)) {
        let (mean, inverse) = moments(row, eps);
        out.extend(row.iter().zip(weight).zip(bias).map(|((&x, &w), &b)| (x - mean) * inverse * w + b));
    }
    Ok(vec![tensor(&x.shape, out)])
}

/// With `n = (x - mean) * inverse` and `h = grad * weight`:
/// `dx = inverse * (h - mean(h) - n * mean(h * n))`, `dw = sum grad * n`, `db = sum grad`.
pub(super) fn layer_norm_grad<F: Real>(x: &Tensor, weight: &Tensor, grad: &Tensor, eps: f64) -> Results {
    let shape = &weight.shape;
    let weight = floats::<F>(weight);
    let (width, n) = (weight.len(), F::of(weight.len() as f64));
    let (mut dx, mut dw, mut db) = (Vec::new(), vec![F::zero(); width], vec![F::zero(); width]);
    for (row, grad) in floats::<F>(x).chunks(width.max(1)).zip(floats::<F>(grad).chunks(width.max(1))) {
        let (mean, inverse) = moments(row, eps);
        let normal: Vec<F> = row.iter().map(|&x| (x - mean) * inverse).collect();
        let h: Vec<F> = grad.iter().zip(weight).map(|(&g, &w)| g * w).collect();
        let mean_h = sum(h.iter().copied()) / n;
        let mean_hn = sum(h.iter().zip(&normal).map(|(&h, &x)| h * x)) / n;
        for i in 0..width {
            dx.push(inverse * (h[i] - mean_h - normal[i] * mean_hn));
            dw[i] = dw[i] + grad[i] * normal[i];
            db[i] = db[i] + grad[i];
        }
    }
    Ok(vec![tensor(&x.shape, dx), tensor(shape, dw), tensor(shape, db)])
}

/// `1 / sqrt(mean(x^2) + eps)` of a row.
fn inverse_rms<F: Real>(row: &[F], eps: f64) -> F {
    let n = F::of(row.len() as f64);
    F::of(1.0) / (sum(row.iter().map(|&x| x * x)) / n + F::of(eps)).sqrt()
}

pub(super) fn rms_norm<F: Real>(x: &Tensor, weight: &Tensor, eps: f64) -> Results {
    let weight = floats::<F>(weight);
    let mut out = Vec::with_capacity(x.len());
    for row in floats::<F>(x).chunks(weight.len().max(1)) {
        let inverse = inverse_rms(row, eps);
        out.extend(row.iter().zip(weight).map(|(&x, &w)| x * inverse * w));
    }
    Ok(vec![tensor(&x.shape, out)])
}

/// With `n = x * inverse` and `h = grad * weight`: `dx = inverse * (h - n * mean(h * n))`, `dw = sum grad * n`.
pub(super) fn rms_norm_grad<F: Real>(x: &Tensor, weight: &Tensor, grad: &Tensor, eps: f64) -> Results {
    let shape = &weight.shape;
    let weight = floats::<F>(weight);
    let (width, n) = (weight.len(), F::of(weight.len() as f64));
    let (mut dx, mut dw) = (Vec::new(), vec![F::zero(); width]);
    for (row, grad) in floats::<F>(x).chunks(width.max(1)).zip(floats::<F>(grad).chunks(width.max(1))) {
        let inverse = inverse_rms(row, eps);
        let mean = sum((0..width).map(|i| grad[i] * weight[i] * row[i] * inverse)) / n;
        for i in 0..width {
            let normal = row[i] * inverse;
            dx.push(inverse * (grad[i] * weight[i] - normal * mean));
            dw[i] = dw[i] + grad[i] * normal;
        }
    }
    Ok(vec![tensor(&x.shape, dx), tensor(shape, dw)])
}

/// Pairs `(x[i], x[i + D/2])` turned by `position * freq[i]`; back if `inverse`. Angles are taken in double precision.
pub(super) fn rope<F: Real>(x: &Tensor, positions: &Tensor, freq: &Tensor, inverse: bool) -> Results {
    let (heads, width) = (x.shape[2], x.shape[3]);
    let half = width / 2;
    let (all, freq) = (floats::<F>(x), floats::<F>(freq));
    let mut out = vec![F::zero(); all.len()];
    for (t, &position) in ints(positions).iter().enumerate() {
        for h in 0..heads {
            let at = (t * heads + h) * width;
            for i in 0..half {
                let angle = f64::from(position) * freq[i].wide();
                let (sin, cos) = if inverse { (-angle).sin_cos() } else { angle.sin_cos() };
                let (sin, cos) = (F::of(sin), F::of(cos));
                let (a, b) = (all[at + i], all[at + half + i]);
                out[at + i] = a * cos - b * sin;
                out[at + half + i] = b * cos + a * sin;
            }
        }
    }
    Ok(vec![tensor(&x.shape, out)])
}

/// The log of the softmax's divisor of a row.
fn log_divisor<F: Real>(row: &[F]) -> F {
    let most = row.iter().fold(F::of(f64::NEG_INFINITY), |a, &b| a.larger(b));
    most + sum(row.iter().map(|&x| (x - most).exp())).ln()
}

pub(super) fn token_logp<F: Real>(logits: &Tensor, tokens: &Tensor) -> Results {
    let width = logits.shape.last().copied().unwrap_or(0);
    let mut out = Vec::with_capacity(tokens.len());
    for (i, &token) in ints(tokens).iter().enumerate() {
        let row = &floats::<F>(logits)[i * width..(i + 1) * width];
        out.push(row[row_of(token, width, "token")?] - log_divisor(row));
    }
    Ok(vec![tensor(&tokens.shape, out)])
}

/// `grad * (one at the token - softmax)`.
pub(super) fn token_logp_grad<F: Real>(logits: &Tensor, tokens: &Tensor, grad: &Tensor) -> Results {
    let width = logits.shape.last().copied().unwrap_or(0);
    let mut out = Vec::with_capacity(logits.len());
    for (i, (&token, &g)) in ints(tokens).iter().zip(floats::<F>(grad)).enumerate() {
        let row = &floats::<F>(logits)[i * width..(i + 1) * width];
        let (at, divisor) = (row_of(token, width, "token")?, log_divisor(row));
        for (k, &x) in row.iter().enumerate() {
            let one = if k == at { F::of(1.0) } else { F::zero() };
            out.push(g * (one - (x - divisor).exp()));
        }
    }
    Ok(vec![tensor(&logits.shape, out)])
}

/// How many places before this one, in the same row, are of its text; on padding, how many there are.
pub(super) fn position_in(segment: &Tensor) -> Results {
    let places = segment.shape[1];
    let mut out = Vec::with_capacity(segment.len());
    for row in ints(segment).chunks(places.max(1)) {
        out.extend((0..row.len()).map(|t| row[..t].iter().filter(|&&s| counts(row[t], s)).count() as i32));
    }
    Ok(vec![Tensor::i32(&segment.shape, out)])
}

/// Settings of the optimizer.
#[derive(Clone, Copy)]
pub(super) struct Adam {
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) decay: f64,
}

/// As `torch.optim.AdamW`: factors that are the same for all elements are computed in double precision.
pub(super) fn adamw<F: Real>(args: &[&Tensor], settings: Adam) -> Results {
    let Adam { beta1, beta2, eps, decay } = settings;
    let (p, g, m, v) = (floats::<F>(args[0]), floats::<F>(args[1]), floats::<F>(args[2]), floats::<F>(args[3]));
    let (rate, step, factor) = (args[4].scalar(), args[5].scalar(), floats::<F>(args[6])[0]);
    let (correction1, correction2) = (1.0 - beta1.powf(step), 1.0 - beta2.powf(step));
    let (keep, step_size, root) = (F::of(1.0 - rate * decay), F::of(rate / correction1), F::of(correction2.sqrt()));
    let mut out: [Vec<F>; 3] = Default::default();
    for i in 0..p.len() {
        let g = g[i] * factor;
        let m = F::of(beta1) * m[i] + F::of(1.0 - beta1) * g;
        let v = F::of(beta2) * v[i] + F::of(1.0 - beta2) * g * g;
        out[0].push(p[i] * keep - step_size * m / (v.sqrt() / root + F::of(eps)));
        out[1].push(m);
        out[2].push(v);
    }
    Ok(out.into_iter().map(|all| tensor(&args[0].shape, all)).collect())
}
