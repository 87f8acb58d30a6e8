//! The arena on the device: an allocation for each region, or several, where the device bounds them and the plan knows it.

use std::marker::PhantomData;

use cubecl::client::ComputeClient;
use cubecl::prelude::*;
use cubecl::server::{Handle, ServerError};
use dsgc_ir::diag::Diag;
use dsgc_ir::{Arena, Bindings, Buffer, DType, Data, Dim, Region, Tensor, Type};

use half::{bf16, f16};

use super::target::ALIGNMENT;
use super::units;

#[cube(launch_unchecked)]
fn copy(from: &Array<u32>, to: &mut Array<u32>, len: u32) {
    if (ABSOLUTE_POS as u32) < len {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}

#[cube(launch_unchecked)]
fn clear(to: &mut Array<u32>, len: u32) {
    if (ABSOLUTE_POS as u32) < len {
        to[ABSOLUTE_POS] = 0u32;
    }
}

/// Bytes that a device gives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gives {
    /// In one allocation.
    pub(super) at_once: u64,
    /// In all, where it says so.
    pub(super) in_all: Option<u64>,
}

/// Bytes that transfers may need beside the arena.
const TRANSFERS: u64 = 256 << 20;

/// The regions of the plan, and a place for faults.
pub(super) struct Memory<R: Runtime> {
    /// Of each region, allocations that lie one behind the other.
    regions: [Vec<Handle>; 3],
    /// Bytes of an allocation, but of the last one of a region.
    each: usize,
    /// Most bytes of a transfer.
    transfer: usize,
    faults: Handle,
    runtime: PhantomData<R>,
}

/// A tensor that is in memory: where, of which elements, and its shape.
pub(super) type Part = (Buffer, DType, Vec<usize>);

/// Words of the place for faults.
const FAULTS: usize = 3;

impl<R: Runtime> Memory<R> {
    /// All zeros. An error where the device does not give so much.
    pub(super) fn new(client: &ComputeClient<R>, arena: Arena, gives: Gives) -> Result<Memory<R>, Diag> {
        let sizes = [arena.persistent, arena.values, arena.scratch].map(|bytes| bytes.next_multiple_of(ALIGNMENT));
        let each = arena.allocation.unwrap_or(usize::MAX);
        let lens = sizes.map(|bytes| {
            let starts = (0..bytes).step_by(each);
            starts.map(|start| (bytes - start).min(each)).collect::<Vec<usize>>()
        });
        let total = sizes.iter().sum::<usize>() as u64;
        let largest = lens.iter().flatten().max().map_or(0, |&bytes| bytes as u64);
        let help = "a smaller `micro_batch_size` or `max_length` needs less; `dsgc compile` says what takes it";
        if let Some(in_all) = gives.in_all
            && total + TRANSFERS > in_all
        {
            let message = format!(
                "{total} bytes of memory are needed and {TRANSFERS} more for transfers, and the device has {in_all} left"
            );
            return Err(Diag::error(message).help(help));
        }
        if largest > gives.at_once {
            let message =
                format!("{largest} bytes of memory are needed at once, and the device gives {}", gives.at_once);
            return Err(Diag::error(message).help(help));
        }
        // Allocations of exactly these sizes: a pool's would be those of its pages.
        let allocate = |bytes: usize| {
            let handle = client.memory_persistent_allocation(bytes, |bytes| client.empty(bytes));
            handle.map_err(|why| Diag::error(format!("the device gives no {bytes} bytes of memory: {why}")).help(help))
        };
        let allocate_all = |lens: &Vec<usize>| lens.iter().map(|&bytes| allocate(bytes)).collect::<Result<Vec<_>, _>>();
        let [persistent, values, scratch] = &lens;
        let regions = [allocate_all(persistent)?, allocate_all(values)?, allocate_all(scratch)?];
        let transfer = gives.at_once.min(TRANSFERS) as usize / ALIGNMENT * ALIGNMENT;
        let faults = allocate(ALIGNMENT)?;
        let memory = Memory { regions, each, transfer, faults, runtime: PhantomData };
        for (i, &bytes) in lens[Region::Persistent as usize].iter().enumerate() {
            memory.clear(client, Buffer { region: Region::Persistent, offset: i * each, bytes });
        }
        memory.clear_faults(client);
        Ok(memory)
    }

    /// A part of the arena, to whole words. No kernel can be given nothing, so a buffer without bytes is any place, of which
    /// nothing is read and nothing written.
    pub(super) fn handle(&self, buffer: Buffer) -> Handle {
        if buffer.bytes == 0 {
            return self.faults.clone();
        }
        let (which, start) = (buffer.offset / self.each, buffer.offset % self.each);
        let whole = self.regions[buffer.region as usize].get(which);
        let end = start + buffer.bytes.next_multiple_of(4);
        // A handle's offsets are added to those that it has: an allocation may be larger than what was asked for.
        let (whole, rest) = whole
            .and_then(|whole| Some((whole, (whole.size_in_used() as usize).checked_sub(end)?)))
            .expect("bug: a buffer leaves its allocation");
        whole.clone().offset_start(start as u64).offset_end(rest as u64)
    }

    /// A buffer, for a kernel.
    pub(super) fn words(&self, buffer: Buffer) -> ArrayArg<R> {
        // SAFETY: the handle has so many words.
        unsafe { ArrayArg::from_raw_parts(self.handle(buffer), buffer.bytes.div_ceil(4)) }
    }

    /// The place for faults, for a kernel.
    pub(super) fn faults(&self) -> ArrayArg<R> {
        // SAFETY: the handle has so many words and more.
        unsafe { ArrayArg::from_raw_parts(self.faults.clone(), FAULTS) }
    }

    /// Makes the place for faults empty.
    pub(super) fn clear_faults(&self, client: &ComputeClient<R>) {
        let (cubes, cube) = units(FAULTS);
        // SAFETY: units beyond the last word do nothing.
        unsafe { clear::launch_unchecked::<R>(client, cubes, cube, self.faults(), FAULTS as u32) }
    }

    /// Makes a buffer zeros.
    pub(super) fn clear(&self, client: &ComputeClient<R>, buffer: Buffer) {
        let len = buffer.bytes.div_ceil(4);
        if len == 0 {
            return;
        }
        let (cubes, cube) = units(len);
        // SAFETY: units beyond the last word do nothing.
        unsafe { clear::launch_unchecked::<R>(client, cubes, cube, self.words(buffer), len as u32) }
    }

    /// Copies as many bytes as both buffers have.
    pub(super) fn copy(&self, client: &ComputeClient<R>, from: Buffer, to: Buffer) {
        let bytes = from.bytes.min(to.bytes);
        let (from, to) = (Buffer { bytes, ..from }, Buffer { bytes, ..to });
        let len = bytes.div_ceil(4);
        if len == 0 {
            return;
        }
        let (cubes, cube) = units(len);
        // SAFETY: units beyond the last word do nothing; the plan keeps values apart that are alive at once.
        unsafe { copy::launch_unchecked::<R>(client, cubes, cube, self.words(from), self.words(to), len as u32) }
    }

    /// Writes tensors into buffers, in one transfer or in as few as the device takes.
    pub(super) fn write(&self, client: &ComputeClient<R>, parts: &[(Buffer, DType, &Tensor)]) {
        let mut staged = Vec::new();
        let mut places: Vec<(Buffer, usize)> = Vec::new();
        for &(buffer, dtype, tensor) in parts {
            let bytes = bytes_of(dtype, &tensor.shape);
            assert!(bytes <= buffer.bytes, "bug: a tensor is larger than its buffer");
            if bytes == 0 {
                continue;
            }
            if !staged.is_empty() && staged.len() + bytes > self.transfer {
                self.transfer(client, &mut staged, &mut places);
            }
            places.push((Buffer { bytes, ..buffer }, staged.len()));
            pack(tensor, dtype, &mut staged);
            staged.resize(staged.len().next_multiple_of(ALIGNMENT), 0);
        }
        if !staged.is_empty() {
            self.transfer(client, &mut staged, &mut places);
        }
    }

    /// Takes bytes to the device, and from there to their buffers, each by where its bytes begin.
    fn transfer(&self, client: &ComputeClient<R>, staged: &mut Vec<u8>, places: &mut Vec<(Buffer, usize)>) {
        let total = staged.len();
        let handle = client.create_from_slice(staged);
        for (buffer, start) in places.drain(..) {
            let len = buffer.bytes.div_ceil(4);
            let (cubes, cube) = units(len);
            let from = handle.clone().offset_start(start as u64).offset_end((total - start - 4 * len) as u64);
            // SAFETY: both places hold so many words; units beyond the last do nothing.
            unsafe {
                let from = ArrayArg::from_raw_parts(from, len);
                copy::launch_unchecked::<R>(client, cubes, cube, from, self.words(buffer), len as u32);
            }
        }
        staged.clear();
    }

    /// The first bytes of a buffer, whole words.
    pub(super) fn bytes(&self, client: &ComputeClient<R>, buffer: Buffer) -> Result<Vec<u8>, String> {
        let mut all = Vec::with_capacity(buffer.bytes);
        for start in (0..buffer.bytes).step_by(self.transfer) {
            let bytes = (buffer.bytes - start).min(self.transfer);
            let part = self.handle(Buffer { offset: buffer.offset + start, bytes, ..buffer });
            let read = cubecl::future::block_on(client.read_async(vec![part])).map_err(explained)?;
            all.extend_from_slice(read.first().ok_or("it gives nothing back")?);
        }
        Ok(all)
    }

    /// Writes bytes to where a buffer begins.
    pub(super) fn set_bytes(&self, client: &ComputeClient<R>, buffer: Buffer, bytes: &[u8]) {
        for (i, part) in bytes.chunks(self.transfer).enumerate() {
            let offset = buffer.offset + i * self.transfer;
            let mut staged = part.to_vec();
            staged.resize(part.len().next_multiple_of(4), 0);
            self.transfer(client, &mut staged, &mut vec![(Buffer { offset, bytes: part.len(), ..buffer }, 0)]);
        }
    }

    /// Reads tensors and the place for faults, in one transfer.
    pub(super) fn read(&self, client: &ComputeClient<R>, parts: &[Part]) -> Result<(Vec<Tensor>, [u32; 3]), String> {
        let sized = parts.iter().filter(|(_, _, shape)| shape.iter().product::<usize>() > 0);
        let handles = sized.map(|(buffer, dtype, shape)| {
            let bytes = bytes_of(*dtype, shape);
            self.handle(Buffer { bytes, ..*buffer })
        });
        let faults = self.faults.clone().offset_end((ALIGNMENT - 4 * FAULTS) as u64);
        let handles: Vec<Handle> = handles.chain([faults]).collect();
        let read = cubecl::future::block_on(client.read_async(handles)).map_err(explained)?;
        let (faults, read) = read.split_last().ok_or("it gives nothing back")?;
        let mut read = read.iter();
        let tensors = parts.iter().map(|(_, dtype, shape)| {
            let empty = shape.iter().product::<usize>() == 0;
            unpack(if empty { &[] } else { read.next().map_or(&[][..], |bytes| bytes) }, *dtype, shape)
        });
        let tensors = tensors.collect();
        let mut words = words(faults);
        Ok((tensors, [(); 3].map(|()| words.next().unwrap_or(0))))
    }
}

/// What went wrong, without where in CubeCL it did: its first line.
pub(super) fn explained(error: ServerError) -> String {
    let first = match error {
        ServerError::ServerUnhealthy { errors, .. } => errors.into_iter().next().map(|error| error.to_string()),
        error => Some(error.to_string()),
    };
    let text = first.unwrap_or_else(|| "it does not say why".into());
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "Caused by:");
    lines
        .take_while(|line| !line.starts_with("Backtrace") && !line.starts_with("[Source]"))
        .collect::<Vec<_>>()
        .join("; ")
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Appends a tensor's elements as a type of elements.
fn pack(tensor: &Tensor, dtype: DType, to: &mut Vec<u8>) {
    match (&tensor.data, dtype) {
        (Data::F32(v), DType::F32) => to.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        (Data::F64(v), DType::F32) => to.extend(v.iter().flat_map(|&x| (x as f32).to_le_bytes())),
        (Data::I32(v), DType::I32) => to.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        (Data::F32(v), dtype) if dtype.is_narrow() => narrowed(v.iter().copied(), dtype, to),
        (Data::F64(v), dtype) if dtype.is_narrow() => narrowed(v.iter().map(|&x| x as f32), dtype, to),
        (Data::F32(v), DType::Quantized(quantized)) => {
            let start = to.len();
            to.resize(start + bytes_of(dtype, &tensor.shape), 0);
            quantized.pack(v, tensor.shape.last().copied().unwrap_or(1), &mut to[start..]);
        }
        (Data::F64(_), DType::Quantized(_)) => pack(&tensor.clone().single(), dtype, to),
        (Data::Bool(v), DType::Bool) => to.extend(v.iter().map(|&b| u8::from(b))),
        (Data::Key(v), DType::Key) => to.extend(v.iter().flatten().flat_map(|x| x.to_le_bytes())),
        (_, dtype) => panic!("bug: {} where {dtype} belongs", tensor.dtype()),
    }
}

fn bytes_of(dtype: DType, shape: &[usize]) -> usize {
    let dims: Vec<Dim> = shape.iter().map(|&n| Dim::from(n as i64)).collect();
    Type::new(dtype, dims).bytes(&Bindings::new()).expect("the dims are numbers")
}

/// Appends floats as narrower ones.
fn narrowed(all: impl Iterator<Item = f32>, dtype: DType, to: &mut Vec<u8>) {
    let half = |x| if dtype == DType::Bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
    to.extend(all.flat_map(|x| half(x).to_le_bytes()));
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
}

/// A tensor from elements of a type; there may be bytes behind the last one.
fn unpack(bytes: &[u8], dtype: DType, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let data = match dtype {
        DType::F32 => Data::F32(words(bytes).take(n).map(f32::from_bits).collect()),
        DType::I32 => Data::I32(words(bytes).take(n).map(u32::cast_signed).collect()),
        DType::Bool => Data::Bool(bytes.iter().take(n).map(|&b| b != 0).collect()),
        DType::Key => {
            let all: Vec<u32> = words(bytes).take(2 * n).collect();
            Data::Key(all.chunks_exact(2).map(|k| [k[0], k[1]]).collect())
        }
        DType::Bf16 => Data::F32(halves(bytes).take(n).map(|h| bf16::from_bits(h).to_f32()).collect()),
        DType::F16 => Data::F32(halves(bytes).take(n).map(|h| f16::from_bits(h).to_f32()).collect()),
        DType::Quantized(quantized) => {
            let mut rows = vec![0.0; n];
            quantized.unpack(&bytes[..bytes_of(dtype, shape)], shape.last().copied().unwrap_or(1), &mut rows);
            Data::F32(rows)
        }
    };
    Tensor::new(shape, data)
}
