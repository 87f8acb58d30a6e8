//! Tensors as messages between ranks of one program: they run on machines of one kind, so numbers are sent as they lie.

use bytemuck::{Pod, cast_slice, pod_collect_to_vec};
use dsgc_ir::{Data, Tensor};

/// A tensor as bytes: kind, number of dims, extents, elements.
pub fn pack(tensor: &Tensor) -> Vec<u8> {
    let kind = match &tensor.data {
        Data::F32(_) => 0u64,
        Data::F64(_) => 1,
        Data::I32(_) => 2,
        Data::Bool(_) => 3,
        Data::Key(_) => 4,
    };
    let shape = tensor.shape.iter().map(|&extent| extent as u64);
    let head: Vec<u64> = [kind, tensor.shape.len() as u64].into_iter().chain(shape).collect();
    let mut bytes = cast_slice(&head).to_vec();
    match &tensor.data {
        Data::F32(v) => bytes.extend_from_slice(cast_slice(v)),
        Data::F64(v) => bytes.extend_from_slice(cast_slice(v)),
        Data::I32(v) => bytes.extend_from_slice(cast_slice(v)),
        Data::Bool(v) => bytes.extend(v.iter().map(|&x| u8::from(x))),
        Data::Key(v) => bytes.extend_from_slice(cast_slice(v)),
    }
    bytes
}

/// The tensor that [`pack`] made bytes of, and what comes after it.
///
/// # Panics
/// If these are no such bytes.
pub fn unpack(bytes: &[u8]) -> (Tensor, &[u8]) {
    fn words(bytes: &[u8], count: usize) -> (Vec<u64>, &[u8]) {
        let (head, rest) = bytes.split_at(count * size_of::<u64>());
        (pod_collect_to_vec(head), rest)
    }
    fn elements<T: Pod>(bytes: &[u8], count: usize) -> (Vec<T>, &[u8]) {
        let (own, rest) = bytes.split_at(count * size_of::<T>());
        (pod_collect_to_vec(own), rest)
    }
    let (head, rest) = words(bytes, 2);
    let (shape, rest) = words(rest, head[1] as usize);
    let shape: Vec<usize> = shape.into_iter().map(|extent| extent as usize).collect();
    let count = shape.iter().product();
    macro_rules! read {
        ($kind:ident) => {{
            let (v, rest) = elements(rest, count);
            (Data::$kind(v), rest)
        }};
    }
    let (data, rest) = match head[0] {
        0 => read!(F32),
        1 => read!(F64),
        2 => read!(I32),
        3 => {
            let (v, rest) = elements::<u8>(rest, count);
            (Data::Bool(v.into_iter().map(|x| x != 0).collect()), rest)
        }
        4 => read!(Key),
        other => panic!("bug: a message of the kind {other}"),
    };
    (Tensor::new(&shape, data), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_arrive_as_they_were_sent() {
        let all = [
            Tensor::f32(&[2, 1], vec![1.5, f32::NEG_INFINITY]),
            Tensor::f64(&[], vec![0.1]),
            Tensor::i32(&[0, 3], vec![]),
            Tensor::bool(&[3], vec![true, false, true]),
            Tensor::key([7, u32::MAX]),
        ];
        let bytes: Vec<u8> = all.iter().flat_map(pack).collect();
        let mut rest = bytes.as_slice();
        for tensor in &all {
            let (found, after) = unpack(rest);
            assert_eq!(found, *tensor);
            rest = after;
        }
        assert!(rest.is_empty());
    }
}
