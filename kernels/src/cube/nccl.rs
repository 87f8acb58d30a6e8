//! NCCL: sums and parts go from GPU to GPU without the host.
//!
//! It is opened at run time and used where every rank is a process with a GPU of its own and finds it; where one does not, all
//! of them go by way of the host. So do tensors whose parts are not equally long, which NCCL does not know. Its calls wait until
//! the device is done with what it runs, and the host waits for them; a rank that never comes is the launcher's to end.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fmt::Debug;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cubecl::cuda::CudaRuntime;
use cudarc::driver::{CudaContext, CudaStream};
use cudarc::nccl::result;
use cudarc::nccl::sys::{is_culib_present, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use dsgc_ir::cost::sent;
use dsgc_ir::diag::Diag;
use dsgc_ir::{Axis, DType, Op, Type};

use super::Launch;
use super::collective::Direct;
use crate::ranks::Member;

/// The communicators of a rank, one for each axis along which there are others.
pub(super) struct Nccl {
    stream: Arc<CudaStream>,
    comms: BTreeMap<Axis, ncclComm_t>,
}

impl Nccl {
    /// For a process whose device is the so manieth, if all ranks can use it. All of them call this.
    pub fn new(member: &Member, at: usize) -> Result<Option<Nccl>, Diag> {
        // SAFETY: it only tries to load a library.
        let found = unsafe { is_culib_present() };
        let context = CudaContext::new(at).map_err(failed)?;
        let id = context.uuid().map_err(failed)?.bytes.map(|byte| byte.cast_unsigned());
        let mut card = vec![u8::from(found)];
        card.extend(id);
        let mut cards = member.all().messages(&card)?;
        let all_found = cards.iter().all(|card| card[0] == 1);
        cards.sort_unstable();
        cards.dedup();
        if !all_found || cards.len() < member.mesh.ranks() {
            return Ok(None);
        }
        let stream = context.new_stream().map_err(failed)?;
        let mut comms = BTreeMap::new();
        for axis in Axis::ALL {
            let group = member.group(axis);
            if group.size() == 1 {
                continue;
            }
            let mut bytes = [0u8; 128];
            if group.at() == 0 {
                bytes = result::get_uniqueid().map_err(failed)?.internal.map(|byte| byte.cast_unsigned());
            }
            group.broadcast(0, &mut bytes)?;
            let id = ncclUniqueId { internal: bytes.map(u8::cast_signed) };
            context.bind_to_thread().map_err(failed)?;
            let mut comm = MaybeUninit::uninit();
            // SAFETY: `comm` is a place for the communicator, which is there if there is no error.
            let comm = unsafe {
                result::comm_init_rank(comm.as_mut_ptr(), group.size() as c_int, id, group.at() as c_int)
                    .map_err(failed)?;
                comm.assume_init()
            };
            comms.insert(axis, comm);
        }
        Ok(Some(Nccl { stream, comms }))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        for comm in self.comms.values() {
            // SAFETY: it is a communicator, and nothing runs on it: every call was waited for. What it says at the end helps nobody.
            unsafe { result::comm_destroy(*comm) }.ok();
        }
    }
}

impl Direct<CudaRuntime> for Nccl {
    fn run(&self, l: &Launch<CudaRuntime>) -> Option<Result<u64, String>> {
        let (operand, output) = (l.op.args[0], l.op.result());
        let (given, made) = (l.len(operand), l.len(output));
        let (over, kind) = match (&l.op.op, l.dtype(output)) {
            (Op::AllReduce { over }, DType::F32) => (over, ncclDataType_t::ncclFloat32),
            (Op::AllReduce { over }, DType::I32) => (over, ncclDataType_t::ncclInt32),
            (Op::ReduceScatter { over, ranks, .. }, DType::F32) if made * ranks == given => {
                (over, ncclDataType_t::ncclFloat32)
            }
            (Op::ReduceScatter { over, ranks, .. }, DType::I32) if made * ranks == given => {
                (over, ncclDataType_t::ncclInt32)
            }
            (Op::AllGather { over, .. }, _) if given > 0 && made % given == 0 => (over, ncclDataType_t::ncclUint8),
            _ => return None,
        };
        let comm = *self.comms.get(over)?;
        if matches!(l.op.op, Op::AllGather { .. }) && made / given != l.member.group(*over).size() {
            return None;
        }
        Some(self.call(l, comm, kind, given, made))
    }
}

impl Nccl {
    fn call(
        &self,
        l: &Launch<CudaRuntime>,
        comm: ncclComm_t,
        kind: ncclDataType_t,
        given: usize,
        made: usize,
    ) -> Result<u64, String> {
        let (operand, output) = (l.op.args[0], l.op.result());
        let resource = |value| {
            l.client
                .get_resource(l.memory.handle(l.buffer(value)))
                .map_err(|why| format!("it gives no memory: {why:?}"))
        };
        let (from, to) = (resource(operand)?, resource(output)?);
        let (from, to) = (from.resource().ptr as *const _, to.resource().ptr as *mut _);
        cubecl::future::block_on(l.client.sync()).map_err(|why| format!("{why:?}"))?;
        self.stream.context().bind_to_thread().map_err(|why| format!("{why:?}"))?;
        let (sum, stream) = (ncclRedOp_t::ncclSum, self.stream.cu_stream().cast());
        let ty = |value| Type::new(l.dtype(value), l.graph.ty(value).dims.clone());
        // SAFETY: both are memory of the device of so many elements, which nothing else uses until the stream is done.
        unsafe {
            match l.op.op {
                Op::AllReduce { .. } => result::all_reduce(from, to, given, kind, sum, comm, stream),
                Op::ReduceScatter { .. } => result::reduce_scatter(from, to, made, kind, sum, comm, stream),
                _ => {
                    let bytes = ty(operand).bytes(l.dims).expect("every dim that a value needs is bound");
                    result::all_gather(from, to, bytes, kind, comm, stream)
                }
            }
        }
        .map_err(|why| format!("NCCL failed: {:?}", why.0))?;
        self.stream.synchronize().map_err(|why| format!("NCCL failed: {why:?}"))?;
        let bytes = sent(&l.op.op, &[&ty(operand)], &[&ty(output)], l.dims, &l.member.mesh);
        Ok(bytes.expect("every dim that a value needs is bound"))
    }
}

fn failed(why: impl Debug) -> Diag {
    Diag::error(format!("NCCL cannot begin: {why:?}")).help("`NCCL_DEBUG=INFO` lets it say more")
}
