//! Dims: extents that may be symbolic.
//!
//! A [`Dim`] is a polynomial with integer coefficients over named symbols (`B`, `T`, `2*N`, `L-A-1`, `B*T`), kept in
//! normal form so that equality is structural. Symbols have ranges declared in the program; their values are bound
//! when a graph is launched. There are no data-dependent dims: lengths are values and masks, capacity is a dim.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Add, Mul, Neg, Sub};
use std::sync::Arc;

/// Name of a dim symbol, e.g. `B`.
pub type Symbol = Arc<str>;

/// The values of symbols at one launch (or their upper bounds, when memory is planned).
pub type Bindings = BTreeMap<Symbol, i64>;

/// An extent: a sum of products of symbols, in normal form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim(Form);

/// The normal form. Passes copy dims many times: a number is copied without memory of its own, and sums are shared.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Form {
    /// A sum without symbols.
    Constant(i64),
    /// A sum with symbols.
    Sum(Arc<[Term]>),
}

/// Product of symbols (sorted, the empty one is the constant), and coefficient, never zero. Terms are sorted by product.
type Term = (Vec<Symbol>, i64);

impl Default for Dim {
    fn default() -> Dim {
        Dim(Form::Constant(0))
    }
}

impl Dim {
    /// A symbol by name.
    pub fn symbol(name: &str) -> Dim {
        Dim(Form::Sum([(vec![Symbol::from(name)], 1)].into()))
    }

    /// The value, if no symbol is left.
    pub fn constant(&self) -> Option<i64> {
        match self.0 {
            Form::Constant(value) => Some(value),
            Form::Sum(_) => None,
        }
    }

    /// The terms with symbols, and the constant among them; none of a number.
    fn terms(&self) -> &[Term] {
        match &self.0 {
            Form::Constant(_) => &[],
            Form::Sum(terms) => terms,
        }
    }

    /// All terms by their products.
    fn by_product(&self) -> BTreeMap<Vec<Symbol>, i64> {
        match &self.0 {
            Form::Constant(value) => BTreeMap::from([(Vec::new(), *value)]),
            Form::Sum(terms) => terms.iter().cloned().collect(),
        }
    }

    /// The dim with each coefficient changed by a function without a root but zero.
    fn with_coefficients(&self, change: impl Fn(i64) -> i64) -> Dim {
        match &self.0 {
            Form::Constant(value) => Dim::from(change(*value)),
            Form::Sum(terms) => Dim(Form::Sum(terms.iter().map(|(p, c)| (p.clone(), change(*c))).collect())),
        }
    }

    /// The symbol, if the dim is exactly one.
    pub fn as_symbol(&self) -> Option<&Symbol> {
        match self.terms() {
            [(product, 1)] if product.len() == 1 => Some(&product[0]),
            _ => None,
        }
    }

    /// The coefficient and symbol, if the dim is a number times one symbol.
    pub fn as_scaled_symbol(&self) -> Option<(i64, &Symbol)> {
        match self.terms() {
            [(product, c)] if product.len() == 1 => Some((*c, &product[0])),
            _ => None,
        }
    }

    /// Whether the symbol occurs.
    pub fn mentions(&self, symbol: &str) -> bool {
        self.terms().iter().any(|(product, _)| product.iter().any(|s| &**s == symbol))
    }

    /// Whether the dim is a multiple of the symbol: every product has it exactly once.
    pub fn is_linear_in(&self, symbol: &str) -> bool {
        !self.terms().is_empty()
            && self.terms().iter().all(|(product, _)| product.iter().filter(|s| &***s == symbol).count() == 1)
    }

    /// All symbols, each once, sorted.
    pub fn symbols(&self) -> Vec<Symbol> {
        let mut all: Vec<Symbol> = self.terms().iter().flat_map(|(product, _)| product.iter().cloned()).collect();
        all.sort();
        all.dedup();
        all
    }

    /// The value under bindings, held at the ends of `i64` where it lies beyond; the unbound symbol otherwise.
    pub fn eval(&self, bindings: &Bindings) -> Result<i64, Symbol> {
        let mut sum = self.constant().unwrap_or(0);
        for (product, c) in self.terms() {
            let mut term = *c;
            for symbol in product {
                term = term.saturating_mul(*bindings.get(symbol).ok_or_else(|| symbol.clone())?);
            }
            sum = sum.saturating_add(term);
        }
        Ok(sum)
    }

    /// Replaces symbols by dims; symbols without an entry stay.
    pub fn substitute(&self, with: &BTreeMap<Symbol, Dim>) -> Dim {
        let mut sum = Dim::from(self.constant().unwrap_or(0));
        for (product, c) in self.terms() {
            let mut term = Dim::from(*c);
            for symbol in product {
                let factor = with.get(symbol).cloned().unwrap_or_else(|| Dim::symbol(symbol));
                term = &term * &factor;
            }
            sum = &sum + &term;
        }
        sum
    }

    /// The largest factor of a product, without its sign: arithmetic on small ones cannot overflow.
    pub fn largest_coefficient(&self) -> i64 {
        let least = self.constant().unwrap_or(0).saturating_abs();
        self.terms().iter().map(|(_, c)| c.saturating_abs()).fold(least, i64::max)
    }

    /// Exact quotient by a number, if every coefficient is divisible.
    pub fn div_exact(&self, by: i64) -> Option<Dim> {
        let divides = |c: i64| c % by == 0;
        let fits = by != 0 && self.constant().is_none_or(divides) && self.terms().iter().all(|(_, c)| divides(*c));
        fits.then(|| self.with_coefficients(|c| c / by))
    }

    /// Product of several dims; 1 for none.
    pub fn product<'a>(dims: impl IntoIterator<Item = &'a Dim>) -> Dim {
        dims.into_iter().fold(Dim::from(1i64), |a, b| &a * b)
    }

    fn from_terms(terms: BTreeMap<Vec<Symbol>, i64>) -> Dim {
        let terms: Vec<Term> = terms.into_iter().filter(|(_, c)| *c != 0).collect();
        match &terms[..] {
            [] => Dim::default(),
            [(product, c)] if product.is_empty() => Dim::from(*c),
            _ => Dim(Form::Sum(terms.into())),
        }
    }

    /// Reads the printed form: sums and products of numbers and symbols, with parentheses nowhere.
    pub fn parse(text: &str) -> Result<Dim, String> {
        let bad = || format!("`{text}` is no dim");
        let mut sum = Dim::default();
        let spaced = text.trim().replace('-', "+-");
        // A sign at the front is no sum.
        let spaced = spaced.strip_prefix('+').filter(|s| s.starts_with('-')).unwrap_or(&spaced);
        for term in spaced.split('+').map(str::trim) {
            let (sign, term) = term.strip_prefix('-').map_or((1i64, term), |rest| (-1, rest.trim()));
            let mut product = Dim::from(sign);
            for factor in term.split('*').map(str::trim) {
                let next = if factor.starts_with(|c: char| c.is_ascii_digit()) {
                    Dim::from(factor.parse::<i64>().map_err(|_| bad())?)
                } else if !factor.is_empty() && factor.chars().all(|c| c.is_alphanumeric() || c == '_') {
                    Dim::symbol(factor)
                } else {
                    return Err(bad());
                };
                product = &product * &next;
            }
            sum = &sum + &product;
        }
        Ok(sum)
    }
}

impl From<i64> for Dim {
    fn from(value: i64) -> Dim {
        Dim(Form::Constant(value))
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Dim {
        Dim::from(value as i64)
    }
}

impl Add for &Dim {
    type Output = Dim;
    fn add(self, other: &Dim) -> Dim {
        if let (Some(a), Some(b)) = (self.constant(), other.constant()) {
            return Dim::from(a + b);
        }
        let mut terms = self.by_product();
        for (product, c) in other.by_product() {
            *terms.entry(product).or_default() += c;
        }
        Dim::from_terms(terms)
    }
}

impl Neg for &Dim {
    type Output = Dim;
    fn neg(self) -> Dim {
        self.with_coefficients(|c| -c)
    }
}

impl Sub for &Dim {
    type Output = Dim;
    fn sub(self, other: &Dim) -> Dim {
        self + &-other
    }
}

impl Mul for &Dim {
    type Output = Dim;
    fn mul(self, other: &Dim) -> Dim {
        match (self.constant(), other.constant()) {
            (Some(a), Some(b)) => return Dim::from(a * b),
            (Some(1), None) => return other.clone(),
            (None, Some(1)) => return self.clone(),
            _ => {}
        }
        let mut terms: BTreeMap<Vec<Symbol>, i64> = BTreeMap::new();
        for (p, a) in &self.by_product() {
            for (q, b) in &other.by_product() {
                let mut product = [p.as_slice(), q.as_slice()].concat();
                product.sort();
                *terms.entry(product).or_default() += a * b;
            }
        }
        Dim::from_terms(terms)
    }
}

impl fmt::Display for Dim {
    /// Symbols first, the constant last: `T-1`, `2*N`, `B*T+3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(value) = self.constant() {
            return write!(f, "{value}");
        }
        let (constant, rest): (Vec<_>, Vec<_>) = self.terms().iter().partition(|(p, _)| p.is_empty());
        for (i, (product, c)) in rest.into_iter().chain(constant).enumerate() {
            let sign = if *c < 0 {
                "-"
            } else if i > 0 {
                "+"
            } else {
                ""
            };
            write!(f, "{sign}")?;
            match (product.is_empty(), c.abs()) {
                (true, n) => write!(f, "{n}")?,
                (false, 1) => write!(f, "{}", product.join("*"))?,
                (false, n) => write!(f, "{n}*{}", product.join("*"))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_dims_are_equal_however_they_were_built() {
        let (l, a) = (Dim::symbol("L"), Dim::symbol("A"));
        let x = &(&l - &a) - &Dim::from(1i64);
        assert_eq!(x, Dim::parse("L - A - 1").unwrap());
        assert_eq!(x.to_string(), "-A+L-1");
        assert_eq!(Dim::parse(&x.to_string()).unwrap(), x);
        assert_eq!(&x + &a, Dim::parse("L-1").unwrap());
        assert_eq!((&l - &l).constant(), Some(0));
    }

    #[test]
    fn division_is_exact_or_nothing() {
        assert_eq!(Dim::parse("4*N+2").unwrap().div_exact(2), Some(Dim::parse("2*N+1").unwrap()));
        assert_eq!(Dim::parse("4*N+1").unwrap().div_exact(2), None);
    }
}
