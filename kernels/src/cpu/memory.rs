//! The arena of the device, and typed pointers into it.

use std::alloc::Layout;
use std::sync::Arc;

use dsgc_ir::{Arena, Buffer, DType, Data, Region, Tensor};
use memmap2::MmapMut;

use super::narrow;
use crate::poison;

/// A cache line: the alignment of every buffer.
pub(super) const ALIGNMENT: usize = 64;

/// A part of the arena: zeros that the system need not provide before they are written to.
pub(super) struct Zeros {
    /// Whole pages, so any alignment.
    pub(super) bytes: MmapMut,
    len: usize,
}

impl Zeros {
    pub(super) fn new(len: usize) -> Zeros {
        let none = |_| std::alloc::handle_alloc_error(Layout::from_size_align(len, ALIGNMENT).expect("a plan fits"));
        // A mapping cannot be empty.
        let bytes = MmapMut::map_anon(len.max(1)).unwrap_or_else(none);
        // Large pages are found faster, and provided many at a time. A system that has none goes without.
        #[cfg(target_os = "linux")]
        let _ = bytes.advise(memmap2::Advice::HugePage);
        Zeros { bytes, len }
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// All memory that the device has, and what the host keeps for it, which is memory of the same kind here.
pub(super) struct Memory {
    regions: [Arc<Zeros>; 4],
}

impl Memory {
    /// Zeros, as large as planned.
    pub(super) fn new(arena: Arena) -> Memory {
        Memory {
            regions: [arena.persistent, arena.values, arena.scratch, arena.host].map(|len| Arc::new(Zeros::new(len))),
        }
    }

    /// Keeps all memory at its place until what is given is dropped.
    pub(super) fn keep(&self) -> [Arc<Zeros>; 4] {
        self.regions.clone()
    }

    /// Gives a region whose bytes hold nothing back to the system, until they are written to again.
    pub(super) fn release(&mut self, region: Region) {
        let region = &mut self.regions[region as usize];
        *region = Arc::new(Zeros::new(region.len()));
    }

    /// The first element of a buffer, to read only.
    fn view<T>(&self, buffer: Buffer) -> Ptr<T> {
        let region = &self.regions[buffer.region as usize];
        assert!(buffer.offset + buffer.bytes <= region.len(), "bug: a buffer leaves the arena");
        // SAFETY: the offset is inside of the allocation.
        Ptr(unsafe { region.bytes.as_ptr().add(buffer.offset) }.cast_mut().cast())
    }

    /// The first element of a buffer. Its bytes may be read and written as the plan says, by which no two values that
    /// are alive at the same time overlap.
    pub(super) fn at<T>(&mut self, buffer: Buffer) -> Ptr<T> {
        self.view(buffer)
    }

    /// The workspace of the running kernel; at the end of what there is for what runs beside others.
    pub(super) fn scratch<T>(&mut self, bytes: usize, beside: bool) -> Ptr<T> {
        let all = self.regions[Region::Scratch as usize].len();
        self.at(Buffer { region: Region::Scratch, offset: if beside { all - bytes } else { 0 }, bytes })
    }

    /// Fills a buffer with poison.
    pub(super) fn poison(&mut self, buffer: Buffer) {
        let at: Ptr<u8> = self.at(buffer);
        // SAFETY: `at` checked that the buffer lies in the arena.
        poison(unsafe { at.slice_mut(0, buffer.bytes) });
    }

    /// Fills the workspace with poison, but for so many bytes at its end.
    pub(super) fn poison_scratch(&mut self, beside: usize) {
        let bytes = self.regions[Region::Scratch as usize].len() - beside;
        self.poison(Buffer { region: Region::Scratch, offset: 0, bytes });
    }

    /// Writes a tensor as elements of a type: floats become single, or are rounded.
    pub(super) fn write(&mut self, buffer: Buffer, dtype: DType, tensor: &Tensor) {
        if let DType::Quantized(quantized) = dtype {
            let single = tensor.clone().single();
            let Data::F32(v) = &single.data else { panic!("bug: {} where {dtype} belongs", tensor.dtype()) };
            let width = tensor.shape.last().copied().unwrap_or(1);
            let bytes = v.len() / width.max(1) * quantized.row_bytes(width);
            assert!(bytes <= buffer.bytes, "bug: a tensor is larger than its buffer");
            // SAFETY: the buffer lies in the arena and holds so many bytes, as just checked.
            return quantized.pack(v, width, unsafe { self.at::<u8>(buffer).slice_mut(0, bytes) });
        }
        assert!(tensor.len() * dtype.bytes() <= buffer.bytes, "bug: a tensor is larger than its buffer");
        let n = tensor.len();
        if dtype.is_narrow() {
            let single = tensor.clone().single();
            let Data::F32(v) = &single.data else { panic!("bug: {} where {dtype} belongs", tensor.dtype()) };
            let to: Ptr<u8> = self.at(buffer);
            // SAFETY: the buffer holds `n` elements, as just checked.
            return unsafe { narrow::round(dtype, v.as_ptr(), to.0, n) };
        }
        // SAFETY: the buffer lies in the arena and holds `n` elements, as just checked.
        unsafe {
            match &tensor.data {
                Data::F32(v) => self.at::<f32>(buffer).slice_mut(0, n).copy_from_slice(v),
                Data::F64(v) => {
                    self.at::<f32>(buffer).slice_mut(0, n).iter_mut().zip(v).for_each(|(to, &from)| *to = from as f32);
                }
                Data::I32(v) => self.at::<i32>(buffer).slice_mut(0, n).copy_from_slice(v),
                Data::Bool(v) => {
                    self.at::<u8>(buffer).slice_mut(0, n).iter_mut().zip(v).for_each(|(to, &b)| *to = u8::from(b));
                }
                Data::Key(v) => self.at::<[u32; 2]>(buffer).slice_mut(0, n).copy_from_slice(v),
            }
        }
    }

    /// Reads a tensor; narrow floats become single.
    pub(super) fn read(&self, buffer: Buffer, dtype: DType, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        if let DType::Quantized(quantized) = dtype {
            let width = shape.last().copied().unwrap_or(1);
            let bytes = n / width.max(1) * quantized.row_bytes(width);
            assert!(bytes <= buffer.bytes, "bug: a tensor is larger than its buffer");
            let mut numbers = vec![0.0; n];
            // SAFETY: as in `write`.
            quantized.unpack(unsafe { self.view::<u8>(buffer).slice(0, bytes) }, width, &mut numbers);
            return Tensor::new(shape, Data::F32(numbers));
        }
        assert!(n * dtype.bytes() <= buffer.bytes, "bug: a tensor is larger than its buffer");
        // SAFETY: the buffer lies in the arena and holds `n` elements, as just checked.
        let data = unsafe {
            match dtype {
                DType::Bf16 | DType::F16 => {
                    let mut wide = vec![0.0; n];
                    narrow::widen(dtype, self.view::<u8>(buffer).0, wide.as_mut_ptr(), n);
                    Data::F32(wide)
                }
                DType::F32 => Data::F32(self.view::<f32>(buffer).slice(0, n).to_vec()),
                DType::I32 => Data::I32(self.view::<i32>(buffer).slice(0, n).to_vec()),
                DType::Bool => Data::Bool(self.view::<u8>(buffer).slice(0, n).iter().map(|&b| b != 0).collect()),
                DType::Key => Data::Key(self.view::<[u32; 2]>(buffer).slice(0, n).to_vec()),
                DType::Quantized(_) => panic!("bug: {dtype} has rows"),
            }
        };
        Tensor::new(shape, data)
    }
}

/// A place in the arena that several threads work on, each on elements of its own.
#[derive(Debug)]
pub(super) struct Ptr<T>(pub(super) *mut T);

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

// SAFETY: a `Ptr` is only an address; whoever reads or writes through it says why that is sound.
unsafe impl<T: Send> Send for Ptr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Ptr<T> {}

impl<T> Ptr<T> {
    /// The element `n` places on.
    ///
    /// # Safety
    /// It lies in the same buffer or just behind it.
    pub(super) unsafe fn add(self, n: usize) -> Ptr<T> {
        // SAFETY: the caller's promise.
        Ptr(unsafe { self.0.add(n) })
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// They lie in the buffer, hold values of `T`, and nobody writes them while the slice lives.
    pub(super) unsafe fn slice<'a>(self, at: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(at), len) }
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// They lie in the buffer, hold values of `T`, and nobody else reads or writes them while the slice lives.
    pub(super) unsafe fn slice_mut<'a>(self, at: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}
