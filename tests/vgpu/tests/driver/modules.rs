//! Modules, libraries, functions, launches.

use std::ffi::{CStr, CString};

use crate::cuda::{Cuda, KERNELS, passes};
use crate::{cu, fails, here, result};

fn library(cuda: &Cuda) -> u64 {
    let text = CString::new(KERNELS).expect("a text");
    let mut library = 0u64;
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
    library
}

#[test]
fn a_module_has_functions_and_variables() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let (mut at, mut bytes) = (0u64, 0u64);
        cu!(
            cuda,
            cuModuleGetGlobal_v2(&mut at, &mut bytes, module, c"counter".as_ptr())
        );
        assert_eq!((bytes, cuda.get(at, 1)), (4, vec![7]));
        fails!(
            500,
            cuda,
            cuModuleGetGlobal_v2(&mut at, &mut bytes, module, c"none".as_ptr())
        );
        let mut function = 0u64;
        fails!(
            500,
            cuda,
            cuModuleGetFunction(&mut function, module, c"none".as_ptr())
        );
        let mut count = 0u32;
        cu!(cuda, cuModuleGetFunctionCount(&mut count, module));
        let mut functions = vec![0u64; count as usize];
        cu!(
            cuda,
            cuModuleEnumerateFunctions(&mut functions[..], count, module)
        );
        let mut names: Vec<String> = functions
            .iter()
            .map(|&f| {
                let mut name = std::ptr::null();
                cu!(cuda, cuFuncGetName(&mut name, f));
                // SAFETY: the driver gives a text that ends in zero.
                let name: &CStr = unsafe { CStr::from_ptr(name) };
                name.to_str().expect("a name").to_owned()
            })
            .collect();
        names.sort();
        assert_eq!(names, ["add", "copy", "fault", "spin"]);
        let add = cuda.function(module, "add");
        assert!(functions.contains(&add));
        let mut places = Vec::new();
        for n in 0..2u64 {
            let (mut offset, mut size) = (9u64, 9u64);
            cu!(cuda, cuFuncGetParamInfo(add, n, &mut offset, &mut size));
            places.push((offset, size));
        }
        assert_eq!(places, [(0, 8), (8, 4)]);
        let (mut offset, mut size) = (0u64, 0u64);
        fails!(
            1,
            cuda,
            cuFuncGetParamInfo(add, 2u64, &mut offset, &mut size)
        );
        let (mut owner, mut state) = (0u64, 9u32);
        cu!(cuda, cuFuncGetModule(&mut owner, add));
        cu!(cuda, cuFuncIsLoaded(&mut state, add));
        assert_eq!((owner, state), (module, 1));
        cu!(cuda, cuModuleUnload(module));
        fails!(400, cuda, cuModuleUnload(module));
        fails!(400, cuda, cuFuncLoad(add));
    });
}

#[test]
fn a_library_is_loaded_into_each_context_that_uses_it() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        cu!(cuda, cuInit(0u32));
        // Without a context, as on a device.
        let library = library(cuda);
        let mut kernel = 0u64;
        cu!(
            cuda,
            cuLibraryGetKernel(&mut kernel, library, c"add".as_ptr())
        );
        let mut function = 0u64;
        fails!(201, cuda, cuKernelGetFunction(&mut function, kernel));
        let mut count = 0u32;
        cu!(cuda, cuLibraryGetKernelCount(&mut count, library));
        assert_eq!(count, 4);
        let mut variables = Vec::new();
        for device in 0..2 {
            cuda.context(device);
            let data = cuda.put(&[1; 4]);
            // The kernel's handle launches, and so does the function's.
            cuda.launch(kernel, 0, 4, &[data, 1]);
            cu!(cuda, cuKernelGetFunction(&mut function, kernel));
            cuda.launch(function, 0, 4, &[data, 1]);
            assert_eq!(cuda.get(data, 4), [3; 4]);
            let (mut at, mut bytes) = (0u64, 0u64);
            cu!(
                cuda,
                cuLibraryGetGlobal(&mut at, &mut bytes, library, c"counter".as_ptr())
            );
            variables.push(at);
            let mut threads = 0i32;
            cu!(
                cuda,
                cuKernelGetAttribute(&mut threads, 0u32, kernel, device)
            );
            assert_eq!(threads, 1024);
        }
        assert_ne!(variables[0], variables[1]);
        let mut at = 0u64;
        fails!(
            500,
            cuda,
            cuLibraryGetKernel(&mut at, library, c"none".as_ptr())
        );
        cu!(cuda, cuLibraryUnload(library));
        fails!(400, cuda, cuKernelGetFunction(&mut function, kernel));
    });
}

#[test]
fn images_that_are_none_are_refused_with_a_reason() {
    let body = |cuda: &Cuda| {
        cuda.start();
        let mut module = 0u64;
        for (image, code) in [
            (&b"\x7fELF machine code\0"[..], 209),
            (b"no ptx at all\0", 218),
            (b"\0", 218),
            (b".version 8.0 .target sm_80 .address_size 64 .visible .entry k() { frobnicate; }\0", 801),
            (b"\x50\xed\x55\xba\x01\0\x10\0\0\0\0\0\0\0\0\0", 209),
            (b"\x50\xed\x55\xba\x01\0\x10\0\xff\xff\xff\xff\xff\xff\xff\xff", 200),
            (b".version 8.0 .target sm_120 .address_size 64 .visible .entry k() { ret; }\0", 209),
        ] {
            let found = result!(cuda, cuModuleLoadData(&mut module, image));
            assert_eq!(found, code, "{}", image.escape_ascii());
        }
        fails!(1, cuda, cuModuleLoadData(&mut module, 0u64));
        fails!(
            301,
            cuda,
            cuModuleLoad(&mut module, c"/nowhere/at/all".as_ptr())
        );
    };
    if let Some(child) = crate::cuda::child(here!(), &[], body) {
        assert_eq!(child.code, Some(0), "{}", child.errors);
        for words in ["code=compute_XX", "frobnicate", "PTX for 120"] {
            assert!(child.errors.contains(words), "{words}: {}", child.errors);
        }
    }
}

#[test]
fn launches_that_do_not_fit_are_refused() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let params = [&data as *const u64, &data as *const u64];
        let launch = |grid: [u32; 3], block: [u32; 3], shared: u32| {
            let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
            result!(
                cuda,
                cuLaunchKernel(add, gx, gy, gz, bx, by, bz, shared, 0u64, &params[..], 0u64)
            )
        };
        for (grid, block) in [
            ([0, 1, 1], [1, 1, 1]),
            ([1, 0, 1], [1, 1, 1]),
            ([1, 1, 1], [0, 1, 1]),
            ([1, 1, 1], [1025, 1, 1]),
            ([1, 1, 1], [32, 32, 2]),
            ([1, 1, 1], [1, 1, 65]),
            ([1, 65_536, 1], [1, 1, 1]),
            ([1 << 31, 1, 1], [1, 1, 1]),
        ] {
            assert_eq!(launch(grid, block, 0), 1, "{grid:?} {block:?}");
        }
        assert_eq!(
            launch([1; 3], [1; 3], 50_000),
            1,
            "more shared memory than asked for"
        );
        cu!(cuda, cuFuncSetAttribute(add, 8u32, 60_000));
        assert_eq!(launch([1; 3], [1; 3], 50_000), 0);
        fails!(1, cuda, cuFuncSetAttribute(add, 8u32, 1 << 20));
        // Parameters that are not there, and too many in a buffer.
        fails!(
            1,
            cuda,
            cuLaunchKernel(
                add, 1u32, 1u32, 1u32, 1u32, 1u32, 1u32, 0u32, 0u64, 0u64, 0u64
            )
        );
        let (buffer, size) = ([0u8; 64], 64u64);
        let extra = [1, buffer.as_ptr() as u64, 2, &size as *const u64 as u64, 0];
        fails!(
            1,
            cuda,
            cuLaunchKernel(
                add,
                1u32,
                1u32,
                1u32,
                1u32,
                1u32,
                1u32,
                0u32,
                0u64,
                0u64,
                &extra[..]
            )
        );
        // A cooperative grid must fit at once.
        let fits = |blocks: u32| {
            result!(
                cuda,
                cuLaunchCooperativeKernel(
                    add,
                    blocks,
                    1u32,
                    1u32,
                    1024u32,
                    1u32,
                    1u32,
                    0u32,
                    0u64,
                    &params[..]
                )
            )
        };
        assert_eq!(fits(1_000), 720);
        cu!(cuda, cuCtxSynchronize());
    });
}
