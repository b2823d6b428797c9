//! The codes of the driver API, and its pointers.

/// A result that is not success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u32);

macro_rules! codes {
    ($($name:ident = $code:literal, $c:literal, $words:literal;)*) => {
        // All of them are described to programs; not all arise here.
        #[allow(dead_code)]
        impl Status {
            $(pub(crate) const $name: Status = Status($code);)*
        }

        /// The name and the description of a code, with the zeros that C wants.
        pub(crate) fn describe(code: u32) -> Option<(&'static str, &'static str)> {
            match code {
                0 => Some(("CUDA_SUCCESS\0", "no error\0")),
                $($code => Some((concat!("CUDA_ERROR_", $c, "\0"), concat!($words, "\0"))),)*
                _ => None,
            }
        }
    };
}

codes! {
    INVALID_VALUE = 1, "INVALID_VALUE", "invalid argument";
    OUT_OF_MEMORY = 2, "OUT_OF_MEMORY", "out of memory";
    NOT_INITIALIZED = 3, "NOT_INITIALIZED", "initialization error";
    NO_DEVICE = 100, "NO_DEVICE", "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "INVALID_DEVICE", "invalid device ordinal";
    INVALID_IMAGE = 200, "INVALID_IMAGE", "device kernel image is invalid";
    INVALID_CONTEXT = 201, "INVALID_CONTEXT", "invalid device context";
    NO_BINARY_FOR_GPU = 209, "NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device";
    ECC_UNCORRECTABLE = 214, "ECC_UNCORRECTABLE", "uncorrectable ECC error encountered";
    PEER_ACCESS_UNSUPPORTED = 217, "PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices";
    INVALID_PTX = 218, "INVALID_PTX", "a PTX JIT compilation failed";
    NVLINK_UNCORRECTABLE = 220, "NVLINK_UNCORRECTABLE", "uncorrectable NVLink error detected during the execution";
    FILE_NOT_FOUND = 301, "FILE_NOT_FOUND", "file not found";
    INVALID_HANDLE = 400, "INVALID_HANDLE", "invalid resource handle";
    ILLEGAL_STATE = 401, "ILLEGAL_STATE", "the operation cannot be performed in the present state";
    NOT_FOUND = 500, "NOT_FOUND", "named symbol not found";
    NOT_READY = 600, "NOT_READY", "device not ready";
    ILLEGAL_ADDRESS = 700, "ILLEGAL_ADDRESS", "an illegal memory access was encountered";
    LAUNCH_OUT_OF_RESOURCES = 701, "LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch";
    LAUNCH_TIMEOUT = 702, "LAUNCH_TIMEOUT", "the launch timed out and was terminated";
    PEER_ACCESS_ALREADY_ENABLED = 704, "PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled";
    PEER_ACCESS_NOT_ENABLED = 705, "PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled";
    PRIMARY_CONTEXT_ACTIVE = 708, "PRIMARY_CONTEXT_ACTIVE", "cannot set while device is active in this process";
    CONTEXT_IS_DESTROYED = 709, "CONTEXT_IS_DESTROYED", "context is destroyed";
    ASSERT = 710, "ASSERT", "device-side assert triggered";
    TOO_MANY_PEERS = 711, "TOO_MANY_PEERS", "peer mapping resources exhausted";
    HOST_MEMORY_ALREADY_REGISTERED = 712, "HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, "HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region";
    HARDWARE_STACK_ERROR = 714, "HARDWARE_STACK_ERROR", "hardware stack error";
    ILLEGAL_INSTRUCTION = 715, "ILLEGAL_INSTRUCTION", "an illegal instruction was encountered";
    MISALIGNED_ADDRESS = 716, "MISALIGNED_ADDRESS", "misaligned address";
    INVALID_ADDRESS_SPACE = 717, "INVALID_ADDRESS_SPACE", "operation not supported on global/shared address space";
    INVALID_PC = 718, "INVALID_PC", "invalid program counter";
    LAUNCH_FAILED = 719, "LAUNCH_FAILED", "unspecified launch failure";
    COOPERATIVE_LAUNCH_TOO_LARGE = 720, "COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch";
    NOT_SUPPORTED = 801, "NOT_SUPPORTED", "operation not supported";
    STREAM_CAPTURE_UNSUPPORTED = 900, "STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing";
    STREAM_CAPTURE_INVALIDATED = 901, "STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture";
    STREAM_CAPTURE_MERGE = 902, "STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences";
    STREAM_CAPTURE_UNMATCHED = 903, "STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began";
    STREAM_CAPTURE_UNJOINED = 904, "STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work";
    STREAM_CAPTURE_ISOLATION = 905, "STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream";
    STREAM_CAPTURE_IMPLICIT = 906, "STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream";
    CAPTURED_EVENT = 907, "CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream";
    STREAM_CAPTURE_WRONG_THREAD = 908, "STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread";
    GRAPH_EXEC_UPDATE_FAILURE = 910, "GRAPH_EXEC_UPDATE_FAILURE", "the graph update was not performed because it included changes which violated constraints specific to instantiated graph update";
    UNKNOWN = 999, "UNKNOWN", "unknown error";
}

impl Status {
    /// Whether this is about a stream that is being captured: what went wrong is worth saying
    /// where it went wrong, as the end of the capture only says that something did.
    pub(crate) fn is_of_capture(self) -> bool {
        (900..=908).contains(&self.0)
    }
}

/// What a call comes to.
pub(crate) type Outcome = Result<(), Status>;

/// A pointer through which a call gives something back.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Out<T> {}

// SAFETY: only ever used by the call that got it; work that keeps one says so to its caller.
unsafe impl<T> Send for Out<T> {}

impl<T> Out<T> {
    /// Gives back a value; null is an error.
    pub(crate) fn set(self, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: whoever calls a C function vouches for the pointers it passes.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Gives back a value unless the caller does not want it.
    pub(crate) fn set_if_wanted(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: as in `set`.
            unsafe { self.0.write_unaligned(value) };
        }
    }

    /// Gives back the value of an element of an array, unless the caller wants none.
    pub(crate) fn set_at(self, n: usize, value: T) {
        if !self.0.is_null() {
            // SAFETY: as in `set`, for as many elements as the call was told.
            unsafe { self.0.add(n).write_unaligned(value) };
        }
    }

    pub(crate) fn null() -> Self {
        Out(std::ptr::null_mut())
    }

    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }
}

impl<T: Copy> Out<T> {
    /// What the caller has put there.
    pub(crate) fn get(self) -> Result<T, Status> {
        In(self.0.cast_const()).get()
    }
}

impl Out<u8> {
    /// Copies bytes out, unless the caller does not want them.
    pub(crate) fn write(self, bytes: &[u8]) {
        if !bytes.is_empty() && !self.0.is_null() {
            // SAFETY: as in `set`, for as many bytes as the call was told.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0, bytes.len()) };
        }
    }

    pub(crate) fn at(address: u64) -> Self {
        Out(address as *mut u8)
    }
}

/// A pointer to what a call takes.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for In<T> {}

// SAFETY: as for `Out`.
unsafe impl<T> Send for In<T> {}

impl<T: Copy> In<T> {
    pub(crate) fn null() -> Self {
        In(std::ptr::null())
    }

    pub(crate) fn from_address(address: u64) -> Self {
        In(address as *const T)
    }

    pub(crate) fn is_null(self) -> bool {
        self.0.is_null()
    }

    pub(crate) fn get(self) -> Result<T, Status> {
        self.index(0)
    }

    pub(crate) fn index(self, n: usize) -> Result<T, Status> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: whoever calls a C function vouches for the pointers it passes.
        Ok(unsafe { self.0.add(n).read_unaligned() })
    }

    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }
}

impl In<u8> {
    pub(crate) fn at(address: u64) -> Self {
        In(address as *const u8)
    }

    pub(crate) fn bytes(self, n: usize) -> Result<Vec<u8>, Status> {
        if n == 0 {
            return Ok(Vec::new());
        }
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: as in `index`, for as many bytes as the call was told.
        Ok(unsafe { std::slice::from_raw_parts(self.0, n) }.to_vec())
    }

    /// The bytes before the first zero.
    pub(crate) fn c_string(self) -> Result<Vec<u8>, Status> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the caller vouches for a string that ends in zero.
        Ok(unsafe { std::ffi::CStr::from_ptr(self.0.cast()) }
            .to_bytes()
            .to_vec())
    }
}
