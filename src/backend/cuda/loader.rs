//! Looks for the driver when it is first called, and not when the program starts: so that a program
//! with the feature `cuda` starts on a machine without a driver, and can say so.
//!
//! Every call of the driver that this crate or `cust` makes is a symbol of our own here, which jumps
//! to where a slot points. The calls that can come first (`cuInit`, `cuDriverGetVersion`,
//! `cuGetProcAddress`) point to functions that load `libcuda.so.1` and fill all slots; until then
//! the others return `CUDA_ERROR_NOT_INITIALIZED`, as a driver does. Since all symbols are found
//! here, the linker (with `--as-needed`, as rustc calls it) does not make the program need the
//! library. The symbols are hidden: other libraries in the process find the driver as ever.
//!
//! Linux alone; elsewhere the program needs the driver to start.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// The driver, by the name that every program finds it under.
const DRIVER: &str = "libcuda.so.1";

/// `CUresult`: the codes that are returned here.
const NOT_INITIALIZED: u32 = 3;
/// "A stub in the place of the driver": what these symbols are where there is none.
pub(super) const STUB_LIBRARY: u32 = 34;
const NOT_SUPPORTED: u32 = 801;

extern "C" fn not_loaded() -> u32 {
    NOT_INITIALIZED
}

/// For what a driver does not have.
extern "C" fn not_there() -> u32 {
    NOT_SUPPORTED
}

/// A symbol for each name, and a table of their slots.
macro_rules! forward {
    ($($name:ident: $first:expr;)*) => {
        $(
            #[allow(non_snake_case, reason = "named after the call")]
            mod $name {
                use super::*;
                pub(super) static SLOT: AtomicPtr<c_void> = AtomicPtr::new($first as *mut c_void);
                #[cfg(target_arch = "x86_64")]
                std::arch::global_asm!(
                    concat!(".globl ", stringify!($name)),
                    concat!(".hidden ", stringify!($name)),
                    concat!(".type ", stringify!($name), ", @function"),
                    concat!(stringify!($name), ":"),
                    "jmp *{slot}(%rip)",
                    slot = sym SLOT,
                    options(att_syntax),
                );
                #[cfg(target_arch = "aarch64")]
                std::arch::global_asm!(
                    concat!(".globl ", stringify!($name)),
                    concat!(".hidden ", stringify!($name)),
                    concat!(".type ", stringify!($name), ", %function"),
                    concat!(stringify!($name), ":"),
                    // x16 is for such jumps: no argument is in it.
                    "adrp x16, {slot}",
                    "ldr x16, [x16, :lo12:{slot}]",
                    "br x16",
                    slot = sym SLOT,
                );
            }
        )*

        static TABLE: &[(&str, &AtomicPtr<c_void>)] = &[
            $((concat!(stringify!($name), "\0"), &$name::SLOT),)*
        ];
    };
}

macro_rules! forward_all {
    ($($name:ident)*) => {
        forward! {
            cuInit: load_then_init;
            cuDriverGetVersion: load_then_get_version;
            cuGetProcAddress_v2: load_then_get_address;
            $($name: not_loaded;)*
        }
    };
}

// Those of `build/bindings.rs`, and all that `cust` has.
forward_all! {
    cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy cuCtxCreate_v2 cuCtxDestroy_v2
    cuCtxEnablePeerAccess cuCtxGetApiVersion cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevice
    cuCtxGetFlags cuCtxGetLimit cuCtxGetSharedMemConfig cuCtxGetStreamPriorityRange
    cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetLimit
    cuCtxSetSharedMemConfig cuCtxSynchronize cuDestroyExternalMemory cuDeviceCanAccessPeer
    cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetName cuDeviceGetP2PAttribute
    cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2 cuDevicePrimaryCtxRetain
    cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2 cuEventCreate cuEventDestroy_v2
    cuEventElapsedTime cuEventQuery cuEventRecord cuEventSynchronize
    cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig
    cuFuncSetSharedMemConfig cuGetErrorName cuGetErrorString cuGraphAddKernelNode cuGraphCreate
    cuGraphDebugDotPrint cuGraphDestroy cuGraphExecDestroy cuGraphGetEdges cuGraphGetNodes
    cuGraphInstantiateWithFlags cuGraphKernelNodeGetParams cuGraphLaunch cuGraphNodeGetType
    cuGraphUpload cuImportExternalMemory cuLaunchHostFunc cuLaunchKernel cuLaunchKernelEx
    cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy cuMemAdvise cuMemAllocAsync
    cuMemAllocHost_v2 cuMemAllocManaged cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2
    cuMemGetAddressRange_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemHostGetDevicePointer_v2
    cuMemPrefetchAsync cuMemcpy2D_v2 cuMemcpyAsync cuMemcpyAtoH_v2 cuMemcpyDtoDAsync_v2
    cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoA_v2 cuMemcpyHtoDAsync_v2
    cuMemcpyHtoD_v2 cuMemsetD16Async cuMemsetD16_v2 cuMemsetD32Async cuMemsetD32_v2
    cuMemsetD8Async cuMemsetD8_v2 cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad
    cuModuleLoadData cuModuleLoadDataEx cuModuleUnload cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor cuOccupancyMaxPotentialBlockSize
    cuPointerGetAttribute cuStreamBeginCapture_v2 cuStreamCreate cuStreamCreateWithPriority
    cuStreamDestroy_v2 cuStreamEndCapture cuStreamGetFlags cuStreamGetPriority cuStreamIsCapturing
    cuStreamQuery cuStreamSynchronize cuStreamWaitEvent cuStreamWaitValue32_v2
    cuStreamWriteValue32_v2 cuStreamWriteValue64_v2 cuSurfObjectCreate cuSurfObjectDestroy
    cuSurfObjectGetResourceDesc cuTexObjectCreate cuTexObjectDestroy cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
}

/// The driver, loaded by the first who asks and then for good; or why it is not there.
fn driver() -> &'static Result<Library, String> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    LOADED.get_or_init(|| {
        // SAFETY: what a driver does when it is loaded is its own affair; programs that need it to
        // start do the same.
        let library = unsafe { Library::open(Some(DRIVER), RTLD_NOW | RTLD_LOCAL) };
        // The words of the system's loader are in the source.
        let library = library.map_err(|error| {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            source.unwrap_or_else(|| error.to_string())
        })?;
        for (name, slot) in TABLE {
            // SAFETY: only the address is taken.
            let address = unsafe { library.get::<*mut c_void>(name.as_bytes()) };
            let address = address.map_or(not_there as *mut c_void, |symbol| symbol.into_raw());
            slot.store(address, Ordering::Release);
        }
        Ok(library)
    })
}

/// Why there is no driver, if there is none.
pub(super) fn missing() -> Option<&'static str> {
    driver().as_ref().err().map(String::as_str)
}

/// The loaded driver's function, of type `F`.
///
/// # Safety
/// `F` is a function pointer, of the function's type.
unsafe fn loaded<F: Copy>(slot: &AtomicPtr<c_void>) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    driver().as_ref().ok()?;
    let address = slot.load(Ordering::Acquire);
    // SAFETY: the caller's promise; both are pointers.
    Some(unsafe { std::mem::transmute_copy(&address) })
}

extern "C" fn load_then_init(flags: u32) -> u32 {
    // SAFETY: the type of cuInit.
    let init = unsafe { loaded::<extern "C" fn(u32) -> u32>(&cuInit::SLOT) };
    init.map_or(STUB_LIBRARY, |init| init(flags))
}

extern "C" fn load_then_get_version(version: *mut c_int) -> u32 {
    type GetVersion = extern "C" fn(*mut c_int) -> u32;
    // SAFETY: the type of cuDriverGetVersion.
    let get = unsafe { loaded::<GetVersion>(&cuDriverGetVersion::SLOT) };
    get.map_or(STUB_LIBRARY, |get| get(version))
}

extern "C" fn load_then_get_address(
    name: *const c_char,
    address: *mut *mut c_void,
    version: c_int,
    flags: u64,
    status: *mut c_int,
) -> u32 {
    type GetAddress = extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_int) -> u32;
    // SAFETY: the type of cuGetProcAddress_v2.
    let get = unsafe { loaded::<GetAddress>(&cuGetProcAddress_v2::SLOT) };
    get.map_or(STUB_LIBRARY, |get| {
        get(name, address, version, flags, status)
    })
}
