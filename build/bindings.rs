//! The Rust side of `cuda/abi.h`, and of the driver calls that `cust` lacks or whose error codes
//! it does not know.

use std::fs;
use std::path::Path;

use super::toolkit::{self, Toolkit};

/// The calls of the driver. Those newer than CUDA 12.0, and those whose name depends on the header,
/// are not here: `src/backend/cuda/sys.rs` looks them up when the program runs, so that it starts on
/// an older driver.
const CALLS: [&str; 57] = [
    "cuCtxEnablePeerAccess",
    "cuCtxGetCurrent",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceCanAccessPeer",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetP2PAttribute",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuGetErrorString",
    "cuGetProcAddress_v2",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemcpyAsync",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuPointerGetAttribute",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamIsCapturing",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
    "cuStreamWriteValue64_v2",
];

/// Driver bindings that also name what callers choose by.
const TYPES: [&str; 6] = [
    "CUdevice_P2PAttribute_enum",
    "CUdevice_attribute_enum",
    "CUevent_flags_enum",
    "CUlaunchAttributeID_enum",
    "CUstream_flags_enum",
    "CUstreamCaptureMode_enum",
];

fn write(builder: bindgen::Builder, to: &Path) -> Result<(), String> {
    let bindings = builder
        .prepend_enum_name(false)
        .use_core()
        .rust_edition(bindgen::RustEdition::Edition2024)
        .layout_tests(true)
        .generate()
        .map_err(|e| format!("bindgen: {e}"))?;
    bindings
        .write_to_file(to)
        .map_err(|e| format!("{}: cannot be written: {e}", to.display()))
}

/// Generates both files.
pub(crate) fn generate(root: &Path, toolkit: &Toolkit, out: &Path) -> Result<(), String> {
    let headers = toolkit::compiler_headers();
    let builder = |header: &Path| {
        let mut builder = bindgen::builder().header(header.display().to_string());
        if let Some(headers) = &headers {
            builder = builder
                .clang_arg("-idirafter")
                .clang_arg(headers.display().to_string());
        }
        builder
    };
    let mut driver = builder(&toolkit.root.join("include/cuda.h"))
        .generate_comments(false)
        .allowlist_var("CU_MEMHOSTALLOC_.*")
        .default_enum_style(bindgen::EnumVariation::NewType {
            is_bitfield: false,
            is_global: false,
        });
    for call in CALLS {
        driver = driver.allowlist_function(call);
    }
    for name in TYPES {
        driver = driver.allowlist_type(name);
    }
    write(driver, &out.join("driver.rs"))?;

    let abi = root.join("cuda/abi.h");
    // With what it includes of the project.
    let own = format!("{}/.*", root.join("cuda").display());
    let abi = builder(&abi)
        .allowlist_file(own)
        .derive_default(true)
        .default_enum_style(bindgen::EnumVariation::Consts);
    write(abi, &out.join("abi.rs"))
}

/// Puts the bindings in place that are kept for machines without a toolkit; tests/cuda_build.rs
/// compares them with those that are generated, and writes them anew.
pub(crate) fn copy_prepared(root: &Path, out: &Path) -> Result<(), String> {
    for name in ["driver.rs", "abi.rs"] {
        let from = root.join("build/prepared").join(name);
        fs::copy(&from, out.join(name)).map_err(|e| format!("{}: {e}", from.display()))?;
    }
    Ok(())
}
