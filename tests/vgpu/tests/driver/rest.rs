//! Calls that wait for the devices though their names do not say so: who relies on their not
//! waiting deadlocks, and the finding names the call. Those that do not wait go on.

use crate::cuda::{Cuda, KERNELS, passes};
use crate::{cu, here, result};

const TIMEOUT: u32 = 702;

/// Two devices, with a kernel on the first that spins until somebody stores to its flag.
struct Spinning<'a> {
    cuda: &'a Cuda,
    module: u64,
    flag: u64,
    /// Memory and a stream made before.
    room: u64,
    host: u64,
    stream: u64,
    spinner: u64,
}

impl<'a> Spinning<'a> {
    /// `prepare` runs before the kernel starts.
    fn new<T>(cuda: &'a Cuda, prepare: impl FnOnce(&Self) -> T) -> (Self, T) {
        cuda.start();
        let module = cuda.module(KERNELS);
        let mut host = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut host, 64u64, 3u32));
        let new = Self {
            cuda,
            module,
            flag: cuda.put(&[0]),
            room: cuda.put(&[0; 4]),
            host,
            stream: cuda.stream(),
            spinner: cuda.stream(),
        };
        let prepared = prepare(&new);
        let spin = cuda.function(module, "spin");
        cu!(cuda, cuCtxSynchronize());
        cuda.launch(spin, new.spinner, 1, &[new.flag]);
        (new, prepared)
    }

    /// A graph of one kernel.
    fn graph(&self) -> u64 {
        let (mut graph, mut exec) = (0u64, 0u64);
        let add = self.cuda.function(self.module, "add");
        cu!(self.cuda, cuStreamBeginCapture_v2(self.stream, 2u32));
        self.cuda.launch(add, self.stream, 4, &[self.room, 1]);
        cu!(self.cuda, cuStreamEndCapture(self.stream, &mut graph));
        cu!(
            self.cuda,
            cuGraphInstantiateWithFlags(&mut exec, graph, 0u64)
        );
        exec
    }

    /// A kernel of a library, which nothing has loaded yet.
    fn kernel(&self) -> u64 {
        let text = std::ffi::CString::new(KERNELS).expect("a text");
        let (mut library, mut kernel) = (0u64, 0u64);
        let cuda = self.cuda;
        cu!(
            cuda,
            cuLibraryLoadData(
                &mut library,
                text.as_ptr(),
                0u64,
                0u64,
                0u32,
                0u64,
                0u64,
                0u32
            )
        );
        cu!(
            cuda,
            cuLibraryGetKernel(&mut kernel, library, c"add".as_ptr())
        );
        kernel
    }

    fn try_launch(&self, function: u64) -> u32 {
        let (room, one) = (self.room, 1u64);
        let params = [&room as *const u64, &one as *const u64];
        result!(
            self.cuda,
            cuLaunchKernel(
                function,
                1u32,
                1u32,
                1u32,
                4u32,
                1u32,
                1u32,
                0u32,
                self.stream,
                &params[..],
                0u64
            )
        )
    }
}

/// A call beside the spinner, given what was prepared; its code.
type Call = fn(&Spinning, u64) -> u32;
type Prepare = fn(&Spinning) -> u64;

const NOTHING: Prepare = |_| 0;

/// The calls that wait, by name.
const WAIT: [(&str, Prepare, Call); 13] = [
    ("cuMemAlloc_v2", NOTHING, |s, _| {
        result!(s.cuda, cuMemAlloc_v2(&mut 0u64, 64u64))
    }),
    ("cuMemAllocPitch_v2", NOTHING, |s, _| {
        let (mut at, mut pitch) = (0u64, 0u64);
        result!(
            s.cuda,
            cuMemAllocPitch_v2(&mut at, &mut pitch, 64u64, 2u64, 4u32)
        )
    }),
    ("cuMemAllocManaged", NOTHING, |s, _| {
        result!(s.cuda, cuMemAllocManaged(&mut 0u64, 64u64, 1u32))
    }),
    ("cuMemAllocHost_v2", NOTHING, |s, _| {
        result!(s.cuda, cuMemAllocHost_v2(&mut 0u64, 64u64))
    }),
    ("cuMemHostAlloc", NOTHING, |s, _| {
        result!(s.cuda, cuMemHostAlloc(&mut 0u64, 64u64, 3u32))
    }),
    ("cuMemHostRegister_v2", NOTHING, |s, _| {
        let page = Box::leak(Box::new([0u64; 8]));
        result!(s.cuda, cuMemHostRegister_v2(&page[..], 64u64, 0u32))
    }),
    ("cuMemFree_v2", NOTHING, |s, _| {
        result!(s.cuda, cuMemFree_v2(s.room))
    }),
    ("cuMemFreeHost", NOTHING, |s, _| {
        result!(s.cuda, cuMemFreeHost(s.host))
    }),
    (
        "cuLaunchKernel",
        |s| s.kernel(),
        |s, kernel| s.try_launch(kernel),
    ),
    (
        "cuKernelGetFunction",
        |s| s.kernel(),
        |s, kernel| result!(s.cuda, cuKernelGetFunction(&mut 0u64, kernel)),
    ),
    ("cuModuleGetFunction", NOTHING, |s, _| {
        result!(
            s.cuda,
            cuModuleGetFunction(&mut 0u64, s.module, c"copy".as_ptr())
        )
    }),
    (
        "cuGraphUpload",
        |s| s.graph(),
        |s, exec| result!(s.cuda, cuGraphUpload(exec, s.stream)),
    ),
    (
        "cuGraphLaunch",
        |s| s.graph(),
        |s, exec| result!(s.cuda, cuGraphLaunch(exec, s.stream)),
    ),
];

#[test]
fn who_relies_on_these_not_waiting_deadlocks_and_is_told() {
    passes(here!(), &[], |cuda| {
        for (name, prepare, call) in WAIT {
            let (spinning, prepared) = Spinning::new(cuda, prepare);
            // The store that would release the kernel comes after the call.
            assert_eq!(call(&spinning, prepared), TIMEOUT, "{name}");
            let findings = cuda.findings();
            assert_eq!(findings.lines().count(), 1, "{name}: {findings}");
            for words in [
                "deadlock: nothing can advance any more: block [0, 0, 0] warp 0",
                "spin on",
                &format!(
                    "the host waits in {name}, which waits for all that the devices had to do when \
                     it was called"
                ),
            ] {
                assert!(findings.contains(words), "{name}: {words}: {findings}");
            }
            cu!(cuda, cuDevicePrimaryCtxReset_v2(0));
        }
    });
}

/// The calls that do not wait.
const GO_ON: [(&str, Prepare, Call); 12] = [
    ("cuMemAllocAsync", NOTHING, |s, _| {
        result!(s.cuda, cuMemAllocAsync(&mut 0u64, 64u64, s.stream))
    }),
    (
        "cuMemFreeAsync",
        |s| {
            let mut at = 0u64;
            cu!(s.cuda, cuMemAllocAsync(&mut at, 64u64, s.stream));
            at
        },
        |s, at| result!(s.cuda, cuMemFreeAsync(at, s.stream)),
    ),
    ("cuMemcpyHtoDAsync_v2", NOTHING, |s, _| {
        result!(
            s.cuda,
            cuMemcpyHtoDAsync_v2(s.room, s.host, 16u64, s.stream)
        )
    }),
    ("cuMemsetD8Async", NOTHING, |s, _| {
        result!(s.cuda, cuMemsetD8Async(s.room, 0u8, 16u64, s.stream))
    }),
    ("cuStreamCreate", NOTHING, |s, _| {
        result!(s.cuda, cuStreamCreate(&mut 0u64, 1u32))
    }),
    ("cuEventCreate", NOTHING, |s, _| {
        result!(s.cuda, cuEventCreate(&mut 0u64, 2u32))
    }),
    ("cuMemGetInfo_v2", NOTHING, |s, _| {
        result!(s.cuda, cuMemGetInfo_v2(&mut 0u64, &mut 0u64))
    }),
    // Lazily loaded: a module's kernels are not loaded with it.
    ("cuModuleLoadData", NOTHING, |s, _| {
        let text = std::ffi::CString::new(KERNELS).expect("a text");
        result!(s.cuda, cuModuleLoadData(&mut 0u64, text.as_ptr()))
    }),
    (
        "the launch of a function",
        |s| s.cuda.function(s.module, "add"),
        |s, function| s.try_launch(function),
    ),
    (
        "the second launch of a kernel",
        |s| {
            let kernel = s.kernel();
            assert_eq!(s.try_launch(kernel), 0);
            kernel
        },
        |s, kernel| s.try_launch(kernel),
    ),
    (
        "the launch of a graph that was uploaded",
        |s| {
            let exec = s.graph();
            cu!(s.cuda, cuGraphUpload(exec, s.stream));
            exec
        },
        |s, exec| result!(s.cuda, cuGraphLaunch(exec, s.stream)),
    ),
    ("cuMemAlloc_v2 on another device", NOTHING, |s, _| {
        let mut here = 0u64;
        cu!(s.cuda, cuCtxGetCurrent(&mut here));
        s.cuda.context(1);
        let code = result!(s.cuda, cuMemAlloc_v2(&mut 0u64, 64u64));
        cu!(s.cuda, cuCtxSetCurrent(here));
        code
    }),
];

#[test]
fn who_relies_on_these_waiting_races() {
    passes(here!(), &[], |cuda| {
        type Waiting = fn(&Spinning);
        let calls: [(&str, Waiting); 3] = [
            ("cuMemAlloc", |s: &Spinning| {
                cu!(s.cuda, cuMemAlloc_v2(&mut 0u64, 64u64));
            }),
            ("cuMemFree", |s: &Spinning| {
                let at = s.cuda.put(&[1]);
                cu!(s.cuda, cuMemFree_v2(at));
            }),
            ("cuStreamSynchronize", |s: &Spinning| {
                cu!(s.cuda, cuStreamSynchronize(s.stream));
            }),
        ];
        for (name, wait) in calls {
            let (s, add) = Spinning::new(cuda, |s| s.cuda.function(s.module, "add"));
            cu!(cuda, cuMemsetD32Async(s.flag, 1u32, 1u64, s.stream));
            // Two streams add to the same words, with nothing but the call between.
            cuda.launch(add, s.stream, 4, &[s.room, 1]);
            wait(&s);
            cuda.launch(add, s.spinner, 4, &[s.room, 1]);
            cu!(cuda, cuCtxSynchronize());
            let findings = cuda.findings();
            let races = findings.lines().any(|l| l.starts_with("race: "));
            assert_eq!(races, name != "cuStreamSynchronize", "{name}: {findings}");
            cu!(cuda, cuDevicePrimaryCtxReset_v2(0));
        }
    });
}

#[test]
fn these_do_not_wait() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        for (name, prepare, call) in GO_ON {
            let (spinning, prepared) = Spinning::new(cuda, prepare);
            assert_eq!(call(&spinning, prepared), 0, "{name}");
            // The kernel still runs, and is released now.
            assert_eq!(
                result!(cuda, cuStreamQuery(spinning.spinner)),
                600,
                "{name}"
            );
            cu!(
                cuda,
                cuMemsetD32Async(spinning.flag, 1u32, 1u64, spinning.stream)
            );
            cu!(cuda, cuCtxSynchronize());
            assert_eq!(cuda.findings(), "", "{name}");
            cu!(cuda, cuDevicePrimaryCtxReset_v2(0));
        }
    });
}

#[test]
fn what_is_loaded_eagerly_does_not_wait_at_its_launch() {
    passes(here!(), &[("CUDA_MODULE_LOADING", "EAGER")], |cuda| {
        let (spinning, kernel) = Spinning::new(cuda, |s| {
            let mut mode = 0u32;
            cu!(cuda, cuModuleGetLoadingMode(&mut mode));
            assert_eq!(mode, 1);
            let mut functions = [0u64; 4];
            cu!(
                cuda,
                cuModuleEnumerateFunctions(&mut functions[..], 4u32, s.module)
            );
            // In the order of their names.
            functions[0]
        });
        assert_eq!(spinning.try_launch(kernel), 0);
        cu!(
            cuda,
            cuMemsetD32Async(spinning.flag, 1u32, 1u64, spinning.stream)
        );
        cu!(cuda, cuCtxSynchronize());
    });
}

#[test]
fn a_function_that_was_enumerated_is_loaded_when_it_is_needed() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (mut mode, mut state) = (0u32, 9u32);
        cu!(cuda, cuModuleGetLoadingMode(&mut mode));
        assert_eq!(mode, 2);
        let module = cuda.module(KERNELS);
        let mut functions = [0u64; 4];
        cu!(
            cuda,
            cuModuleEnumerateFunctions(&mut functions[..], 4u32, module)
        );
        cu!(cuda, cuFuncIsLoaded(&mut state, functions[0]));
        assert_eq!(state, 0);
        cu!(cuda, cuFuncLoad(functions[0]));
        cu!(cuda, cuFuncIsLoaded(&mut state, functions[0]));
        assert_eq!(state, 1);
        let add = cuda.function(module, "add");
        assert_eq!(add, functions[0]);
    });
}

#[test]
fn pinned_memory_waits_for_every_device() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        let (_, ()) = Spinning::new(cuda, |_| ());
        cuda.context(1);
        let mut at = 0u64;
        // The device that spins ends; this one was only waiting for it.
        cu!(cuda, cuMemHostAlloc(&mut at, 64u64, 3u32));
        let findings = cuda.findings();
        assert!(
            findings.contains("the host waits in cuMemHostAlloc, which waits"),
            "{findings}"
        );
    });
}
