//! What a CUDA driver call came to, as a value. Part of every build, so that [`Error`] is the same
//! with and without the feature `cuda`.
//!
//! [`Error`]: crate::Error

/// A driver call that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{doing}: expected {call} to succeed, found {name} ({code}): {meaning}; {remedy}")]
#[non_exhaustive]
pub struct DriverError {
    /// The call: `cuMemAlloc`.
    pub call: &'static str,
    /// What it returned, a `CUresult`.
    pub code: u32,
    /// The code's name, from the driver: `CUDA_ERROR_OUT_OF_MEMORY`.
    pub name: String,
    /// The driver's words for it.
    pub meaning: String,
    /// What was being done, and to what.
    pub doing: String,
    /// What the reader can do about it.
    pub remedy: &'static str,
    /// Whether the context is beyond use: every later call in it will fail, and the process must
    /// end (or reset the device) to use the device again.
    pub sticky: bool,
}

impl DriverError {
    /// An error from its code; `name` and `meaning` are the driver's.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "made by the CUDA backend")
    )]
    pub(crate) fn new(
        call: &'static str,
        code: u32,
        (name, meaning): (String, String),
        doing: String,
    ) -> Self {
        Self {
            call,
            code,
            name,
            meaning,
            doing,
            remedy: remedy(code),
            sticky: is_sticky(code),
        }
    }
}

/// The codes after which a context is lost: faults of kernels, and of the device under it
/// (CUDA Driver API, "Data types used by CUDA driver", `CUresult`: those documented as leaving
/// the process in an inconsistent state).
fn is_sticky(code: u32) -> bool {
    matches!(
        code,
        214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721
    )
}

fn remedy(code: u32) -> &'static str {
    match code {
        2 => "use smaller sizes or more ranks, or free memory on the device",
        3 | 4 => "this is a defect of the caller: the driver must be initialised and alive",
        34 => {
            "install the NVIDIA driver, or put the directory of libcuda.so.1 into LD_LIBRARY_PATH; \
             where it has a stub of libcuda, take that out"
        }
        46 => "another process has the device for itself; wait for it or use another device",
        100 => "there is no GPU, or CUDA_VISIBLE_DEVICES hides it; check with nvidia-smi",
        101 => "name a device that there is (nvidia-smi lists them)",
        200 | 209 | 218 | 222 => {
            "the kernels do not fit this device or driver: update the driver, or build with \
             CUDA_COMPUTE_CAP naming the device's compute capability"
        }
        217 => "these devices cannot reach each other's memory; see nvidia-smi topo -p2p rw",
        600 => "wait for the work and ask again",
        700 | 702 | 709 | 710 | 714..=719 | 721 | 214 | 220 | 226 => {
            "a kernel or the device failed, and the context is lost: end the process; \
             compute-sanitizer, or the virtual GPU, can say which access it was"
        }
        701 => "the launch asks for more registers, threads or shared memory than a block may have",
        720 => "the grid does not fit on the device at once; use fewer blocks",
        800 | 900..=908 => {
            "this call cannot be made here (a capture may be going on in the thread)"
        }
        801 => "this device or driver does not have it",
        802 | 803 => "the driver and its services disagree; restart the machine after an update",
        _ => "see the CUDA driver API's documentation of this code",
    }
}
