//! The raw driver: what bindgen made of `cuda.h` (see `build/bindings.rs`), and calls that newer
//! drivers have, looked up when the program runs so that it starts on an older one.
//!
//! Codes are a new type over `u32` and not an enum: a driver may be newer than the header, and a
//! code outside an enum would be undefined behaviour. That is why calls beside which kernels may
//! run are made through this module and not through `cust`, whose enum ends with CUDA 11.

use std::ffi::{CStr, c_void};
use std::sync::OnceLock;

use crate::backend::driver_error::DriverError;
use crate::error::{Error, Result};

#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unnameable_types,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    reason = "made by bindgen"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/driver.rs"));
}
pub(crate) use generated::*;
pub use generated::{CUdevice_P2PAttribute_enum, CUdevice_attribute_enum};

/// A C string of the driver's, or what stands for none.
fn words(text: *const std::ffi::c_char, otherwise: &str) -> String {
    if text.is_null() {
        return otherwise.to_owned();
    }
    // SAFETY: the driver gives strings that end in zero and live as long as it does.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// Why there is no driver, if there is none.
fn missing() -> Option<&'static str> {
    #[cfg(all(
        target_os = "linux",
        any(target_arch = "x86_64", target_arch = "aarch64")
    ))]
    return super::loader::missing();
    #[allow(
        unreachable_code,
        reason = "elsewhere the program does not start without one"
    )]
    None
}

/// The name of a code and the driver's words for it.
fn describe(code: CUresult) -> (String, String) {
    if let Some(why) = missing() {
        return ("no driver".to_owned(), why.to_owned());
    }
    let (mut name, mut meaning) = (std::ptr::null(), std::ptr::null());
    // SAFETY: both calls write one pointer, or leave null for a code they do not know.
    unsafe {
        let _ = cuGetErrorName(code, &mut name);
        let _ = cuGetErrorString(code, &mut meaning);
    }
    (
        words(name, "a code that this driver does not name"),
        words(meaning, "no description"),
    )
}

/// The error of a call that returned `code`.
pub(crate) fn error(code: CUresult, call: &'static str, doing: impl FnOnce() -> String) -> Error {
    Error::Driver(DriverError::new(call, code.0, describe(code), doing()))
}

/// `Ok` if the call succeeded; else the error, with what was being done.
pub(crate) fn check(
    code: CUresult,
    call: &'static str,
    doing: impl FnOnce() -> String,
) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        Ok(())
    } else {
        Err(error(code, call, doing))
    }
}

/// Reports a failure that no caller can be told of, in `Drop`.
pub(crate) fn check_in_drop(code: CUresult, call: &'static str) {
    if code != CUresult::CUDA_SUCCESS {
        let (name, meaning) = describe(code);
        tracing::warn!(
            call,
            code = code.0,
            name,
            meaning,
            "while letting go of a CUDA object"
        );
    }
}

type FuncGetParamInfo = unsafe extern "C" fn(CUfunction, usize, *mut usize, *mut usize) -> CUresult;
type FuncLoad = unsafe extern "C" fn(CUfunction) -> CUresult;
type EventElapsedTime = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

/// Calls that not every driver has, or whose name depends on the header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Optional {
    /// `cuFuncGetParamInfo`, CUDA 12.4.
    pub(crate) func_get_param_info: Option<FuncGetParamInfo>,
    /// `cuFuncLoad`, CUDA 12.4.
    pub(crate) func_load: Option<FuncLoad>,
    /// `cuEventElapsedTime`, renamed in CUDA 12.8.
    pub(crate) event_elapsed_time: Option<EventElapsedTime>,
}

/// A call's address, if this driver has it.
pub(crate) fn look_up(name: &CStr, version: i32) -> Option<*mut c_void> {
    let mut address = std::ptr::null_mut();
    // SAFETY: `name` ends in zero; the call writes one pointer; the last argument may be null.
    let code = unsafe {
        cuGetProcAddress_v2(
            name.as_ptr(),
            &mut address,
            version,
            0,
            std::ptr::null_mut(),
        )
    };
    (code == CUresult::CUDA_SUCCESS && !address.is_null()).then_some(address)
}

/// Whether the driver is this project's virtual GPU, which counts and takes no time.
pub(crate) fn is_virtual() -> bool {
    look_up(c"vgpuTakeFindings", VERSION_OF_EXTRAS).is_some()
}

/// The CUDA version that the virtual GPU's own calls are looked up with: any will do.
pub(crate) const VERSION_OF_EXTRAS: i32 = 12_040;

/// The optional calls, looked up once: they depend on the driver alone, which a process has one of.
pub(crate) fn optional() -> &'static Optional {
    static OPTIONAL: OnceLock<Optional> = OnceLock::new();
    OPTIONAL.get_or_init(|| {
        // SAFETY: the driver gave these addresses for these names, whose types are those of
        // cuda.h.
        unsafe {
            Optional {
                func_get_param_info: look_up(c"cuFuncGetParamInfo", 12_040)
                    .map(|f| std::mem::transmute::<*mut c_void, FuncGetParamInfo>(f)),
                func_load: look_up(c"cuFuncLoad", 12_040)
                    .map(|f| std::mem::transmute::<*mut c_void, FuncLoad>(f)),
                event_elapsed_time: look_up(c"cuEventElapsedTime", 12_000)
                    .map(|f| std::mem::transmute::<*mut c_void, EventElapsedTime>(f)),
            }
        }
    })
}
