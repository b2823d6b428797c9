//! Every function is there by its name and by `cuGetProcAddress`.

use std::ffi::CString;

use crate::cuda::{Cuda, call, passes};
use crate::{cu, fails, here};

/// What `cust` 0.3.2 links against.
const CUST: &str = "
    cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy cuCtxCreate_v2 cuCtxDestroy_v2
    cuCtxGetApiVersion cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevice cuCtxGetFlags
    cuCtxGetLimit cuCtxGetSharedMemConfig cuCtxGetStreamPriorityRange cuCtxPopCurrent_v2
    cuCtxPushCurrent_v2 cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetLimit cuCtxSetSharedMemConfig
    cuCtxSynchronize cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount
    cuDeviceGetName cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2
    cuDevicePrimaryCtxRetain cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2 cuDriverGetVersion
    cuEventCreate cuEventDestroy_v2 cuEventElapsedTime cuEventQuery cuEventRecord
    cuEventSynchronize cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetCacheConfig
    cuFuncSetSharedMemConfig cuGetErrorString cuGraphAddKernelNode cuGraphCreate
    cuGraphDebugDotPrint cuGraphDestroy cuGraphGetEdges cuGraphGetNodes
    cuGraphKernelNodeGetParams cuGraphNodeGetType cuImportExternalMemory cuInit cuLaunchHostFunc
    cuLaunchKernel cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy cuMemAdvise
    cuMemAllocAsync cuMemAllocHost_v2 cuMemAllocManaged cuMemAlloc_v2 cuMemFreeAsync
    cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemPrefetchAsync cuMemcpy2D_v2 cuMemcpyAtoH_v2
    cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoA_v2
    cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemsetD16Async cuMemsetD16_v2 cuMemsetD32Async
    cuMemsetD32_v2 cuMemsetD8Async cuMemsetD8_v2 cuModuleGetFunction cuModuleGetGlobal_v2
    cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxPotentialBlockSize cuStreamCreateWithPriority cuStreamDestroy_v2
    cuStreamGetFlags cuStreamGetPriority cuStreamSynchronize cuStreamWaitEvent
    cuSurfObjectCreate cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuTexObjectCreate
    cuTexObjectDestroy cuTexObjectGetResourceDesc cuTexObjectGetResourceViewDesc
";

/// The newest version this is held against.
const NEWEST: i32 = 13_050;

/// The address that a program of a CUDA version gets for a name, and what is said of it.
fn find(cuda: &Cuda, name: &str, version: i32) -> (usize, u32) {
    let name = CString::new(name).expect("a name");
    let (mut address, mut status) = (0usize, 9u32);
    cu!(
        cuda,
        cuGetProcAddress_v2(name.as_ptr(), &mut address, version, 0u64, &mut status)
    );
    (address, status)
}

/// All functions: their names, and the names and types of their arguments.
pub(crate) fn all(cuda: &Cuda) -> Vec<(String, Vec<(String, String)>)> {
    let mut text = vec![0u8; 1 << 16];
    let mut length = 0u64;
    cu!(cuda, vgpuFunctions(&mut text[..], text.len(), &mut length));
    let text = String::from_utf8(text[..length as usize].to_vec()).expect("lines");
    let argument = |word: &str| {
        let (name, kind) = word.split_once(':').expect("a name and a type");
        (name.to_owned(), kind.to_owned())
    };
    text.lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next().expect("a name").to_owned();
            (name, words.map(argument).collect())
        })
        .collect()
}

#[test]
fn every_function_is_found_in_both_ways() {
    passes(here!(), &[], |cuda| {
        let names = all(cuda);
        assert!(names.len() > 250, "{} functions", names.len());
        for (name, _) in &names {
            let symbol = cuda
                .address(name)
                .unwrap_or_else(|| panic!("{name} is not exported"));
            // By its base name, some version of CUDA gets exactly this one.
            let base = ["_v2", "_v3", "_v4"]
                .iter()
                .find_map(|v| name.strip_suffix(v));
            let base = match name.as_str() {
                "cuGraphInstantiateWithFlags" => "cuGraphInstantiate",
                name => base.unwrap_or(name),
            };
            let versions = [
                2_000, 3_020, 4_000, 8_000, 10_000, 10_010, 10_020, 11_000, 11_040,
            ]
            .into_iter()
            .chain([11_030, 12_000, 12_030, 12_060, 12_080, NEWEST]);
            let found = versions.map(|version| find(cuda, base, version).0);
            assert!(found.into_iter().any(|at| at == symbol), "{name} by {base}");
        }
    });
}

#[test]
fn everything_that_cust_links_against_is_there() {
    passes(here!(), &[], |cuda| {
        let names: Vec<&str> = CUST.split_whitespace().collect();
        assert_eq!(names.len(), 105);
        let absent: Vec<&&str> = names
            .iter()
            .filter(|name| cuda.address(name).is_none())
            .collect();
        assert!(absent.is_empty(), "{absent:?}");
    });
}

#[test]
fn a_program_gets_the_form_of_its_own_cuda_version() {
    passes(here!(), &[], |cuda| {
        for (name, version, form) in [
            ("cuMemAlloc", NEWEST, "cuMemAlloc_v2"),
            ("cuMemAlloc", 3_020, "cuMemAlloc_v2"),
            ("cuCtxCreate", 11_000, "cuCtxCreate_v2"),
            ("cuCtxCreate", 12_000, "cuCtxCreate_v3"),
            ("cuCtxCreate", 13_000, "cuCtxCreate_v4"),
            ("cuStreamBeginCapture", 10_000, "cuStreamBeginCapture"),
            ("cuStreamBeginCapture", 12_000, "cuStreamBeginCapture_v2"),
            ("cuStreamGetCaptureInfo", 11_000, "cuStreamGetCaptureInfo"),
            (
                "cuStreamGetCaptureInfo",
                11_030,
                "cuStreamGetCaptureInfo_v2",
            ),
            (
                "cuStreamGetCaptureInfo",
                NEWEST,
                "cuStreamGetCaptureInfo_v3",
            ),
            ("cuGraphInstantiate", 11_000, "cuGraphInstantiate_v2"),
            ("cuGraphInstantiate", 12_000, "cuGraphInstantiateWithFlags"),
            (
                "cuGraphKernelNodeGetParams",
                11_080,
                "cuGraphKernelNodeGetParams",
            ),
            (
                "cuGraphKernelNodeGetParams",
                12_000,
                "cuGraphKernelNodeGetParams_v2",
            ),
            ("cuMemAdvise", 12_000, "cuMemAdvise"),
            ("cuMemAdvise", 12_020, "cuMemAdvise_v2"),
            ("cuGetProcAddress", 11_080, "cuGetProcAddress"),
            ("cuGetProcAddress", 12_000, "cuGetProcAddress_v2"),
        ] {
            let expected = cuda.address(form).unwrap_or_else(|| panic!("{form}"));
            assert_eq!(
                find(cuda, name, version),
                (expected, 0),
                "{name} of {version}"
            );
        }
        // Unknown; known but younger; a form is not a name.
        assert_eq!(find(cuda, "cuNothing", NEWEST), (0, 1));
        assert_eq!(find(cuda, "cuMemAlloc", 2_000), (0, 2));
        assert_eq!(find(cuda, "cuStreamBeginCapture", 9_000), (0, 2));
        assert_eq!(find(cuda, "cuMemAlloc_v2", NEWEST), (0, 1));
        let (mut address, mut status) = (0usize, 0u32);
        let name = c"cuInit".as_ptr();
        fails!(
            1,
            cuda,
            cuGetProcAddress_v2(name, &mut address, 99_000, 0u64, &mut status)
        );
        // What was found works.
        let (version, _) = find(cuda, "cuDriverGetVersion", NEWEST);
        let mut number = 0i32;
        assert_eq!(call(version, &[std::ptr::from_mut(&mut number) as u64]), 0);
        assert_eq!(number, NEWEST);
    });
}

#[test]
fn what_is_not_there_says_so_by_name() {
    let refused = [
        "cuTexObjectCreate",
        "cuIpcGetMemHandle",
        "cuGetExportTable",
        "cuGraphDebugDotPrint",
    ];
    let body = |cuda: &Cuda| {
        cuda.start();
        for name in [
            "cuTexObjectCreate",
            "cuIpcGetMemHandle",
            "cuGetExportTable",
            "cuGraphDebugDotPrint",
        ] {
            assert_eq!(cuda.call(name, &[0, 0]), 801, "{name}");
        }
    };
    if let Some(child) = crate::cuda::child(here!(), &[], body) {
        assert_eq!(child.code, Some(0), "{}", child.errors);
        for name in refused {
            let line = format!("{name} is not supported");
            assert!(child.errors.contains(&line), "{line}: {}", child.errors);
        }
    }
}
