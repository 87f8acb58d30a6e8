//! Tensors of the host as tensors of a safetensors file, to the bit.

use std::borrow::Cow;

use dsgc_ir::{Data, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, View};

/// A tensor that is read when it is written.
pub(super) struct Stored<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    read: Box<dyn Fn() -> Cow<'a, Tensor> + 'a>,
}

impl<'a> Stored<'a> {
    /// What this gives: elements of a kind, and so many.
    pub fn new(like: &Tensor, mut shape: Vec<usize>, read: impl Fn() -> Cow<'a, Tensor> + 'a) -> Stored<'a> {
        let dtype = match &like.data {
            Data::F32(_) => Dtype::F32,
            Data::F64(_) => Dtype::F64,
            Data::I32(_) => Dtype::I32,
            Data::Bool(_) => Dtype::BOOL,
            Data::Key(_) => {
                shape.push(2);
                Dtype::U32
            }
        };
        Stored { dtype, shape, read: Box::new(read) }
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        fn bytes<const N: usize>(words: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
            words.flatten().collect()
        }
        Cow::Owned(match &(self.read)().data {
            Data::F32(v) => bytes(v.iter().map(|x| x.to_le_bytes())),
            Data::F64(v) => bytes(v.iter().map(|x| x.to_le_bytes())),
            Data::I32(v) => bytes(v.iter().map(|x| x.to_le_bytes())),
            Data::Bool(v) => bytes(v.iter().map(|&x| [u8::from(x)])),
            Data::Key(v) => bytes(v.iter().flatten().map(|x| x.to_le_bytes())),
        })
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// The tensor that was written, or what is wrong with what is there.
pub(super) fn read_tensor(view: &TensorView) -> Result<Tensor, String> {
    fn words<const N: usize, T>(bytes: &[u8], one: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|word| one(*word)).collect()
    }
    let (mut shape, bytes) = (view.shape().to_vec(), view.data());
    let data = match view.dtype() {
        Dtype::F32 => Data::F32(words(bytes, f32::from_le_bytes)),
        Dtype::F64 => Data::F64(words(bytes, f64::from_le_bytes)),
        Dtype::I32 => Data::I32(words(bytes, i32::from_le_bytes)),
        Dtype::BOOL => Data::Bool(bytes.iter().map(|&byte| byte != 0).collect()),
        Dtype::U32 if shape.last() == Some(&2) => {
            shape.pop();
            Data::Key(words(bytes, u32::from_le_bytes).as_chunks::<2>().0.to_vec())
        }
        other => return Err(format!("is of {other:?}, which is no type of ours")),
    };
    Ok(Tensor::new(&shape, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_read_back_to_the_bit() {
        let tensors = [
            Tensor::f32(&[3], vec![f32::NAN, -0.0, 1e-45]),
            Tensor::f64(&[1, 2], vec![f64::INFINITY, 0.1]),
            Tensor::i32(&[], vec![-7]),
            Tensor::bool(&[2], vec![true, false]),
            Tensor::new(&[2], Data::Key(vec![[1, 2], [u32::MAX, 0]])),
            Tensor::f32(&[0, 4], vec![]),
        ];
        let stored = |t| Stored::new(t, t.shape.clone(), move || Cow::Borrowed(t));
        let stored = tensors.iter().enumerate().map(|(i, t)| (i.to_string(), stored(t)));
        let file = safetensors::serialize(stored, None).expect("it is written");
        let read = safetensors::SafeTensors::deserialize(&file).expect("it is read");
        for (i, tensor) in tensors.iter().enumerate() {
            let found = read_tensor(&read.tensor(&i.to_string()).expect("it is there")).expect("it is of ours");
            assert_eq!(format!("{found:?}"), format!("{tensor:?}"));
        }
    }
}
