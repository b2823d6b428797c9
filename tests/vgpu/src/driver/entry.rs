//! How programs find the functions of the API: by name and by the CUDA version that they were
//! written for, as some functions have had several forms.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::status::{In, Out, Status};
use super::{api, explain};

/// The version of CUDA that the driver is of: that of the newest headers it was held against.
pub(super) const VERSION: i32 = 13_050;

/// Where names without a version meant something else before: the function for programs written
/// for so many CUDA versions, newest first (`cudaTypedefs.h`). A function without a line here has
/// the one form it has.
const FORMS: &[(&str, &[(i32, &str)])] = &[
    (
        "cuCtxCreate",
        &[
            (12_050, "cuCtxCreate_v4"),
            (11_040, "cuCtxCreate_v3"),
            (3_020, "cuCtxCreate_v2"),
        ],
    ),
    ("cuCtxDestroy", &[(4_000, "cuCtxDestroy_v2")]),
    ("cuCtxPopCurrent", &[(4_000, "cuCtxPopCurrent_v2")]),
    ("cuCtxPushCurrent", &[(4_000, "cuCtxPushCurrent_v2")]),
    (
        "cuDeviceGetUuid",
        &[(11_040, "cuDeviceGetUuid_v2"), (9_020, "cuDeviceGetUuid")],
    ),
    (
        "cuEventElapsedTime",
        &[
            (12_080, "cuEventElapsedTime_v2"),
            (2_000, "cuEventElapsedTime"),
        ],
    ),
    (
        "cuGetProcAddress",
        &[
            (12_000, "cuGetProcAddress_v2"),
            (11_030, "cuGetProcAddress"),
        ],
    ),
    (
        "cuGraphAddDependencies",
        &[
            (12_030, "cuGraphAddDependencies_v2"),
            (10_000, "cuGraphAddDependencies"),
        ],
    ),
    (
        "cuGraphAddKernelNode",
        &[
            (12_000, "cuGraphAddKernelNode_v2"),
            (10_000, "cuGraphAddKernelNode"),
        ],
    ),
    (
        "cuGraphExecKernelNodeSetParams",
        &[
            (12_000, "cuGraphExecKernelNodeSetParams_v2"),
            (10_010, "cuGraphExecKernelNodeSetParams"),
        ],
    ),
    (
        "cuGraphExecUpdate",
        &[
            (12_000, "cuGraphExecUpdate_v2"),
            (10_020, "cuGraphExecUpdate"),
        ],
    ),
    (
        "cuGraphGetEdges",
        &[(12_030, "cuGraphGetEdges_v2"), (10_000, "cuGraphGetEdges")],
    ),
    (
        "cuGraphInstantiate",
        &[
            (12_000, "cuGraphInstantiateWithFlags"),
            (11_000, "cuGraphInstantiate_v2"),
        ],
    ),
    (
        "cuGraphKernelNodeGetParams",
        &[
            (12_000, "cuGraphKernelNodeGetParams_v2"),
            (10_000, "cuGraphKernelNodeGetParams"),
        ],
    ),
    (
        "cuGraphKernelNodeSetParams",
        &[
            (12_000, "cuGraphKernelNodeSetParams_v2"),
            (10_000, "cuGraphKernelNodeSetParams"),
        ],
    ),
    (
        "cuGraphNodeGetDependencies",
        &[
            (12_030, "cuGraphNodeGetDependencies_v2"),
            (10_000, "cuGraphNodeGetDependencies"),
        ],
    ),
    (
        "cuGraphNodeGetDependentNodes",
        &[
            (12_030, "cuGraphNodeGetDependentNodes_v2"),
            (10_000, "cuGraphNodeGetDependentNodes"),
        ],
    ),
    (
        "cuGraphRemoveDependencies",
        &[
            (12_030, "cuGraphRemoveDependencies_v2"),
            (10_000, "cuGraphRemoveDependencies"),
        ],
    ),
    (
        "cuMemAdvise",
        &[(12_020, "cuMemAdvise_v2"), (8_000, "cuMemAdvise")],
    ),
    (
        "cuMemPrefetchAsync",
        &[
            (12_020, "cuMemPrefetchAsync_v2"),
            (8_000, "cuMemPrefetchAsync"),
        ],
    ),
    (
        "cuStreamBeginCapture",
        &[
            (10_010, "cuStreamBeginCapture_v2"),
            (10_000, "cuStreamBeginCapture"),
        ],
    ),
    (
        "cuStreamGetCaptureInfo",
        &[
            (12_030, "cuStreamGetCaptureInfo_v3"),
            (11_030, "cuStreamGetCaptureInfo_v2"),
            (10_010, "cuStreamGetCaptureInfo"),
        ],
    ),
    (
        "cuStreamUpdateCaptureDependencies",
        &[
            (12_030, "cuStreamUpdateCaptureDependencies_v2"),
            (11_030, "cuStreamUpdateCaptureDependencies"),
        ],
    ),
    ("cuStreamWaitValue32", &[(8_000, "cuStreamWaitValue32_v2")]),
    ("cuStreamWaitValue64", &[(9_000, "cuStreamWaitValue64_v2")]),
    (
        "cuStreamWriteValue32",
        &[(8_000, "cuStreamWriteValue32_v2")],
    ),
    (
        "cuStreamWriteValue64",
        &[(9_000, "cuStreamWriteValue64_v2")],
    ),
];

/// Since when a second form with wider integers is what a name means, where nothing else is said.
const WIDE: i32 = 3_020;

/// Names that end so are forms of others, and not to be asked for.
const FORM: [&str; 3] = ["_v2", "_v3", "_v4"];

/// A function of the API.
pub(crate) struct Function {
    pub(crate) name: &'static str,
    pub(crate) address: usize,
    /// The names and types of its arguments.
    pub(crate) arguments: &'static [(&'static str, &'static str)],
}

fn functions() -> &'static BTreeMap<&'static str, Function> {
    static TABLE: LazyLock<BTreeMap<&'static str, Function>> = LazyLock::new(|| {
        let all = super::tables().into_iter().flatten();
        all.map(|function| (function.name, function)).collect()
    });
    &TABLE
}

/// What a search for a function comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Search {
    Found(usize),
    Unknown,
    /// It is younger than the version that was asked for.
    TooNew,
}

fn search(name: &str, version: i32) -> Search {
    let form = |symbol: &str| functions().get(symbol).map(|f| f.address);
    if let Some((_, forms)) = FORMS.iter().find(|(base, _)| *base == name) {
        let fitting = forms.iter().find(|(since, _)| version >= *since);
        return match fitting.and_then(|(_, symbol)| form(symbol)) {
            Some(address) => Search::Found(address),
            None => Search::TooNew,
        };
    }
    if FORM.iter().any(|suffix| name.ends_with(suffix)) {
        return Search::Unknown;
    }
    let newest = FORM.iter().rev().find_map(|s| form(&format!("{name}{s}")));
    match (newest, form(name)) {
        (Some(_), None) if version < WIDE => Search::TooNew,
        (Some(address), _) | (None, Some(address)) => Search::Found(address),
        (None, None) => Search::Unknown,
    }
}

fn find(name: In<u8>, function: Out<usize>, version: i32, flags: u64) -> Result<Search, Status> {
    let name = String::from_utf8_lossy(&name.c_string()?).into_owned();
    if !(0..=VERSION).contains(&version) || flags & !3 != 0 {
        return Err(Status::INVALID_VALUE);
    }
    if flags & 2 != 0 && name == "cuLaunchKernel" {
        explain(
            "cuGetProcAddress",
            "functions of the per-thread default stream are not here; stream 0 is the legacy one",
        );
    }
    let found = search(&name, version);
    function.set(match found {
        Search::Found(address) => address,
        _ => 0,
    })?;
    Ok(found)
}

api! {
    fn cuDriverGetVersion(version: Out<i32>) |_driver| {
        version.set(VERSION)
    }

    fn cuGetProcAddress(name: In<u8>, function: Out<usize>, version: i32, flags: u64) |_driver| {
        match find(name, function, version, flags)? {
            Search::Found(_) => Ok(()),
            _ => Err(Status::NOT_FOUND),
        }
    }

    fn cuGetProcAddress_v2(
        name: In<u8>,
        function: Out<usize>,
        version: i32,
        flags: u64,
        result: Out<u32>,
    ) |_driver| {
        result.set_if_wanted(match find(name, function, version, flags)? {
            Search::Found(_) => 0,
            Search::Unknown => 1,
            Search::TooNew => 2,
        });
        Ok(())
    }

    // Tables that the CUDA runtime and tools share with the driver and nobody describes.
    fn cuGetExportTable(_table: u64, _id: u64) |_driver| {
        Err(Status::NOT_SUPPORTED)
    }

    // All functions with their arguments, a line each: for the tests of this library.
    fn vgpuFunctions(text: Out<u8>, capacity: u64, length: Out<u64>) |_driver| {
        let mut words = String::new();
        for function in functions().values() {
            words += function.name;
            for (name, kind) in function.arguments {
                words += &format!(" {name}:{}", kind.replace(' ', ""));
            }
            words.push('\n');
        }
        length.set(words.len() as u64)?;
        if words.len() as u64 <= capacity {
            text.write(words.as_bytes());
        }
        Ok(())
    }
}
