//! MPI's library: its functions, and the handles in which its families differ.

use std::error::Error;
use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::time::Duration;

use dsgc_ir::diag::Diag;
use libloading::os::unix::{Library as Opened, RTLD_GLOBAL, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW};

/// A handle of MPI: a pointer in Open MPI and the standard ABI, an `int` in MPICH. As an argument, an `int` is the lower half
/// of a register on x86-64 and aarch64, and as a result the lower half of a zeroed word, since both are little-endian.
type Handle = usize;

/// `MPI_Status`, which no family makes longer than this.
pub(super) type Status = [u64; 16];

/// The tag of all messages: their order says which is which.
const TAG: c_int = 0;

/// What a rank has said goes through its launcher, and MPICH's forgets what it has not handed on when a job is aborted.
const FORWARDED: Duration = Duration::from_millis(300);

type InitThread = unsafe extern "C" fn(*mut c_int, *mut c_void, c_int, *mut c_int) -> c_int;
type OfComm = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Send = unsafe extern "C" fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;
type Receive = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;
type Test = unsafe extern "C" fn(*mut Handle, *mut c_int, *mut Status) -> c_int;
type GetCount = unsafe extern "C" fn(*const Status, Handle, *mut c_int) -> c_int;
type Abort = unsafe extern "C" fn(Handle, c_int) -> c_int;
type Finalize = unsafe extern "C" fn() -> c_int;
type GetVersion = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;

/// An MPI that has been opened. It is never closed: MPI leaves threads and handlers behind.
pub(super) struct Library {
    /// Name or path.
    pub name: String,
    world: Handle,
    byte: Handle,
    /// `MPI_THREAD_MULTIPLE`: a watcher or a panic may end the job from any thread.
    multiple: c_int,
    init_thread: InitThread,
    comm_rank: OfComm,
    comm_size: OfComm,
    isend: Send,
    irecv: Receive,
    test: Test,
    get_count: GetCount,
    abort: Abort,
    finalize: Finalize,
    version: GetVersion,
}

impl Library {
    /// Opens the first of these that there is. `sign` is why one is needed.
    pub fn open(candidates: Vec<&str>, sign: &str) -> Result<Library, Diag> {
        let mut reasons = Vec::new();
        for name in candidates {
            // SAFETY: opening runs the initialisers of an MPI, as linking it would. Open MPI's plugins need its symbols to be global.
            match unsafe { Opened::open(Some(name), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(opened) => return Library::read(opened, name),
                // The error itself says only that it failed; what it comes from says why.
                Err(error) => reasons.push(error.source().map_or_else(|| error.to_string(), |why| why.to_string())),
            }
        }
        let message = format!("an MPI launcher started this process (`{sign}` is set), but its MPI cannot be opened");
        let help = "install that MPI's library beside its launcher (Debian: `libopenmpi3`, `libmpich12`), or name it in \
                    `DSGC_MPI`";
        Err(Diag::error(format!("{message}: {}", reasons.join("; "))).help(help))
    }

    fn read(opened: Opened, name: &str) -> Result<Library, Diag> {
        let standard = Path::new(name).file_name().is_some_and(|file| file.to_string_lossy().contains("mpi_abi"));
        // SAFETY: these are the declarations of the MPI standard, for handles as above.
        let table = unsafe {
            let address = |symbol: &[u8]| opened.get::<*const c_void>(symbol).map(|found| *found as Handle).ok();
            let (world, byte, multiple) = match (address(b"ompi_mpi_comm_world\0"), address(b"ompi_mpi_byte\0")) {
                _ if standard => (0x101, 0x247, 4096),
                (Some(world), Some(byte)) => (world, byte, 3),
                // MPICH and those who share its ABI: Intel, MVAPICH, Cray.
                _ => (0x4400_0000, 0x4c00_010d, 3),
            };
            let read = || -> Result<Library, libloading::Error> {
                Ok(Library {
                    name: name.to_string(),
                    world,
                    byte,
                    multiple,
                    init_thread: *opened.get(b"MPI_Init_thread\0")?,
                    comm_rank: *opened.get(b"MPI_Comm_rank\0")?,
                    comm_size: *opened.get(b"MPI_Comm_size\0")?,
                    isend: *opened.get(b"MPI_Isend\0")?,
                    irecv: *opened.get(b"MPI_Irecv\0")?,
                    test: *opened.get(b"MPI_Test\0")?,
                    get_count: *opened.get(b"MPI_Get_count\0")?,
                    abort: *opened.get(b"MPI_Abort\0")?,
                    finalize: *opened.get(b"MPI_Finalize\0")?,
                    version: *opened.get(b"MPI_Get_library_version\0")?,
                })
            };
            read()
        };
        std::mem::forget(opened);
        table.map_err(|error| Diag::error(format!("`{name}` is no MPI: {error}")))
    }

    /// A call that fails ends the job by itself (`MPI_ERRORS_ARE_FATAL`), so a code that comes back is a bug of an MPI.
    fn done(&self, code: c_int, what: &str) {
        assert!(code == 0, "bug: {what} of `{}` gave {code}", self.name);
    }

    /// Begins; once per process.
    pub fn init(&self) {
        let mut provided = 0;
        // SAFETY: as declared; no arguments of the program are handed on.
        self.done(
            unsafe { (self.init_thread)(null_mut(), null_mut(), self.multiple, &mut provided) },
            "MPI_Init_thread",
        );
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        let mut rank = 0;
        // SAFETY: as declared.
        self.done(unsafe { (self.comm_rank)(self.world, &mut rank) }, "MPI_Comm_rank");
        rank as usize
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        let mut size = 0;
        // SAFETY: as declared.
        self.done(unsafe { (self.comm_size)(self.world, &mut size) }, "MPI_Comm_size");
        size as usize
    }

    /// Begins to send.
    ///
    /// # Safety
    /// The bytes stay as they are until [`Library::test`] says that this is done.
    pub unsafe fn send(&self, bytes: *const c_void, len: usize, to: usize) -> Handle {
        let mut request = 0;
        // SAFETY: as declared; the caller keeps the bytes.
        let code = unsafe { (self.isend)(bytes, len as c_int, self.byte, to as c_int, TAG, self.world, &mut request) };
        self.done(code, "MPI_Isend");
        request
    }

    /// Begins to receive.
    ///
    /// # Safety
    /// Nobody uses the place until [`Library::test`] says that this is done.
    pub unsafe fn receive(&self, place: *mut c_void, len: usize, from: usize) -> Handle {
        let mut request = 0;
        // SAFETY: as declared; the caller keeps the place.
        let code =
            unsafe { (self.irecv)(place, len as c_int, self.byte, from as c_int, TAG, self.world, &mut request) };
        self.done(code, "MPI_Irecv");
        request
    }

    /// How it ended, once it is done; asked no more after that.
    pub fn test(&self, request: &mut Handle) -> Option<Status> {
        let (mut flag, mut status) = (0, [0; 16]);
        // SAFETY: as declared.
        self.done(unsafe { (self.test)(request, &mut flag, &mut status) }, "MPI_Test");
        (flag != 0).then_some(status)
    }

    /// How many bytes were received.
    pub fn bytes(&self, status: &Status) -> usize {
        let mut count = 0;
        // SAFETY: as declared.
        self.done(unsafe { (self.get_count)(status, self.byte, &mut count) }, "MPI_Get_count");
        count as usize
    }

    /// Ends the job of all ranks.
    pub fn abort(&self, code: u8) -> ! {
        std::thread::sleep(FORWARDED);
        // SAFETY: as declared. It does not return where it works.
        unsafe { (self.abort)(self.world, c_int::from(code)) };
        std::process::exit(i32::from(code))
    }

    /// Ends MPI in this process, when all ranks have come here.
    pub fn finalize(&self) {
        // SAFETY: as declared.
        self.done(unsafe { (self.finalize)() }, "MPI_Finalize");
    }

    /// What it calls itself, in one line.
    pub fn version(&self) -> String {
        version(self.version)
    }
}

fn version(get: GetVersion) -> String {
    // MPI_MAX_LIBRARY_VERSION_STRING is 8192 where it is largest.
    let (mut text, mut len) = (vec![0u8; 8192], 0);
    // SAFETY: as declared; this may be called before MPI begins.
    unsafe { get(text.as_mut_ptr().cast(), &mut len) };
    text.truncate(text.iter().position(|&byte| byte == 0).unwrap_or(0));
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or_default();
    line.split(',').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// MPIs of this machine that the system's loader finds: the library's name, and what it calls itself.
pub fn found() -> Vec<(&'static str, String)> {
    let names = ["libmpi.so.40", "libmpi_abi.so.1", "libmpi.so.12", "libmpich.so.12"];
    let look = |name: &'static str| {
        // SAFETY: opening runs the initialisers of an MPI; local symbols keep several of them apart.
        let opened = unsafe { Opened::open(Some(name), RTLD_LAZY | RTLD_LOCAL) }.ok()?;
        // SAFETY: the declaration of the MPI standard.
        let get = unsafe { opened.get::<GetVersion>(b"MPI_Get_library_version\0") }.map(|get| *get);
        std::mem::forget(opened);
        Some((name, version(get.ok()?)))
    };
    names.into_iter().filter_map(look).collect()
}
