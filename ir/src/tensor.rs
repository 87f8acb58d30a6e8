//! Tensors on the host: what goes into a graph and what comes out of it.

use crate::DType;

/// The elements of a [`Tensor`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision: the interpreter's f64 mode, in which every float is one.
    F64(Vec<f64>),
    /// Token ids, segments, positions, counts.
    I32(Vec<i32>),
    /// Masks.
    Bool(Vec<bool>),
    /// Random keys: two 32-bit words each (threefry2x32).
    Key(Vec<[u32; 2]>),
}

impl Data {
    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        match self {
            Data::F32(v) => size_of_val(v.as_slice()),
            Data::F64(v) => size_of_val(v.as_slice()),
            Data::I32(v) => size_of_val(v.as_slice()),
            Data::Bool(v) => size_of_val(v.as_slice()),
            Data::Key(v) => size_of_val(v.as_slice()),
        }
    }
}

/// A dense row-major tensor with a shape of plain numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements; as many as the shape says.
    pub data: Data,
}

impl Tensor {
    /// A tensor of single-precision floats.
    ///
    /// # Panics
    /// If the number of elements is not the shape's product; likewise for the other constructors.
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Tensor {
        Tensor::new(shape, Data::F32(data))
    }

    /// A tensor of double-precision floats.
    pub fn f64(shape: &[usize], data: Vec<f64>) -> Tensor {
        Tensor::new(shape, Data::F64(data))
    }

    /// A tensor of 32-bit integers.
    pub fn i32(shape: &[usize], data: Vec<i32>) -> Tensor {
        Tensor::new(shape, Data::I32(data))
    }

    /// A tensor of truth values.
    pub fn bool(shape: &[usize], data: Vec<bool>) -> Tensor {
        Tensor::new(shape, Data::Bool(data))
    }

    /// A single random key.
    pub fn key(key: [u32; 2]) -> Tensor {
        Tensor::new(&[], Data::Key(vec![key]))
    }

    /// A tensor of any kind of elements.
    pub fn new(shape: &[usize], data: Data) -> Tensor {
        let tensor = Tensor { shape: shape.to_vec(), data };
        assert_eq!(tensor.len(), shape.iter().product::<usize>(), "elements and shape {shape:?} differ");
        tensor
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.data {
            Data::F32(v) => v.len(),
            Data::F64(v) => v.len(),
            Data::I32(v) => v.len(),
            Data::Bool(v) => v.len(),
            Data::Key(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The declared type that such elements belong to. Floats of both widths count as `f32`: on the host narrow floats
    /// are the numbers that they stand for, see [`Tensor::fits`].
    pub fn dtype(&self) -> DType {
        match &self.data {
            Data::F32(_) | Data::F64(_) => DType::F32,
            Data::I32(_) => DType::I32,
            Data::Bool(_) => DType::Bool,
            Data::Key(_) => DType::Key,
        }
    }

    /// Whether the elements can be those of a value of this type: floats belong to floats of every width, and to what stands
    /// for floats.
    pub fn fits(&self, dtype: DType) -> bool {
        self.dtype() == dtype || self.dtype().is_float() && dtype.is_real()
    }

    /// Floats in single precision, each rounded to a declared type; other kinds as they are.
    pub fn rounded(self, dtype: DType) -> Tensor {
        let mut tensor = self.single();
        if let (Data::F32(v), true) = (&mut tensor.data, dtype.is_narrow()) {
            v.iter_mut().for_each(|x| *x = dtype.round(*x));
        }
        if let (Data::F32(v), DType::Quantized(quantized)) = (&mut tensor.data, dtype) {
            quantized.round(v, tensor.shape.last().copied().unwrap_or(1));
        }
        tensor
    }

    /// All elements as doubles; truth values are 0 and 1.
    ///
    /// # Panics
    /// On keys, which are no numbers.
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.data {
            Data::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Data::F64(v) => v.clone(),
            Data::I32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Data::Bool(v) => v.iter().map(|&x| f64::from(u8::from(x))).collect(),
            Data::Key(_) => panic!("a random key is no number"),
        }
    }

    /// The one element of a scalar as a double.
    ///
    /// # Panics
    /// If there is not exactly one element.
    pub fn scalar(&self) -> f64 {
        let all = self.to_f64();
        assert_eq!(all.len(), 1, "a tensor of shape {:?} is no scalar", self.shape);
        all[0]
    }

    /// Floats in single precision; other kinds as they are.
    pub fn single(self) -> Tensor {
        match self.data {
            Data::F64(v) => Tensor { shape: self.shape, data: Data::F32(v.into_iter().map(|x| x as f32).collect()) },
            data => Tensor { shape: self.shape, data },
        }
    }

    /// Floats in double precision; other kinds as they are.
    pub fn double(self) -> Tensor {
        match self.data {
            Data::F32(v) => Tensor { shape: self.shape, data: Data::F64(v.into_iter().map(f64::from).collect()) },
            data => Tensor { shape: self.shape, data },
        }
    }

    /// Rows `range` along the first dimension.
    ///
    /// # Panics
    /// If this is a scalar or the range leaves the first dimension.
    pub fn rows(&self, range: std::ops::Range<usize>) -> Tensor {
        let width: usize = self.shape[1..].iter().product();
        let at = range.start * width..range.end * width;
        let data = match &self.data {
            Data::F32(v) => Data::F32(v[at].to_vec()),
            Data::F64(v) => Data::F64(v[at].to_vec()),
            Data::I32(v) => Data::I32(v[at].to_vec()),
            Data::Bool(v) => Data::Bool(v[at].to_vec()),
            Data::Key(v) => Data::Key(v[at].to_vec()),
        };
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        Tensor { shape, data }
    }

    /// The rows of these numbers along the first dimension, in this order; a row may be taken more than once.
    ///
    /// # Panics
    /// If this is a scalar or there is no such row.
    pub fn select(&self, rows: &[usize]) -> Tensor {
        fn of<T: Copy>(v: &[T], rows: &[usize], width: usize) -> Vec<T> {
            rows.iter().flat_map(|r| &v[r * width..(r + 1) * width]).copied().collect()
        }
        let width: usize = self.shape[1..].iter().product();
        let data = match &self.data {
            Data::F32(v) => Data::F32(of(v, rows, width)),
            Data::F64(v) => Data::F64(of(v, rows, width)),
            Data::I32(v) => Data::I32(of(v, rows, width)),
            Data::Bool(v) => Data::Bool(of(v, rows, width)),
            Data::Key(v) => Data::Key(of(v, rows, width)),
        };
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        Tensor { shape, data }
    }

    /// Puts the rows of another tensor after those of this one.
    ///
    /// # Panics
    /// If their elements are of different kinds, or their shapes differ in more than the first dimension.
    pub fn append(&mut self, other: &Tensor) {
        assert_eq!(self.shape[1..], other.shape[1..], "rows of different shapes");
        match (&mut self.data, &other.data) {
            (Data::F32(a), Data::F32(b)) => a.extend(b),
            (Data::F64(a), Data::F64(b)) => a.extend(b),
            (Data::I32(a), Data::I32(b)) => a.extend(b),
            (Data::Bool(a), Data::Bool(b)) => a.extend(b),
            (Data::Key(a), Data::Key(b)) => a.extend(b),
            _ => panic!("rows of different kinds of elements"),
        }
        self.shape[0] += other.shape[0];
    }
}

#[cfg(test)]
mod tests {
    use super::Tensor;

    #[test]
    fn rows_are_chosen_and_put_together() {
        let x = Tensor::i32(&[3, 2], vec![0, 1, 10, 11, 20, 21]);
        let mut y = x.select(&[2, 0, 2]);
        assert_eq!(y, Tensor::i32(&[3, 2], vec![20, 21, 0, 1, 20, 21]));
        y.append(&x.rows(1..2));
        assert_eq!(y, Tensor::i32(&[4, 2], vec![20, 21, 0, 1, 20, 21, 10, 11]));
    }
}
